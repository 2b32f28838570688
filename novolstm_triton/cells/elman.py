"""Elman's cell (1990), as `torch.nn.RNN` has it, with tanh or relu: h alone is its state."""

from collections.abc import Callable

import torch
from torch import Tensor

from novolstm_triton.cells.cell import Block, Cell


def _cell(nonlinearity: str, function: Callable[[Tensor], Tensor]) -> Cell:
    def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        h = function(z[0])
        return h, h

    name = f"elman_{nonlinearity}"
    return Cell(
        name=name,
        blocks=(Block("h"),),
        step=step,
        states=("h",),
        kernels=f"novolstm_triton.kernels.elman:{name.upper()}",
    )


ELMAN_TANH = _cell("tanh", torch.tanh)
ELMAN_RELU = _cell("relu", torch.relu)
