"""Rows of different length, run with no more padding than pays off.

Padded to the longest, a thousand short rows beside one long row would be almost nothing but padding. So rows are sorted
by length, the longest first, and cut into buckets of similar length, each of which runs as a batch of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS_WORTH_A_STEP = 16
"""The rows that cost as much as a step's fixed cost: a tile of the kernels, or a step's operator calls on a CPU."""

_WORTH_A_CALL = 16 * _ROWS_WORTH_A_STEP
"""The steps times rows that cost as much as a bucket's fixed cost."""


@dataclass(frozen=True)
class Rows:
    """Where the steps of rows, sorted by length, lie in a tensor of all steps; everything on the CPU."""

    lengths: Tensor
    """[B] int64, in descending order."""
    steps: Any
    """The longest length; under torch.jit.trace, like all sizes, a tensor."""
    offsets: Tensor
    """[T] int64, the place before those of a time's steps."""
    order: Tensor
    """[B] int64, the place of each row among a time's steps."""
    buckets: Sequence[tuple[Any, Any]]
    """The first row of each bucket and the one after its last."""

    @classmethod
    def packed(cls, batch_sizes: Tensor) -> "Rows":
        """Return the rows of a PackedSequence, in its order, by how many of them have each step [T]."""
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        batch: Any = batch_sizes[0] if tracing else int(batch_sizes[0])
        order = torch.arange(batch, device=batch_sizes.device)
        # The longest come first: row b has a step wherever more than b rows have.
        lengths = (batch_sizes.unsqueeze(1) > order).sum(0)
        buckets = [(0, batch)] if tracing else cut(lengths)
        return cls(lengths, batch_sizes.shape[0], batch_sizes.cumsum(0) - batch_sizes, order, buckets)

    @classmethod
    def padded(cls, lengths: Tensor, steps: int) -> "Rows | None":
        """Return the rows of a tensor [T, B, ...] by their lengths [B] on the CPU; None if they are best left in it."""
        batch = len(lengths)
        if batch * steps <= 2 * int(lengths.sum()):
            return None
        ordered, order = lengths.to(torch.int64).sort(descending=True, stable=True)
        buckets = cut(ordered)
        if len(buckets) == 1:
            return None
        return cls(ordered, steps, torch.arange(steps, device=lengths.device) * batch, order, buckets)

    def run(
        self, layers: Callable[..., Any], data: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run layers over the rows, bucket by bucket.

        Args:
            layers: takes x [T, B, I], its states and its lengths; returns y [T, B, P] and the new states.
            data: [N, I], the steps of all rows.
            states: [L, B, ·] each, rows in the order of length, or None.

        Returns:
            y [N, P], zero where no row has a step, and the states after it, rows in the order of length.
        """
        outputs, places, last = [], [], []
        for first, end in self.buckets:
            own, rows = self.lengths[first:end], end - first
            # A row without steps has its state, and so needs a step that is padding.
            steps = self.steps if len(self.buckets) == 1 else max(1, int(own[0]))
            t, row = (torch.arange(steps, device=own.device).unsqueeze(1) < own).nonzero().unbind(1)
            slots = (t * rows + row).to(data.device)
            place = (self.offsets[t] + self.order[first + row]).to(data.device)
            x = data.new_zeros(steps * rows, data.shape[1]).index_copy(0, slots, data.index_select(0, place))
            before = None if states is None else tuple(s[:, first:end] for s in states)
            y, after = layers(x.view(steps, rows, data.shape[1]), before, own)
            outputs.append(y.flatten(0, 1).index_select(0, slots))
            places.append(place)
            last.append(after)
        y = torch.cat(outputs)
        after = tuple(torch.cat(parts, dim=1) for parts in zip(*last, strict=True))
        return y.new_zeros(data.shape[0], y.shape[1]).index_copy(0, torch.cat(places), y), after


def cut(lengths: Tensor) -> list[tuple[int, int]]:
    """Cut rows into buckets, so that padding each to its longest row costs little.

    A bucket stays whole as long as its padding does not outweigh what it holds, or where cutting it saves nothing.

    Args:
        lengths: [B] int64 on the CPU, in descending order.

    Returns:
        The first row of each bucket and the one after its last.
    """

    def cost(steps: Any, rows: Any) -> Any:
        return steps * (rows + _ROWS_WORTH_A_STEP) + _WORTH_A_CALL

    def parts(first: int, last: int) -> list[tuple[int, int]]:
        own, rows = lengths[first:last], last - first
        longest = int(own[0])
        if longest * rows > 2 * int(own.sum()):
            # Before each of the rows but the first.
            above = torch.arange(1, rows, device=own.device)
            costs = cost(longest, above) + cost(own[1:], rows - above)
            best = int(costs.argmin())
            if int(costs[best]) < cost(longest, rows):
                middle = first + 1 + best
                return parts(first, middle) + parts(middle, last)
        return [(first, last)]

    return parts(0, len(lengths))
