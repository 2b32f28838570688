"""Drop-ins for PyTorch's GRU: `GRU` and `GRUCell`."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch
from novolstm_triton.cells.gru import GRU as CELL
from novolstm_triton.layers.layer import RecurrentLayer
from novolstm_triton.layers.recurrent import Recurrent, States, check_no_projection
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.weights.torch import from_torch, to_torch

if TYPE_CHECKING:
    import numpy as np


class _Steps(Recurrent):
    """Single steps by PyTorch's own operator."""

    _cell = CELL

    def _step(self, x: Tensor, states: States | None, weights: dict[str, Tensor]) -> States:
        (h,) = (x.new_zeros(x.shape[0], self.hidden_size),) if states is None else states
        biases = weights.get("bias_ih"), weights.get("bias_hh")
        return (torch.gru_cell(x, h, weights["weight_ih"], weights["weight_hh"], *biases),)


class GRU(_Steps, RecurrentLayer):
    r"""A drop-in for `torch.nn.GRU`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        bias: with False, no bias_ih and bias_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        device: where the parameters live.
        dtype: dtype of the parameters.
        proj_size: refused, as nn.GRU does.
        recurrent_dropout: probability with which a unit of h is dropped on its way to weight_hh, by one mask per
            sequence, in training.
        zoneout_h: probability with which a unit of h keeps its value in a step, in training; else the expectation.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters, names and shapes are nn.GRU's, rows in blocks r|z|n, so that `load_state_dict` takes those of an nn.GRU.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    _twin = pytorch.GRU

    mode = "GRU"
    """What nn.GRU calls its cell, for code that asks which states there are."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: None = None,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        backend: str = "auto",
    ) -> None:
        check_no_projection(proj_size)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        options = dict(recurrent_dropout=recurrent_dropout, zoneout_h=zoneout_h)
        super().__init__(CELL, *sizes, device, dtype, **options, backend=backend)

    @classmethod
    def from_torch(cls, gru: nn.GRU, **options: Any) -> "GRU":
        """Return a layer that computes what this nn.GRU computes, with copies of its parameters.

        Sizes, options, training mode and each parameter's requires_grad are those of the nn.GRU; hooks are not taken
        along.

        Args:
            gru: nn.GRU.
            **options: GRU's keyword options: backend; and recurrent_dropout and zoneout_h, with which the layer no
                longer computes the same.

        Raises:
            TypeError: `gru` is not an nn.GRU, or an option is unknown.
            ValueError: it is of a subclass with code of its own, or its parameters are not those of a GRU, or an
                option's value.
        """
        return from_torch(cls, gru, options)

    def to_torch(self) -> nn.GRU:
        """Return the nn.GRU that computes what this layer computes, with copies of its parameters.

        Raises:
            ValueError: the layer has recurrent_dropout or zoneout, or its parameters are not those of a GRU.
        """
        return to_torch(self)

    @classmethod
    def from_keras(
        cls,
        weights: "Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]",
        *,
        layer: str | None = None,
        **options: Any,
    ) -> "GRU":
        """Return a layer that computes what the `keras.layers.GRU` with these weights computes.

        The Keras layer has to have its default activations and reset_after=True, the default, which its weights do not
        tell unless they have a bias; a `.keras` file does, and is checked. With reset_after=False it is another
        function, the cell "gru_reset_before".

        Args:
            weights: [kernel [I, 3H], recurrent_kernel [H, 3H], bias [2, 3H]], blocks z|r|h, or the first two, as
                `get_weights()` returns them; or in another of the forms that `LSTM.from_keras` takes.
            layer: name in Keras, or path in the file, of the layer to take from a file that has several.
            **options: device, backend and so on. Where none are given, batch_first is True, as in Keras, and
                dtype is the arrays'.

        Raises:
            TypeError: `weights` or an option of the wrong type.
            ValueError: a shape, name or number of arrays that does not fit; a damaged file; no such layer in it.
            FileNotFoundError: there is no such file.
            ImportError: a file is given and h5py is missing.
        """
        from novolstm_triton.weights.keras import from_keras

        return from_keras(cls, weights, layer, options)

    def to_keras(self) -> "list[np.ndarray]":
        """Return [kernel, recurrent_kernel, bias] for the Keras layer's `set_weights`, without bias if there is none.

        A bidirectional layer returns those of the forward, then those of the backward direction. The two biases are
        Keras's; bfloat16 becomes fp32.

        Raises:
            ValueError: there is no such Keras layer: of several layers, or with zoneout.
        """
        from novolstm_triton.weights.keras import to_keras

        return to_keras(self)


class GRUCell(_Steps, RecurrentCell):
    r"""A drop-in for `torch.nn.GRUCell`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        bias: with False, bias_ih and bias_hh are None.
        device: where the parameters live.
        dtype: dtype of the parameters.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters, names and shapes are nn.GRUCell's, so that `load_state_dict` takes those of an nn.GRUCell.

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
        super().__init__(CELL, input_size, hidden_size, bias, device, dtype, backend=backend)
