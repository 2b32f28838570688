"""Checks and times a layer on this machine. Arguments and results are JSON values, for `isolated.py`."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from novolstm_triton import problems
from novolstm_triton.plans import Device, plan, tuned
from novolstm_triton.problems import Problem

CHECK_STEPS = 5
"""Time steps of a plan's check: enough for every slot of a ring buffer to be used again."""

_ENOUGH_S = 0.3
_MIN_CALLS, _MAX_CALLS = 5, 100


def describe_device(where: str) -> dict[str, Any]:
    """Return the fields of `plan.Device` of a PyTorch device; "cpu" is Triton's interpreter."""
    # It imports triton.
    from novolstm_triton.engines import launch

    # Of a tensor: its device has the number that "cuda" lacks.
    return dataclasses.asdict(launch._device(torch.empty(0, device=where).device))


def check_backend(problem: dict[str, Any], dtype: str, backend: str) -> dict[str, tuple[float, float]]:
    """Return error and bound of each output and gradient against the reference in float64; see `problems.compare`."""
    return problems.compare(Problem(**problem), backend, getattr(torch, dtype))


def check_plan(key: dict[str, Any], choices: dict[str, Any], device: dict[str, Any], where: str) -> dict[str, Any]:
    """Return error and bound of each output and gradient under a plan, against the torch backend in float64.

    Args:
        key: fields of `tuned.Key`: for which layer, and which direction.
        choices: the plan's.
        device: fields of `plan.Device`.
        where: name of the PyTorch device.

    Raises:
        ValueError: the device or the layer does not allow the plan.
    """
    layer = tuned.Key(**key)
    problem = _problem(layer, CHECK_STEPS, 32, where)
    with only_plan(layer, choices, Device(**device)):
        return problems.compare(problem, "triton", tuned.DTYPES[layer.dtype], "torch")


def time_plan(
    key: dict[str, Any], choices: dict[str, Any], device: dict[str, Any], where: str, steps: int = 256
) -> float:
    """Return the time of a step under a plan, in µs: the median over calls of the whole layer, divided by `steps`.

    Forward is timed without autograd, backward as the gradients of all inputs; the other arguments are those of
    `check_plan`. The layer has as many inputs as units.

    Raises:
        ValueError: the device or the layer does not allow the plan.
    """
    layer = tuned.Key(**key)
    dtype = tuned.DTYPES[layer.dtype]
    problem = _problem(layer, steps, layer.hidden, where)
    inputs, grads = _tensors(problem, dtype)

    def forward() -> Any:
        return problem.call(inputs, None, "triton")

    with only_plan(layer, choices, Device(**device)):
        if layer.direction == "forward":
            with torch.no_grad():
                return _median_us(forward, where) / steps
        outputs = forward()
        # γ and β of a cell without normalisation are empty.
        used = [a for a in inputs if a.numel()]
        return _median_us(lambda: torch.autograd.grad(outputs, used, grads, retain_graph=True), where) / steps


@contextlib.contextmanager
def only_plan(key: tuned.Key, choices: dict[str, Any], device: Device) -> Iterator[None]:
    """Put one entry in force, as a file's would be, instead of all others.

    Raises:
        ValueError: no plan has these choices, or other choices would run.
    """
    entry = tuned.Entry(key, choices, 0.0)
    plans = tuned.TunedPlans((tuned.PlanFile("", device, {}, (entry,)),))
    sizes = (key.hidden, key.batch, tuned.DTYPES[key.dtype], device)
    kernel_plan = getattr(plan(*sizes, cell=key.cell, plans=plans), key.direction)
    if (taken := tuned.choices_of(kernel_plan)) != tuned.choices_of(kernel_plan) | choices:
        raise ValueError(f"expected {choices}, the plan has {taken}")
    before = tuned.put_in_force(plans)
    try:
        yield
    finally:
        tuned.put_in_force(before)


def _problem(key: tuned.Key, steps: int, inputs_size: int, where: str) -> Problem:
    return Problem(steps, key.batch, key.hidden, inputs_size=inputs_size, cell=key.cell, device=where)


@functools.lru_cache(maxsize=1)
def _tensors(problem: Problem, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return a problem's inputs and output gradients on its device."""
    inputs, _, grads = problem.draw()
    return (
        [a.to(problem.device, dtype).requires_grad_() for a in inputs],
        [g.to(problem.device, dtype) for g in grads],
    )


def _median_us(call: Callable[[], Any], where: str) -> float:
    """Return the median time of a call in µs, after two calls that warm up."""
    call()
    first_us = _time_us(call, where)
    calls = min(_MAX_CALLS, max(_MIN_CALLS, int(_ENOUGH_S * 1e6 / first_us)))
    return statistics.median(_time_us(call, where) for _ in range(calls))


def _time_us(call: Callable[[], Any], where: str) -> float:
    if torch.device(where).type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(where)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
