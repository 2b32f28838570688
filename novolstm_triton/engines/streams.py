"""Work for the next chunk on a stream of its own, while the recurrence of this one runs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def one_ahead(make: Callable[[int, Tensor], None], buffers: list[Tensor], count: int) -> Iterator[Tensor]:
    """Yield `count` buffers, filled by `make`; on a GPU each is filled while the caller works on the one before.

    Two buffers take turns. The side stream fills one only after the current stream has done all that was put on it
    while that buffer was the caller's, and the current stream goes on only when the next one is full. Both wait by
    events, so that a CUDA graph can capture it. All that the side stream did is behind the current stream at the end:
    what was allocated on the current stream needs no `record_stream`.

    Args:
        make: fills a buffer: make(number, buffer), number from 0 on, with work on the stream that is current then.
        buffers: one tensor, and nothing runs ahead, or two.
        count: how many to yield.
    """
    if len(buffers) == 1:
        for number in range(count):
            make(number, buffers[0])
            yield buffers[0]
        return
    device = buffers[0].device
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def fill(number: int) -> Any:
        # After everything so far on the current stream: what `make` reads, and the last work on this buffer.
        side.wait_event(current.record_event())
        with torch.cuda.stream(side):
            make(number, buffers[number % 2])
        return side.record_event()

    full = fill(0)
    for number in range(count):
        current.wait_event(full)
        if number + 1 < count:
            full = fill(number + 1)
        yield buffers[number % 2]
