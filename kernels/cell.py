"""What a cell is to the persistent kernels: pure functions on tiles, which know nothing of slices, steps or memory.

z is a tuple of fp32 tiles [R, N], one per block of pre-activations; statistics are tuples of rows [R] over all H units;
vectors is a tuple of rows [1, N], one per block of the cell's vectors over the units.

    update(z, stats, c, vectors)      -> h, c
    grad_local(z, stats, c, c_prev, dh, dc, vectors, mask)
                                      -> row sums, dz of the early blocks, pending, dc_prev, shares of the vectors'
                                         gradients, a tile each

A cell with one state carries h in c, in fp32: `update` returns it twice, and dh and dc are both gradients of it. A cell
that takes sums over the units has these, too:

    partials(z, count, mask)          -> row sums over this slice's units
    merge(parts, count, total, eps)   -> statistics, from the parts [R, S] of all S slices
    grad_finish(pending, stats, sums, total)
                                      -> dz of the late blocks, those that need the sums over all slices: linear in them
    companions(z, stats, mask, total) -> one tile per row sum: what a late block's dz loses per unit of that sum

A cell that takes sums of its new c before it makes h of it has these besides; `update` then returns c twice, and in
backward the statistics of c follow the others:

    state_partials(c, count, mask)    -> row sums over this slice's units
    state_merge(parts, count, total, eps)
                                      -> statistics of c
    expose(z, stats, c, vectors)      -> h
    grad_expose(z, stats, c, dh, vectors)
                                      -> row sums, pending
    grad_state(pending, stats, sums, total)
                                      -> what h gives to the gradient of c; `grad_local` gets it in dc
"""

import dataclasses
from typing import Any

import triton
import triton.language as tl  # noqa: F401, the interpreter looks for it in every module of functions


@triton.jit
def no_partials(z, count, mask):
    """Return no sums."""
    return ()


@triton.jit
def no_statistics(parts, count, total, eps):
    """Return no statistics."""
    return ()


@triton.jit
def no_late_blocks(pending, stats, sums, total):
    """Return nothing: no block waits for a sum."""
    return ()


@triton.jit
def no_companions(z, stats, mask, total):
    """Return nothing."""
    return ()


@triton.jit
def no_state_sums(c, count, mask):
    """Return no sums of c."""
    return ()


@triton.jit
def no_state_statistics(parts, count, total, eps):
    """Return no statistics of c."""
    return ()


@triton.jit
def no_exposure(z, stats, c, vectors):
    """Return c: h is made by `update`."""
    return c


@triton.jit
def no_grad_exposure(z, stats, c, dh, vectors):
    """Return no sums, and nothing that waits for them."""
    return (), ()


@triton.jit
def no_grad_state(pending, stats, sums, total):
    """Return nothing to add to dc."""
    return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellKernels:
    """The functions of a cell, and how many values they return."""

    update: Any
    grad_local: Any
    partials: Any = no_partials
    merge: Any = no_statistics
    grad_finish: Any = no_late_blocks
    companions: Any = no_companions
    partial_rows: int = 0
    """Row sums that `partials` returns: what a forward step exchanges, besides h."""
    stats: int = 0
    """Row statistics that `merge` returns."""
    grad_rows: int = 0
    """Row sums that `grad_local` returns: what a backward step exchanges, besides dz."""
    early: tuple[int, ...]
    """Blocks whose dz needs no sum over other slices, in the order `grad_local` returns them."""
    late: tuple[int, ...] = ()
    """The other blocks, in the order `grad_finish` returns them."""
    companion_gates: tuple[int, ...] = ()
    """The late block with a recurrent weight that each row sum, in order, takes its companion from."""
    softmax_gate: int | None = None
    """A block without recurrent weight. The launcher takes its softmax over the units, p, before the recurrence, and in
    backward takes dp·p, which is given in place of its dz, through the softmax after the recurrence."""
    state_partials: Any = no_state_sums
    state_merge: Any = no_state_statistics
    expose: Any = no_exposure
    grad_expose: Any = no_grad_exposure
    grad_state: Any = no_grad_state
    state_rows: int = 0
    """Row sums that `state_partials` returns: a third exchange of a forward step."""
    state_stats: int = 0
    """Row statistics that `state_merge` returns."""
    state_grad_rows: int = 0
    """Row sums that `grad_expose` returns: a third exchange of a backward step."""
    tiles_alive: int = 1
    """By what factor a step keeps more tiles than those of the LSTM, as the plan counts registers."""
    gate_norms: bool = False
    """Whether `gate_norms.py` normalises f, g and o around these functions."""
