"""What a cell is to the persistent kernels: pure functions on tiles, which know nothing of slices, steps or memory.

z is a tuple of fp32 tiles [R, N], one per gate; statistics are tuples of rows [R] over all H units; gamma and beta are
tuples of rows [1, N], one per layer normalisation. A cell without sums over the units has empty tuples instead.

    partials(z, count, mask)          -> row sums over this slice's units
    merge(parts, count, total, eps)   -> statistics, from the parts [R, S] of all S slices
    update(z, stats, c, gamma, beta)  -> h, c
    grad_local(z, stats, c, c_prev, dh, dc, gamma, beta, mask)
                                      -> row sums, dz of the early gates, pending, dc_prev, shares of dγ and of dβ
    grad_finish(pending, stats, sums, total)
                                      -> dz of the late gates, those that need the sums over all slices: linear in them
    companions(z, stats, mask, total) -> one tile per row sum: what a late gate's dz loses per unit of that sum
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class CellKernels:
    """The functions of a cell, and how many values they return."""

    partials: Any
    merge: Any
    update: Any
    grad_local: Any
    grad_finish: Any
    companions: Any
    partial_rows: int
    """Row sums that `partials` returns: what a forward step exchanges, besides h."""
    stats: int
    """Row statistics that `merge` returns."""
    grad_rows: int
    """Row sums that `grad_local` returns: what a backward step exchanges, besides dz."""
    early: tuple[int, ...]
    """Gates whose dz needs no sum over other slices, in the order `grad_local` returns them."""
    late: tuple[int, ...]
    """The other gates, in the order `grad_finish` returns them."""
    companion_gates: tuple[int, ...]
    """The late gate with a recurrent weight that each row sum, in order, takes its companion from."""
    softmax_gate: int | None = None
    """A gate without recurrent weight. The launcher takes its softmax over the units, p, before the recurrence, and in
    backward takes dp·p, which is given in place of its dz, through the softmax after the recurrence."""
    gate_norms: bool = False
    """Whether `gate_norms.py` normalises f, g and o around these functions."""
