"""The GRU (Cho et al. 2014) that resets after the product, as `torch.nn.GRU` has it: h alone is its state."""

import torch
from torch import Tensor

from novolstm_triton.cells.cell import Block, Cell


def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Return h = (1 − z)·n + z·c with n = tanh(z_n + r·z_m), z = σ(z_z) and r = σ(z_r); c is the h before the step."""
    m, r, z_gate, n = z
    kept = torch.sigmoid(z_gate)
    h = (1 - kept) * torch.tanh(n + torch.sigmoid(r) * m) + kept * c
    return h, h


GRU = Cell(
    name="gru",
    # nn.GRU's n is two blocks here, for r comes between its products: h's, m, and x's.
    blocks=(Block("m", input=False), Block("r"), Block("z"), Block("n", recurrent=False)),
    step=step,
    states=("h",),
    recurrent_order=("r", "z", "m"),
    kernels="novolstm_triton.kernels.gru:GRU",
)
