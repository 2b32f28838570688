"""Masks of recurrent dropout and of zoneout, drawn from PyTorch's generator of the device.

Restoring the generator's state, as activation checkpointing does, gives the same masks again. They are drawn out of
place: only then can torch.func.vmap draw for every member of its batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_dropout_mask(shape: Sequence[int], probability: float, like: Tensor) -> Tensor:
    """Return factors on h: 0 with the given probability, else 1/(1 − probability), so that the mean is 1.

    Args:
        shape: [..., B, H].
        probability: with which a unit is dropped, from 0 to below 1.
        like: a tensor with the mask's dtype and device.
    """
    keep = 1.0 - probability
    return torch.bernoulli(torch.empty(shape, dtype=like.dtype, device=like.device), keep).div_(keep)


def draw_zoneout_mask(shape: Sequence[int], h: float, c: float, device: torch.device) -> Tensor:
    """Return which units keep their value in which step: uint8, bit 0 for h, bit 1 for c.

    Args:
        shape: [T, B, H], for both directions [T, B, 2H].
        h: probability with which a unit of h keeps its value.
        c: likewise, of c.
        device: the device of the mask.
    """
    h_kept, c_kept = (torch.bernoulli(torch.empty(shape, dtype=torch.uint8, device=device), p) for p in (h, c))
    return h_kept + 2 * c_kept
