"""What layers and single cells have in common as modules: parameters, options, checks, and the call of a function."""

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from novolstm_triton.cells import Cell, register
from novolstm_triton.checks import check_dense
from novolstm_triton.engines import reference
from novolstm_triton.functional import BACKENDS, recurrence
from novolstm_triton.validation import autocast_is_on

State = tuple[Tensor, Tensor]
"""(h, c)."""

States = tuple[Tensor, ...]
"""The states of a cell: (h, c), or (h,)."""


class Recurrent(nn.Module):
    """A module around a cell, whose parameters it holds. Not to be used itself."""

    _parameter_names: tuple[str, ...]
    """Names of the cell's parameters without suffix, in the order of registration."""

    _cell: Cell

    def __init__(self, cell: Cell, input_size: int, hidden_size: int, bias: bool, backend: str) -> None:
        super().__init__()
        self._cell = register(cell)
        check_bool(bias=bias)
        check_positive(input_size=input_size, hidden_size=hidden_size)
        check_backend(backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, as `nn.Module` does; given a proxy of torch.fx, record the call as one node.

        Tracers of torch.fx take only modules of torch.nn whole, and trace into all others. Here and not in `forward`,
        because hooks belong to the module that the node calls: they must not run while tracing.

        Raises:
            TypeError: more than two positional arguments.
            NotImplementedError: Opacus has been told to make gradients per sample of this module as it is.
        """
        if "ft_compute_sample_grad" in self.__dict__:
            raise NotImplementedError(
                f"Opacus: {type(self).__name__} has several results, and its hooks see one: "
                "call novolstm_triton.per_sample(model) first"
            )
        if len(args) > 2:
            raise TypeError(
                f"{type(self).__name__}: expected input and hx, got {len(args)} positional arguments; "
                "a layer's lengths are given by name, lengths=..."
            )
        tracer = _fx_tracer((*args, *kwargs.values()))
        if tracer is None:
            return super().__call__(*args, **kwargs)

        def record(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, record, args, kwargs)

    def reset_parameters(self) -> None:
        """Draw weights and biases from U(−1/√H, 1/√H); set vectors with a value to start from, like γ and β, to it."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        initial = {vector.name: vector.initial for vector in self._cell.vectors}
        for name, parameter in self.named_parameters():
            value = initial.get(re.sub(r"_l\d+(_reverse)?$", "", name))
            if value is None:
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Return the constructor's arguments, leaving out defaults, like PyTorch's own recurrent modules."""
        shown = [f"{name}={getattr(self, name)!r}" for name, value in self._defaults() if getattr(self, name) != value]
        # What takes any cell says which one it has.
        cell = [self._cell.name] if "cell" in inspect.signature(type(self)).parameters else []
        return ", ".join([*cell, str(self.input_size), str(self.hidden_size), *shown])

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        """Yield the constructor's options and their defaults, in the order in which they are shown."""
        yield from {"bias": True, "backend": "auto"}.items()

    def _numbers(self) -> dict[str, float]:
        """Return the numbers among the cell's options, `eps` and `gate_gain`, that the module has."""
        return {}

    def _call(
        self, x: Tensor, states: States | None, weights: dict[str, Tensor], **options: Any
    ) -> tuple[Tensor, States]:
        """Run the cell over x [T, B, I]; return y and the states after it."""
        own = engine_weights(self._cell, weights)
        vectors = [weights[vector.name] for vector in self._cell.vectors]
        weight_hr = weights.get("weight_hr")
        return recurrence(
            self._cell, x, states, **own, vectors=vectors, weight_hr=weight_hr, **self._numbers(), **options
        )

    def _step(self, x: Tensor, states: States | None, weights: dict[str, Tensor]) -> States:
        """Take a single step of x [B, I] in PyTorch's own operators, differentiable by autograd."""
        cell = self._cell
        if states is None:
            states = (x.new_zeros(x.shape[0], self.hidden_size),) * len(cell.states)
        own = engine_weights(cell, weights)
        bias = own["bias"]
        if bias is None:
            bias = x.new_zeros(len(cell.blocks) * self.hidden_size)
        vectors = [block for vector in cell.vectors for block in weights[vector.name].chunk(len(vector.blocks))]
        numbers = self._numbers()
        for block in cell.gained if numbers.get("gate_gain", 1.0) != 1.0 else ():
            vectors[block] = vectors[block] * numbers["gate_gain"]
        given = reference.Weights(own["weight_ih"], own["weight_hh"], bias, tuple(vectors))
        return reference.step(x, states[0], states[-1], given, cell, numbers.get("eps", cell.eps))[: len(cell.states)]

    def _tuple_of(self, hx: Any) -> States:
        """Return the states that a caller gives: a tuple of them, or a single tensor if the cell has one.

        Raises:
            TypeError: it is something else, or holds something else than ordinary tensors.
        """
        if self._cell.states == ("h",):
            if not isinstance(hx, Tensor):
                raise TypeError(f"{type(self).__name__}: expected the state hx to be a Tensor, got {_described(hx)}")
            check_dense(hx, "hx")
            return (hx,)
        check_pair(self, hx)
        return tuple(hx)

    def _shown(self, states: States) -> Any:
        """Return states as a caller gets them."""
        return states if "c" in self._cell.states else states[0]  # pyright: ignore[reportGeneralTypeIssues]


def layer_weights(module: Recurrent, suffix: str) -> dict[str, Tensor]:
    """Return the parameters with a suffix, by their names without it, except those that are None.

    Every parameter is read once, and a call reads none elsewhere: a parametrization computes, or draws, its weight
    whenever it is read. That is also why `getattr` gets no default, with which torch.compile would read it twice.
    """
    read = {name: getattr(module, name + suffix) for name in module._parameter_names}
    return {name: w for name, w in read.items() if w is not None}


def engine_weights(cell: Cell, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return weight_ih, weight_hh and one bias, or None, in the order of the cell's blocks, of a module's weights."""
    weight_ih, weight_hh = weights["weight_ih"], weights["weight_hh"]
    lead = weight_ih.dim() - 2
    return dict(weight_ih=weight_ih, weight_hh=cell.in_order(weight_hh, lead), bias=with_one_bias(cell, weights))


def with_one_bias(cell: Cell, weights: dict[str, Tensor]) -> Tensor | None:
    """Return the sum of both biases [G·H], in the order of the cell's blocks, or None if there are none.

    A block that only x feeds has only an input bias, one that only h feeds only a recurrent one.
    """
    bias, recurrent = weights.get("bias_ih"), weights.get("bias_hh")
    if bias is None or recurrent is None:
        return bias
    recurrent = cell.in_order(recurrent, bias.dim() - 1)
    hidden = bias.shape[-1] // cell.inputs
    alone, missing = cell.first_input * hidden, (len(cell.blocks) - cell.recurrent) * hidden
    bias = nn.functional.pad(bias, (alone, 0)) if alone else bias
    recurrent = nn.functional.pad(recurrent, (0, missing)) if missing else recurrent
    # The sum of two stacks would pass them one gradient, of which all biases' would be parts, two by two the same.
    return torch.stack([*map(torch.add, bias, recurrent)]) if bias.dim() == 2 else bias + recurrent


def check_sizes(weights: dict[str, Any], hidden_size: int, proj_size: int = 0) -> None:
    """Raise ValueError if a module's sizes have been changed and its parameters have not."""
    recurrent, projection = weights["weight_hh"], weights.get("weight_hr")
    if recurrent.shape[1] != (proj_size or hidden_size) or (
        projection is not None and projection.shape[1] != hidden_size
    ):
        raise ValueError(
            f"hidden_size={hidden_size}, proj_size={proj_size}: expected the sizes of the parameters, got weight_hh of "
            f"shape {list(recurrent.shape)}: build a new module, or change the parameters, too"
        )


def _fx_tracer(values: Iterable[Any]) -> Tracer | None:
    """Return the tracer of a proxy among arguments and the states in them, if there is one."""
    for value in values:
        if isinstance(value, Proxy):
            return value.tracer if isinstance(value.tracer, Tracer) else None
        if isinstance(value, (tuple, list)) and (tracer := _fx_tracer(value)) is not None:
            return tracer
    return None


def check_positive(**sizes: Any) -> None:
    """Raise TypeError or ValueError, in nn.LSTM's words, unless every size is a positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        if value <= 0:
            raise ValueError(f"{name} must be greater than zero")


def check_bool(**flags: Any) -> None:
    """Raise TypeError, in nn.LSTM's words, unless every flag is a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_no_projection(proj_size: Any) -> None:
    """Raise ValueError, in PyTorch's words, if a layer that has no projection is given one's size."""
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def check_backend(backend: Any) -> None:
    """Raise ValueError unless there is a backend of this name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {list(BACKENDS)}, got {backend!r}")


def check_pair(owner: nn.Module, hx: Any) -> None:
    """Raise TypeError unless a state is a pair of ordinary tensors."""
    if not (isinstance(hx, (tuple, list)) and len(hx) == 2 and isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor)):
        raise TypeError(f"{type(owner).__name__}: expected the state hx to be a tuple (h_0, c_0), got {_described(hx)}")
    for position, state in enumerate(hx):
        check_dense(state, f"hx[{position}]")


def check_state_ranks(states: Sequence[Tensor], rank: int, batched: bool) -> None:
    """Raise RuntimeError, in PyTorch's words, unless all states have the rank of the input."""
    if all(s.dim() == rank for s in states):
        return
    kind = "batched" if batched else "unbatched"
    if len(states) == 1:
        raise RuntimeError(f"For {kind} {rank}-D input, hx should also be {rank}-D but got {states[0].dim()}-D tensor")
    raise RuntimeError(
        f"For {kind} {rank}-D input, hx and cx should also be {rank}-D "
        f"but got ({states[0].dim()}-D, {states[1].dim()}-D) tensors"
    )


def check_device(x: Tensor, kind: str, tensor: Tensor) -> None:
    """Raise RuntimeError, in nn.LSTM's words, unless a tensor of some kind is where the input is."""
    if tensor.device != x.device:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} and "
            f"{kind} tensor at {tensor.device}"
        )


def same_dtype(x: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor can be used beside the input: it has its dtype, or autocast will see to it."""
    return x.dtype == tensor.dtype or autocast_is_on(x.device)


def scalar_type(tensor: Tensor) -> str:
    """Return a dtype's name as PyTorch's C++ messages spell it."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")


def _described(value: Any) -> str:
    """Return a wrong state as a short phrase."""
    if isinstance(value, Tensor):
        return f"a Tensor {list(value.shape)}: an LSTM has two states"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
    return type(value).__name__
