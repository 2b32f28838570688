"""The cells of NovoLSTM, both variants: what one step computes from its pre-activations, forward and backward.

`cell.py` says what the functions of a cell are given and return; README.md derives the equations. Gates i|f|g|o|p;
the vectors are γ and β, into which the gate gain is folded.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .gate_norms import normalise_gates
from .lstm import grad_of_state
from .math import mean_and_m2, mean_m2_and_sumexp, merge_mean_and_m2, merge_sumexp, row_sums, tanh


@triton.jit
def formula_partials(z, count, mask):
    """Return mean and M2 of σ(z_i), maximum and Σexp of z_p."""
    return mean_m2_and_sumexp(tl.sigmoid(z[0]), z[4], count, mask)


@triton.jit
def formula_merge(parts, count, total, eps):
    """Return the normalisation's mean and 1/√(variance + ε), the softmax's maximum and 1/Σexp."""
    mean, m2 = merge_mean_and_m2(parts[0], parts[1], count, total)
    maximum, sumexp = merge_sumexp(parts[2], parts[3])
    return mean, tl.rsqrt(m2 / total + eps), maximum, 1.0 / sumexp


@triton.jit
def formula_update(z, stats, c, vectors):
    """i = (γ·x̂ + β)·p,  c = f·c + i·g,  h = o·tanh(c), with x̂ = (σ(z_i) − mean)·rstd and p = softmax(z_p)."""
    mean, rstd, maximum, scale = stats
    n = (tl.sigmoid(z[0]) - mean[:, None]) * rstd[:, None] * vectors[0] + vectors[1]
    p = tl.exp(z[4] - maximum[:, None]) * scale[:, None]
    c = tl.sigmoid(z[1]) * c + n * p * tanh(z[2])
    return tl.sigmoid(z[3]) * tanh(c), c


@triton.jit
def formula_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return S1 = Σ dp·p, S2 = Σ dx̂ and S3 = Σ dx̂·x̂, dz of f|g|o, what dz of i|p is made of, and the rest."""
    mean, rstd, maximum, scale = stats
    s = tl.sigmoid(z[0])
    xhat = (s - mean[:, None]) * rstd[:, None]
    n = vectors[0] * xhat + vectors[1]
    p = tl.where(mask, tl.exp(z[4] - maximum[:, None]) * scale[:, None], 0.0)
    dz, dc_prev, di = grad_of_state(z, n * p, c, c_prev, dh, dc)
    dn = di * p
    dxhat = vectors[0] * dn
    dp_p = dn * n
    sums = row_sums((dp_p, dxhat, dxhat * xhat))
    pending = (rstd[:, None] * s * (1.0 - s), xhat, dxhat, p, dp_p)
    return sums, dz, pending, dc_prev, (dn * xhat, dn)


@triton.jit
def formula_grad_finish(pending, stats, sums, total):
    """Return dz of i|p: dz_i = rstd·s(1−s)·(dx̂ − S2/H − x̂·S3/H),  dz_p = p·dp − p·S1."""
    slope, xhat, dxhat, p, dp_p = pending
    s1, s2, s3 = sums
    dz_i = slope * (dxhat - (s2[:, None] + xhat * s3[:, None]) / total)
    return dz_i, dp_p - p * s1[:, None]


@triton.jit
def formula_companions(z, stats, mask, total):
    """Return p of S1, w of S2 and w·x̂ of S3, with w = rstd·s(1−s)/H: see `formula_grad_finish`."""
    mean, rstd, maximum, scale = stats
    s = tl.sigmoid(z[0])
    w = rstd[:, None] * s * (1.0 - s) / total
    p = tl.where(mask, tl.exp(z[4] - maximum[:, None]) * scale[:, None], 0.0)
    return p, w, w * (s - mean[:, None]) * rstd[:, None]


@triton.jit
def notebook_partials(z, count, mask):
    """Return mean and M2 of q = σ(z_i)·p. The p block of z holds softmax(x W_pᵀ + b_p) itself: it needs no h."""
    return mean_and_m2(tl.sigmoid(z[0]) * z[4], count, mask)


@triton.jit
def notebook_merge(parts, count, total, eps):
    """Return the normalisation's mean and 1/√(variance + ε)."""
    mean, m2 = merge_mean_and_m2(parts[0], parts[1], count, total)
    return mean, tl.rsqrt(m2 / total + eps)


@triton.jit
def notebook_update(z, stats, c, vectors):
    """i = γ·q̂ + β,  c = f·c + i·g,  h = o·tanh(c), with q̂ = (σ(z_i)·p − mean)·rstd."""
    mean, rstd = stats
    i = (tl.sigmoid(z[0]) * z[4] - mean[:, None]) * rstd[:, None] * vectors[0] + vectors[1]
    c = tl.sigmoid(z[1]) * c + i * tanh(z[2])
    return tl.sigmoid(z[3]) * tanh(c), c


@triton.jit
def notebook_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return S2 = Σ dq̂ and S3 = Σ dq̂·q̂, dz of f|g|o, what dz of i|p is made of, and the rest."""
    mean, rstd = stats
    s = tl.sigmoid(z[0])
    p = z[4]
    qhat = tl.where(mask, (s * p - mean[:, None]) * rstd[:, None], 0.0)
    dz, dc_prev, di = grad_of_state(z, vectors[0] * qhat + vectors[1], c, c_prev, dh, dc)
    dqhat = vectors[0] * di
    sums = row_sums((dqhat, dqhat * qhat))
    return sums, dz, (s, p, qhat, dqhat), dc_prev, (di * qhat, di)


@triton.jit
def notebook_grad_finish(pending, stats, sums, total):
    """Return dz_i and dp·p, of which the launcher makes dz_p; dq = rstd·(dq̂ − S2/H − q̂·S3/H) and dp = dq·s."""
    s, p, qhat, dqhat = pending
    s2, s3 = sums
    rstd = stats[1]
    dq = rstd[:, None] * (dqhat - (s2[:, None] + qhat * s3[:, None]) / total)
    dp_p = dq * s * p
    return dp_p * (1.0 - s), dp_p


@triton.jit
def notebook_companions(z, stats, mask, total):
    """Return w of S2 and w·q̂ of S3, with w = rstd·p·s(1−s)/H: see `notebook_grad_finish`."""
    mean, rstd = stats
    s = tl.sigmoid(z[0])
    w = rstd[:, None] * z[4] * s * (1.0 - s) / total
    return w, w * (s * z[4] - mean[:, None]) * rstd[:, None]


FORMULA = CellKernels(
    partials=formula_partials,
    merge=formula_merge,
    update=formula_update,
    grad_local=formula_grad_local,
    grad_finish=formula_grad_finish,
    companions=formula_companions,
    partial_rows=4,
    stats=4,
    grad_rows=3,
    early=(1, 2, 3),
    late=(0, 4),
    companion_gates=(4, 0, 0),
)

NOTEBOOK = CellKernels(
    partials=notebook_partials,
    merge=notebook_merge,
    update=notebook_update,
    grad_local=notebook_grad_local,
    grad_finish=notebook_grad_finish,
    companions=notebook_companions,
    partial_rows=2,
    stats=2,
    grad_rows=2,
    early=(1, 2, 3),
    late=(0, 4),
    companion_gates=(0, 0),
    softmax_gate=4,
)

FORMULA_ALL = normalise_gates(FORMULA)
NOTEBOOK_ALL = normalise_gates(NOTEBOOK)
