"""Single cells as modules with nn.LSTMCell's constructor, call and parameters: `NovoLSTMCell` and `LSTMCell`.

A call is a sequence of one step; on a CPU it runs in PyTorch's own operators. For many steps whose inputs are known,
the layers of `module.py` are much faster.
"""

from typing import Any

import torch
from torch import Tensor, nn

from novolstm_triton.cells import CELLS, novolstm_cell
from novolstm_triton.checks import check_dense
from novolstm_triton.functional import takes_plain_steps
from novolstm_triton.recurrent import (
    LSTMFunction,
    NovoLSTMFunction,
    Recurrent,
    State,
    check_device,
    check_pair,
    check_sizes,
    check_state_ranks,
    layer_weights,
    same_dtype,
    scalar_type,
)


class SingleCell(Recurrent):
    """What `NovoLSTMCell` and `LSTMCell` have in common: nn.LSTMCell's surface around a cell. Not to be used itself."""

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, backend)
        shapes = CELLS[cell].shapes(input_size, hidden_size)
        self._parameter_names = tuple(shapes)
        for name, shape in shapes.items():
            # A cell without biases has the attributes nevertheless, as None.
            absent = name.startswith("bias_") and not bias
            parameter = None if absent else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take one time step, of a batch or of one unbatched row.

        Args:
            input: [B, I], or [I] unbatched, in the dtype of the parameters.
            hx: (h, c), [B, H] each, or [H] unbatched; zeros if None.

        Returns:
            The new (h, c), with the shapes of the states, in the dtype of the input.

        Raises:
            ValueError, RuntimeError: shapes, dtypes or devices that do not fit, in nn.LSTMCell's words where it has
                some.
            TypeError: a state that is not a pair of tensors.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        check_dense(input, "input")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        h_0, c_0 = (None, None) if hx is None else self._check_state(hx, batched)
        weights = layer_weights(self, "")
        check_sizes(weights, self.hidden_size)
        self._check(x, h_0, c_0, weights["weight_ih"])
        if takes_plain_steps(x, self.backend):
            h, c = self._step(x, h_0, c_0, weights)
        else:
            _, h, c = self._call(x.unsqueeze(0), h_0, c_0, weights, backend=self.backend)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def _check_state(self, hx: Any, batched: bool) -> State:
        """Check form and ranks of the states; return them with their dimension of rows."""
        check_pair(self, hx)
        for position, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(
                    f"{type(self).__name__}: Expected hx[{position}] to be 1D or 2D, got {state.dim()}D instead"
                )
        check_state_ranks(hx, 2 if batched else 1, batched)
        h_0, c_0 = (state if batched else state.unsqueeze(0) for state in hx)
        return h_0, c_0

    def _check(self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weight: Tensor) -> None:
        """Check sizes, devices and dtypes of x [B, I] and the states [B, H], each perhaps None, for weight_ih."""
        rows, features = x.shape
        if features != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {features} expected {self.input_size}")
        for position, state in enumerate((h_0, c_0)):
            if state is None:
                continue
            if state.shape[0] != rows:
                raise RuntimeError(
                    f"Input batch size {rows} doesn't match hidden{position} batch size {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{position} has inconsistent hidden_size: got {state.shape[1]}, expected {self.hidden_size}"
                )
        check_device(x, "parameter", weight)
        named = (("the input", x), ("hx[0]", h_0), ("hx[1]", c_0))
        for name, tensor in named:
            if tensor is None:
                continue
            check_device(x, "hidden", tensor)
            if not same_dtype(tensor, weight):
                raise RuntimeError(
                    f"mat1 and mat2 must have the same dtype, but got {scalar_type(tensor)} and "
                    f"{scalar_type(weight)}: the dtypes of {name} and of the parameters"
                )


class NovoLSTMCell(NovoLSTMFunction, SingleCell):
    r"""A single step of NovoLSTM, called like `torch.nn.LSTMCell`.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        bias: with False, bias_ih and bias_hh are None.
        device: where the parameters live.
        dtype: dtype of the parameters.
        variant: "formula" (default) or "notebook", the function of the published code.
        layer_norm: "input_gate" (default), or "all": z_f, z_g and z_o are normalised, too, over the units.
        ln_eps: ε of the layer normalisations; None means 1e-5 (formula) or 1e-3 (notebook).
        gate_gain: constant factor on the input gate, or "hidden" for H, which makes the gate O(1).
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters, rows in blocks i|f|g|o|p, drawn like those of `NovoLSTM`:
        weight_ih [5H, I], weight_hh [5H, H] (notebook: [4H, H]), bias_ih [5H], bias_hh [5H] (notebook: [4H]),
        ln_weight and ln_bias [H] (layer_norm="all": [4H], blocks i|f|g|o).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: str = "formula",
        layer_norm: str = "input_gate",
        ln_eps: float | None = None,
        gate_gain: float | str = 1.0,
        backend: str = "auto",
    ) -> None:
        cell = novolstm_cell(variant, layer_norm)
        super().__init__(cell, input_size, hidden_size, bias, device, dtype, backend)
        self._set_options(variant, layer_norm, ln_eps, gate_gain)


class LSTMCell(LSTMFunction, SingleCell):
    r"""A drop-in for `torch.nn.LSTMCell`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        bias: with False, bias_ih and bias_hh are None.
        device: where the parameters live.
        dtype: dtype of the parameters.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.lstm`.

    Parameters, names and shapes are nn.LSTMCell's, so that `load_state_dict` takes those of an nn.LSTMCell.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias, device, dtype, backend)
