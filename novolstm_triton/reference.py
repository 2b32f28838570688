"""The equations of NovoLSTM as a plain PyTorch loop: the definition that every other backend is tested against."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

GATES = ("i", "f", "g", "o", "p")
"""Gate blocks in the row order of every weight and bias; p is the softmax branch of the input gate."""

RECURRENT_GATES = {"formula": 5, "notebook": 4}
"""How many of the gate blocks have a recurrent weight, per variant: the notebook's p sees the input only."""

DEFAULT_EPS = {"formula": 1e-5, "notebook": 1e-3}
"""Epsilon of the layer normalisation, per variant."""


def novolstm(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None = None,
    *,
    eps: float,
    gate_gain: float = 1.0,
    variant: str = "formula",
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run NovoLSTM over a sequence, step by step, differentiable by autograd (twice, too), in any floating dtype.

    With z_k = x_t W_kᵀ + h U_kᵀ + b_k for k in i|f|g|o|p, one step is::

        formula:   i = gain · LayerNorm(σ(z_i)) · softmax(z_p)
        notebook:  i = gain · LayerNorm(σ(z_i) · softmax(x_t W_pᵀ + b_p))
        c = σ(z_f) · c + i · tanh(z_g)
        h = σ(z_o) · tanh(c)

    A row whose length is reached keeps its h and c, and its outputs are zero. `reverse` walks from the last step to
    the first, so a row with a length begins at its own last step.

    Args:
        x: [T, B, I] input.
        h_0: [B, H] initial hidden state.
        c_0: [B, H] initial cell state.
        weight_ih: [5H, I] input weights, blocks i|f|g|o|p.
        weight_hh: [5H, H] recurrent weights, blocks i|f|g|o|p; [4H, H], blocks i|f|g|o, for the notebook variant.
        bias: [5H] sum of the input and the recurrent bias.
        ln_weight: [H] γ of the layer normalisation.
        ln_bias: [H] β of the layer normalisation.
        lengths: [B] integers, the number of valid steps of each row, or None.
        eps: ε of the layer normalisation.
        gate_gain: constant factor on the input gate.
        variant: "formula" or "notebook".
        reverse: walk the sequence from its end.

    Returns:
        y [T, B, H], h_n [B, H], c_n [B, H].
    """
    steps, hidden = x.shape[0], h_0.shape[1]
    h, c = h_0, c_0
    y = [h_0] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        z = list(torch.addmm(bias, x[t], weight_ih.t()).chunk(5, dim=1))
        for k, recurrent in enumerate((h @ weight_hh.t()).chunk(RECURRENT_GATES[variant], dim=1)):
            z[k] = z[k] + recurrent
        z_i, z_f, z_g, z_o, z_p = z
        s, p = torch.sigmoid(z_i), torch.softmax(z_p, dim=1)
        if variant == "formula":
            i = layer_norm(s, (hidden,), ln_weight, ln_bias, eps) * p
        else:
            i = layer_norm(s * p, (hidden,), ln_weight, ln_bias, eps)
        c_next = torch.sigmoid(z_f) * c + gate_gain * i * torch.tanh(z_g)
        h_next = torch.sigmoid(z_o) * torch.tanh(c_next)
        if lengths is None:
            h, c, y[t] = h_next, c_next, h_next
        else:
            valid = (t < lengths).unsqueeze(1)
            h, c = torch.where(valid, h_next, h), torch.where(valid, c_next, c)
            y[t] = torch.where(valid, h_next, torch.zeros_like(h_next))
    return torch.stack(y), h, c
