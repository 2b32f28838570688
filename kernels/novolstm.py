"""The NovoLSTM cell: what one step computes from its pre-activations, forward and backward.

A cell is a set of pure functions on tiles that the persistent kernels call; they know nothing of slices, steps or
memory. z is a tuple of fp32 tiles [R, N], one per gate in the order i|f|g|o|p; statistics are tuples of rows [R] over
all H units; gamma and beta are [1, N], with the gate gain folded in. README.md derives the equations.

    partials(z, count, mask)            -> row sums over this slice's units
    merge(parts, count, total, eps)     -> statistics, from the parts [R, S] of all S slices
    update(z, stats, c, gamma, beta)    -> h, c
    grad_partials(z, stats, ...)        -> row sums of the backward step over this slice's units
    grad(z, stats, ..., sums)           -> dz, dc_prev, dgamma, dbeta
"""

import dataclasses
from typing import Any

import triton
import triton.language as tl

from .math import max_and_sumexp, mean_and_m2, merge_logsumexp, merge_mean_and_m2, tanh


@triton.jit
def formula_partials(z, count, mask):
    """Return mean and M2 of σ(z_i), maximum and Σexp of z_p."""
    mean, m2 = mean_and_m2(tl.sigmoid(z[0]), count, mask)
    maximum, sumexp = max_and_sumexp(z[4], mask)
    return mean, m2, maximum, sumexp


@triton.jit
def formula_merge(parts, count, total, eps):
    """Return the normalisation's mean and 1/√(variance + ε), and the softmax's log-sum-exp."""
    mean, m2 = merge_mean_and_m2(parts[0], parts[1], count, total)
    return mean, tl.rsqrt(m2 / total + eps), merge_logsumexp(parts[2], parts[3])


@triton.jit
def formula_update(z, stats, c, gamma, beta):
    """i = (γ·x̂ + β)·p,  c = f·c + i·g,  h = o·tanh(c), with x̂ = (σ(z_i) − mean)·rstd and p = softmax(z_p)."""
    mean, rstd, lse = stats
    n = (tl.sigmoid(z[0]) - mean[:, None]) * rstd[:, None] * gamma + beta
    p = tl.exp(z[4] - lse[:, None])
    c = tl.sigmoid(z[1]) * c + n * p * tanh(z[2])
    return tl.sigmoid(z[3]) * tanh(c), c


@triton.jit
def formula_grad_partials(z, stats, c, dh, dc, gamma, beta, mask):
    """Return S1 = Σ dp·p, S2 = Σ dx̂ and S3 = Σ dx̂·x̂."""
    mean, rstd, lse = stats
    xhat = (tl.sigmoid(z[0]) - mean[:, None]) * rstd[:, None]
    p = tl.where(mask, tl.exp(z[4] - lse[:, None]), 0.0)
    tanh_c = tanh(c)
    dc += dh * tl.sigmoid(z[3]) * (1.0 - tanh_c * tanh_c)
    di_p = dc * tanh(z[2]) * p
    dxhat = di_p * gamma
    return tl.sum(di_p * (gamma * xhat + beta), 1), tl.sum(dxhat, 1), tl.sum(dxhat * xhat, 1)


@triton.jit
def formula_grad(z, stats, c, c_prev, dh, dc, gamma, beta, sums, total, eps):
    """Return dz in gate order, dc of the step before, and this step's share of dγ and dβ."""
    mean, rstd, lse = stats
    s1, s2, s3 = sums
    s = tl.sigmoid(z[0])
    f = tl.sigmoid(z[1])
    g = tanh(z[2])
    o = tl.sigmoid(z[3])
    p = tl.exp(z[4] - lse[:, None])
    xhat = (s - mean[:, None]) * rstd[:, None]
    n = gamma * xhat + beta
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    dn = dc * g * p
    dz_i = rstd[:, None] * s * (1.0 - s) * (gamma * dn - (s2[:, None] + xhat * s3[:, None]) / total)
    dz_f = dc * c_prev * f * (1.0 - f)
    dz_g = dc * n * p * (1.0 - g * g)
    dz_o = dh * tanh_c * o * (1.0 - o)
    dz_p = p * (dc * g * n - s1[:, None])
    return (dz_i, dz_f, dz_g, dz_o, dz_p), dc * f, dn * xhat, dn


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
def notebook_update(z, stats, c, gamma, beta):
    """i = γ·q̂ + β,  c = f·c + i·g,  h = o·tanh(c), with q̂ = (σ(z_i)·p − mean)·rstd."""
    mean, rstd = stats
    i = (tl.sigmoid(z[0]) * z[4] - mean[:, None]) * rstd[:, None] * gamma + beta
    c = tl.sigmoid(z[1]) * c + i * tanh(z[2])
    return tl.sigmoid(z[3]) * tanh(c), c


@triton.jit
def notebook_grad_partials(z, stats, c, dh, dc, gamma, beta, mask):
    """Return S2 = Σ dq̂ and S3 = Σ dq̂·q̂."""
    mean, rstd = stats
    qhat = tl.where(mask, (tl.sigmoid(z[0]) * z[4] - mean[:, None]) * rstd[:, None], 0.0)
    tanh_c = tanh(c)
    dc += dh * tl.sigmoid(z[3]) * (1.0 - tanh_c * tanh_c)
    dqhat = tl.where(mask, dc * tanh(z[2]) * gamma, 0.0)
    return tl.sum(dqhat, 1), tl.sum(dqhat * qhat, 1)


@triton.jit
def notebook_grad(z, stats, c, c_prev, dh, dc, gamma, beta, sums, total, eps):
    """Return dz in gate order (p's is through the softmax), dc of the step before, and the share of dγ and dβ."""
    mean, rstd = stats
    s2, s3 = sums
    s = tl.sigmoid(z[0])
    f = tl.sigmoid(z[1])
    g = tanh(z[2])
    o = tl.sigmoid(z[3])
    p = z[4]
    qhat = (s * p - mean[:, None]) * rstd[:, None]
    i = gamma * qhat + beta
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    di = dc * g
    dq = rstd[:, None] * (gamma * di - (s2[:, None] + qhat * s3[:, None]) / total)
    dz_i = dq * p * s * (1.0 - s)
    dz_f = dc * c_prev * f * (1.0 - f)
    dz_g = dc * i * (1.0 - g * g)
    dz_o = dh * tanh_c * o * (1.0 - o)
    # The softmax's sum Σ dq·q needs no exchange of its own: it is S3·(1 − variance·rstd²).
    dz_p = p * (dq * s - (s3 * eps * rstd * rstd)[:, None])
    return (dz_i, dz_f, dz_g, dz_o, dz_p), dc * f, di * qhat, di


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the launcher and the persistent kernels need to know of a cell."""

    gates: int
    """Gate blocks in weight_ih and bias."""
    recurrent: int
    """How many of them, from the first, have a recurrent weight."""
    partials: Any
    merge: Any
    update: Any
    grad_partials: Any
    grad: Any
    partial_rows: int
    """Row sums that `partials` returns: what a forward step exchanges, besides h."""
    stats: int
    """Row statistics that `merge` returns."""
    grad_rows: int
    """Row sums that `grad_partials` returns: what a backward step exchanges, besides dz."""
    softmax_gate: int | None = None
    """A gate without recurrent weight that is passed through a softmax over the units before the recurrence."""


FORMULA = Cell(
    gates=5,
    recurrent=5,
    partials=formula_partials,
    merge=formula_merge,
    update=formula_update,
    grad_partials=formula_grad_partials,
    grad=formula_grad,
    partial_rows=4,
    stats=3,
    grad_rows=3,
)

NOTEBOOK = Cell(
    gates=5,
    recurrent=4,
    partials=notebook_partials,
    merge=notebook_merge,
    update=notebook_update,
    grad_partials=notebook_grad_partials,
    grad=notebook_grad,
    partial_rows=2,
    stats=2,
    grad_rows=2,
    softmax_gate=4,
)
