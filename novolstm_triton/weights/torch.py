"""The weights of PyTorch's layers as this library's, and back; what makes a layer one that can be taken over whole."""

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch
from novolstm_triton.layers.recurrent import Recurrent
from novolstm_triton.weights import check_fixed

if TYPE_CHECKING:
    from novolstm_triton.layers.lstm import LSTM
    from novolstm_triton.layers.novolstm import NovoLSTM

_SIZES = ("num_layers", "bias", "batch_first", "bidirectional")
_OWN_SIZES: dict[type[nn.Module], dict[str, Callable[[Any], Any]]] = {
    pytorch.LSTM: {"proj_size": operator.attrgetter("proj_size")},
    pytorch.GRU: {},
    # What nn.RNN computes goes by its mode, whatever its attribute `nonlinearity` has been set to.
    pytorch.RNN: {"nonlinearity": lambda layer: layer.mode.removeprefix("RNN_").lower()},
}
"""PyTorch's layers that have a counterpart here, and the arguments that each has beside the others', of a layer."""
FIXED = ("input_size", "hidden_size", *_SIZES, "proj_size", "nonlinearity", "dropout", "device", "dtype")
"""Options that a new layer takes from the one that it is made of."""
REGULARISERS = ("recurrent_dropout", "zoneout_h", "zoneout_c")
"""Options that PyTorch's layers lack; 0 is none."""

HARMLESS = {"reset_parameters", "extra_repr", "flatten_parameters"}
"""What a subclass, or an instance, may define and still compute what its class computes, beside names like __init__."""
_CALLS = {"__call__", "__getattr__", "__getattribute__"}
"""Names like __init__ that it may not define."""

_LIBRARIES = ("torch", "novolstm_triton")
"""Packages whose classes are no user's own."""

L = TypeVar("L", bound=nn.Module)


def twin(layer: Any) -> "type[nn.RNNBase] | None":
    """Return PyTorch's class that computes what a layer computes: LSTM, GRU or RNN; or None.

    Args:
        layer: any object; PyTorch's own layers are their own twins.
    """
    return _twin_of(type(layer))


def _twin_of(cls: type[Any]) -> Any:
    if issubclass(cls, Recurrent):
        return getattr(cls, "_twin", None)
    return next((theirs for theirs in _OWN_SIZES if issubclass(cls, theirs)), None)


def from_torch(cls: type[L], source: Any, options: Mapping[str, Any]) -> L:
    """Implement `from_torch` of the layers that have a twin."""
    theirs = _twin_of(cls)
    name, argument = theirs.__name__, theirs.__name__.lower()
    if not isinstance(source, theirs):
        raise TypeError(f"{argument}: expected an nn.{name}, got {type(source).__name__}")
    check_fixed(options, FIXED, f"the nn.{name}")
    weights = plain_weights(source)
    if own := own_code(source):
        raise ValueError(f"{argument}: expected an nn.{name}, got {type(source).__name__}, which has {own} of its own")
    return finished(empty_like(cls, source, our_options(source) | dict(options)), source, _copies(weights))


def to_torch(source: Any) -> Any:
    """Implement `to_torch` of the layers that have a twin."""
    theirs = _twin_of(type(source))
    for name in REGULARISERS:
        if value := getattr(source, name):
            raise ValueError(f"{name}: expected 0, because nn.{theirs.__name__} has none, got {value}")
    return finished(empty_like(theirs, source, {}), source, _copies(plain_weights(source)))


def novolstm_from_lstm(cls: "type[NovoLSTM]", source: "nn.LSTM | LSTM", options: Mapping[str, Any]) -> "NovoLSTM":
    """Implement `NovoLSTM.from_lstm`."""
    if twin(source) is not pytorch.LSTM:
        raise TypeError(f"lstm: expected an nn.LSTM or LSTM, got {type(source).__name__}")
    check_fixed(options, FIXED, "the LSTM")
    weights = plain_weights(source)
    options = our_options(source) | dict(options)
    like = weights["weight_ih_l0"]
    sizes = _sizes(pytorch.LSTM, source)
    target = cls(source.input_size, source.hidden_size, **sizes, device=like.device, dtype=like.dtype, **options)
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = target.get_parameter(name)
            # Blocks i|f|g|o come first in both; that of p, if any, stays as it was drawn.
            parameter[: weight.shape[0]].copy_(weight)
            _mark_like(parameter, weight)
    return finished(target, source, {})


def plain_weights(source: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer that has a twin, by their names.

    Raises:
        ValueError: its parameters are not those of its twin.
    """
    if (difference := deviation(source)) is not None:
        name = _name(source)
        raise ValueError(f"{name.lower()}: expected the parameters of a plain {name}, got one where {difference}")
    return own_parameters(source)


def deviation(module: nn.Module) -> str | None:
    """Return what a layer that has a twin has beside its twin's parameters, or lacks, or None."""
    expected = empty_like(_twin_of(type(module)), module, {})
    theirs, ours = own_parameters(module), own_parameters(expected)
    if missing := ours.keys() - theirs.keys():
        return f"{min(missing)} is parametrized, normalised or pruned, which would be lost"
    added = [*(theirs.keys() - ours.keys()), *(name for name, _ in (*module.named_buffers(), *module.named_children()))]
    if added:
        name = _name(module)
        article = "a" if name == "GRU" else "an"
        return f"has {min(added)} beside {article} {name}'s parameters"
    for name, parameter in theirs.items():
        if parameter.shape != ours[name].shape or type(parameter.data) is not Tensor:
            return f"{name} is a {type(parameter.data).__name__} {list(parameter.shape)}"
    return None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's parameters, without those of modules in it, by all their names."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def own_code(module: nn.Module) -> str:
    """Return names of what a subclass, or the instance, defines and its class of a library has; "" for none."""
    base = _base(module)
    own = {name for name in given_attributes(module) if name not in HARMLESS and hasattr(base, name)}
    for cls in type(module).__mro__:
        if cls is base:
            break
        own |= {name for name in vars(cls) if name in _CALLS or not (name.startswith("__") or name in HARMLESS)}
    return ", ".join(sorted(own))


def _base(module: nn.Module) -> type[Any]:
    """Return the class of a layer that is not a user's own."""
    return next(
        cls
        for cls in type(module).__mro__
        if cls.__module__.partition(".")[0] in _LIBRARIES and issubclass(cls, (*_OWN_SIZES, Recurrent))
    )


def given_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a layer that a program gave it."""
    usual = vars(empty_like(_base(module), module, {}))
    return {name: value for name, value in vars(module).items() if name not in usual}


def _copies(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: _mark_like(nn.Parameter(w.detach().clone()), w) for name, w in weights.items()}


def _mark_like(parameter: nn.Parameter, source: nn.Parameter) -> nn.Parameter:
    """Give a parameter another one's requires_grad and whatever attributes programs gave it; return it."""
    vars(parameter).update(vars(source))
    parameter.requires_grad_(source.requires_grad)
    return parameter


def empty_like(cls: type[L], source: Any, options: Mapping[str, Any]) -> L:
    """Return a layer of the source's sizes, of a class that has a twin, whose parameters have no memory yet."""
    sizes = _sizes(_twin_of(cls), source)
    return cls(source.input_size, source.hidden_size, **sizes, device="meta", **options)


def _sizes(theirs: type[nn.Module], source: Any) -> dict[str, Any]:
    """Return the arguments of one of PyTorch's classes, beside the numbers of units, that make a layer's like."""
    own = {name: value(source) for name, value in _OWN_SIZES[theirs].items()}
    return {name: getattr(source, name) for name in _SIZES} | own


def _name(layer: Any) -> str:
    """Return the name of a layer's twin."""
    return _twin_of(type(layer)).__name__


def finished(target: Any, source: Any, parameters: Mapping[str, nn.Parameter]) -> Any:
    """Give a new layer its parameters, and what the source was told beside its sizes; return it."""
    for name, parameter in parameters.items():
        setattr(target, name, parameter)
    # Not by the constructor, which would repeat nn.LSTM's warning about dropout after a single layer.
    target.dropout = source.dropout
    # On a GPU cuDNN wants the weights of an nn.LSTM in one piece of memory.
    target.flatten_parameters()
    return target.train(source.training)


def our_options(source: Any) -> dict[str, Any]:
    """Return the options that a layer of this library has beside its twin's, {} of PyTorch's own."""
    if not isinstance(source, Recurrent):
        return {}
    regularisers = REGULARISERS if "c" in source._cell.states else ("recurrent_dropout", "zoneout_h")
    return {name: getattr(source, name) for name in (*regularisers, "backend")}
