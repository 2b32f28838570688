"""The checks, on the device."""

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from .device import synchronize
from .library import DTYPES, claims, novolstm_triton, pinned, plans_of, problems
from .results import shape_of
from .tasks import Task


def run_check(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Run a check of any kind and return its record."""
    began = time.monotonic()
    problem = problems.Problem(device=device, **task["problem"])
    dtype = DTYPES[task["dtype"]]
    tests = dict(exact=check_exact, repeat=check_repeat, growth=check_growth, long=check_long)
    tests |= dict(graph=check_graph, nosync=check_nosync, memory=check_memory)
    record = {key: task[key] for key in ("name", "dtype", "pins")} | dict(shape=shape_of(task["problem"]))
    with pinned(task["pins"]):
        plans = plans_of(problem.hidden, problem.batch, dtype, device, problem.cell)
        outcome = tests[task["test"]](problem, dtype, announce)
    record |= outcome
    # Not below the bound, rather than above it: NaN fails.
    record["ok"] = bool(record["error"] <= record["bound"])
    return dict(results=[record | dict(plan=plans, seconds=round(time.monotonic() - began, 2))])


def compare(problem: Any, result: dict, dtype: Any, truth: dict, bounds: dict) -> dict:
    """Return the error, and its bound, of the array that comes closest to its bound or exceeds it."""

    def nearness(pair: tuple[float, float]) -> float:
        # NaN is as near as can be.
        return pair[0] / pair[1] if math.isfinite(pair[0]) else math.inf

    arrays = {}
    for name, pair in problems.errors(result, truth).items():
        # The largest error or the root mean square, whichever is nearer to its bound.
        arrays[name] = max(zip(pair, bounds[name], strict=True), key=nearness)
    worst = max(arrays, key=lambda name: nearness(arrays[name]))
    return dict(error=arrays[worst][0], bound=arrays[worst][1], detail=f"({worst})", arrays=arrays)


def check_exact(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Compare outputs and every gradient with the float64 reference."""
    announce("triton")
    result = problem.run("triton", dtype)
    synchronize(problem.device)
    announce("reference")
    truth = problem.run("reference", torch.float64, rounded=dtype)
    announce("eager")
    return compare(problem, result, dtype, truth, problems.bounds(problem, dtype, truth))


def check_repeat(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Count the arrays that differ in any bit between the first of five runs and the others."""
    first, different = None, 0
    for number in range(5):
        announce(f"run {number}")
        result = problem.run("triton", dtype)
        synchronize(problem.device)
        if first is None:
            first = result
        different += sum(not torch.equal(result[name], first[name]) for name in first)
    finite_results = all(bool(a.isfinite().all()) for a in first.values())
    return dict(
        error=float(different) if finite_results else math.nan, bound=0.0, detail="arrays differ in 4 repetitions"
    )


def check_growth(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Measure by how many bytes twenty calls change the memory in use."""
    sizes = []
    for number in range(23):
        announce(f"run {number}")
        problem.run("triton", dtype)
        gc.collect()
        sizes.append(torch.cuda.memory_allocated() if problem.device == "cuda" else 0)
    return dict(error=float(abs(sizes[-1] - sizes[2])), bound=0.0, detail="bytes more after 20 calls")


def check_graph(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Count the arrays of forward and backward that a CUDA graph's replays make different from an ordinary call's."""
    announce("capture")
    different = claims.graph_differences(problem, dtype)
    return dict(error=float(different), bound=0.0, detail="arrays differ after capture and 3 replays")


def check_nosync(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Run forward and backward under torch.cuda.set_sync_debug_mode("error"): a wait for the device raises."""
    announce("call")
    claims.run_without_waiting(problem, dtype)
    return dict(error=0.0, bound=0.0, detail="waits for the device")


def check_memory(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Compare the peak memory of forward and backward with that of nn.LSTM."""
    announce("novolstm and nn.LSTM")
    ours, theirs = claims.peaks(problem.steps, problem.batch, problem.inputs_size, problem.hidden, dtype)
    detail = f"of nn.LSTM's peak: {ours} of {theirs} bytes"
    return dict(error=ours / theirs, bound=claims.MEMORY_RATIO, detail=detail, bytes=[ours, theirs])


def check_long(problem: Any, dtype: Any, announce: Callable[[str], None]) -> dict:
    """Compare the last steps of a long sequence, and dx there, with the reference from the carried state on.

    The state carried is the kernels' own, of the sequence without its tail; the first steps are compared as well.
    """
    tail = min(128, problem.steps // 2)
    inputs, _, _ = dataclasses.replace(problem, steps=1).draw()
    generator = torch.Generator().manual_seed(1)
    inputs[0] = torch.randn(problem.steps, problem.batch, problem.inputs_size, generator=generator)
    x, *others = (a.to(problem.device, dtype) for a in inputs)
    dy = torch.randn(tail, problem.batch, problem.hidden, generator=generator).to(problem.device, dtype)

    def head_and_tail(x: Any, arguments: list, backend: str) -> dict:
        x = x.detach().requires_grad_()
        y, _, _ = novolstm_triton.functional.novolstm(x, *arguments, gate_gain=problem.gate_gain, backend=backend)
        y[-tail:].backward(dy.to(x.dtype))
        return {"y": y[-tail:].detach(), "dx": x.grad[-tail:]} | ({"head": y[:tail].detach()} if len(x) > tail else {})

    announce("triton")
    result = head_and_tail(x, others, "triton")
    with torch.no_grad():
        _, h, c = novolstm_triton.functional.novolstm(x[:-tail], *others, gate_gain=problem.gate_gain, backend="triton")
    synchronize(problem.device)

    def short(dtype: Any) -> dict:
        announce(f"reference {dtype}")
        carried = [a.to(dtype) for a in (h, c, *others[2:])]
        start = [a.to(dtype) for a in others]
        end = head_and_tail(x[-tail:].to(dtype), carried, "reference")
        return end | {"head": head_and_tail(x[:tail].to(dtype), start, "reference")["y"]}

    truth = short(torch.float64)
    floor = problems.FLOORS[dtype]
    eager = problems.errors(short(dtype), truth)
    bounds = {name: tuple(2 * e + floor for e in pair) for name, pair in eager.items()}
    return compare(problem, result, dtype, truth, bounds)
