"""The layers inside the transforms of torch.func, against the reference backend and against loops."""

from typing import Any

import pytest
import torch
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

from .support.layers import REGULARISED, B, H, T, both, layer, sequence
from .support.ordered import ordered
from .support.twins import running_on

# PyTorch makes its own derivatives of forward mode with what this warning forbids.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

F64: dict[str, Any] = dict(dtype=torch.float64)


def pair(kind, **options):
    """Return a layer in float64, and one with the same parameters on the reference backend."""
    module = layer(kind, **options, **F64)
    other = layer(kind, **options, **F64, backend="reference")
    other.load_state_dict(module.state_dict())
    return module, other


def function(module):
    """Return a loss as a function of a layer's parameters and its input."""

    def loss(parameters, x):
        y, (h_n, c_n) = functional_call(module, parameters, (x,))
        return y.square().sum() + h_n.sum() + c_n.square().sum()

    return loss


def assert_all_close(results, expected):
    """Compare nests of tensors; in float64 to a few roundings."""
    torch.testing.assert_close(tree_leaves(results), tree_leaves(expected), rtol=1e-10, atol=1e-12)


TRANSFORMS = {
    "grad": lambda loss, p, x: grad(loss)(p, x),
    "grad_and_value": lambda loss, p, x: grad_and_value(loss, argnums=1)(p, x),
    "vjp": lambda loss, p, x: vjp(loss, p, x)[1](torch.ones((), **F64)),
    "jacrev": lambda loss, p, x: jacrev(loss)(p, x),
    "grad-of-grad": lambda loss, p, x: grad(lambda x: grad(loss, argnums=1)(p, x).square().sum())(x),
    "hessian-by-jacrev": lambda loss, p, x: jacrev(jacrev(loss, argnums=1), argnums=1)(p, x),
    "per-sample-gradients": lambda loss, p, x: vmap(grad(loss), in_dims=(None, 1))(p, x),
}


@both
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_is_that_of_the_reference(kind, transform):
    module, other = pair(kind)
    parameters, x = dict(module.named_parameters()), sequence(**F64)
    assert_all_close(transform(function(module), parameters, x), transform(function(other), parameters, x))


@both
def test_options_are_transformed_along(kind):
    module, other = pair(kind, num_layers=2, bidirectional=True, proj_size=2)
    x, lengths = sequence(**F64), torch.tensor([5, 0, 3])
    results = [jacrev(lambda x, m=m: m(x, lengths=lengths)[0])(x) for m in (module, other)]
    assert_all_close(*results)


@both
def test_jacobian_in_chunks(kind):
    module, _ = pair(kind)
    x = sequence(**F64)
    whole, parts = (jacrev(lambda x: module(x)[0], chunk_size=size)(x) for size in (None, 7))
    assert_all_close(parts, whole)


@both
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_batch_of_models(kind, backend):
    """What vmap over stacked parameters gives is what the models give one after the other."""
    with running_on(backend):
        models = [layer(kind, seed=seed) for seed in range(2)]
        stacked, buffers = stack_module_state(models)
        losses, gradients = [], []
        for model in models:
            loss = function(model)(dict(model.named_parameters()), sequence())
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        by_transform = vmap(grad(function(models[0])), in_dims=(0, None))(stacked, sequence())
        mapped = vmap(function(models[0]), in_dims=(0, None))(stacked, sequence())
        by_autograd = torch.autograd.grad(mapped.sum(), list(stacked.values()))
    assert not buffers
    torch.testing.assert_close(mapped, torch.stack(losses))
    expected = tuple(torch.stack(member) for member in zip(*gradients, strict=True))
    torch.testing.assert_close(by_autograd, expected)
    torch.testing.assert_close(tuple(by_transform.values()), expected)


@both
def test_per_sample_gradients_are_those_of_single_rows(kind):
    module, _ = pair(kind)
    parameters, x = dict(module.named_parameters()), sequence(**F64)
    gradients = vmap(grad(function(module)), in_dims=(None, 1))(parameters, x)
    for row in range(B):
        alone = torch.autograd.grad(function(module)(parameters, x[:, row]), list(parameters.values()))
        assert_all_close([g[row] for g in gradients.values()], list(alone))


@both
def test_batch_of_lengths(kind):
    module, _ = pair(kind)
    x, lengths = sequence(**F64), torch.tensor([[5, 0, 3], [1, 2, 5]])
    results = vmap(lambda n: module(x, lengths=n)[0])(lengths)
    for own, n in zip(results, lengths, strict=True):
        assert_all_close(own, module(x, lengths=n)[0])


@both
def test_batch_in_a_batch_and_batch_of_none(kind):
    module, _ = pair(kind)
    x = torch.stack([sequence(seed=seed, **F64) for seed in range(4)]).unflatten(0, (2, 2))
    results = vmap(vmap(lambda x: module(x)[0], in_dims=2, out_dims=2))(x.movedim(1, 3))
    for own, given in zip(results.movedim(3, 1).flatten(0, 1), x.flatten(0, 1), strict=True):
        assert_all_close(own, module(given)[0])
    assert vmap(lambda x: module(x)[0])(x[:0, 0]).shape == (0, T, B, H)


@both
def test_randomness_is_what_vmap_is_told(kind):
    module = layer(kind, **REGULARISED)
    x = torch.stack([sequence()] * 2)
    with ordered():
        same, different = (vmap(lambda x: module(x)[0], randomness=r)(x) for r in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        vmap(lambda x: module(x)[0])(x)


FORWARD = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(f)(x),
}


@both
@pytest.mark.parametrize("transform", FORWARD.values(), ids=FORWARD)
def test_forward_mode_is_the_references(kind, transform):
    module, other = pair(kind)

    def by(m):
        return transform(lambda x: m(x)[0].square().sum(), sequence(**F64))

    assert all(torch.isfinite(t).all() for t in tree_leaves(by(other)))
    with pytest.raises(NotImplementedError, match=r"forward-mode .* needs backend='reference'; reverse mode"):
        by(module)


@both
def test_dual_numbers_are_the_references(kind):
    module, other = pair(kind)
    x, loss = sequence(**F64), lambda m, x: m(x)[0].square().sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(other, dual)).tangent
        with pytest.raises(NotImplementedError, match="forward-mode"):
            loss(module, dual)
    torch.testing.assert_close(tangent, (grad(lambda x: loss(module, x))(x) * x).sum())


@both
def test_functions_of_torch_autograd(kind):
    module, other = pair(kind)
    x = sequence(steps=3, rows=2, **F64)
    for name in ("jacobian", "hessian"):
        of = getattr(torch.autograd.functional, name)
        for vectorize in (False, True):
            results = [of(lambda x, m=m: m(x)[0].square().sum(), x, vectorize=vectorize) for m in (module, other)]
            assert_all_close(*results)
