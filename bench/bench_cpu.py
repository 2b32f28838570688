"""NovoLSTM on the CPU against nn.LSTM, float32, two threads: `pytest bench/bench_cpu.py --benchmark-only`.

`test_ratio` alternates the two layers, so that whatever else the machine does meets both, and holds the ratio of
forward + backward under its bound. Other layers and sizes, one at a time: bench_throughput.py.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from novolstm_triton import NovoLSTM

# (T, B, I, H): the bound on time(NovoLSTM) / time(nn.LSTM), forward + backward.
BOUNDS = {(256, 32, 256, 256): 3.0, (1024, 8, 128, 128): 3.0, (512, 64, 256, 512): 3.0, (256, 1, 256, 256): 4.0}
IDS = ["T{}-B{}-I{}-H{}".format(*sizes) for sizes in BOUNDS]
LAYERS = {"novolstm": NovoLSTM, "nn.LSTM": torch.nn.LSTM}


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


@pytest.mark.parametrize("sizes", BOUNDS, ids=IDS)
def test_ratio(benchmark, sizes):
    jobs = {name: job(layer_type, sizes) for name, layer_type in LAYERS.items()}
    times_ms = {name: [] for name in jobs}

    def alternate() -> None:
        # Each is first every other round.
        for name in list(jobs)[:: 1 if len(times_ms["novolstm"]) % 2 else -1]:
            start = time.perf_counter()
            jobs[name]()
            times_ms[name].append((time.perf_counter() - start) * 1e3)

    for _ in range(2):
        for run in jobs.values():
            run()
    benchmark.group = "ratio"
    benchmark.pedantic(alternate, rounds=rounds_of(sizes))
    ratio = statistics.median(a / b for a, b in zip(*times_ms.values(), strict=True))
    for name, times in times_ms.items():
        benchmark.extra_info[f"{name} median ms"] = round(statistics.median(times), 2)
    benchmark.extra_info["ratio"] = round(ratio, 3)
    print(f"\n{sizes}: {ratio:.2f} times nn.LSTM")
    assert ratio <= BOUNDS[sizes]
