"""Floating-point operations, as PyTorch's counter counts them: those of the loop, exactly."""

import contextlib
import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from novolstm_triton import GRU, LSTM, RNN, GRUCell, LSTMCell, NovoLSTM, NovoLSTMCell, RecurrentLayer, RNNCell
from novolstm_triton.cells import CELLS

from .support.layers import B, H, I, T, layer, sequence, states

OPTIONS = {
    "lstm": (LSTM, {}),
    "lstm-stacked-bidirectional": (LSTM, dict(num_layers=2, bidirectional=True)),
    "formula": (NovoLSTM, {}),
    "formula-masked": (NovoLSTM, dict(recurrent_dropout=0.2, zoneout_h=0.1)),
    "notebook": (NovoLSTM, dict(variant="notebook", layer_norm="all", bias=False)),
    "gru": (GRU, {}),
    "gru-stacked-bidirectional": (GRU, dict(num_layers=2, bidirectional=True, bias=False)),
    "rnn": (RNN, {}),
    "relu": (RNN, dict(nonlinearity="relu", num_layers=2, recurrent_dropout=0.2, zoneout_h=0.1)),
    "peephole": (functools.partial(RecurrentLayer, CELLS["peephole"]), {}),
    "gru-reset-before": (functools.partial(RecurrentLayer, CELLS["gru_reset_before"]), {}),
}


def counted(call):
    """Return what a call returns, and its operations."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def passes(module, x, hx=None, lengths=None):
    """Return the operations of forward and of backward."""
    (y, last), forward = counted(lambda: module(x, hx, lengths=lengths))
    return forward, counted((y.sum() + last[-1].sum()).backward)[1]


@pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("given", ["nothing", "states", "states-and-lengths"])
def test_counts_are_those_of_the_loop(kind, options, given):
    hx = None if given == "nothing" else states(layer(kind, **options), requires_grad=True)
    lengths = torch.tensor([5, 1, 2]) if "lengths" in given else None
    x = sequence(requires_grad=given == "states")
    ours, expected = (passes(layer(kind, **options, backend=name), x, hx, lengths) for name in ("torch", "reference"))
    assert ours == expected
    assert expected[0] > 0


class Watching(TorchDispatchMode):
    """Passes every operator on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modes", [1, 2])
def test_gradients_are_the_same_while_operators_are_watched(modes):
    """Of a cell that autograd differentiates within an operator."""
    module, x = layer(GRU, backend="torch"), sequence(requires_grad=True)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    with contextlib.ExitStack() as stack:
        for _ in range(modes):
            stack.enter_context(Watching())
        result = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0 weight_hh_l0"])
@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_gradients_that_nobody_asks_for_do_not_count(kind, frozen):
    results = []
    for name in ("torch", "reference"):
        module = layer(kind, backend=name)
        for parameter in frozen.split():
            module.get_parameter(parameter).requires_grad_(False)
        results.append(passes(module, sequence()))
    assert results[0] == results[1]


@pytest.mark.parametrize(("kind", "number"), [(LSTM, 4), (NovoLSTM, 5), (GRU, 3), (RNN, 1)])
def test_formula_in_the_documentation(kind, number):
    blocks = H * (number * I + number * H)
    hx = states(layer(kind), requires_grad=True)
    assert passes(layer(kind), sequence(requires_grad=True), hx) == (2 * T * B * blocks, 4 * T * B * blocks)


@pytest.mark.parametrize("kind", [LSTMCell, NovoLSTMCell, GRUCell, RNNCell])
def test_cells_are_counted(kind):
    x, cells = torch.randn(B, I), [kind(I, H, backend=name) for name in ("torch", "reference")]
    ours, expected = (counted(lambda cell=cell: cell(x))[1] for cell in cells)
    assert ours == expected > 0


PROGRAM = """
import sys
{imports}
with FlopCounterMode(display=False) as counter:
    novolstm_triton.LSTM(3, 4, backend="torch")(torch.zeros(5, 2, 3))
assert counter.get_total_flops() == 2 * 5 * 2 * 4 * 4 * (3 + 4), counter.get_total_flops()
"""

COUNTER = "from torch.utils.flop_counter import FlopCounterMode"
PACKAGE = "import torch, novolstm_triton"
# The counter imports Triton: nobody should pay for it who does not count.
ALONE = f"{PACKAGE}\nassert 'torch.utils.flop_counter' not in sys.modules"


@pytest.mark.parametrize("imports", [[ALONE, COUNTER], [COUNTER, PACKAGE]], ids=["counter-last", "counter-first"])
def test_order_of_imports_does_not_matter(imports):
    subprocess.run([sys.executable, "-c", PROGRAM.format(imports="\n".join(imports))], check=True)
