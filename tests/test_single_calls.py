"""A single step a call on a CPU: what nn.LSTM and nn.LSTMCell compute, for little more than they cost."""

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from novolstm_triton import GRU, LSTM, RNN, GRUCell, LSTMCell, NovoLSTM, NovoLSTMCell, RNNCell, use_backend

from .support.layers import B, H, I, assert_equal, both, layer, sequence, states
from .support.twins import assert_close, differentiate, pair

CELLS = {"LSTMCell": LSTMCell, "NovoLSTMCell": NovoLSTMCell}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without-bias": dict(bias=False),
    "stacked-bidirectional": dict(num_layers=2, bidirectional=True),
    "projected": dict(proj_size=2),
    "zoneout": dict(zoneout_h=0.3, zoneout_c=0.2),
}


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def operators_of(function, *args) -> list[str]:
    with Operators() as operators:
        function(*args)
    return operators.names


def calls_of(function, *args) -> int:
    """Return how many functions a call calls, Python's and built-in ones."""
    function(*args)
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@both
def test_a_step_is_that_of_the_other_backends(kind, options):
    module = layer(kind, **options).eval().double()
    x, hx = sequence(1, dtype=torch.float64), states(module, dtype=torch.float64)
    for state in (hx, None):
        results = differentiate(module, x.clone().requires_grad_(), state)
        with use_backend("reference"):
            expected = differentiate(module, x.clone().requires_grad_(), state)
        assert results.keys() == expected.keys()
        torch.testing.assert_close(results, expected)
        assert not any("novolstm" in name for name in operators_of(module, x, state))


@pytest.mark.parametrize("kind", CELLS.values(), ids=list(CELLS))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_cell_is_that_of_the_reference(kind, bias):
    torch.manual_seed(0)
    cell, x = kind(I, H, bias).double(), torch.randn(B, I, dtype=torch.float64)
    hx = tuple(torch.randn(2, B, H, dtype=torch.float64))
    for state in (hx, None):
        results = cell(x, state)
        with use_backend("reference"):
            torch.testing.assert_close(results, cell(x, state))
        assert not any("novolstm" in name for name in operators_of(cell, x, state))


@both
def test_results_of_a_step_share_no_memory(kind):
    module = layer(kind, num_layers=2)
    y, (h_n, c_n) = module(sequence(1), states(module))
    before = h_n.clone(), c_n.clone()
    y.detach().fill_(7)
    assert_equal(dict(h=h_n, c=c_n), dict(h=before[0], c=before[1]))


@both
def test_other_calls_of_one_step_remain_operators(kind):
    """In 16 bits, under autocast and in a recorded graph, one step is what several are."""
    module, x = layer(kind), sequence(1)
    operator = "novolstm_triton.forward.default"
    assert operator in operators_of(layer(kind).bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert operator in operators_of(module, x)
    program = torch.export.export(module, (x,))
    assert operator in {str(node.target) for node in program.graph.nodes}


MODULES = {
    "LSTMCell": (LSTMCell(I, H), nn.LSTMCell(I, H), torch.zeros(B, I)),
    "LSTM": (LSTM(I, H), nn.LSTM(I, H), torch.zeros(1, B, I)),
    "LSTM-stacked": (LSTM(I, H, 3), nn.LSTM(I, H, 3), torch.zeros(1, B, I)),
    "LSTM-bidirectional": (LSTM(I, H, bidirectional=True), nn.LSTM(I, H, bidirectional=True), torch.zeros(1, B, I)),
    "NovoLSTM": (NovoLSTM(I, H), nn.LSTM(I, H), torch.zeros(1, B, I)),
    "GRU": (GRU(I, H), nn.GRU(I, H), torch.zeros(1, B, I)),
    "GRUCell": (GRUCell(I, H), nn.GRUCell(I, H), torch.zeros(B, I)),
    "RNN": (RNN(I, H), nn.RNN(I, H), torch.zeros(1, B, I)),
    "RNNCell": (RNNCell(I, H), nn.RNNCell(I, H), torch.zeros(B, I)),
}


@pytest.mark.parametrize(("ours", "theirs", "x"), MODULES.values(), ids=list(MODULES))
def test_a_step_takes_few_calls(ours, theirs, x):
    """A call of Python's costs some 0.3 µs and nn.LSTM's step 80; bench/bench_cpu.py has the ratio of times."""
    assert calls_of(ours, x) <= 3 * calls_of(theirs, x) + 20
    assert not any("novolstm" in name for name in operators_of(ours, x))


def test_a_step_is_that_of_nn_lstm():
    theirs, ours = pair(I, H, 2, bidirectional=True)
    x, hx = sequence(1, requires_grad=True), states(ours, requires_grad=True)
    assert_close(differentiate(ours, x, hx), differentiate(theirs, x, hx))
