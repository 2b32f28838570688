"""The LSTM with coupled gates: what it forgets makes room for what it takes in, i = 1 − f (Greff et al. 2017)."""

import torch
from torch import Tensor

from novolstm_triton.cells.cell import Block, Cell
from novolstm_triton.cells.lstm import state


def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Take the LSTM's step with i = 1 − σ(z_f)."""
    z_f, z_g, z_o = z
    return state(1 - torch.sigmoid(z_f), z_f, z_g, z_o, c)


COUPLED = Cell(
    name="coupled",
    # Those of an LSTM in its order, without the one that the coupling takes away.
    blocks=(Block("f"), Block("g"), Block("o")),
    step=step,
    kernels="novolstm_triton.kernels.coupled:COUPLED",
)
