"""The plain LSTM (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as `torch.nn.LSTM` has it."""

import torch
from torch import Tensor

from novolstm_triton.cells.cell import Block, Cell


def state(i: Tensor, z_f: Tensor, z_g: Tensor, z_o: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return h = σ(z_o)·tanh(c') and c' = σ(z_f)·c + i·tanh(z_g)."""
    c = torch.sigmoid(z_f) * c + i * torch.tanh(z_g)
    return torch.sigmoid(z_o) * torch.tanh(c), c


def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Take the step of `state` with i = σ(z_i)."""
    z_i, z_f, z_g, z_o = z
    return state(torch.sigmoid(z_i), z_f, z_g, z_o, c)


LSTM = Cell(
    name="lstm",
    blocks=(Block("i"), Block("f"), Block("g"), Block("o")),
    step=step,
    kernels="novolstm_triton.kernels.lstm:LSTM",
)
