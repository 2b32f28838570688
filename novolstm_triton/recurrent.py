"""What layers and single cells have in common as modules: parameters, options, checks, and the call of a function."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from novolstm_triton.call import Call, Options
from novolstm_triton.cells import CELLS, novolstm_cell
from novolstm_triton.checks import check_dense, check_finite
from novolstm_triton.engines import reference
from novolstm_triton.functional import BACKENDS, lstm, novolstm
from novolstm_triton.validation import autocast_is_on

State = tuple[Tensor, Tensor]
"""(h, c)."""


class Recurrent(nn.Module):
    """A module around a cell, whose parameters it holds. Not to be used itself."""

    _parameter_names: tuple[str, ...]
    """Names of the cell's parameters without suffix, in the order of registration."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool, backend: str) -> None:
        super().__init__()
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
        """Draw weights and biases from U(−1/√H, 1/√H); set layer normalisations to the identity."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("ln_weight"):
                nn.init.ones_(parameter)
            elif name.startswith("ln_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """Return the constructor's arguments, leaving out defaults, like PyTorch's own recurrent modules."""
        shown = [f"{name}={getattr(self, name)!r}" for name, value in self._defaults() if getattr(self, name) != value]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        """Yield the constructor's options and their defaults, in the order in which they are shown."""
        yield from {"bias": True, "backend": "auto"}.items()

    def _call(
        self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: dict[str, Tensor], **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call the cell's function over x [T, B, I]."""
        raise NotImplementedError

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None, weights: dict[str, Tensor]) -> State:
        """Take a single step of x [B, I] in PyTorch's own operators, differentiable by autograd."""
        raise NotImplementedError


class LSTMFunction(Recurrent):
    """A module around the plain LSTM."""

    def _call(
        self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: dict[str, Tensor], **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return lstm(x, h_0, c_0, **with_one_bias(weights), **options)

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None, weights: dict[str, Tensor]) -> State:
        if h is None or c is None:
            h = c = x.new_zeros(x.shape[0], self.hidden_size)
        biases = weights.get("bias_ih"), weights.get("bias_hh")
        return torch.lstm_cell(x, (h, c), weights["weight_ih"], weights["weight_hh"], *biases)


class NovoLSTMFunction(Recurrent):
    """A module around NovoLSTM's cell, with its options."""

    def _set_options(self, variant: str, layer_norm: str, ln_eps: float | None, gate_gain: float | str) -> None:
        """Keep the options of the cell.

        Raises:
            TypeError: an option of the wrong type.
            ValueError: an option out of range.
        """
        cell = CELLS[novolstm_cell(variant, layer_norm)]
        expected = 'a finite number or "hidden"'
        if isinstance(gate_gain, str):
            if gate_gain != "hidden":
                raise ValueError(f"gate_gain: expected {expected}, got {gate_gain!r}")
        else:
            check_finite(gate_gain, "gate_gain", expected)
        self.variant = variant
        self.layer_norm = layer_norm
        self.ln_eps = (
            cell.eps if ln_eps is None else check_finite(ln_eps, "ln_eps", "a positive finite number", above=0)
        )
        self.gate_gain = gate_gain

    def _defaults(self) -> Iterator[tuple[str, Any]]:
        yield from super()._defaults()
        yield from {"variant": "formula", "layer_norm": "input_gate"}.items()
        yield "ln_eps", CELLS[novolstm_cell(self.variant, self.layer_norm)].eps
        yield "gate_gain", 1.0

    def _call(
        self, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: dict[str, Tensor], **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = dict(eps=self.ln_eps, gate_gain=self._gain(), variant=self.variant, layer_norm=self.layer_norm)
        return novolstm(x, h_0, c_0, **with_one_bias(weights), **own, **options)

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None, weights: dict[str, Tensor]) -> State:
        if h is None or c is None:
            h = c = x.new_zeros(x.shape[0], self.hidden_size)
        own = with_one_bias(weights)
        bias = x.new_zeros(own["weight_ih"].shape[0]) if own["bias"] is None else own["bias"]
        cell, options = CELLS[novolstm_cell(self.variant, self.layer_norm)], Options(self.ln_eps, self._gain())
        vectors = torch.cat((own["ln_weight"], own["ln_bias"]))
        call = Call(cell, x, h, c, own["weight_ih"], own["weight_hh"], bias, vectors, options)
        return reference.step(x, h, c, reference.weights_of(call), cell, self.ln_eps)

    def _gain(self) -> float:
        return float(self.hidden_size if self.gate_gain == "hidden" else self.gate_gain)


def layer_weights(module: Recurrent, suffix: str) -> dict[str, Tensor]:
    """Return the parameters with a suffix, by their names without it, except those that are None.

    Every parameter is read once, and a call reads none elsewhere: a parametrization computes, or draws, its weight
    whenever it is read. That is also why `getattr` gets no default, with which torch.compile would read it twice.
    """
    read = {name: getattr(module, name + suffix) for name in module._parameter_names}
    return {name: w for name, w in read.items() if w is not None}


def with_one_bias(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return a layer's weights as the functions' keyword arguments: the two biases added, or None."""
    others = {name: w for name, w in weights.items() if not name.startswith("bias_")}
    bias, recurrent = weights.get("bias_ih"), weights.get("bias_hh")
    if bias is not None and recurrent is not None:
        missing = bias.shape[-1] - recurrent.shape[-1]
        recurrent = nn.functional.pad(recurrent, (0, missing)) if missing else recurrent
        # The sum of two stacks would pass them one gradient, of which all biases' would be parts, two by two the same.
        bias = torch.stack([*map(torch.add, bias, recurrent)]) if bias.dim() == 2 else bias + recurrent
    return others | {"bias": bias}


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


def check_state_ranks(hx: Sequence[Tensor], rank: int, batched: bool) -> None:
    """Raise RuntimeError, in nn.LSTM's words, unless both states have the rank of the input."""
    if any(s.dim() != rank for s in hx):
        kind = "batched" if batched else "unbatched"
        raise RuntimeError(
            f"For {kind} {rank}-D input, hx and cx should also be {rank}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
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
