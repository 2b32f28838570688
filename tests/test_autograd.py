"""The layers under autograd: parts of a graph, second derivatives, hooks, and what autograd refuses."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from .support.layers import REGULARISED, assert_equal, both, layer, sequence, states
from .support.problems import errors
from .support.twins import BACKENDS, differentiate, running_on

on_backends = pytest.mark.parametrize("backend", BACKENDS)


def leaves(module, x):
    return [x, *module.parameters()]


@both
@on_backends
def test_gradients_through_one_result_alone(kind, backend):
    """Of y, h_n and c_n, those that the loss does not use count as zero."""
    module, x = layer(kind), sequence(requires_grad=True)
    with running_on(backend):
        y, (h_n, c_n) = module(x)
        alone = [torch.autograd.grad(o.sum(), leaves(module, x), retain_graph=True) for o in (y, h_n, c_n)]
        together = torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), leaves(module, x))
    total = tuple(map(sum, zip(*alone, strict=True)))
    torch.testing.assert_close(total, together)
    # The last output is the last state.
    (last,) = torch.autograd.grad(module(x)[0][-1].sum(), [x])
    (state,) = torch.autograd.grad(module(x)[1][0][-1].sum(), [x])
    torch.testing.assert_close(last, state)


@both
@on_backends
def test_loss_on_a_slice(kind, backend):
    module, x = layer(kind), sequence(requires_grad=True)
    with running_on(backend):
        (gradient,) = torch.autograd.grad(module(x)[0][2, 1, :3].sum(), [x])
    assert gradient[:3, 1].abs().min() > 0
    assert gradient[3:].abs().max() == 0
    assert gradient[:, [0, 2]].abs().max() == 0


@both
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_subset_of_leaves_has_the_gradients_of_all(kind, backend):
    module = layer(kind)
    h_0, c_0 = states(module)
    named = {"x": sequence(), "h_0": h_0, "c_0": c_0} | dict(module.named_parameters())
    with running_on(backend):
        for tensor in named.values():
            tensor.requires_grad_()
        y, final = module(named["x"], (h_0, c_0))
        everything = torch.autograd.grad(y.square().sum() + final[1].sum(), list(named.values()))
        expected = dict(zip(named, everything, strict=True))
        names = list(named)
        for wanted in (names[:1], names[1:3], names[4:5], names[3:], names[::2]):
            for name, tensor in named.items():
                tensor.requires_grad_(name in wanted).grad = None
            y, final = module(named["x"], (h_0, c_0))
            (y.square().sum() + final[1].sum()).backward()
            assert_equal({n: t.grad for n, t in named.items() if t.grad is not None}, {n: expected[n] for n in wanted})


@both
def test_frozen_parameters_give_results_without_history(kind):
    module = layer(kind).requires_grad_(False)
    y, (h_n, c_n) = module(sequence())
    assert {y.requires_grad, h_n.requires_grad, c_n.requires_grad} == {False}
    x = sequence(requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in module.parameters())


@both
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_modes_of_the_module_have_the_same_gradients(kind, backend):
    module, x = layer(kind), sequence(requires_grad=True)
    with running_on(backend):
        assert_equal(differentiate(module.eval(), x), differentiate(module.train(), x))


@both
@on_backends
def test_retained_graph_gives_the_same_again(kind, backend):
    module, x = layer(kind, recurrent_dropout=0.3, zoneout_h=0.2), sequence(requires_grad=True)
    with running_on(backend):
        loss = module(x)[0].square().sum()
        first, second = (torch.autograd.grad(loss, leaves(module, x), retain_graph=True) for _ in range(2))
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    for a, b, tensor in zip(first, second, leaves(module, x), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, tensor.grad)


@both
def test_gradients_accumulate(kind):
    module, x = layer(kind), sequence()
    for part in (slice(0, 1), slice(1, 3)):
        module(x[:, part])[0].square().sum().backward()
    whole = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    torch.testing.assert_close(tuple(p.grad for p in module.parameters()), whole)


@both
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(bidirectional=True), id="bidirectional"),
        pytest.param(dict(recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1), id="regularised"),
        pytest.param(dict(proj_size=2), id="projected"),
    ],
)
def test_gradcheck_of_both_orders(kind, options):
    module = layer(kind, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]
    lengths = torch.tensor([3, 0])

    def function(x, h_0, c_0, *parameters):
        torch.manual_seed(3)
        given = dict(zip(names, parameters, strict=True))
        y, (h_n, c_n) = functional_call(module, given, (x, (h_0, c_0)), dict(lengths=lengths))
        return y, h_n, c_n

    x = sequence(steps=3, rows=2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *states(module, 2, dtype=torch.float64, requires_grad=True), *module.parameters())
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@both
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_penalty_is_that_of_the_reference(kind, backend):
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        module, x = layer(kind).to(dtype), sequence().to(dtype).requires_grad_()
        with running_on(name):
            y, (h_n, _) = module(x)
            (first,) = torch.autograd.grad(y.square().sum() + h_n.sum(), [x], create_graph=True)
            names = ["x", *(name for name, _ in module.named_parameters())]
            second = torch.autograd.grad(first.square().sum(), leaves(module, x))
            results.append(dict(zip(names, second, strict=True)))
    assert max(largest for largest, _ in errors(*results).values()) < 5e-5


@both
def test_third_derivatives_are_those_of_the_reference(kind):
    results = []
    for backend in ("torch", "reference"):
        module = layer(kind, dtype=torch.float64, backend=backend)
        x = sequence(dtype=torch.float64, requires_grad=True)
        value, gradient = module(x)[0].square().sum(), x
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, [x], create_graph=True)
            value = gradient.square().sum()
        results.append(gradient.detach())
    torch.testing.assert_close(*results)


@both
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("changed", ["x", "weight_hh_l1", "y"])
def test_what_backward_needs_must_not_change(kind, backend, changed):
    module, x = layer(kind, num_layers=2), sequence()
    with running_on(backend):
        y, _ = module(x)
        loss = y.sum()
        with torch.no_grad():
            ({"x": x, "y": y} | dict(module.named_parameters()))[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@both
def test_module_hooks(kind):
    module, x = layer(kind), sequence(requires_grad=True)
    expected = differentiate(module, x)
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:])),
        module.register_forward_hook(lambda m, args, out: (out[0] * 3, out[1])),
        module.register_full_backward_hook(lambda m, into, out: seen.append((into, out))),
    ]
    y, _ = module(x)
    y.sum().backward()
    torch.testing.assert_close(y, 3 * module.forward(2 * x)[0])
    ((into, out),) = seen
    assert into[0].shape == x.shape
    assert torch.equal(out[0], torch.ones_like(y))
    for handle in handles:
        handle.remove()
    assert_equal(differentiate(module, x), expected)


@both
@on_backends
def test_tensor_hooks(kind, backend):
    module, x = layer(kind), sequence(requires_grad=True)
    with running_on(backend):
        plain = torch.autograd.grad(module(x)[0].sum(), leaves(module, x))
        y, _ = module(x)
        y.retain_grad()
        y.register_hook(lambda g: g * 2)
        seen = []
        handles = [p.register_post_accumulate_grad_hook(seen.append) for p in module.parameters()]
        y.sum().backward()
    for handle in handles:
        handle.remove()
    assert torch.equal(y.grad, torch.full_like(y, 2.0))
    for gradient, tensor in zip(plain, leaves(module, x), strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)
    assert len(seen) == len(plain) - 1


@both
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in RecurrentFunctionBackward")
def test_anomaly_mode(kind):
    module, x = layer(kind, **REGULARISED), sequence(requires_grad=True)
    with torch.autograd.detect_anomaly():
        module(x)[0].sum().backward()
        bad = sequence().index_fill_(0, torch.tensor([0]), torch.nan).requires_grad_()
        with pytest.raises(RuntimeError, match="returned nan values"):
            module(bad)[0].sum().backward()


@both
def test_copy_of_a_trained_layer_goes_on_alike(kind):
    def train(module, optimizer):
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            module(sequence())[0].square().sum().backward()
            optimizer.step()
        return dict(module.state_dict())

    module = layer(kind, **REGULARISED)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, optimizer)
    twin = copy.deepcopy(module)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    after = train(module, optimizer)
    assert_equal(dict(twin.state_dict()), before)
    assert_equal(train(twin, torch.optim.SGD(twin.parameters(), lr=0.1)), after)
