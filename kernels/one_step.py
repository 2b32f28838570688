"""One step of a cell by itself, forward and back: what `novolstm_triton.testing.check_cell` interprets.

A single program walks over the slices, as the programs of the persistent kernels do side by side.
"""

import triton
import triton.language as tl

from .backward import add_slices, load_sums, store_sums
from .gate_norms import (
    cell_companions,
    cell_grad_finish,
    cell_grad_local,
    cell_merge,
    cell_partials,
    cell_update,
)
from .tiles import units_per_slice


@triton.jit
def places(
    slice, ROWS: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return the places of a slice's elements in an array [ROWS, HIDDEN], which exist, its units, and which are."""
    row = tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    unit = slice * UNITS + column
    is_unit = (column < UNITS) & (unit < HIDDEN)
    return row * HIDDEN + unit, (row < ROWS) & is_unit, unit, is_unit


@triton.jit
def part_places(ROWS: tl.constexpr, SLICES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the places of all slices' parts in row sums [ROWS, SLICES], and which exist."""
    row = tl.arange(0, BLOCK_R)[:, None]
    slices = tl.arange(0, BLOCK_S)[None, :]
    return row * SLICES + slices, (row < ROWS) & (slices < SLICES)


@triton.jit
def state_statistics(
    given_ptr,
    vectors_ptr,
    rows_ptr,
    stats,
    eps,
    update: tl.constexpr,
    state_partials: tl.constexpr,
    state_merge: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTORS: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Return the statistics of the new c, whose row sums [STATE_ROWS, ROWS, SLICES] go to rows_ptr."""
    row = tl.arange(0, BLOCK_R)
    for slice in tl.static_range(SLICES):
        place, mask, unit, is_unit = places(slice, ROWS, HIDDEN, UNITS, BLOCK_R, BLOCK_N)
        given = load_sums(given_ptr, place, ROWS * HIDDEN, mask, BLOCKS + 1)
        vectors = load_sums(vectors_ptr, unit, HIDDEN, is_unit, VECTORS)
        _, c = cell_update(given[:BLOCKS], stats, given[BLOCKS], vectors, update, GATE_NORMS)
        count, counts = units_per_slice(slice, HIDDEN, UNITS, SLICES, BLOCK_S)
        own = state_partials(c, count, is_unit)
        tl.static_assert(len(own) == STATE_ROWS, "state_partials: expected as many row sums as state_rows says")
        store_sums(rows_ptr, row * SLICES + slice, ROWS * SLICES, own, row < ROWS)
    part_place, part_mask = part_places(ROWS, SLICES, BLOCK_R, BLOCK_S)
    parts = load_sums(rows_ptr, part_place, ROWS * SLICES, part_mask, STATE_ROWS)
    return state_merge(parts, counts, HIDDEN, eps)


@triton.jit
def state_gradients(
    given_ptr,
    vectors_ptr,
    rows_ptr,
    stats,
    update: tl.constexpr,
    grad_expose: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTORS: tl.constexpr,
    STATE_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Return what each slice keeps of the way from dh to dc, and the row sums of all, which go to rows_ptr."""
    row = tl.arange(0, BLOCK_R)
    waiting = ()
    for slice in tl.static_range(SLICES):
        place, mask, unit, is_unit = places(slice, ROWS, HIDDEN, UNITS, BLOCK_R, BLOCK_N)
        given = load_sums(given_ptr, place, ROWS * HIDDEN, mask, BLOCKS + 2)
        vectors = load_sums(vectors_ptr, unit, HIDDEN, is_unit, VECTORS)
        _, c = cell_update(given[:BLOCKS], stats, given[BLOCKS], vectors, update, GATE_NORMS)
        own, pending = grad_expose(given[:BLOCKS], stats, c, given[BLOCKS + 1], vectors)
        tl.static_assert(len(own) == STATE_SUMS, "grad_expose: expected as many row sums as state_grad_rows says")
        store_sums(rows_ptr, row * SLICES + slice, ROWS * SLICES, own, row < ROWS)
        waiting = waiting + (pending,)
    part_place, part_mask = part_places(ROWS, SLICES, BLOCK_R, BLOCK_S)
    return waiting, add_slices(load_sums(rows_ptr, part_place, ROWS * SLICES, part_mask, STATE_SUMS))


@triton.jit
def step_kernel(
    given_ptr,
    vectors_ptr,
    partials_ptr,
    sums_ptr,
    out_ptr,
    eps,
    partials: tl.constexpr,
    merge: tl.constexpr,
    update: tl.constexpr,
    grad_local: tl.constexpr,
    grad_finish: tl.constexpr,
    companions: tl.constexpr,
    state_partials: tl.constexpr,
    state_merge: tl.constexpr,
    expose: tl.constexpr,
    grad_expose: tl.constexpr,
    grad_state: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    VECTORS: tl.constexpr,
    PARTIALS: tl.constexpr,
    STATS: tl.constexpr,
    SUMS: tl.constexpr,
    STATE_ROWS: tl.constexpr,
    STATE_STATS: tl.constexpr,
    STATE_SUMS: tl.constexpr,
    EARLY: tl.constexpr,
    COMPANIONS: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Take one step forward and one back.

    Args:
        given_ptr: [BLOCKS + 3, ROWS, HIDDEN] z of every block, c before the step, dh, dc.
        vectors_ptr: [VECTORS, HIDDEN].
        partials_ptr: [PARTIALS + STATE_ROWS, ROWS, SLICES] space for the row sums of a step forward.
        sums_ptr: [SUMS + STATE_SUMS, ROWS, SLICES] likewise, of a step back.
        out_ptr: [·, ROWS, HIDDEN] h, c, dc of the step before, the shares of the vectors' gradients, dz of the early
            blocks, dz of the late ones, the same less the companions times the sums.
        eps: ε of the cell.
    """
    SIZE: tl.constexpr = ROWS * HIDDEN
    ROW_SIZE: tl.constexpr = ROWS * SLICES
    row = tl.arange(0, BLOCK_R)
    in_batch = row < ROWS
    part_place, part_mask = part_places(ROWS, SLICES, BLOCK_R, BLOCK_S)
    for slice in tl.static_range(SLICES):
        place, mask, unit, is_unit = places(slice, ROWS, HIDDEN, UNITS, BLOCK_R, BLOCK_N)
        z = load_sums(given_ptr, place, SIZE, mask, BLOCKS)
        count, counts = units_per_slice(slice, HIDDEN, UNITS, SLICES, BLOCK_S)
        own = cell_partials(z, count, is_unit, partials, GATE_NORMS)
        tl.static_assert(len(own) == PARTIALS, "partials: expected as many row sums as partial_rows says")
        store_sums(partials_ptr, row * SLICES + slice, ROW_SIZE, own, in_batch)
    parts = load_sums(partials_ptr, part_place, ROW_SIZE, part_mask, PARTIALS)
    stats = cell_merge(parts, counts, HIDDEN, eps, merge, GATE_NORMS)
    tl.static_assert(len(stats) == STATS, "merge: expected as many statistics as stats says")
    # What makes h of c by sums of it, and what these sums give the gradient of c.
    state_waiting = ()
    if STATE_ROWS > 0:
        stats = stats + state_statistics(
            *(given_ptr, vectors_ptr, partials_ptr + PARTIALS * ROW_SIZE, stats, eps, update, state_partials),
            *(state_merge, GATE_NORMS, BLOCKS, VECTORS, STATE_ROWS),
            *(ROWS, HIDDEN, SLICES, UNITS, BLOCK_R, BLOCK_N, BLOCK_S),
        )
        tl.static_assert(len(stats) == STATS + STATE_STATS, "state_merge: expected as many as state_stats says")
    if STATE_SUMS > 0:
        state_waiting, state_sums = state_gradients(
            *(given_ptr, vectors_ptr, sums_ptr + SUMS * ROW_SIZE, stats, update, grad_expose),
            *(GATE_NORMS, BLOCKS, VECTORS, STATE_SUMS),
            *(ROWS, HIDDEN, SLICES, UNITS, BLOCK_R, BLOCK_N, BLOCK_S),
        )
    waiting = ()
    for slice in tl.static_range(SLICES):
        place, mask, unit, is_unit = places(slice, ROWS, HIDDEN, UNITS, BLOCK_R, BLOCK_N)
        given = load_sums(given_ptr, place, SIZE, mask, BLOCKS + 3)
        z = given[:BLOCKS]
        c_prev = given[BLOCKS]
        dc = given[BLOCKS + 2]
        vectors = load_sums(vectors_ptr, unit, HIDDEN, is_unit, VECTORS)
        h, c = cell_update(z, stats, c_prev, vectors, update, GATE_NORMS)
        if STATE_ROWS > 0:
            h = expose(z, stats, c, vectors)
        if STATE_SUMS > 0:
            dc = dc + grad_state(state_waiting[slice], stats, state_sums, HIDDEN)
        own, early, pending, dc_prev, shares = cell_grad_local(
            *(z, stats, c, c_prev, given[BLOCKS + 1], dc, vectors, is_unit, grad_local, GATE_NORMS)
        )
        tl.static_assert(len(own) == SUMS, "grad_local: expected as many row sums as grad_rows says")
        tl.static_assert(len(early) == EARLY, "grad_local: expected as many dz as early has blocks")
        tl.static_assert(len(shares) == VECTORS, "grad_local: expected a gradient for each block of the vectors")
        store_sums(out_ptr, place, SIZE, (h, c, dc_prev) + shares + early, mask)
        store_sums(sums_ptr, row * SLICES + slice, ROW_SIZE, own, in_batch)
        waiting = waiting + (pending,)
    sums = add_slices(load_sums(sums_ptr, part_place, ROW_SIZE, part_mask, SUMS))
    zeros = ()
    for k in tl.static_range(SUMS):
        zeros = zeros + (tl.zeros_like(sums[k]),)
    for slice in tl.static_range(SLICES):
        place, mask, unit, is_unit = places(slice, ROWS, HIDDEN, UNITS, BLOCK_R, BLOCK_N)
        late = cell_grad_finish(waiting[slice], stats, sums, HIDDEN, grad_finish, GATE_NORMS)
        tl.static_assert(len(late) == BLOCKS - EARLY, "grad_finish: expected as many dz as late has blocks")
        without = cell_grad_finish(waiting[slice], stats, zeros, HIDDEN, grad_finish, GATE_NORMS)
        z = load_sums(given_ptr, place, SIZE, mask, BLOCKS)
        tiles = cell_companions(z, stats, is_unit, HIDDEN, companions, GATE_NORMS)
        tl.static_assert(len(tiles) == COMPANIONS, "companions: expected as many tiles as companion_gates")
        products = ()
        for k in tl.static_range(len(tiles)):
            products = products + (tiles[k] * sums[k][:, None],)
        first = 3 + VECTORS + BLOCKS - len(late)
        store_sums(out_ptr + first * SIZE, place, SIZE, late + without + products, mask)
