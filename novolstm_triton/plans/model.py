"""The plans of one kernel: every tiling that fits the device, with its modelled time per step. Nothing is measured."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from novolstm_triton.cells import CELLS, Cell
from novolstm_triton.plans.device import Device
from novolstm_triton.plans.limits import (
    check_arguments,
    check_cluster,
    check_pins,
    fits_registers,
    has_wgmma,
    tile_of,
    tiles_alive,
)
from novolstm_triton.plans.pins import CLUSTERS, RACY, Pins

# From published microbenchmarks of H100 and A100: clocks, bytes per clock and multiprocessor, µs. To rank plans only.
_CLOCKS_PER_US = 1980.0
_SMEM_BYTES_PER_CLOCK = 128.0
_L2_BYTES_PER_CLOCK = 38.0
_FLOPS_PER_CLOCK = 2.0 * 1270
_BARRIER_US = 0.75
_BARRIER_US_PER_SLICE = 0.004
_CLUSTER_BARRIER_US = 0.3
_CLUSTER_BARRIERS = 4
_FIXED_US = 0.3
_MOST_TILES = 2**16 - 1
"""Batch tiles of a launch: what CUDA allows along a grid's second axis."""
_POINTWISE_US_PER_ELEMENT = 9 / (16 * _CLOCKS_PER_US)


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """How one persistent kernel is launched."""

    slices: int
    """Programs that share the hidden units of a batch tile."""
    units: int
    """Units per slice; the last one may hold fewer."""
    block_b: int
    """Rows per batch tile."""
    block_n: int
    """`units` padded to the tile size that tl.dot takes."""
    block_k: int
    """Units of h per tile of the K loop."""
    parts: int
    """Parts into which a tile's K is cut, one for each warp; 1 if the warps share out its columns instead."""
    in_flight: int
    """K tiles of the other operand of resident weights that are loaded before the first one is multiplied."""
    resident: bool
    """Whether the recurrent weights stay in shared memory for all steps; otherwise they stream from L2."""
    exchange: str
    ctas: int
    """Thread blocks of the cluster that is one program; 1 unless `exchange` is "cluster"."""
    exchanges: int
    """Exchanges among slices in a step: two, or, in backward at the price of a few products more, one; the plain LSTM
    has one anyway."""
    tiles: int
    """Batch tiles in all, those of every direction."""
    tiles_per_launch: int
    """Batch tiles that are resident together; the others follow in successive launches."""
    num_warps: int
    num_stages: int
    max_registers: int | None
    """Registers per thread that the compiler may use, where its own limit would spill; None leaves it alone."""
    smem_bytes: int
    """Upper bound of the shared memory of one program."""
    step_us: float
    """Modelled time of a step over all launches, in µs; good for ranking plans, not for quoting."""


def candidates(
    hidden: int,
    batch: int,
    dtype: torch.dtype,
    device: Device,
    *,
    cell: str = "formula",
    directions: int = 1,
    backward: bool,
    pins: Pins,
) -> list[KernelPlan]:
    """Return the plans of one kernel that the device and the pins allow, in no particular order.

    Args:
        hidden: units H.
        batch: rows B.
        dtype: dtype of x and the weights.
        device: properties of the GPU; `pins.device` is not looked at.
        cell: its name in `novolstm_triton.cells.CELLS`.
        directions: directions that run side by side, 1 or 2.
        backward: whether the kernel is backward's or forward's.
        pins: choices made beforehand.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or there is no plan; the message names the limit and the value.
    """
    check_arguments(hidden, batch, dtype, device, cell, directions, pins)
    check_pins(hidden, device, pins)
    if pins.exchange == RACY:
        check_cluster(hidden, device, pins)
    elif pins.ctas not in (None, 1):
        raise ValueError(f"ctas: expected 1, got {pins.ctas}: only a cluster has several thread blocks")
    itemsize = dtype.itemsize
    fitting, least_smem = [], None
    residencies = (True, False) if pins.resident is None else (pins.resident,)
    if pins.exchange in ("words", RACY):
        residencies = (True,)
    blocks_b = (16, 32, 64) if pins.block_b is None else (pins.block_b,)
    # Whoever pins a tile gets it, though it may spill.
    anything = device.backend == "interpreter" or pins.slices is not None or pins.block_b is not None
    for slicing, resident, block_b in itertools.product(_slicings(hidden, device, pins), residencies, blocks_b):
        # Products of a warp group take 64 rows and run at nearly twice the rate. Backward's time is reading dz from L2.
        slow = batch >= 1024 and has_wgmma(device) and slicing.slices > 1 and block_b < 64 and not backward
        for block_k, num_stages in _loops_k(hidden, itemsize, slicing, resident, backward, pins):
            tile = (block_b, slicing.block_n, block_k, num_stages)
            sizes = (hidden, batch, itemsize, device, CELLS[cell], directions)
            candidate = _candidate(*sizes, slicing, tile, resident, backward, pins)
            least_smem = min(candidate.smem_bytes, least_smem or candidate.smem_bytes)
            if candidate.smem_bytes <= device.smem_bytes:
                spills = not fits_registers(hidden, device, CELLS[cell], tile, slicing.ctas, resident, backward)
                fitting.append((0 if anything else 2 * spills + slow, candidate))
                break
    if not fitting:
        raise ValueError(
            f"no plan for hidden={hidden} fits {device.name}: the least shared memory under the pins is {least_smem} "
            f"bytes, the limit {device.smem_bytes}"
        )
    least = min(flaws for flaws, _ in fitting)
    return [candidate for flaws, candidate in fitting if flaws == least]


class _Slicing(NamedTuple):
    """How the units are shared out."""

    slices: int
    units: int
    block_n: int
    ctas: int = 1


def _slicings(hidden: int, device: Device, pins: Pins) -> Iterator[_Slicing]:
    """Yield what the pins and the device's residency allow."""
    if pins.exchange == RACY:
        for ctas in CLUSTERS if pins.ctas is None else (pins.ctas,):
            if tile_of(hidden) >= 16 * ctas:
                yield _Slicing(1, hidden, tile_of(hidden), ctas)
        return
    if pins.slices is not None:
        units = -(-hidden // pins.slices)
        yield _Slicing(pins.slices, units, tile_of(units))
        return
    if pins.exchange in (None, "none"):
        yield _Slicing(1, hidden, tile_of(hidden))
    if pins.exchange != "none":
        for block_n in (16, 32, 64, 128, 256):
            slices = -(-hidden // block_n)
            if 1 < slices <= device.multiprocessors:
                yield _Slicing(slices, block_n, block_n)
        if pins.exchange is not None and hidden <= 16:
            yield _Slicing(2, -(-hidden // 2), 16)


def _loops_k(
    hidden: int, itemsize: int, slicing: _Slicing, resident: bool, backward: bool, pins: Pins
) -> Iterator[tuple[int, int]]:
    """Yield (block_k, num_stages), the best first; later ones take less shared memory."""
    if resident and pins.block_k is not None:
        yield pins.block_k, 1
    elif resident and slicing.slices == 1:
        # One tile that is h itself: it stays in registers.
        yield slicing.block_n, 1
    elif resident:
        # In fp32 a K tile of h is split into halves of its own for tf32x3, and larger ones spill.
        for largest in (512, 256, 128) if itemsize == 2 else (64,):
            yield _block_k(hidden, largest), 1
    else:
        sizes = (128 // itemsize, 64 // itemsize, 16) if pins.block_k is None else (pins.block_k,)
        yield from ((size, stages) for size, stages in itertools.product(sizes, (3, 2, 1)) if size >= 16)


def _candidate(
    hidden: int,
    batch: int,
    itemsize: int,
    device: Device,
    cell: Cell,
    directions: int,
    slicing: _Slicing,
    tile: tuple[int, int, int, int],
    resident: bool,
    backward: bool,
    pins: Pins,
) -> KernelPlan:
    (slices, units, _, ctas), (block_b, block_n, block_k, num_stages) = slicing, tile
    recurrent = cell.recurrent
    padded_k = -(-hidden // block_k) * block_k
    local = resident and slices == 1 and block_k == block_n
    tiles = directions * -(-batch // block_b)
    together = min(tiles, device.multiprocessors // slices if slices > 1 else _MOST_TILES)
    elements = block_b * block_n // ctas
    words = slices > 1 and pins.exchange == "words"
    # Fewest that keep every register on chip, as the compile report shows: on a tile of 16 columns further warps repeat
    # the product. On AMD more warps get fewer registers.
    crowded = elements * tiles_alive(cell) > 512 or words or (backward and elements == 512 and not resident)
    crowded = crowded or (block_b == 32 and block_k < min(hidden, 512))
    alone = local and ctas == 1 and elements > 1024
    num_warps = pins.num_warps or (4 if device.backend == "hip" else 16 if alone else 8 if crowded or ctas > 1 else 4)
    # Here the assembler spares registers for a second program on the multiprocessor, which never comes, and spills;
    # elsewhere a limit of its own choice serves it better.
    thrifty = resident if backward else not resident or (local and num_warps >= 8)
    exchanges = _exchanges(cell, slices, backward, pins)
    # In fp32 "tf32x3" keeps two tf32 halves of every operand.
    operand_bytes = 8 if itemsize == 4 and device.backend == "cuda" else itemsize
    # A cluster shares out the weights and the work.
    weight_bytes = recurrent * padded_k * block_n * operand_bytes // ctas
    # Where 16 rows leave a warp only a few columns, its products are one chain, each waiting for the one before: a part
    # of K each gives it all columns. Forward has a chain for every gate, unless there are so few columns that warps
    # repeat the products of others. (So they do in a tile of 32 rows; but its parts would spill.)
    least_k = 8 if device.backend == "interpreter" else 16
    few_columns = resident and not local and ctas == 1 and block_b == 16 and (backward or block_n == 16)
    splits = few_columns and device.backend != "hip" and block_k >= least_k * num_warps and pins.split_k is not False
    parts = num_warps if splits else 1

    scratch, in_flight = 4096 + 8 * elements, 1
    tile_bytes = block_b * block_k * operand_bytes
    if words:
        # They are tested all at once.
        scratch += block_b * padded_k * operand_bytes
    elif resident and not local:
        # In forward, whose gates each have a sum, larger tiles do not leave registers to load the next one early.
        most = padded_k // block_k * (recurrent if backward else 1) if backward or block_b == 16 else 1
        in_flight = max(1, min(most, (device.smem_bytes - 2048 - weight_bytes) // tile_bytes))
        # What else needs space needs it before or after.
        scratch = max(scratch + tile_bytes, 2048 + in_flight * tile_bytes)
    else:
        scratch += tile_bytes
    if parts > 1:
        # The parts of a product, in forward of four products, are added through shared memory.
        scratch = max(scratch, 2048 + (1 if backward else 4) * 4 * parts * elements)
    if not resident:
        # Forward multiplies a tile of h by all gates' weights at once, backward takes gate by gate.
        tiles_in_flight = block_k * block_n * (1 if backward else recurrent)
        scratch += num_stages * (tiles_in_flight + block_b * block_k) * operand_bytes
    smem_bytes = scratch + (weight_bytes if resident else 0)

    rounds = -(-tiles // together) if slices > 1 else -(-tiles * ctas // device.multiprocessors)
    read = weight_bytes / (_SMEM_BYTES_PER_CLOCK if resident else _L2_BYTES_PER_CLOCK)
    # Products that feed each other get their warps along the longer side of the tile; on a shorter one work repeats.
    columns = block_n // 8 if block_n > block_b else block_b // 16
    busy = min(4, num_warps, num_warps if parts > 1 else columns)
    multiply = 2 * recurrent * block_b * padded_k * block_n / ctas / (_FLOPS_PER_CLOCK * busy / 4)
    step_us = _FIXED_US + max(read, multiply) / _CLOCKS_PER_US + elements * _POINTWISE_US_PER_ELEMENT
    if ctas > 1:
        step_us += _CLUSTER_BARRIERS * _CLUSTER_BARRIER_US
    if slices > 1:
        gathered = block_b * hidden * itemsize * (recurrent if backward else 1)
        step_us += exchanges * (_BARRIER_US + _BARRIER_US_PER_SLICE * slices)
        step_us += gathered / _L2_BYTES_PER_CLOCK / _CLOCKS_PER_US
    return KernelPlan(
        slices=slices,
        units=units,
        block_b=block_b,
        block_n=block_n,
        block_k=block_k,
        parts=parts,
        in_flight=in_flight,
        resident=resident,
        exchange=RACY if ctas > 1 else "none" if slices == 1 else pins.exchange or "barrier",
        ctas=ctas,
        exchanges=exchanges,
        tiles=tiles,
        tiles_per_launch=together,
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=min(255, 2**16 // (32 * num_warps)) if device.backend == "cuda" and thrifty else None,
        smem_bytes=smem_bytes,
        step_us=step_us * rounds,
    )


def _exchanges(cell: Cell, slices: int, backward: bool, pins: Pins) -> int:
    """Return how often a step exchanges data: sums over the units, sums of c, if there are any, and h or dz."""
    kernels = cell.load_kernels()
    sums = bool(kernels.grad_rows if backward else kernels.partial_rows)
    state_sums = bool(kernels.state_grad_rows if backward else kernels.state_rows)
    saved = backward and slices > 1 and pins.exchanges == 1 and bool(kernels.companion_gates)
    return 1 + sums + state_sums - saved


def _block_k(hidden: int, largest: int) -> int:
    """Return the largest K tile ≤ `largest` that pads H little; small ones cost instructions, big ones registers."""
    sizes = [size for size in (16, 32, 64, 128, 256, 512) if size <= largest]
    return max(sizes, key=lambda size: (-math.ceil(-(-hidden // size) * size / hidden * 8), size))
