"""Layers on the CPU against those of PyTorch, float32, two threads: `pytest bench/bench_cpu.py --benchmark-only`.

Two layers alternate, so that whatever else the machine does meets both, and the median ratio of their times is printed:
`test_ratio` of forward + backward over a sequence, `test_ratio_of_a_step` of calls of a single step. For one layer at a
time, and other sizes: bench_throughput.py.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from novolstm_triton import GRU, LSTM, RNN, LSTMCell, NovoLSTM

# Ours, and PyTorch's.
LAYERS = {
    "NovoLSTM": (NovoLSTM, torch.nn.LSTM),
    "LSTM": (LSTM, torch.nn.LSTM),
    "GRU": (GRU, torch.nn.GRU),
    "RNN": (RNN, torch.nn.RNN),
}
# (T, B, I, H)
SIZES = [(512, 64, 256, 512), (256, 32, 256, 256), (1024, 8, 128, 128), (256, 1, 256, 256)]
IDS = ["T{}-B{}-I{}-H{}".format(*sizes) for sizes in SIZES]

# Ours, PyTorch's, options, and the input of one step.
STEPS = {
    "cell": (LSTMCell, torch.nn.LSTMCell, {}, (4, 32)),
    "layer": (LSTM, torch.nn.LSTM, {}, (1, 4, 32)),
    "stacked": (LSTM, torch.nn.LSTM, dict(num_layers=2), (1, 4, 32)),
    "bidirectional": (LSTM, torch.nn.LSTM, dict(bidirectional=True), (1, 4, 32)),
}
CALLS = 200
"""Calls of a step that are timed together."""


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def job(layer_type: type[torch.nn.Module], sizes: tuple[int, int, int, int]) -> Callable[[], None]:
    """Return a function that runs a layer once, forward and backward."""
    steps, batch, inputs, hidden = sizes
    torch.manual_seed(0)
    layer, x, dy = layer_type(inputs, hidden), torch.randn(steps, batch, inputs), torch.randn(steps, batch, hidden)

    def both() -> None:
        layer.zero_grad()
        layer(x)[0].backward(dy)

    return both


def rounds_of(sizes: tuple[int, int, int, int]) -> int:
    """Return how often to repeat: the smaller the layer the more, 7 to 41 times."""
    steps, batch, inputs, hidden = sizes
    return min(41, max(7, 2**36 // (steps * batch * (inputs + hidden) * 5 * hidden)))


def step_job(layer_type: type[torch.nn.Module], options: dict[str, Any], shape: tuple[int, ...]) -> Callable[[], None]:
    """Return a function that calls a layer or cell `CALLS` times with one step, each with the state of the last."""
    layer, x = layer_type(32, 32, **options), torch.randn(shape)
    is_cell = isinstance(layer, (LSTMCell, torch.nn.LSTMCell))

    def calls() -> None:
        state = layer(x) if is_cell else layer(x)[1]
        for _ in range(CALLS):
            # Without their history, which would grow.
            state = tuple(s.detach() for s in state)
            state = layer(x, state) if is_cell else layer(x, state)[1]

    return calls


def ratio_of(benchmark: Any, jobs: dict[str, Callable[[], None]], rounds: int) -> float:
    """Alternate two jobs; return the median ratio of the first one's time to the second's."""
    times_ms = {name: [] for name in jobs}

    def alternate() -> None:
        # Each is first every other round.
        for name in list(jobs)[:: 1 if len(next(iter(times_ms.values()))) % 2 else -1]:
            start = time.perf_counter()
            jobs[name]()
            times_ms[name].append((time.perf_counter() - start) * 1e3)

    for _ in range(2):
        for run in jobs.values():
            run()
    benchmark.pedantic(alternate, rounds=rounds)
    ratio = statistics.median(a / b for a, b in zip(*times_ms.values(), strict=True))
    for name, times in times_ms.items():
        benchmark.extra_info[f"{name} median ms"] = round(statistics.median(times), 2)
    benchmark.extra_info["ratio"] = round(ratio, 3)
    return ratio


@pytest.mark.parametrize("sizes", SIZES, ids=IDS)
@pytest.mark.parametrize("name", LAYERS)
def test_ratio(benchmark, name, sizes):
    benchmark.group = "ratio"
    ours, theirs = LAYERS[name]
    other = f"nn.{theirs.__name__}"
    ratio = ratio_of(benchmark, {name: job(ours, sizes), other: job(theirs, sizes)}, rounds_of(sizes))
    print(f"\n{name} {sizes}: {ratio:.2f} times {other}")


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", STEPS)
def test_ratio_of_a_step(benchmark, name, grad):
    benchmark.group = "ratio of a step"
    *types, options, shape = STEPS[name]
    with torch.set_grad_enabled(grad):
        jobs = {kind.__module__.partition(".")[0]: step_job(kind, options, shape) for kind in types}
        ratio = ratio_of(benchmark, jobs, 21)
    print(f"\n{name}, {'with' if grad else 'without'} a graph: {ratio:.2f} times PyTorch's")
