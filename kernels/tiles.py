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
def load_kept(kept_ptr, t, step_size, place, mask, ZONEOUT: tl.constexpr):
    """Load the tile of step t of zoneout's masks [T, ...], steps `step_size` apart; 0 if there are none."""
    if ZONEOUT == "masks":
        kept = tl.load(kept_ptr + tl.cast(t, tl.int64) * step_size + place, mask=mask, other=0)
    else:
        kept = 0
    return kept


@triton.jit
def zoneout(new, old, kept, bit: tl.constexpr, probability, ZONEOUT: tl.constexpr):
    """Return `new`, or `old` where zoneout keeps it: by a bit of the tile `kept` ("masks"), or in part ("average")."""
    if ZONEOUT == "masks":
        new = tl.where((kept & bit) != 0, old, new)
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
def load_resident(
    weight_ptr,
    unit,
    is_unit,
    RECURRENT: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    """Load all recurrent weights that meet this slice's units; entry k·RECURRENT + gate is K tile k of a gate."""
    weights = ()
    for k in tl.static_range((HIDDEN + BLOCK_K - 1) // BLOCK_K):
        source = k * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = weights + load_weights(weight_ptr, source, unit, is_unit, RECURRENT, HIDDEN, TRANSPOSE)
    return weights


@triton.jit
def zero_products(RECURRENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tuple of fp32 zeros to which `add_products` adds, one tile per recurrent weight."""
    products = ()
    for _ in tl.static_range(RECURRENT):
        products = products + (tl.zeros((BLOCK_B, BLOCK_N), tl.float32),)
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
def add_inputs(products, x):
    """Return the pre-activations: fp32 tiles x[k] + products[k], or x[k] alone where there is no product."""
    z = ()
    # Four at a time change their layout together, at the price of one.
    JOINED: tl.constexpr = len(products) // 4 * 4
    for k in tl.static_range(0, JOINED, 4):
        a, b = leave_tensor_core(products[k]), leave_tensor_core(products[k + 1])
        c, d = leave_tensor_core(products[k + 2]), leave_tensor_core(products[k + 3])
        joined = tl.join(tl.join(a, b), tl.join(c, d))
        joined += tl.join(tl.join(x[k], x[k + 1]), tl.join(x[k + 2], x[k + 3])).to(tl.float32)
        ab, cd = tl.split(joined)
        a, b = tl.split(ab)
        c, d = tl.split(cd)
        z = z + (a, b, c, d)
    for k in tl.static_range(JOINED, len(products)):
        z = z + (x[k].to(tl.float32) + leave_tensor_core(products[k]),)
    return z + widen(x[len(products) :])


@triton.jit
def load_weight(weight_ptr, gate, source, unit, is_unit, HIDDEN: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Load the tile [source, unit] of one gate's recurrent weight U [H, H], or of Uᵀ (TRANSPOSE); zero outside it."""
    mask = (source < HIDDEN)[:, None] & is_unit[None, :]
    if TRANSPOSE:
        place = unit[None, :] * HIDDEN + source[:, None]
    else:
        place = source[:, None] * HIDDEN + unit[None, :]
    return tl.load(weight_ptr + gate * HIDDEN * HIDDEN + place, mask=mask, other=0.0)
