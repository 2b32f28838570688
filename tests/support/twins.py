"""PyTorch's layers beside this library's with their parameters, and the comparison of what both make."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from novolstm_triton import GRU, LSTM, RNN, use_backend
from novolstm_triton.testing import cooperative

from .problems import FLOORS, errors

OURS: dict[type, type[Any]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}
"""PyTorch's layers and their counterparts."""

BACKENDS = ("reference", "torch", "triton")

NO_ONEDNN = "ignore:LSTM with projections is not supported with oneDNN"
"""nn.LSTM's warning, for pytest's filterwarnings."""


@contextlib.contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Run layers with backend="auto" on a backend, "triton" in the concurrent interpreter."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_backend(backend))
        if backend == "triton":
            stack.enter_context(cooperative())
        yield


def ours_like(theirs: Any) -> Any:
    """Return our layer with the options and a copy of the parameters of one of PyTorch's."""
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    names += {nn.LSTM: ["proj_size"], nn.GRU: [], nn.RNN: ["nonlinearity"]}[type(theirs)]
    options, weight = {name: getattr(theirs, name) for name in names}, theirs.weight_ih_l0
    ours = OURS[type(theirs)](**options, device=weight.device, dtype=weight.dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(theirs.training)


def pair(*args: Any, seed: int = 0, **options: Any) -> tuple[nn.LSTM, LSTM]:
    """Return an nn.LSTM and ours with the same parameters."""
    torch.manual_seed(seed)
    theirs = nn.LSTM(*args, **options)
    return theirs, ours_like(theirs)


def copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of tensors in tuples, packed or not, as leaves that keep their requires_grad."""
    if isinstance(value, PackedSequence):
        return PackedSequence(copied(value.data, dtype), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().clone().to(dtype).requires_grad_(value.requires_grad)
    return tuple(copied(v, dtype) for v in value) if isinstance(value, (tuple, list)) else value


def differentiate(module: nn.Module, *args: Any, **options: Any) -> dict[str, Tensor]:
    """Call a layer; return y, h_n, c_n and the gradients that random weights on all three give to all leaves.

    Of a layer whose state is h alone there is no c_n.
    """
    y, states = module(*args, **options)
    y = y.data if isinstance(y, PackedSequence) else y
    outputs = dict(zip(("y", "h_n", "c_n"), (y, *tuple_of(states)), strict=False))
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=y.dtype)
    for output in outputs.values():
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        loss = loss + (output * weights).sum()
    results = dict(outputs)
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, value in zip(("input", "h_0", "c_0"), _flat(args), strict=False):
        if value.requires_grad:
            leaves[name] = value
    if leaves:
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results |= {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def _flat(args: tuple) -> list[Tensor]:
    """Return the input and the states, if there are any."""
    x, *states = args
    flat = [x.data if isinstance(x, PackedSequence) else x]
    return flat + [s for state in states if state is not None for s in tuple_of(state)]


def tuple_of(states: Any) -> tuple[Tensor, ...]:
    """Return states (h, c), or h alone, as a tuple."""
    return (states,) if isinstance(states, Tensor) else tuple(states)


def assert_close(results: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor] | None = None) -> None:
    """Require results as exact as eager ones: errors of at most twice theirs, plus the floor of the results' dtype.

    Without eager results, which would be the truth's, the floor alone.
    """
    assert set(results) == set(truth)
    floor = FLOORS[results["y"].dtype]
    bounds = errors(eager, truth) if eager is not None else dict.fromkeys(truth, (0.0, 0.0))
    for name, expected in truth.items():
        assert results[name].shape == expected.shape, name
    for name, found in errors({n: r for n, r in results.items() if r.numel()}, _filled(truth)).items():
        for error, bound in zip(found, bounds[name], strict=True):
            assert error <= 2 * bound + floor, f"{name}: error {error:.1e}, bound {2 * bound + floor:.1e}"


def _filled(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what is not empty: an empty array has no greatest element."""
    return {name: value for name, value in results.items() if value.numel()}
