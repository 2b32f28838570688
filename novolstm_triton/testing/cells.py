"""`check_cell`: does a cell compute on every backend what its definition says? Found without a GPU."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from novolstm_triton import plan
from novolstm_triton.cells import Cell, register
from novolstm_triton.problems import FLOORS, Problem, compare, errors, excess

from .cell_step import BY_COMPANIONS, Step, by_autograd, by_tile_functions
from .cooperative import cooperative
from .happens_before import GridError

ROOMY = plan.Device("roomy", "cuda", 90, multiprocessors=64, smem_bytes=2**40)
"""A device on which every tiling fits."""

SIZES: dict[str, Any] = dict(steps=3, batch=3, hidden=8)
"""Those of the layers."""

LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no options": (dict(), dict(slices=1)),
    "lengths, reverse": (dict(lengths=True, reverse=True), dict(slices=2)),
    "lengths, both directions": (dict(lengths=True, bidirectional=True), dict(slices=3)),
    "masks": (dict(h_mask=True, zoneout="masks"), dict(slices=2)),
}
"""Options of the layers, and what is asked of their plans, besides two chunks."""

ONE_EXCHANGE = {"lengths, one exchange a step back": (dict(lengths=True), dict(slices=2, exchanges=1))}
"""Likewise, of cells that take sums over the units."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is nearest to its bound in a part of the check."""

    part: str
    array: str
    error: float
    """Relative to the array's largest magnitude."""
    bound: float

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.part}: {self.array}: error {self.error:.1e}, bound {self.bound:.1e}"

    def excess(self) -> float:
        """Return the error in units of its bound."""
        return excess(self.error, self.bound)


@dataclasses.dataclass(frozen=True)
class CellReport:
    """What `check_cell` found: no error beyond its bound."""

    cell: str
    findings: tuple[Finding, ...]
    """For each part of the check the array whose error is nearest to its bound."""

    def __str__(self) -> str:
        """Return a line for each part."""
        return "\n".join((f"cell {self.cell}: everything within its bounds", *(f"  {f}" for f in self.findings)))


def check_cell(cell: Cell, *, seeds: int = 2) -> CellReport:
    """Compare what a cell computes with its definition in float64, forward and backward.

    First one step: its tile functions, with the units in three slices, against autograd of `cell.step`: h, c, dz of
    each block, dc of the step before, the gradient of each vector. Then a whole layer: the kernels in the interpreter,
    with one, two and three slices, lengths, both directions, chunks and masks, their programs under random schedules
    and every access to memory checked; and backend "torch". Allowed is twice the error of the definition in the same
    dtype, plus a floor. A cell without tile functions has the last part alone.

    Args:
        cell: any cell; it need not be one of the package.
        seeds: how many inputs, and schedules, to draw.

    Returns:
        A report; `print` shows for each part what came nearest to its bound.

    Raises:
        AssertionError: an error beyond its bound, a tile function that returns the wrong number of values or raises, a
            race. The message names the cell, the part and the arrays, as in "dz of block f" or "grad weight_hh".
        TypeError: `cell` is not a Cell.
        ValueError: less than one seed, or another cell has the name.
        RuntimeError: the cell has tile functions, and Triton is not in interpreter mode: set TRITON_INTERPRET=1 before
            it is imported.
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds!r}")
    register(cell)
    findings = []
    for part, measure in _parts(cell):
        worst: dict[str, tuple[float, float]] = {}
        for seed in range(seeds):
            try:
                found = measure(seed)
            except (GridError, ValueError) as error:
                raise AssertionError(f"cell {cell.name}, {part}: {error}") from error
            for array, pair in found.items():
                worst[array] = max(worst.get(array, pair), pair, key=lambda pair: excess(*pair))
        ranked = sorted(
            (Finding(part, array, *pair) for array, pair in worst.items()), key=Finding.excess, reverse=True
        )
        if beyond := [str(finding) for finding in ranked if finding.excess() > 1]:
            raise AssertionError(f"cell {cell.name}, " + "\n".join(beyond))
        findings.append(ranked[0])
    return CellReport(cell.name, tuple(findings))


Errors = Mapping[str, tuple[float, float]]
"""Error and bound of arrays by their names."""


def _parts(cell: Cell) -> Iterator[tuple[str, Callable[[int], Errors]]]:
    """Yield the name of each part of the check, and a function of a seed that makes it."""

    def problem(options: dict[str, Any]) -> Problem:
        return Problem(**SIZES, cell=cell.name, **options)

    if cell.kernels is not None:
        kernels = cell.load_kernels()
        yield "one step", functools.partial(_step, cell, kernels)
        for name, (options, pins) in (LAYERS | (ONE_EXCHANGE if kernels.companion_gates else {})).items():
            run = functools.partial(_interpreted, problem(options), pins)
            slices = pins["slices"]
            yield f"kernels, {slices} slice{'s' if slices > 1 else ''}, {name}", run
    for name, (options, _) in LAYERS.items():
        yield f"backend torch, {name}", functools.partial(_plain, problem(options))


def _step(cell: Cell, kernels: Any, seed: int) -> Errors:
    """Compare one step of the tile functions with autograd of the definition."""
    step = Step.draw(cell, seed)
    truth, eager = (by_autograd(cell, step, dtype) for dtype in (torch.float64, torch.float32))
    result = by_tile_functions(cell, kernels, step)
    for array in result:
        # dz that is made in another way is to be the same.
        original = array.removesuffix(BY_COMPANIONS)
        truth[array], eager[array] = truth[original], eager[original]
    found, own = errors(result, truth), errors(eager, truth)
    return {array: (found[array][0], 2 * own[array][0] + FLOORS[torch.float32]) for array in truth}


def _interpreted(problem: Problem, pins: dict[str, Any], seed: int) -> Errors:
    """Compare a layer's kernels, interpreted under a schedule, with its definition."""
    problem = dataclasses.replace(problem, seed=seed)
    with cooperative(seed, poison=True, one_writer=True), plan.forced(device=ROOMY, chunk=2, **pins):
        return compare(problem, "triton", torch.float32)


def _plain(problem: Problem, seed: int) -> Errors:
    """Compare backend "torch" with the definition."""
    with plan.forced(chunk=2):
        return compare(dataclasses.replace(problem, seed=seed), "torch", torch.float64)
