"""Gradients per sample: by a tool of hooks as Opacus has them, against one backward per sample."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

from novolstm_triton import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    LSTMCell,
    NovoLSTM,
    NovoLSTMCell,
    RecurrentCell,
    RecurrentLayer,
    RNNCell,
    TorchLSTM,
    per_sample,
)
from novolstm_triton.cells import CELLS

from .support.layers import B, H, I, both, layer, sequence, states
from .support.twins import tuple_of

# PyTorch says so of every first layer.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Hooked:
    """Gradients per sample of the modules that hold parameters, from the first of their inputs and outputs alone."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients: dict[nn.Parameter, Any] = {}
        self.inputs: dict[nn.Module, list[torch.Tensor]] = {}
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                stateless = copy.deepcopy(module).to("meta")
                module.ft_compute_sample_grad = torch.func.vmap(self.gradient_of(stateless), in_dims=(None, 0, 0))
                self.inputs[module] = []
                module.register_forward_hook(lambda m, args, _: self.inputs[m].append(args[0].detach()))
                module.register_full_backward_hook(self.collect)

    @staticmethod
    def gradient_of(stateless):
        def weighted(parameters, x, dy):
            return (torch.func.functional_call(stateless, parameters, (x.unsqueeze(0),)) * dy.unsqueeze(0)).sum()

        return torch.func.grad(weighted)

    def collect(self, module, _, outgoing):
        parameters = dict(module.named_parameters())
        x, detached = self.inputs[module].pop(), {name: p.detach() for name, p in parameters.items()}
        for name, gradient in module.ft_compute_sample_grad(detached, x, outgoing[0].detach()).items():
            self.gradients[parameters[name]] = gradient + self.gradients.get(parameters[name], 0)


class Model(nn.Module):
    """Calls a layer twice, with the state handed on; the loss of a sample depends on y and on both states."""

    def __init__(self, recurrent):
        super().__init__()
        self.blocks = nn.ModuleList([recurrent, nn.Linear(I, I)])

    def forward(self, x, hx=None, lengths=None):
        recurrent, first = self.blocks
        x = first(x.transpose(0, 1))
        x = x if recurrent.batch_first else x.transpose(0, 1)
        y, state = recurrent(x, hx, lengths=lengths)
        _, state = recurrent(x, state, lengths=lengths)
        y = y if recurrent.batch_first else y.transpose(0, 1)
        h, *others = tuple_of(state)
        return y.square().sum((1, 2)) + h.sin().sum((0, 2)) + sum(c.square().sum((0, 2)) for c in others)


class Steps(nn.Module):
    """Takes steps of a cell."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = self.cell(x[0])
        for x_t in x[1:]:
            state = self.cell(x_t, state)
        return sum(s.square().sum(1) + s.sin().sum(1) for s in tuple_of(state))


def one_by_one(model, *given):
    """Return the gradients of each parameter for each sample; `given` are functions of its number."""
    rows = [
        torch.autograd.grad(model(*(g(slice(b, b + 1)) for g in given)).sum(), list(model.parameters()))
        for b in range(B)
    ]
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


LAYERS = {
    "lstm": (LSTM, {}),
    "lstm-stacked-bidirectional": (LSTM, dict(num_layers=2, bidirectional=True, batch_first=True)),
    "lstm-projected": (LSTM, dict(proj_size=2, bias=False)),
    "formula": (NovoLSTM, dict(batch_first=True)),
    "notebook": (NovoLSTM, dict(variant="notebook", layer_norm="all", bidirectional=True)),
    "gru": (GRU, dict(num_layers=2, bidirectional=True)),
    "relu": (RNN, dict(nonlinearity="relu", batch_first=True, bias=False)),
    "peephole": (functools.partial(RecurrentLayer, CELLS["peephole"]), {}),
    "gru-reset-before": (functools.partial(RecurrentLayer, CELLS["gru_reset_before"]), dict(batch_first=True)),
}

KINDS = [LSTM, NovoLSTM, GRU, RNN, LSTMCell, NovoLSTMCell, GRUCell, RNNCell]
CELL_KINDS: dict[str, Any] = {kind.__name__: kind for kind in KINDS[4:]}
CELL_KINDS["peephole"] = functools.partial(RecurrentCell, CELLS["peephole"])


def input_of(module):
    """Return a sequence for a layer, and a step of it for a cell."""
    return sequence() if isinstance(module, RecurrentLayer) else sequence()[0]


@pytest.mark.parametrize("given", ["nothing", "states", "lengths"])
@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_gradients_of_a_layer_are_those_of_one_sample_after_the_other(kind, options, given):
    plain = Model(layer(kind, **options)).double()
    x = sequence(dtype=torch.float64)
    hx = states(plain.blocks[0], dtype=torch.float64) if given == "states" else None
    lengths = torch.tensor([5, 0, 2]) if given == "lengths" else None
    model = per_sample(copy.deepcopy(plain))
    torch.testing.assert_close(model(x, hx, lengths), plain(x, hx, lengths))
    hooked = Hooked(model)
    model(x, hx, lengths).sum().backward()
    expected = one_by_one(
        plain,
        lambda b: x[:, b],
        lambda b: None if hx is None else tree_map(lambda s: s[:, b], hx),
        lambda b: None if lengths is None else lengths[b],
    )
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(hooked.gradients[p], gradient, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(p.grad, gradient.sum(0))


@pytest.mark.parametrize("kind", CELL_KINDS.values(), ids=CELL_KINDS)
def test_gradients_of_a_cell_are_those_of_one_sample_after_the_other(kind):
    plain, x = Steps(kind(I, H)).double(), sequence(dtype=torch.float64)
    model = per_sample(copy.deepcopy(plain))
    hooked = Hooked(model)
    model(x).sum().backward()
    for p, gradient in zip(model.parameters(), one_by_one(plain, lambda b: x[:, b]), strict=True):
        torch.testing.assert_close(hooked.gradients[p], gradient)


@both
def test_long_lengths_are_exact_in_16_bits(kind):
    module, x = layer(kind, dtype=torch.bfloat16), sequence(300, dtype=torch.bfloat16)
    lengths = torch.tensor([300, 299, 257])
    expected = module(x, lengths=lengths)
    torch.testing.assert_close(per_sample(module)(x, lengths=lengths), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_model_keeps_parameters_names_and_type(kind):
    module = kind(I, H)
    before = dict(module.named_parameters())
    assert per_sample(module) is module
    assert per_sample(module) is module
    assert isinstance(module, kind)
    assert all(p is before[name] for name, p in module.named_parameters())
    x = input_of(module)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_module_as_it_is_refuses_in_words(kind):
    module = kind(I, H)
    Hooked(module)
    with pytest.raises(NotImplementedError, match=r"call novolstm_triton\.per_sample\(model\) first"):
        module(input_of(module))


REFUSED = {
    "dropout": (dict(num_layers=2, dropout=0.1), lambda m: m(sequence()), "expected no dropout"),
    "recurrent-dropout": (dict(recurrent_dropout=0.1), lambda m: m(sequence()), "expected no dropout"),
    "zoneout": (dict(zoneout_c=0.1), lambda m: m(sequence()), "expected no zoneout"),
    "unbatched": ({}, lambda m: m(sequence()[:, 0]), "expected a batched input"),
    "rank-4": ({}, lambda m: m(sequence().unsqueeze(0)), "expected a batched input"),
    "packed": ({}, lambda m: m(pack_padded_sequence(sequence(), torch.tensor([5, 3, 1]))), "got a PackedSequence"),
    "lengths": ({}, lambda m: m(sequence(), lengths=torch.tensor([6, 1, 1])), "lengths: expected values from 0 to 5"),
}


@pytest.mark.parametrize(("options", "call", "words"), REFUSED.values(), ids=REFUSED)
@both
def test_what_has_no_gradients_per_sample_is_refused(kind, options, call, words):
    with pytest.raises(ValueError, match=words):
        call(per_sample(layer(kind, **options)))


@both
def test_masks_of_training_do_no_harm_in_evaluation(kind):
    module = layer(kind, num_layers=2, dropout=0.5, zoneout_h=0.2).eval()
    expected = module(sequence())
    torch.testing.assert_close(per_sample(module)(sequence()), expected)


@pytest.mark.parametrize("model", [nn.Sequential(LSTM(I, H), TorchLSTM(I, H)), type("Own", (LSTM,), {})(I, H)])
def test_other_classes_are_refused_and_nothing_is_changed(model):
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="per_sample: expected one of"):
        per_sample(model)
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(TypeError, match=r"per_sample: expected an nn\.Module, got list"):
        per_sample([model])  # pyright: ignore[reportArgumentType]
