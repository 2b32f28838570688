"""Both layers, small, and their inputs, for the tests of PyTorch's systems around them."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from novolstm_triton import LSTM, NovoLSTM, RecurrentLayer

L = TypeVar("L", bound=RecurrentLayer)

T, B, I, H = 5, 3, 4, 6

REGULARISED: dict[str, Any] = dict(num_layers=2, dropout=0.2, recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1)
"""Options with which a layer draws in training all that it can draw."""

both = pytest.mark.parametrize("kind", [NovoLSTM, LSTM])
"""Runs a test for both layers."""


def layer(kind: Callable[..., L], *, seed: int = 0, **options: Any) -> L:
    """Return a layer of I inputs and H units; NovoLSTM with a gain with which its input gate matters."""
    torch.manual_seed(seed)
    if kind is NovoLSTM:
        options.setdefault("gate_gain", "hidden")
    return kind(I, H, **options)


def sequence(steps: int = T, rows: int = B, *, seed: int = 1, **options: Any) -> Tensor:
    """Return an input [steps, rows, I]; the options are those of torch.randn."""
    return torch.randn(steps, rows, I, generator=torch.Generator().manual_seed(seed), **options)


def states(module: RecurrentLayer, rows: int = B, **options: Any) -> Any:
    """Return states (h_0, c_0), or h_0, as a layer takes them; the options are those of torch.randn."""
    number = module.num_layers * (2 if module.bidirectional else 1)
    generator = torch.Generator().manual_seed(2)
    h_0 = torch.randn(number, rows, module.proj_size or H, generator=generator, **options)
    c_0 = torch.randn(number, rows, H, generator=generator, **options)
    return (h_0, c_0) if "c" in module._cell.states else h_0


def assert_equal(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Require the same names with the same numbers, bit for bit."""
    assert set(results) == set(expected)
    assert [name for name, value in expected.items() if not torch.equal(results[name], value)] == []
