"""What public code does with an nn.LSTM besides calling it, done with this library's layers."""

from typing import Any

import pytest
import torch
from torch import nn

from novolstm_triton import LSTM, LSTMCell, NovoLSTM, NovoLSTMCell

from .support.layers import B, H, I, both, layer, sequence

SHAPES = {
    "plain": {},
    "stacked-bidirectional": dict(num_layers=2, bidirectional=True),
    "projected": dict(proj_size=2),
    "without-bias": dict(bias=False),
}


def pair(**options) -> tuple[Any, Any]:
    """Return an nn.LSTM and the LSTM with its parameters."""
    theirs = nn.LSTM(I, H, **options)
    return theirs, LSTM.from_torch(theirs)


def open_forget_gates(module):
    for names in module._all_weights:
        for name in filter(lambda n: "bias" in n, names):
            bias = getattr(module, name)
            bias.data[bias.size(0) // 4 : bias.size(0) // 2].fill_(1.0)


def initialise_by_flat_names(module):
    for name in module._flat_weights_names:
        if "weight" in name:
            nn.init.constant_(module._parameters[name], 0.01 * len(name))


def initialise_by_all_weights(module):
    for weights in module.all_weights:
        for weight in weights:
            weight.data.mul_(0.5)


def initialise_in_place(module):
    module.weight_hh_l0.data.copy_(torch.eye(H).repeat(4, 1))
    module.bias_ih_l0.data[H : 2 * H] = 1


def halve_flat_weights(module):
    for weight in module._flat_weights:
        weight.data.mul_(0.5)


def replace_a_parameter(module):
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0 * 2)


def shrink(module):
    """Prune units, as tools for structured pruning do: smaller parameters and the size beside them."""
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        kept = getattr(module, name).detach().unflatten(0, (4, H))[:, : H - 1].flatten(0, 1)
        kept = kept[:, : H - 1] if name == "weight_hh_l0" else kept
        setattr(module, name, nn.Parameter(kept.clone()))
    module.hidden_size = H - 1


def turn_batch_first(module):
    module.batch_first = True


def silence_flatten(module):
    module.flatten_parameters = lambda: None


INITIALISED = [open_forget_gates, initialise_by_flat_names, initialise_by_all_weights, initialise_in_place]
INITIALISED += [halve_flat_weights, replace_a_parameter, shrink, turn_batch_first, silence_flatten]


@pytest.mark.parametrize("idiom", INITIALISED, ids=lambda idiom: idiom.__name__)
def test_idiom_does_what_it_does_to_nn_lstm(idiom):
    theirs, ours = pair()
    before = {name: p.clone() for name, p in ours.named_parameters()}
    for module in (theirs, ours):
        idiom(module)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(p, ours.get_parameter(name)) for name, p in theirs.named_parameters())
    if idiom not in (turn_batch_first, silence_flatten):
        assert any(p.shape != before[name].shape or not p.equal(before[name]) for name, p in ours.named_parameters())
    x = torch.randn(B, B, I)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_lists_of_weights_are_those_of_nn_lstm(options):
    theirs, ours = pair(**options)
    for name in ("mode", "_all_weights", "_flat_weights_names"):
        assert getattr(ours, name) == getattr(theirs, name)
    for mine, other in zip(ours._flat_weights, theirs._flat_weights, strict=True):
        assert torch.equal(mine, other)
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_lists_of_novolstm_have_its_own_parameters():
    module = NovoLSTM(I, H, num_layers=2)
    assert module.mode == "NovoLSTM"
    assert module._flat_weights_names == list(dict(module.named_parameters()))
    assert [len(names) for names in module._all_weights] == [6, 6]


@both
def test_a_list_of_weights_cannot_be_set(kind):
    module = layer(kind)
    with pytest.raises(AttributeError, match=r"_flat_weights: .* reads its parameters by name"):
        module._flat_weights = list(module.parameters())


@pytest.mark.parametrize("kind", [LSTM, NovoLSTM, LSTMCell, NovoLSTMCell])
def test_a_third_positional_argument_is_refused_in_words(kind):
    module = kind(I, H)
    with pytest.raises(TypeError, match=r"expected input and hx, got 3 positional arguments; .* lengths="):
        module(sequence(), None, torch.tensor([1, 2, 3]))


def test_fewer_layers_are_the_lower_ones():
    theirs, ours = pair(num_layers=3)
    for module in (theirs, ours):
        module.num_layers = 2
    torch.testing.assert_close(ours(sequence()), theirs(sequence()))


@both
def test_dropout_may_be_changed(kind):
    module = layer(kind, num_layers=2)
    before = module(sequence())[0]
    module.dropout = 0.9
    assert not torch.equal(module(sequence())[0], before)
    assert torch.equal(module.eval()(sequence())[0], before)


CHANGED = {
    "hidden_size": (7, "hidden_size=7, proj_size=0: expected the sizes of the parameters"),
    "proj_size": (2, "hidden_size=6, proj_size=2: expected the sizes of the parameters"),
    "num_layers": (3, "num_layers: expected 1 to 2, with which the layer was built, got 3"),
    "bidirectional": (True, "bidirectional: expected False, with which the layer was built, got True"),
    "bias": (False, "bias: expected True, with which the layer was built, got False"),
}


@pytest.mark.parametrize(("name", "change"), CHANGED.items(), ids=list(CHANGED))
@pytest.mark.parametrize("given", ["padded", "packed", "step"])
@both
def test_what_the_parameters_are_made_for_cannot_be_changed(kind, name, change, given):
    module, (value, words) = layer(kind, num_layers=2), change
    setattr(module, name, value)
    x: Any = sequence()
    x = (
        nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]))
        if given == "packed"
        else x[:1]
        if given == "step"
        else x
    )
    with pytest.raises(ValueError, match=words):
        module(x)


@both
def test_a_projection_cannot_be_taken_away(kind):
    module = layer(kind, proj_size=2)
    module.proj_size = 0
    with pytest.raises(ValueError, match="hidden_size=6, proj_size=0: expected the sizes of the parameters"):
        module(sequence())


@pytest.mark.parametrize("kind", [LSTMCell, NovoLSTMCell])
def test_size_of_a_cell_cannot_be_changed(kind):
    cell = kind(I, H)
    cell.hidden_size = 7
    with pytest.raises(ValueError, match=r"hidden_size=7, .* expected the sizes of the parameters"):
        cell(torch.randn(B, I))
