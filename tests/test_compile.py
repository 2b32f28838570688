"""The module under torch.compile: one graph, few compilations over many lengths, the results of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from novolstm_triton import NovoLSTM, plan, use_backend

# Dynamo itself does what this warning of PyTorch's forbids.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(layer, x, **options):
    y, (h_n, c_n) = layer(x, **options)
    leaves = [x, *layer.parameters()]
    return [y, h_n, c_n, *torch.autograd.grad(y.square().sum() + h_n.sum() + c_n.sum(), leaves)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_eight_lengths_take_two_graphs(with_lengths, bidirectional):
    torch.manual_seed(0)
    layer = NovoLSTM(4, 6, num_layers=2, bidirectional=bidirectional, gate_gain="hidden")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for steps in (5, 6, 7, 9, 16, 17, 64, 130):
        x = torch.randn(steps, 3, 4, requires_grad=True)
        options = dict(lengths=torch.tensor([steps, 0, steps // 2])) if with_lengths else {}
        for one, other in zip(gradients(compiled, x, **options), gradients(layer, x, **options), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # The first length has a graph of its own; one other serves all lengths, so a step leaves nothing in it.
    assert counter.frame_count <= 2


def test_choices_in_force_are_those_of_the_tracing():
    layer = NovoLSTM(3, 4, gate_gain="hidden")
    x = torch.randn(6, 2, 3, requires_grad=True)
    with plan.forced(chunk=2), use_backend("torch"):
        expected = gradients(layer, x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for one, other in zip(gradients(compiled, x), expected, strict=True):
            assert torch.equal(one, other)
    # Outside of the block, too.
    for one, other in zip(gradients(compiled, x), expected, strict=True):
        assert torch.equal(one, other)
