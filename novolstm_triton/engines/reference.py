"""The equations of every cell as a plain PyTorch loop: the definition that every other backend is tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from novolstm_triton.call import Call
from novolstm_triton.cells import Cell


class Weights(NamedTuple):
    """What a step needs besides input and state; shapes as in `Call`."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor
    vectors: tuple[Tensor, ...] = ()
    """[H] each, one for every block of the cell's vectors, with the gain in them."""
    weight_hr: Tensor | None = None


def step(x: Tensor, h: Tensor, c: Tensor, weights: Weights, cell: Cell, eps: float) -> tuple[Tensor, Tensor]:
    """Return h and c after one step.

    The cell makes them of z_k = x W_kᵀ + h U_kᵀ + b_k for each of its blocks k, where a block may lack one of the two
    products, or have another operand than h (`Cell.second`). With a projection h is multiplied by W_hrᵀ after that.

    Args:
        x: [B, I] input.
        h: [B, P] hidden state; P = H unless there is a projection.
        c: [B, H] state that the cell carries.
        weights: parameters.
        cell: the equations.
        eps: ε of the layer normalisations.
    """
    return finish_step(project(x, weights, cell), h, c, weights, cell, eps)


def project(x: Tensor, weights: Weights, cell: Cell) -> Tensor:
    """Return x W + b [B, G·H] for x [B, I]; b alone in blocks that only h feeds."""
    alone = cell.first_input * (weights.bias.shape[0] // len(cell.blocks))
    if not alone:
        return torch.addmm(weights.bias, x, weights.weight_ih.t())
    fed = torch.addmm(weights.bias[alone:], x, weights.weight_ih.t())
    return torch.cat((weights.bias[:alone].expand(x.shape[0], -1), fed), 1)


def finish_step(
    projected: Tensor, h: Tensor, c: Tensor, weights: Weights, cell: Cell, eps: float
) -> tuple[Tensor, Tensor]:
    """Do what `step` does from the result of `project` on."""
    z = first_product(projected, h, weights, cell)
    if cell.second is not None:
        seen = cell.second.gate(tuple(z[: cell.at_once]), h)
        _add_product(z, cell.at_once, cell.recurrent, seen, weights.weight_hh[cell.at_once * c.shape[1] :])
    h, c = cell.step(tuple(z), c, weights.vectors, eps)
    return (h if weights.weight_hr is None else h @ weights.weight_hr.t()), c


def first_product(projected: Tensor, h: Tensor, weights: Weights, cell: Cell) -> list[Tensor]:
    """Return the blocks of `projected`, with h U added where U meets h itself: z [B, H] each, but for `Cell.second`."""
    z, rows = list(projected.chunk(len(cell.blocks), dim=1)), weights.weight_hh
    if cell.second is not None:
        rows = rows[: cell.at_once * z[0].shape[1]]
    _add_product(z, 0, cell.at_once, h, rows)
    return z


def _add_product(z: list[Tensor], first: int, last: int, h: Tensor, rows: Tensor) -> None:
    """Add h times some rows of weight_hh to the blocks from `first` to before `last`: put the sums into the list."""
    for k, product in enumerate((h @ rows.t()).chunk(last - first, dim=1), first):
        z[k] = z[k] + product


def weights_of(call: Call) -> Weights:
    """Return those of a call in one direction."""
    vectors = [*call.vectors.chunk(call.cell.vector_blocks)] if call.cell.vectors else []
    if call.options.gate_gain != 1.0:
        for block in call.cell.gained:
            vectors[block] = vectors[block] * call.options.gate_gain
    return Weights(call.weight_ih, call.weight_hh, call.bias, tuple(vectors), call.weight_hr)


def advance(
    call: Call,
    weights: Weights,
    projected: Tensor,
    h: Tensor,
    c: Tensor,
    valid: Tensor | None,
    zoneout_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and c after one step of `layer`.

    Args:
        call: cell, options and the mask of recurrent dropout.
        weights: those of the call.
        projected: [B, G·H], what `project` makes of the step's input.
        h: [B, P] hidden state.
        c: [B, H] state that the cell carries.
        valid: [B, 1] bool, whether the row has this step; None: all have.
        zoneout_mask: [B, P] uint8, or None.
    """
    _, zoneout_h, zoneout_c = call.options[1:]
    seen = h if call.h_mask is None else h * call.h_mask
    h_next, c_next = finish_step(projected, seen, c, weights, call.cell, call.options.eps)
    if zoneout_mask is not None:
        h_next, c_next = torch.where(zoneout_mask & 1 != 0, h, h_next), torch.where(zoneout_mask & 2 != 0, c, c_next)
    elif zoneout_h or zoneout_c:
        h_next, c_next = torch.lerp(h_next, h, zoneout_h), torch.lerp(c_next, c, zoneout_c)
    if valid is None:
        return h_next, h_next, c_next
    y = torch.where(valid, h_next, torch.zeros_like(h_next))
    return y, torch.where(valid, h_next, h), torch.where(valid, c_next, c)


def layer(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Run a cell over a sequence, step by step, differentiable by autograd (twice, too), in any floating dtype.

    A row whose length is reached keeps its h and c, and its outputs are zero. `reverse` walks from the last step to
    the first, so a row with a length begins at its own last step. Recurrent dropout: h meets weight_hh as h · h_mask,
    the same in every step (Gal and Ghahramani 2016). Zoneout: a step's c and h keep the values of the step before
    where their bit of `zoneout_mask` is set, or, without one, in the proportions zoneout_h and zoneout_c; h is made
    from the c that the step would have had without (Krueger et al. 2017).

    Args:
        call: one direction.

    Returns:
        y [T, B, P], h_n [B, P], c_n [B, H].
    """
    x, h, c, steps = call.x, call.h_0, call.c_0, call.x.shape[0]
    weights, lengths, masks = weights_of(call), call.lengths, call.zoneout_mask
    if lengths is not None:
        # Padding may hold anything, even NaN, and must not reach a product: in backward 0 · NaN is NaN.
        padding = torch.arange(steps, device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(padding.unsqueeze(2), 0)
    y = [h] * steps
    for t in reversed(range(steps)) if call.reverse else range(steps):
        valid = None if lengths is None else (t < lengths).unsqueeze(1)
        projected = project(x[t], weights, call.cell)
        y[t], h, c = advance(call, weights, projected, h, c, valid, None if masks is None else masks[t])
    return torch.stack(y), h, c
