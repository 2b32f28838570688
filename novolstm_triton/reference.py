"""The equations of every cell as a plain PyTorch loop: the definition that every other backend is tested against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from novolstm_triton.cells import CELLS


def step(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight_hr: Tensor | None = None,
    *,
    eps: float,
    gate_gain: float,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """Return h and c after one step.

    With z_k = x W_kᵀ + h U_kᵀ + b_k for each gate k of i|f|g|o|p, and LN the layer normalisation over the H units:

        formula:   i = gain · LN(σ(z_i)) · softmax(z_p)
        notebook:  i = gain · LN(σ(z_i) · softmax(x W_pᵀ + b_p))
        lstm:      i = σ(z_i)
        c = σ(z_f) · c + i · tanh(z_g)
        h = σ(z_o) · tanh(c)                with a projection: h = σ(z_o) · tanh(c) · W_hrᵀ

    In formula_all and notebook_all z_f, z_g and z_o are LN(z_f), LN(z_g) and LN(z_o), each with its own γ and β.
    """
    blocks, hidden = CELLS[cell], c.shape[1]

    def norm(gate: str, a: Tensor) -> Tensor:
        first = blocks.normalised.index(gate) * hidden
        return layer_norm(a, (hidden,), ln_weight[first : first + hidden], ln_bias[first : first + hidden], eps)

    z = list(torch.addmm(bias, x, weight_ih.t()).chunk(len(blocks.gates), dim=1))
    for k, recurrent in enumerate((h @ weight_hh.t()).chunk(blocks.recurrent, dim=1)):
        z[k] = z[k] + recurrent
    if blocks.gate_norms:
        z[1:4] = (norm(gate, z_k) for gate, z_k in zip("fgo", z[1:4], strict=True))
    i = torch.sigmoid(z[0])
    if cell.startswith("formula"):
        i = gate_gain * norm("i", i) * torch.softmax(z[4], dim=1)
    elif cell.startswith("notebook"):
        i = gate_gain * norm("i", i * torch.softmax(z[4], dim=1))
    c = torch.sigmoid(z[1]) * c + i * torch.tanh(z[2])
    h = torch.sigmoid(z[3]) * torch.tanh(c)
    return (h if weight_hr is None else h @ weight_hr.t()), c


def advance(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    valid: Tensor | None,
    h_mask: Tensor | None,
    zoneout_mask: Tensor | None,
    weights: Sequence[Any],
    *,
    zoneout_h: float,
    zoneout_c: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and c after one step of `layer`, whose other arguments, at this step, these are.

    Args:
        x: [B, I] input.
        h: [B, P] hidden state.
        c: [B, H] cell state.
        valid: [B, 1] bool, whether the row has this step; None: all have.
        h_mask: [B, P], or None.
        zoneout_mask: [B, P] uint8, or None.
        weights: those of `step`, in its order.
        zoneout_h: share of h that is kept.
        zoneout_c: share of c that is kept.
        **options: those of `step`.
    """
    h_next, c_next = step(x, h if h_mask is None else h * h_mask, c, *weights, **options)
    if zoneout_mask is not None:
        h_next, c_next = torch.where(zoneout_mask & 1 != 0, h, h_next), torch.where(zoneout_mask & 2 != 0, c, c_next)
    elif zoneout_h or zoneout_c:
        h_next, c_next = torch.lerp(h_next, h, zoneout_h), torch.lerp(c_next, c, zoneout_c)
    if valid is None:
        return h_next, h_next, c_next
    y = torch.where(valid, h_next, torch.zeros_like(h_next))
    return y, torch.where(valid, h_next, h), torch.where(valid, c_next, c)


def layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None = None,
    h_mask: Tensor | None = None,
    zoneout_mask: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    eps: float,
    gate_gain: float = 1.0,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    cell: str = "formula",
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a cell over a sequence, step by step, differentiable by autograd (twice, too), in any floating dtype.

    A row whose length is reached keeps its h and c, and its outputs are zero. `reverse` walks from the last step to
    the first, so a row with a length begins at its own last step. Recurrent dropout: h meets weight_hh as h · h_mask,
    the same in every step (Gal and Ghahramani 2016). Zoneout: a step's c and h keep the values of the step before
    where their bit of `zoneout_mask` is set, or, without one, in the proportions zoneout_h and zoneout_c; h is made
    from the c that the step would have had without (Krueger et al. 2017).

    Args:
        x: [T, B, I] input.
        h_0: [B, P] initial hidden state; P = H unless there is a projection.
        c_0: [B, H] initial cell state.
        weight_ih: [G·H, I] input weights, a block for each of the cell's gates: i|f|g|o, NovoLSTM i|f|g|o|p.
        weight_hh: [R·H, P] recurrent weights of the first R gates: all of them, or i|f|g|o for the notebook variant.
        bias: [G·H] sum of the input and the recurrent bias.
        ln_weight: [N·H] γ of the normalised gates: none, i, or i|f|g|o.
        ln_bias: [N·H] β of the same.
        lengths: [B] integers, the number of valid steps of each row, or None.
        h_mask: [B, P] mask of recurrent dropout, with the factor that makes up for what is dropped, or None.
        zoneout_mask: [T, B, P] uint8, or None; bit 0: h keeps its value, bit 1: c does (then P must be H).
        weight_hr: [P, H] projection, or None.
        eps: ε of the layer normalisations.
        gate_gain: constant factor on NovoLSTM's input gate.
        zoneout_h: share of h that is kept where there are no masks.
        zoneout_c: likewise, of c.
        cell: its name in `novolstm_triton.cells.CELLS`.
        reverse: walk the sequence from its end.

    Returns:
        y [T, B, P], h_n [B, P], c_n [B, H].
    """
    weights = (weight_ih, weight_hh, bias, ln_weight, ln_bias, weight_hr)
    options: dict[str, Any] = dict(zoneout_h=zoneout_h, zoneout_c=zoneout_c)
    options |= dict(eps=eps, gate_gain=gate_gain, cell=cell)
    h, c = h_0, c_0
    if lengths is not None:
        # Padding may hold anything, even NaN, and must not reach a product: in backward 0 · NaN is NaN.
        padding = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= lengths
        x = x.masked_fill(padding.unsqueeze(2), 0)
    y = [h_0] * x.shape[0]
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        valid = None if lengths is None else (t < lengths).unsqueeze(1)
        y[t], h, c = advance(
            x[t], h, c, valid, h_mask, None if zoneout_mask is None else zoneout_mask[t], weights, **options
        )
    return torch.stack(y), h, c
