"""The timings and memory measurements, on the device."""

import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable

import roofline
import torch

from .device import synchronize, unusable
from .library import layers
from .results import row_head
from .tasks import Task, entry_name

CALLS_MS = 150.0
"""Time for each entry's calls of either kind."""


class Timed:
    """A layer with its row of the report."""

    def __init__(self, task: Task, entry: Task, device: str) -> None:
        self.name, self.device = entry_name(entry), device
        self.row = row_head(task, entry)
        sizes = layers.Sizes(task["steps"], task["batch"], task["hidden"], task["hidden"])
        self.layer = layers.Layer(entry["layer"], sizes, entry["dtype"], device, entry["pins"])
        self.plans = self.layer.plan()
        if self.plans is not None:
            self.row["plan"] = {name: dataclasses.asdict(plan) for name, plan in self.plans.items()}
            self.row["exchange"] = self.plans["forward"].exchange

    def prepare(self) -> None:
        """Make the first calls, which compile what is not in Triton's cache, and measure the peak of a later one."""
        began = time.monotonic()
        self.layer.run("forward")
        self.layer.run("forward_backward")
        synchronize(self.device)
        self.row["first_call_s"] = round(time.monotonic() - began, 2)
        # A replay allocates nothing.
        if self.device == "cuda" and self.layer.name != "graphed":
            self.row["peak_mib"] = self.peak_bytes() / 2**20

    def peak_bytes(self) -> int:
        """Return the peak of memory in forward and backward, gradients included, beyond what was there before."""
        self.layer.clear()
        synchronize(self.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.layer.run("forward_backward")
        synchronize(self.device)
        return torch.cuda.max_memory_allocated() - before

    def time_ms(self, passes: str) -> float:
        """Time one call of `forward` or `forward_backward`."""
        if self.device != "cuda":
            began = time.perf_counter()
            self.layer.run(passes)
            return (time.perf_counter() - began) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.layer.run(passes)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def enter(self, passes: str, times_ms: list[float], gpu: "roofline.Gpu | None") -> None:
        """Enter the figures of the calls of one kind into the row."""
        us_per_step = statistics.median(times_ms) * 1e3 / self.layer.sizes.steps
        cell = roofline.LSTM if self.layer.name in ("nn.LSTM", "flashrnn") else roofline.NOVOLSTM
        sizes = roofline.Sizes(*self.layer.sizes, itemsize=self.layer.x.element_size())
        roofline_us = roofline.of_plan(cell, sizes, gpu, self.plans, backward=passes == "forward_backward")
        figures = dict(
            us_per_step=us_per_step,
            least_us_per_step=min(times_ms) * 1e3 / self.layer.sizes.steps,
            tokens_per_s=self.layer.sizes.batch / us_per_step * 1e6,
            roofline_us_per_step=roofline_us,
            roofline_fraction=None if roofline_us is None else roofline_us / us_per_step,
            calls=len(times_ms),
        )
        self.row |= {f"{passes}_{name}": value for name, value in figures.items()}


def prepared(task: Task, device: str, announce: Callable[[str], None], prepare: Callable) -> tuple[list, list[dict]]:
    """Return the entries of a task that could be prepared, and rows of what refused to be, or raised."""
    ready, failures = [], []
    for entry in task["entries"]:
        announce(entry_name(entry))
        try:
            timed = Timed(task, entry, device)
            if entry["pins"] and any(timed.row["plan"] == other.row.get("plan") for other in ready):
                # What the plan chooses by itself is being timed already.
                continue
            prepare(timed)
            ready.append(timed)
        except Exception as error:
            if unusable(device):
                raise
            traceback.print_exc()
            reason = f"refused: {error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            failures.append(dict(row_head(task, entry), error=reason))
    return ready, failures


def run_rows(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Time the entries of a task in turn; one that raises becomes a row with an error, and the others go on."""
    ready, failures = prepared(task, device, announce, Timed.prepare)
    gpu = roofline.gpu_named(torch.cuda.get_device_name()) if device == "cuda" else None
    if gpu is not None:
        gpu = roofline.with_measured(gpu, task.get("constants", {}))
    for passes in ("forward", "forward_backward") if ready else ():
        first_ms = []
        for timed in ready:
            announce(timed.name)
            timed.time_ms(passes)
            first_ms.append(timed.time_ms(passes))
        # In turns.
        rounds = task.get("rounds") or min(30, max(5, int(CALLS_MS * len(ready) / sum(first_ms))))
        times_ms: dict[str, list[float]] = {timed.name: [] for timed in ready}
        for number in range(rounds):
            for timed in ready[:: 1 if number % 2 else -1]:
                announce(timed.name)
                times_ms[timed.name].append(timed.time_ms(passes))
        for timed in ready:
            timed.enter(passes, times_ms[timed.name], gpu)
    return dict(results=[timed.row for timed in ready] + failures)


def run_memory(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Measure the peak memory of the entries, one after the other, each alone on the device."""
    rows = []
    for entry in task["entries"]:

        def measure(timed: Timed) -> None:
            timed.layer.run("forward_backward")
            timed.row["peak_mib"] = timed.peak_bytes() / 2**20 if device == "cuda" else None

        ready, failures = prepared(dict(task, entries=[entry]), device, announce, measure)
        rows += [timed.row for timed in ready] + failures
        del ready
        if device == "cuda":
            torch.cuda.empty_cache()
    return dict(results=rows)
