"""The hand-written backward in PyTorch against autograd through the reference."""

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from novolstm_triton import ops
from novolstm_triton.functional import novolstm

from .support.problems import INPUTS, NOVOLSTM, RESULTS, Problem, assert_as_exact_as_eager

VARIANTS = ("lstm", *NOVOLSTM)
NORMALISED = tuple(NOVOLSTM)


@pytest.fixture
def chunk_of(monkeypatch):
    """A function that makes every chunk so many steps long."""

    def set_chunk(steps: int) -> None:
        monkeypatch.setattr(ops, "chunk_steps", lambda *sizes: steps)

    return set_chunk


def call(problem: Problem, backend: str, inputs: Sequence[Tensor], lengths: Tensor | None) -> tuple[Tensor, ...]:
    return problem.call(inputs, lengths, backend)


def differentiate(
    problem: Problem, backend: str, lengths: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Like `Problem.run`, with lengths of one's own."""
    inputs, drawn, grads = problem.draw()
    inputs = [a.to(dtype).requires_grad_() for a in inputs]
    outputs = call(problem, backend, inputs, drawn if lengths is None else lengths)
    used = {name: a for name, a in zip(problem.input_names, inputs, strict=True)}
    gradients = torch.autograd.grad(outputs, list(used.values()), [g.to(dtype) for g in grads])
    results = dict(zip(problem.output_names, (o.detach() for o in outputs), strict=True))
    return results | {f"grad {name}": g for name, g in zip(used, gradients, strict=True)}


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    for name, value in expected.items():
        # An array of nothing but rounding errors (dγ of a single unit) has no scale of its own.
        scale = value.abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(results[name], value, rtol=0, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


def assert_bitwise(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.covering(1)
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@pytest.mark.parametrize("lengths", [None, [5, 0, 3]], ids=["whole", "lengths"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("backend", "chunk"), [("reference", 5), ("torch", 2), ("torch", 5)], ids=["reference", "torch-chunk2", "torch"]
)
def test_gradcheck(backend, variant, lengths, reverse, chunk, chunk_of):
    chunk_of(chunk)
    problem = Problem(5, 3, 4, inputs_size=2, cell=variant, reverse=reverse)
    inputs = [a.requires_grad_() for a in problem.draw()[0]]
    lengths = None if lengths is None else torch.tensor(lengths)
    function = lambda *args: call(problem, backend, args, lengths)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


@pytest.mark.parametrize("chunk", [1, 3, 7, 13, 50], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@pytest.mark.parametrize("lengths", [None, [13, 0, 1, 7, 12]], ids=["whole", "lengths"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_reference(variant, lengths, reverse, chunk, chunk_of):
    chunk_of(chunk)
    problem = Problem(13, 5, 11, inputs_size=6, cell=variant, reverse=reverse)
    lengths = None if lengths is None else torch.tensor(lengths)
    assert_same(differentiate(problem, "torch", lengths), differentiate(problem, "reference", lengths))


SIZES = {
    "one-step": (1, 4, 6, 3),
    "one-row": (9, 1, 6, 3),
    "one-unit": (9, 4, 1, 3),
    "one-of-all": (1, 1, 1, 1),
    "odd": (17, 3, 37, 19),
    "aligned": (8, 16, 64, 64),
}


@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes(sizes, variant, lengths, chunk_of):
    chunk_of(4)
    steps, batch, hidden, inputs_size = sizes
    for reverse in (False, True):
        problem = Problem(steps, batch, hidden, inputs_size, cell=variant, lengths=lengths, reverse=reverse)
        assert_same(differentiate(problem, "torch"), differentiate(problem, "reference"))


@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@pytest.mark.parametrize("edge", ["all-empty", "all-full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_at_their_limits(variant, edge, reverse, chunk_of):
    chunk_of(3)
    problem = Problem(8, 3, 5, cell=variant, reverse=reverse)
    lengths = torch.full((3,), 0 if edge == "all-empty" else 8)
    results = differentiate(problem, "torch", lengths)
    assert_same(results, differentiate(problem, "reference", lengths))
    if edge == "all-empty":
        inputs, _, grads = problem.draw()
        expected = {"h_n": inputs[1], "c_n": inputs[2], "grad h_0": grads[1], "grad c_0": grads[2]}
        assert_bitwise(results, expected)
        assert not any(results[name].any() for name in results if name not in expected)
    else:
        assert_bitwise(results, differentiate(problem, "torch"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("projection", [0, 2], ids=["whole", "projected"])
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
def test_padding_is_never_used(reverse, projection, backend, chunk_of):
    """Neither that of x nor that of the gradient of y."""
    chunk_of(3)
    problem, lengths = Problem(8, 3, 5, reverse=reverse, projection=projection), torch.tensor([8, 2, 0])
    padding = (torch.arange(8).unsqueeze(1) >= lengths).unsqueeze(2)
    names, results = problem.result_names, []
    for filler in (0.0, float("nan")):
        leaves, _, grads = problem.draw()
        for padded in (leaves[0], grads[0]):
            padded.masked_fill_(padding, filler)
        leaves = [a.requires_grad_() for a in leaves]
        outputs = call(problem, backend, leaves, lengths)
        values = (*outputs, *torch.autograd.grad(outputs, leaves, grads))
        results.append({name: value.detach() for name, value in zip(names, values, strict=True)})
    assert_bitwise(results[1], results[0])


@pytest.mark.parametrize("output", [0, 1, 2], ids=RESULTS[:3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_one_output(variant, output, chunk_of):
    chunk_of(3)
    problem = Problem(7, 2, 5, cell=variant, lengths=True)
    gradients = {}
    for backend in ("torch", "reference"):
        inputs, lengths, grads = problem.draw()
        inputs = [a.requires_grad_() for a in inputs]
        outputs = call(problem, backend, inputs, lengths)
        used = {name: a for name, a in zip(problem.input_names, inputs, strict=True)}
        found = torch.autograd.grad(outputs[output], list(used.values()), grads[output])
        gradients[backend] = dict(zip(used, found, strict=True))
    assert_same(gradients["torch"], gradients["reference"])


SUBSETS = {**{name: {name} for name in INPUTS}, "x-c_0-bias": {"x", "c_0", "bias"}, "states": {"h_0", "c_0"}}


@pytest.mark.parametrize("needed", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize("variant", NORMALISED)
def test_subsets_of_requires_grad(variant, needed, chunk_of):
    chunk_of(3)
    problem = Problem(7, 3, 5, cell=variant)
    everything = differentiate(problem, "torch")
    inputs, lengths, grads = problem.draw()
    for name, a in zip(problem.input_names, inputs, strict=True):
        a.requires_grad_(name in needed)
    torch.autograd.backward(call(problem, "torch", inputs, lengths), grads)
    for name, a in zip(problem.input_names, inputs, strict=True):
        if name not in needed:
            assert a.grad is None
        else:
            assert a.grad is not None
            assert_same({name: a.grad}, {name: everything[f"grad {name}"]}, rtol=1e-14)


def test_no_grad_keeps_nothing():
    problem = Problem(6, 2, 5)
    inputs, lengths, _ = problem.draw()
    y, h_n, c_n = call(problem, "torch", inputs, lengths)
    assert y.grad_fn is None
    torch.testing.assert_close(h_n, y[-1], rtol=0, atol=0)
    assert c_n.shape == h_n.shape


LAYOUTS = {
    "batch-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features-last": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every-other-step": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded-batch": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("variant", NORMALISED)
def test_strided_inputs(variant, layout, chunk_of):
    chunk_of(4)
    problem = Problem(9, 3, 5, inputs_size=4, cell=variant)
    inputs, lengths, _ = problem.draw()
    inputs[3] = inputs[3].t().contiguous().t()
    inputs[4] = inputs[4].repeat_interleave(2, dim=1)[:, ::2]
    x = layout(inputs[0])
    assert not x.is_contiguous()
    results = []
    for backend, value in (("torch", x), ("reference", x.contiguous())):
        leaves = [a.detach().requires_grad_() for a in (value, *inputs[1:])]
        outputs = call(problem, backend, leaves, lengths)
        # The sum's gradient is an expanded scalar: dy is strided too.
        gradients = torch.autograd.grad([o.sum() for o in outputs], leaves)
        results.append(dict(zip(RESULTS, (*outputs, *gradients), strict=True)))
    assert_same(*results)


@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_precision(dtype, variant, lengths, chunk_of):
    chunk_of(9)
    problem = Problem(40, 6, 48, inputs_size=24, cell=variant, lengths=lengths)
    results = problem.run("torch", dtype)
    assert {value.dtype for value in results.values()} == {dtype}
    assert_as_exact_as_eager(problem, results, dtype)


@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_repeats_bit_for_bit(dtype, lengths):
    problem = Problem(50, 17, 96, inputs_size=40, lengths=lengths)
    first = problem.run("torch", dtype)
    for _ in range(3):
        assert_bitwise(problem.run("torch", dtype), first)


@pytest.mark.parametrize("cut", [1, 5, 11], ids=lambda t: f"cut{t}")
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
@pytest.mark.parametrize("variant", NORMALISED)
def test_split_sequence(variant, reverse, cut, chunk_of):
    """Two halves with the state carried over equal the whole, gradients through the state included."""
    chunk_of(4)
    problem = Problem(12, 3, 7, cell=variant, reverse=reverse)
    expected = differentiate(problem, "torch")
    inputs, _, grads = problem.draw()
    inputs = [a.requires_grad_() for a in inputs]
    run = functools.partial(call, problem, "torch", lengths=None)
    parts = [inputs[0][:cut], inputs[0][cut:]]
    y_first, h, c = run(inputs=[parts.pop(-1 if reverse else 0), *inputs[1:]])
    y_second, h_n, c_n = run(inputs=[parts.pop(), h, c, *inputs[3:]])
    outputs = (torch.cat((y_second, y_first) if reverse else (y_first, y_second)), h_n, c_n)
    values = (*outputs, *torch.autograd.grad(outputs, inputs, grads))
    assert_same(dict(zip(RESULTS, values, strict=True)), expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 12], ids=lambda n: f"chunk{n}")
def test_forward_does_not_depend_on_the_chunk(chunk, chunk_of):
    problem = Problem(12, 3, 16, lengths=True)
    expected = problem.run("torch", torch.float64)
    chunk_of(chunk)
    assert_same(problem.run("torch", torch.float64), expected, rtol=1e-12)


@pytest.mark.parametrize("variant", NORMALISED)
def test_results_share_no_memory(variant):
    problem = Problem(4, 2, 3, cell=variant)
    inputs, lengths, _ = problem.draw()
    outputs = call(problem, "torch", inputs, lengths)
    storages = {a.untyped_storage().data_ptr() for a in (*inputs, *outputs)}
    assert len(storages) == len(inputs) + len(outputs)
    before = [a.clone() for a in inputs]
    differentiate(problem, "torch")
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives(variant, chunk_of):
    chunk_of(2)
    problem = Problem(4, 2, 3, inputs_size=2, cell=variant, lengths=True, h_mask=True, zoneout="masks")
    second = {}
    for backend in ("torch", "reference"):
        inputs, lengths, grads = problem.draw()
        inputs = [a.requires_grad_() for a in inputs]
        outgoing = [g.requires_grad_() for g in grads]
        outputs = call(problem, backend, inputs, lengths)
        first = torch.autograd.grad(outputs, inputs, outgoing, create_graph=True)
        size = torch.stack([g.square().sum() for g in first]).sum()
        again = torch.autograd.grad(size, [*inputs, *outgoing], create_graph=True)
        third = torch.autograd.grad(torch.stack([g.square().sum() for g in again]).sum(), inputs)
        second[backend] = {str(k): g.detach() for k, g in enumerate((*first, *again, *third))}
    assert_same(second["torch"], second["reference"])


def test_more_steps_than_sixteen_bits_count():
    """T = 66,000: the state forgets, so the end must be that of a run over the last steps alone."""
    inputs, _, _ = Problem(steps=66_000, batch=1, hidden=2).draw()
    x, *others = (a.float() for a in inputs)
    whole = novolstm(x, *others, backend="torch")
    tail = novolstm(x[-500:], *others, backend="torch")
    torch.testing.assert_close(whole[0][-100:], tail[0][-100:])
    torch.testing.assert_close(whole[1:], tail[1:])


def moved(a: Tensor, offset: int) -> Tensor:
    """Return a copy that begins so many elements after a multiple of 64 bytes."""
    buffer = a.new_empty(a.numel() + 32)
    begin = -(buffer.data_ptr() // a.element_size()) % 16 + offset
    return buffer[begin : begin + a.numel()].view(a.shape).copy_(a)


@pytest.mark.parametrize("chunk", [4, 7])
def test_results_do_not_depend_on_where_tensors_lie(chunk, chunk_of):
    """A CPU's products of the same matrices, elsewhere in memory, may add up in another order."""
    chunk_of(chunk)
    inputs, _, grads = Problem(steps=7, batch=3, hidden=6, inputs_size=5).draw()
    found = set()
    for offset in range(16):
        leaves = [moved(a.float(), (offset + 3 * k) % 16).requires_grad_() for k, a in enumerate(inputs)]
        results = novolstm(*leaves, backend="torch")
        gradients = torch.autograd.grad(results, leaves, [moved(g.float(), offset) for g in grads])
        found.add(b"".join(a.detach().contiguous().numpy().tobytes() for a in (*results, *gradients)))
    assert len(found) == 1
