"""A walk over a sequence in chunks of steps: their times, which steps are valid, and the h that each began with."""

import torch
from torch import Tensor


def chunk_spans(steps: int, chunk: int, reverse: bool) -> list[tuple[int, int]]:
    """Return the first time and the time after the last of every chunk, in walking order."""
    if reverse:
        return [(max(0, high - chunk), high) for high in range(steps, 0, -chunk)]
    return [(low, min(low + chunk, steps)) for low in range(0, steps, chunk)]


def valid_steps(lengths: Tensor | None, steps: int) -> Tensor | None:
    """Return [T, B, 1], true where a row has a step, or None if all have all."""
    if lengths is None:
        return None
    return (torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(2)


def h_before(low: int, high: int, y: Tensor, h_0: Tensor, valid: Tensor | None, reverse: bool) -> Tensor:
    """Return [n, B, H], the hidden state before each valid step of the times low to high, from y [T, B, H].

    In reverse a row with a length starts at its own last step: the y after it is padding, the state h_0.
    """
    if not reverse:
        return y[low - 1 : high - 1] if low else torch.cat((h_0.unsqueeze(0), y[: high - 1]))
    if high < len(y):
        h, is_start = y[low + 1 : high + 1], None if valid is None else ~valid[low + 1 : high + 1]
    else:
        h = torch.cat((y[low + 1 :], h_0.unsqueeze(0)))
        is_start = None if valid is None else ~torch.cat((valid[low + 1 :], torch.zeros_like(valid[:1])))
    return h if is_start is None else torch.where(is_start, h_0, h)
