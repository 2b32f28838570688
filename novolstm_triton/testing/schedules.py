"""In what order the programs of a grid take turns."""

import contextvars
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import greenlet


class Program:
    """One program of a grid: its coroutine, where it stands, and how long it has only repeated itself."""

    def __init__(self, number: int, index: tuple[int, ...], body: Callable[["Program"], None]) -> None:
        self.number, self.index = number, index
        self.coroutine = greenlet.greenlet(lambda: body(self))
        # A new greenlet starts with an empty context, which would lose the caller's numpy and warning settings.
        self.coroutine.gr_context = contextvars.copy_context()
        self.site = self.address = 0
        self.atomic: tuple | None = None
        self.seen: set[tuple] = set()
        self.polls = self.rereads = self.spins = self.version = 0

    def note_read(self, key: tuple, polling: bool, version: int) -> None:
        """Counts reads that repeat earlier ones, while memory stays at this version."""
        if key not in self.seen or version != self.version:
            self.polls = self.rereads = 0
        self.spins = self.spins + 1 if polling and key in self.seen else 0
        self.polls, self.rereads = (self.polls + 1, self.rereads) if polling else (0, self.rereads + 1)
        self.version = version
        self.seen.add(key)

    def note_change(self) -> None:
        """The program wrote: what it reads next is not a repetition."""
        self.seen.clear()
        self.polls = self.rereads = self.spins = 0


class Grid(Protocol):
    """What a schedule sees of a grid: the programs that have not ended, and which of them only wait."""

    live: list[Program]

    def waits(self, program: Program) -> bool:
        """Return whether a program only polls and nothing has changed that could help it."""
        ...


def _round_robin(grid: Grid, rng: random.Random) -> Iterator[Program]:
    while True:
        yield from (program for program in tuple(grid.live) if program in grid.live)


def _uniform(grid: Grid, rng: random.Random) -> Iterator[Program]:
    while True:
        yield rng.choice(grid.live)


def _bursts(grid: Grid, rng: random.Random) -> Iterator[Program]:
    """One program runs a good way ahead, until it waits; then another."""
    while True:
        program = rng.choice(grid.live)
        for _ in range(1 + int(rng.expovariate(1 / 40))):
            yield program
            if program not in grid.live or grid.waits(program):
                break


def _priorities(grid: Grid, rng: random.Random) -> Iterator[Program]:
    """The first in rank that need not wait runs, so the last one starves; now and then a program falls to the end."""
    rank = {program: rng.random() for program in grid.live}
    while True:
        if rng.random() < 0.02:
            rank[rng.choice(grid.live)] = 1 + max(rank.values())
        ready = [program for program in grid.live if not grid.waits(program)]
        yield min(ready, key=rank.__getitem__) if ready else rng.choice(grid.live)


POLICIES = {"round-robin": _round_robin, "uniform": _uniform, "bursts": _bursts, "priorities": _priorities}
