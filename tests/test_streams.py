"""Chunks prepared one ahead on a side stream, checked on stand-ins for streams that keep vector clocks."""

import contextlib
from unittest import mock

import pytest
import torch

from novolstm_triton import plan
from novolstm_triton.engines import launch
from novolstm_triton.engines.streams import one_ahead
from novolstm_triton.testing import cooperative

from .support.problems import Problem, assert_as_exact_as_eager


class Streams:
    """Streams and events that know what each has waited for, and accesses to buffers that must be ordered."""

    def __init__(self) -> None:
        self.clocks: list[list[int]] = []
        self.current = self.Stream(self)
        self.main = self.current
        self.accesses: list[tuple] = []

    class Stream:
        def __init__(self, world) -> None:
            self.world, self.number = world, len(world.clocks)
            for clock in world.clocks:
                clock.append(0)
            world.clocks.append([0] * (self.number + 1))

        def record_event(self) -> list[int]:
            return list(self.world.clocks[self.number])

        def wait_event(self, event: list[int]) -> None:
            own = self.world.clocks[self.number]
            own[:] = [max(a, b) for a, b in zip(own, event + [0] * len(own), strict=False)]

    @contextlib.contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def stand_in(self):
        """Take the place of torch.cuda's streams."""
        with (
            mock.patch.object(torch.cuda, "current_stream", return_value=self.current),
            mock.patch.object(torch.cuda, "Stream", side_effect=lambda device: Streams.Stream(self)),
            mock.patch.object(torch.cuda, "stream", self.use),
        ):
            yield

    def access(self, buffer: torch.Tensor, what: str) -> None:
        """Put an access on the current stream; whatever conflicts with it must have been waited for."""
        clock, number = self.clocks[self.current.number], self.current.number
        for other, kind, stream, time in self.accesses:
            if other is buffer and "write" in (what, kind):
                assert clock[stream] >= time, f"{what} on stream {number} races with {kind} on stream {stream}"
        clock[number] += 1
        self.accesses.append((buffer, what, number, clock[number]))


def walk(world: Streams, buffers: list, count: int) -> list[int]:
    source, filled, seen = torch.empty(0), {}, []

    def make(number: int, buffer: torch.Tensor) -> None:
        world.access(source, "read")
        world.access(buffer, "write")
        filled[id(buffer)] = number

    with world.stand_in():
        world.access(source, "write")
        for number, buffer in enumerate(one_ahead(make, buffers, count)):
            # The next one is being filled, if there are two; this one holds what was asked for.
            seen.append(filled[id(buffer)])
            world.access(buffer, "read")
            assert number + (len(buffers) == 2 and number + 1 < count) == max(filled.values())
        # The caller may free or overwrite everything now.
        for buffer in (source, *buffers):
            world.access(buffer, "write")
    return seen


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_access_is_ordered(count, ahead):
    world = Streams()
    assert walk(world, [torch.empty(1) for _ in range(1 + ahead)], count) == list(range(count))
    assert len(world.clocks) == 1 + ahead


@pytest.mark.parametrize("waiter", [0, 1])
def test_a_missing_wait_is_seen(waiter):
    """The check can fail: let one of the two streams ignore events."""
    world, wait = Streams(), Streams.Stream.wait_event

    def careless(stream, event):
        if stream.number != waiter:
            wait(stream, event)

    with mock.patch.object(Streams.Stream, "wait_event", careless), pytest.raises(AssertionError, match="races"):
        walk(world, [torch.empty(1), torch.empty(1)], 4)


def test_runs_ahead():
    """The side stream must not wait for the work of the chunk under which it runs."""
    world, buffers, before = Streams(), [torch.empty(1), torch.empty(1)], []

    def make(number, buffer):
        before.append(world.clocks[world.current.number][0])

    with world.stand_in():
        for buffer in one_ahead(make, buffers, 4):
            world.access(buffer, "read")
    # Chunk n + 1 is made knowing the caller's work on chunks up to n - 1 only.
    assert before == [0, 0, 1, 2]


@pytest.mark.parametrize("chunk", [2, 3, 9])
def test_layer_with_products_one_chunk_ahead(chunk, monkeypatch):
    """The stand-ins run everything at once, in the order of the calls: what is left to see is which buffer is whose."""
    monkeypatch.setattr(launch, "_overlaps", lambda x: True)
    problem = Problem(steps=7, batch=2, hidden=6, lengths=True)
    with Streams().stand_in(), cooperative(0, poison=True), plan.forced(overlap=True, chunk=chunk):
        result = problem.run("triton", torch.float32)
    assert_as_exact_as_eager(problem, result, torch.float32)
