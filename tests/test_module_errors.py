"""What layers refuse: in the very words of PyTorch's where these have a check, in words of their own elsewhere."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from novolstm_triton import GRU, RNN, NovoLSTM

from .support.layers import B, H, I, T, both

MESSAGES = (RuntimeError, ValueError, TypeError, AttributeError)


def zeros(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(sizes, dtype=dtype, device=device)


def pair(*sizes: int, **options) -> tuple[Tensor, Tensor]:
    return zeros(*sizes, **options), zeros(*sizes, **options)


X = zeros(T, B, I)

SHARED = {
    "input_size-zero": lambda cls: cls(0, H),
    "input_size-negative": lambda cls: cls(-1, H),
    "input_size-float": lambda cls: cls(4.0, H),
    "input_size-numpy": lambda cls: cls(np.int64(I), H),
    "hidden_size-zero": lambda cls: cls(I, 0),
    "hidden_size-text": lambda cls: cls(I, "6"),
    "num_layers-zero": lambda cls: cls(I, H, 0),
    "num_layers-negative": lambda cls: cls(I, H, -1),
    "bias-number": lambda cls: cls(I, H, bias=1),
    "bias-none": lambda cls: cls(I, H, bias=None),
    "batch_first-number": lambda cls: cls(I, H, batch_first=1),
    "dropout-large": lambda cls: cls(I, H, 2, dropout=1.5),
    "dropout-negative": lambda cls: cls(I, H, 2, dropout=-0.1),
    "dropout-bool": lambda cls: cls(I, H, 2, dropout=True),
    "dropout-nan": lambda cls: cls(I, H, 2, dropout=float("nan")),
    "proj_size-negative": lambda cls: cls(I, H, proj_size=-1),
    "proj_size-of-hidden": lambda cls: cls(I, H, proj_size=H),
    "several": lambda cls: cls(0, H, 0, bias=1, dropout=2),
    "integer-parameters": lambda cls: cls(I, H, dtype=torch.int64),
    "features": lambda cls: cls(I, H)(zeros(T, B, I + 1)),
    "unbatched-features": lambda cls: cls(I, H)(zeros(T, I + 1)),
    "rank-1": lambda cls: cls(I, H)(zeros(I)),
    "rank-4": lambda cls: cls(I, H)(zeros(1, T, B, I)),
    "no-steps": lambda cls: cls(I, H)(zeros(0, B, I)),
    "no-steps-B-first": lambda cls: cls(I, H, batch_first=True)(zeros(B, 0, I)),
    "no-steps-and-rows": lambda cls: cls(I, H)(zeros(0, 0, I)),
    "no-tensor": lambda cls: cls(I, H)([[1.0]]),
    "dtype": lambda cls: cls(I, H)(X.double()),
    "dtype-integer": lambda cls: cls(I, H)(X.long()),
    "dtype-half-parameters": lambda cls: cls(I, H, dtype=torch.float16)(X),
    "device": lambda cls: cls(I, H)(X.to("meta")),
    "device-of-parameters": lambda cls: cls(I, H, device="meta")(X),
    "h_0-units": lambda cls: cls(I, H)(X, (zeros(1, B, H + 1), zeros(1, B, H))),
    "h_0-rows": lambda cls: cls(I, H)(X, (zeros(1, B + 1, H), zeros(1, B, H))),
    "h_0-rows-B-first": lambda cls: cls(I, H, batch_first=True)(X, pair(1, B, H)),
    "h_0-layers": lambda cls: cls(I, H, 2)(X, pair(1, B, H)),
    "h_0-directions": lambda cls: cls(I, H, bidirectional=True)(X, pair(1, B, H)),
    "h_0-unprojected": lambda cls: cls(I, H, proj_size=2)(X, pair(1, B, H)),
    "c_0-units": lambda cls: cls(I, H)(X, (zeros(1, B, H), zeros(1, B, H + 1))),
    "c_0-layers": lambda cls: cls(I, H)(X, (zeros(1, B, H), zeros(2, B, H))),
    "c_0-projected": lambda cls: cls(I, H, proj_size=2)(X, pair(1, B, 2)),
    "state-rank": lambda cls: cls(I, H)(X, pair(B, H)),
    "states-of-two-ranks": lambda cls: cls(I, H)(X, (zeros(1, B, H), zeros(B, H))),
    "unbatched-state-rank": lambda cls: cls(I, H)(zeros(T, I), pair(1, B, H)),
    "unbatched-h_0-units": lambda cls: cls(I, H)(zeros(T, I), pair(1, H + 1)),
    "state-device": lambda cls: cls(I, H)(X, pair(1, B, H, device="meta")),
    "c_0-device": lambda cls: cls(I, H)(X, (zeros(1, B, H), zeros(1, B, H, device="meta"))),
}
"""What nn.LSTM refuses in words that say what to do."""


@pytest.mark.parametrize("attempt", SHARED.values(), ids=list(SHARED))
@both
def test_refused_in_the_words_of_nn_lstm(kind, attempt):
    with pytest.raises(MESSAGES) as theirs:
        attempt(nn.LSTM)
    with pytest.raises(theirs.type) as ours:
        attempt(kind)
    assert str(ours.value).replace("NovoLSTM", "LSTM") == str(theirs.value)


single_state = pytest.mark.parametrize(
    ("pytorchs", "ours"), [pytest.param(nn.GRU, GRU, id="GRU"), pytest.param(nn.RNN, RNN, id="RNN")]
)

SINGLE = {name: attempt for name, attempt in SHARED.items() if "_0" not in name and "state" not in name} | {
    "proj_size": lambda cls: cls(I, H, proj_size=2),
    "proj_size-zero": lambda cls: cls(I, H, proj_size=0),
    "h_0-units": lambda cls: cls(I, H)(X, zeros(1, B, H + 1)),
    "h_0-rows": lambda cls: cls(I, H)(X, zeros(1, B + 1, H)),
    "h_0-rows-B-first": lambda cls: cls(I, H, batch_first=True)(X, zeros(1, B, H)),
    "h_0-layers": lambda cls: cls(I, H, 2)(X, zeros(1, B, H)),
    "h_0-directions": lambda cls: cls(I, H, bidirectional=True)(X, zeros(1, B, H)),
    "state-rank": lambda cls: cls(I, H)(X, zeros(B, H)),
    "unbatched-state-rank": lambda cls: cls(I, H)(zeros(T, I), zeros(1, B, H)),
    "unbatched-h_0-units": lambda cls: cls(I, H)(zeros(T, I), zeros(1, H + 1)),
    "state-device": lambda cls: cls(I, H)(X, zeros(1, B, H, device="meta")),
}
"""What nn.GRU and nn.RNN refuse in words that say what to do."""


@pytest.mark.parametrize("attempt", SINGLE.values(), ids=list(SINGLE))
@single_state
def test_refused_in_the_words_of_nn_gru_and_nn_rnn(pytorchs, ours, attempt):
    with pytest.raises(MESSAGES) as theirs:
        attempt(pytorchs)
    with pytest.raises(theirs.type) as own:
        attempt(ours)
    # Of a rank nn.RNN says "tensor", and PyTorch's others do not.
    assert str(own.value) == str(theirs.value).replace("D tensor instead", "D instead")


def test_nonlinearity_is_refused_in_the_words_of_nn_rnn():
    with pytest.raises(ValueError, match="nonlinearity 'sigmoid'") as theirs:
        nn.RNN(I, H, nonlinearity="sigmoid")
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        RNN(I, H, nonlinearity="sigmoid")


SINGLE_OWN: dict[str, tuple] = {
    "state-pair": (lambda cls: cls(I, H)(X, pair(1, B, H)), TypeError, "state hx to be a Tensor, got tuple of"),
    "state-dtype": (
        lambda cls: cls(I, H)(X, zeros(1, B, H, dtype=torch.float64)),
        RuntimeError,
        "not the same dtype, found input tensor with Float and hidden tensor with Double",
    ),
    "zoneout_c": (lambda cls: cls(I, H, zoneout_c=0.1), TypeError, "zoneout_c"),
    "zoneout_h": (
        lambda cls: cls(I, H, zoneout_h=2),
        ValueError,
        "zoneout_h: expected a number in range [0, 1], got 2",
    ),
}


@pytest.mark.parametrize(("attempt", "error", "words"), SINGLE_OWN.values(), ids=list(SINGLE_OWN))
@single_state
def test_states_and_options_of_one_state_are_refused_in_our_own_words(pytorchs, ours, attempt, error, words):
    with pytest.raises(error, match=re.escape(words)):
        attempt(ours)


@both
def test_dropout_after_a_single_layer_warns_in_the_words_of_nn_lstm(kind):
    words = "dropout option adds dropout after all but last recurrent layer"
    with pytest.warns(UserWarning, match=words) as theirs:
        nn.LSTM(I, H, dropout=0.5)
    with pytest.warns(UserWarning, match=words) as ours:
        kind(I, H, dropout=0.5)
    assert str(ours[0].message) == str(theirs[0].message)
    # It names the line of the call.
    assert ours[0].filename == __file__


def packed(*sizes: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_padded_sequence(zeros(*sizes, dtype=dtype), [T, 3, 1])


LENGTHS = torch.tensor([T, 3, 1])

OWN: dict[str, tuple] = {
    # nn.LSTM builds these; with some it then fails at the first call.
    "input_size-bool": (lambda cls: cls(True, H), TypeError, "input_size should be of type int, got: bool"),
    "num_layers-bool": (lambda cls: cls(I, H, True), TypeError, "num_layers should be of type int, got: bool"),
    "num_layers-float": (lambda cls: cls(I, H, 1.5), TypeError, "num_layers should be of type int, got: float"),
    "bidirectional-number": (
        lambda cls: cls(I, H, bidirectional=1),
        TypeError,
        "bidirectional should be of type bool, got: int",
    ),
    # nn.LSTM computes with complex numbers.
    "complex": (
        lambda cls: cls(I, H, dtype=torch.complex64)(zeros(T, B, I, dtype=torch.complex64)),
        TypeError,
        "x: expected a floating dtype of at least 16 bits, got torch.complex64",
    ),
    # nn.LSTM says that an index is out of range, or less.
    "state-one-tensor": (
        lambda cls: cls(I, H)(X, zeros(1, B, H)),
        TypeError,
        "hx to be a tuple (h_0, c_0), got a Tensor",
    ),
    "state-two-in-one": (lambda cls: cls(I, H)(X, zeros(2, B, H)), TypeError, "got a Tensor [2, 3, 6]"),
    "state-short": (lambda cls: cls(I, H)(X, (zeros(1, B, H),)), TypeError, "(h_0, c_0), got tuple of Tensor"),
    "state-long": (lambda cls: cls(I, H)(X, (X, X, X)), TypeError, "got tuple of Tensor, Tensor, Tensor"),
    "state-half": (lambda cls: cls(I, H)(X, (zeros(1, B, H), None)), TypeError, "got tuple of Tensor, NoneType"),
    # On a CPU nn.LSTM says what oneDNN does not support.
    "state-dtype": (
        lambda cls: cls(I, H)(X, pair(1, B, H, dtype=torch.float64)),
        RuntimeError,
        "not the same dtype, found input tensor with Float and hidden tensor with Double",
    ),
    # nn.LSTM leaves packed input and its states to the product of matrices.
    "packed-features": (lambda cls: cls(I, H)(packed(T, B, I + 1)), RuntimeError, "Expected 4, got 5"),
    "packed-dtype": (
        lambda cls: cls(I, H)(packed(T, B, I, dtype=torch.float64)),
        ValueError,
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)",
    ),
    "packed-rank": (lambda cls: cls(I, H)(packed(T, B)), RuntimeError, "input must have 2 dimensions, got 1"),
    "packed-rows": (
        lambda cls: cls(I, H)(packed(T, B, I), pair(1, B + 1, H)),
        RuntimeError,
        "Expected hidden[0] size (1, 3, 6), got [1, 4, 6]",
    ),
    "packed-state-rank": (
        lambda cls: cls(I, H)(packed(T, B, I), pair(B, H)),
        RuntimeError,
        "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors",
    ),
    # nn.LSTM has none of these options.
    "packed-and-lengths": (
        lambda cls: cls(I, H)(packed(T, B, I), lengths=LENGTHS),
        ValueError,
        "lengths: a PackedSequence has its own, expected None",
    ),
    "unbatched-and-lengths": (
        lambda cls: cls(I, H)(zeros(T, I), lengths=LENGTHS),
        ValueError,
        "lengths: expected batched input beside it, got an unbatched sequence",
    ),
    "lengths-too-long": (
        lambda cls: cls(I, H)(X, lengths=LENGTHS + 1),
        ValueError,
        "lengths: expected values from 0 to 5, got 2 to 6",
    ),
    "lengths-of-fewer-rows": (
        lambda cls: cls(I, H, batch_first=True)(X, lengths=LENGTHS),
        ValueError,
        "lengths: expected shape [5], got [3]",
    ),
    "lengths-list": (
        lambda cls: cls(I, H)(X, lengths=[T, 3, 1]),
        TypeError,
        "lengths: expected an integer Tensor, got list",
    ),
    "backend": (lambda cls: cls(I, H, backend="cuda"), ValueError, "backend: expected one of"),
    "recurrent_dropout-one": (
        lambda cls: cls(I, H, recurrent_dropout=1.0),
        ValueError,
        "recurrent_dropout: expected a number in range [0, 1), got 1.0",
    ),
    "zoneout": (
        lambda cls: cls(I, H, zoneout_c=1.5),
        ValueError,
        "zoneout_c: expected a number in range [0, 1], got 1.5",
    ),
    "projected-zoneout": (
        lambda cls: cls(I, H, proj_size=2, zoneout_h=0.1),
        ValueError,
        "proj_size: a projected layer has no recurrent_dropout and no zoneout",
    ),
}


@pytest.mark.parametrize(("attempt", "error", "words"), OWN.values(), ids=list(OWN))
@both
def test_refused_in_our_own_words(kind, attempt, error, words):
    with pytest.raises(error, match=re.escape(words)):
        attempt(kind)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param(
            dict(variant="paper"),
            ValueError,
            "variant: expected one of ['formula', 'notebook'], got 'paper'",
            id="variant",
        ),
        pytest.param(
            dict(layer_norm="none"), ValueError, "layer_norm: expected one of ['all', 'input_gate']", id="layer_norm"
        ),
        pytest.param(
            dict(gate_gain="large"),
            ValueError,
            "gate_gain: expected a finite number or \"hidden\", got 'large'",
            id="gate_gain",
        ),
        pytest.param(
            dict(gate_gain=True),
            TypeError,
            'gate_gain: expected a finite number or "hidden", got True',
            id="gate_gain-bool",
        ),
    ],
)
def test_bad_options_of_novolstm(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        NovoLSTM(I, H, **options)
