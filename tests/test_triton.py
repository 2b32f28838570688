"""The Triton backend against the float64 reference, its programs interleaved in random order and checked for races."""

import random

import numpy as np
import pytest
import torch
import triton

from novolstm_triton import plan
from novolstm_triton.cells import CELLS, with_kernels
from novolstm_triton.functional import novolstm
from novolstm_triton.testing import cooperative

from .support.interpreted import ROOMY, SELF_VALIDATING
from .support.problems import INPUTS, Problem, assert_as_exact_as_eager, errors

SLICES, HIDDEN, BATCH, STEPS = (1, 2, 4, 8), (1, 7, 64, 100, 257), (1, 5, 33), (1, 2, 9, 40)
QUICK_WORK = 1500


def sample_cases(count: int) -> list:
    """Draw cases that between them use every value of every axis, the cheap ones first; the largest take minutes."""
    generator, cases, cells = random.Random(2026), [], sorted(with_kernels())
    while len(cases) < count:
        hidden, batch, steps = generator.choice(HIDDEN), generator.choice(BATCH), generator.choice(STEPS)
        # The axes' values come round in turn, so that a short sample misses none.
        slices = SLICES[len(cases) % len(SLICES)]
        block_k, resident = generator.choice((None, None, 16, 64)), generator.random() < 0.7
        pins = dict(slices=slices, chunk=max(1, steps // 2), resident=resident, block_k=block_k)
        if slices > hidden or work(Problem(steps, batch, hidden), pins) > 9000:
            continue
        problem = Problem(
            steps,
            batch,
            hidden,
            cell=cells[len(cases) % len(cells)],
            lengths=generator.random() < 0.5,
            reverse=generator.random() < 0.5,
            h_mask=generator.random() < 0.3,
            zoneout=generator.choice(("none", "none", "masks", "average")),
            seed=len(cases),
        )
        name = f"{problem}-S{slices}-{'resident' if pins['resident'] else 'streamed'}"
        marks = [pytest.mark.exhaustive] if work(problem, pins) > QUICK_WORK else []
        cases.append(pytest.param(problem, pins, id=name, marks=marks))
    # Among as good ones a quick run takes the first.
    return sorted(cases, key=lambda case: work(*case.values))


def work(problem, pins) -> int:
    """Return what a case costs, roughly in operations on tiles."""
    blocks = -(-problem.hidden // (pins["block_k"] or 64))
    per_step = 20 + blocks * (6 if pins["resident"] else 12)
    return pins["slices"] * -(-problem.batch // 16) * problem.steps * per_step


def axes(problem, pins) -> tuple:
    """Return the values that a quick run takes once each."""
    flags = problem.lengths, problem.reverse, problem.h_mask, problem.zoneout
    return problem.steps, problem.batch, problem.hidden, problem.cell, *flags, *pins.values()


@pytest.mark.covering(1, of=axes)
@pytest.mark.parametrize(("problem", "pins"), sample_cases(30))
def test_matches_float64_under_random_schedule(problem, pins):
    with cooperative(problem.seed, poison=True) as report, plan.forced(device=ROOMY, **pins):
        result = problem.run("triton", torch.float32)
    assert report.programs > 0
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.parametrize("seed", range(6))
def test_matches_float64_under_every_policy(seed):
    problem = Problem(steps=3, batch=18, hidden=20, lengths=True, seed=seed)
    with cooperative(seed, poison=True) as report, plan.forced(device=ROOMY, slices=3, chunk=2):
        result = problem.run("triton", torch.float32)
    assert report.atomics > 0
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.covering(1)
@pytest.mark.parametrize("variant", sorted(with_kernels()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("slices", [1, 4])
def test_sixteen_bit_dtypes(dtype, slices, variant):
    options = dict(h_mask=slices == 4, zoneout=("average", "masks")[slices == 4], lengths=slices == 4)
    problem = Problem(steps=4, batch=5, hidden=40, cell=variant, **options)
    with cooperative(1), plan.forced(device=ROOMY, slices=slices, chunk=3):
        result = problem.run("triton", dtype)
    assert result["y"].dtype == dtype
    assert_as_exact_as_eager(problem, result, dtype)


# Buffers in which words tell by their own bits whether they have arrived: no access to them is ordered by another.


@pytest.mark.covering(1)
@pytest.mark.parametrize("variant", ["lstm", "formula", "notebook", "notebook_all"])
@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("seed", range(4))
def test_self_validating_words(seed, lengths, variant):
    options = dict(lengths=lengths, reverse=seed % 2 == 1, h_mask=seed == 1, zoneout=("none", "masks")[seed > 1])
    problem = Problem(steps=3, batch=18, hidden=20, cell=variant, seed=seed, **options)
    pins = dict(slices=3, chunk=2, block_k=(16, None)[seed % 2])
    with (
        cooperative(seed, poison=True, self_validating=SELF_VALIDATING) as report,
        plan.forced(device=ROOMY, exchange="words", **pins),
    ):
        result = problem.run("triton", torch.float32)
    assert report.programs > 0
    assert report.atomics == 0
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.parametrize(("cell", "exchanges"), [("formula", 1), ("formula", 2), ("lstm", None)])
@pytest.mark.parametrize("exchange", ["barrier", "words"])
@pytest.mark.parametrize(
    "seeds",
    [pytest.param(range(3), id="few"), pytest.param(range(3, 50), id="others", marks=pytest.mark.exhaustive)],
)
def test_exact_under_fifty_schedules(seeds, exchange, cell, exchanges):
    problem = Problem(steps=4, batch=2, hidden=5, cell=cell, lengths=True)
    exempt = SELF_VALIDATING if exchange == "words" else ()
    pins = dict(exchange=exchange, exchanges=exchanges, slices=3, chunk=3)
    for seed in seeds:
        with cooperative(seed, poison=exchange == "barrier", self_validating=exempt), plan.forced(device=ROOMY, **pins):
            result = problem.run("triton", torch.float32)
        assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("variant", ["formula", "notebook", "formula_all", "notebook_all"])
@pytest.mark.parametrize("slices", [2, 4])
def test_one_exchange_in_backward(slices, variant, dtype):
    options = dict(lengths=slices == 2, reverse=slices == 4, h_mask=slices == 4)
    problem = Problem(steps=4, batch=18, hidden=40, cell=variant, **options)
    with cooperative(slices), plan.forced(device=ROOMY, slices=slices, chunk=3, exchanges=1):
        result = problem.run("triton", dtype)
    assert_as_exact_as_eager(problem, result, dtype)


@pytest.mark.covering(1)
@pytest.mark.parametrize("variant", sorted(with_kernels()))
@pytest.mark.parametrize(("exchange", "exchanges"), [("barrier", 2), ("barrier", 1), ("words", 2)])
@pytest.mark.parametrize(("hidden", "block_k", "num_warps"), [(64, 64, 4), (52, 32, 2)])
def test_parts_of_k(hidden, block_k, num_warps, exchange, exchanges, variant):
    """Every warp takes a part of K: in backward, and in forward if a slice has few units."""
    problem = Problem(steps=3, batch=5, hidden=hidden, cell=variant, lengths=True)
    exempt = SELF_VALIDATING if exchange == "words" else ()
    pins = dict(slices=4, chunk=2, block_k=block_k, num_warps=num_warps, exchange=exchange, exchanges=exchanges)
    with plan.forced(device=ROOMY, **pins):
        planned = plan.plan(hidden, 5, torch.bfloat16, ROOMY, cell=variant)
        assert (planned.forward.parts, planned.backward.parts) == (num_warps, num_warps)
        with cooperative(1, poison=exchange == "barrier", self_validating=exempt):
            result = problem.run("triton", torch.bfloat16)
    assert_as_exact_as_eager(problem, result, torch.bfloat16)


@pytest.mark.covering(1)
@pytest.mark.parametrize("tiles", [3, 4, 7, 100])
@pytest.mark.parametrize(("variant", "exchanges"), [("formula", 2), ("formula", 1), ("notebook_all", 2), ("lstm", 2)])
def test_tiles_in_flight(variant, exchanges, tiles):
    """As many as there is room for are loaded at once, whatever gate they belong to."""
    problem = Problem(steps=3, batch=3, hidden=72, cell=variant)
    tile_bytes, weight_bytes = 16 * 16 * 8, CELLS[variant].recurrent * 80 * 16 * 8
    smem_bytes = 2048 + weight_bytes + tiles * tile_bytes
    device = plan.Device("narrow", "cuda", 90, multiprocessors=64, smem_bytes=smem_bytes)
    pins = dict(device=device, slices=5, block_b=16, block_k=16, resident=True, chunk=2, exchanges=exchanges)
    with plan.forced(**pins):
        planned = plan.plan(72, 3, torch.float32, device, cell=variant)
        assert planned.forward.in_flight == min(5, tiles)
        assert planned.backward.in_flight == min(5 * CELLS[variant].recurrent, tiles)
        with cooperative(1, poison=True):
            result = problem.run("triton", torch.float32)
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_self_validating_words_of_sixteen_bits(dtype):
    problem = Problem(steps=5, batch=3, hidden=40, lengths=True)
    with (
        cooperative(1, self_validating=SELF_VALIDATING),
        plan.forced(device=ROOMY, exchange="words", slices=2, chunk=3),
    ):
        result = problem.run("triton", dtype)
    assert_as_exact_as_eager(problem, result, dtype)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("exchange", "exchanges"), [("barrier", 2), ("words", 2), ("words", 1)])
@pytest.mark.parametrize("bad", ["x", "h_0", "c_0", "weight_hh", "dy"])
@pytest.mark.parametrize("value", ["nan", "inf", "all-ones"])
def test_bad_numbers_end_and_show(exchange, exchanges, bad, value):
    """Whatever the data, no program may wait for ever; all-ones is the NaN with which "words" marks what is missing."""
    inputs, _, grads = Problem(steps=3, batch=2, hidden=6).draw()
    arguments = [a.float() for a in inputs]
    grads = [g.float() for g in grads]
    targets = {name: arguments[INPUTS.index(name)] for name in ("x", "h_0", "c_0", "weight_hh")}
    target = (targets | {"dy": grads[0]})[bad]
    if value == "all-ones":
        target.view(torch.int32).flatten()[0] = -1
    else:
        target.view(-1)[0] = float(value)
    arguments = [a.requires_grad_() for a in arguments]
    exempt = SELF_VALIDATING if exchange == "words" else ()
    pins = dict(exchange=exchange, exchanges=exchanges, slices=2, chunk=2)
    with cooperative(3, self_validating=exempt), plan.forced(device=ROOMY, **pins):
        outputs = novolstm(*arguments, backend="triton")
        gradients = torch.autograd.grad(outputs, arguments, grads)
    if value != "inf":
        assert any(t.isnan().any() for t in (*outputs, *gradients))


@pytest.mark.parametrize("variant", ["lstm", "formula", "notebook"])
def test_cluster(variant):
    """One program to the interpreter, whose exchanges are the compiler's: what is left is the arithmetic."""
    problem = Problem(steps=4, batch=3, hidden=40, cell=variant, lengths=True)
    pins = plan.Pins(device=plan.H200, exchange=plan.RACY, allow_races=True)
    with cooperative(0, poison=True), plan.in_force(pins):
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
            with pytest.raises(RuntimeError, match="needs Triton 3\\.9 or newer"):
                problem.run("triton", torch.float32)
            return
        result = problem.run("triton", torch.float32)
    assert_as_exact_as_eager(problem, result, torch.float32)


def test_batch_beyond_residency_runs_in_successive_launches():
    few = plan.Device("few", "cuda", 90, multiprocessors=5, smem_bytes=2**40)
    problem = Problem(steps=3, batch=70, hidden=20)
    with cooperative(3, poison=True), plan.forced(device=few, slices=2, block_b=16):
        kernel_plan = plan.plan(20, 70, torch.float32, few).forward
        result = problem.run("triton", torch.float32)
    assert (kernel_plan.tiles, kernel_plan.tiles_per_launch) == (5, 2)
    assert_as_exact_as_eager(problem, result, torch.float32)


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 takes one-element arrays for numbers, which NumPy 2.4 refuses",
)
def test_plain_interpreter_runs_unpinned():
    problem = Problem(steps=4, batch=3, hidden=10, lengths=True, reverse=True)
    assert_as_exact_as_eager(problem, problem.run("triton", torch.float32), torch.float32)


@pytest.mark.parametrize("slices", [1, 3])
def test_repeats_bit_for_bit_under_different_schedules(slices):
    problem, results = Problem(steps=4, batch=3, hidden=12), []
    for seed in (0, 1, 2):
        with cooperative(seed), plan.forced(device=ROOMY, slices=slices, chunk=3):
            results.append(problem.run("triton", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_padding_may_hold_anything(reverse):
    problem = Problem(steps=5, batch=6, hidden=8, lengths=True, reverse=reverse)
    inputs, lengths, grads = problem.draw()
    assert lengths is not None
    poisoned = inputs[0].clone()
    poisoned[torch.arange(5).unsqueeze(1) >= lengths] = float("nan")
    results = []
    for x in (inputs[0], poisoned):
        arguments = [a.float().requires_grad_() for a in (x, *inputs[1:])]
        with cooperative(0), plan.forced(device=ROOMY, slices=2, chunk=2):
            outputs = novolstm(*arguments, lengths=lengths, reverse=reverse, backend="triton")
            gradients = torch.autograd.grad(outputs, arguments, [g.float() for g in grads])
        results.append((*outputs, *gradients))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_split_sequence_with_carried_state_equals_the_whole():
    inputs, _, _ = Problem(steps=9, batch=4, hidden=12).draw()
    x, h, c, *weights = (a.float() for a in inputs)
    with cooperative(2), plan.forced(device=ROOMY, slices=3):
        whole = novolstm(x, h, c, *weights, backend="triton")
        parts = []
        for part in (x[:4], x[4:5], x[5:]):
            y, h, c = novolstm(part, h, c, *weights, backend="triton")
            parts.append(y)
    assert torch.equal(torch.cat(parts), whole[0])
    assert torch.equal(h, whole[1])
    assert torch.equal(c, whole[2])


@pytest.mark.parametrize("wanted", range(8))
def test_gradient_of_one_input_alone(wanted):
    with cooperative():
        problem = Problem(steps=3, batch=2, hidden=5)
        inputs, _, grads = problem.draw()
        truth = problem.run("reference", torch.float64)
        arguments = [a.float().requires_grad_(k == wanted) for k, a in enumerate(inputs)]
        outputs = novolstm(*arguments, gate_gain=problem.gate_gain, backend="triton")
        (gradient,) = torch.autograd.grad(outputs, [arguments[wanted]], [g.float() for g in grads])
        name = list(truth)[3 + wanted]
        assert errors({name: gradient}, {name: truth[name]})[name][0] < 1e-5


def test_non_contiguous_inputs():
    with cooperative():
        problem = Problem(steps=4, batch=3, hidden=6)
        inputs, _, _ = problem.draw()
        strided = [a.float().transpose(0, -1).contiguous().transpose(0, -1) for a in inputs]
        assert not strided[0].is_contiguous()
        lengths = torch.tensor([4, 0, 2, 0, 1, 0], dtype=torch.int32)[::2]
        expected = novolstm(*(a.float() for a in inputs), lengths=lengths.contiguous(), backend="triton")
        for a, b in zip(novolstm(*strided, lengths=lengths, backend="triton"), expected, strict=True):
            assert torch.equal(a, b)


def test_float64_names_the_torch_backend():
    inputs, _, _ = Problem(steps=1, batch=1, hidden=2).draw()
    with pytest.raises(TypeError, match="backend='torch'"):
        novolstm(*inputs, backend="triton")
