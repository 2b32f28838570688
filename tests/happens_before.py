"""Checks the memory accesses of an interpreted grid: each inside a buffer, and ordered with those of other programs.

Two accesses race when they touch the same bytes from different programs, at least one writes, and no chain of release
and acquire atomics leads from one to the other. Such chains are followed with vector clocks: `clocks[p, q]` is the
latest moment of program q that program p knows of. Each word of memory remembers who touched it and at which moment, so
a race is found also where the values happen to come out right.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import triton

READ, WRITE, ATOMIC_READ, ATOMIC_WRITE = "reads", "writes", "atomically reads", "atomically writes"

# Plain writes are missing here: every access conflicts with them, and they are kept apart.
_CONFLICTS = {READ: (ATOMIC_WRITE,), WRITE: (READ, ATOMIC_READ, ATOMIC_WRITE), ATOMIC_READ: (), ATOMIC_WRITE: (READ,)}
_SITE_BITS = 32
_OWN_MODULES = ("cooperative", "happens_before", "interpreter_repairs", "schedules")
_NOT_KERNEL_CODE = (os.path.dirname(triton.__file__), os.path.dirname(np.__file__))
_OWN_FILES = [str(pathlib.Path(__file__).with_name(f"{name}.py")) for name in _OWN_MODULES]


class GridError(RuntimeError):
    """What `cooperative` raises about the programs of a grid."""


class DataRace(GridError):
    """Two programs touched the same bytes, one of them wrote, and no release and acquire orders them."""


class OutOfBounds(GridError):
    """A program touched an address outside every buffer that the kernel was given."""


class Sites:
    """Numbers the places in kernel code that touch memory."""

    def __init__(self) -> None:
        self._numbers: dict[tuple, int] = {}
        self._places: list[tuple] = []

    def here(self) -> int:
        """The number of the running kernel line, together with the lines that called it."""
        frame, place = sys._getframe(1), []
        while frame is not None:
            place.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return self.number(place)

    def number(self, place: Iterable[tuple]) -> int:
        """The number of a place: pairs of code object and line, innermost first."""
        key = tuple((code, line) for code, line in place if self._in_kernel(code.co_filename))
        if key not in self._numbers:
            self._numbers[key] = len(self._places)
            self._places.append(key)
        return self._numbers[key]

    def describe(self, number: int) -> str:
        """`file:line in function`, followed by the callers."""
        lines = [f"{_shown_path(code.co_filename)}:{line} in {code.co_name}" for code, line in self._places[number]]
        return ", called at ".join(lines) or "an unknown place"

    @staticmethod
    def _in_kernel(filename: str) -> bool:
        return filename not in _OWN_FILES and not filename.startswith((*_NOT_KERNEL_CODE, "<"))


def _shown_path(filename: str) -> str:
    path = pathlib.Path(filename)
    return str(path.relative_to(pathlib.Path.cwd())) if path.is_relative_to(pathlib.Path.cwd()) else filename


@dataclasses.dataclass
class _Argument:
    """A tensor that the kernel was given; `end` is one past its last byte."""

    name: str
    tensor: torch.Tensor
    start: int
    end: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "_Argument":
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(name, tensor, tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())

    def describe(self, address: int) -> str:
        """The element at an address, as an index where the layout allows it."""
        offset = (address - self.start) // self.tensor.element_size()
        index = [offset]
        if self.tensor.is_contiguous() and self.start <= address < self.end:
            index = [int(i) for i in np.unravel_index(offset, tuple(self.tensor.shape) or (1,))]
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.name}[{', '.join(map(str, index))}] (element {offset} of {dtype} {list(self.tensor.shape)})"


class _Shadow:
    """Who touched each word of one storage, when, and where; a mark is `moment << _SITE_BITS | site`, 0 for never."""

    def __init__(self, start: int, size_bytes: int, word_bytes: int) -> None:
        self.start, self.end, self.size_bytes = start, start + size_bytes, size_bytes
        self.shift = word_bytes.bit_length() - 1
        # Plain writes to a word are ordered (or have been reported), so the last one stands for all.
        self.written = np.zeros(size_bytes >> self.shift, np.int64)
        self.writer = np.zeros(size_bytes >> self.shift, np.int32)
        self.marks: dict[str, np.ndarray] = {}

    def words(self, addresses: np.ndarray, item_bytes: int) -> np.ndarray:
        """The words that items at these addresses cover."""
        while item_bytes < 1 << self.shift:
            self._halve_words()
        words = (addresses - np.uint64(self.start)).view(np.int64) >> self.shift
        span = item_bytes >> self.shift
        return words if span == 1 else (words[:, None] + np.arange(span)).ravel()

    def _halve_words(self) -> None:
        self.shift -= 1
        self.written, self.writer = self.written.repeat(2), self.writer.repeat(2)
        self.marks = {kind: marks.repeat(2, axis=1) for kind, marks in self.marks.items()}


class Memory:
    """The buffers of one grid, and the order of the accesses to them.

    Args:
        arguments: name and tensor of each kernel argument that is a tensor.
        programs: grid index of each program.
        sites: numbers the kernel lines.
        check_races: without it, only bounds are checked.
        exempt: tensors, or names of arguments, whose volatile loads are never races: the data itself says whether it
            has arrived. Stores to them and plain loads from them are checked all the same.
    """

    def __init__(
        self,
        arguments: list[tuple[str, torch.Tensor]],
        programs: list[tuple[int, ...]],
        sites: Sites,
        check_races: bool = True,
        exempt: Iterable[str | torch.Tensor] = (),
    ) -> None:
        self._arguments = [_Argument.of(name, tensor) for name, tensor in arguments if tensor.numel()]
        self._programs, self._sites, self._check_races = programs, sites, check_races
        self._exempt = [(a.start, a.end) for a in self._arguments if any(a.name == name for name in exempt)]
        self._exempt += [(a.start, a.end) for a in (_Argument.of("", t) for t in exempt if isinstance(t, torch.Tensor))]
        word_bytes: dict[int, int] = {}
        storages = {}
        for _, tensor in arguments:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
                word = word_bytes.get(storage.data_ptr(), 16)
                word_bytes[storage.data_ptr()] = min(word, tensor.element_size())
        self._shadows = [_Shadow(start, storages[start], word_bytes[start]) for start in sorted(storages)]
        self._starts = np.array([shadow.start for shadow in self._shadows], np.uint64)
        self.clocks = np.zeros((len(programs), len(programs)), np.int64)
        np.fill_diagonal(self.clocks, 2)
        # A release comes from one thread: it publishes what the program's other threads did before their last barrier.
        self._settled = np.ones(len(programs), np.int64)
        self._unsettled = np.zeros(len(programs), bool)
        self._released: dict[int, np.ndarray] = {}
        self.checked = 0

    def access(
        self, program: int, kind: str, addresses: np.ndarray, item_bytes: int, site: int, volatile: bool = False
    ):
        """Checks and records one access.

        Args:
            program: number of the program.
            kind: READ, WRITE, ATOMIC_READ or ATOMIC_WRITE.
            addresses: [n] uint64, of the lanes that are not masked.
            item_bytes: size of what is at each address.
            site: the line in the kernel.
            volatile: whether a read may see an exempt buffer unordered.

        Raises:
            OutOfBounds: an address is outside every argument.
            DataRace: the access is not ordered with an earlier one.
        """
        for shadow, part in self._split(program, kind, addresses, item_bytes, site):
            if not self._check_races or (volatile and kind == READ and self._is_exempt(part, item_bytes)):
                continue
            words = shadow.words(part, item_bytes)
            self._check(shadow, program, kind, words, site)
            mark = self.clocks[program, program] << _SITE_BITS | site
            if kind == WRITE:
                shadow.written[words], shadow.writer[words] = mark, program
            else:
                if kind not in shadow.marks:
                    shadow.marks[kind] = np.zeros((len(self._programs), len(shadow.written)), np.int64)
                shadow.marks[kind][program, words] = mark
            self._unsettled[program] |= kind in (READ, WRITE)
            self.checked += len(words)

    def barrier(self, program: int) -> None:
        """All threads of the program have come this far: the next release publishes what they did."""
        self._settled[program] = self.clocks[program, program]
        self.clocks[program, program] += 1
        self._unsettled[program] = False

    def acquire(self, program: int, addresses: np.ndarray) -> None:
        """The program now knows what was released on these words."""
        for address in addresses.tolist():
            if address in self._released:
                np.maximum(self.clocks[program], self._released[address], out=self.clocks[program])

    def release(self, program: int, addresses: np.ndarray, replace: bool = False) -> None:
        """Publishes on these words what the program knows; a plain atomic store (`replace`) hides what was there."""
        if not self._unsettled[program]:
            self.barrier(program)
        known = self.clocks[program].copy()
        known[program] = self._settled[program]
        for address in addresses.tolist():
            earlier = None if replace else self._released.get(address)
            self._released[address] = known if earlier is None else np.maximum(known, earlier)

    def describe(self, address: int) -> str:
        """The argument and element at an address."""
        for argument in self._arguments:
            if argument.start <= address < argument.end:
                return argument.describe(address)
        return f"address {address:#x}"

    def _split(self, program, kind, addresses, item_bytes, site) -> Iterator[tuple[_Shadow, np.ndarray]]:
        """The addresses, storage by storage: nearly always all are in one."""
        while len(addresses):
            low, high = int(addresses.min()), int(addresses.max())
            shadow = self._shadows[int(np.searchsorted(self._starts, low, side="right")) - 1] if self._shadows else None
            if shadow is None or not shadow.start <= low <= shadow.end - item_bytes:
                raise OutOfBounds(self._out_of_bounds(program, kind, low, site))
            if high <= shadow.end - item_bytes:
                yield shadow, addresses
                return
            inside = addresses <= shadow.end - item_bytes
            yield shadow, addresses[inside]
            addresses = addresses[~inside]

    def _is_exempt(self, addresses: np.ndarray, item_bytes: int) -> bool:
        low, high = int(addresses.min()), int(addresses.max()) + item_bytes
        return any(start <= low and high <= end for start, end in self._exempt)

    def _check(self, shadow: _Shadow, program: int, kind: str, words: np.ndarray, site: int) -> None:
        known = self.clocks[program]
        marks, by = shadow.written[words], shadow.writer[words]
        late = (marks >> _SITE_BITS) > known[by]
        if late.any():
            lane = int(late.argmax())
            self._race(shadow, int(words[lane]), (int(by[lane]), WRITE, int(marks[lane])), (program, kind, site))
        for other in _CONFLICTS[kind]:
            if other in shadow.marks:
                marks = shadow.marks[other][:, words]
                late = (marks >> _SITE_BITS) > known[:, None]
                if late.any():
                    by, lane = (int(i) for i in np.argwhere(late)[0])
                    self._race(shadow, int(words[lane]), (by, other, int(marks[by, lane])), (program, kind, site))

    def _race(self, shadow: _Shadow, word: int, earlier: tuple, later: tuple) -> None:
        name = self.describe(shadow.start + (word << shadow.shift))
        both = "write-write" if READ not in (earlier[1], later[1]) and earlier[1] != ATOMIC_READ else "read-write"
        lines = [f"{both} race on {name}: no release and acquire lead from the first access to the second"]
        for program, kind, mark in (earlier, later):
            where = self._sites.describe(mark & ((1 << _SITE_BITS) - 1))
            lines.append(f"  program {self._programs[program]} {kind} it at {where}")
        lines.append("  (a release publishes what its program did before its last tl.debug_barrier)")
        raise DataRace("\n".join(lines))

    def _out_of_bounds(self, program: int, kind: str, address: int, site: int) -> str:
        def distance(argument: _Argument) -> int:
            return max(argument.start - address, address - argument.end + 1)

        nearest = min(self._arguments, key=distance, default=None)
        what = nearest.describe(address) if nearest else f"address {address:#x}"
        return f"program {self._programs[program]} {kind} {what}, outside every buffer, at {self._sites.describe(site)}"
