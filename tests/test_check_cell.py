"""`check_cell` passes every cell of the package, and finds the mistakes that were put into copies of some."""

import dataclasses
import re
from unittest import mock

import pytest
import triton
import triton.language as tl

from novolstm_triton.cells import CELLS, Cell, with_kernels
from novolstm_triton.kernels.novolstm import formula_companions, formula_grad_finish, formula_partials
from novolstm_triton.kernels.peephole import peephole_grad_local, peephole_update
from novolstm_triton.testing import check_cell

KINDS = {"lengths, reverse", "lengths, both directions", "masks", "no options"}


def cells() -> list:
    """Return the names of the cells; those with all gates normalised have nothing that others have not."""
    slow = pytest.mark.exhaustive
    return [pytest.param(name, marks=[slow] if name.endswith("_all") else []) for name in CELLS]


@pytest.mark.parametrize("name", cells())
def test_cell_passes(name):
    report = check_cell(CELLS[name], seeds=1)
    parts = [finding.part for finding in report.findings]
    assert {part.partition("torch, ")[2] for part in parts if part.startswith("backend")} == KINDS
    assert str(report).startswith(f"cell {name}: everything within its bounds\n  {parts[0]}: ")
    kernels = [part for part in parts if not part.startswith("backend")]
    assert bool(kernels) == (name in with_kernels())
    if kernels:
        assert kernels[0] == "one step"
        assert {part.split(", ", 2)[2] for part in kernels[1:]} >= KINDS
        assert any("one exchange" in part for part in kernels) == bool(CELLS[name].load_kernels().companion_gates)


@pytest.fixture(autouse=True)
def no_cell_is_left_behind():
    """Checking a cell makes operators know it, and other tests take all that they know."""
    with mock.patch.dict(CELLS):
        yield


@triton.jit
def without_the_state(z, stats, c, c_prev, dh, dc, vectors, mask):
    sums, dz, pending, dc_prev, shares = peephole_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
    return sums, dz, pending, dc_prev - vectors[1] * dz[1], shares


@triton.jit
def state_before(z, stats, c, c_prev, dh, dc, vectors, mask):
    sums, dz, pending, dc_prev, shares = peephole_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
    return sums, dz, pending, dc_prev, (shares[0], shares[1], dz[3] * c_prev)


@triton.jit
def without_a_slope(z, stats, c, c_prev, dh, dc, vectors, mask):
    sums, dz, pending, dc_prev, shares = peephole_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
    f = tl.sigmoid(z[1] + vectors[1] * c_prev)
    return sums, (dz[0], dz[1] / (1.0 - f), dz[2], dz[3]), pending, dc_prev, shares


@triton.jit
def one_dz_too_few(z, stats, c, c_prev, dh, dc, vectors, mask):
    sums, dz, pending, dc_prev, shares = peephole_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
    return sums, dz[:3], pending, dc_prev, shares


@triton.jit
def o_sees_the_state_before(z, stats, c, vectors):
    h, c_new = peephole_update(z, stats, c, vectors)
    return h / tl.sigmoid(z[3] + vectors[2] * c_new) * tl.sigmoid(z[3] + vectors[2] * c), c_new


@triton.jit
def padding_counts(z, count, mask):
    return formula_partials(z, count, mask | True)


@triton.jit
def companions_exchanged(z, stats, mask, total):
    p, w, w_xhat = formula_companions(z, stats, mask, total)
    return p, w_xhat, w


@triton.jit
def no_share(z, stats, c, c_prev, dh, dc, vectors, mask):
    sums, dz, pending, dc_prev, shares = peephole_grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
    return sums, dz, pending, dc_prev, shares[:2]


@triton.jit
def one_late_dz(pending, stats, sums, total):
    return formula_grad_finish(pending, stats, sums, total)[:1]


MISTAKES = {
    "dc of the step before": ("peephole", dict(grad_local=without_the_state)),
    "dvector weight_ch[o]": ("peephole", dict(grad_local=state_before)),
    "dz of block f": ("peephole", dict(grad_local=without_a_slope)),
    "h": ("peephole", dict(update=o_sees_the_state_before)),
    "dz of block i": ("peephole", dict(early=(1, 0, 2, 3))),
    "dz of block p": ("formula", dict(late=(4, 0))),
    "c": ("formula", dict(partials=padding_counts)),
    "dz of block i by companions": ("formula", dict(companions=companions_exchanged)),
}
"""An array that is wrong, of which cell, and what is changed."""

WRONG_NUMBERS = {
    "early has blocks": ("peephole", dict(grad_local=one_dz_too_few)),
    "expected each of the blocks 0 to 3 once": ("peephole", dict(early=(0, 1, 2))),
    "partial_rows says": ("formula", dict(partial_rows=5)),
    "grad_rows says": ("formula", dict(grad_rows=2)),
    "stats says": ("formula", dict(stats=3)),
    "late has blocks": ("formula", dict(grad_finish=one_late_dz)),
    "companion_gates": ("formula", dict(companion_gates=(4, 0))),
    "block of the vectors": ("peephole", dict(grad_local=no_share)),
}
"""What the message says, of which cell, and what is changed."""


def mistaken(name: str, changes: dict) -> Cell:
    """Return a copy of a cell, with a name of its own, whose kernels are changed."""
    kernels = dataclasses.replace(CELLS[name].load_kernels(), **changes)
    return dataclasses.replace(CELLS[name], name=f"mistaken_{name}", kernels=kernels)


@pytest.mark.parametrize("array", MISTAKES)
def test_mistake_in_a_tile_function_is_found(array):
    cell = mistaken(*MISTAKES[array])
    with pytest.raises(
        AssertionError, match=rf"^cell {cell.name}, (.+\n)*one step: {re.escape(array)}: error"
    ) as error:
        check_cell(cell)
    assert re.search(r"error (nan|\d\.\de[+-]\d+), bound 1\.\de-05", str(error.value))


@pytest.mark.parametrize("said", WRONG_NUMBERS)
def test_wrong_number_of_values_is_said(said):
    cell = mistaken(*WRONG_NUMBERS[said])
    with pytest.raises(AssertionError, match=rf"^cell {cell.name}, one step: .*{said}"):
        check_cell(cell)


WRONG_STATES = {
    r"expected h \[5, 8\] in torch.float64, got \[5, 1\]": lambda h, c: (h[:, :1], c),
    r"expected c \[5, 8\] in torch.float64, got \[5, 8\] in torch.float32": lambda h, c: (h, c.float()),
}


@pytest.mark.parametrize("said", WRONG_STATES)
def test_state_of_another_shape_or_dtype_is_said(said):
    plain = CELLS["lstm"]
    cell = dataclasses.replace(plain, name="odd", step=lambda *given: WRONG_STATES[said](*plain.step(*given)))
    with pytest.raises(AssertionError, match=f"cell odd, one step: step: {said}"):
        check_cell(cell)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        check_cell(CELLS["lstm"], seeds=0)
    with pytest.raises(TypeError, match="cell: expected a Cell, got str"):
        check_cell("lstm")  # pyright: ignore[reportArgumentType]


def test_definition_that_returns_two_states_where_there_is_one_is_said():
    cell = dataclasses.replace(CELLS["lstm"], name="two_for_one", states=("h",))
    with pytest.raises(AssertionError, match="cell two_for_one, one step: step: expected h twice"):
        check_cell(cell)


def test_cell_without_tile_functions_is_compared_on_backend_torch():
    cell = dataclasses.replace(CELLS["coupled"], name="plain", kernels=None)
    assert {finding.part for finding in check_cell(cell).findings} == {f"backend torch, {kind}" for kind in KINDS}


def test_name_that_begins_like_that_of_another_cell_means_nothing():
    cell = dataclasses.replace(CELLS["coupled"], name="formula_of_mine")
    assert check_cell(cell, seeds=1).cell == "formula_of_mine"
