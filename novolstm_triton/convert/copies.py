"""Deep copies of models, including those that `copy.deepcopy` refuses or leaves half attached to the original."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from novolstm_triton.convert.references import References

M = TypeVar("M", bound=nn.Module)


class _NonLeaves(TorchFunctionMode):
    """Deep copies of tensors with a history: the copy has the values and begins a history of its own.

    Such tensors are the weights that old-style weight normalisation and pruning compute before every call, and states
    that a model keeps. A plain deep copy refuses them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copied(model: M, named: Callable[[nn.Module], bool]) -> tuple[M, set[int]]:
    """Return a deep copy of a model that does not lead back to it.

    Functions are not copied by `copy.deepcopy`: a closure in the copy goes on calling the original's modules. Here it
    becomes a function of the copy.

    Args:
        model: what to copy.
        named: whether code of the model may load a module as a global variable, beside holding it.

    Returns:
        The copy, and the ids of all that the original reaches, which the copy shares in part.

    Raises:
        ValueError: the model has something that cannot be copied, or the copy would hold something of the original in
            a place that cannot be changed.
    """
    memo: dict[int, Any] = {}
    try:
        twin = _deep_copy(model, memo)
        for parameter in model.parameters():
            # What programs mark parameters with, which a Parameter does not hand on to its copy.
            vars(memo.get(id(parameter), parameter)).update(_deep_copy(vars(parameter), memo))
    except Exception as error:
        path, reason = _culprit(model, error)
        what = f"{path} cannot be copied" if path else "it cannot be copied"
        raise ValueError(f"model: {what} ({reason}); with inplace=True it need not be") from error
    parts = [*model.modules(), *_own_tensors(model)]
    twins = {id(part): memo[id(part)] for part in parts if memo.get(id(part), part) is not part}
    loaded = {id(module) for module in model.modules() if named(module)}
    original = References(model, named=loaded)
    references = References(twin, shared=original.reached, named=loaded, closed=twins)
    leaks = {key: new for key, new in twins.items() if key in references.reached}
    for key in leaks:
        old = references.reached[key]
        if (obstacle := references.obstacle(old, leaks[key])) is not None:
            what = f"{original.path(old)} of the original" if old is not model else "the original"
            raise ValueError(f"model: the copy would still hold {what}, at {obstacle}; use inplace=True")
    references.replace(leaks)
    return twin, set(original.reached)


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    with _NonLeaves():
        return copy.deepcopy(value, memo)


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _culprit(model: nn.Module, error: Exception) -> tuple[str, str]:
    """Return the path of an attribute that cannot be copied, "" if none alone is to blame, and why."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            try:
                _deep_copy(value, {id(model): model})
            except Exception as own:
                return f"{name}.{attribute}".removeprefix("."), f"{type(own).__name__}: {own}"
    return "", f"{type(error).__name__}: {error}"
