"""The cells: a file each with its equations in PyTorch and its parameters; `cell.py` says what a cell is.

Their tile functions are in `novolstm_triton.kernels`, in the file of the same name.
"""

from novolstm_triton.cells.cell import CELLS, Block, Cell, Vector, register
from novolstm_triton.cells.lstm import LSTM
from novolstm_triton.cells.novolstm import (
    FORMULA,
    FORMULA_ALL,
    LAYER_NORMS,
    NOTEBOOK,
    NOTEBOOK_ALL,
    VARIANTS,
    novolstm_cell,
)

__all__ = ["CELLS", "LAYER_NORMS", "VARIANTS", "Block", "Cell", "Vector", "novolstm_cell", "register"]

for _cell in (LSTM, FORMULA, FORMULA_ALL, NOTEBOOK, NOTEBOOK_ALL):
    register(_cell)
