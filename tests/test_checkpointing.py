"""Saved tensors recomputed, moved away or packed: activation checkpointing and the hooks of torch.autograd.graph."""

import functools

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from novolstm_triton.engines import bptt

from .support.layers import REGULARISED, both, layer, sequence, states
from .support.twins import running_on

LENGTHS = torch.tensor([5, 0, 3])

reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def loss_of(module):
    """Return a loss as a function of the input."""
    return lambda x: module(x, lengths=LENGTHS)[0].square().sum()


def gradients(module, x, loss):
    """Return the loss, and the gradients of input and parameters, of a function at a known state of the generator."""
    module.zero_grad()
    x.grad = None
    torch.manual_seed(5)
    value = loss(x)
    # What is drawn in between is no part of what is recomputed.
    torch.rand(3)
    value.backward()
    return [value.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_same(results, expected):
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """Return a list with the name of every call of what the operators run."""
    made = []
    for name in ("forward", "backward"):
        plain = getattr(bptt, name)
        monkeypatch.setattr(bptt, name, lambda *a, name=name, plain=plain, **k: made.append(name) or plain(*a, **k))
    return made


@both
@reentrant
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(REGULARISED, id="regularised"),
        pytest.param(REGULARISED | dict(bidirectional=True), id="bidirectional"),
        pytest.param(dict(num_layers=2, proj_size=3), id="projected"),
    ],
)
def test_checkpoint_gives_the_same_gradients(calls, kind, use_reentrant, options):
    module, x = layer(kind, **options), sequence(requires_grad=True)
    expected = gradients(module, x, loss_of(module))
    once = calls.copy()
    calls.clear()
    results = gradients(module, x, lambda x: checkpoint(loss_of(module), x, use_reentrant=use_reentrant))
    assert_same(results, expected)
    assert calls.count("forward") == 2 * once.count("forward")
    assert calls.count("backward") == once.count("backward")


@both
@reentrant
def test_checkpoint_on_triton(kind, use_reentrant):
    module, x = layer(kind, recurrent_dropout=0.3, zoneout_h=0.2), sequence(requires_grad=True)
    with running_on("triton"):
        expected = gradients(module, x, loss_of(module))
        assert_same(
            gradients(module, x, lambda x: checkpoint(loss_of(module), x, use_reentrant=use_reentrant)), expected
        )


@both
@reentrant
def test_checkpoint_of_a_state_that_is_carried(kind, use_reentrant):
    module, x = layer(kind, **REGULARISED), sequence(steps=8, requires_grad=True)

    # The reentrant kind knows no tensors inside of tuples.
    def flat(x, h, c):
        y, (h, c) = module(x, (h, c))
        return y, h, c

    def loss(x, through):
        state, total = states(module), x.new_zeros(())
        for part in x.split(4):
            y, *state = through(flat, part, *state)
            total = total + y.square().sum()
        return total

    expected = gradients(module, x, lambda x: loss(x, lambda f, *a: f(*a)))
    through = functools.partial(checkpoint, use_reentrant=use_reentrant)
    assert_same(gradients(module, x, lambda x: loss(x, through)), expected)


@both
def test_checkpoint_restores_autocast(kind):
    module, x = layer(kind, **REGULARISED), sequence(requires_grad=True)
    results = []
    for through in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=False)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(module, x, lambda x, t=through: t(loss_of(module), x).float()))
    assert_same(*results)


@both
def test_checkpoint_that_saves_the_operator_does_not_run_it_again(calls, kind):
    """Selective checkpointing: a policy names operators whose results are kept."""
    module, x = layer(kind), sequence(requires_grad=True)
    expected = gradients(module, x, loss_of(module))
    calls.clear()

    def policy(context, operator, *args, **options):
        kept = operator is torch.ops.novolstm_triton.forward.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    loss = functools.partial(checkpoint, loss_of(module), use_reentrant=False, context_fn=contexts)
    assert_same(gradients(module, x, loss), expected)
    assert calls == ["forward", "backward"]


@both
def test_second_derivatives_of_a_checkpoint(kind):
    module, x = layer(kind), sequence(requires_grad=True)

    def penalty(x):
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return first.square().sum()

    expected = gradients(module, x, penalty)
    assert_same(gradients(module, x, lambda x: checkpoint(penalty, x, use_reentrant=False)), expected)


@both
def test_saved_on_the_cpu(kind):
    module, x = layer(kind, **REGULARISED), sequence(requires_grad=True)
    expected = gradients(module, x, loss_of(module))

    def loss(x):
        with save_on_cpu():
            return loss_of(module)(x)

    assert_same(gradients(module, x, loss), expected)
    # A whole step inside, backward and all.
    with save_on_cpu():
        assert_same(gradients(module, x, loss_of(module)), expected)


@both
def test_saved_in_files(kind, tmp_path):
    module, x = layer(kind, **REGULARISED), sequence(requires_grad=True)
    expected = gradients(module, x, loss_of(module))
    written = []

    def pack(tensor):
        written.append(tmp_path / str(len(written)))
        torch.save(tensor, written[-1])
        return written[-1]

    def loss(x):
        with saved_tensors_hooks(pack, torch.load):
            return loss_of(module)(x)

    assert_same(gradients(module, x, loss), expected)
    assert written


@both
def test_saved_in_half_the_bits(kind):
    module, x = layer(kind), sequence(requires_grad=True)
    expected = gradients(module, x, loss_of(module))

    def pack(tensor):
        return tensor.half() if tensor.dtype == torch.float32 else tensor

    def unpack(tensor):
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def loss(x):
        with saved_tensors_hooks(pack, unpack):
            return loss_of(module)(x)

    results = gradients(module, x, loss)
    assert torch.equal(results[0], expected[0])
    torch.testing.assert_close(results, expected, rtol=1e-2, atol=1e-2)
    assert not torch.equal(results[2], expected[2])


@both
def test_hooks_may_forbid_to_save(kind):
    module = layer(kind, **REGULARISED)
    message = "nothing may be saved here"
    with torch.autograd.graph.disable_saved_tensors_hooks(message):
        loss_of(module)(sequence()).backward()
    with torch.no_grad(), saved_tensors_hooks(lambda t: pytest.fail(message), lambda t: t):
        loss_of(module)(sequence())
