"""What holds for every call of both layers, tried on calls drawn by hypothesis."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from .support.calls import ALL, EXACT, LAYOUTS, Call, Drawn, for_calls
from .support.ordered import ordered
from .support.problems import FLOORS, assert_as_exact_as_eager

FEW = {"reference": 25, "torch": 40, "triton": 3}

# Results and gradients with a part for every row, and those with one for every step; the others are sums over both.
# A cell with one state has no c.
OUTPUTS = ("y", "h_n", "c_n")
OF_ROWS = (*OUTPUTS, "grad x", "grad h_0", "grad c_0")
OF_STEPS = ("y", "grad x")

Results = dict[str, Tensor]


def assert_same_bits(results: Results, expected: Results, names: tuple[str, ...] = OF_ROWS) -> None:
    assert [n for n in names if n in expected and not torch.equal(results[n], expected[n])] == []


def assert_close(results: Results, expected: Results) -> None:
    """Require equality but for the order in which terms are added; a norm of two units has slopes in the hundreds."""
    for name, value in expected.items():
        tolerance = 10 * FLOORS[value.dtype] * value.abs().max().clamp_min(1).item()
        torch.testing.assert_close(results[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_but_for_sums(results: Results, expected: Results, exact: tuple[str, ...] = OF_ROWS) -> None:
    assert_same_bits(results, expected, exact)
    assert_close(results, expected)


def exact_across_borders(call: Call) -> tuple[str, ...]:
    """Return what has the same bits wherever a chunk ends.

    Not gradients with zoneout: dh has a third term, which is added there in another order. Nor those of the kernels,
    whose own products, in forward, are not `ordered`: backward brings a little other c back from a border.
    """
    return OF_ROWS if call.problem.zoneout == "none" and call.backend != "triton" else OUTPUTS


def takes_plain_steps(call: Call, *steps: int) -> bool:
    """Return whether a call of so many steps, or one of them, runs in other operators than one of more steps."""
    return call.backend == "torch" and 1 in steps


def changed(results: Results, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Results:
    return {name: change(a) if name in names else a for name, a in results.items()}


@for_calls(*ALL, examples={"torch": 100, "triton": 25}, two_tiles=True)
def test_results_are_those_of_the_reference(call: Call, data: st.DataObject):
    """However tensors lie in memory, and whichever gradients are wanted."""
    names = list(call.problem.input_names)
    layouts = data.draw(st.tuples(*[st.sampled_from(list(LAYOUTS))] * len(names)), "layouts")
    call = dataclasses.replace(call, problem=dataclasses.replace(call.problem, layouts=layouts))
    given = call.given()
    needs = data.draw(st.sets(st.sampled_from([n for n in names if given.inputs[n].numel()]), min_size=1), "needs")
    ways = st.sampled_from(("dense", "transposed", "gaps"))
    layouts = data.draw(st.tuples(*[ways] * len(given.grads)), "layouts of gradients")
    given.grads = [LAYOUTS[layout](g) for layout, g in zip(layouts, given.grads, strict=True)]
    results = call.results(given, needs)
    assert {name.removeprefix("grad ") for name in results} == needs | {*call.problem.output_names}
    assert {a.dtype for a in results.values()} == {call.dtype}
    truth = call.problem.run("reference", torch.float64, rounded=call.dtype)
    assert_as_exact_as_eager(call.problem, results, call.dtype, {name: truth[name] for name in results}, True)


@for_calls(examples=FEW, ordered=True)
def test_order_of_rows_is_that_of_the_results(call: Call, data: st.DataObject):
    given, order = call.given(), torch.tensor(data.draw(st.permutations(range(call.problem.batch)), "order"))
    with ordered():
        results, expected = call.results(given.take(order)), call.results(given)
    assert_same_but_for_sums(results, changed(expected, OF_ROWS, lambda a: a.index_select(-2, order)))


@for_calls(examples=FEW, ordered=True)
def test_row_alone_is_that_row_of_a_batch(call: Call, data: st.DataObject):
    given, row = call.given(), torch.tensor([data.draw(st.integers(0, call.problem.batch - 1), "row")])
    with ordered():
        results, batch = call.results(given.take(row)), call.results(given)
    assert_same_bits(results, changed(batch, OF_ROWS, lambda a: a.index_select(-2, row)))


@for_calls(*ALL, examples=FEW)
def test_row_beside_rows_of_nan_is_as_it_was(call: Call, data: st.DataObject):
    """Even with PyTorch's own products, for all shapes are the same."""
    problem, given = call.problem, call.given()
    row = data.draw(st.integers(0, problem.batch - 1), "row")
    others = torch.arange(problem.batch) != row

    def spoil(a: Tensor) -> Tensor:
        return a.masked_fill(others.unsqueeze(1), float("nan") if a.is_floating_point() else 255)

    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, problem.steps), min_size=problem.batch, max_size=problem.batch), "lengths")
    )
    spoiled = given.map(spoil, spoil, lambda own: torch.where(others, lengths, own))
    spoiled.inputs["h_0"][..., others, :] = float("nan")
    results, expected = (changed(r, OF_ROWS, lambda a: a[..., row, :]) for r in map(call.results, (spoiled, given)))
    assert_same_bits(results, expected)


@for_calls(examples=FEW, ordered=True)
def test_steps_beyond_all_lengths_change_nothing(call: Call, data: st.DataObject):
    """Whatever they and the gradients of their outputs hold."""
    problem, given, more = call.problem, call.given(), data.draw(st.integers(1, 5), "more")
    if given.lengths is None:
        given.lengths = torch.full((problem.batch,), problem.steps)

    def padded(a: Tensor) -> Tensor:
        return torch.cat((a, a.new_full((more, *a.shape[1:]), float("nan") if a.is_floating_point() else 255)))

    with ordered():
        results, expected = call.results(given.over_steps(padded)), call.results(given)
    assert not any(results[name][problem.steps :].any() for name in OF_STEPS)
    results = changed(results, OF_STEPS, lambda a: a[: problem.steps])
    exact = () if takes_plain_steps(call, problem.steps) else exact_across_borders(call)
    assert_same_but_for_sums(results, expected, exact)


@for_calls(examples=FEW, ordered=True)
def test_full_lengths_are_no_lengths(call: Call, data: st.DataObject):
    given = dataclasses.replace(call.given(), lengths=None)
    full = dataclasses.replace(given, lengths=torch.full((call.problem.batch,), call.problem.steps))
    with ordered():
        results, expected = call.results(full), call.results(given)
    # Where autograd differentiates the loop, the order in which it adds is its own.
    exact = OUTPUTS if call.backend == "reference" else tuple(expected)
    assert_same_but_for_sums(results, expected, exact)


@for_calls(examples={"torch": 40, "triton": 3}, ordered=True)
def test_chunks_change_nothing(call: Call, data: st.DataObject):
    other = dataclasses.replace(call, chunk=data.draw(st.integers(1, call.problem.steps), "chunk"))
    given = call.given()
    with ordered():
        results, expected = other.results(given), call.results(given)
    assert_same_but_for_sums(results, expected, exact_across_borders(call))


@for_calls(examples=FEW, one_way=True, ordered=True)
def test_reverse_of_a_reversed_sequence_is_the_sequence(call: Call, data: st.DataObject):
    problem, given = call.problem, call.given()
    lengths = torch.full((problem.batch,), problem.steps) if given.lengths is None else given.lengths
    t = torch.arange(problem.steps).unsqueeze(1)
    mirror = torch.where(t < lengths, lengths - 1 - t, t).unsqueeze(2)

    def flipped(a: Tensor) -> Tensor:
        return a.gather(0, mirror.expand_as(a))

    other = dataclasses.replace(call, problem=dataclasses.replace(problem, reverse=not problem.reverse))
    with ordered():
        results, expected = other.results(given.over_steps(flipped)), call.results(given)
    assert_same_but_for_sums(results, changed(expected, OF_STEPS, flipped), exact_across_borders(call))


@for_calls(examples=FEW, one_way=True, least_steps=2, ordered=True)
def test_sequence_in_two_pieces_is_the_whole(call: Call, data: st.DataObject):
    """With the state carried over, and gradients back through it."""
    problem, given, cut = call.problem, call.given(), data.draw(st.integers(1, call.problem.steps - 1), "cut")
    leaves = {name: a.requires_grad_() for name, a in given.inputs.items() if a.numel()}
    pieces = [
        given.over_steps(lambda a: a[:cut], lambda lengths: lengths.clamp(max=cut)),
        given.over_steps(lambda a: a[cut:], lambda lengths: (lengths - cut).clamp(min=0)),
    ]
    if problem.reverse:
        pieces.reverse()
    with ordered():
        expected = call.results(given)
        with call.running():
            y_first, *state = call.outputs(pieces[0])
            pieces[1].inputs |= dict(zip(problem.input_names[1:], state, strict=False))
            y_second, *last = call.outputs(pieces[1])
            y = torch.cat((y_second, y_first) if problem.reverse else (y_first, y_second))
            gradients = torch.autograd.grad((y, *last), list(leaves.values()), given.grads)
    results = dict(zip(problem.output_names, (y, *last), strict=True))
    results |= {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    exact = exact_across_borders(call)
    if call.backend == "reference":
        exact = OUTPUTS
    elif problem.projection or takes_plain_steps(call, cut, problem.steps - cut):
        # A state that is given takes another way than one that the layer makes.
        exact = ()
    assert_same_but_for_sums(results, expected, exact)


@for_calls(*EXACT, torch.bfloat16, examples=FEW)
def test_gradients_scale_with_a_power_of_two(call: Call, data: st.DataObject):
    """Bit for bit, sums and all, with PyTorch's own products."""
    given, factor = call.given(), 2.0 ** data.draw(st.integers(-8, 8), "exponent")
    results = call.results(dataclasses.replace(given, grads=[g * factor for g in given.grads]))
    expected = call.results(given)
    gradients = tuple(name for name in expected if name.startswith("grad"))
    assert_same_bits(results, changed(expected, gradients, lambda a: a * factor), tuple(expected))


@for_calls(*ALL, examples=FEW)
def test_gradients_of_nothing_are_zero(call: Call, data: st.DataObject):
    given = call.given()
    given.grads = [torch.zeros_like(g) for g in given.grads]
    results = call.results(given)
    assert [name for name, a in results.items() if name.startswith("grad") and a.any()] == []


@for_calls(examples=FEW)
def test_gradients_are_linear_in_those_of_the_results(call: Call, data: st.DataObject):
    given, factor = call.given(), data.draw(st.floats(-2, 2, width=16), "factor")
    others = [g.flip(0) for g in given.grads]
    together = [g + factor * other for g, other in zip(given.grads, others, strict=True)]
    one, other, both = (call.results(dataclasses.replace(given, grads=g)) for g in (given.grads, others, together))
    assert_close(both, {name: a + factor * other[name] for name, a in one.items() if name.startswith("grad")})


@for_calls(*ALL, examples=FEW, projected=False, zoneout=False)
def test_zoneout_of_one_keeps_the_state(call: Call, data: st.DataObject):
    problem, given = call.problem, call.given()
    h_0, (dy, dh_n, *dc_n) = given.inputs["h_0"], given.grads
    y = torch.cat(h_0.unbind(0), -1) if problem.bidirectional else h_0
    masks = dict(zoneout_mask=torch.full((*given.inputs["x"].shape[:2], y.shape[-1]), 3, dtype=torch.uint8))
    shares = dict(zoneout=(1.0, 1.0)[: len(given.grads) - 1])
    results = call.results(given, **(masks if data.draw(st.booleans(), "masks") else shares))
    y = y.expand(problem.steps, *y.shape)
    if given.lengths is not None:
        valid = (torch.arange(problem.steps).unsqueeze(1) < given.lengths).unsqueeze(2)
        y, dy = y * valid, dy * valid
    dh = torch.stack(dy.sum(0).chunk(2, -1)) if problem.bidirectional else dy.sum(0)
    kept = {"y": y, "h_n": h_0}
    if dc_n:
        kept |= {"c_n": given.inputs["c_0"], "grad c_0": dc_n[0]}
    assert_same_bits(results, kept, tuple(kept))
    assert_close({"dh": results.pop("grad h_0")}, {"dh": dh_n + dh})
    assert [name for name, a in results.items() if name not in kept and a.any()] == []


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("cell", ["lstm", "formula"])
def test_no_steps_are_refused(cell, backend):
    problem = Drawn(1, 2, 3, cell=cell)
    inputs = [a.float() for a in problem.draw()[0]]
    with pytest.raises(ValueError, match=r"x: expected at least one step .*, got shape \[0, 2, 3\]"):
        problem.call([inputs[0][:0], *inputs[1:]], None, backend)
