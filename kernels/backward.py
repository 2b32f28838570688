"""The backward kernels: per chunk, the row statistics and cell states again, then the persistent walk back in time."""

import triton
import triton.language as tl

from .exchange import arrive, await_blocks, collect_rows, load_block, publish, publish_gates, publish_rows, wait
from .gate_norms import (
    cell_companions,
    cell_grad_finish,
    cell_grad_local,
    cell_merge,
    cell_partials,
    cell_update,
)
from .tiles import (
    add_parts,
    load_gates,
    load_resident,
    load_rows,
    load_weight,
    load_zoneout_mask,
    mirror,
    widen,
    zero_product,
    zoneout,
)


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    z_ptr,
    stats_ptr,
    companion_ptr,
    rows,
    eps,
    partials: tl.constexpr,
    merge: tl.constexpr,
    companions: tl.constexpr,
    GATES: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    STATS: tl.constexpr,
    HIDDEN: tl.constexpr,
    COMPANIONS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """Compute the cell's row statistics from pre-activations; a program owns BLOCK_R rows (t, b), whole.

    With COMPANIONS, for one exchange a step in backward, also the companions of its row sums.

    Args:
        z_ptr: [rows, GATES·H] pre-activations.
        stats_ptr: [STATS, rows] fp32 output.
        companion_ptr: [row sums, rows, H] output; not written unless COMPANIONS.
        rows: steps of the chunk times B.
        eps: ε of the layer normalisation.
    """
    row_first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    unit = tl.arange(0, BLOCK_ROW)[None, :]
    inside = row_first + row < rows
    is_unit = unit < HIDDEN
    place = row[:, None] * (GATES * HIDDEN) + unit
    z = load_gates(z_ptr + row_first * (GATES * HIDDEN), place, inside[:, None] & is_unit, GATES, HIDDEN)
    own = cell_partials(widen(z), HIDDEN * 1.0, is_unit, partials, GATE_NORMS)
    parts = ()
    for k in tl.static_range(len(own)):
        parts = parts + (own[k][:, None],)
    stats = cell_merge(parts, tl.full((1,), HIDDEN, tl.float32), HIDDEN, eps, merge, GATE_NORMS)
    for k in tl.static_range(STATS):
        tl.store(stats_ptr + k * tl.cast(rows, tl.int64) + row_first + row, stats[k], mask=inside)
    if COMPANIONS:
        tiles = cell_companions(widen(z), stats, is_unit, HIDDEN, companions, GATE_NORMS)
        for k in tl.static_range(len(tiles)):
            place = (k * tl.cast(rows, tl.int64) + row_first) * HIDDEN + row[:, None] * HIDDEN + unit
            tl.store(companion_ptr + place, tiles[k], mask=inside[:, None] & is_unit)


@triton.jit
def load_stats(stats_ptr, place, stride, STATS: tl.constexpr, mask=None):
    """Load the STATS row statistics, `stride` apart, of the rows at `place`, as a tuple."""
    stats = ()
    for k in tl.static_range(STATS):
        stats = stats + (tl.load(stats_ptr + k * stride + place, mask=mask),)
    return stats


@triton.jit(
    do_not_specialize=["batch", "steps", "t_first", "t_step", "chunk_start", "total"],
    do_not_specialize_on_alignment=["lengths_ptr"],
)
def cell_states_kernel(
    z_ptr,
    stats_ptr,
    vectors_ptr,
    lengths_ptr,
    zoneout_mask_ptr,
    c_ptr,
    batch,
    steps,
    t_first,
    t_step,
    chunk_start,
    total,
    zoneout_c,
    update: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    GATES: tl.constexpr,
    VECTORS: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    STATS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ZONEOUT: tl.constexpr,
):
    """Walk a chunk's cell states again from its border; a program owns BLOCK_H units of one row b, D·B rows in all.

    Args:
        z_ptr: [D, steps, B, GATES·H] pre-activations, in the order of t.
        stats_ptr: [STATS, D, steps, B] fp32 row statistics.
        vectors_ptr: [D, VECTORS·H] fp32.
        lengths_ptr: [B] int32; not read unless HAS_LENGTHS.
        zoneout_mask_ptr: [T, B, D·H] uint8 masks of zoneout as in `forward_kernel`; read if ZONEOUT is "masks".
        c_ptr: [D, steps + 1, B, H] fp32 in the order of the walk; slot 0 is given, the others are written.
        batch: B.
        steps: length of the chunk.
        t_first: t of the first step that direction 0 walks.
        t_step: direction 0's step in t, 1 or −1.
        chunk_start: lowest t of direction 0's chunk.
        total: T; not looked at unless D is 2.
        zoneout_c: share of c that a step keeps if ZONEOUT is "average".
    """
    row = tl.program_id(0)
    direction = 0
    if DIRECTIONS == 2:
        direction = row // batch
        row = row % batch
        t_first, t_step, chunk_start = mirror(direction, t_first, t_step, chunk_start, steps, total)
        vectors_ptr += direction * (VECTORS * HIDDEN)
        c_ptr += tl.cast(direction * (steps + 1), tl.int64) * batch * HIDDEN
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    unit = units[None, :]
    mask = unit < HIDDEN
    vectors = load_rows(vectors_ptr, units, units < HIDDEN, VECTORS, HIDDEN)
    c = tl.load(c_ptr + tl.cast(row, tl.int64) * HIDDEN + unit, mask=mask, other=0.0)
    stats_size = tl.cast(steps, tl.int64) * (DIRECTIONS * batch)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + row)
    # Loads of several steps are under way at once, because none depends on the walk: alone each would cost its latency.
    for first in range(0, steps, UNROLL):
        z = ()
        stats = ()
        zoneout_masks = ()
        for k in tl.static_range(UNROLL):
            step = tl.minimum(first + k, steps - 1)
            t = t_first + step * t_step
            z_row = tl.cast(t - chunk_start, tl.int64) * batch + row
            z = z + load_gates(z_ptr + z_row * (GATES * HIDDEN), unit, mask, GATES, HIDDEN)
            stats = stats + load_stats(stats_ptr, z_row + tl.arange(0, 1), stats_size, STATS)
            mask_place = (row * DIRECTIONS + direction) * HIDDEN + unit
            step_size = batch * DIRECTIONS * HIDDEN
            bits = load_zoneout_mask(zoneout_mask_ptr, t, step_size, mask_place, mask, ZONEOUT)
            zoneout_masks = zoneout_masks + (bits,)
        for k in tl.static_range(UNROLL):
            step = first + k + tl.zeros_like(unit)
            valid = step < steps
            if HAS_LENGTHS:
                valid = valid & (t_first + step * t_step < length)
            step_z = widen(z[k * GATES : (k + 1) * GATES])
            step_stats = stats[k * STATS : (k + 1) * STATS]
            _, c_new = cell_update(step_z, step_stats, c, vectors, update, GATE_NORMS)
            c_new = zoneout(c_new, c, zoneout_masks[k], 2, zoneout_c, ZONEOUT)
            c = tl.where(valid, c_new, c)
            place = (tl.cast(first + k + 1, tl.int64) * batch + row) * HIDDEN + unit
            tl.store(c_ptr + place, c, mask=mask & (step < steps))


@triton.jit(do_not_specialize=["rows", "batch", "steps", "t_step"])
def state_statistics_kernel(
    z_ptr,
    stats_ptr,
    vectors_ptr,
    c_ptr,
    rows,
    batch,
    steps,
    t_step,
    eps,
    update: tl.constexpr,
    state_partials: tl.constexpr,
    state_merge: tl.constexpr,
    GATES: tl.constexpr,
    VECTORS: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    STATS: tl.constexpr,
    STATE_STATS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """Compute the row statistics of the c that each step makes; a program owns BLOCK_R rows (d, t, b), whole.

    Args:
        z_ptr: [D, steps, B, GATES·H] pre-activations, in the order of t.
        stats_ptr: [STATS + STATE_STATS, D, steps, B] fp32: the first STATS are given, the others written.
        vectors_ptr: [D, VECTORS·H] fp32.
        c_ptr: [D, steps + 1, B, H] fp32 cell states, in the order of the walk.
        rows: D times steps of the chunk times B.
        batch: B.
        steps: length of the chunk.
        t_step: direction 0's step in t, 1 or −1; direction 1's is the other one.
        eps: ε of the layer normalisations.
    """
    row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    unit = tl.arange(0, BLOCK_ROW)
    is_unit = unit < HIDDEN
    inside = row < rows
    mask = inside[:, None] & is_unit[None, :]
    z = load_gates(z_ptr, row[:, None] * (GATES * HIDDEN) + unit[None, :], mask, GATES, HIDDEN)
    stats = load_stats(stats_ptr, row, tl.cast(rows, tl.int64), STATS, inside)
    # The walk's number of the step at this t.
    direction = row // (steps * batch)
    t = row // batch % steps
    step = tl.where((direction == 0) == (t_step > 0), t, steps - 1 - t)
    place = ((direction * (steps + 1) + step) * batch + row % batch)[:, None] * HIDDEN + unit[None, :]
    c = tl.load(c_ptr + place, mask=mask, other=0.0)
    vectors = ()
    for k in tl.static_range(VECTORS):
        vector_place = direction[:, None] * (VECTORS * HIDDEN) + (k * HIDDEN + unit)[None, :]
        vectors = vectors + (tl.load(vectors_ptr + vector_place, mask=mask, other=0.0),)
    _, c_new = cell_update(widen(z), stats, c, vectors, update, GATE_NORMS)
    own = state_partials(c_new, HIDDEN * 1.0, is_unit[None, :])
    parts = ()
    for k in tl.static_range(len(own)):
        parts = parts + (own[k][:, None],)
    state_stats = state_merge(parts, tl.full((1,), HIDDEN, tl.float32), HIDDEN, eps)
    for k in tl.static_range(STATE_STATS):
        tl.store(stats_ptr + (STATS + k) * tl.cast(rows, tl.int64) + row, state_stats[k], mask=inside)


@triton.jit
def zero_unless(valid, dz):
    """Zero the rows of each tile that are not valid."""
    kept = ()
    for k in tl.static_range(len(dz)):
        kept = kept + (tl.where(valid, dz[k], 0.0),)
    return kept


@triton.jit
def load_sums(ptr, place, stride, mask, COUNT: tl.constexpr):
    """Load COUNT tiles, `stride` apart, as a tuple."""
    sums = ()
    for k in tl.static_range(COUNT):
        sums = sums + (tl.load(ptr + k * stride + place, mask=mask, other=0.0),)
    return sums


@triton.jit
def store_sums(ptr, place, stride, sums, mask):
    """Store a tuple of tiles where `load_sums` finds them."""
    for k in tl.static_range(len(sums)):
        tl.store(ptr + k * stride + place, sums[k], mask=mask)


@triton.jit
def add_tiles(a, b):
    """Add two tuples of tiles."""
    total = ()
    for k in tl.static_range(len(a)):
        total = total + (a[k] + b[k],)
    return total


@triton.jit
def add_slices(parts):
    """Return the row sums of tiles [R, S], one per slice and column, as a tuple of rows [R]."""
    sums = ()
    for k in tl.static_range(len(parts)):
        sums = sums + (tl.sum(parts[k], 1),)
    return sums


@triton.jit
def multiply_local(dz, weights, is_unit, dz_ptr, ORDER: tl.constexpr, RECURRENT: tl.constexpr, PRECISION: tl.constexpr):
    """Return dz U of every gate in ORDER that has a U, as a tuple; dz [R, H] straight from registers."""
    products = ()
    for k in tl.static_range(len(ORDER)):
        if ORDER[k] < RECURRENT:
            # Padding columns meet zero weights, and only a finite value times zero is zero.
            operand = tl.where(is_unit[None, :], dz[k], 0.0).to(dz_ptr.dtype.element_ty)
            products = products + (tl.dot(operand, weights[ORDER[k]], input_precision=PRECISION),)
    return products


@triton.jit
def add_all(products):
    """Return the sum of a tuple of tiles."""
    total = products[0]
    for k in tl.static_range(1, len(products)):
        total += products[k]
    return total


@triton.jit
def multiply_gates(
    total,
    dz_ptr,
    row,
    in_batch,
    weights,
    weight_hh_ptr,
    unit,
    is_unit,
    counter,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    IN_ORDER: tl.constexpr,
    RECURRENT: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    RESIDENT: tl.constexpr,
    EXCHANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_SPINS: tl.constexpr,
):
    """Add dz U of every gate in ORDER that has a U to `total`; dz [R, H] is what all slices have published.

    Gate k lies in block k of the PLACES·H columns at dz_ptr, or, if IN_ORDER, in the gate's place in ORDER.
    """
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    STRIDE: tl.constexpr = PLACES * HIDDEN
    if RESIDENT and EXCHANGE == "words":
        for k in tl.static_range(len(ORDER)):
            if ORDER[k] < RECURRENT:
                gate_ptr = dz_ptr + (k if IN_ORDER else ORDER[k]) * HIDDEN
                dz = await_blocks(gate_ptr, row, in_batch, counter, STRIDE, HIDDEN, BLOCK_K, PARTS, MAX_SPINS)
                for block in tl.static_range(BLOCKS):
                    total = tl.dot(dz[block], weights[block * RECURRENT + ORDER[k]], total, input_precision=PRECISION)
    elif RESIDENT:
        # Several tiles are loaded before the first one is multiplied: alone each would cost its latency.
        COUNT: tl.constexpr = len(ORDER) * BLOCKS
        for first in tl.static_range(0, COUNT, IN_FLIGHT):
            dz = ()
            own = ()
            for place in tl.static_range(first, first + IN_FLIGHT if first + IN_FLIGHT < COUNT else COUNT):
                if ORDER[place // BLOCKS] < RECURRENT:
                    gate_ptr = dz_ptr + (place // BLOCKS if IN_ORDER else ORDER[place // BLOCKS]) * HIDDEN
                    dz = dz + (load_block(gate_ptr, row, in_batch, place % BLOCKS, STRIDE, HIDDEN, BLOCK_K, PARTS),)
                    own = own + (weights[place % BLOCKS * RECURRENT + ORDER[place // BLOCKS]],)
            for k in tl.static_range(len(dz)):
                total = tl.dot(dz[k], own[k], total, input_precision=PRECISION)
    else:
        for k in tl.static_range(len(ORDER)):
            if ORDER[k] < RECURRENT:
                gate_ptr = dz_ptr + (k if IN_ORDER else ORDER[k]) * HIDDEN
                for block in range(BLOCKS):
                    dz = load_block(gate_ptr, row, in_batch, block, STRIDE, HIDDEN, BLOCK_K, 1)
                    source = block * BLOCK_K + tl.arange(0, BLOCK_K)
                    weight = load_weight(weight_hh_ptr, ORDER[k], source, unit, is_unit, HIDDEN, False)
                    total = tl.dot(dz, weight, total, input_precision=PRECISION)
    return total


@triton.jit(
    do_not_specialize=[
        "batch",
        "steps",
        "t_last",
        "t_step",
        "chunk_start",
        "total",
        "step_base",
        "late_slots",
        "tile_first",
    ],
    do_not_specialize_on_alignment=["lengths_ptr", "counter_ptr"],
)
def backward_kernel(
    z_ptr,
    stats_ptr,
    weight_hh_ptr,
    vectors_ptr,
    lengths_ptr,
    h_mask_ptr,
    zoneout_mask_ptr,
    c_ptr,
    dy_ptr,
    companion_ptr,
    row_ring_ptr,
    late_ring_ptr,
    counter_ptr,
    dz_ptr,
    dh_ptr,
    dc_ptr,
    dvectors_ptr,
    batch,
    steps,
    t_last,
    t_step,
    chunk_start,
    total,
    step_base,
    late_slots,
    tile_first,
    zoneout_h,
    zoneout_c,
    update: tl.constexpr,
    grad_local: tl.constexpr,
    grad_finish: tl.constexpr,
    grad_expose: tl.constexpr,
    grad_state: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    GATES: tl.constexpr,
    RECURRENT: tl.constexpr,
    VECTORS: tl.constexpr,
    GATE_NORMS: tl.constexpr,
    STATS: tl.constexpr,
    STATE_STATS: tl.constexpr,
    SUMS: tl.constexpr,
    STATE_SUMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RESIDENT: tl.constexpr,
    EXCHANGE: tl.constexpr,
    COMPANIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ZONEOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_SPINS: tl.constexpr,
):
    """Walk a chunk back in time; program (s, b) owns the units of slice s for the rows of batch tile tile_first + b.

    On chip for all steps: the columns of the recurrent weights that lead to the slice's units (RESIDENT), dh, dc and
    the sums of the vectors' gradients, in fp32. Per step it exchanges with the tile's other slices dz of the early
    gates and the backward row sums, then dz of the late gates. With COMPANIONS, all that at once, dz of the late gates
    as if the sums were zero: it is linear in them, so what they take from dh comes from the companions' products. A
    cell without sums exchanges dz, once.
    D directions of a layer run side by side, as in `forward_kernel`.

    Args:
        z_ptr: [D, steps, B, GATES·H] pre-activations, in the order of t.
        stats_ptr: [STATS + STATE_STATS, D, steps, B] fp32 row statistics, in the order of t.
        weight_hh_ptr: [D, RECURRENT·H, H].
        vectors_ptr: [D, VECTORS·H] fp32, gate gain folded in.
        lengths_ptr: [B] int32; not read unless HAS_LENGTHS.
        h_mask_ptr: [D, B, H] factor on h wherever it met weight_hh; not read unless HAS_MASK.
        zoneout_mask_ptr: [T, B, D·H] uint8 masks of zoneout as in `forward_kernel`; read if ZONEOUT is "masks".
        c_ptr: [D, steps + 1, B, H] fp32 cell states, in the order of the walk forward.
        dy_ptr: [T, B, D·H] gradient of the output.
        companion_ptr: [S, D, steps, B, H], the companions times their gates' weights, in the order of t; not read
            unless COMPANIONS.
        row_ring_ptr: [2, D·B, SUMS, SLICES], space for the cell's backward row sums, and behind it the same for the
            STATE_SUMS that h's gradient gives that of c; see exchange.py.
        late_ring_ptr: [D, late_slots, B, late gates·H], space for dz of the late gates without the sums; not touched
            unless COMPANIONS.
        counter_ptr: [batch tiles of this launch] int32, zero, and if MAX_SPINS what follows each; see exchange.py.
        dz_ptr: [D, steps, B, GATES·H] output, in the order of t.
        dh_ptr: [D, B, H] fp32 gradient of the chunk's last h; of the h before the chunk afterwards.
        dc_ptr: [D, B, H] fp32, likewise of c.
        dvectors_ptr: [VECTORS, D, B, H] fp32; this chunk's share is added, row by row.
        batch: B.
        steps: length of the chunk.
        t_last: t of the step that direction 0's forward walk took last.
        t_step: that walk's step in t, 1 or −1.
        chunk_start: lowest t of direction 0's chunk.
        total: T; not looked at unless D is 2.
        step_base: steps walked back before this launch.
        late_slots: slots of late_ring.
        tile_first: first batch tile of this launch.
        zoneout_h: share of h that a step kept if ZONEOUT is "average".
        zoneout_c: likewise, of c.
    """
    slice = tl.program_id(0)
    counter = counter_ptr + tl.program_id(1) * (1 + (4 + SLICES) * SLICES if MAX_SPINS > 0 else 1)
    tile = tile_first + tl.program_id(1)
    LATE_GATES: tl.constexpr = len(LATE)
    size = tl.cast(batch, tl.int64) * HIDDEN
    direction = 0
    if DIRECTIONS == 2:
        tiles = tl.cdiv(batch, BLOCK_B)
        direction = tile // tiles
        tile = tile % tiles
        t_last, t_step, chunk_start = mirror(direction, t_last, t_step, chunk_start, steps, total)
        weight_hh_ptr += tl.cast(direction, tl.int64) * (RECURRENT * HIDDEN * HIDDEN)
        vectors_ptr += direction * (VECTORS * HIDDEN)
    # Pointers would each take two registers: what the loop uses is offset through its indices.
    c_first = direction * (steps + 1)
    slot_first = direction * late_slots
    row_first = tile * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    in_batch = row_first + row < batch
    unit = slice * UNITS + tl.arange(0, BLOCK_N)
    is_unit = (tl.arange(0, BLOCK_N) < UNITS) & (unit < HIDDEN)
    mask = in_batch[:, None] & is_unit[None, :]
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    # A single program that holds all units multiplies dz straight from registers.
    LOCAL: tl.constexpr = RESIDENT and SLICES == 1 and BLOCKS == 1 and BLOCK_N == BLOCK_K

    weights = ()
    if RESIDENT:
        weights = load_resident(weight_hh_ptr, unit, is_unit, RECURRENT, HIDDEN, BLOCK_K, False, PARTS)

    vectors = load_rows(vectors_ptr, unit, is_unit, VECTORS, HIDDEN)
    ring_row = direction * batch + row_first + row
    tile_place = tl.cast(row_first, tl.int64) * HIDDEN
    state_place = direction * size + tile_place
    place = row[:, None] * HIDDEN + unit[None, :]
    y_size = size * DIRECTIONS
    y_place = row[:, None] * (DIRECTIONS * HIDDEN) + (direction * HIDDEN + unit)[None, :]
    gate_place = row[:, None] * (GATES * HIDDEN) + unit[None, :]
    late_place = row[:, None] * (LATE_GATES * HIDDEN) + unit[None, :]
    dh = tl.load(dh_ptr + state_place + place, mask=mask, other=0.0)
    dc = tl.load(dc_ptr + state_place + place, mask=mask, other=0.0)
    dvectors = load_sums(dvectors_ptr + state_place, place, size * DIRECTIONS, mask, VECTORS)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + row_first + row, mask=in_batch, other=0)
    if HAS_MASK:
        h_mask = tl.load(h_mask_ptr + state_place + place, mask=mask, other=0.0)

    t = t_last
    c = tl.load(c_ptr + (c_first + steps) * size + tile_place + place, mask=mask, other=0.0)
    arrivals = 0
    chunk_t = tl.cast(t - chunk_start, tl.int64)
    stats_size = tl.cast(steps, tl.int64) * (DIRECTIONS * batch)
    z = load_gates(z_ptr + (chunk_t * size + tile_place) * GATES, gate_place, mask, GATES, HIDDEN)
    stats = load_stats(stats_ptr + chunk_t * batch + row_first, row, stats_size, STATS + STATE_STATS, in_batch)
    c_prev = tl.load(c_ptr + (c_first + steps - 1) * size + tile_place + place, mask=mask, other=0.0)
    zoneout_mask = load_zoneout_mask(zoneout_mask_ptr, t, y_size, tile_place * DIRECTIONS + y_place, mask, ZONEOUT)
    dy_ptr += tile_place * DIRECTIONS
    dy = tl.load(dy_ptr + tl.cast(t, tl.int64) * y_size + y_place, mask=mask, other=0.0)
    t_after = t_last - tl.minimum(1, steps - 1) * t_step
    dy_next = tl.load(dy_ptr + tl.cast(t_after, tl.int64) * y_size + y_place, mask=mask, other=0.0)
    for step in range(steps):
        step_place = (tl.cast(t - chunk_start, tl.int64) * size + tile_place) * GATES
        dy_step = dy.to(tl.float32)
        if HAS_LENGTHS:
            valid = (t < length)[:, None]
            dy_step = tl.where(valid, dy_step, 0.0)
        dh += dy_step
        dh_new = dh
        dc_new = dc
        if ZONEOUT != "none":
            # The cell's own c, of which the walk forward kept a part, and its share of the gradients.
            _, c = cell_update(widen(z), stats, c_prev, vectors, update, GATE_NORMS)
            dh_new = zoneout(dh, 0.0, zoneout_mask, 1, zoneout_h, ZONEOUT)
            dc_new = zoneout(dc, 0.0, zoneout_mask, 2, zoneout_c, ZONEOUT)
            dh_kept = zoneout(0.0, dh, zoneout_mask, 1, zoneout_h, ZONEOUT)
            dc_kept = zoneout(0.0, dc, zoneout_mask, 2, zoneout_c, ZONEOUT)
        if STATE_SUMS > 0:
            state_sums, state_pending = grad_expose(widen(z), stats, c, dh_new, vectors)
            # Behind the ring of the row sums below.
            state_ring_ptr = row_ring_ptr + 2 * DIRECTIONS * batch * (SUMS * SLICES)
            if SLICES > 1:
                publish_rows(
                    *(state_ring_ptr, state_sums, ring_row, in_batch, slice, step_base + step, DIRECTIONS * batch),
                    *(SLICES, EXCHANGE),
                )
                arrive(counter, EXCHANGE, MAX_SPINS)
                arrivals += SLICES
                wait(counter, arrivals, EXCHANGE, MAX_SPINS)
            state_parts = collect_rows(
                *(state_ring_ptr, state_sums, ring_row, in_batch, step_base + step, DIRECTIONS * batch, counter),
                *(SLICES, BLOCK_S, EXCHANGE, MAX_SPINS),
            )
            dc_new = dc_new + grad_state(state_pending, stats, add_slices(state_parts), HIDDEN)
        own, early, pending, dc_prev, dvectors_step = cell_grad_local(
            *(widen(z), stats, c, c_prev, dh_new, dc_new, vectors, is_unit[None, :], grad_local, GATE_NORMS)
        )
        if ZONEOUT != "none":
            dc_prev += dc_kept
        if HAS_LENGTHS:
            early = zero_unless(valid, early)
            dc_prev = tl.where(valid, dc_prev, dc)
            dvectors_step = zero_unless(valid, dvectors_step)
        dvectors = add_tiles(dvectors, dvectors_step)
        # Published with the sums, so that their products can run while the late gates' dz is on its way.
        publish_gates(dz_ptr + step_place, early, gate_place, mask, EARLY, HIDDEN, EXCHANGE)
        row_step = step_base + step
        if COMPANIONS:
            no_sums = ()
            for k in tl.static_range(len(own)):
                no_sums = no_sums + (tl.zeros_like(own[k]),)
            unsummed = cell_grad_finish(pending, stats, no_sums, HIDDEN, grad_finish, GATE_NORMS)
            if HAS_LENGTHS:
                unsummed = zero_unless(valid, unsummed)
            late_tile_ptr = late_ring_ptr + ((slot_first + step % late_slots) * size + tile_place) * LATE_GATES
            for k in tl.static_range(LATE_GATES):
                publish(late_tile_ptr + k * HIDDEN + late_place, unsummed[k], mask, EXCHANGE)
        HAS_SUMS: tl.constexpr = len(own) > 0
        if SLICES > 1 and HAS_SUMS:
            publish_rows(row_ring_ptr, own, ring_row, in_batch, slice, row_step, DIRECTIONS * batch, SLICES, EXCHANGE)
            arrive(counter, EXCHANGE, MAX_SPINS)
            arrivals += SLICES
        if not COMPANIONS:
            if SLICES > 1 and HAS_SUMS:
                wait(counter, arrivals, EXCHANGE, MAX_SPINS)
            parts = collect_rows(
                *(row_ring_ptr, own, ring_row, in_batch, row_step, DIRECTIONS * batch, counter),
                *(SLICES, BLOCK_S, EXCHANGE, MAX_SPINS),
            )
            late = cell_grad_finish(pending, stats, add_slices(parts), HIDDEN, grad_finish, GATE_NORMS)
            if HAS_LENGTHS:
                late = zero_unless(valid, late)
            publish_gates(dz_ptr + step_place, late, gate_place, mask, LATE, HIDDEN, EXCHANGE)
            if not LOCAL:
                arrive(counter, EXCHANGE, MAX_SPINS)
                arrivals += SLICES
        # What the next step reads comes while the others arrive; the last step has no next one and reads its own again.
        step_stats = stats
        companion_place = (tl.cast(t - chunk_start, tl.int64) * size + tile_place) + place
        t -= tl.where(step + 1 < steps, t_step, 0)
        chunk_t = tl.cast(t - chunk_start, tl.int64)
        z = load_gates(z_ptr + (chunk_t * size + tile_place) * GATES, gate_place, mask, GATES, HIDDEN)
        stats = load_stats(stats_ptr + chunk_t * batch + row_first, row, stats_size, STATS + STATE_STATS, in_batch)
        c = c_prev
        c_place = tl.cast(c_first + tl.maximum(steps - 2 - step, 0), tl.int64) * size + tile_place
        c_prev = tl.load(c_ptr + c_place + place, mask=mask, other=0.0)
        zoneout_mask = load_zoneout_mask(zoneout_mask_ptr, t, y_size, tile_place * DIRECTIONS + y_place, mask, ZONEOUT)

        # dh_prev = Σ_k dz_k U_k
        dh_prev = zero_product(BLOCK_B, BLOCK_N, PARTS)
        if COMPANIONS:
            companion_size = steps * size * DIRECTIONS
            companions = ()
            for k in tl.static_range(len(own)):
                companion = tl.load(companion_ptr + k * companion_size + companion_place, mask=mask, other=0.0)
                companions = companions + (companion,)
            wait(counter, arrivals, EXCHANGE, MAX_SPINS)
            dh_prev = multiply_gates(
                *(dh_prev, dz_ptr + step_place, row, in_batch, weights, weight_hh_ptr, unit, is_unit, counter),
                *(
                    EARLY,
                    GATES,
                    False,
                    RECURRENT,
                    HIDDEN,
                    BLOCK_K,
                    PARTS,
                    IN_FLIGHT,
                    RESIDENT,
                    EXCHANGE,
                    PRECISION,
                    MAX_SPINS,
                ),
            )
            dh_prev = multiply_gates(
                *(dh_prev, late_tile_ptr, row, in_batch, weights, weight_hh_ptr, unit, is_unit, counter),
                *(
                    LATE,
                    LATE_GATES,
                    True,
                    RECURRENT,
                    HIDDEN,
                    BLOCK_K,
                    PARTS,
                    IN_FLIGHT,
                    RESIDENT,
                    EXCHANGE,
                    PRECISION,
                    MAX_SPINS,
                ),
            )
            parts = collect_rows(
                *(row_ring_ptr, own, ring_row, in_batch, row_step, DIRECTIONS * batch, counter),
                *(SLICES, BLOCK_S, EXCHANGE, MAX_SPINS),
            )
            sums = add_slices(parts)
            late = cell_grad_finish(pending, step_stats, sums, HIDDEN, grad_finish, GATE_NORMS)
            if HAS_LENGTHS:
                late = zero_unless(valid, late)
            # Nobody waits for these.
            publish_gates(dz_ptr + step_place, late, gate_place, mask, LATE, HIDDEN, "none")
            correction = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
            for k in tl.static_range(len(own)):
                correction += sums[k][:, None] * companions[k].to(tl.float32)
            dh_prev = add_parts(dh_prev) - correction
        else:
            if LOCAL:
                # Sums of their own do not wait for each other, and take half the block barriers.
                products = multiply_local(early, weights, is_unit, dz_ptr, EARLY, RECURRENT, PRECISION)
                products = products + multiply_local(late, weights, is_unit, dz_ptr, LATE, RECURRENT, PRECISION)
                dh_prev = add_all(products)
            else:
                if not HAS_SUMS:
                    wait(counter, arrivals, EXCHANGE, MAX_SPINS)
                dh_prev = multiply_gates(
                    *(dh_prev, dz_ptr + step_place, row, in_batch, weights, weight_hh_ptr, unit, is_unit, counter),
                    *(
                        EARLY,
                        GATES,
                        False,
                        RECURRENT,
                        HIDDEN,
                        BLOCK_K,
                        PARTS,
                        IN_FLIGHT,
                        RESIDENT,
                        EXCHANGE,
                        PRECISION,
                        MAX_SPINS,
                    ),
                )
                if HAS_SUMS:
                    wait(counter, arrivals, EXCHANGE, MAX_SPINS)
                dh_prev = multiply_gates(
                    *(dh_prev, dz_ptr + step_place, row, in_batch, weights, weight_hh_ptr, unit, is_unit, counter),
                    *(
                        LATE,
                        GATES,
                        False,
                        RECURRENT,
                        HIDDEN,
                        BLOCK_K,
                        PARTS,
                        IN_FLIGHT,
                        RESIDENT,
                        EXCHANGE,
                        PRECISION,
                        MAX_SPINS,
                    ),
                )
            dh_prev = add_parts(dh_prev)
        if HAS_MASK:
            dh_prev *= h_mask.to(tl.float32)
        if ZONEOUT != "none":
            dh_prev += dh_kept
        if HAS_LENGTHS:
            dh = tl.where(valid, dh_prev, dh)
        else:
            dh = dh_prev
        dc = dc_prev
        # The last load that the next step reads, and so the one whose layout all its pointwise work takes over; were
        # that the products', every tile would change layout. Loaded two steps ahead, because it comes so late.
        dy = dy_next
        t_after = t_last - tl.minimum(step + 2, steps - 1) * t_step
        dy_next = tl.load(dy_ptr + tl.cast(t_after, tl.int64) * y_size + y_place, mask=mask, other=0.0)

    tl.store(dh_ptr + state_place + place, dh, mask=mask)
    tl.store(dc_ptr + state_place + place, dc, mask=mask)
    store_sums(dvectors_ptr + state_place, place, size * DIRECTIONS, dvectors, mask)
