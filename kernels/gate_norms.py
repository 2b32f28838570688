"""Layer normalisation of the other gates, around any cell: z_k becomes γ_k·x̂_k + β_k for k in f, g, o.

Each function does what the cell's own one does, and if GATE_NORMS the normalisations besides: their rows come after
the cell's, in the order f|g|o, and nothing of dz is early any more, because it takes sums over all units. The vectors
are γ of i|f|g|o, then β of the same.
"""

import dataclasses

import triton
import triton.language as tl

from .cell import CellKernels
from .math import merge_mean_and_m2, row_sums


def normalise_gates(cell: CellKernels) -> CellKernels:
    """Return a cell whose f, g and o are normalised, too."""
    return dataclasses.replace(
        cell,
        partial_rows=cell.partial_rows + 6,
        stats=cell.stats + 6,
        grad_rows=cell.grad_rows + 6,
        early=(),
        late=(*cell.late, *cell.early),
        companion_gates=(*cell.companion_gates, 1, 2, 3, 1, 2, 3),
        # x̂ and dx̂ of f, g and o.
        tiles_alive=2,
        gate_norms=True,
    )


@triton.jit
def cell_partials(z, count, mask, partials: tl.constexpr, GATE_NORMS: tl.constexpr):
    """Return the cell's row sums, then the means and M2s of z_f, z_g, z_o."""
    own = partials(z, count, mask)
    if GATE_NORMS:
        totals = row_sums((tl.where(mask, z[1], 0.0), tl.where(mask, z[2], 0.0), tl.where(mask, z[3], 0.0)))
        # As in `mean_and_m2`, three at a time.
        count = tl.maximum(count, 1.0)
        means = ()
        deviations = ()
        squares = ()
        for k in tl.static_range(3):
            mean = totals[k] / count
            deviation = tl.where(mask, z[k + 1] - mean[:, None], 0.0)
            means = means + (mean,)
            deviations = deviations + (deviation,)
            squares = squares + (deviation * deviation,)
        rests = row_sums(deviations)
        for k in tl.static_range(3):
            own = own + (means[k] + rests[k] / count,)
        own = own + row_sums(squares)
    return own


@triton.jit
def cell_merge(parts, count, total, eps, merge: tl.constexpr, GATE_NORMS: tl.constexpr):
    """Return the cell's statistics, then the means and the 1/√(variance + ε) of z_f, z_g, z_o."""
    if GATE_NORMS:
        OWN: tl.constexpr = len(parts) - 6
        stats = merge(parts[:OWN], count, total, eps)
        means = ()
        rstds = ()
        for k in tl.static_range(3):
            mean, m2 = merge_mean_and_m2(parts[OWN + k], parts[OWN + 3 + k], count, total)
            means = means + (mean,)
            rstds = rstds + (tl.rsqrt(m2 / total + eps),)
        stats = stats + means + rstds
    else:
        stats = merge(parts, count, total, eps)
    return stats


@triton.jit
def standardise(z, stats):
    """Return x̂ of z_f, z_g, z_o; their statistics are the last six."""
    OWN: tl.constexpr = len(stats) - 6
    xhats = ()
    for k in tl.static_range(3):
        xhats = xhats + ((z[k + 1] - stats[OWN + k][:, None]) * stats[OWN + 3 + k][:, None],)
    return xhats


@triton.jit
def scale(z, xhats, vectors):
    """Return z with γ·x̂ + β in place of z_f, z_g, z_o."""
    BETA: tl.constexpr = len(vectors) // 2
    scaled = (z[0],)
    for k in tl.static_range(3):
        scaled = scaled + (vectors[k + 1] * xhats[k] + vectors[BETA + k + 1],)
    return scaled + z[4:]


@triton.jit
def cell_update(z, stats, c, vectors, update: tl.constexpr, GATE_NORMS: tl.constexpr):
    """Return the cell's h and c."""
    if GATE_NORMS:
        z = scale(z, standardise(z, stats), vectors)
        h, c = update(z, stats[: len(stats) - 6], c, (vectors[0], vectors[len(vectors) // 2]))
    else:
        h, c = update(z, stats, c, vectors)
    return h, c


@triton.jit
def cell_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask, grad_local: tl.constexpr, GATE_NORMS: tl.constexpr):
    """Return what the cell's function does; with x̂ and dx̂ of f, g, o as the last six of what is pending."""
    if GATE_NORMS:
        xhats = standardise(z, stats)
        scaled = scale(z, xhats, vectors)
        own = stats[: len(stats) - 6]
        affine = (vectors[0], vectors[len(vectors) // 2])
        sums, dz, pending, dc_prev, daffine = grad_local(scaled, own, c, c_prev, dh, dc, affine, mask)
        dgamma = (daffine[0],)
        dbeta = (daffine[1],)
        dxhats = ()
        products = ()
        for k in tl.static_range(3):
            dxhat = vectors[k + 1] * dz[k]
            dgamma = dgamma + (dz[k] * xhats[k],)
            dbeta = dbeta + (dz[k],)
            dxhats = dxhats + (dxhat,)
            products = products + (dxhat * xhats[k],)
        sums = sums + row_sums(dxhats) + row_sums(products)
        pending = pending + xhats + dxhats
        dvectors = dgamma + dbeta
        dz = ()
    else:
        sums, dz, pending, dc_prev, dvectors = grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
    return sums, dz, pending, dc_prev, dvectors


@triton.jit
def cell_grad_finish(pending, stats, sums, total, grad_finish: tl.constexpr, GATE_NORMS: tl.constexpr):
    """Return dz of the cell's late gates, then dz_k = rstd·(dx̂ − Σdx̂/H − x̂·Σ(dx̂·x̂)/H) for k in f, g, o."""
    if GATE_NORMS:
        OWN: tl.constexpr = len(stats) - 6
        PENDING: tl.constexpr = len(pending) - 6
        SUMS: tl.constexpr = len(sums) - 6
        dz = grad_finish(pending[:PENDING], stats[:OWN], sums[:SUMS], total)
        for k in tl.static_range(3):
            xhat = pending[PENDING + k]
            lost = (sums[SUMS + k][:, None] + xhat * sums[SUMS + 3 + k][:, None]) / total
            dz = dz + (stats[OWN + 3 + k][:, None] * (pending[PENDING + 3 + k] - lost),)
    else:
        dz = grad_finish(pending, stats, sums, total)
    return dz


@triton.jit
def cell_companions(z, stats, mask, total, companions: tl.constexpr, GATE_NORMS: tl.constexpr):
    """Return the cell's companions, then rstd/H of each Σdx̂ and rstd·x̂/H of each Σ(dx̂·x̂): see above."""
    if GATE_NORMS:
        OWN: tl.constexpr = len(stats) - 6
        tiles = companions(z, stats[:OWN], mask, total)
        xhats = standardise(z, stats)
        for k in tl.static_range(3):
            tiles = tiles + (tl.broadcast_to(stats[OWN + 3 + k][:, None] / total, z[0].shape),)
        for k in tl.static_range(3):
            tiles = tiles + (stats[OWN + 3 + k][:, None] * xhats[k] / total,)
    else:
        tiles = companions(z, stats, mask, total)
    return tiles
