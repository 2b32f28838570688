"""GRU and RNN called in every way in which nn.GRU and nn.RNN are: the same parameters, results and gradients."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import novolstm_triton
from novolstm_triton import use_backend

from .support.layers import B, H, I, T, sequence
from .support.twins import OURS, assert_close, copied, differentiate, ours_like, running_on

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, dict(nonlinearity="relu")),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": dict(bias=False),
    "stacked-bidirectional": dict(num_layers=2, bidirectional=True),
    "B-first": dict(batch_first=True, bidirectional=True),
}
LENGTHS = torch.tensor([3, T, 1])

kinds = pytest.mark.parametrize("name", KINDS)
layers = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def theirs_of(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    kind, own = KINDS[name]
    return kind(I, H, **own, **options)


def given(theirs: Any, steps: int = T) -> tuple:
    """Return an input and a state, to be differentiated."""
    x = sequence(steps, dtype=theirs.weight_ih_l0.dtype)
    x = (x.transpose(0, 1) if theirs.batch_first else x).requires_grad_()
    layers = theirs.num_layers * (2 if theirs.bidirectional else 1)
    generator = torch.Generator().manual_seed(2)
    return x, torch.randn(layers, B, H, generator=generator, dtype=x.dtype).requires_grad_()


@kinds
@layers
def test_a_seed_draws_the_same_and_state_dicts_fit(name, options):
    theirs = theirs_of(name, **options)
    torch.manual_seed(0)
    ours: Any = OURS[type(theirs)](I, H, **KINDS[name][1], **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.mode, ours._all_weights) == (theirs.mode, theirs._all_weights)
    theirs.load_state_dict({key: 2 * value for key, value in ours.state_dict().items()})
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@kinds
@layers
def test_results_and_gradients(name, options, backend):
    theirs = theirs_of(name, **options, dtype=torch.float64)
    ours = ours_like(theirs)
    for steps in (T, 1):
        x, h_0 = given(theirs, steps)
        for inputs in ((x, h_0), (x,)):
            with use_backend(backend):
                results = differentiate(ours, *copied(inputs))
            assert_close(results, differentiate(theirs, *copied(inputs)))


@kinds
def test_results_and_gradients_on_triton(name):
    theirs = theirs_of(name, bidirectional=True)
    inputs = given(theirs)
    with running_on("triton"):
        results = differentiate(ours_like(theirs), *copied(inputs))
    eager = differentiate(theirs, *copied(inputs))
    assert_close(results, differentiate(theirs.double(), *copied(inputs, torch.float64)), eager)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("in_order", [False, True], ids=["unsorted", "sorted"])
@kinds
def test_packed_sequences(name, in_order, backend):
    theirs = theirs_of(name, num_layers=2, bidirectional=True, dtype=torch.float64)
    ours, (x, h_0) = ours_like(theirs), given(theirs)
    lengths = LENGTHS.sort(descending=True).values if in_order else LENGTHS
    packed = pack_padded_sequence(x.detach(), lengths, enforce_sorted=in_order)
    packed.data.requires_grad_()
    for inputs in ((packed, h_0), (packed,)):
        with use_backend(backend):
            results = differentiate(ours, *copied(inputs))
        assert_close(results, differentiate(theirs, *copied(inputs)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@kinds
def test_lengths_do_what_packing_does(name, backend):
    theirs = theirs_of(name, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, h_0 = (a.detach() for a in given(theirs))
    packed, expected_h = theirs(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), h_0)
    expected, _ = pad_packed_sequence(packed, total_length=T)
    with use_backend(backend):
        y, h_n = ours_like(theirs)(x, h_0, lengths=LENGTHS)
    torch.testing.assert_close((y, h_n), (expected, expected_h))


@kinds
def test_a_step_is_a_sequence_of_one(name):
    ours = ours_like(theirs_of(name, num_layers=2))
    x, h_0 = (a.detach() for a in given(ours))
    whole, last = ours(x, h_0)
    state = h_0
    for x_t, expected in zip(x, whole, strict=True):
        y, state = ours.step(x_t, state)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, last)


@kinds
def test_dropout_draws_the_masks_of_pytorch(name):
    theirs = theirs_of(name, num_layers=3, dropout=0.5)
    ours, (x, h_0) = ours_like(theirs), given(theirs)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        results.append(layer(x, h_0)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["GRUCell", "RNNCell"])
def test_a_seed_draws_the_same_cell(name):
    for options in ({}, dict(bias=False), dict(nonlinearity="relu") if name == "RNNCell" else {}):
        torch.manual_seed(0)
        theirs = getattr(nn, name)(I, H, **options)
        torch.manual_seed(0)
        ours = getattr(novolstm_triton, name)(I, H, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("steps", [1, T])
def test_a_nonlinearity_set_on_a_layer_counts_everywhere(steps, backend):
    expected = ours_like(theirs_of("relu"))
    ours = ours_like(theirs_of("tanh"))
    ours.nonlinearity = "relu"
    assert (ours.nonlinearity, ours.mode, repr(ours)) == ("relu", "RNN_RELU", repr(expected))
    x, h_0 = given(ours, steps)
    with use_backend(backend):
        results = ours(x, h_0)
    torch.testing.assert_close(results, expected(x, h_0))
    torch.testing.assert_close(ours.to_torch()(x, h_0), expected(x, h_0))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_a_nonlinearity_set_on_a_cell_counts_as_in_pytorch(backend):
    theirs, ours = nn.RNNCell(I, H), novolstm_triton.RNNCell(I, H)
    ours.load_state_dict(theirs.state_dict())
    ours.nonlinearity = theirs.nonlinearity = "relu"
    x = sequence(1)[0]
    with use_backend(backend):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
@pytest.mark.parametrize("wrong", ["sigmoid", None, ["relu"]], ids=["name", "none", "list"])
def test_other_nonlinearities_are_refused(kind, wrong):
    kind = getattr(novolstm_triton, kind)
    words = re.escape(f"Unknown nonlinearity '{wrong}'. Select from 'tanh' or 'relu'.")
    with pytest.raises(ValueError, match=words):
        kind(I, H, nonlinearity=wrong)
    module = kind(I, H)
    with pytest.raises(ValueError, match=words):
        module.nonlinearity = wrong
    assert module.nonlinearity == "tanh"
