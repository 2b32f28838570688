"""Where programs work and what they load: helpers that the forward and the backward kernels share."""

import triton
import triton.language as tl


@triton.jit
def mirror(direction, t_first, t_step, chunk_start, steps, total):
    """Return the first t and the step in t of a walk in `direction`, and the t that lies first in a chunk's buffers.

    Given are those of direction 0. Direction 1 walks the other way: T − 1 − t, T = `total`, for each t of direction 0.
    In buffers [2, steps, ...] it lies behind direction 0, which its place t − chunk_start takes into account.
    """
    mirrored = direction == 1
    t_first = tl.where(mirrored, total - 1 - t_first, t_first)
    t_step = tl.where(mirrored, -t_step, t_step)
    return t_first, t_step, tl.where(mirrored, total - chunk_start - 2 * steps, chunk_start)


@triton.jit
def units_per_slice(slice, HIDDEN: tl.constexpr, UNITS: tl.constexpr, SLICES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return, in fp32, how many real units `slice` holds, and the same for every slice, [BLOCK_S]."""
    slices = tl.arange(0, BLOCK_S)
    counts = tl.minimum(tl.maximum(HIDDEN - slices * UNITS, 0), UNITS).to(tl.float32)
    counts = tl.where(slices < SLICES, counts, 0.0)
    return tl.sum(tl.where(slices == slice, counts, 0.0), 0), counts


@triton.jit
def load_gates(z_ptr, place, mask, GATES: tl.constexpr, HIDDEN: tl.constexpr):
    """Load one tile per gate of z [·, GATES·H], as a tuple; `place` points into the first gate's block."""
    z = ()
    for gate in tl.static_range(GATES):
        z = z + (tl.load(z_ptr + gate * HIDDEN + place, mask=mask, other=0.0),)
    return z


@triton.jit
def load_rows(ptr, unit, is_unit, COUNT: tl.constexpr, HIDDEN: tl.constexpr):
    """Load one row [1, N] per block of a vector [COUNT·H], as a tuple."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows = rows + (tl.load(ptr + k * HIDDEN + unit, mask=is_unit, other=0.0)[None, :],)
    return rows


@triton.jit
def load_zoneout_mask(zoneout_mask_ptr, t, step_size, place, mask, ZONEOUT: tl.constexpr):
    """Load the tile of step t of zoneout's masks [T, ...], steps `step_size` apart; 0 without masks."""
    if ZONEOUT == "masks":
        bits = tl.load(zoneout_mask_ptr + tl.cast(t, tl.int64) * step_size + place, mask=mask, other=0)
    else:
        bits = 0
    return bits


@triton.jit
def zoneout(new, old, zoneout_mask, bit: tl.constexpr, probability, ZONEOUT: tl.constexpr):
    """Return `new`, or `old` where zoneout keeps it: by a bit of `zoneout_mask` ("masks"), or in part ("average")."""
    if ZONEOUT == "masks":
        new = tl.where((zoneout_mask & bit) != 0, old, new)
    elif ZONEOUT == "average":
        new = probability * old + (1.0 - probability) * new
    return new


@triton.jit
def widen(z):
    """Convert tiles to fp32: as late as they are needed, because converting waits for the load."""
    wide = ()
    for k in tl.static_range(len(z)):
        wide = wide + (z[k].to(tl.float32),)
    return wide


@triton.jit
def load_weights(
    weight_ptr, source, unit, is_unit, RECURRENT: tl.constexpr, HIDDEN: tl.constexpr, TRANSPOSE: tl.constexpr
):
    """Load the tile [source, unit] of every gate's recurrent weight, as a tuple; see `load_weight`."""
    weights = ()
    for gate in tl.static_range(RECURRENT):
        weights = weights + (load_weight(weight_ptr, gate, source, unit, is_unit, HIDDEN, TRANSPOSE),)
    return weights


@triton.jit
def source_units(k, BLOCK_K: tl.constexpr, PARTS: tl.constexpr = 1):
    """Return the units of K tile k, [BLOCK_K], or, if there are several parts, [PARTS, BLOCK_K / PARTS]."""
    if PARTS == 1:
        source = k * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        first = k * BLOCK_K + tl.arange(0, PARTS) * (BLOCK_K // PARTS)
        source = first[:, None] + tl.arange(0, BLOCK_K // PARTS)[None, :]
    return source


@triton.jit
def load_resident(
    weight_ptr,
    unit,
    is_unit,
    RECURRENT: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """Load all recurrent weights that meet this slice's units; entry k·RECURRENT + gate is K tile k of a gate."""
    weights = ()
    for k in tl.static_range((HIDDEN + BLOCK_K - 1) // BLOCK_K):
        source = source_units(k, BLOCK_K, PARTS)
        weights = weights + load_weights(weight_ptr, source, unit, is_unit, RECURRENT, HIDDEN, TRANSPOSE)
    return weights


@triton.jit
def zero_product(BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Return fp32 zeros [R, N], or [PARTS, R, N], to which products are added."""
    if PARTS == 1:
        product = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    else:
        product = tl.zeros((PARTS, BLOCK_B, BLOCK_N), tl.float32)
    return product


@triton.jit
def zero_products(RECURRENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Return a tuple of zeros to which `add_products` adds, one `zero_product` per recurrent weight."""
    products = ()
    for _ in tl.static_range(RECURRENT):
        products = products + (zero_product(BLOCK_B, BLOCK_N, PARTS),)
    return products


@triton.jit
def add_products(products, h, weights, PRECISION: tl.constexpr):
    """Add h weights[k] to products[k]."""
    total = ()
    for gate in tl.static_range(len(weights)):
        total = total + (tl.dot(h, weights[gate], products[gate], input_precision=PRECISION),)
    return total


@triton.jit
def leave_tensor_core(product):
    """Return a sum of products as it is, but free of the layout in which tensor cores leave it.

    That layout would spread to all pointwise work: each tile loaded would be converted to it, and each one stored back,
    with two block barriers, and sums over a row would cross warps. What a reduction returns has no such pull: the
    compiler converts the product instead, to the layout of loads and stores, in which a warp holds whole rows.
    """
    return tl.sum(tl.reshape(product, (product.shape[0], product.shape[1], 1)), 2)


@triton.jit
def add_parts(product):
    """Return the sum [R, N] of products [R, N] or [PARTS, R, N], free of the layout in which tensor cores leave them.

    A reduction over the parts, each of which another warp holds, would take several rounds through shared memory.
    Splitting asks for all parts of an element in one thread, which takes one.
    """
    if len(product.shape) == 2:
        total = leave_tensor_core(product)
    else:
        total = add_last(tl.permute(product, (1, 2, 0)))
    return total


@triton.jit
def add_pairs_of_last(tile):
    """Return a tile with half as many elements in its last dimension: sums of two neighbours."""
    LAST: tl.constexpr = len(tile.shape) - 1
    a, b = tl.split(tl.reshape(tile, tile.shape[:LAST] + (tile.shape[LAST] // 2, 2)))
    return a + b


@triton.jit
def add_last(tile):
    """Return the sum of a tile over its last dimension, a power of two up to 32, within each thread."""
    LAST: tl.constexpr = len(tile.shape) - 1
    for _ in tl.static_range(5):
        if tile.shape[LAST] > 1:
            tile = add_pairs_of_last(tile)
    return tl.reshape(tile, tile.shape[:LAST])


@triton.jit
def join_four(products):
    """Return the sums [R, N] that `add_parts` makes of four products, as [R, N, 2, 2]."""
    if len(products[0].shape) == 2:
        a, b = leave_tensor_core(products[0]), leave_tensor_core(products[1])
        c, d = leave_tensor_core(products[2]), leave_tensor_core(products[3])
        joined = tl.join(tl.join(a, b), tl.join(c, d))
    else:
        joined = tl.join(tl.join(products[0], products[1]), tl.join(products[2], products[3]))
        joined = add_last(tl.permute(joined, (1, 2, 3, 4, 0)))
    return joined


@triton.jit
def add_inputs(products, x):
    """Return the pre-activations: fp32 tiles x[k] + products[k], or x[k] alone where there is no product."""
    z = ()
    # Four at a time change their layout together, at the price of one.
    JOINED: tl.constexpr = len(products) // 4 * 4
    for k in tl.static_range(0, JOINED, 4):
        joined = join_four(products[k : k + 4])
        joined += tl.join(tl.join(x[k], x[k + 1]), tl.join(x[k + 2], x[k + 3])).to(tl.float32)
        ab, cd = tl.split(joined)
        a, b = tl.split(ab)
        c, d = tl.split(cd)
        z = z + (a, b, c, d)
    for k in tl.static_range(JOINED, len(products)):
        z = z + (x[k].to(tl.float32) + add_parts(products[k]),)
    return z + widen(x[len(products) :])


@triton.jit
def load_weight(weight_ptr, gate, source, unit, is_unit, HIDDEN: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Load the tile [source, unit] of one gate's recurrent weight U [H, H], or of Uᵀ (TRANSPOSE); zero outside it."""
    source = tl.expand_dims(source, -1)
    mask = (source < HIDDEN) & is_unit
    if TRANSPOSE:
        place = unit * HIDDEN + source
    else:
        place = source * HIDDEN + unit
    return tl.load(weight_ptr + gate * HIDDEN * HIDDEN + place, mask=mask, other=0.0)
