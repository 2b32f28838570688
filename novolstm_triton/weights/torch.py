"""The weights of `torch.nn.LSTM` as this library's, and back; what makes an LSTM one that can be taken over whole."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch
from novolstm_triton.layers.recurrent import Recurrent
from novolstm_triton.weights import check_fixed

if TYPE_CHECKING:
    from novolstm_triton.layers.lstm import LSTM
    from novolstm_triton.layers.novolstm import NovoLSTM

_SIZES = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")
FIXED = ("input_size", "hidden_size", *_SIZES, "dropout", "device", "dtype")
"""Options that a new layer takes from the one that it is made of."""
REGULARISERS = ("recurrent_dropout", "zoneout_h", "zoneout_c")
"""Options that nn.LSTM lacks; 0 is none."""

HARMLESS = {"reset_parameters", "extra_repr", "flatten_parameters"}
"""What a subclass, or an instance, may define and still compute what its class computes, beside names like __init__."""
_CALLS = {"__call__", "__getattr__", "__getattribute__"}
"""Names like __init__ that it may not define."""

_LIBRARIES = ("torch", "novolstm_triton")
"""Packages whose classes are no user's own."""

L = TypeVar("L", pytorch.LSTM, "LSTM", "NovoLSTM")


def lstm_from_torch(cls: "type[LSTM]", source: nn.LSTM, options: Mapping[str, Any]) -> "LSTM":
    """Implement `LSTM.from_torch`."""
    if not isinstance(source, pytorch.LSTM):
        raise TypeError(f"lstm: expected an nn.LSTM, got {type(source).__name__}")
    check_fixed(options, FIXED, "the nn.LSTM")
    weights = plain_weights(source)
    if own := own_code(source):
        raise ValueError(f"lstm: expected an nn.LSTM, got {type(source).__name__}, which has {own} of its own")
    return finished(empty_like(cls, source, our_options(source) | dict(options)), source, _copies(weights))


def lstm_to_torch(source: "LSTM") -> nn.LSTM:
    """Implement `LSTM.to_torch`."""
    for name in REGULARISERS:
        if value := getattr(source, name):
            raise ValueError(f"{name}: expected 0, because nn.LSTM has none, got {value}")
    return finished(empty_like(pytorch.LSTM, source, {}), source, _copies(plain_weights(source)))


def novolstm_from_lstm(cls: "type[NovoLSTM]", source: "nn.LSTM | LSTM", options: Mapping[str, Any]) -> "NovoLSTM":
    """Implement `NovoLSTM.from_lstm`."""
    if not isinstance(source, pytorch.LSTM) and not _is_ours(source):
        raise TypeError(f"lstm: expected an nn.LSTM or LSTM, got {type(source).__name__}")
    check_fixed(options, FIXED, "the LSTM")
    weights = plain_weights(source)
    options = our_options(source) | dict(options)
    like = weights["weight_ih_l0"]
    sizes = {name: getattr(source, name) for name in _SIZES}
    target = cls(source.input_size, source.hidden_size, **sizes, device=like.device, dtype=like.dtype, **options)
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = target.get_parameter(name)
            # Blocks i|f|g|o come first in both; that of p, if any, stays as it was drawn.
            parameter[: weight.shape[0]].copy_(weight)
            _mark_like(parameter, weight)
    return finished(target, source, {})


def _is_ours(source: Any) -> bool:
    """Return whether a layer is an `LSTM` of this library."""
    return isinstance(source, Recurrent) and getattr(source, "mode", None) == "LSTM"


def plain_weights(source: nn.Module) -> dict[str, nn.Parameter]:
    """Return an LSTM's parameters by their names.

    Raises:
        ValueError: its parameters are not those of an LSTM.
    """
    if (difference := deviation(source)) is not None:
        raise ValueError(f"lstm: expected the parameters of a plain LSTM, got one where {difference}")
    return own_parameters(source)


def deviation(module: nn.Module) -> str | None:
    """Return what an LSTM has beside an LSTM's parameters, or lacks, or None."""
    expected = empty_like(pytorch.LSTM, module, {})
    theirs, ours = own_parameters(module), own_parameters(expected)
    if missing := ours.keys() - theirs.keys():
        return f"{min(missing)} is parametrized, normalised or pruned, which would be lost"
    added = [*(theirs.keys() - ours.keys()), *(name for name, _ in (*module.named_buffers(), *module.named_children()))]
    if added:
        return f"has {min(added)} beside an LSTM's parameters"
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
    """Return the class of an LSTM that is not a user's own."""
    return next(
        cls
        for cls in type(module).__mro__
        if cls.__module__.partition(".")[0] in _LIBRARIES and issubclass(cls, (pytorch.LSTM, Recurrent))
    )


def given_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of an LSTM that a program gave it."""
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
    """Return an LSTM of the source's sizes whose parameters have no memory yet."""
    sizes = {name: getattr(source, name) for name in _SIZES}
    return cls(source.input_size, source.hidden_size, **sizes, device="meta", **options)


def finished(target: L, source: Any, parameters: Mapping[str, nn.Parameter]) -> L:
    """Give a new layer its parameters, and what the source was told beside its sizes; return it."""
    for name, parameter in parameters.items():
        setattr(target, name, parameter)
    # Not by the constructor, which would repeat nn.LSTM's warning about dropout after a single layer.
    target.dropout = source.dropout
    # On a GPU cuDNN wants the weights of an nn.LSTM in one piece of memory.
    target.flatten_parameters()
    return target.train(source.training)


def our_options(source: "nn.LSTM | LSTM") -> dict[str, Any]:
    """Return the options that an LSTM of this library has beside nn.LSTM's."""
    return {name: getattr(source, name) for name in (*REGULARISERS, "backend")} if _is_ours(source) else {}
