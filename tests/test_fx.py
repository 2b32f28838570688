"""Layers and cells under torch.fx: each call is one node of the graph, as that of a module of torch.nn."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import QConfigMapping, get_default_qconfig
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

from novolstm_triton import LSTMCell, NovoLSTMCell

from .support.layers import B, H, I, T, both, layer, sequence


class Twice(nn.Module):
    """A model that calls its layer without a state, and with one by keyword."""

    def __init__(self, recurrent):
        super().__init__()
        self.blocks = nn.ModuleList([recurrent])
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        _, (h, c) = self.blocks[0](x)
        y, _ = self.blocks[0](x, hx=(h, c))
        return self.head(y)


class OneCell(nn.Module):
    """A model that takes a step of a cell from a state."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x, h, c):
        return self.recurrent(x, (h, c))[0]


def nodes(graph):
    """Return what the nodes of a graph do, and to what."""
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]


@both
def test_graph_is_that_of_nn_lstm(kind):
    expected = nodes(fx.symbolic_trace(Twice(nn.LSTM(I, H))).graph)
    assert [op for op, *_ in expected].count("call_module") == 3
    assert nodes(fx.symbolic_trace(Twice(kind(I, H))).graph) == expected


@pytest.mark.parametrize("kind", [LSTMCell, NovoLSTMCell])
def test_graph_is_that_of_nn_lstm_cell(kind):
    model = OneCell(kind(I, H))
    traced = fx.symbolic_trace(model)
    assert nodes(traced.graph) == nodes(fx.symbolic_trace(OneCell(nn.LSTMCell(I, H))).graph)
    given = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
    assert torch.equal(traced(*given), model(*given))


@both
def test_graph_computes_what_the_model_computes_and_can_be_copied(kind):
    model, x = Twice(layer(kind)), sequence()
    traced = fx.symbolic_trace(model)
    again = fx.symbolic_trace(traced)
    assert nodes(again.graph) == nodes(traced.graph)
    for twin in (
        traced,
        again,
        copy.deepcopy(traced),
        pickle.loads(pickle.dumps(traced)),
        fx.Transformer(traced).transform(),
    ):
        assert torch.equal(twin(x), model(x))


@both
def test_lengths_and_constants_are_arguments_of_the_node(kind):
    recurrent, constant = layer(kind, batch_first=True), torch.randn(1, B, H)

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = recurrent

        def forward(self, x, lengths):
            y, _ = self.recurrent(x, (constant, constant), lengths=lengths)
            of_zeros, _ = self.recurrent(torch.zeros(B, T, I), lengths=lengths)
            return y, of_zeros

    traced, x, lengths = fx.symbolic_trace(Ragged()), sequence().transpose(0, 1), torch.tensor([5, 0, 2])
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == 2
    for mine, other in zip(traced(x, lengths), Ragged()(x, lengths), strict=True):
        assert torch.equal(mine, other)


@both
def test_hooks_run_with_the_graph_and_not_while_tracing(kind):
    model, x, calls = Twice(layer(kind)), sequence(), []

    def double(module, args, output):
        calls.append(module)
        return output[0] * 2, output[1]

    model.blocks[0].register_forward_hook(double)
    traced = fx.symbolic_trace(model)
    assert calls == []
    expected = model(x)
    assert len(calls) == 2
    assert torch.equal(traced(x), expected)
    assert len(calls) == 4


@both
def test_a_tracer_of_ones_own_is_asked(kind):
    paths = []

    class Paths(fx.Tracer):
        def call_module(self, m, forward, args, kwargs):
            paths.append(self.path_of_module(m))
            return super().call_module(m, forward, args, kwargs)

        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, nn.Linear)

    Paths().trace(Twice(layer(kind)))
    assert paths == ["blocks.0", "blocks.0", "head"]


# PyTorch warns of every part of this quantisation, which is to be replaced by another package.
@pytest.mark.filterwarnings("ignore")
@both
def test_quantisation_leaves_the_layer_and_quantises_around_it(kind):
    model, x = Twice(layer(kind)).eval(), sequence()
    prepared = prepare_fx(copy.deepcopy(model), QConfigMapping().set_global(get_default_qconfig("x86")), (x,))
    prepared(x)
    converted = convert_to_reference_fx(prepared)
    assert type(converted.get_submodule("blocks.0")) is kind
    assert type(converted.head) is not nn.Linear
    torch.testing.assert_close(converted(x), model(x), rtol=0, atol=0.05)
