"""Any cell as a module for single steps, with nn.LSTMCell's constructor, call and parameters: `RecurrentCell`.

A call is a sequence of one step; on a CPU it runs in PyTorch's own operators. For many steps whose inputs are known,
the layers are much faster.
"""

from typing import Any

import torch
from torch import Tensor, nn

from novolstm_triton.cells import Cell
from novolstm_triton.checks import check_dense
from novolstm_triton.functional import takes_plain_steps
from novolstm_triton.layers.recurrent import (
    Recurrent,
    States,
    check_device,
    check_sizes,
    check_state_ranks,
    layer_weights,
    same_dtype,
    scalar_type,
)


class RecurrentCell(Recurrent):
    r"""Any cell as a module for single steps, called like `torch.nn.LSTMCell`: a user's own, too.

    Args:
        cell: the equations and parameters, a `novolstm_triton.cells.Cell`.
        input_size: number of features of the input.
        hidden_size: number of units H.
        bias: with False, bias_ih and bias_hh are None.
        device: where the parameters live.
        dtype: dtype of the parameters.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters for N blocks that x feeds and R that h feeds: weight_ih [N·H, I], weight_hh [R·H, H], bias_ih [N·H],
    bias_hh [R·H], and the cell's vectors by their names.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias, backend)
        shapes = cell.shapes(input_size, hidden_size)
        self._parameter_names = tuple(shapes)
        for name, shape in shapes.items():
            # A cell without biases has the attributes nevertheless, as None.
            absent = name.startswith("bias_") and not bias
            parameter = None if absent else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Take one time step, of a batch or of one unbatched row.

        Args:
            input: [B, I], or [I] unbatched, in the dtype of the parameters.
            hx: (h, c), [B, H] each, or [H] unbatched; h alone for a cell with one state; zeros if None.

        Returns:
            The new (h, c), or h, with the shapes of the states, in the dtype of the input.

        Raises:
            ValueError, RuntimeError: shapes, dtypes or devices that do not fit, in nn.LSTMCell's words where it has
                some.
            TypeError: a state that is not what the cell has.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        check_dense(input, "input")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        states = None if hx is None else self._check_state(hx, batched)
        weights = layer_weights(self, "")
        check_sizes(weights, self.hidden_size)
        self._check(x, states or (), weights["weight_ih"])
        if takes_plain_steps(x, self.backend):
            states = self._step(x, states, weights)
        else:
            _, states = self._call(x.unsqueeze(0), states, weights, backend=self.backend)
        return self._shown(states if batched else tuple(s.squeeze(0) for s in states))

    def _check_state(self, hx: Any, batched: bool) -> States:
        """Check form and ranks of the states; return them with their dimension of rows."""
        states = self._tuple_of(hx)
        for position, state in enumerate(states):
            if state.dim() not in (1, 2):
                which = f"hx[{position}]" if len(states) > 1 else "hidden"
                raise ValueError(f"{type(self).__name__}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")
        check_state_ranks(states, 2 if batched else 1, batched)
        return tuple(state if batched else state.unsqueeze(0) for state in states)

    def _check(self, x: Tensor, states: States, weight: Tensor) -> None:
        """Check sizes, devices and dtypes of x [B, I] and the states [B, H] for weight_ih."""
        rows, features = x.shape
        if features != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {features} expected {self.input_size}")
        for position, state in enumerate(states):
            if state.shape[0] != rows:
                raise RuntimeError(
                    f"Input batch size {rows} doesn't match hidden{position} batch size {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{position} has inconsistent hidden_size: got {state.shape[1]}, expected {self.hidden_size}"
                )
        check_device(x, "parameter", weight)
        named = [("the input", x), *((f"hx[{position}]", state) for position, state in enumerate(states))]
        for name, tensor in named:
            check_device(x, "hidden", tensor)
            if not same_dtype(tensor, weight):
                raise RuntimeError(
                    f"mat1 and mat2 must have the same dtype, but got {scalar_type(tensor)} and "
                    f"{scalar_type(weight)}: the dtypes of {name} and of the parameters"
                )
