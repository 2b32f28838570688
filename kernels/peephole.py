"""The LSTM with peepholes: i and f see the state before the step, o the one after it.

`cell.py` says what the functions of a cell are given and return. Blocks i|f|g|o; vectors w_i, w_f, w_o.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .lstm import grad_of_state
from .math import tanh


@triton.jit
def peephole_update(z, stats, c, vectors):
    """c = σ(z_i + w_i·c)·g + σ(z_f + w_f·c)·c,  h = σ(z_o + w_o·c)·tanh(c), with the new c in h."""
    w_i, w_f, w_o = vectors
    c = tl.sigmoid(z[1] + w_f * c) * c + tl.sigmoid(z[0] + w_i * c) * tanh(z[2])
    return tl.sigmoid(z[3] + w_o * c) * tanh(c), c


@triton.jit
def peephole_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz of i|f|g|o, dc of the step before and the shares of dw_i, dw_f, dw_o."""
    w_i, w_f, w_o = vectors
    i = tl.sigmoid(z[0] + w_i * c_prev)
    z_o = z[3] + w_o * c
    o = tl.sigmoid(z_o)
    # What o sees of c comes before the step's c is differentiated.
    dc += w_o * (dh * tanh(c) * o * (1.0 - o))
    dz, dc_prev, di = grad_of_state((z[0], z[1] + w_f * c_prev, z[2], z_o), i, c, c_prev, dh, dc)
    dz_i = di * i * (1.0 - i)
    dc_prev += w_i * dz_i + w_f * dz[0]
    return (), (dz_i, dz[0], dz[1], dz[2]), (), dc_prev, (dz_i * c_prev, dz[0] * c_prev, dz[2] * c)


PEEPHOLE = CellKernels(update=peephole_update, grad_local=peephole_grad_local, early=(0, 1, 2, 3))
