"""The LSTM with coupled gates: what it forgets makes room for what it takes in, i = 1 − f.

`cell.py` says what the functions of a cell are given and return. Blocks f|g|o.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .lstm import grad_of_state
from .math import tanh


@triton.jit
def coupled_update(z, stats, c, vectors):
    """c = f·c + (1 − f)·g,  h = o·tanh(c)."""
    f = tl.sigmoid(z[0])
    c = f * c + (1.0 - f) * tanh(z[1])
    return tl.sigmoid(z[2]) * tanh(c), c


@triton.jit
def coupled_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz of f|g|o and dc of the step before: c = f·(c_prev − g) + g, so that df = dc·(c_prev − g)."""
    i = 1.0 - tl.sigmoid(z[0])
    dz, dc_prev, _ = grad_of_state((z[0], z[0], z[1], z[2]), i, c, c_prev - tanh(z[1]), dh, dc)
    return (), dz, (), dc_prev, ()


COUPLED = CellKernels(update=coupled_update, grad_local=coupled_grad_local, early=(0, 1, 2))
