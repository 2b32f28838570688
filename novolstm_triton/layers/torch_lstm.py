"""A layer of this library that is an instance of `torch.nn.LSTM`: `TorchLSTM`."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from novolstm_triton import pytorch
from novolstm_triton.layers.lstm import LSTM
from novolstm_triton.layers.recurrent import State, check_backend

_EAGER: list[Callable[..., Any]] = []
"""LSTM's forward, left alone by torch.compile, once it was needed: to make it imports Dynamo, which takes seconds."""


class TorchLSTM(LSTM, pytorch.LSTM):
    r"""An `LSTM` that is an `nn.LSTM`, for code that asks `isinstance(m, nn.LSTM)` or uses nn.LSTM's internals.

    Constructor, call and results are those of `LSTM`. The attributes that only nn.LSTM has are there, too: `mode`,
    `_flat_weights`, `_flat_weights_names`, `_all_weights`, `check_input` and so on, and `flatten_parameters` does what
    it does there.

    It has one disadvantage: `torch.compile` leaves every nn.LSTM out of the graph, including this one, and
    fullgraph=True is an error. Where nothing asks for the type, take `LSTM`.

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
        recurrent_dropout: as in `LSTM`.
        zoneout_h: as in `LSTM`.
        zoneout_c: as in `LSTM`.
        backend: "auto", "reference", "torch" or "triton"; see `novolstm_triton.functional.lstm`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """

    # nn.LSTM keeps them in the instance, where LSTM computes them.
    _all_weights: Any = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    _flat_weights_names: Any = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    all_weights: Any = pytorch.LSTM.all_weights
    flatten_parameters: Any = pytorch.LSTM.flatten_parameters

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
        check_backend(backend)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        pytorch.LSTM.__init__(self, *sizes, device=device, dtype=dtype)
        self._parameter_names = tuple(self._cell.shapes(input_size, hidden_size, bias, proj_size))
        self._built = (num_layers, bidirectional, bias)
        self._set_regularisers(recurrent_dropout, zoneout_h, zoneout_c)
        self.backend = backend

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None, **options: Any) -> tuple[Any, State]:
        """Do what `LSTM` does."""
        # Dynamo refuses the instance, and would compile what the layer calls piece by piece.
        if "torch._dynamo" not in sys.modules:
            return LSTM.forward(self, input, hx, **options)
        if not _EAGER:
            _EAGER.append(torch.compiler.disable(LSTM.forward))
        return _EAGER[0](self, input, hx, **options)

    # nn.LSTM keeps a list, which goes stale under parametrizations and stands in the way of a deep copy then.
    @LSTM._flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """Take nn.LSTM's list and do nothing with it."""
