"""Backend "triton": allocate, plan and launch the persistent kernels, chunk by chunk."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from novolstm_triton import plans as planning
from novolstm_triton.call import Call, Result, Saved, multiply_by_gain, vectors_with_gain
from novolstm_triton.cells import CELLS
from novolstm_triton.engines.streams import one_ahead
from novolstm_triton.kernels.backward import (
    backward_kernel,
    cell_states_kernel,
    state_statistics_kernel,
    statistics_kernel,
)
from novolstm_triton.kernels.cell import CellKernels
from novolstm_triton.kernels.forward import forward_kernel
from novolstm_triton.plans import KernelPlan, LaunchPlan, tuned

FUSION: dict[str, Any] = dict(enable_fp_fusion=True)
"""Compile option of every kernel: a·b + c is rounded once. Triton 3.9 warns where nothing is said of it."""

UNROLL = 8
"""Steps whose loads are under way at once when backward walks the cell states again."""


def forward(call: Call, chunk: int) -> Result:
    """Run the layer in one direction or both, `chunk` steps at a time; the last chunk may be shorter."""
    cell, x, eps = call.cell, call.x, call.options.eps
    kernels = cell.load_kernels()
    walks = _walks(x.shape[0], chunk, call)
    h_0, c_0, weight_ih, weight_hh, bias = _with_directions(call)
    (steps, batch, _), (directions, _, hidden) = x.shape, h_0.shape
    plans = launch_plan(x, hidden, cell.name, directions)
    check_offsets(plans, hidden, batch, steps, min(steps, chunk), cell.name, directions, call.zoneout_mask is not None)
    kernel_plan = plans.forward
    constants = kernel_constants(
        forward_kernel,
        cell.name,
        hidden,
        kernel_plan,
        WalkOptions.of(call),
        product_precision(x),
        directions=directions,
    )
    vectors = vectors_with_gain(call, torch.float32)
    weight_hh = weight_hh.contiguous()
    lengths, h_mask, zoneout_mask = _contiguous(call.lengths, call.h_mask, call.zoneout_mask)
    state: dict[str, Any] = dict(dtype=torch.float32, device=x.device)

    y = x.new_empty(steps, batch, directions * hidden)
    # c before every chunk, and in the last place after all of them.
    c = torch.empty(len(walks[0]) + 1, directions, batch, hidden, **state)
    c[0] = c_0
    h = h_0.clone(memory_format=torch.contiguous_format)
    h_ring = _HRing(h_0 if h_mask is None else h_0 * h_mask.view_as(h_0), kernel_plan, min(steps, chunk))
    row_ring = _row_ring(kernel_plan, directions * batch, kernels.partial_rows + kernels.state_rows, x.device)
    counters = _Counters(kernel_plan, len(walks[0]), x.device)

    def multiply_inputs(number: int, buffer: Tensor) -> None:
        for d, walk in enumerate(walks):
            span = walk[number]
            rows = (span.high - span.low) * batch
            x_gates = buffer[d * rows : (d + 1) * rows]
            _project(x[span.low : span.high].reshape(rows, x.shape[2]), weight_ih[d], bias[d], x_gates)
            _softmax_gate(x_gates, kernels, hidden)

    most_rows = directions * min(steps, chunk) * batch
    buffers = [x.new_empty(most_rows, len(cell.blocks) * hidden) for _ in range(2 if _overlaps(x) else 1)]
    chunks = enumerate(zip(*walks, strict=True))
    for (number, spans), x_gates in zip(chunks, one_ahead(multiply_inputs, buffers, len(walks[0])), strict=True):
        first, stride, start, count = _first(spans[0])
        h_ring.begin_chunk()
        for tile, grid in _launches(kernel_plan):
            _launch(
                forward_kernel,
                grid,
                kernel_plan,
                x.device,
                x_gates,
                weight_hh,
                vectors,
                lengths,
                h_mask,
                zoneout_mask,
                h,
                c[number],
                h_ring.buffer,
                row_ring,
                counters.from_tile(number, tile),
                y,
                c[number + 1],
                batch,
                count,
                first,
                stride,
                start,
                steps,
                number * chunk,
                h_ring.first,
                h_ring.buffer.shape[1],
                tile,
                eps,
                call.options.zoneout_h,
                call.options.zoneout_c,
                **constants,
            )
        counters.check(number, "forward")
        h_ring.end_chunk(count)
    c_n = c[-1].to(x.dtype, copy=True)
    return Result(y, h.view_as(call.h_0), c_n.view_as(call.c_0), c.view(-1, *call.c_0.shape))


def backward(saved: Saved, grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Differentiate `forward`.

    Args:
        saved: the call, its results y and c_border, and its chunk.
        grads: dy [T, B, D·H], and dh_n and dc_n like the states.
        needs: which gradients to compute, in the order of `Call.tensors`.

    Returns:
        The gradients of `Call.tensors` in their shapes and dtypes; None for each that `needs` rules out.
    """
    call, chunk = saved.call, saved.chunk
    walks = _walks(call.x.shape[0], chunk, call)
    walker = _BackwardWalk(saved, grads)
    sums = _ParameterSums(call, needs)
    for number, spans in reversed(list(enumerate(zip(*walks, strict=True)))):
        dz, operands = walker.run(number, spans, (len(walks[0]) - 1 - number) * chunk)
        sums.add(spans, dz, operands)
    # [V, D, B, H] -> [D, V·H]
    dvectors = walker.dvectors.sum(2).transpose(0, 1).flatten(1)
    multiply_by_gain(dvectors, call)
    gradients = (sums.dx, walker.dh, walker.dc, sums.weight_ih, sums.weight_hh, sums.bias, dvectors)
    return [
        None if g is None or not needed else g.to(call.x.dtype).view_as(a)
        for g, a, needed in zip(gradients, call.tensors, needs, strict=True)
    ]


class _BackwardWalk:
    """Walks back over chunks: holds dh, dc, the vectors' gradients and one chunk's workspace."""

    def __init__(self, saved: Saved, grads: Sequence[Tensor]) -> None:
        call = saved.call
        x, steps, cell = call.x, call.x.shape[0], call.cell
        self._saved, self._kernels = saved, cell.load_kernels()
        self._h_0, _, self._weight_ih, weight_hh, self._bias = _with_directions(call)
        self._weight_hh = weight_hh.contiguous()
        directions, batch, hidden = self._h_0.shape
        self._plan = launch_plan(x, hidden, cell.name, directions).backward
        self._options = WalkOptions.of(call)
        self._constants = kernel_constants(
            *(backward_kernel, cell.name, hidden, self._plan, self._options, product_precision(x)),
            directions=directions,
        )
        self._vectors = vectors_with_gain(call, torch.float32)
        self._lengths, self._h_mask, self._zoneout_mask = _contiguous(call.lengths, call.h_mask, call.zoneout_mask)
        dy, dh_n, dc_n = grads
        self._dy = dy.contiguous()
        fp32: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
        self.dh, self.dc = (g.to(torch.float32, copy=True).contiguous() for g in (dh_n, dc_n))
        """The shape of the states, gradients of the state between chunks."""
        self.dvectors = torch.zeros(cell.vector_blocks, directions, batch, hidden, **fp32)
        """Their share of every row."""
        # One chunk's workspace, used again by every chunk; a shorter one takes the first part.
        longest = min(steps, saved.chunk)
        most_rows = directions * longest * batch
        self._z, self._dz = (x.new_empty(most_rows, len(cell.blocks) * hidden) for _ in range(2))
        self._c = torch.empty(directions * (longest + 1), batch, hidden, **fp32)
        self._all_stats = self._kernels.stats + self._kernels.state_stats
        self._stats = torch.empty(self._all_stats * most_rows, **fp32)
        self._companions = _Companions(self._kernels, self._plan, x, longest, self._weight_hh)
        self._row_ring = _row_ring(
            self._plan, directions * batch, self._kernels.grad_rows + self._kernels.state_grad_rows, x.device
        )
        self._counters = _Counters(self._plan, len(saved.c_border) - 1, x.device)

    def run(self, number: int, spans: Sequence["_Span"], done: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Walk back over a chunk.

        Args:
            number: of the chunk in forward's order.
            spans: of each direction.
            done: steps walked back before.

        Returns:
            dz [D, rows, G·H], in a buffer, and each direction's x [rows, I] and h before every step [rows, H].
        """
        directions, batch, hidden = self._h_0.shape
        first, stride, start, count = _first(spans[0])
        rows, cell = count * batch, self._saved.call.cell
        z, dz = (a[: directions * rows].view(directions, rows, -1) for a in (self._z, self._dz))
        stats = self._stats[: self._all_stats * directions * rows]
        c = self._c[: directions * (count + 1)].view(directions, count + 1, batch, hidden)
        operands = [self._recompute(d, span, z[d]) for d, span in enumerate(spans)]
        _softmax_gate(z.flatten(0, 1), self._kernels, hidden)
        c[:, 0] = self._saved.c_border[number]
        companions, numbers = self._companions, self._saved.call.options
        companions.begin_chunk(rows)
        walk_c = (first, stride, start, self._saved.call.x.shape[0], numbers.zoneout_c)
        inputs = (self._vectors, self._lengths, self._zoneout_mask)
        states = (z, stats, companions.operands, c)
        _recompute_states(cell.name, self._plan, self._options, states, inputs, numbers.eps, walk_c)
        companions.multiply(self._weight_hh)
        if self._plan.exchange == "words":
            _fill_missing(dz)
        for tile, grid in _launches(self._plan):
            _launch(
                backward_kernel,
                grid,
                self._plan,
                z.device,
                z,
                stats,
                self._weight_hh,
                self._vectors,
                self._lengths,
                self._h_mask,
                self._zoneout_mask,
                c,
                self._dy,
                companions.products,
                self._row_ring,
                companions.late_ring,
                self._counters.from_tile(number, tile),
                dz,
                self.dh,
                self.dc,
                self.dvectors,
                batch,
                count,
                first + (count - 1) * stride,
                stride,
                start,
                self._saved.call.x.shape[0],
                done,
                companions.late_slots,
                tile,
                numbers.zoneout_h,
                numbers.zoneout_c,
                **self._constants,
            )
        self._counters.check(number, "backward")
        _softmax_gate_backward(dz.flatten(0, 1), z.flatten(0, 1), self._kernels, hidden)
        return dz, operands

    def _recompute(self, d: int, span: "_Span", z: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in one direction's z [rows, G·H] of a span; return its x and the h before every step, with its mask."""
        call, hidden = self._saved.call, self._h_0.shape[2]
        rows, recurrent = z.shape[0], call.cell.recurrent
        x = _without_padding(call.x[span.low : span.high], self._lengths, span.low).reshape(rows, -1)
        h_prev = _previous_h(self._saved.y[:, :, d * hidden : (d + 1) * hidden], self._h_0[d], self._lengths, span)
        if self._h_mask is not None:
            h_prev = h_prev * self._h_mask.view_as(self._h_0)[d]
        h_prev = h_prev.reshape(rows, hidden)
        _project(x, self._weight_ih[d], self._bias[d], z)
        z[:, : recurrent * hidden].addmm_(h_prev, self._weight_hh[d].t())
        return x, h_prev


class _ParameterSums:
    """Gradients of x and of what all steps share, summed over chunks; None where nobody asks for one."""

    def __init__(self, call: Call, needs: Sequence[bool]) -> None:
        x, directions = call.x, call.directions
        self._call, self._weight_ih = call, _with_directions(call)[2]
        self._hidden = call.c_0.shape[-1]
        # Two directions add to every step.
        new_dx = x.new_empty if directions == 1 else x.new_zeros
        self.dx = new_dx(x.shape) if needs[0] else None

        def zeros(like: Tensor, needed: bool) -> Tensor | None:
            shape = like.shape if directions == 2 else (1, *like.shape)
            return torch.zeros(shape, dtype=torch.float32, device=x.device) if needed else None

        parameters = (call.weight_ih, call.weight_hh, call.bias)
        self.weight_ih, self.weight_hh, self.bias = map(zeros, parameters, needs[3:6])

    def add(self, spans: Sequence["_Span"], dz: Tensor, operands: list[tuple[Tensor, Tensor]]) -> None:
        """Add a chunk's share: what `_BackwardWalk.run` returns."""
        cell = self._call.cell
        fed, seen = cell.first_input * self._hidden, cell.recurrent * self._hidden
        for d, (span, (x, h_prev)) in enumerate(zip(spans, operands, strict=True)):
            if self.dx is not None:
                dx = self.dx[span.low : span.high].view(x.shape)
                dx.addmm_(dz[d, :, fed:], self._weight_ih[d], beta=len(spans) - 1)
            if self.weight_ih is not None:
                _add_product(self.weight_ih[d], dz[d, :, fed:], x)
            if self.weight_hh is not None:
                _add_product(self.weight_hh[d], dz[d, :, :seen], h_prev)
        if self.bias is not None:
            self.bias += dz.sum(1, dtype=torch.float32)


class _HRing:
    """The buffer [D, slots, B, H] in which slices exchange h, times its mask; a step reads a slot and writes the next.

    The barrier takes turns between two slots. Self-validating words are never overwritten within a chunk: each step
    has a slot of its own, which holds no word until one arrives.
    """

    def __init__(self, h_0: Tensor, kernel_plan: KernelPlan, chunk: int) -> None:
        self._words = kernel_plan.exchange == "words"
        self.buffer = h_0.new_empty(h_0.shape[0], chunk + 1 if self._words else 2, *h_0.shape[1:])
        self.first = 0
        # A NaN in the user's h_0 could look like a missing word.
        self.buffer[:, 0] = h_0.masked_fill(h_0.isnan(), float("nan")) if self._words else h_0

    def begin_chunk(self) -> None:
        """Make room for the steps of a chunk."""
        if self._words:
            h = self.buffer[:, self.first].clone()
            _fill_missing(self.buffer)
            self.buffer[:, 0] = h
            self.first = 0

    def end_chunk(self, steps: int) -> None:
        """Go on from the slot that the chunk's last step has written."""
        self.first = (self.first + steps) % self.buffer.shape[1]


class _Companions:
    """What backward needs for one exchange a step; with two, empty tensors that no kernel touches.

    operands [S·D·rows, H] are the cell's companions of its S row sums, products [S·D·rows, H] those times the recurrent
    weights of their gates, and late_ring [D, late_slots, B, late gates·H] is where slices exchange dz of the late
    gates. Both exchanges use it as they use `_HRing`. weight_hh is [D, recurrent·H, H].
    """

    def __init__(self, cell: CellKernels, kernel_plan: KernelPlan, x: Tensor, chunk: int, weight_hh: Tensor) -> None:
        self._gates = cell.companion_gates if kernel_plan.exchanges == 1 else ()
        self._words = kernel_plan.exchange == "words"
        directions, _, hidden = weight_hh.shape
        # One part for every row sum and direction.
        self._parts = len(self._gates) * directions
        self._buffers = x.new_empty(2, self._parts * chunk * x.shape[1], hidden)
        self.late_slots = (chunk if self._words else 2) if self._gates else 1
        batch = x.shape[1] if self._gates else 0
        self.late_ring = x.new_empty(directions, self.late_slots, batch, len(cell.late) * hidden)
        self.operands, self.products = self._buffers

    def begin_chunk(self, rows: int) -> None:
        """Take as much of the buffers as a chunk of so many rows (t, b) of each direction needs."""
        self.operands, self.products = self._buffers[:, : self._parts * rows]
        if self._words:
            _fill_missing(self.late_ring)

    def multiply(self, weight_hh: Tensor) -> None:
        """Make the products, once the operands are there."""
        if not self._gates:
            return
        hidden, parts = weight_hh.shape[2], [a.chunk(self._parts) for a in (self.operands, self.products)]
        pairs = itertools.product(self._gates, weight_hh)
        for (gate, weight), operand, product in zip(pairs, *parts, strict=True):
            torch.mm(operand, weight[gate * hidden : (gate + 1) * hidden], out=product)


class _Counters:
    """Each chunk's and batch tile's counter of arrivals; with bounded waits its slices' records follow it."""

    def __init__(self, kernel_plan: KernelPlan, chunks: int, device: torch.device) -> None:
        self._slices, self._max_spins = kernel_plan.slices, planning.pinned().max_spins
        numbers = 1 + self._slices * (4 + self._slices) if self._max_spins else 1
        self._all = torch.zeros(chunks, kernel_plan.tiles, numbers, dtype=torch.int32, device=device)

    def from_tile(self, chunk: int, tile: int) -> Tensor:
        """Return those of a chunk's batch tiles from one on."""
        return self._all[chunk, tile:]

    def check(self, chunk: int, kernel: str) -> None:
        """Raise RuntimeError if waits are bounded and a program of this chunk has given up."""
        if not self._max_spins:
            return
        lines = []
        for tile, records in enumerate(self._all[chunk, :, 1:].unflatten(1, (self._slices, -1)).tolist()):
            for slice, (_, gave_up, awaited, seen, *counts) in enumerate(records):
                if gave_up:
                    what = "words" if awaited < 0 else f"{awaited} arrivals and saw {seen}"
                    late = [other for other, count in enumerate(counts) if count < counts[slice]]
                    whom = f", so for slice {', '.join(map(str, late))}" if late else ""
                    lines.append(f"  batch tile {tile}, slice {slice}: for {what}; arrivals by slice {counts}{whom}")
        if lines:
            first = f"max_spins={self._max_spins}: programs of {kernel}, chunk {chunk}, waited in vain"
            raise RuntimeError("\n".join([first, *lines]))


def _row_ring(kernel_plan: KernelPlan, batch: int, rows: int, device: torch.device) -> Tensor:
    """Return the ring [2, B, rows, slices] for the rows that a step exchanges; B counts those of every direction."""
    shape = (2, batch, rows, kernel_plan.slices)
    if kernel_plan.exchange == "words":
        # Zero is the tag of no step.
        return torch.zeros(shape, dtype=torch.int64, device=device)
    return torch.empty(shape, dtype=torch.float32, device=device)


def _overlaps(x: Tensor) -> bool:
    return bool(planning.pinned().overlap) and x.is_cuda


def _fill_missing(buffer: Tensor) -> None:
    """Fill a buffer with the all-ones words that mean "not yet published"."""
    buffer.view(torch.int32 if buffer.element_size() == 4 else torch.int16).fill_(-1)


def launch_plan(x: Tensor, hidden: int, cell: str, directions: int = 1) -> LaunchPlan:
    """Return the plan for a layer with `hidden` units on x [T, B, I], on its device and under the pins in force.

    Raises:
        ValueError: no plan fits, or it has more programs waiting for each other than the device holds.
    """
    pins = planning.pinned()
    device = pins.device or _device(x.device)
    found = _cached_plan(hidden, x.shape[1], x.dtype, device, cell, directions, pins, tuned.in_force())
    for kernel_plan in (found.forward, found.backward):
        programs = kernel_plan.slices * kernel_plan.tiles_per_launch
        if kernel_plan.slices > 1 and programs > device.multiprocessors:
            raise ValueError(
                f"plan: {programs} programs wait for each other, and {device.name} holds {device.multiprocessors} at "
                "once: those left out would never run"
            )
    return found


def check_offsets(
    plans: LaunchPlan, hidden: int, batch: int, steps: int, chunk: int, cell: str, directions: int, zoneout_masks: bool
) -> None:
    """Check that the kernels can address a layer: counts and offsets of 32 bits have to suffice.

    Whole steps, directions and weights lie 64 bits apart. What is left are places within a batch tile, a weight, a
    step's row of zoneout's masks and the ring of row sums, and numbers of rows, steps and arrivals.

    Args:
        plans: how the layer is launched.
        hidden: units H.
        batch: rows B.
        steps: time steps T.
        chunk: steps of the longest chunk.
        cell: its name in `novolstm_triton.cells.CELLS`.
        directions: 1 or 2.
        zoneout_masks: whether zoneout has masks.

    Raises:
        ValueError: a number does not fit; the message names it.
    """
    kernels, gates, rows = CELLS[cell].load_kernels(), len(CELLS[cell].blocks), directions * batch
    largest = {
        "H·H, a recurrent weight": hidden * hidden,
        # A tile may reach beyond the last row, an unrolled loop beyond the last step.
        "D·B, the rows": directions * (batch + max(plans.forward.block_b, plans.backward.block_b)),
        "D·T, the steps": directions * (steps + UNROLL),
        "programs for the statistics of a chunk": rows * chunk // _rows_per_program(hidden),
        "D·B·H, a step's masks of zoneout": rows * hidden if zoneout_masks else 0,
    }
    for walk, kernel_plan, sums in (
        ("forward", plans.forward, kernels.partial_rows + kernels.state_rows),
        ("backward", plans.backward, kernels.grad_rows + kernels.state_grad_rows),
    ):
        largest[f"block_b·G·H, the gates of a batch tile in {walk}"] = kernel_plan.block_b * gates * hidden
        if kernel_plan.slices > 1:
            largest[f"row sums of two steps in {walk}"] = 2 * rows * sums * kernel_plan.slices
            largest[f"arrivals in a chunk in {walk}"] = max(2, kernel_plan.exchanges) * chunk * kernel_plan.slices
    for name, number in largest.items():
        if number > planning.MOST:
            raise ValueError(
                f"backend 'triton': expected {name}, to be at most 2^31 - 1, got {number}: "
                "use backend='torch', or split the call"
            )


def _rows_per_program(hidden: int) -> int:
    """Return how many rows one program of the statistics kernel takes."""
    return max(1, 1024 // triton.next_power_of_2(hidden))


class WalkOptions(NamedTuple):
    """What a walk may have besides a cell, as the kernels are compiled for it."""

    lengths: bool = False
    h_mask: bool = False
    zoneout: str = "none"
    """"none", "masks" or "average"."""

    @classmethod
    def of(cls, call: Call) -> "WalkOptions":
        """Return those of a call."""
        average = "average" if call.options.zoneout_h or call.options.zoneout_c else "none"
        zoneout = average if call.zoneout_mask is None else "masks"
        return cls(call.lengths is not None, call.h_mask is not None, zoneout)


def kernel_constants(
    kernel: Any,
    cell: str,
    hidden: int,
    kernel_plan: KernelPlan,
    options: WalkOptions,
    precision: str,
    *,
    directions: int = 1,
) -> dict[str, Any]:
    """Return the compile-time arguments of one of the four kernels; `precision` is tl.dot's, of fp32 operands."""
    functions, blocks = CELLS[cell].load_kernels(), CELLS[cell]
    everything = dict(
        partials=functions.partials,
        merge=functions.merge,
        update=functions.update,
        grad_local=functions.grad_local,
        grad_finish=functions.grad_finish,
        companions=functions.companions,
        state_partials=functions.state_partials,
        state_merge=functions.state_merge,
        expose=functions.expose,
        grad_expose=functions.grad_expose,
        grad_state=functions.grad_state,
        EARLY=functions.early,
        LATE=functions.late,
        DIRECTIONS=directions,
        GATES=len(blocks.blocks),
        RECURRENT=blocks.recurrent,
        VECTORS=blocks.vector_blocks,
        GATE_NORMS=functions.gate_norms,
        STATS=functions.stats,
        STATE_STATS=functions.state_stats,
        SUMS=functions.grad_rows,
        STATE_SUMS=functions.state_grad_rows,
        HIDDEN=hidden,
        SLICES=kernel_plan.slices,
        UNITS=kernel_plan.units,
        BLOCK_B=kernel_plan.block_b,
        BLOCK_N=kernel_plan.block_n,
        BLOCK_K=kernel_plan.block_k,
        PARTS=kernel_plan.parts,
        IN_FLIGHT=kernel_plan.in_flight,
        BLOCK_S=triton.next_power_of_2(kernel_plan.slices),
        BLOCK_ROW=triton.next_power_of_2(hidden),
        BLOCK_R=_rows_per_program(hidden),
        BLOCK_H=min(256, triton.next_power_of_2(hidden)),
        UNROLL=UNROLL,
        RESIDENT=kernel_plan.resident,
        # To its kernel a cluster is one program: its exchanges are the compiler's.
        EXCHANGE="none" if kernel_plan.ctas > 1 else kernel_plan.exchange,
        COMPANIONS=kernel_plan.exchanges == 1 and len(functions.companion_gates) > 0,
        HAS_LENGTHS=options.lengths,
        HAS_MASK=options.h_mask,
        ZONEOUT=options.zoneout,
        PRECISION=precision,
        MAX_SPINS=planning.pinned().max_spins or 0,
    )
    return {name: value for name, value in everything.items() if name in kernel.arg_names}


@functools.lru_cache(maxsize=1024)
def _cached_plan(hidden, batch, dtype, device, cell, directions, pins, plans) -> LaunchPlan:
    options: dict[str, Any] = dict(cell=cell, directions=directions, pins=pins, plans=plans)
    return planning.plan(hidden, batch, dtype, device, **options)


@functools.lru_cache
def _device(device: torch.device) -> planning.Device:
    if device.type != "cuda":
        return planning.INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    driver: Any = triton.runtime.driver.active
    return planning.Device(
        name=properties.name,
        backend="hip" if hip else "cuda",
        arch=properties.gcnArchName.split(":")[0] if hip else properties.major * 10 + properties.minor,
        multiprocessors=properties.multi_processor_count,
        # PyTorch names it differently on CUDA and HIP; this is also the limit that Triton holds a kernel to.
        smem_bytes=driver.utils.get_device_properties(device.index)["max_shared_mem"],
        warp_size=properties.warp_size,
    )


class _Span(NamedTuple):
    """The steps [low, high) of one chunk of one direction."""

    low: int
    high: int
    reverse: bool
    """Whether they are walked from the last to the first."""


def _walks(steps: int, chunk: int, call: Call) -> list[list[_Span]]:
    """Return the chunks of each direction in walking order; all but the last walked have `chunk` steps.

    The walk of a second direction is the mirror image of the first one's, which is all that the kernels are told.
    """
    return [list(_walk(steps, chunk, r)) for r in ((call.reverse,) if call.directions == 1 else (False, True))]


def _walk(steps: int, chunk: int, reverse: bool) -> Iterator[_Span]:
    for done in range(0, steps, chunk):
        size = min(chunk, steps - done)
        low = steps - done - size if reverse else done
        yield _Span(low, low + size, reverse)


def _first(span: _Span) -> tuple[int, int, int, int]:
    """Return t of the first step walked, the walk's step in t, the lowest t and the number of steps."""
    low, count = span.low, span.high - span.low
    return (span.high - 1, -1, low, count) if span.reverse else (low, 1, low, count)


def _with_directions(call: Call) -> tuple[Tensor, ...]:
    """Return h_0, c_0, weight_ih, weight_hh and bias with a leading dimension of directions."""
    tensors = call.tensors[1:6]
    return tensors if call.directions == 2 else tuple(a.unsqueeze(0) for a in tensors)


def _launches(kernel_plan: KernelPlan) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the first batch tile and the grid of every launch."""
    for tile in range(0, kernel_plan.tiles, kernel_plan.tiles_per_launch):
        yield tile, (kernel_plan.slices, min(kernel_plan.tiles_per_launch, kernel_plan.tiles - tile))


def compile_options(kernel_plan: KernelPlan) -> dict[str, Any]:
    """Return the options with which the persistent kernels are compiled.

    Raises:
        RuntimeError: this Triton cannot compile for a cluster of thread blocks.
    """
    options: dict[str, Any] = dict(FUSION, num_warps=kernel_plan.num_warps, num_stages=kernel_plan.num_stages)
    if kernel_plan.ctas > 1:
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
            raise RuntimeError(f"exchange='cluster' needs Triton 3.9 or newer, and this is {triton.__version__}")
        options["num_ctas"] = kernel_plan.ctas
    if kernel_plan.max_registers is not None:
        options["maxnreg"] = kernel_plan.max_registers
    return options


def _launch(
    kernel: Any, grid: tuple[int, int], kernel_plan: KernelPlan, device: torch.device, *args, **constants
) -> None:
    options = compile_options(kernel_plan)
    if kernel_plan.slices > 1:
        # Programs that wait for each other: the driver refuses the launch rather than let it hang.
        options["launch_cooperative_grid"] = True
    with _on(device):
        kernel[grid](*args, **constants, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current GPU, the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def product_precision(x: Tensor) -> str:
    """Return tl.dot's input precision: fp32 honours torch.get_float32_matmul_precision(), 16-bit dtypes need none."""
    if x.dtype != torch.float32:
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    # Three tf32 products are as exact as one in fp32, and run on the tensor cores.
    return "tf32x3" if x.device.type == "cuda" and torch.version.hip is None else "ieee"


def _project(x: Tensor, weight_ih: Tensor, bias: Tensor, z: Tensor) -> None:
    """Write x W + b into z [rows, G·H], in blocks that only h feeds b alone; x is [rows, I]."""
    alone = z.shape[1] - weight_ih.shape[0]
    if alone:
        z[:, :alone] = bias[:alone]
    torch.addmm(bias[alone:], x, weight_ih.t(), out=z[:, alone:])


def _contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    for tensor in tensors:
        yield None if tensor is None else tensor.contiguous()


def _softmax_gate(z: Tensor, cell: CellKernels, hidden: int) -> None:
    """Replace the pre-activations of a gate that does not see h by their softmax, in place; z is [rows, G·H]."""
    if cell.softmax_gate is not None:
        gate = z[:, cell.softmax_gate * hidden : (cell.softmax_gate + 1) * hidden]
        gate.copy_(torch.softmax(gate, dim=1, dtype=torch.float32))


def _softmax_gate_backward(dz: Tensor, z: Tensor, cell: CellKernels, hidden: int) -> None:
    """Replace dp·p of a gate that does not see h by dz_p = dp·p − p·Σ dp·p, in place; z [rows, G·H] holds p."""
    if cell.softmax_gate is not None:
        gate = slice(cell.softmax_gate * hidden, (cell.softmax_gate + 1) * hidden)
        dz[:, gate] -= z[:, gate] * dz[:, gate].sum(1, keepdim=True, dtype=torch.float32)


def _without_padding(x: Tensor, lengths: Tensor | None, start: int) -> Tensor:
    """Return x [n, B, I], from t = start on, with zeros for padding, which may hold NaN: zero times it must be zero."""
    if lengths is None:
        return x
    t = torch.arange(start, start + x.shape[0], device=x.device, dtype=lengths.dtype).unsqueeze(1)
    return x.masked_fill((t >= lengths).unsqueeze(2), 0)


def _previous_h(y: Tensor, h_0: Tensor, lengths: Tensor | None, span: _Span) -> Tensor:
    """Return [high − low, B, H], the h that each step of the span started from: y, except for a row's first step."""
    low, high, reverse = span
    if reverse:
        previous = y[low + 1 : high + 1]
        if high == y.shape[0]:
            previous = torch.cat([previous, h_0.unsqueeze(0)])
        if lengths is not None:
            t = torch.arange(low, high, device=y.device, dtype=lengths.dtype).unsqueeze(1)
            previous = torch.where((t == lengths - 1).unsqueeze(2), h_0, previous)
        return previous
    return y[low - 1 : high - 1] if low > 0 else torch.cat([h_0.unsqueeze(0), y[: high - 1]])


def _recompute_states(
    cell: str,
    kernel_plan: KernelPlan,
    options: WalkOptions,
    states: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    eps: float,
    walk: tuple,
) -> None:
    """Fill stats, companions and c[:, 1:] of a chunk from its z [D, rows, GH] and c[:, 0], c [D, steps + 1, B, H].

    states are z, stats, companions and c; inputs are the vectors, the lengths and zoneout's masks; walk is (first t,
    stride, start) of direction 0, T, and zoneout's share of c.
    """
    z, stats, companions, c = states
    (directions, borders, batch, hidden), rows = c.shape, z.shape[0] * z.shape[1]
    kernels = [statistics_kernel, cell_states_kernel, state_statistics_kernel]
    constants = [
        kernel_constants(kernel, cell, hidden, kernel_plan, options, "ieee", directions=directions)
        for kernel in kernels
    ]
    for own in (constants[0], constants[2]):
        own["num_warps"] = min(16, max(4, own["BLOCK_ROW"] // 256))
    row_grid = (triton.cdiv(rows, constants[0]["BLOCK_R"]),)
    vectors, functions = inputs[0], CELLS[cell].load_kernels()
    with _on(z.device):
        if functions.stats:
            statistics_kernel[row_grid](z, stats, companions, rows, eps, **constants[0], **FUSION)
        grid = (directions * batch, triton.cdiv(hidden, constants[1]["BLOCK_H"]))
        arguments: tuple[Any, ...] = (z, stats, *inputs, c, batch, borders - 1, *walk)
        cell_states_kernel[grid](*arguments, **constants[1], **FUSION)
        if functions.state_stats:
            arguments = (z, stats, vectors, c, rows, batch, borders - 1, walk[1], eps)
            state_statistics_kernel[row_grid](*arguments, **constants[2], **FUSION)


def _add_product(total: Tensor, dz: Tensor, inputs: Tensor) -> None:
    """Add dzᵀ inputs to total, in fp32 from operands [rows, ·] of any dtype."""
    if dz.dtype == torch.float32:
        total.addmm_(dz.t(), inputs)
    elif dz.is_cuda:
        total += torch.mm(dz.t(), inputs, out_dtype=torch.float32)
    else:
        total.addmm_(dz.t().float(), inputs.float())
