"""The GRU that resets before the product, as Cho et al. (2014) have it, Keras by `reset_after=False`, and ONNX."""

import torch
from torch import Tensor

from novolstm_triton.cells.cell import Block, Cell, Second


def reset(z: tuple[Tensor, ...], h: Tensor) -> Tensor:
    """Return r·h with r = σ(z_r): what n sees of the state."""
    return torch.sigmoid(z[0]) * h


def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Return h = (1 − z)·tanh(z_n) + z·c with z = σ(z_z); c is the h before the step, and z_n has (r·c) U_nᵀ in it."""
    _, z_gate, n = z
    kept = torch.sigmoid(z_gate)
    h = (1 - kept) * torch.tanh(n) + kept * c
    return h, h


GRU_RESET_BEFORE = Cell(
    name="gru_reset_before",
    # In nn.GRU's order.
    blocks=(Block("r"), Block("z"), Block("n")),
    step=step,
    states=("h",),
    second=Second(("n",), reset),
)
