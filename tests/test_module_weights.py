"""What may become of a layer's weights: copies, files, the meta device, functional calls, parametrizations."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

from novolstm_triton import LSTM, LSTMCell, NovoLSTM, NovoLSTMCell

from .support.layers import T, both, layer, sequence, states

LAYERS = [
    pytest.param(LSTM, dict(num_layers=2, bidirectional=True), id="lstm"),
    pytest.param(LSTM, dict(batch_first=True, bias=False, proj_size=2), id="lstm-projected"),
    pytest.param(NovoLSTM, dict(recurrent_dropout=0.2, zoneout_c=0.1), id="formula"),
    pytest.param(NovoLSTM, dict(variant="notebook", layer_norm="all", ln_eps=0.1, num_layers=2), id="notebook-all"),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_copies_are_equal_and_independent(kind, options):
    original, x = layer(kind, **options).eval(), sequence()
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    loaded = layer(kind, seed=1, **options).eval()
    loaded.load_state_dict(original.state_dict())
    remade = kind.__new__(kind)
    remade.__setstate__(copy.deepcopy(original.__dict__))
    twins = [copy.deepcopy(original), pickle.loads(pickle.dumps(original)), torch.load(file, weights_only=False)]
    expected = original(x)[0]
    with torch.no_grad():
        next(original.parameters()).zero_()
    for twin in (*twins, loaded, remade):
        assert repr(twin) == repr(original)
        assert torch.equal(twin(x)[0], expected)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_meta_device_gives_shapes(kind, options):
    # As many rows as steps, whichever comes first.
    real, x = layer(kind, **options), sequence(T, T)
    hx = states(real, T)
    y, (h_n, c_n) = real(x, hx)
    planned = layer(kind, **options, device="meta")
    on_meta, meta_states = planned(x.to("meta"), tuple(s.to("meta") for s in hx))
    for mine, other in zip((on_meta, *meta_states), (y, h_n, c_n), strict=True):
        assert mine.is_meta
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_functional_call_takes_other_parameters(kind, options):
    module, other, x = layer(kind, **options).eval(), layer(kind, seed=1, **options).eval(), sequence()
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y = torch.func.functional_call(module, weights, (x,))[0]
    expected = other(x)[0]
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), list(weights.values()))
    expected = torch.autograd.grad(expected.square().sum(), list(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


CHANGED = {
    "weight-norm": parametrizations.weight_norm,
    "spectral-norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
@both
def test_parametrized_weights_are_used_and_trained(kind, change):
    # In training every look at a spectral norm's weight changes it.
    changed, plain, x = change(layer(kind).eval(), "weight_hh_l0"), layer(kind), sequence()
    plain.load_state_dict({name: getattr(changed, name) for name in plain.state_dict()})
    before = changed(x)[0]
    torch.testing.assert_close(before, plain(x)[0])
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.5)
    before.square().sum().backward()
    assert all(p.grad.any() for name, p in changed.named_parameters() if "weight_hh" in name)
    optimizer.step()
    assert not torch.equal(changed(x)[0], before)


class Counted(nn.Module):
    """Counts how often a weight is computed."""

    looks = 0

    def forward(self, weight):
        self.looks += 1
        return weight * 1


CALLED = {
    "lstm": lambda: LSTM(4, 6),
    "lstm-stacked-bidirectional": lambda: LSTM(4, 6, num_layers=2, bidirectional=True),
    "lstm-projected": lambda: LSTM(4, 6, proj_size=2),
    "formula-without-bias": lambda: NovoLSTM(4, 6, bias=False),
    "notebook-all-bidirectional": lambda: NovoLSTM(4, 6, bidirectional=True, variant="notebook", layer_norm="all"),
    "lstm-cell": lambda: LSTMCell(4, 6),
    "formula-cell-without-bias": lambda: NovoLSTMCell(4, 6, bias=False),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("make", CALLED.values(), ids=CALLED)
def test_every_parametrization_is_computed_once_per_call(make, compiled):
    module = make()
    counters = {name: Counted() for name, _ in module.named_parameters()}
    for name, counted in counters.items():
        parametrize.register_parametrization(module, name, counted)
    torch._dynamo.reset()
    call = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    x = sequence()
    x = x[0] if isinstance(module, (LSTMCell, NovoLSTMCell)) else x
    # The first call traces.
    for _ in range(2):
        for counted in counters.values():
            counted.looks = 0
        call(x)
        assert {name: counted.looks for name, counted in counters.items()} == dict.fromkeys(counters, 1)


@both
def test_every_parametrization_is_computed_once_per_packed_call(kind):
    module, counted = layer(kind), Counted()
    parametrize.register_parametrization(module, "weight_ih_l0", counted)
    counted.looks = 0
    module(pack_padded_sequence(sequence(), torch.tensor([5, 3, 1])))
    assert counted.looks == 1
