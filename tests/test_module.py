"""Layers as modules: their parameters and their options.

What they compute is in `test_matrix.py` and `test_module_calls.py`, what becomes of their weights in
`test_module_weights.py`, what they refuse in `test_module_errors.py`.
"""

import numpy as np
import pytest
import torch
from torch import nn

from novolstm_triton import LSTM, NovoLSTM
from novolstm_triton.layers import regularisers

from .support.layers import B, H, I, T, both, layer, sequence
from .support.twins import NO_ONEDNN, differentiate

pytestmark = pytest.mark.filterwarnings(NO_ONEDNN)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "bidirectional"])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_lstm_starts_as_nn_lstm(bias, proj_size, bidirectional):
    options = dict(num_layers=2, bias=bias, proj_size=proj_size, bidirectional=bidirectional)
    ours = layer(LSTM, **options)
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_parameters_of_novolstm_carry_the_names_of_nn_lstm(bias):
    options = dict(num_layers=2, bidirectional=True, bias=bias, proj_size=2)
    ours, theirs = NovoLSTM(I, H, **options).state_dict(), nn.LSTM(I, H, **options).state_dict()
    assert [name for name in ours if not name.startswith("ln_")] == list(theirs)
    assert sum(name.startswith("ln_") for name in ours) == 8
    for name, tensor in theirs.items():
        rows = 2 if name.startswith("weight_hr") else 5 * H
        assert ours[name].shape == (rows, *tensor.shape[1:])


@pytest.mark.parametrize(("layer_norm", "blocks"), [("input_gate", 1), ("all", 4)])
def test_softmax_of_the_notebook_has_no_recurrent_block(layer_norm, blocks):
    parameters = NovoLSTM(I, H, variant="notebook", layer_norm=layer_norm).named_parameters()
    assert {name: tuple(p.shape) for name, p in parameters} == {
        "weight_ih_l0": (5 * H, I),
        "weight_hh_l0": (4 * H, H),
        "bias_ih_l0": (5 * H,),
        "bias_hh_l0": (4 * H,),
        "ln_weight_l0": (blocks * H,),
        "ln_bias_l0": (blocks * H,),
    }


def test_initialisation_is_that_of_nn_lstm_with_an_identity_norm():
    bound = 1 / 8
    for name, parameter in NovoLSTM(64, 64).named_parameters():
        if name.startswith("ln_weight"):
            assert (parameter == 1).all()
        elif name.startswith("ln_bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


@both
def test_all_weights_are_listed_as_in_nn_lstm(kind):
    options = dict(num_layers=2, bidirectional=True, proj_size=2)
    ours, theirs = layer(kind, **options), nn.LSTM(I, H, **options)
    names = {id(p): name for owner in (ours, theirs) for name, p in owner.named_parameters()}
    listed, expected = ([[names[id(p)] for p in weights] for weights in owner.all_weights] for owner in (ours, theirs))
    assert [[name for name in weights if not name.startswith("ln_")] for weights in listed] == expected
    assert sorted(name for weights in listed for name in weights) == sorted(ours.state_dict())


@both
def test_flatten_parameters_changes_nothing(kind):
    module, x = layer(kind), sequence()
    before = module(x)[0]
    module.flatten_parameters()
    assert torch.equal(module(x)[0], before)


@both
def test_numpy_numbers_are_taken_where_nn_lstm_takes_them(kind):
    options = dict(num_layers=np.int64(2), proj_size=np.int32(2), dropout=np.float32(0.5))
    ours, theirs = kind(I, H, **options), nn.LSTM(I, H, **options)
    assert repr(ours) == repr(theirs).replace("LSTM", kind.__name__)
    assert [type(value) for value in (ours.num_layers, ours.proj_size, ours.dropout)] == [int, int, float]


def test_repr_shows_what_is_not_default():
    assert repr(NovoLSTM(I, H)) == f"NovoLSTM({I}, {H})"
    shown = repr(NovoLSTM(I, H, num_layers=2, variant="notebook", gate_gain="hidden", zoneout_c=0.25))
    assert shown == f"NovoLSTM({I}, {H}, num_layers=2, zoneout_c=0.25, variant='notebook', gate_gain='hidden')"


def test_gate_gain_hidden_means_the_number_of_units():
    hidden, number, plain = (layer(NovoLSTM, gate_gain=gain)(sequence())[0] for gain in ("hidden", float(H), 1.0))
    assert torch.equal(hidden, number)
    assert not torch.equal(hidden, plain)


@both
def test_dropout_lies_between_layers_and_only_in_training(kind):
    dropping, plain, x = layer(kind, num_layers=2, dropout=0.5), layer(kind, num_layers=2), sequence()
    assert not torch.equal(dropping(x)[0], dropping(x)[0])
    # The first layer's state is before any dropout.
    torch.testing.assert_close(dropping(x)[1][0][0], plain(x)[1][0][0])
    torch.testing.assert_close(dropping.eval()(x)[0], plain(x)[0])


@both
def test_dropout_of_everything_leaves_the_second_layer_its_bias(kind):
    module, x = layer(kind, num_layers=2, dropout=1), sequence()
    results = differentiate(module, x)
    torch.testing.assert_close(results["y"], module(torch.zeros_like(x))[0])
    assert not results["grad weight_ih_l1"].any()


MASKED = {"recurrent_dropout": (2, B, H), "zoneout_h": (T, B, 2 * H), "zoneout_c": (T, B, 2 * H)}
"""Regularisers, and the shape of a layer's masks in two directions: one for a sequence, or one for every step."""


@pytest.mark.parametrize(("option", "shape"), MASKED.items(), ids=list(MASKED))
@both
def test_masks_are_drawn_once_per_layer_and_call_in_training(kind, option, shape, monkeypatch):
    drawn = []
    for name in ("draw_dropout_mask", "draw_zoneout_mask"):
        draw = getattr(regularisers, name)
        recording = lambda *a, draw=draw: drawn.append(draw(*a)) or drawn[-1]  # noqa: E731
        monkeypatch.setattr(f"novolstm_triton.layers.layer.{name}", recording)
    masked, x = layer(kind, num_layers=2, bidirectional=True, **{option: 0.5}), sequence()
    assert not torch.equal(masked(x)[0], masked(x)[0])
    assert [tuple(mask.shape) for mask in drawn] == [shape] * 4
    assert torch.equal(masked.eval()(x)[0], masked(x)[0])
    assert len(drawn) == 4


@both
def test_backward_works_in_eval_mode(kind):
    module = layer(kind).eval()
    module(sequence())[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
