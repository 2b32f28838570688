"""The LSTM with layer normalisation of Ba, Kiros and Hinton 2016 (equations 20 to 22), which haste has, too.

The products of x and of h are normalised apart, each over all four gates at once, and so is c before its tanh:

    a  = LN(x W; γ_x) + LN(h U; γ_h) + b
    c' = σ(a_f)·c + σ(a_i)·tanh(a_g)          h = σ(a_o)·tanh(LN(c'; γ_c, β_c))

b is the sum of a bias and of the β of the first two. TensorFlow's LayerNormBasicLSTMCell is another cell: it normalises
each gate by itself.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from novolstm_triton.cells.cell import Block, Cell, Vector

_GATES = ("i", "f", "g", "o")


def step(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Take a step; vectors are γ_h, γ_x and b of i|f|g|o, then γ_c and β_c."""

    def norm(parts: tuple[Tensor, ...], gamma: tuple[Tensor, ...]) -> Tensor:
        whole = torch.cat(parts, 1)
        return layer_norm(whole, (whole.shape[1],), torch.cat(gamma), None, eps)

    a = norm(z[:4], vectors[:4]) + norm(z[4:], vectors[4:8]) + torch.cat(vectors[8:12])
    i, f, g, o = a.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(layer_norm(c, (c.shape[1],), vectors[12], vectors[13], eps)), c


LAYER_NORM_LSTM = Cell(
    name="layer_norm_lstm",
    blocks=(
        *(Block(f"{gate}_h", input=False) for gate in _GATES),
        *(Block(f"{gate}_x", recurrent=False) for gate in _GATES),
    ),
    step=step,
    vectors=(
        Vector("ln_weight_hh", _GATES, 1.0),
        Vector("ln_weight_ih", _GATES, 1.0),
        Vector("ln_bias", _GATES, 0.0),
        Vector("ln_weight_ch", ("c",), 1.0),
        Vector("ln_bias_ch", ("c",), 0.0),
    ),
    biases=False,
    eps=1e-5,
    kernels="novolstm_triton.kernels.layer_norm_lstm:LAYER_NORM_LSTM",
)
