"""The LSTM with layer normalisation of the products of h and of x, over all gates at once, and of c.

`cell.py` says what the functions of a cell are given and return. Blocks i|f|g|o of h, then of x; vectors γ_h, γ_x and b
of i|f|g|o, then γ and β of c.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .math import mean_and_m2, merge_mean_and_m2, row_sums, tanh


@triton.jit
def joint_mean_and_m2(z, first: tl.constexpr, count, mask):
    """Return the mean and M2 of each row of four tiles together; see `mean_and_m2`."""
    count = tl.maximum(count, 1.0) * 4.0
    total = tl.where(mask, z[first] + z[first + 1] + z[first + 2] + z[first + 3], 0.0)
    mean = tl.sum(total, 1) / count
    rest = tl.zeros_like(total)
    squares = tl.zeros_like(total)
    for k in tl.static_range(4):
        deviation = tl.where(mask, z[first + k] - mean[:, None], 0.0)
        rest += deviation
        squares += deviation * deviation
    sums = row_sums((rest, squares))
    return mean + sums[0] / count, sums[1]


@triton.jit
def layer_norm_partials(z, count, mask):
    """Return mean and M2 of the products of h, then of x."""
    return joint_mean_and_m2(z, 0, count, mask) + joint_mean_and_m2(z, 4, count, mask)


@triton.jit
def layer_norm_merge(parts, count, total, eps):
    """Return mean and 1/√(variance + ε) of the products of h, then of x."""
    mean_h, m2_h = merge_mean_and_m2(parts[0], parts[1], count * 4.0, total * 4.0)
    mean_x, m2_x = merge_mean_and_m2(parts[2], parts[3], count * 4.0, total * 4.0)
    return mean_h, tl.rsqrt(m2_h / (total * 4.0) + eps), mean_x, tl.rsqrt(m2_x / (total * 4.0) + eps)


@triton.jit
def standardised(z, stats):
    """Return x̂ of every block."""
    tiles = ()
    for k in tl.static_range(8):
        mean = stats[k // 4 * 2]
        rstd = stats[k // 4 * 2 + 1]
        tiles = tiles + ((z[k] - mean[:, None]) * rstd[:, None],)
    return tiles


@triton.jit
def gate(xhats, vectors, k: tl.constexpr):
    """Return a_k = γ_h·x̂_h + γ_x·x̂_x + b."""
    return vectors[k] * xhats[k] + vectors[k + 4] * xhats[k + 4] + vectors[k + 8]


@triton.jit
def layer_norm_update(z, stats, c, vectors):
    """Return c = f·c + i·g, twice: h is made when the sums of it are there."""
    xhats = standardised(z, stats)
    i = tl.sigmoid(gate(xhats, vectors, 0))
    f = tl.sigmoid(gate(xhats, vectors, 1))
    c = f * c + i * tanh(gate(xhats, vectors, 2))
    return c, c


@triton.jit
def layer_norm_state_partials(c, count, mask):
    """Return mean and M2 of c."""
    return mean_and_m2(c, count, mask)


@triton.jit
def layer_norm_state_merge(parts, count, total, eps):
    """Return mean and 1/√(variance + ε) of c."""
    mean, m2 = merge_mean_and_m2(parts[0], parts[1], count, total)
    return mean, tl.rsqrt(m2 / total + eps)


@triton.jit
def layer_norm_expose(z, stats, c, vectors):
    """Return h = o·tanh(γ·ĉ + β)."""
    o = tl.sigmoid(gate(standardised(z, stats), vectors, 3))
    chat = (c - stats[4][:, None]) * stats[5][:, None]
    return o * tanh(vectors[12] * chat + vectors[13])


@triton.jit
def layer_norm_grad_expose(z, stats, c, dh, vectors):
    """Return Σ dĉ and Σ dĉ·ĉ, and dĉ and ĉ."""
    o = tl.sigmoid(gate(standardised(z, stats), vectors, 3))
    chat = (c - stats[4][:, None]) * stats[5][:, None]
    tanh_u = tanh(vectors[12] * chat + vectors[13])
    dchat = vectors[12] * dh * o * (1.0 - tanh_u * tanh_u)
    return row_sums((dchat, dchat * chat)), (dchat, chat)


@triton.jit
def layer_norm_grad_state(pending, stats, sums, total):
    """Return rstd·(dĉ − Σdĉ/H − ĉ·Σ(dĉ·ĉ)/H)."""
    dchat, chat = pending
    return stats[5][:, None] * (dchat - (sums[0][:, None] + chat * sums[1][:, None]) / total)


@triton.jit
def layer_norm_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return Σ dx̂ and Σ dx̂·x̂ of h, then of x, over all gates; x̂ and dx̂ of every block; and the rest."""
    xhats = standardised(z, stats)
    i = tl.sigmoid(gate(xhats, vectors, 0))
    f = tl.sigmoid(gate(xhats, vectors, 1))
    g = tanh(gate(xhats, vectors, 2))
    o = tl.sigmoid(gate(xhats, vectors, 3))
    chat = (c - stats[4][:, None]) * stats[5][:, None]
    tanh_u = tanh(vectors[12] * chat + vectors[13])
    du = dh * o * (1.0 - tanh_u * tanh_u)
    da = (dc * g * i * (1.0 - i), dc * c_prev * f * (1.0 - f), dc * i * (1.0 - g * g), dh * tanh_u * o * (1.0 - o))
    dxhats = ()
    dgamma = ()
    for k in tl.static_range(8):
        dxhats = dxhats + (vectors[k] * da[k % 4],)
        dgamma = dgamma + (xhats[k] * da[k % 4],)
    sums = ()
    for half in tl.static_range(0, 8, 4):
        total = tl.zeros_like(c)
        products = tl.zeros_like(c)
        for k in tl.static_range(half, half + 4):
            total += dxhats[k]
            products += dxhats[k] * xhats[k]
        sums = sums + row_sums((total, products))
    return sums, (), xhats + dxhats, dc * f, dgamma + da + (du * chat, du)


@triton.jit
def layer_norm_grad_finish(pending, stats, sums, total):
    """Return dz = rstd·(dx̂ − Σdx̂/4H − x̂·Σ(dx̂·x̂)/4H) of every block."""
    dz = ()
    for k in tl.static_range(8):
        xhat = pending[k]
        lost = (sums[k // 4 * 2][:, None] + xhat * sums[k // 4 * 2 + 1][:, None]) / (total * 4.0)
        dz = dz + (stats[k // 4 * 2 + 1][:, None] * (pending[k + 8] - lost),)
    return dz


LAYER_NORM_LSTM = CellKernels(
    partials=layer_norm_partials,
    merge=layer_norm_merge,
    update=layer_norm_update,
    grad_local=layer_norm_grad_local,
    grad_finish=layer_norm_grad_finish,
    partial_rows=4,
    stats=4,
    grad_rows=4,
    early=(),
    late=(0, 1, 2, 3, 4, 5, 6, 7),
    state_partials=layer_norm_state_partials,
    state_merge=layer_norm_state_merge,
    expose=layer_norm_expose,
    grad_expose=layer_norm_grad_expose,
    grad_state=layer_norm_grad_state,
    state_rows=2,
    state_stats=2,
    state_grad_rows=2,
    # x̂ and dx̂ of eight blocks.
    tiles_alive=4,
)
