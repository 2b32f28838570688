"""How the programs of one batch tile exchange data within a step, in one of three ways, fixed at compile time.

"none": one slice. Its threads exchange through memory what they do not hold in registers; `arrive` is a block barrier.

"barrier": plain stores, then a counter. Each batch tile has one int32 counter, zero before the launch. A program stores
what it publishes and calls `arrive`; whoever needs the data of all `SLICES` programs calls `wait` until the counter
shows that they all have arrived, then loads with `.cg`, past the L1 cache, which other multiprocessors' stores do not
reach. Counters only grow, so a program that runs ahead never hides an arrival from one that still waits.

"words": no counter and no fence; a word tells by its own bits whether it has arrived. A tile lies in a buffer that the
launcher fills with all-ones words, a NaN that `publish` never stores; `await_blocks` loads until none is left. A row
value travels as 64 bits, the step's tag above the fp32 bits, in a ring of two slots.

Programs that wait for each other must be resident together: launch cooperatively.

With MAX_SPINS above zero, for finding mistakes, no wait lasts longer than so many looks. After a tile's counter then
lies a record for each of its slices: how often it has arrived; and, once it has given up, 1, how many arrivals it had
waited for, how many it saw (both −1 for words), and how often each slice had arrived by then. Results are worthless
once a program has given up, and its later waits are not repeated at all.
"""

import triton
import triton.language as tl

from .tiles import source_units


@triton.jit
def own_record(counter_ptr):
    """Return where this program's record lies."""
    return counter_ptr + 1 + (4 + tl.num_programs(0)) * tl.program_id(0)


@triton.jit
def spins_left(counter_ptr, MAX_SPINS: tl.constexpr):
    """Return how often this program may look again: not at all once it has given up."""
    return tl.where(tl.load(own_record(counter_ptr) + 1) == 0, MAX_SPINS, 0)


@triton.jit
def give_up(counter_ptr, awaited, seen):
    """Note that this program has given up waiting for so many arrivals, of which it saw some."""
    own = own_record(counter_ptr)
    if tl.load(own + 1) == 0:
        tl.store(own + 1, 1)
        tl.store(own + 2, awaited)
        tl.store(own + 3, seen)
        for slice in range(tl.num_programs(0)):
            count = tl.load(counter_ptr + 1 + (4 + tl.num_programs(0)) * slice, volatile=True)
            tl.store(own + 4 + slice, count)


@triton.jit
def arrive(counter_ptr, EXCHANGE: tl.constexpr, MAX_SPINS: tl.constexpr = 0):
    """Publish all stores this program has made. With one slice, order them among its own threads."""
    if MAX_SPINS > 0 and EXCHANGE != "none":
        own = own_record(counter_ptr)
        tl.store(own, tl.load(own) + 1)
    if EXCHANGE != "words":
        # Every thread's stores come before the one thread's release.
        tl.debug_barrier()
    if EXCHANGE == "barrier":
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, arrivals, EXCHANGE: tl.constexpr, MAX_SPINS: tl.constexpr = 0):
    """Wait until `arrivals` calls of `arrive` have been counted, and see all that they published."""
    if EXCHANGE == "barrier":
        if MAX_SPINS == 0:
            while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
                pass
        else:
            spins = spins_left(counter_ptr, MAX_SPINS)
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
            while (seen < arrivals) & (spins > 0):
                seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
                spins -= 1
            if seen < arrivals:
                give_up(counter_ptr, arrivals, seen)


@triton.jit
def publish(ptr, value, mask, EXCHANGE: tl.constexpr):
    """Store a tile for other slices to collect, in the dtype of the buffer."""
    value = value.to(ptr.dtype.element_ty)
    if EXCHANGE == "words":
        # Any NaN becomes the one that is not all ones.
        nan = tl.full(value.shape, float("nan"), tl.float32).to(value.dtype)
        value = tl.where(value == value, value, nan)
    tl.store(ptr, value, mask=mask)


@triton.jit
def publish_gates(ptr, tiles, place, mask, ORDER: tl.constexpr, HIDDEN: tl.constexpr, EXCHANGE: tl.constexpr):
    """Publish tiles into the gate blocks ORDER of [·, G·H]; `place` points into the first gate's block."""
    for k in tl.static_range(len(ORDER)):
        publish(ptr + ORDER[k] * HIDDEN + place, tiles[k], mask, EXCHANGE)


@triton.jit
def load_block(
    ptr, row, in_batch, k, STRIDE: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr = 1
):
    """Load K tile k of rows [R, H], `STRIDE` apart, that have been published and waited for."""
    source = tl.expand_dims(source_units(k, BLOCK_K, PARTS), -2)
    mask = in_batch[:, None] & (source < HIDDEN)
    return tl.load(ptr + (row[:, None] * STRIDE + source), mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def load_words(
    ptr, row, in_batch, STRIDE: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr
):
    """Load all K tiles of rows [R, H] as a tuple of integer words, and tell whether any is still missing."""
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    WORD: tl.constexpr = tl.int32 if ptr.dtype.element_ty.primitive_bitwidth == 32 else tl.int16
    words = ()
    missing = tl.zeros((1, 1), tl.int32)
    for k in tl.static_range(BLOCKS):
        source = tl.expand_dims(source_units(k, BLOCK_K, PARTS), -2)
        mask = in_batch[:, None] & (source < HIDDEN)
        place = ptr + (row[:, None] * STRIDE + source)
        word = tl.load(place.to(tl.pointer_type(WORD), bitcast=True), mask=mask, other=0, volatile=True)
        missing = missing | (word == -1).to(tl.int32)
        words = words + (word,)
    # One reduction over the program for all tiles: each costs two block barriers.
    return words, tl.max(missing)


@triton.jit
def await_blocks(
    ptr,
    row,
    in_batch,
    counter_ptr,
    STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr = 1,
    MAX_SPINS: tl.constexpr = 0,
):
    """Load rows [R, H] that other slices publish as "words": a tuple of K tiles, once all of them have arrived."""
    words, missing = load_words(ptr, row, in_batch, STRIDE, HIDDEN, BLOCK_K, PARTS)
    if MAX_SPINS == 0:
        while missing != 0:
            words, missing = load_words(ptr, row, in_batch, STRIDE, HIDDEN, BLOCK_K, PARTS)
    else:
        spins = spins_left(counter_ptr, MAX_SPINS)
        while (missing != 0) & (spins > 0):
            words, missing = load_words(ptr, row, in_batch, STRIDE, HIDDEN, BLOCK_K, PARTS)
            spins -= 1
        if missing != 0:
            give_up(counter_ptr, -1, -1)
    blocks = ()
    for k in tl.static_range(len(words)):
        blocks = blocks + (words[k].to(ptr.dtype.element_ty, bitcast=True),)
    return blocks


@triton.jit
def stack(values):
    """Return one to sixteen rows [R] as the first columns of a tile [R, 1, 2, 4 or 16]."""
    LAST: tl.constexpr = len(values) - 1
    if len(values) == 1:
        tile = values[0][:, None]
    elif len(values) == 2:
        tile = tl.join(values[0], values[1])
    elif len(values) <= 4:
        tile = stack_four(values[0], values[1], values[2], values[LAST])
    else:
        fours = ()
        for k in tl.static_range(4):
            # Beyond the last value, whatever: its columns are not stored.
            second = values[k + 4 if k + 4 < LAST else LAST]
            third = values[k + 8 if k + 8 < LAST else LAST]
            fourth = values[k + 12 if k + 12 < LAST else LAST]
            fours = fours + (stack_four(values[k], second, third, fourth),)
        tile = stack_four(fours[0], fours[1], fours[2], fours[3])
    return tile


@triton.jit
def stack_four(a, b, c, d):
    """Return four tiles [R, ...] as one [R, N], element by element: the first of each, then the second of each."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, (a.shape[0], 4 if len(a.shape) == 1 else 16))


@triton.jit
def publish_rows(rows_ptr, values, row, row_mask, slice, step, batch, SLICES: tl.constexpr, EXCHANGE: tl.constexpr):
    """Store a tuple of rows [R] into this slice's places of the ring [2, B, len(values), SLICES].

    `step` counts all steps of the call: it picks the slot and is the tag of "words", whose ring is int64; else fp32.
    """
    # One store, one change of layout: [R, COLUMNS], the columns beyond the last value masked.
    tile = stack(values)
    COLUMNS: tl.constexpr = tile.shape[1]
    column = tl.arange(0, COLUMNS)[None, :]
    place = ((step % 2 * batch + row)[:, None] * len(values) + column) * SLICES + slice
    mask = row_mask[:, None] & (column < len(values))
    if EXCHANGE == "words":
        bits = tile.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        tl.store(rows_ptr + place, (tl.cast(step + 1, tl.int64) << 32) | bits, mask=mask)
    else:
        tl.store(rows_ptr + place, tile, mask=mask)


@triton.jit
def load_tagged(rows_ptr, place, mask, tag, COUNT: tl.constexpr, SLICES: tl.constexpr):
    """Load a tuple of COUNT tagged tiles, and tell whether any word still has another tag."""
    words = ()
    missing = tl.zeros(mask.shape, tl.int32)
    for k in tl.static_range(COUNT):
        word = tl.load(rows_ptr + place + k * SLICES, mask=mask, other=0, volatile=True)
        missing = missing | ((word >> 32) != tag).to(tl.int32)
        words = words + (word,)
    return words, tl.max(tl.where(mask, missing, 0))


@triton.jit
def collect_rows(
    rows_ptr,
    values,
    row,
    row_mask,
    step,
    batch,
    counter_ptr,
    SLICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EXCHANGE: tl.constexpr,
    MAX_SPINS: tl.constexpr = 0,
):
    """Load what all slices have published in `step`: tiles [R, BLOCK_S]. A single slice takes its own `values`."""
    COUNT: tl.constexpr = len(values)
    slices = tl.arange(0, BLOCK_S)
    mask = row_mask[:, None] & (slices < SLICES)[None, :]
    place = ((step % 2 * batch + row) * COUNT)[:, None] * SLICES + slices[None, :]
    parts = ()
    if EXCHANGE == "words":
        tag = tl.cast(step + 1, tl.int64)
        words, missing = load_tagged(rows_ptr, place, mask, tag, COUNT, SLICES)
        if MAX_SPINS == 0:
            while missing != 0:
                words, missing = load_tagged(rows_ptr, place, mask, tag, COUNT, SLICES)
        else:
            spins = spins_left(counter_ptr, MAX_SPINS)
            while (missing != 0) & (spins > 0):
                words, missing = load_tagged(rows_ptr, place, mask, tag, COUNT, SLICES)
                spins -= 1
            if missing != 0:
                give_up(counter_ptr, -1, -1)
        for k in tl.static_range(COUNT):
            value = (words[k] & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
            parts = parts + (value,)
    elif EXCHANGE == "barrier":
        for k in tl.static_range(COUNT):
            parts = parts + (tl.load(rows_ptr + place + k * SLICES, mask=mask, other=0.0, cache_modifier=".cg"),)
    else:
        for k in tl.static_range(COUNT):
            parts = parts + (values[k][:, None],)
    return parts
