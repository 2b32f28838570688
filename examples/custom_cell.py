"""A cell that the library does not have: its equations, its tile functions for the GPU, a training run and the check.

JANET (van der Westhuizen and Lasenby 2018) is an LSTM with a forget gate alone, whose h is its c:

    h_t = σ(z_f)·h_{t-1} + (1 − σ(z_f − 1))·tanh(z_g)

Run it without a GPU: `TRITON_INTERPRET=1 python examples/custom_cell.py`. Needs triton and the extra `testing`.
"""

import torch
import triton
import triton.language as tl

from novolstm_triton import RecurrentLayer
from novolstm_triton.cells import Block, Cell
from novolstm_triton.kernels.cell import CellKernels
from novolstm_triton.kernels.math import tanh
from novolstm_triton.testing import check_cell


def step(z, c, vectors, eps):
    """Return h, and h again in the place of the c that an LSTM would carry: this is the definition."""
    s = torch.sigmoid(z[0] - 1)
    h = torch.sigmoid(z[0]) * c + (1 - s) * torch.tanh(z[1])
    return h, h


@triton.jit
def update(z, stats, c, vectors):
    """Compute the same on tiles."""
    s = tl.sigmoid(z[0] - 1.0)
    h = tl.sigmoid(z[0]) * c + (1.0 - s) * tanh(z[1])
    return h, h


@triton.jit
def grad_local(z, stats, c, c_prev, dh, dc, vectors, mask):
    """Return dz of f and g, and what of the gradient goes to the h before the step."""
    f, s, g = tl.sigmoid(z[0]), tl.sigmoid(z[0] - 1.0), tanh(z[1])
    # Of the h that meets the weights, and of the h that is carried: one state, so their gradients add up.
    dh += dc
    dz_f = dh * (c_prev * f * (1.0 - f) - g * s * (1.0 - s))
    dz_g = dh * (1.0 - s) * (1.0 - g * g)
    return (), (dz_f, dz_g), (), dh * f, ()


JANET = Cell(
    name="janet",
    blocks=(Block("f"), Block("g")),
    step=step,
    states=("h",),
    kernels=CellKernels(update=update, grad_local=grad_local, early=(0, 1)),
)


def main() -> None:
    """Train a layer of the cell to recall the number that came with a mark, then check the cell."""
    torch.manual_seed(0)
    steps, rows = 10, 32
    layer, read_out = RecurrentLayer(JANET, 2, 16), torch.nn.Linear(16, 1)
    optimiser = torch.optim.Adam([*layer.parameters(), *read_out.parameters()], lr=0.02)
    for update_number in range(151):
        x = torch.stack([torch.randn(steps, rows), torch.zeros(steps, rows)], 2)
        marked = torch.randint(steps, (rows,))
        x[marked, torch.arange(rows), 1] = 1.0
        _, h_n = layer(x)
        loss = (read_out(h_n[-1]).squeeze(1) - x[marked, torch.arange(rows), 0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if update_number % 50 == 0:
            print(f"update {update_number:3}: loss {loss.item():.3f}")
    print(check_cell(JANET))


if __name__ == "__main__":
    main()
