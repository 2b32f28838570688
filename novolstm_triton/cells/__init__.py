"""The cells: a file each with its equations in PyTorch and its parameters; `cell.py` says what a cell is.

Their tile functions are in `novolstm_triton.kernels`, in the file of the same name.
"""

import importlib
import pkgutil

from novolstm_triton.cells.cell import CELLS, Block, Cell, Second, Vector, register, with_kernels
from novolstm_triton.cells.novolstm import LAYER_NORMS, VARIANTS, novolstm_cell

__all__ = [
    "CELLS",
    "LAYER_NORMS",
    "VARIANTS",
    "Block",
    "Cell",
    "Second",
    "Vector",
    "novolstm_cell",
    "register",
    "with_kernels",
]

# A new file is a new cell: nothing else needs to know of it.
for _file in pkgutil.iter_modules(__path__):
    for _cell in vars(importlib.import_module(f"{__name__}.{_file.name}")).values():
        if isinstance(_cell, Cell):
            register(_cell)
