"""Drop-ins for PyTorch's RNN, Elman's network with tanh or relu: `RNN` and `RNNCell`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch
from novolstm_triton.cells import CELLS, Cell
from novolstm_triton.layers.layer import RecurrentLayer
from novolstm_triton.layers.recurrent import Recurrent, States, check_no_projection
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.weights.torch import from_torch, to_torch

if TYPE_CHECKING:
    import numpy as np

_OPERATORS = {"tanh": torch.rnn_tanh_cell, "relu": torch.rnn_relu_cell}


def _cell_with(nonlinearity: Any) -> Cell:
    """Return the cell with this nonlinearity.

    Raises:
        ValueError: there is none.
    """
    # A tuple's, because a dictionary's `in` raises for what cannot be hashed.
    if nonlinearity not in tuple(_OPERATORS):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return CELLS[f"elman_{nonlinearity}"]


class _Steps(Recurrent):
    """Single steps by PyTorch's own operators."""

    @property
    def nonlinearity(self) -> str:
        """The function of a step, "tanh" or "relu"; may be set, and counts at the next call."""
        return self._cell.name.removeprefix("elman_")

    @nonlinearity.setter
    def nonlinearity(self, nonlinearity: str) -> None:
        self._cell = _cell_with(nonlinearity)

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        yield "nonlinearity", "tanh"
        yield from super()._defaults()

    def _step(self, x: Tensor, states: States | None, weights: dict[str, Tensor]) -> States:
        (h,) = (x.new_zeros(x.shape[0], self.hidden_size),) if states is None else states
        biases = weights.get("bias_ih"), weights.get("bias_hh")
        return (_OPERATORS[self.nonlinearity](x, h, weights["weight_ih"], weights["weight_hh"], *biases),)


class RNN(_Steps, RecurrentLayer):
    r"""A drop-in for `torch.nn.RNN`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        num_layers: number of stacked layers.
        nonlinearity: "tanh" or "relu".
        bias: with False, no bias_ih and bias_hh.
        batch_first: input and output are [B, T, ·] instead of [T, B, ·]. States keep their shape.
        dropout: probability of the dropout after every layer but the last.
        bidirectional: run every layer in both directions and concatenate their outputs.
        device: where the parameters live.
        dtype: dtype of the parameters.
        proj_size: refused, as nn.RNN does.
        recurrent_dropout: probability with which a unit of h is dropped on its way to weight_hh, by one mask per
            sequence, in training.
        zoneout_h: probability with which a unit of h keeps its value in a step, in training; else the expectation.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters, names and shapes are nn.RNN's, so that `load_state_dict` takes those of an nn.RNN.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    _twin = pytorch.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
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
        cell = _cell_with(nonlinearity)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        options = dict(recurrent_dropout=recurrent_dropout, zoneout_h=zoneout_h)
        super().__init__(cell, *sizes, device, dtype, **options, backend=backend)

    @property
    def mode(self) -> str:
        """What nn.RNN calls its cell, "RNN_TANH" or "RNN_RELU", for code that asks which states there are."""
        return f"RNN_{self.nonlinearity.upper()}"

    @classmethod
    def from_torch(cls, rnn: nn.RNN, **options: Any) -> "RNN":
        """Return a layer that computes what this nn.RNN computes, with copies of its parameters.

        Sizes, options, training mode and each parameter's requires_grad are those of the nn.RNN; hooks are not taken
        along.

        Args:
            rnn: nn.RNN.
            **options: RNN's keyword options: backend; and recurrent_dropout and zoneout_h, with which the layer no
                longer computes the same.

        Raises:
            TypeError: `rnn` is not an nn.RNN, or an option is unknown.
            ValueError: it is of a subclass with code of its own, or its parameters are not those of an RNN, or an
                option's value.
        """
        return from_torch(cls, rnn, options)

    def to_torch(self) -> nn.RNN:
        """Return the nn.RNN that computes what this layer computes, with copies of its parameters.

        Raises:
            ValueError: the layer has recurrent_dropout or zoneout, or its parameters are not those of an RNN.
        """
        return to_torch(self)

    @classmethod
    def from_keras(
        cls,
        weights: "Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]",
        *,
        layer: str | None = None,
        **options: Any,
    ) -> "RNN":
        """Return a layer that computes what the `keras.layers.SimpleRNN` with these weights computes.

        The Keras layer's activation has to be the option nonlinearity, which its weights do not tell; a `.keras` file
        does, and is checked.

        Args:
            weights: [kernel [I, H], recurrent_kernel [H, H], bias [H]], or the first two, as
                `get_weights()` returns them; or in another of the forms that `LSTM.from_keras` takes.
            layer: name in Keras, or path in the file, of the layer to take from a file that has several.
            **options: nonlinearity, device, backend and so on. Where none are given, batch_first is True, as in Keras,
                and dtype is the arrays'.

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
            ValueError: there is no such Keras layer: of several layers, or with zoneout.
        """
        from novolstm_triton.weights.keras import to_keras

        return to_keras(self)


class RNNCell(_Steps, RecurrentCell):
    r"""A drop-in for `torch.nn.RNNCell`: the same function, parameters and call, on this library's engine.

    Args:
        input_size: number of features of the input.
        hidden_size: number of units H.
        bias: with False, bias_ih and bias_hh are None.
        nonlinearity: "tanh" or "relu".
        device: where the parameters live.
        dtype: dtype of the parameters.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.novolstm`.

    Parameters, names and shapes are nn.RNNCell's, so that `load_state_dict` takes those of an nn.RNNCell.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(_cell_with(nonlinearity), input_size, hidden_size, bias, device, dtype, backend=backend)
