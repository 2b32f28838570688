"""Recurrent layers for PyTorch whose kernels run a whole sequence on the GPU: NovoLSTM, LSTM, GRU, RNN, and any cell.

`NovoLSTM`, `LSTM`, `GRU` and `RNN` are modules, called like those of `torch.nn`; names that end in `Cell` are their
single steps; `RecurrentLayer` and `RecurrentCell` are the same for any cell, of `cells` or a user's own; `TorchLSTM` is
an `LSTM` that is an instance of `nn.LSTM`; `functional` has the functions under them; `detach_state` cuts the history
of a state; `convert_model` puts this package's layers into a model in place of PyTorch's, and back; `use_backend`
chooses a backend for a block of code; `plan` decides how the Triton kernels are launched.
"""

from typing import TYPE_CHECKING

from novolstm_triton import cells, functional, moved
from novolstm_triton import plans as plan
from novolstm_triton.convert import convert_model
from novolstm_triton.functional import use_backend
from novolstm_triton.layers.gru import GRU, GRUCell
from novolstm_triton.layers.layer import RecurrentLayer, detach_state
from novolstm_triton.layers.lstm import LSTM, LSTMCell
from novolstm_triton.layers.novolstm import NovoLSTM, NovoLSTMCell
from novolstm_triton.layers.per_sample import per_sample
from novolstm_triton.layers.rnn import RNN, RNNCell
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.layers.torch_lstm import TorchLSTM

moved.install()
# To a type checker it would say that any name is one of this package's.
if not TYPE_CHECKING:
    __getattr__ = moved.attribute

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "NovoLSTM",
    "NovoLSTMCell",
    "RNNCell",
    "RecurrentCell",
    "RecurrentLayer",
    "TorchLSTM",
    "cells",
    "convert_model",
    "detach_state",
    "functional",
    "per_sample",
    "plan",
    "use_backend",
]
