"""Elman's cell with tanh or relu: h alone is its state, carried in c's place.

`cell.py` says what the functions of a cell are given and return. One block, h.
"""

import triton
import triton.language as tl

from .cell import CellKernels
from .math import tanh


@triton.jit
def elman_tanh_update(z, stats, c, vectors):
    """h = tanh(z)."""
    h = tanh(z[0])
    return h, h


@triton.jit
def elman_tanh_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz; the step takes nothing from the carried h, which meets the weights alone."""
    return (), ((dh + dc) * (1.0 - c * c),), (), tl.zeros_like(c), ()


@triton.jit
def elman_relu_update(z, stats, c, vectors):
    """h = max(z, 0), and NaN if z is."""
    h = tl.where(z[0] < 0.0, 0.0, z[0])
    return h, h


@triton.jit
def elman_relu_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz, which is zero where z is; see `elman_tanh_grad_local`."""
    return (), (tl.where(z[0] <= 0.0, 0.0, dh + dc),), (), tl.zeros_like(c), ()


ELMAN_TANH = CellKernels(update=elman_tanh_update, grad_local=elman_tanh_grad_local, early=(0,))
ELMAN_RELU = CellKernels(update=elman_relu_update, grad_local=elman_relu_grad_local, early=(0,))
