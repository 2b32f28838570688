"""Every plan for the listed devices, and what each way of exchanging promises: that no wait lasts forever.

The argument. Let all programs of a batch tile run at the same time, make the same sequence of arrivals and waits, and
let the n-th wait of each need nothing but what every program does before its own n-th wait. Of the programs that wait,
take one whose wait has the least number n. All others have come to their n-th wait or further, so all it needs has
been done, and it goes on. So some program can always go on, whatever the schedule, and each has finitely many steps.

`plans` yields the plans, `protocol` records the sequences in the interpreter.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton.language as tl
from triton.runtime import interpreter

from novolstm_triton import plan
from novolstm_triton.cells import CELLS
from novolstm_triton.kernels import backward, forward
from novolstm_triton.plans import Device, KernelPlan, Pins
from novolstm_triton.testing import cooperative
from novolstm_triton.testing.happens_before import Memory

from .interpreted import ROOMY, SELF_VALIDATING
from .problems import Problem

DEVICES = (plan.A100, plan.H100, plan.H200, plan.B200, plan.RTX_4090, plan.MI300X)

HIDDEN = (
    *range(1, 50),
    *range(63, 67),
    100,
    *range(127, 131),
    200,
    *range(255, 258),
    *range(288, 1025, 32),
    1500,
    2048,
    4096,
)
BATCH = (1, 17, 64, 1000)
DTYPES = (torch.bfloat16, torch.float32)
KINDS = ("elman_tanh", "gru", "layer_norm_lstm", "formula")
"""Cells with one, three, four and five recurrent blocks; the last two have sums over the units, the third of c, too."""

PINS = (Pins(), *(Pins(exchange=exchange, exchanges=n) for exchange in ("barrier", "words") for n in (1, 2)))


class Protocol(NamedTuple):
    """What the sequence of a kernel's arrivals and waits depends on, besides the numbers of slices and steps."""

    backward: bool
    exchange: str
    exchanges: int
    rows: bool
    """Whether the cell has sums over the units to exchange."""


def protocol_of(cell: str, is_backward: bool, kernel_plan: KernelPlan) -> Protocol:
    """Return a plan's protocol."""
    kernels = CELLS[cell].load_kernels()
    rows = kernels.grad_rows if is_backward else kernels.partial_rows
    return Protocol(is_backward, kernel_plan.exchange, kernel_plan.exchanges, rows > 0)


def plans(device: Device) -> Iterator[tuple[str, bool, int, int, KernelPlan]]:
    """Yield (cell, backward, H, B, plan) of everything that may be launched on a device."""
    for cell, is_backward, directions in itertools.product(KINDS, (False, True), (1, 2)):
        for hidden, batch, dtype, pins in itertools.product(HIDDEN, BATCH, DTYPES, PINS):
            options: dict[str, Any] = dict(cell=cell, directions=directions, backward=is_backward, pins=pins)
            try:
                found = plan.candidates(hidden, batch, dtype, device, **options)
            except ValueError:
                # Some pins fit no layer of a size.
                continue
            for kernel_plan in found:
                yield cell, is_backward, hidden, directions * batch, kernel_plan


def flaws(device: Device, hidden: int, kernel_plan: KernelPlan) -> list[str]:
    """Return what is wrong with a plan for a device."""
    found = []
    programs = kernel_plan.slices * kernel_plan.tiles_per_launch
    if kernel_plan.slices > 1 and programs > device.multiprocessors:
        found.append(f"{programs} programs wait for each other on {device.multiprocessors} multiprocessors")
    if kernel_plan.smem_bytes > device.smem_bytes:
        found.append(f"{kernel_plan.smem_bytes} bytes of shared memory of {device.smem_bytes}")
    if kernel_plan.num_warps * device.warp_size > 1024:
        found.append(f"{kernel_plan.num_warps} warps of {device.warp_size}")
    if kernel_plan.slices * kernel_plan.units < hidden or kernel_plan.units > kernel_plan.block_n:
        found.append(f"{kernel_plan.slices} slices of {kernel_plan.units} units in tiles of {kernel_plan.block_n}")
    if kernel_plan.tiles_per_launch < 1:
        found.append("no tile in a launch")
    return found


@dataclasses.dataclass
class Sequence:
    """What a program did: its arrivals and waits in order."""

    arrivals: int = 0
    waits: int = 0
    events: list[tuple] = dataclasses.field(default_factory=list)


class Recorder:
    """Records the sequences of a launch's programs, and what is wrong with them."""

    def __init__(self) -> None:
        self.launches: list[tuple[bool, dict[tuple, Sequence]]] = []
        """Whether it is backward's, and the sequences by the programs' indices."""
        self.flaws: list[str] = []
        self._waits_at_write: dict[tuple[int, int], tuple[tuple, int]] = {}

    def own(self) -> Sequence:
        """Return the sequence of the program that runs."""
        return self.launches[-1][1].setdefault(interpreter.interpreter_builder.grid_idx, Sequence())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is launched inside the block."""
        with contextlib.ExitStack() as stack:

            def replace(owner: Any, name: str, make: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

            for kernels in (forward, backward):
                replace(kernels, "arrive", self._arrive)
                replace(kernels, "wait", self._wait)
                replace(kernels, "await_blocks", self._await_blocks)
                replace(kernels, "collect_rows", self._collect_rows)
            replace(Memory, "__init__", self._begin)
            replace(Memory, "_put", self._put)
            replace(Memory, "_take", self._take)
            yield

    def _begin(self, operation: Any) -> Any:
        def begin(memory: Memory, *args: Any, **kwargs: Any) -> None:
            operation(memory, *args, **kwargs)
            names = [argument.name for argument in memory._all]
            self.launches.append(("dz_ptr" in names, {}))
            self._waits_at_write.clear()

        return begin

    def _arrive(self, operation: Any) -> Any:
        def arrive(*args: Any) -> None:
            own = self.own()
            own.arrivals += 1
            own.events.append(("arrive",))
            operation(*args)

        return arrive

    def _wait(self, operation: Any) -> Any:
        def wait(counter: Any, arrivals: Any, exchange: str, *rest: Any) -> None:
            if getattr(exchange, "value", exchange) == "barrier":
                own = self.own()
                own.waits += 1
                own.events.append(("wait", int(arrivals), own.arrivals))
            operation(counter, arrivals, exchange, *rest)

        return wait

    def _await_blocks(self, operation: Any) -> Any:
        def await_blocks(*args: Any) -> Any:
            self._begin_wait_for_words()
            return operation(*args)

        return await_blocks

    def _collect_rows(self, operation: Any) -> Any:
        def collect_rows(rows_ptr: Any, values: Any, *args: Any) -> Any:
            texts = [getattr(a, "value", a) for a in args if isinstance(a, (str, tl.constexpr))]
            if "words" in texts and len(values) > 0:
                self._begin_wait_for_words()
            return operation(rows_ptr, values, *args)

        return collect_rows

    def _begin_wait_for_words(self) -> None:
        own = self.own()
        own.waits += 1
        own.events.append(("words",))

    def _put(self, operation: Any) -> Any:
        def put(memory: Any, shadow: Any, program: int, words: Any, site: int) -> None:
            operation(memory, shadow, program, words, site)
            index = memory._programs[program]
            self._waits_at_write[id(memory), len(memory._snapshots) - 1] = index, self.own().waits

        return put

    def _take(self, operation: Any) -> Any:
        def take(memory: Any, shadow: Any, program: int, words: Any) -> None:
            if shadow.values is not None:
                own = self.own()
                for number in set(shadow.values.written[words].tolist()) - {0}:
                    writer, waits = self._waits_at_write[id(memory), number]
                    # The word may be there early; what counts is that its writer has no later wait before it.
                    if waits >= own.waits + 1:
                        self.flaws.append(f"wait {own.waits} takes what {writer} writes after its wait {waits}")
            operation(memory, shadow, program, words)

        return take


def protocol(kind: Protocol, slices: int) -> tuple[int, list[str]]:
    """Run a layer with a protocol; return how many waits a program of its kernel had, and what is wrong with any."""
    # A third exchange is that of sums of c, which no pin takes away.
    cell = "layer_norm_lstm" if kind.exchanges == 3 else "formula" if kind.rows else "lstm"
    exchanges = min(kind.exchanges, 2)
    recorder, words = Recorder(), SELF_VALIDATING if kind.exchange == "words" else ()
    pins: dict[str, Any] = dict(device=ROOMY, slices=slices, chunk=3, exchange=kind.exchange, exchanges=exchanges)
    problem = Problem(steps=5, batch=18, hidden=2 * slices + 1, cell=cell)
    checks: dict[str, Any] = dict(poison=True, one_writer=True, self_validating=words)
    with cooperative(slices, **checks), plan.forced(**pins), recorder.recording():
        problem.run("triton", torch.float32)
    waits, found = 0, list(recorder.flaws)
    for is_backward, launch in recorder.launches:
        if not launch:
            # A kernel whose programs have nothing to do with each other.
            continue
        tiles: dict[int, list[Sequence]] = {}
        for index, sequence in launch.items():
            tiles.setdefault(index[1], []).append(sequence)
        for sequences in tiles.values():
            if len(sequences) != slices:
                found.append(f"{len(sequences)} of {slices} programs synchronise")
            if any(sequence.events != sequences[0].events for sequence in sequences):
                found.append("programs of a tile differ in their sequences")
            for event in sequences[0].events:
                if event[0] == "wait" and event[1] != slices * event[2]:
                    found.append(f"a wait for {event[1]} arrivals of {slices} programs that made {event[2]} each")
            if is_backward == kind.backward:
                waits += sum(event[0] != "arrive" for event in sequences[0].events)
    return waits, found


@dataclasses.dataclass
class Survey:
    """What there is for a device."""

    plans: int = 0
    waiting: int = 0
    """Plans with several slices, whose programs wait for each other."""
    most: int = 0
    """Most programs that wait for each other in one launch."""
    protocols: set[Protocol] = dataclasses.field(default_factory=set)
    flaws: list[str] = dataclasses.field(default_factory=list)


@functools.cache
def survey(device: Device) -> Survey:
    """Look at every plan for a device."""
    result = Survey()
    for cell, is_backward, hidden, batch, kernel_plan in plans(device):
        result.plans += 1
        result.flaws += [f"{cell}, H={hidden}, B={batch}: {flaw}" for flaw in flaws(device, hidden, kernel_plan)]
        if kernel_plan.slices > 1:
            result.waiting += 1
            result.most = max(result.most, kernel_plan.slices * kernel_plan.tiles_per_launch)
            result.protocols.add(protocol_of(cell, is_backward, kernel_plan))
    return result
