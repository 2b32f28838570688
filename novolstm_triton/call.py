"""One call of a layer, in one direction or both: what every backend is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from novolstm_triton.cells import Cell

TENSORS = ("x", "h_0", "c_0", "weight_ih", "weight_hh", "bias", "vectors")
"""The tensors of a call that have gradients."""


class Options(NamedTuple):
    """Numbers of a call."""

    eps: float
    """ε of the layer normalisations."""
    gate_gain: float = 1.0
    """Constant factor on the vectors that the cell calls `gained`."""
    zoneout_h: float = 0.0
    """Share of h that a step keeps where there are no masks."""
    zoneout_c: float = 0.0
    """Likewise, of c."""


@dataclasses.dataclass(frozen=True)
class Call:
    """T steps of B rows with I inputs and H units; the cell has G blocks, N of them fed by x and R by h.

    In both directions at once, all tensors but x, lengths and zoneout_mask have a leading dimension of two, and
    `reverse` is not looked at.
    """

    cell: Cell
    x: Tensor
    """[T, B, I] input."""
    h_0: Tensor
    """[B, H] initial hidden state; [B, P] with a projection."""
    c_0: Tensor
    """[B, H] initial cell state; h_0 itself for a cell with one state."""
    weight_ih: Tensor
    """[N·H, I] input weights, in the order of the cell's blocks."""
    weight_hh: Tensor
    """[R·H, H] recurrent weights, likewise; [R·H, P] with a projection."""
    bias: Tensor
    """[G·H]."""
    vectors: Tensor
    """[V·H], the blocks of all of the cell's vectors; one tensor, for operators that take lists have no gradients in
    batches (`torch.autograd.grad(is_grads_batched=True)`)."""
    options: Options
    lengths: Tensor | None = None
    """[B] int32 number of valid steps of each row."""
    h_mask: Tensor | None = None
    """[B, H] factor on h wherever it meets weight_hh."""
    zoneout_mask: Tensor | None = None
    """[T, B, H] uint8, or [T, B, 2H]; bit 0: h keeps its value, bit 1: c does."""
    weight_hr: Tensor | None = None
    """[P, H] projection; only the reference takes one."""
    reverse: bool = False
    """Whether to walk from the last step to the first."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those with gradients, in the order of `TENSORS`."""
        return (self.x, self.h_0, self.c_0, self.weight_ih, self.weight_hh, self.bias, self.vectors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """Return the call with others in place of `tensors`."""
        return dataclasses.replace(self, **dict(zip(TENSORS, tensors, strict=True)))

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.weight_ih.dim() == 3 else 1

    def each_direction(self) -> list[Call]:
        """Return the two calls that a call in both directions is."""
        calls = []
        for d in range(2):
            mask = None if self.zoneout_mask is None else self.zoneout_mask.chunk(2, dim=2)[d]
            own = {name: None if (a := getattr(self, name)) is None else a[d] for name in ("h_mask", "weight_hr")}
            one = self.with_tensors([self.x, *(a[d] for a in self.tensors[1:])])
            calls.append(dataclasses.replace(one, zoneout_mask=mask, reverse=d == 1, **own))
        return calls


class Result(NamedTuple):
    """What forward returns."""

    y: Tensor
    """[T, B, H], in both directions [T, B, 2H]: h after every step, zero beyond a row's length."""
    h_n: Tensor
    """The shape of h_0."""
    c_n: Tensor
    """The shape of c_0, in the dtype of x."""
    c_border: Tensor
    """[⌈T/chunk⌉ + 1, *], c before each chunk in walking order, and after the last, in fp32 (fp64 for fp64 tensors)."""


def join_directions(results: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h_n and c_n of both directions from those of each."""
    (y, *states), (y_reverse, *states_reverse) = results
    h_n, c_n = (torch.stack(pair) for pair in zip(states, states_reverse, strict=True))
    return torch.cat((y, y_reverse), -1), h_n, c_n


class Saved(NamedTuple):
    """What backward is given besides gradients."""

    call: Call
    y: Tensor
    c_border: Tensor
    chunk: int


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which c is carried for tensors of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vectors_with_gain(call: Call, dtype: torch.dtype) -> Tensor:
    """Return a copy of the vectors in a dtype, with the gain: gain·LN(s; γ, β) = LN(s; gain·γ, gain·β)."""
    vectors = call.vectors.to(dtype, copy=True).contiguous()
    multiply_by_gain(vectors, call)
    return vectors


def multiply_by_gain(vectors: Tensor, call: Call) -> None:
    """Multiply vectors, or their gradients, [..., V·H] in place by the gain of the call, in blocks that have one."""
    if call.options.gate_gain != 1.0:
        blocks = vectors.unflatten(-1, (call.cell.vector_blocks, -1))
        for block in call.cell.gained:
            blocks[..., block, :] *= call.options.gate_gain
