"""The LSTM with peepholes: its gates see the cell state (Gers and Schmidhuber 2000), i and f the old one, o the new."""

import torch
from torch import Tensor

from novolstm_triton.cells.cell import Block, Cell, Vector


def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Return h = σ(z_o + w_o·c')·tanh(c') and c' = σ(z_f + w_f·c)·c + σ(z_i + w_i·c)·tanh(z_g)."""
    (z_i, z_f, z_g, z_o), (w_i, w_f, w_o) = z, vectors
    i, f = torch.sigmoid(z_i + w_i * c), torch.sigmoid(z_f + w_f * c)
    c = f * c + i * torch.tanh(z_g)
    return torch.sigmoid(z_o + w_o * c) * torch.tanh(c), c


PEEPHOLE = Cell(
    name="peephole",
    blocks=(Block("i"), Block("f"), Block("g"), Block("o")),
    step=step,
    vectors=(Vector("weight_ch", ("i", "f", "o")),),
    kernels="novolstm_triton.kernels.peephole:PEEPHOLE",
)
