"""Drop-ins for PyTorch's LSTM: `LSTM` and `LSTMCell`."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch
from novolstm_triton.cells.lstm import LSTM as CELL
from novolstm_triton.layers.layer import RecurrentLayer
from novolstm_triton.layers.recurrent import Recurrent, States
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.weights.torch import from_torch, to_torch

if TYPE_CHECKING:
    import numpy as np


class _Steps(Recurrent):
    """Single steps by PyTorch's own operator."""

    _cell = CELL

    def _step(self, x: Tensor, states: States | None, weights: dict[str, Tensor]) -> States:
        if states is None:
            states = (x.new_zeros(x.shape[0], self.hidden_size),) * 2
        biases = weights.get("bias_ih"), weights.get("bias_hh")
        return torch.lstm_cell(x, states, weights["weight_ih"], weights["weight_hh"], *biases)


class LSTM(_Steps, RecurrentLayer):
    r"""A drop-in for `torch.nn.LSTM`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        bias: with False, no bias_ih and bias_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        proj_size: if above 0, h is projected to so many units P by weight_hr.
        device: where the parameters live.
        dtype: dtype of the parameters.
        recurrent_dropout: probability with which a unit of h is dropped on its way to weight_hh, by one mask per
            sequence, in training.
        zoneout_h: probability with which a unit of h keeps its value in a step, in training; else the expectation.
        zoneout_c: likewise, of c.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.lstm`.

    Parameters, names and shapes are nn.LSTM's, so that `load_state_dict` takes those of an nn.LSTM.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    _twin = pytorch.LSTM

    mode = "LSTM"
    """What nn.LSTM calls its cell, for code that asks which states there are."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        backend: str = "auto",
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(
            *(CELL, *sizes, device, dtype),
            recurrent_dropout=recurrent_dropout,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            backend=backend,
        )

    @classmethod
    def from_torch(cls, lstm: nn.LSTM, **options: Any) -> "LSTM":
        """Return a layer that computes what this nn.LSTM computes, with copies of its parameters.

        Sizes, bias, batch_first, dropout, device, dtype, training mode and each parameter's requires_grad are those
        of the nn.LSTM. Its hooks are not taken along.

        Args:
            lstm: nn.LSTM.
            **options: LSTM's keyword options: backend; and recurrent_dropout, zoneout_h and zoneout_c, with which the
                layer no longer computes the same.

        Raises:
            TypeError: `lstm` is not an nn.LSTM, or an option is unknown.
            ValueError: it is of a subclass with code of its own, or its parameters are not those of an LSTM (it is
                pruned, for example), or an option's value.
        """
        return from_torch(cls, lstm, options)

    def to_torch(self) -> nn.LSTM:
        """Return the nn.LSTM that computes what this layer computes, with copies of its parameters.

        Raises:
            ValueError: the layer has recurrent_dropout or zoneout, which nn.LSTM lacks, or its parameters are not
                those of an LSTM (it is pruned, for example).
        """
        return to_torch(self)

    @classmethod
    def from_keras(
        cls,
        weights: "Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]",
        *,
        layer: str | None = None,
        **options: Any,
    ) -> "LSTM":
        """Return a layer that computes what the `keras.layers.LSTM` with these weights computes.

        The Keras layer has to have its default activations, tanh and sigmoid, which its weights do not tell; a
        `.keras` file does, and is checked.

        Args:
            weights: [kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]], blocks i|f|c|o, or the first two, as
                `get_weights()` returns them, or twice as many for a `keras.layers.Bidirectional`, forward first; or a
                dict of arrays by those names; or the path of a `.weights.h5` or `.keras` file, which needs h5py.
            layer: name in Keras, or path in the file, of the layer to take from a file that has several.
            **options: device, backend and so on. Where none are given, batch_first is True, as in Keras, and dtype is
                the arrays'.

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

        A bidirectional layer returns those of the forward, then those of the backward direction. The sum of the two
        biases is Keras's; bfloat16 becomes fp32.

        Raises:
            ValueError: there is no such Keras layer: of several layers, with a projection or zoneout.
        """
        from novolstm_triton.weights.keras import to_keras

        return to_keras(self)


class LSTMCell(_Steps, RecurrentCell):
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
        super().__init__(CELL, input_size, hidden_size, bias, device, dtype, backend=backend)
