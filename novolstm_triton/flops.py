"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`."""

import importlib.machinery
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from novolstm_triton.cells import CELLS

_COUNTER = "torch.utils.flop_counter"


def forward_flops(x: Sequence[int], h_0: Any, c_0: Any, weight_ih: Any, weight_hh: Any, *others: Any, **_: Any) -> int:
    """Return the operations of forward's matrix products; an addition and a multiplication are two operations.

    That is 2·T·B·H·(G·I + R·P) for each direction, lengths notwithstanding: every row counts with all T steps.

    Args:
        x: shape [T, B, I], as the counter gives it in place of the tensor; so are the others.
        h_0: not looked at, like c_0 and what follows the weights.
        c_0: likewise.
        weight_ih: [G·H, I], or [2, G·H, I] for both directions.
        weight_hh: [R·H, P], or [2, R·H, P].
        *others: likewise.
        **_: what the operator returned.
    """
    steps, batch = x[:2]
    return 2 * steps * batch * (math.prod(weight_ih) + math.prod(weight_hh))


def backward_flops(
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    x: Sequence[int],
    h_0: Any,
    c_0: Any,
    weight_ih: Any,
    weight_hh: Any,
    *others: Any,
    **_: Any,
) -> int:
    """Return the operations of the gradients' products: twice those of forward, if all gradients are asked for.

    Gates that a backend computes once more in backward do not count: they are not the layer's work but the price of the
    memory saved, and differ between backends.

    Args:
        dy: not looked at, like all that has no entry here; see `forward_flops`.
        dh_n: likewise.
        dc_n: likewise.
        x: shape [T, B, I].
        h_0: likewise.
        c_0: likewise.
        weight_ih: [G·H, I], or [2, G·H, I] for both directions.
        weight_hh: [R·H, P], or [2, R·H, P].
        *others: the last says which gradients are asked for: of x, h_0, c_0, weight_ih, weight_hh and so on; the fifth
            from the end is the cell's name.
        **_: what the operator returned.
    """
    (steps, batch), needs, cell = x[:2], others[-1], CELLS[others[-5]]
    inputs, recurrent = math.prod(weight_ih), math.prod(weight_hh)
    # The gradient goes back from every step's h to the one before; before the first that is h_0.
    steps_back = steps if needs[1] else steps - 1
    # From a second product it goes to the gate before it, too, in every step.
    more = (steps - steps_back) * recurrent * (cell.recurrent - cell.at_once) // cell.recurrent
    return 2 * batch * (steps * (needs[0] + needs[3]) * inputs + (steps * needs[4] + steps_back) * recurrent + more)


def register_formulas() -> None:
    """Tell PyTorch's counter of the formulas: now, if it has been imported, or else when it is.

    It imports Triton, which takes longer than the rest of this package, so that it is not imported here.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported)


def _register(counter: ModuleType) -> None:
    operators = torch.ops.novolstm_triton
    counter.register_flop_formula(operators.forward)(forward_flops)
    counter.register_flop_formula(operators.backward)(backward_flops)


class _WhenImported:
    """Finds PyTorch's counter as Python does, and has the formulas registered after it has been executed."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            # A loader is made for each import.
            spec.loader.exec_module = execute_and_register
        return spec
