"""Says what would run here for a layer and why, and checks that against the reference: `novolstm doctor`."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from novolstm_triton import plans, problems
from novolstm_triton.app import environment, measure
from novolstm_triton.app.isolated import CallError, Isolated
from novolstm_triton.app.text import UsageError
from novolstm_triton.call import state_dtype
from novolstm_triton.cells import CELLS
from novolstm_triton.engines.choice import check_triton, explain_backend
from novolstm_triton.plans import DEVICES, Device, KernelPlan, tuned
from novolstm_triton.problems import Problem, excess

DTYPES = {**tuned.DTYPES, "fp64": torch.float64}
"""Dtypes by the names that the command takes."""

CHECK_S = 10.0
"""After this many seconds the self-check starts no further case."""

_COMPILE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """The layer that is asked about."""

    hidden: int = 512
    batch: int = 16
    steps: int = 128
    dtype: str = "bf16"
    cell: str = "formula"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: a value that no layer can have.
        """
        for name in ("hidden", "batch", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        for name, known in (("dtype", DTYPES), ("cell", CELLS)):
            if getattr(self, name) not in known:
                raise UsageError(f"--{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        """Return the shape as one phrase."""
        return f"H={self.hidden} B={self.batch} T={self.steps} {self.dtype}, cell {self.cell}"


def doctor(shape: Shape, device: str = "auto", say: Callable[[str], None] = print) -> int:
    """Print versions, devices, backend, plan and limits for a layer, and the outcome of a self-check.

    Args:
        shape: the layer.
        device: "auto", "cpu" or "cuda"; or the name of a GPU whose properties are known without it, such as "h200".
        say: takes each line.

    Returns:
        0 if the layer would run and, on a device that is here, its results are right; else 1, after a line that says
        what to do.

    Raises:
        UsageError: a device that is neither here nor known.
    """
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda: PyTorch sees no GPU here")
    absent = None if device in ("auto", "cpu", "cuda") else known_device(device)
    where = torch.device("cuda" if absent or device == "cuda" or (device == "auto" and gpu) else "cpu")
    report = _Report(shape, where, absent, say)
    report.versions()
    report.devices()
    report.tuned_files()
    backend = report.backend()
    if backend is not None and report.plans(backend):
        report.self_check(backend)
    return report.end()


def known_device(name: str) -> Device:
    """Return the device of a tuned file, or of `plans/device.py`, that a name such as "h200" or "rtx-4090" stands for.

    Raises:
        UsageError: no device has this name.
    """
    devices = [file.device for file in _tuned_files()]
    devices += DEVICES
    wanted = _words(name)
    for device in devices:
        if wanted in (_words(device.name), _words(device.name)[-len(wanted) :]):
            return device
    names = ", ".join(dict.fromkeys("-".join(_words(known.name)) for known in devices))
    raise UsageError(f"--device: expected auto, cpu, cuda, or for a plan alone one of {names}; got {name!r}")


def _tuned_files() -> tuple[tuned.PlanFile, ...]:
    try:
        return tuned.in_force().files
    except ValueError as error:
        raise UsageError(str(error)) from error


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()


class _Report:
    """The lines of one call, and what was wrong."""

    def __init__(self, shape: Shape, where: torch.device, absent: Device | None, say: Callable[[str], None]) -> None:
        self._shape, self._where, self._absent, self._say = shape, where, absent, say
        self._dtype = DTYPES[shape.dtype]
        self._problems: list[str] = []
        say(f"novolstm doctor: {shape}")

    def _part(self, title: str) -> None:
        self._say("")
        self._say(title)

    def _line(self, name: str, text: object) -> None:
        self._say(f"  {name:<18} {text}")

    def _problem(self, text: str) -> None:
        self._line("PROBLEM", text)
        self._problems.append(text)

    def versions(self) -> None:
        self._part("Versions")
        for name, version in environment.versions().items():
            self._line(name, version)

    def devices(self) -> None:
        self._part("Devices")
        for number in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(number)
            arch = f"gfx {p.gcnArchName}" if torch.version.hip else f"compute capability {p.major}.{p.minor}"
            memory = f"{p.total_memory / 2**30:.0f} GiB"
            self._line(f"cuda:{number}", f"{p.name}, {arch}, {p.multi_processor_count} multiprocessors, {memory}")
        if not torch.cuda.device_count():
            self._line("cuda", "none: PyTorch sees no GPU")
        self._line("cpu", f"threads: {torch.get_num_threads()}")

    def tuned_files(self) -> None:
        """Print which tuned plans are looked up."""
        self._part("Tuned plans")
        self._line(tuned.VARIABLE, os.environ.get(tuned.VARIABLE) or "is not set")
        try:
            files = tuned.in_force().files
        except ValueError as error:
            self._problem(f"{error}: fix it, or unset {tuned.VARIABLE}")
            return
        for file in files:
            self._line(file.device.name, f"{len(file.entries)} in {file.path}")
        if not files:
            self._line("files", "none")

    def backend(self) -> str | None:
        """Return the backend that would run, or None if none would."""
        self._part("Backend")
        try:
            name, decided = explain_backend("auto", self._where)
        except ValueError as error:
            self._problem(f"{error}: unset it, or name a backend")
            return None
        reasons = dict(
            use_backend="use_backend says so",
            NOVOLSTM_BACKEND="NOVOLSTM_BACKEND is set so",
            device=f"tensors are on {'a GPU' if self._where.type == 'cuda' else 'the CPU'}, and nothing says otherwise",
        )
        self._line('"auto" is', f"{name}: {reasons[decided]}")
        if os.environ.get("TRITON_INTERPRET") == "1":
            self._line("TRITON_INTERPRET", "is set: Triton interprets kernels, very slowly")
        if name == "triton":
            try:
                CELLS[self._shape.cell].check_kernels()
                check_triton(self._dtype, self._where)
            except (TypeError, ValueError) as error:
                self._problem(f"the call raises: {error}")
                return None
        return name

    def plans(self, backend: str) -> bool:
        """Print how the layer is launched (on a device that is absent: by the kernels). Return whether it can be."""
        shape = self._shape
        if self._absent is not None:
            backend = "triton"
        if backend == "reference":
            self._part("Plan: none, the reference is a loop under autograd")
            return True
        itemsize = self._dtype.itemsize
        if backend == "triton":
            try:
                device = self._absent or Device(**measure.describe_device(str(self._where)))
            except ImportError as error:
                self._problem(f"{error}: install triton, or take backend='torch'")
                return False
            self._part(f"Plan on {device.name}" + (", as if it were here" if self._absent else ""))
            if not self._kernel_plans(device):
                return False
            buffer_dtype = self._dtype
        else:
            self._part("Plan")
            buffer_dtype = state_dtype(self._dtype)
        gates = len(CELLS[shape.cell].blocks)
        chunk = min(shape.steps, plans.chunk_steps(shape.batch, shape.hidden, gates, itemsize, backend))
        gates_bytes = chunk * shape.batch * gates * shape.hidden * buffer_dtype.itemsize
        self._line("chunks", f"{-(-shape.steps // chunk)}, of {chunk} steps at most")
        self._line("workspace", f"{gates_bytes:,} bytes for a chunk's pre-activations, its largest buffer;")
        self._line("", "in backward as many more for their gradients")
        return True

    def _kernel_plans(self, device: Device) -> bool:
        shape, cell = self._shape, self._shape.cell
        sizes = (shape.hidden, shape.batch, self._dtype, device)
        try:
            files = tuned.in_force()
            both = plans.plan(*sizes, cell=cell, plans=files)
        except ValueError as error:
            self._problem(f"{error}: take backend='torch', or other sizes")
            return False
        for direction in ("forward", "backward"):
            kernel_plan: KernelPlan = getattr(both, direction)
            backward = direction == "backward"
            found = files.find(*sizes, cell=cell, backward=backward)
            choices = tuned.choices_of(kernel_plan)
            self._line(direction, " ".join(f"{name}={value}" for name, value in choices.items()))
            if found is not None and choices == choices | found[1].choices:
                file, entry = found
                chosen = f"measured {entry.step_us:.2f} µs a step at B={entry.key.batch}, in {file.path}"
            elif plans.pinned() != plans.Pins():
                chosen = f"by pins and the model, {kernel_plan.step_us:.2f} µs a step: to rank plans, not to quote"
            else:
                why = "no tuned plan for this layer on this device"
                chosen = f"by the model, {kernel_plan.step_us:.2f} µs a step: to rank plans, not to quote; {why}"
            self._line("  chosen", chosen)
            self._line("  weights", self._residence(kernel_plan, sizes, cell, backward))
            used = f"at most {kernel_plan.smem_bytes:,} of {device.smem_bytes:,} bytes"
            self._line("  shared memory", used)
            launches = -(-kernel_plan.tiles // kernel_plan.tiles_per_launch)
            programs = kernel_plan.slices * min(kernel_plan.tiles, kernel_plan.tiles_per_launch)
            self._line("  launches", f"{launches} per chunk, of {programs} programs")
        return True

    def _residence(self, kernel_plan: KernelPlan, sizes: Any, cell: str, backward: bool) -> str:
        if kernel_plan.resident:
            return "stay in shared memory for all steps of a chunk"
        pins = dataclasses.replace(plans.pinned(), resident=True)
        try:
            plans.candidates(*sizes, cell=cell, backward=backward, pins=pins)
        except ValueError:
            return "stream from L2 in every step: no plan holds them in shared memory"
        return "stream from L2 in every step: by choice, shared memory could hold them"

    def self_check(self, backend: str) -> None:
        """Compare outputs and gradients of the backend with the reference."""
        if self._absent is not None:
            self._part(f"Self-check: none, {self._absent.name} is not here")
            return
        cases = list(_cases(self._shape, str(self._where)))
        self._part(f"Self-check: {backend} on {self._where} in {self._shape.dtype} against the float64 reference")
        worst: dict[str, tuple[float, float]] = {}
        began, done = time.monotonic(), 0
        with Isolated("novolstm_triton.app.measure") as process:
            for problem in cases:
                if done and time.monotonic() - began > CHECK_S:
                    break
                try:
                    arrays = self._compare(problem, backend, process)
                except (CallError, RuntimeError, ValueError, TypeError) as error:
                    message = " ".join(str(error).split())
                    self._problem(f"{problem}: {message}: take backend='torch', and please report it")
                    return
                done += 1
                # Not every cell has every array.
                for name, (error, bound) in arrays.items():
                    before = worst.get(name, (0.0, math.inf))
                    worst[name] = max(before, (error, bound), key=lambda pair: excess(*pair))
        wrong = [name for name, pair in worst.items() if excess(*pair) > 1]
        self._line("quantity", "error    allowed   (relative to the largest magnitude)")
        for name, (error, allowed) in worst.items():
            self._line(name, f"{error:.1e}  {allowed:.1e}{'  WRONG' if name in wrong else ''}")
        cases_s = time.monotonic() - began
        self._line("cases", f"{done} of {len(cases)} in {cases_s:.1f} s: {', '.join(map(str, cases[:done]))}")
        if wrong:
            self._problem(f"wrong results in {', '.join(wrong)}: take backend='reference', and please report it")

    def _compare(self, problem: Problem, backend: str, process: Isolated) -> dict[str, Any]:
        if backend != "triton":
            return problems.compare(problem, backend, self._dtype)
        # A kernel may hang.
        dtype = str(self._dtype).removeprefix("torch.")
        arguments = dict(problem=dataclasses.asdict(problem), dtype=dtype, backend=backend)
        return process.call("check_backend", _COMPILE_S, **arguments)

    def end(self) -> int:
        """Print the limits and the verdict, and return the exit code."""
        self._part("Limits")
        self._line("fp64", "needs backend='torch' or 'reference', on a GPU, too")
        self._line("kernels", "need a GPU that holds all slices of a batch tile at once")
        self._line("second derivatives", "run the reference, with its time and memory")
        self._say("")
        if self._problems:
            self._say(f"{len(self._problems)} problem{'s' * (len(self._problems) > 1)}, see above.")
        elif self._absent is not None:
            self._say("The plan is possible; nothing was run.")
        else:
            self._say("All is well.")
        return 1 if self._problems else 0


def _cases(shape: Shape, where: str) -> Iterator[Problem]:
    """Yield NovoLSTM's variants with ragged sizes, lengths and both directions, then the layer itself, cut short."""
    yield Problem(12, 5, 37, lengths=True, cell="formula", device=where)
    yield Problem(12, 5, 37, lengths=True, cell="notebook", reverse=True, device=where)
    yield Problem(4, min(shape.batch, 64), min(shape.hidden, 1024), cell=shape.cell, device=where)
