"""Backend "triton": allocate, plan and launch the persistent kernels, chunk by chunk. Same signatures as bptt.py."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from novolstm_triton import plan as planning
from novolstm_triton import tuned
from novolstm_triton.kernels.backward import backward_kernel, cell_states_kernel, statistics_kernel
from novolstm_triton.kernels.forward import forward_kernel
from novolstm_triton.kernels.novolstm import FORMULA, NOTEBOOK, Cell
from novolstm_triton.plan import KernelPlan, LaunchPlan

CELLS = {"formula": FORMULA, "notebook": NOTEBOOK}

FUSION: dict[str, Any] = dict(enable_fp_fusion=True)
"""Compile option of every kernel: a·b + c is rounded once. Triton 3.9 warns where nothing is said of it."""


def forward(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None,
    *,
    eps: float,
    gate_gain: float,
    variant: str,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the layer; see `novolstm_triton.functional.forward_op`."""
    cell = CELLS[variant]
    (steps, batch, _), hidden = x.shape, h_0.shape[1]
    kernel_plan = launch_plan(x, hidden, cell).forward
    constants = kernel_constants(forward_kernel, cell, hidden, kernel_plan, lengths is not None, product_precision(x))
    gamma, beta = _affine(ln_weight, gate_gain), _affine(ln_bias, gate_gain)
    weight_hh = weight_hh.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    walk = list(_walk(steps, chunk, reverse))
    state: dict[str, Any] = dict(dtype=torch.float32, device=x.device)

    y = x.new_empty(steps, batch, hidden)
    # c before every chunk, and in the last place after all of them.
    c = torch.empty(len(walk) + 1, batch, hidden, **state)
    c[0] = c_0
    h_ring = _HRing(h_0, kernel_plan, min(steps, chunk))
    row_ring = _row_ring(kernel_plan, batch, cell.partial_rows, x.device)
    counters = torch.zeros(len(walk), kernel_plan.tiles, dtype=torch.int32, device=x.device)
    for number, (start, stop) in enumerate(walk):
        x_gates = torch.addmm(bias, x[start:stop].reshape(-1, x.shape[2]), weight_ih.t())
        _softmax_gate(x_gates, cell, hidden)
        first, stride = _first(start, stop, reverse)
        h_ring.begin_chunk()
        for tile, grid in _launches(kernel_plan):
            _launch(
                forward_kernel,
                grid,
                kernel_plan,
                x.device,
                x_gates,
                weight_hh,
                gamma,
                beta,
                lengths,
                c[number],
                h_ring.buffer,
                row_ring,
                counters[number, tile:],
                y,
                c[number + 1],
                batch,
                stop - start,
                first,
                stride,
                start,
                number * chunk,
                h_ring.first,
                h_ring.buffer.shape[0],
                tile,
                eps,
                **constants,
            )
        h_ring.end_chunk(stop - start)
    return y, h_ring.current().clone(), c[-1].to(x.dtype, copy=True), c


def backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None,
    y: Tensor,
    c_border: Tensor,
    *,
    eps: float,
    gate_gain: float,
    variant: str,
    reverse: bool,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Run the layer's backward; see `novolstm_triton.functional.backward_op`."""
    cell = CELLS[variant]
    (steps, batch, features), hidden = x.shape, h_0.shape[1]
    kernel_plan = launch_plan(x, hidden, cell).backward
    constants = kernel_constants(backward_kernel, cell, hidden, kernel_plan, lengths is not None, product_precision(x))
    gamma, beta = _affine(ln_weight, gate_gain), _affine(ln_bias, gate_gain)
    weight_hh = weight_hh.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    dy = dy.contiguous()
    needs_x, _, _, needs_weight_ih, needs_weight_hh, needs_bias, _, _ = needs
    walk = list(_walk(steps, chunk, reverse))
    fp32: dict[str, Any] = dict(dtype=torch.float32, device=x.device)

    # One chunk's workspace, used again by every chunk.
    chunk_rows = min(steps, chunk) * batch
    z_all, dz_all = x.new_empty(chunk_rows, cell.gates * hidden), x.new_empty(chunk_rows, cell.gates * hidden)
    c_all = torch.empty(min(steps, chunk) + 1, batch, hidden, **fp32)
    stats_all = torch.empty(cell.stats * chunk_rows, **fp32)
    companions = _Companions(cell, kernel_plan, x, min(steps, chunk), hidden)
    row_ring = _row_ring(kernel_plan, batch, cell.grad_rows, x.device)
    counters = torch.zeros(len(walk), kernel_plan.tiles, dtype=torch.int32, device=x.device)

    dh, dc = dh_n.to(torch.float32, copy=True).contiguous(), dc_n.to(torch.float32, copy=True).contiguous()
    dgamma, dbeta = torch.zeros(batch, hidden, **fp32), torch.zeros(batch, hidden, **fp32)
    dx = x.new_empty(steps, batch, features) if needs_x else None
    dweight_ih = torch.zeros(weight_ih.shape, **fp32) if needs_weight_ih else None
    dweight_hh = torch.zeros(weight_hh.shape, **fp32) if needs_weight_hh else None
    dbias = torch.zeros(bias.shape, **fp32) if needs_bias else None

    for number, (start, stop) in reversed(list(enumerate(walk))):
        rows = (stop - start) * batch
        first, stride = _first(start, stop, reverse)
        x_chunk = _without_padding(x[start:stop], lengths, start).reshape(rows, features)
        h_prev = _previous_h(y, h_0, lengths, start, stop, reverse).reshape(rows, hidden)
        z, dz, c, stats = z_all[:rows], dz_all[:rows], c_all[: stop - start + 1], stats_all[: cell.stats * rows]
        torch.addmm(bias, x_chunk, weight_ih.t(), out=z)
        recurrent = z[:, : cell.recurrent * hidden]
        recurrent.addmm_(h_prev, weight_hh.t())
        _softmax_gate(z, cell, hidden)
        c[0] = c_border[number]
        companions.begin_chunk(rows)
        walk_c = (first, stride, start)
        _recompute_states(cell, kernel_plan, z, stats, companions.operands, c, (gamma, beta), lengths, eps, walk_c)
        companions.multiply(weight_hh)
        if kernel_plan.exchange == "words":
            _fill_missing(dz)
        for tile, grid in _launches(kernel_plan):
            _launch(
                backward_kernel,
                grid,
                kernel_plan,
                x.device,
                z,
                stats,
                weight_hh,
                gamma,
                beta,
                lengths,
                c,
                dy,
                companions.products,
                row_ring,
                companions.late_ring,
                counters[number, tile:],
                dz,
                dh,
                dc,
                dgamma,
                dbeta,
                batch,
                stop - start,
                first + (stop - start - 1) * stride,
                stride,
                start,
                (len(walk) - 1 - number) * chunk,
                companions.late_slots,
                tile,
                eps,
                **constants,
            )
        if dx is not None:
            torch.mm(dz, weight_ih, out=dx[start:stop].view(rows, features))
        if dweight_ih is not None:
            _add_product(dweight_ih, dz, x_chunk)
        if dweight_hh is not None:
            _add_product(dweight_hh, dz[:, : cell.recurrent * hidden], h_prev)
        if dbias is not None:
            dbias += dz.sum(0, dtype=torch.float32)

    gradients = (dx, dh, dc, dweight_ih, dweight_hh, dbias, dgamma.sum(0) * gate_gain, dbeta.sum(0) * gate_gain)
    pairs = zip(gradients, needs, strict=True)
    return tuple(g.to(x.dtype) if g is not None and needed else None for g, needed in pairs)


class _HRing:
    """The buffer [slots, B, H] in which slices exchange h; a step reads one slot and writes the next.

    The barrier takes turns between two slots. Self-validating words are never overwritten within a chunk: each step
    has a slot of its own, which holds no word until one arrives.
    """

    def __init__(self, h_0: Tensor, kernel_plan: KernelPlan, chunk: int) -> None:
        self._words = kernel_plan.exchange == "words"
        self.buffer = h_0.new_empty(chunk + 1 if self._words else 2, *h_0.shape)
        self.first = 0
        # A NaN of the user's could look like a word that is missing.
        self.buffer[0] = h_0.masked_fill(h_0.isnan(), float("nan")) if self._words else h_0

    def current(self) -> Tensor:
        """Return [B, H], the h that the next step starts from."""
        return self.buffer[self.first]

    def begin_chunk(self) -> None:
        """Make room for the steps of a chunk."""
        if self._words:
            h = self.current().clone()
            _fill_missing(self.buffer)
            self.buffer[0] = h
            self.first = 0

    def end_chunk(self, steps: int) -> None:
        """Go on from the slot that the chunk's last step has written."""
        self.first = (self.first + steps) % self.buffer.shape[0]


class _Companions:
    """What backward needs for one exchange a step; with two, empty tensors that no kernel touches.

    operands [S·rows, H] are the cell's companions of its S row sums, products [S·rows, H] those times the recurrent
    weights of their gates, and late_ring [late_slots, B, late gates·H] is where slices exchange dz of the late gates.
    Both exchanges use it as they use `_HRing`.
    """

    def __init__(self, cell: Cell, kernel_plan: KernelPlan, x: Tensor, chunk: int, hidden: int) -> None:
        self._gates = cell.companion_gates if kernel_plan.exchanges == 1 else ()
        self._words = kernel_plan.exchange == "words"
        self._buffers = x.new_empty(2, len(self._gates) * chunk * x.shape[1], hidden)
        self.late_slots = (chunk if self._words else 2) if self._gates else 1
        self.late_ring = x.new_empty(self.late_slots, x.shape[1] if self._gates else 0, len(cell.late) * hidden)
        self.operands, self.products = self._buffers

    def begin_chunk(self, rows: int) -> None:
        """Take the buffers' first parts for a chunk of so many rows (t, b)."""
        self.operands, self.products = self._buffers[:, : len(self._gates) * rows]
        if self._words:
            _fill_missing(self.late_ring)

    def multiply(self, weight_hh: Tensor) -> None:
        """Make the products, once the operands are there; weight_hh is [recurrent·H, H]."""
        if not self._gates:
            return
        rows, hidden = self.operands.shape[0] // len(self._gates), weight_hh.shape[1]
        for k, gate in enumerate(self._gates):
            part, weight = slice(k * rows, (k + 1) * rows), weight_hh[gate * hidden : (gate + 1) * hidden]
            torch.mm(self.operands[part], weight, out=self.products[part])


def _row_ring(kernel_plan: KernelPlan, batch: int, rows: int, device: torch.device) -> Tensor:
    """Return the ring [2, B, rows, slices] for the rows that a step exchanges."""
    shape = (2, batch, rows, kernel_plan.slices)
    if kernel_plan.exchange == "words":
        # Zero is the tag of no step.
        return torch.zeros(shape, dtype=torch.int64, device=device)
    return torch.empty(shape, dtype=torch.float32, device=device)


def _fill_missing(buffer: Tensor) -> None:
    """Fill a buffer with the all-ones words that mean "not yet published"."""
    buffer.view(torch.int32 if buffer.element_size() == 4 else torch.int16).fill_(-1)


def launch_plan(x: Tensor, hidden: int, cell: Cell) -> LaunchPlan:
    """Return the plan for a layer with `hidden` units on x [T, B, I], on its device and under the pins in force."""
    in_force = planning.pinned(), tuned.in_force()
    return _cached_plan(hidden, x.shape[1], x.dtype, _device(x.device), cell.recurrent, *in_force)


def kernel_constants(
    kernel: Any, cell: Cell, hidden: int, kernel_plan: KernelPlan, has_lengths: bool, precision: str
) -> dict[str, Any]:
    """Return the compile-time arguments of one of the four kernels; `precision` is tl.dot's, of fp32 operands."""
    everything = dict(
        partials=cell.partials,
        merge=cell.merge,
        update=cell.update,
        grad_local=cell.grad_local,
        grad_finish=cell.grad_finish,
        companions=cell.companions,
        EARLY=cell.early,
        LATE=cell.late,
        GATES=cell.gates,
        RECURRENT=cell.recurrent,
        STATS=cell.stats,
        HIDDEN=hidden,
        SLICES=kernel_plan.slices,
        UNITS=kernel_plan.units,
        BLOCK_B=kernel_plan.block_b,
        BLOCK_N=kernel_plan.block_n,
        BLOCK_K=kernel_plan.block_k,
        BLOCK_S=triton.next_power_of_2(kernel_plan.slices),
        BLOCK_ROW=triton.next_power_of_2(hidden),
        BLOCK_R=max(1, 1024 // triton.next_power_of_2(hidden)),
        BLOCK_H=min(256, triton.next_power_of_2(hidden)),
        UNROLL=8,
        RESIDENT=kernel_plan.resident,
        # To its kernel a cluster is one program: its exchanges are the compiler's.
        EXCHANGE="none" if kernel_plan.ctas > 1 else kernel_plan.exchange,
        EXCHANGES=kernel_plan.exchanges,
        HAS_LENGTHS=has_lengths,
        PRECISION=precision,
    )
    return {name: value for name, value in everything.items() if name in kernel.arg_names}


@functools.lru_cache(maxsize=1024)
def _cached_plan(hidden, batch, dtype, device, recurrent, pins, plans) -> LaunchPlan:
    return planning.plan(hidden, batch, dtype, device, recurrent=recurrent, pins=pins, plans=plans)


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


def _walk(steps: int, chunk: int, reverse: bool) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of every chunk in walking order; all but the last walked have `chunk` steps."""
    for done in range(0, steps, chunk):
        size = min(chunk, steps - done)
        yield (steps - done - size, steps - done) if reverse else (done, done + size)


def _first(start: int, stop: int, reverse: bool) -> tuple[int, int]:
    """Return t of the first step walked in [start, stop), and the walk's step in t."""
    return (stop - 1, -1) if reverse else (start, 1)


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


def _affine(parameter: Tensor, gate_gain: float) -> Tensor:
    """Return γ or β in fp32 with the gate gain folded in: gain·LN(s; γ, β) = LN(s; gain·γ, gain·β)."""
    return (parameter.to(torch.float32) * gate_gain).contiguous()


def _softmax_gate(z: Tensor, cell: Cell, hidden: int) -> None:
    """Replace the pre-activations of a gate that does not see h by their softmax, in place; z is [rows, G·H]."""
    if cell.softmax_gate is not None:
        gate = z[:, cell.softmax_gate * hidden : (cell.softmax_gate + 1) * hidden]
        gate.copy_(torch.softmax(gate, dim=1, dtype=torch.float32))


def _without_padding(x: Tensor, lengths: Tensor | None, start: int) -> Tensor:
    """Return x [n, B, I], from t = start on, with zeros for padding: whatever it holds, zero times it must be zero."""
    if lengths is None:
        return x
    t = torch.arange(start, start + x.shape[0], device=x.device, dtype=lengths.dtype).unsqueeze(1)
    return x.masked_fill((t >= lengths).unsqueeze(2), 0)


def _previous_h(y: Tensor, h_0: Tensor, lengths: Tensor | None, start: int, stop: int, reverse: bool) -> Tensor:
    """Return [stop − start, B, H], the h that each step of the chunk started from: y, but for a row's first step."""
    if reverse:
        previous = y[start + 1 : stop + 1]
        if stop == y.shape[0]:
            previous = torch.cat([previous, h_0.unsqueeze(0)])
        if lengths is not None:
            t = torch.arange(start, stop, device=y.device, dtype=lengths.dtype).unsqueeze(1)
            previous = torch.where((t == lengths - 1).unsqueeze(2), h_0, previous)
        return previous
    return y[start - 1 : stop - 1] if start > 0 else torch.cat([h_0.unsqueeze(0), y[: stop - 1]])


def _recompute_states(
    cell: Cell,
    kernel_plan: KernelPlan,
    z: Tensor,
    stats: Tensor,
    companions: Tensor,
    c: Tensor,
    affine: tuple[Tensor, Tensor],
    lengths: Tensor | None,
    eps: float,
    walk: tuple[int, int, int],
) -> None:
    """Fill stats, companions and c[1:] of a chunk from its z and c[0]; walk is (first t, stride, start)."""
    (_, batch, hidden), rows = c.shape, z.shape[0]
    constants = [
        kernel_constants(kernel, cell, hidden, kernel_plan, lengths is not None, "ieee")
        for kernel in (statistics_kernel, cell_states_kernel)
    ]
    with _on(z.device):
        grid = (triton.cdiv(rows, constants[0]["BLOCK_R"]),)
        constants[0]["num_warps"] = min(16, max(4, constants[0]["BLOCK_ROW"] // 256))
        statistics_kernel[grid](z, stats, companions, rows, eps, **constants[0], **FUSION)
        grid = (batch, triton.cdiv(hidden, constants[1]["BLOCK_H"]))
        cell_states_kernel[grid](z, stats, *affine, lengths, c, batch, c.shape[0] - 1, *walk, **constants[1], **FUSION)


def _add_product(total: Tensor, dz: Tensor, inputs: Tensor) -> None:
    """Add dzᵀ inputs to total, in fp32 from operands [rows, ·] of any dtype."""
    if dz.dtype == torch.float32:
        total.addmm_(dz.t(), inputs)
    elif dz.is_cuda:
        total += torch.mm(dz.t(), inputs, out_dtype=torch.float32)
    else:
        total.addmm_(dz.t().float(), inputs.float())
