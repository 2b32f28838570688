"""Conversions of whole models: every LSTM, GRU and RNN becomes a layer of another library."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from novolstm_triton import pytorch
from novolstm_triton.convert.copies import copied
from novolstm_triton.convert.references import References
from novolstm_triton.layers.gru import GRU
from novolstm_triton.layers.lstm import LSTM
from novolstm_triton.layers.novolstm import NovoLSTM
from novolstm_triton.layers.recurrent import Recurrent
from novolstm_triton.layers.rnn import RNN
from novolstm_triton.layers.single_step import RecurrentCell
from novolstm_triton.layers.torch_lstm import TorchLSTM
from novolstm_triton.weights import check_fixed
from novolstm_triton.weights.torch import (
    FIXED,
    HARMLESS,
    REGULARISERS,
    deviation,
    empty_like,
    finished,
    given_attributes,
    novolstm_from_lstm,
    our_options,
    own_code,
    own_parameters,
    plain_weights,
    twin,
)

TARGETS = ("lstm", "novolstm", "torch")
"""What `convert_model` can make of layers."""

_OURS: dict[Any, type[nn.Module]] = {pytorch.LSTM: LSTM, pytorch.GRU: GRU, pytorch.RNN: RNN}
"""This library's counterpart of each of PyTorch's layers."""

_NOTES = {"novolstm": "warm start: i, f, g, o copied, p and norms new"}
_SAME = "same function"

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS += ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one recurrent layer of a model."""

    path: str
    """Where it is in the model; "" is the model itself."""
    layer: str
    """What it was."""
    result: str | None
    """What it is now, None if it was left alone."""
    note: str
    """What that means, or why it was left alone."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `convert_model` did, a table as a string."""

    entries: tuple[Entry, ...]

    @property
    def converted(self) -> tuple[Entry, ...]:
        """The layers that were replaced."""
        return tuple(entry for entry in self.entries if entry.result is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The layers that were left alone."""
        return tuple(entry for entry in self.entries if entry.result is None)

    def __str__(self) -> str:
        """Return the table, a line for each layer."""
        if not self.entries:
            return "The model has no recurrent layer."
        rows = [("module", "was", "is", "note")]
        rows += [(e.path or "(the model)", e.layer, e.result or "left alone", e.note) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"converted {len(self.converted)}, left alone {len(self.left)}"])


def convert_model(
    model: nn.Module,
    to: str = "lstm",
    *,
    inplace: bool = False,
    subclass: bool = False,
    verbose: bool = True,
    **options: Any,
) -> tuple[Any, Report]:
    """Replace PyTorch's recurrent layers in a model by this library's, or the reverse; print what became of each.

    With to="lstm" every nn.LSTM becomes an `LSTM`, every nn.GRU a `GRU` and every nn.RNN an `RNN` with the same
    parameters: the model computes what it did, has the same state_dict, and, changed in place, keeps its Parameter
    objects, so that an optimizer stays valid. With subclass=True every nn.LSTM becomes a `TorchLSTM`, for code that
    asks for instances of nn.LSTM, and the others stay. to="torch" is the way back: every `LSTM`, `TorchLSTM`, `GRU` and
    `RNN` becomes PyTorch's layer of its kind.

    With to="novolstm" every nn.LSTM becomes a `NovoLSTM` warm-started by `NovoLSTM.from_lstm`; an `LSTM` does, too, and
    no other layer. The model then computes something else and needs training, with an optimizer made for its new
    parameters.

    A layer that the model uses in several places remains one, and takes the place of the old one wherever the model
    holds that: in lists and dictionaries, attributes of any object, closures, bound methods, hooks of other modules.
    Attributes that a program gave to a layer, or to its parameters, go along. Listed with the reason and left alone
    are:

    - subclasses of PyTorch's layers, or of these, that define more than a constructor and initial values;
    - layers with parametrizations, weight normalisation, pruning or hooks, all of which would be lost;
    - layers that are compiled themselves or are inside DistributedDataParallel;
    - layers that the model also holds in a place that cannot be changed, such as an iterator or an attribute of a
      class, or holds without having them among its modules;
    - layers with an attribute that means something else to the new one;
    - with to="novolstm", layers with a parameter that has a second name or a second place, in them or elsewhere in the
      model, such as an optimizer, or hooks, because the new one has another shape;
    - with to="torch", layers with recurrent_dropout or zoneout, and every `NovoLSTM` and `RecurrentLayer`;
    - with to="novolstm" or subclass=True, every GRU and RNN;
    - cells, such as nn.LSTMCell, and other recurrent layers.

    A deep copy has the values of tensors with a history, such as a state that the model keeps, without the history.
    Its closures call its own modules.

    Args:
        model: any module, which may be a recurrent layer itself.
        to: "lstm", "novolstm" or "torch".
        inplace: change `model` instead of a deep copy of it. A model that is such a layer itself cannot be
            changed into another: use what is returned.
        subclass: with to="lstm", make each nn.LSTM a `TorchLSTM`, and leave the others.
        verbose: print the report.
        **options: options of the new layers, as `NovoLSTM` or `LSTM` takes them by keyword: variant, gate_gain,
            backend and so on; a `GRU` and an `RNN` have no zoneout_c. With to="torch" there are none.

    Returns:
        The converted model, and the report, whose str() is the table.

    Raises:
        TypeError: `model` is not a module, a flag is not a bool, or an option is unknown.
        ValueError: an unknown target, an option that does not fit a layer, or a model that cannot be copied. The model
            is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {list(TARGETS)}, got {to!r}")
    for name, flag in (("inplace", inplace), ("subclass", subclass), ("verbose", verbose)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {flag!r}")
    if subclass and to != "lstm":
        raise ValueError(f"subclass: expected False with to={to!r}, got True")
    targets = _targets(to, subclass)
    check_fixed(options, FIXED, "each layer")
    # Wrong options are an error in a model without LSTMs, too.
    targets[pytorch.LSTM](1, 2, device="meta", **options)
    shared: Collection[int] = ()
    if not inplace:
        model, shared = copied(model, _is_recurrent)

    # All new layers are made before the first is put in place: an error leaves the model as it was.
    places = list(_places(model))
    named = {id(place.module) for place in places}
    references, users = References(model, shared, named), _parameter_users(model)
    reasons: dict[int, str] = {}
    new: dict[int, nn.Module] = {}
    for place in places:
        old, key = place.module, id(place.module)
        if key in new or key in reasons:
            continue
        reason = _reason(place, targets, users, references)
        if reason is None:
            layer = _replacement(old, targets[twin(old)], options)
            reason = _obstacle(references, old, layer)
            if reason is None:
                new[key] = layer
                continue
        reasons[key] = reason
    model = _replaced(model, references, new, reasons, lambda root: References(root, shared, named))

    report = Report((*_entries(places, new, reasons, _NOTES.get(to, _SAME)), *_outsiders(references, named)))
    if verbose:
        print(report)
    return model, report


def _targets(to: str, subclass: bool) -> dict[Any, type[Any]]:
    """Return what the layers become, by PyTorch's class that computes the same."""
    if to == "torch":
        return {theirs: theirs for theirs in _OURS}
    if subclass or to == "novolstm":
        return {pytorch.LSTM: TorchLSTM if subclass else NovoLSTM}
    return _OURS


class _Place(NamedTuple):
    """Where a model holds a recurrent layer."""

    parent: nn.Module | None
    name: str
    path: str
    module: Any
    within_ddp: bool


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield every place of a recurrent layer: a shared layer once for each, one within a shared parent once."""
    seen = set()

    def walk(parent: nn.Module | None, name: str, path: str, module: nn.Module, within_ddp: bool) -> Iterator[_Place]:
        if _is_recurrent(module):
            yield _Place(parent, name, path, module, within_ddp)
        if id(module) in seen:
            return
        seen.add(id(module))
        within_ddp = within_ddp or isinstance(module, DistributedDataParallel)
        # Not named_children, which passes over a second name of the same layer.
        for child_name, child in module._modules.items():
            if child is not None:
                yield from walk(module, child_name, f"{path}.{child_name}".lstrip("."), child, within_ddp)

    yield from walk(None, "", "", model, False)


def _is_recurrent(module: Any) -> bool:
    return issubclass(type(module), (pytorch.RNNBase, pytorch.RNNCellBase, Recurrent))


def _reason(
    place: _Place, targets: Mapping[Any, type[nn.Module]], users: Mapping[int, int], references: References
) -> str | None:
    """Return why a layer is not made what `_targets` says, or None."""
    module = place.module
    theirs, ours = twin(module), isinstance(module, Recurrent)
    cls = targets.get(theirs)
    # A TorchLSTM is an nn.LSTM, and none of PyTorch's.
    if any(isinstance(module, target) and issubclass(target, Recurrent) == ours for target in targets.values()):
        return "is one already"
    if isinstance(module, NovoLSTM):
        return "computes something else than an LSTM"
    if isinstance(module, (pytorch.RNNCellBase, RecurrentCell)):
        return "a cell, which takes single steps"
    if cls is None:
        return "no LSTM" if theirs is not None else "no LSTM, GRU or RNN"
    if (difference := deviation(module)) is not None:
        return difference
    if own := own_code(module):
        return f"a subclass with {own} of its own"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "has hooks, which would be lost"
    if place.name == "_orig_mod" or getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled: convert before torch.compile"
    if place.within_ddp:
        return "is inside DistributedDataParallel: convert before wrapping"
    if cls is NovoLSTM:
        return _reason_of_parameters(module, users, references)
    if cls is theirs and (regulariser := next(filter(vars(module).get, REGULARISERS), None)):
        return f"has {regulariser}, which nn.{cls.__name__} lacks"
    return None


def _reason_of_parameters(module: nn.Module, users: Mapping[int, int], references: References) -> str | None:
    """Return why a layer's parameters cannot be left for new ones, or None."""
    for name, parameter in own_parameters(module).items():
        if users[id(parameter)] > 1:
            return "has a parameter under two names"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"{name} has hooks, which would be lost"
        for holder, path in references.holders(parameter):
            if holder is not module:
                return f"{name} is also at {path}"
    return None


def _obstacle(references: References, old: nn.Module, new: nn.Module) -> str | None:
    """Return what stands in the way of putting a new layer wherever the old one is, or None."""
    for name in given_attributes(old):
        if name not in HARMLESS and hasattr(new, name):
            return f"has an attribute {name}, which means something else to {type(new).__name__}"
    if (path := references.obstacle(old, new)) is not None:
        return f"is also at {path}, which cannot be changed"
    return None


def _replaced(
    model: nn.Module,
    references: References,
    new: dict[int, nn.Module],
    reasons: dict[int, str],
    walk: Callable[[nn.Module], References],
) -> nn.Module:
    """Put new layers in the places of old ones, and return the model; one that remains is left alone with a reason.

    Args:
        model: what to change, or to replace.
        references: who holds what in it.
        new: the new layers by the ids of the old ones; those that remain are taken out.
        reasons: why layers are left alone, by their ids; those that remain are entered.
        walk: finds the references of the changed model.
    """
    while new:
        undo = references.replace(new)
        for key, layer in new.items():
            vars(layer).update(given_attributes(references.reached[key]))
        root = new.get(id(model), model)
        after = walk(root)
        remaining = {key: after.path(after.reached[key]) for key in new if key in after.reached}
        if not remaining:
            return root
        # Code that is asked, such as an attribute's own setter, may have done something else.
        undo()
        for key, path in remaining.items():
            del new[key]
            reasons[key] = f"is still at {path} when it was replaced"
    return model


def _entries(
    places: Iterable[_Place], new: Mapping[int, nn.Module], reasons: Mapping[int, str], note: str
) -> Iterator[Entry]:
    """Yield what became of the layer in each place."""
    first: dict[int, str] = {}
    for place in places:
        key = id(place.module)
        result = _described(new[key]) if key in new else None
        own = f"the same layer as {first[key] or '(the model)'}" if key in first else reasons.get(key, note)
        first.setdefault(key, place.path)
        yield Entry(place.path, _described(place.module), result, own)


def _outsiders(references: References, modules: Collection[int]) -> Iterator[Entry]:
    """Yield the recurrent layers that a model holds without having them among its modules."""
    for key, layer in references.reached.items():
        if _is_recurrent(layer) and key not in modules:
            yield Entry(references.path(layer), _described(layer), None, "not among the model's modules")


def _parameter_users(model: nn.Module) -> Counter[int]:
    """Return under how many names the model's modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in own_parameters(module).values())


def _replacement(old: Any, cls: type[Any], options: Mapping[str, Any]) -> Any:
    if cls is NovoLSTM:
        return novolstm_from_lstm(NovoLSTM, old, options)
    own = {} if cls is twin(old) else our_options(old)
    # The model's own Parameters move over: whatever shares or optimises them continues to.
    return finished(empty_like(cls, old, own | dict(options)), old, plain_weights(old))


def _described(module: nn.Module) -> str:
    """Return a layer's constructor call in one line, PyTorch's own as "nn."."""
    prefix = "nn." if type(module).__module__.startswith("torch.") else ""
    return f"{prefix}{type(module).__name__}({module.extra_repr()})"
