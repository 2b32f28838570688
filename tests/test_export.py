"""The layers through torch.export: one program for all lengths and batches, saved and loaded; and torch.jit.trace."""

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence

from novolstm_triton import LSTM

from .support.layers import REGULARISED, B, T, both, layer, sequence, states

ANY = Dim.DYNAMIC


class Positional(nn.Module):
    """A model around a layer, with all its inputs as positional arguments."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, h_0, c_0, lengths):
        return self.rnn(x, (h_0, c_0), lengths=lengths)


def arguments(rnn, steps, rows):
    """Return arguments for `Positional`."""
    x = sequence(steps, rows)
    lengths = torch.randint(0, steps + 1, (rows,), generator=torch.Generator().manual_seed(4))
    return (x.transpose(0, 1) if rnn.batch_first else x), *states(rnn, rows), lengths


def exported(module, strict=False):
    """Return a saved and loaded program of a module for every number of steps and rows."""
    program = torch.export.export(
        module,
        arguments(module.rnn, 7, 3),
        dynamic_shapes=({0: ANY, 1: ANY}, {1: ANY}, {1: ANY}, {0: ANY}),
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    return torch.export.load(io.BytesIO(file.getvalue()))


DRAFT = """
import torch
from novolstm_triton import LSTM, NovoLSTM
x, lengths = torch.randn(5, 3, 4), torch.tensor([5, 1, 2])
for kind, options in ((LSTM, {}), (NovoLSTM, dict(num_layers=2, bidirectional=True))):
    module = kind(4, 6, **options)
    for given in ({}, dict(lengths=lengths)):
        program = torch.export.draft_export(module, (x,), given)
        assert program._report.successful()
        torch.testing.assert_close(program.module()(x, **given), module(x, **given))
"""


def test_draft_export_finds_nothing_to_complain_of():
    # In a process of its own: it leaves a file of its log open.
    subprocess.run([sys.executable, "-c", DRAFT], check=True)


@pytest.mark.covering(1)
@both
@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "strict"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(dict(num_layers=2, bidirectional=True, batch_first=True), id="bidirectional"),
        pytest.param(dict(proj_size=1), id="projected"),
    ],
)
def test_one_program_for_all_lengths_and_batches(kind, options, strict):
    module = Positional(layer(kind, **options)).eval()
    program = exported(module, strict)
    for steps, rows in ((7, 3), (2, 2), (5, 1), (1, 4), (130, 2)):
        given = arguments(module.rnn, steps, rows)
        # Not bit for bit: a call outside a program takes a single step, and rows of very different length, otherwise.
        torch.testing.assert_close(program.module()(*given), module(*given))


@both
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_program_is_one_operator_for_each_layer_and_direction(kind):
    program = exported(Positional(layer(kind, num_layers=2, bidirectional=True)))
    for graph in (program.graph, program.run_decompositions().graph):
        calls = [node for node in graph.nodes if "novolstm_triton" in str(node.target)]
        assert len(calls) == 4


@both
def test_program_of_a_training_layer_draws_anew(kind):
    module = Positional(layer(kind, **REGULARISED))
    program, given = exported(module).module(), arguments(module.rnn, 6, 4)
    torch.manual_seed(5)
    results = [program(*given)[0] for _ in range(2)]
    torch.manual_seed(5)
    expected = [module(*given)[0] for _ in range(2)]
    assert not torch.equal(*results)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@both
def test_program_can_be_trained(kind):
    module = layer(kind)
    program = torch.export.export(module, (sequence(),), dynamic_shapes={"input": {0: ANY, 1: ANY}}).module()
    x = sequence(steps=9, rows=2)
    for each in (program, module):
        each(x)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(program.get_parameter(name).grad, parameter.grad)


@both
def test_ranges_of_sizes_are_those_that_were_asked_for(kind):
    steps, rows = Dim("steps", min=1, max=500), Dim("rows", min=1, max=64)
    program = torch.export.export(layer(kind), (sequence(),), dynamic_shapes={"input": {0: steps, 1: rows}})
    assert sorted(str(limits) for limits in program.range_constraints.values()) == ["VR[1, 500]", "VR[1, 64]"]
    with pytest.raises(Exception, match=r"500"):
        program.module()(sequence(steps=501))


@both
def test_steps_of_a_stream(kind):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(kind, num_layers=2)

        def forward(self, x, h, c):
            return self.rnn.step(x, (h, c))

    module = Step()
    x, state = sequence(), states(module.rnn)
    step = torch.export.export(module, (x[0], *state), dynamic_shapes=({0: ANY}, {1: ANY}, {1: ANY})).module()
    y, _ = module.rnn(x[:, :2], (state[0][:, :2], state[1][:, :2]))
    state = tuple(s[:, :2] for s in state)
    for t in range(T):
        out, state = step(x[t, :2], *state)
        torch.testing.assert_close(out, y[t])


def test_packed_rows_cannot_be_exported():
    packed = pack_padded_sequence(sequence(), torch.tensor([5, 3, 1]))
    with pytest.raises(ValueError, match=r"torch.export: .* padded input and lengths="):
        torch.export.export(layer(LSTM), (packed,))


@both
# The shapes are checked in Python, which the trace forgets.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_trace(kind):
    module = layer(kind, num_layers=2, bidirectional=True).eval()
    traced: Any = torch.jit.trace(module, (sequence(),))
    for steps, rows in ((T, B), (1, 2), (40, 7)):
        x = sequence(steps, rows)
        torch.testing.assert_close(traced(x), module(x))
