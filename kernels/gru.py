"""The GRU that resets after the product, as nn.GRU does: h alone is its state, carried in c's place.

`cell.py` says what the functions of a cell are given and return. Blocks m|r|z|n: m is what h gives the candidate, n
what x does.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .math import tanh


@triton.jit
def gru_update(z, stats, c, vectors):
    """h = (1 − u)·tanh(z_n + r·z_m) + u·h, with r = σ(z_r) and u = σ(z_z)."""
    u = tl.sigmoid(z[2])
    h = (1.0 - u) * tanh(z[3] + tl.sigmoid(z[1]) * z[0]) + u * c
    return h, h


@triton.jit
def gru_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz of m|r|z|n and the gradient of the h before the step, as far as it is carried."""
    r = tl.sigmoid(z[1])
    u = tl.sigmoid(z[2])
    n = tanh(z[3] + r * z[0])
    dh += dc
    dz_n = dh * (1.0 - u) * (1.0 - n * n)
    dz_r = dz_n * z[0] * r * (1.0 - r)
    dz_z = dh * (c_prev - n) * u * (1.0 - u)
    return (), (dz_n * r, dz_r, dz_z, dz_n), (), dh * u, ()


GRU = CellKernels(update=gru_update, grad_local=gru_grad_local, early=(0, 1, 2, 3))
