"""Models that hold a layer in more places than their tree of modules: none goes on calling the old one."""

import collections
import dataclasses
import functools
import gc
import itertools
import types
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from novolstm_triton import LSTM, convert_model
from novolstm_triton.convert.references import References

from .support.layers import H, I, sequence


class Named(NamedTuple):
    layer: Any


@dataclasses.dataclass
class Data:
    layer: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    layer: Any


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def with_defaults(layer):
    return lambda x, layer=layer: layer(x)


def with_keyword_default(layer):
    def call(x, *, layer=layer):
        return layer(x)

    return call


def with_closure(layer):
    return lambda x: layer(x)


def with_nested_closure(layer):
    inner = with_closure(layer)
    return lambda x: inner(x)


def with_itself(layer):
    def call(x, again=True):
        return call(x, False) if again else layer(x)

    return call


def with_empty_cell(layer):
    def call(x):
        return layer(x) if x is not None else later

    if layer is None:
        later = 1
    return call


def with_attribute(layer):
    def call(x):
        return vars(call)["layer"](x)

    vars(call)["layer"] = layer
    return call


class Key:
    """Calls what it finds as the key of a dictionary, or as the only element of a set."""

    def __init__(self, elements):
        self.elements = elements

    def __call__(self, x):
        (element,) = self.elements
        return element(x)


HOLDERS = {
    "list": lambda layer: [layer][0:],
    "dict": lambda layer: {0: layer},
    "ordered": lambda layer: collections.OrderedDict([(0, layer)]),
    "deque": lambda layer: collections.deque([layer]),
    "tuple": lambda layer: (layer,),
    "nested": lambda layer: [({0: [(layer, 1)]},)][0][0],
    "named": Named,
    "key": lambda layer: Key({layer: 1}),
    "set": lambda layer: Key({layer}),
    "frozenset": lambda layer: Key(frozenset({layer})),
    "dataclass": lambda layer: Data(layer),
    "frozen": lambda layer: Frozen(layer),
    "slots": Slotted,
    "bound": lambda layer: layer.forward,
    "bound-call": lambda layer: (layer.__call__,),
    "bound-of-holder": lambda layer: Slotted(layer).__call__,
    "partial": lambda layer: functools.partial(layer),
    "partial-bound": lambda layer: functools.partial(layer.forward),
    "partial-argument": lambda layer: functools.partial(lambda layer, x: layer(x), layer),
    "partial-keyword": lambda layer: functools.partial(lambda x, layer: layer(x), layer=layer),
    "closure": with_closure,
    "nested-closure": with_nested_closure,
    "recursive": with_itself,
    "empty-cell": with_empty_cell,
    "partial-in-closure": lambda layer: with_closure(functools.partial(layer)),
    "partial-argument-in-closure": lambda layer: with_closure(
        functools.partial(lambda x, layer: layer(x), layer=layer)
    ),
    "bound-in-closure": lambda layer: with_closure(layer.forward),
    "tuple-in-closure": lambda layer: with_closure((lambda pair: lambda x: pair[0](x))((layer, 1))),
    "default": with_defaults,
    "keyword-default": with_keyword_default,
    "function-attribute": with_attribute,
    "mapping": lambda layer: types.MappingProxyType({0: layer}),
    "weak": weakref.ref,
    "weak-key": lambda layer: Key(weakref.WeakKeyDictionary({layer: 1})),
}
SHARED = {"mapping"}
"""What a deep copy refuses."""


def call(held: Any, x: torch.Tensor) -> Any:
    """Find the layer in what a model holds, and call it."""
    while not callable(held) or isinstance(held, weakref.ref):
        if isinstance(held, weakref.ref):
            held = held()
        elif hasattr(held, "layer"):
            held = held.layer
        else:
            held = held[0]
    return held(x)


class Model(nn.Module):
    """Has a layer as a module, and calls it by another way."""

    def __init__(self, holder=None):
        super().__init__()
        self.lstm = nn.LSTM(I, H)
        self.held = None if holder is None else holder(self.lstm)

    def forward(self, x):
        return call(self.held, x)[0]


def model(holder: Any = None) -> Any:
    torch.manual_seed(0)
    return Model(holder)


def refuse(*args: Any) -> Any:
    raise AssertionError("an nn.LSTM was called")


def assert_gone(old: weakref.ref[Any]) -> None:
    """Require that nothing whatever holds an object."""
    if old() is not None:
        gc.collect()
    assert old() is None


@pytest.mark.parametrize("name", HOLDERS)
def test_every_reference_is_replaced(name, monkeypatch):
    net, x = model(HOLDERS[name]), sequence()
    expected, old = net(x), weakref.ref(net.lstm)
    _, report = convert_model(net, inplace=True, verbose=False)
    assert [entry.note for entry in report.entries] == ["same function"]
    monkeypatch.setattr(nn.LSTM, "forward", refuse)
    torch.testing.assert_close(net(x), expected)
    assert_gone(old)


@pytest.mark.parametrize("name", [name for name in HOLDERS if name not in SHARED])
def test_copy_calls_its_own(name, monkeypatch):
    net, x = model(HOLDERS[name]), sequence()
    expected = net(x)
    converted, report = convert_model(net, verbose=False)
    assert [entry.note for entry in report.entries] == ["same function"]
    assert torch.equal(net(x), expected)
    # The copy calls none of the original's layers, whose forward this is; nor does it look at its weights.
    monkeypatch.setattr(nn.LSTM, "forward", refuse)
    with torch.no_grad():
        net.lstm.weight_ih_l0.zero_()
    torch.testing.assert_close(converted(x), expected)
    assert not any(isinstance(held, nn.LSTM) for held in References(converted).reached.values())


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_closures_share_what_they_shared(inplace):
    calls, count = [], 0
    net: Any = model()

    def counted(x):
        nonlocal count
        count += 1
        calls.append(x)
        return net.lstm(x)

    net.held = counted
    converted, _ = convert_model(net, inplace=inplace, verbose=False)
    converted(sequence())
    assert (count, len(calls)) == (1, 1)
    assert converted.held.__qualname__ == counted.__qualname__


def test_hooks_of_other_modules_call_the_new_layer(monkeypatch):
    net, x = nn.Sequential(nn.Linear(I, I), nn.LSTM(I, H)), sequence()

    def hook(layer):
        return lambda module, args, output: layer(output)[0][..., :I]

    net[0].register_forward_hook(hook(net[1]))
    expected = net(x)[0]
    for inplace in (False, True):
        converted, report = convert_model(net, inplace=inplace, verbose=False)
        assert len(report.converted) == 1
        with monkeypatch.context() as patch:
            patch.setattr(nn.LSTM, "forward", refuse)
            torch.testing.assert_close(converted(x)[0], expected)


def enclosing() -> Model:
    """Return a model whose class calls a layer in its closure."""
    layer = nn.LSTM(I, H)

    class Enclosing(Model):
        def forward(self, x):
            return layer(x)[0]

    net = Enclosing()
    net.lstm = layer
    return net


def test_methods_with_a_layer_in_their_closure():
    net, x = enclosing(), sequence()
    expected, old = net(x), weakref.ref(net.lstm)
    convert_model(net, inplace=True, verbose=False)
    assert_gone(old)
    torch.testing.assert_close(net(x), expected)
    # A copy is of the same class.
    with pytest.raises(
        ValueError, match=r"lstm of the original, at \(class Enclosing\)\.forward\(layer\); use inplace=True"
    ):
        convert_model(enclosing(), verbose=False)


def test_global_variables_that_a_model_calls():
    scope: dict[str, Any] = {"layer": nn.LSTM(I, H)}
    net, x = model(), sequence()
    exec("def call(x):\n    return [layer(y) for y in [x]][0]", scope)
    net.lstm, net.held = scope["layer"], scope["call"]
    expected = net(x)
    with pytest.raises(ValueError, match=r"lstm of the original, at held\(layer\); use inplace=True"):
        convert_model(net, verbose=False)
    assert scope["layer"] is net.lstm
    convert_model(net, inplace=True, verbose=False)
    assert type(scope["layer"]) is LSTM
    torch.testing.assert_close(net(x), expected)


class Remembering(Model):
    """Keeps its layer in the class, too."""

    layers: tuple = ()


def fixed_by_class() -> Model:
    net = Remembering()
    Remembering.layers = (net.lstm,)
    return net


@pytest.mark.parametrize(
    ("make", "path"),
    [
        pytest.param(lambda: model(itertools.repeat), "held(in repeat)", id="iterator"),
        pytest.param(lambda: model(lambda layer: (each for each in [layer])), "held", id="generator"),
        pytest.param(lambda: model(weakref.proxy), "held(weak)", id="proxy"),
        pytest.param(lambda: model(lambda layer: layer.permute_hidden), "held(self)", id="method-of-its-own"),
        pytest.param(fixed_by_class, "(class Remembering).layers[0]", id="class"),
    ],
)
def test_layer_in_a_place_that_cannot_be_changed_is_left_alone(make, path):
    net = make()
    layer, held = net.lstm, net.held
    _, report = convert_model(net, inplace=True, verbose=False)
    (entry,) = report.entries
    assert entry.result is None
    assert entry.note.startswith(f"is also at {path}")
    assert entry.note.endswith("which cannot be changed")
    assert net.lstm is layer
    assert net.held is held
    Remembering.layers = ()


def test_layer_that_is_no_module_of_the_model_is_listed():
    net = model()
    net.held = [nn.LSTM(I, H), nn.GRU(I, H)]
    layer = net.held[0]
    for inplace in (False, True):
        converted, report = convert_model(net, inplace=inplace, verbose=False)
        assert [(entry.path, entry.note) for entry in report.left] == [
            ("held[0]", "not among the model's modules"),
            ("held[1]", "not among the model's modules"),
        ]
        assert type(converted.lstm) is LSTM
    assert net.held[0] is layer


def test_copy_that_would_hold_the_original_is_refused():
    net = model()
    registry = {"lstm": net.lstm}
    net.held = lambda x: registry["lstm"](x)
    with pytest.raises(ValueError, match=r"lstm of the original, at held\(registry\)\['lstm'\]; use inplace=True"):
        convert_model(net, verbose=False)
    assert registry["lstm"] is net.lstm
    convert_model(net, inplace=True, verbose=False)
    assert registry["lstm"] is net.lstm
    assert type(net.lstm) is LSTM


def test_a_setter_that_undoes_it(monkeypatch):
    class Stubborn(dict):
        def __setitem__(self, key, value):
            pass

    net = model(lambda layer: Stubborn(layer=layer))
    layer = net.lstm
    _, report = convert_model(net, inplace=True, verbose=False)
    assert [entry.note for entry in report.left] == ["is still at held['layer'] when it was replaced"]
    assert net.lstm is layer
