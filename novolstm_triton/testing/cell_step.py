"""One step of a cell by its tile functions, interpreted, and by autograd of its definition: half of `check_cell`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from novolstm_triton.cells import Cell
from novolstm_triton.kernels.cell import CellKernels
from novolstm_triton.kernels.one_step import step_kernel

from .cooperative import cooperative

BY_COMPANIONS = " by companions"
"""What the name of a dz ends with that is made as with one exchange a step."""

SHAPE = (5, 8)
"""Rows and units of a step."""

SIZES = dict(ROWS=SHAPE[0], HIDDEN=SHAPE[1], SLICES=3, UNITS=3, BLOCK_R=8, BLOCK_N=4, BLOCK_S=4)
"""Slices of three, three and two units in tiles of four: every tile has padding, and one is short."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of a cell is given, [B, H] each but the vectors, [H]; in float64, of values of fp32."""

    z: tuple[Tensor, ...]
    """Pre-activations, one tensor per block."""
    c: Tensor
    """State before the step."""
    vectors: tuple[Tensor, ...]
    dh: Tensor
    """Gradient of h."""
    dc: Tensor
    """Gradient of the state after the step."""

    @classmethod
    def draw(cls, cell: Cell, seed: int) -> "Step":
        """Draw a step: every second one with gates nearly saturated."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).double()

        z = tuple(normal(*SHAPE) * 4 ** (seed % 2) for _ in cell.blocks)
        vectors = tuple(normal(SHAPE[1]) for _ in vector_names(cell))
        return cls(z, normal(*SHAPE), vectors, normal(*SHAPE), normal(*SHAPE))


def vector_names(cell: Cell) -> list[str]:
    """Return a name for each row of a cell's vectors, as weight_ch[i]."""
    return [f"{vector.name}[{block}]" for vector in cell.vectors for block in vector.blocks]


def named(
    cell: Cell, h: Tensor, c: Tensor, dz: Sequence[Tensor], dc_prev: Tensor, dvectors: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the results of a step by their names."""
    results = {"h": h, "c": c, "dc of the step before": dc_prev}
    results |= {f"dz of block {block.name}": a for block, a in zip(cell.blocks, dz, strict=True)}
    return results | {f"dvector {name}": a for name, a in zip(vector_names(cell), dvectors, strict=True)}


def by_autograd(cell: Cell, step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the cell's definition makes of a step in a dtype, and autograd of it.

    Raises:
        ValueError: a state of another shape or dtype than z, or two different ones of a cell with one state.
    """
    leaves = [a.to(dtype).requires_grad_() for a in (*step.z, step.c, *step.vectors)]
    count = len(step.z)
    h, c = cell.step(tuple(leaves[:count]), leaves[count], tuple(leaves[count + 1 :]), cell.eps)
    for name, a in (("h", h), ("c", c)):
        if a.shape != step.c.shape or a.dtype != dtype:
            raise ValueError(f"step: expected {name} {list(step.c.shape)} in {dtype}, got {list(a.shape)} in {a.dtype}")
    if cell.states == ("h",) and not torch.equal(h, c):
        raise ValueError("step: expected h twice, as h and as c, of a cell with one state")
    outgoing = (step.dh.to(dtype), step.dc.to(dtype))
    grads = torch.autograd.grad((h, c), leaves, outgoing, materialize_grads=True)
    return named(cell, h.detach(), c.detach(), grads[:count], grads[count], grads[count + 1 :])


def by_tile_functions(cell: Cell, kernels: CellKernels, step: Step) -> dict[str, Tensor]:
    """Return what a cell's tile functions make of a step.

    Of blocks with recurrent weights that take sums over the units also dz by the companions, as with one exchange a
    step.
    """
    z, softmax = list(step.z), kernels.softmax_gate
    if softmax is not None:
        z[softmax] = z[softmax].softmax(1)
    if sorted((*kernels.early, *kernels.late)) != list(range(len(z))):
        expected = f"early and late: expected each of the blocks 0 to {len(z) - 1} once"
        raise ValueError(f"{expected}, got {kernels.early} and {kernels.late}")
    given = torch.stack([*z, step.c, step.dh, step.dc]).float()
    vectors = torch.stack([*step.vectors, step.c[0]]).float()
    counts = (1, 1, 1, len(step.vectors), len(z), len(kernels.late), len(kernels.companion_gates))
    functions = ("partials", "merge", "update", "grad_local", "grad_finish", "companions")
    functions += ("state_partials", "state_merge", "expose", "grad_expose", "grad_state")
    constants: dict[str, Any] = {name: getattr(kernels, name) for name in functions}
    constants |= dict(
        GATE_NORMS=kernels.gate_norms,
        BLOCKS=len(z),
        VECTORS=len(step.vectors),
        PARTIALS=kernels.partial_rows,
        STATS=kernels.stats,
        SUMS=kernels.grad_rows,
        STATE_ROWS=kernels.state_rows,
        STATE_STATS=kernels.state_stats,
        STATE_SUMS=kernels.state_grad_rows,
        EARLY=len(kernels.early),
        COMPANIONS=len(kernels.companion_gates),
        **SIZES,
    )
    with cooperative(poison=True):
        rows = (kernels.partial_rows + kernels.state_rows, kernels.grad_rows + kernels.state_grad_rows)
        partials, sums = (torch.empty(n, SHAPE[0], SIZES["SLICES"]) for n in rows)
        out = torch.empty(sum(counts), *SHAPE)
        step_kernel[(1,)](given, vectors, partials, sums, out, cell.eps, **constants)
    (h,), (c,), (dc_prev,), shares, dz, without, products = (list(part) for part in out.split(counts))
    order = (*kernels.early, *kernels.late)
    dz = [dz[order.index(block)] for block in range(len(z))]
    if softmax is not None:
        dz[softmax] = dz[softmax] - z[softmax] * dz[softmax].sum(1, keepdim=True)
    results = named(cell, h, c, dz, dc_prev, [share.sum(0) for share in shares])
    for block, corrected in zip(kernels.late, without, strict=True):
        for other, product in zip(kernels.companion_gates, products, strict=True):
            corrected = corrected - product if other == block else corrected
        if cell.blocks[block].recurrent and kernels.companion_gates:
            results[f"dz of block {cell.blocks[block].name}{BY_COMPANIONS}"] = corrected
    return results
