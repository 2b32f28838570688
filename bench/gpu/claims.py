"""What the layer claims on a GPU besides being right and fast, for checks.py and tests/test_gpu.py.

It finds novolstm_triton as an installed package, or as what library.py has loaded.
"""

from typing import Any

import torch
from layers import DTYPES, pinned

from novolstm_triton import NovoLSTM, problems

MEMORY_RATIO = 0.4
"""Bound on the peak memory of forward and backward at T=8192, B=64, I=H=512 in bf16, against nn.LSTM's."""


def _call(problem: Any, dtype: torch.dtype) -> tuple[Any, list[torch.Tensor]]:
    """Return a function that runs forward and backward once and returns all results, and the inputs."""
    inputs, lengths, grads = problem.draw()
    inputs = [a.to(problem.device, dtype).requires_grad_() for a in inputs]
    grads = [g.to(problem.device, dtype) for g in grads]
    lengths = None if lengths is None else lengths.to(problem.device)

    def run() -> list[torch.Tensor]:
        outputs = problem.call(inputs, lengths, "triton")
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, grads)]

    return run, inputs


def graph_differences(problem: Any, dtype: torch.dtype) -> int:
    """Return how many arrays differ between a call and the third replay of its graph, on inputs changed in between."""
    run, inputs = _call(problem, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        # A replay must read what the inputs hold now, not what they held then.
        inputs[0].mul_(0.5)
    expected = [a.clone() for a in run()]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return sum(not torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def run_without_waiting(problem: Any, dtype: torch.dtype) -> None:
    """Run forward and backward such that any wait of the host for the device raises, after a call that compiles."""
    run, _ = _call(problem, dtype)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()


def peaks(steps: int, batch: int, inputs: int, hidden: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the peak bytes of forward and backward of this layer and of nn.LSTM, beyond parameters, x and dy.

    Each is measured in its second call, alone; gradients of the parameters and of x are part of it.
    """
    where: dict[str, Any] = dict(device="cuda", dtype=dtype)
    x = torch.randn(steps, batch, inputs, **where).requires_grad_()
    dy = torch.randn(steps, batch, hidden, **where)
    found = []
    for layer in (NovoLSTM(inputs, hidden, backend="triton", **where), torch.nn.LSTM(inputs, hidden, **where)):
        for _ in range(2):
            x.grad = None
            layer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer(x)[0].backward(dy)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        found.append(peak)
        x.grad = None
        layer.zero_grad(set_to_none=True)
    return found[0], found[1]


def measure(claim: str, problem: dict[str, Any], dtype: str, pins: dict[str, Any]) -> float:
    """Return a claim's figure. Arguments are of JSON's types, for `novolstm_triton.app.isolated`.

    Args:
        claim: "exact": the largest error in units of its bound; "graph": arrays that differ; "nosync": nothing, or it
            raises; "memory": the ratio of the peaks in units of MEMORY_RATIO.
        problem: fields of `novolstm_triton.problems.Problem`.
        dtype: a key of `layers.DTYPES`.
        pins: arguments of `plan.forced`.

    Raises:
        ValueError: the device refuses the plan.
    """
    drawn = problems.Problem(device="cuda", **problem)
    with pinned(pins):
        if claim == "exact":
            return max(problems.excess(*pair) for pair in problems.compare(drawn, "triton", DTYPES[dtype]).values())
        if claim == "graph":
            return float(graph_differences(drawn, DTYPES[dtype]))
        if claim == "nosync":
            run_without_waiting(drawn, DTYPES[dtype])
            return 0.0
        ours, theirs = peaks(drawn.steps, drawn.batch, drawn.inputs_size, drawn.hidden, DTYPES[dtype])
        return ours / theirs / MEMORY_RATIO
