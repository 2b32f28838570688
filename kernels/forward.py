"""The persistent forward kernel: one launch walks a chunk of time steps with its weights and cell states on chip."""

import triton
import triton.language as tl

from .exchange import arrive, await_blocks, collect_rows, load_block, publish, publish_rows, wait
from .gate_norms import cell_merge, cell_partials, cell_update
from .tiles import (
    add_inputs,
    add_products,
    load_gates,
    load_resident,
    load_rows,
    load_weights,
    load_zoneout_mask,
    mirror,
    units_per_slice,
    zero_products,
    zoneout,
)


# T, B and what follows from them stay run-time values whatever they are: a new length compiles nothing.
@triton.jit(
    do_not_specialize=[
        "batch",
        "steps",
        "t_first",
        "t_step",
        "chunk_start",
        "total",
        "step_base",
        "h_first",
        "h_slots",
        "tile_first",
    ],
    do_not_specialize_on_alignment=["lengths_ptr", "h_ptr", "c_in_ptr", "counter_ptr", "c_out_ptr"],
)
def forward_kernel(
    x_gates_ptr,
    weight_hh_ptr,
    vectors_ptr,
    lengths_ptr,
    h_mask_ptr,
    zoneout_mask_ptr,
    h_ptr,
    c_in_ptr,
    h_ring_ptr,
    row_ring_ptr,
    counter_ptr,
    y_ptr,
    c_out_ptr,
    batch,
    steps,
    t_first,
    t_step,
    chunk_start,
    total,
    step_base,
    h_first,
    h_slots,
    tile_first,
    eps,
    zoneout_h,
    zoneout_c,
    partials: tl.constexpr,
    merge: tl.constexpr,
    update: tl.constexpr,
    state_partials: tl.constexpr,
    state_merge: tl.constexpr,
    expose: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    GATES: tl.constexpr,
    RECURRENT: tl.constexpr,
    VECTORS: tl.constexpr,
    GATE_NORMS: tl.constexpr,
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
    HAS_LENGTHS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ZONEOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_SPINS: tl.constexpr,
):
    """Walk `steps` time steps; program (s, b) owns the units of slice s for the rows of batch tile tile_first + b.

    D directions of a layer run side by side. Each has ⌈B/BLOCK_B⌉ batch tiles, direction 0 the first ones. Direction 1
    walks T − 1 − t where direction 0 walks t.

    On chip for all steps: the slice's recurrent weights (RESIDENT; otherwise they stream from L2 in the K loop), its
    cell states in fp32, and the cell's vectors. Per step it exchanges the cell's row statistics, if it has any, then
    those of c, if it has any, then h, with the tile's other slices.

    Args:
        x_gates_ptr: [D, steps, B, GATES·H] x W_ihᵀ + b of this chunk, in the order of t.
        weight_hh_ptr: [D, RECURRENT·H, H].
        vectors_ptr: [D, VECTORS·H] fp32, the cell's vectors over the units, gate gain folded in.
        lengths_ptr: [B] int32; not read unless HAS_LENGTHS.
        h_mask_ptr: [D, B, H] factor on h wherever it meets weight_hh; not read unless HAS_MASK.
        zoneout_mask_ptr: [T, B, D·H] uint8, bit 0: h keeps its value, bit 1: c does; read if ZONEOUT is "masks".
        h_ptr: [D, B, H] h before the first step, without the mask; after the last step afterwards.
        c_in_ptr: [D, B, H] fp32, c before the first step.
        h_ring_ptr: [D, h_slots, B, H]; h before step n of this launch, with the mask, lies in slot
            (h_first + n) % h_slots.
        row_ring_ptr: [2, D·B, S, SLICES], space for the cell's S row statistics, and behind it the same for those of c;
            see exchange.py.
        counter_ptr: [batch tiles of this launch] int32, zero, and if MAX_SPINS what follows each; see exchange.py.
        y_ptr: [T, B, D·H] output, zero beyond a row's length.
        c_out_ptr: [D, B, H] fp32, c after the last step.
        batch: B.
        steps: how many steps to walk.
        t_first: t of the first step that direction 0 walks.
        t_step: direction 0's step in t: 1 forward in time, −1 backward.
        chunk_start: t of the first row of x_gates of direction 0.
        total: T; not looked at unless D is 2.
        step_base: steps walked before this launch.
        h_first: slot of h_ring that holds the first h.
        h_slots: slots of h_ring.
        tile_first: first batch tile of this launch.
        eps: ε of the layer normalisations.
        zoneout_h: share of h that a step keeps if ZONEOUT is "average".
        zoneout_c: likewise, of c.
    """
    slice = tl.program_id(0)
    counter = counter_ptr + tl.program_id(1) * (1 + (4 + SLICES) * SLICES if MAX_SPINS > 0 else 1)
    tile = tile_first + tl.program_id(1)
    # Offsets of a whole step are 64 bits wide and scalar; within a batch tile 32 bits do.
    size = tl.cast(batch, tl.int64) * HIDDEN
    direction = 0
    if DIRECTIONS == 2:
        tiles = tl.cdiv(batch, BLOCK_B)
        direction = tile // tiles
        tile = tile % tiles
        t_first, t_step, chunk_start = mirror(direction, t_first, t_step, chunk_start, steps, total)
        weight_hh_ptr += tl.cast(direction, tl.int64) * (RECURRENT * HIDDEN * HIDDEN)
        vectors_ptr += direction * (VECTORS * HIDDEN)
    # Pointers would each take two registers: what the loop uses is offset through its indices.
    slot_first = direction * h_slots
    row_first = tile * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    in_batch = row_first + row < batch
    unit = slice * UNITS + tl.arange(0, BLOCK_N)
    is_unit = (tl.arange(0, BLOCK_N) < UNITS) & (unit < HIDDEN)
    mask = in_batch[:, None] & is_unit[None, :]
    count, counts = units_per_slice(slice, HIDDEN, UNITS, SLICES, BLOCK_S)
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    # A single program that holds all units keeps h in registers: nothing is exchanged through memory.
    LOCAL: tl.constexpr = RESIDENT and SLICES == 1 and BLOCKS == 1 and BLOCK_N == BLOCK_K

    weights = ()
    if RESIDENT:
        weights = load_resident(weight_hh_ptr, unit, is_unit, RECURRENT, HIDDEN, BLOCK_K, True, PARTS)

    vectors = load_rows(vectors_ptr, unit, is_unit, VECTORS, HIDDEN)
    ring_row = direction * batch + row_first + row
    tile_place = tl.cast(row_first, tl.int64) * HIDDEN
    state_place = direction * size + tile_place
    place = row[:, None] * HIDDEN + unit[None, :]
    y_place = row[:, None] * (DIRECTIONS * HIDDEN) + (direction * HIDDEN + unit)[None, :]
    gate_place = row[:, None] * (GATES * HIDDEN) + unit[None, :]
    c = tl.load(c_in_ptr + state_place + place, mask=mask, other=0.0)
    h = tl.load(h_ptr + state_place + place, mask=mask, other=0.0)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + row_first + row, mask=in_batch, other=0)
    if HAS_MASK:
        h_mask = tl.load(h_mask_ptr + state_place + place, mask=mask, other=0.0)

    t = t_first
    step_place = (tl.cast(t - chunk_start, tl.int64) * size + tile_place) * GATES
    x_gates = load_gates(x_gates_ptr + step_place, gate_place, mask, GATES, HIDDEN)
    zoneout_mask = load_zoneout_mask(
        zoneout_mask_ptr, t, size * DIRECTIONS, tile_place * DIRECTIONS + y_place, mask, ZONEOUT
    )
    arrivals = 0
    for step in range(steps):
        h_tile_ptr = h_ring_ptr + (slot_first + (h_first + step) % h_slots) * size + tile_place
        # z_k = x_k + h U_kᵀ
        products = zero_products(RECURRENT, BLOCK_B, BLOCK_N, PARTS)
        if LOCAL:
            if HAS_MASK:
                products = add_products(products, (h * h_mask).to(h.dtype), weights, PRECISION)
            else:
                products = add_products(products, h, weights, PRECISION)
        elif RESIDENT:
            GROUP: tl.constexpr = BLOCKS if EXCHANGE == "words" else IN_FLIGHT
            for first in tl.static_range(0, BLOCKS, GROUP):
                if EXCHANGE == "words":
                    h_blocks = await_blocks(
                        *(h_tile_ptr, row, in_batch, counter, HIDDEN, HIDDEN, BLOCK_K, PARTS, MAX_SPINS)
                    )
                else:
                    h_blocks = ()
                    for k in tl.static_range(first, first + GROUP if first + GROUP < BLOCKS else BLOCKS):
                        h_block = load_block(h_tile_ptr, row, in_batch, k, HIDDEN, HIDDEN, BLOCK_K, PARTS)
                        h_blocks = h_blocks + (h_block,)
                for k in tl.static_range(len(h_blocks)):
                    own = weights[(first + k) * RECURRENT : (first + k + 1) * RECURRENT]
                    products = add_products(products, h_blocks[k], own, PRECISION)
        else:
            for k in range(BLOCKS):
                h_block = load_block(h_tile_ptr, row, in_batch, k, HIDDEN, HIDDEN, BLOCK_K)
                source = k * BLOCK_K + tl.arange(0, BLOCK_K)
                streamed = load_weights(weight_hh_ptr, source, unit, is_unit, RECURRENT, HIDDEN, True)
                products = add_products(products, h_block, streamed, PRECISION)

        z = add_inputs(products, x_gates)
        own = cell_partials(z, count, is_unit[None, :], partials, GATE_NORMS)
        if SLICES > 1 and len(own) > 0:
            row_step = step_base + step
            publish_rows(row_ring_ptr, own, ring_row, in_batch, slice, row_step, DIRECTIONS * batch, SLICES, EXCHANGE)
            arrive(counter, EXCHANGE, MAX_SPINS)
            arrivals += SLICES
            wait(counter, arrivals, EXCHANGE, MAX_SPINS)
        parts = collect_rows(
            *(row_ring_ptr, own, ring_row, in_batch, step_base + step, DIRECTIONS * batch, counter),
            *(SLICES, BLOCK_S, EXCHANGE, MAX_SPINS),
        )
        stats = cell_merge(parts, counts, HIDDEN, eps, merge, GATE_NORMS)
        h_new, c_new = cell_update(z, stats, c, vectors, update, GATE_NORMS)
        state_sums = state_partials(c_new, count, is_unit[None, :])
        if len(state_sums) > 0:
            # Behind the ring of the rows above.
            state_ring_ptr = row_ring_ptr + 2 * DIRECTIONS * batch * (len(own) * SLICES)
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
            h_new = expose(z, stats + state_merge(state_parts, counts, HIDDEN, eps), c_new, vectors)
        h_new = zoneout(h_new, h.to(tl.float32), zoneout_mask, 1, zoneout_h, ZONEOUT).to(h.dtype)
        c_new = zoneout(c_new, c, zoneout_mask, 2, zoneout_c, ZONEOUT)
        if LOCAL and HIDDEN != BLOCK_N:
            # Padding columns meet zero weights, and only a finite value times zero is zero.
            h_new = tl.where(is_unit[None, :], h_new, 0.0)
        if HAS_LENGTHS:
            valid = (t < length)[:, None]
            h = tl.where(valid, h_new, h)
            c = tl.where(valid, c_new, c)
            h_new = tl.where(valid, h_new, 0.0)
        else:
            h = h_new
            c = c_new
        if not LOCAL:
            h_next_ptr = h_ring_ptr + (slot_first + (h_first + step + 1) % h_slots) * size + tile_place
            if HAS_MASK:
                publish(h_next_ptr + place, h * h_mask, mask, EXCHANGE)
            else:
                publish(h_next_ptr + place, h, mask, EXCHANGE)
            arrive(counter, EXCHANGE, MAX_SPINS)
            arrivals += SLICES
        # What nobody waits for comes after the arrival: the output, and the next step's input.
        y_tile_ptr = y_ptr + (tl.cast(t, tl.int64) * size + tile_place) * DIRECTIONS
        tl.store(y_tile_ptr + y_place, h_new, mask=mask)
        # The last step has no next one: it loads its own input again.
        t = t_first + tl.minimum(step + 1, steps - 1) * t_step
        step_place = (tl.cast(t - chunk_start, tl.int64) * size + tile_place) * GATES
        x_gates = load_gates(x_gates_ptr + step_place, gate_place, mask, GATES, HIDDEN)
        zoneout_mask = load_zoneout_mask(
            zoneout_mask_ptr, t, size * DIRECTIONS, tile_place * DIRECTIONS + y_place, mask, ZONEOUT
        )
        if not LOCAL:
            wait(counter, arrivals, EXCHANGE, MAX_SPINS)

    tl.store(c_out_ptr + state_place + place, c, mask=mask)
    tl.store(h_ptr + state_place + place, h, mask=mask)
