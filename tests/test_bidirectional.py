"""Both directions of a layer at once: what two calls give, in one launch per chunk."""

from typing import Any

import pytest
import torch

from novolstm_triton import NovoLSTM, plan
from novolstm_triton.engines import launch
from novolstm_triton.functional import novolstm
from novolstm_triton.testing import cooperative

from .support.interpreted import ROOMY, SELF_VALIDATING
from .support.problems import Problem, assert_as_exact_as_eager


@pytest.fixture
def grids(monkeypatch):
    """Return a list to which every launch of a persistent kernel adds its grid."""
    found = []
    plain = launch._launch

    def recording(kernel, grid, *args, **constants):
        found.append(grid)
        plain(kernel, grid, *args, **constants)

    monkeypatch.setattr(launch, "_launch", recording)
    return found


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("exchange", "exchanges", "variant"),
    [
        ("barrier", 2, "formula"),
        ("barrier", 2, "notebook"),
        ("barrier", 1, "notebook"),
        ("words", 2, "formula"),
        ("words", 1, "formula"),
        ("words", 1, "notebook"),
    ],
)
def test_one_launch_per_chunk_matches_float64(grids, exchange, exchanges, variant):
    # Two chunks, the last one shorter: the second direction's start at other steps than the first's.
    lengths = (exchange == "words") == (variant == "formula")
    problem = Problem(steps=3, batch=18, hidden=20, cell=variant, lengths=lengths, bidirectional=True, seed=exchanges)
    pins = dict(exchange=exchange, exchanges=exchanges, slices=2 + exchanges % 2, block_b=16, chunk=2)
    exempt = SELF_VALIDATING if exchange == "words" else ()
    with cooperative(problem.seed, poison=True, self_validating=exempt), plan.forced(device=ROOMY, **pins):
        result = problem.run("triton", torch.float32)
    # Two batch tiles of each direction.
    assert grids == [(pins["slices"], 4)] * 4
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("hidden", [1, 20])
def test_one_slice(grids, hidden, resident):
    problem = Problem(steps=4, batch=3, hidden=hidden, lengths=True, bidirectional=True)
    with cooperative(0, poison=True), plan.forced(device=ROOMY, slices=1, chunk=3, resident=resident):
        result = problem.run("triton", torch.float32)
    assert grids == [(1, 2)] * 4
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.parametrize(("dtype", "exchanges"), [(torch.bfloat16, 2), (torch.float16, 1)], ids=["bf16", "fp16-one"])
def test_sixteen_bit_dtypes(dtype, exchanges):
    problem = Problem(steps=4, batch=3, hidden=20, lengths=True, bidirectional=True)
    with cooperative(1, poison=True), plan.forced(device=ROOMY, slices=2, chunk=3, exchanges=exchanges):
        result = problem.run("triton", dtype)
    assert_as_exact_as_eager(problem, result, dtype)


@pytest.mark.parametrize("multiprocessors", [2, 6, 8])
def test_directions_beyond_residency_run_in_successive_launches(grids, multiprocessors):
    few = plan.Device("few", "cuda", 90, multiprocessors=multiprocessors, smem_bytes=2**40)
    problem = Problem(steps=2, batch=18, hidden=6, lengths=True, bidirectional=True)
    with cooperative(3, poison=True), plan.forced(device=few, slices=2, block_b=16):
        result = problem.run("triton", torch.float32)
    expected = {2: [(2, 1)] * 4, 6: [(2, 3), (2, 1)], 8: [(2, 4)]}[multiprocessors]
    assert grids == expected * 2
    assert_as_exact_as_eager(problem, result, torch.float32)


def test_plan_counts_the_tiles_of_both_directions():
    sizes = (512, 48, torch.bfloat16, plan.H100)
    with plan.forced(slices=32, block_b=16):
        one, both = (plan.plan(*sizes, directions=directions).forward for directions in (1, 2))
        x = torch.empty(1, 48, 1, dtype=torch.bfloat16)
        with plan.forced(device=plan.H100):
            assert launch.launch_plan(x, 512, "formula", 2).forward == both
    assert (one.tiles, one.tiles_per_launch) == (3, 3)
    assert (both.tiles, both.tiles_per_launch) == (6, 4)
    assert both.step_us == 2 * one.step_us


@pytest.mark.parametrize("variant", ["formula", "notebook"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_equals_two_calls(backend, variant):
    """Not to the last bit: a gradient of x is rounded once less."""
    problem = Problem(steps=4, batch=3, hidden=8, cell=variant, lengths=True, bidirectional=True)
    inputs, lengths, grads = problem.draw()
    x, *rest = (a.float().requires_grad_() for a in inputs)
    options: dict[str, Any] = dict(lengths=lengths, gate_gain=problem.gate_gain, variant=variant, backend=backend)
    with cooperative(1, poison=True), plan.forced(device=ROOMY, slices=2, chunk=3):
        outputs = novolstm(x, *rest, **options)
        both = [novolstm(x, *(a[d] for a in rest), reverse=d == 1, **options) for d in (0, 1)]
        expected = [torch.cat([y for y, _, _ in both], -1), *(torch.stack([r[k] for r in both]) for k in (1, 2))]
        for mine, theirs in zip(outputs, expected, strict=True):
            assert torch.equal(mine, theirs)
        grads = [g.float() for g in grads]
        gradients = [torch.autograd.grad(results, (x, *rest), grads) for results in (outputs, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(variant="notebook", bias=False)], ids=["formula", "notebook-no-bias"])
def test_module_gives_what_two_one_way_modules_give(grids, options):
    """Two layers with lengths, states and gradients of every parameter; each module reads them at every call."""
    torch.manual_seed(0)
    module = NovoLSTM(3, 6, num_layers=2, bidirectional=True, backend="triton", **options)
    x, lengths = torch.randn(4, 3, 3), torch.tensor([4, 0, 2])
    h_0, c_0 = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    results = []
    for backend in ("triton", "reference"):
        module.backend = backend
        module.zero_grad(set_to_none=True)
        with cooperative(2, poison=True), plan.forced(device=ROOMY, slices=2, chunk=3):
            y, (h_n, c_n) = module(x, (h_0, c_0), lengths=lengths)
            (y.square().sum() + h_n.sum() + c_n.sum()).backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append((y.detach(), h_n.detach(), c_n.detach(), gradients))
    # Two chunks of two layers, forward and backward.
    assert grids == [(2, 2)] * 8
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [0, 2, 4])
def test_gradient_of_one_input_alone(wanted):
    problem = Problem(steps=3, batch=2, hidden=5, bidirectional=True)
    inputs, _, grads = problem.draw()
    arguments = [a.float().requires_grad_(k == wanted) for k, a in enumerate(inputs)]
    truth = list(problem.run("reference", torch.float64).values())[3 + wanted]
    with cooperative(0, poison=True):
        outputs = novolstm(*arguments, gate_gain=problem.gate_gain, backend="triton")
        (gradient,) = torch.autograd.grad(outputs, [arguments[wanted]], [g.float() for g in grads])
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=1e-5)


def test_repeats_bit_for_bit_under_different_schedules():
    problem, results = Problem(steps=4, batch=2, hidden=5, lengths=True, bidirectional=True), []
    for seed in (0, 1):
        with cooperative(seed, poison=True), plan.forced(device=ROOMY, slices=2, chunk=3):
            results.append(problem.run("triton", torch.float32))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_bad_shapes_are_named():
    inputs, _, _ = Problem(steps=2, batch=2, hidden=3, bidirectional=True).draw()
    for place, bad, error, message in (
        (1, inputs[1][0], ValueError, r"h_0: expected \[2, B, H\]"),
        (4, inputs[4][0], ValueError, r"weight_hh: expected \[2, R·H, H\]"),
        (3, None, TypeError, "weight_ih: expected a Tensor"),
    ):
        given: list[Any] = [*inputs]
        given[place] = bad
        with pytest.raises(error, match=message):
            novolstm(*given)
