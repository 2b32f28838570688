"""The timings of gpu.py, on the device."""

import statistics
import time
import traceback
from collections.abc import Callable

import torch
from gpu_device import synchronize, unusable
from gpu_library import DTYPES, novolstm_triton, pinned, plans_of
from gpu_results import row_head
from gpu_tasks import Task, entry_name


class Timed:
    """A layer with its input and output gradient, ready to be timed."""

    def __init__(self, task: Task, entry: Task, device: str) -> None:
        dtype = DTYPES[entry["dtype"]]
        self.name, self.pins, self.device = entry_name(entry), entry["pins"], device
        self.row = row_head(task, entry)
        hidden, batch, steps = task["hidden"], task["batch"], task["steps"]
        torch.manual_seed(0)
        where = dict(device=device, dtype=dtype)
        if entry["layer"] == "nn.LSTM":
            self.layer = torch.nn.LSTM(hidden, hidden, **where)
        else:
            backend = "triton" if entry["layer"] == "novolstm" else "reference"
            self.layer = novolstm_triton.NovoLSTM(hidden, hidden, gate_gain="hidden", backend=backend, **where)
        if entry["layer"] == "novolstm":
            with pinned(self.pins):
                self.row["plan"] = plans_of(hidden, batch, dtype, device, "formula")
            self.row["exchange"] = self.row["plan"]["forward"]["exchange"]
        self.call = torch.compile(self.layer) if entry["layer"] == "compiled" else self.layer
        self.x = torch.randn(steps, batch, hidden, **where).requires_grad_()
        self.dy = torch.randn(steps, batch, hidden, **where)

    def forward(self) -> None:
        """Run the layer for its output alone."""
        self.layer.eval()
        with torch.no_grad():
            self.call(self.x)

    def forward_backward(self) -> None:
        """Run the layer, then the gradients of its parameters and its input."""
        self.layer.train()
        self.clear()
        self.call(self.x)[0].backward(self.dy)

    def clear(self) -> None:
        """Free the gradients."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def prepare(self) -> None:
        """Make the first calls, which compile, and measure the peak of memory in a later one."""
        began = time.monotonic()
        with pinned(self.pins):
            self.forward()
            self.forward_backward()
            synchronize(self.device)
            self.row["first_call_s"] = round(time.monotonic() - began, 2)
            self.row["peak_mib"] = None
            if self.device == "cuda":
                self.clear()
                torch.cuda.reset_peak_memory_stats()
                baseline = torch.cuda.memory_allocated()
                self.forward_backward()
                synchronize(self.device)
                self.row["peak_mib"] = round((torch.cuda.max_memory_allocated() - baseline) / 2**20, 2)

    def time_ms(self, passes: str) -> float:
        """Time one call of `forward` or `forward_backward`."""
        function = getattr(self, passes)
        with pinned(self.pins):
            if self.device != "cuda":
                began = time.perf_counter()
                function()
                return (time.perf_counter() - began) * 1e3
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)


def run_rows(task: Task, device: str, announce: Callable[[str], None]) -> dict:
    """Time the entries of a task in turn; one that raises becomes a row with an error, and the others go on."""
    done, ready = [], []
    for entry in task["entries"]:
        announce(entry_name(entry))
        try:
            timed = Timed(task, entry, device)
            if timed.pins and any(timed.row.get("plan") == other.row.get("plan") for other in ready):
                # What the plan chooses by itself is being timed already.
                continue
            timed.prepare()
            ready.append(timed)
        except Exception as error:
            if unusable(device):
                raise
            traceback.print_exc()
            done.append(dict(row_head(task, entry), error=f"{type(error).__name__}: {error}"))
    for passes in ("forward", "forward_backward") if ready else ():
        first_ms = []
        for timed in ready:
            announce(timed.name)
            timed.time_ms(passes)
            first_ms.append(timed.time_ms(passes))
        # About 0.4 s for each, in turns.
        rounds = task.get("rounds") or min(30, max(5, int(400 * len(ready) / sum(first_ms))))
        times_ms: dict[str, list[float]] = {timed.name: [] for timed in ready}
        for number in range(rounds):
            for timed in ready[:: 1 if number % 2 else -1]:
                announce(timed.name)
                times_ms[timed.name].append(timed.time_ms(passes))
        for timed in ready:
            timed.row[f"{passes}_us_per_step"] = statistics.median(times_ms[timed.name]) * 1e3 / task["steps"]
            timed.row[f"{passes}_least_us_per_step"] = min(times_ms[timed.name]) * 1e3 / task["steps"]
            timed.row[f"{passes}_calls"] = rounds
    return dict(results=[timed.row for timed in ready] + done)
