"""The plain LSTM cell: no sum over the units, so that a step exchanges h alone, and backward dz alone.

`cell.py` says what the functions of a cell are given and return. Gates i|f|g|o.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .math import tanh


@triton.jit
def lstm_update(z, stats, c, vectors):
    """c = f·c + i·g,  h = o·tanh(c)."""
    c = tl.sigmoid(z[1]) * c + tl.sigmoid(z[0]) * tanh(z[2])
    return tl.sigmoid(z[3]) * tanh(c), c


@triton.jit
def grad_of_state(z, i, c, c_prev, dh, dc):
    """Differentiate c = f·c_prev + i·g and h = o·tanh(c): return dz of f|g|o, dc of the step before, and di."""
    f = tl.sigmoid(z[1])
    g = tanh(z[2])
    o = tl.sigmoid(z[3])
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    dz_f = dc * c_prev * f * (1.0 - f)
    dz_g = dc * i * (1.0 - g * g)
    dz_o = dh * tanh_c * o * (1.0 - o)
    return (dz_f, dz_g, dz_o), dc * f, dc * g


@triton.jit
def lstm_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz of i|f|g|o and dc of the step before."""
    i = tl.sigmoid(z[0])
    dz, dc_prev, di = grad_of_state(z, i, c, c_prev, dh, dc)
    return (), (di * i * (1.0 - i), dz[0], dz[1], dz[2]), (), dc_prev, ()


LSTM = CellKernels(update=lstm_update, grad_local=lstm_grad_local, early=(0, 1, 2, 3))
