"""Checks the memory accesses of an interpreted grid: each within its tensor, after a write, and ordered with others.

Two accesses race when they touch the same bytes from different programs, at least one writes, and no chain of release
and acquire atomics leads from one to the other. Such chains are followed with vector clocks (Mattern 1989; as in
FastTrack, Flanagan and Freund 2009): `clocks[p, q]` is the latest moment of program q that program p knows of. Each
word of memory remembers who touched it and at which moment, so a race is found also where the values happen to come
out right.

A word that says by its own bits whether it has arrived orders only itself: who takes it learns nothing about other
memory, but everything about the words of the same kind that its writer had taken before. A second set of clocks
(`_taken`) follows that, for these words alone.
"""

import bisect
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import triton

READ, WRITE, ATOMIC_READ, ATOMIC_WRITE = "reads", "writes", "atomically reads", "atomically writes"

TAG_SHIFT = 48
"""A pointer's bits from here on are the number of the argument that it was made from, from 1; addresses have fewer."""

# Plain writes are missing here: every access conflicts with them, and they are kept apart.
_CONFLICTS = {READ: (ATOMIC_WRITE,), WRITE: (READ, ATOMIC_READ, ATOMIC_WRITE), ATOMIC_READ: (), ATOMIC_WRITE: (READ,)}
_SITE_BITS = 32
_SITE_MASK = (1 << _SITE_BITS) - 1
_ADDRESS_MASK = np.uint64((1 << TAG_SHIFT) - 1)
_NOT_KERNEL_CODE = (os.path.dirname(triton.__file__), os.path.dirname(np.__file__), os.path.dirname(__file__))


class GridError(RuntimeError):
    """What `cooperative` raises about the programs of a grid."""


class DataRace(GridError):
    """Two programs touched the same bytes, one of them wrote, and no release and acquire orders them."""


class OutOfBounds(GridError):
    """A program touched an address outside the tensor that it made the pointer from."""


class ReadBeforeWrite(GridError):
    """A program read memory that was allocated uninitialised and not written since."""


class TwoWriters(GridError):
    """Two programs wrote the same bytes, one after the other, where every byte was to have one writer."""


class Sites:
    """Numbers the places in kernel code that touch memory."""

    def __init__(self) -> None:
        self._numbers: dict[tuple, int] = {}
        self._places: list[tuple] = []

    def here(self) -> int:
        """Return the number of the running kernel line, together with the lines that called it."""
        frame, place = sys._getframe(1), []
        while frame is not None:
            place.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        return self.number(place)

    def number(self, place: Iterable[tuple]) -> int:
        """Return the number of a place: pairs of code object and line, innermost first."""
        key = tuple((code, line) for code, line in place if _is_kernel_code(code.co_filename))
        if key not in self._numbers:
            self._numbers[key] = len(self._places)
            self._places.append(key)
        return self._numbers[key]

    def describe(self, number: int) -> str:
        """Return `file:line in function`, followed by the callers."""
        lines = [f"{_shown_path(code.co_filename)}:{line} in {code.co_name}" for code, line in self._places[number]]
        return ", called at ".join(lines) or "an unknown place"


def _is_kernel_code(filename: str) -> bool:
    return not filename.startswith((*_NOT_KERNEL_CODE, "<"))


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
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        return cls(name, tensor, tensor.data_ptr(), tensor.data_ptr() + size)

    def outside(self, addresses: np.ndarray, item_bytes: int) -> np.ndarray:
        """Return which items are not, or not wholly, elements of the tensor."""
        wrong = (addresses < self.start) | (addresses + np.uint64(item_bytes) > self.end)
        if self._gaps is not None and not wrong.any():
            size = self.tensor.element_size()
            for byte in range(0, item_bytes, size):
                wrong |= self._gaps[(addresses + np.uint64(byte) - np.uint64(self.start)).astype(np.int64) // size]
        return wrong

    def __post_init__(self) -> None:
        elements = (self.end - self.start) // self.tensor.element_size()
        self._gaps = None
        # A slice such as y[:, :H] leaves out part of what lies between its first and its last element.
        if self.tensor.numel() != elements:
            gaps = torch.ones(elements, dtype=torch.bool)
            gaps.as_strided(self.tensor.shape, self.tensor.stride()).fill_(False)
            self._gaps = gaps.numpy()

    def describe(self, address: int) -> str:
        """Return the element at an address, as an index where the layout allows it."""
        offset = (address - self.start) // self.tensor.element_size()
        index = [offset]
        if self.tensor.is_contiguous() and self.start <= address < self.end:
            index = [int(i) for i in np.unravel_index(offset, tuple(self.tensor.shape) or (1,))]
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.name}[{', '.join(map(str, index))}] (element {offset} of {dtype} {list(self.tensor.shape)})"


@dataclasses.dataclass
class _Values:
    """The present values of self-validating words."""

    written: np.ndarray
    """[words] number of the snapshot of what the writer had taken; 0: not written in this grid."""
    taken: np.ndarray
    """[programs, words] when each program took the value, in its count of takings; 0: it has not."""
    moments: np.ndarray
    """[programs, words] the same, in its clock."""

    def halved(self) -> "_Values":
        """Return the same for words of half the size."""
        return _Values(self.written.repeat(2), self.taken.repeat(2, axis=1), self.moments.repeat(2, axis=1))


class _Shadow:
    """Who touched each word of one storage, when, and where; a mark is `moment << _SITE_BITS | site`, 0 for never."""

    def __init__(self, start: int, size_bytes: int, word_bytes: int, empty: np.ndarray | None) -> None:
        self.start, self.end = start, start + size_bytes
        self.shift = word_bytes.bit_length() - 1
        words = size_bytes >> self.shift
        # Plain writes to a word are ordered (or have been reported), so the last one stands for all.
        self.written = np.zeros(words, np.int64)
        self.writer = np.zeros(words, np.int32)
        self.marks: dict[str, np.ndarray] = {}
        self.values: _Values | None = None
        self.empty: np.ndarray | None = None
        if empty is not None and empty.any():
            # A word is empty as long as one of its bytes is.
            self.empty = np.any(empty[: words << self.shift].reshape(words, -1), axis=1)

    def words(self, addresses: np.ndarray, item_bytes: int) -> np.ndarray:
        """Return the words that items at these addresses cover."""
        while item_bytes < 1 << self.shift:
            self._halve_words()
        words = (addresses - np.uint64(self.start)).view(np.int64) >> self.shift
        span = item_bytes >> self.shift
        return words if span == 1 else (words[:, None] + np.arange(span)).ravel()

    def _halve_words(self) -> None:
        self.shift -= 1
        self.written, self.writer = self.written.repeat(2), self.writer.repeat(2)
        self.marks = {kind: marks.repeat(2, axis=1) for kind, marks in self.marks.items()}
        if self.values is not None:
            self.values = self.values.halved()
        self.empty = None if self.empty is None else self.empty.repeat(2)


class Memory:
    """The buffers of one grid, and the order of the accesses to them.

    Args:
        arguments: name and tensor of each kernel argument that is a tensor.
        programs: grid index of each program.
        sites: numbers the kernel lines.
        check_races: without it, only bounds and reads before a write are checked.
        self_validating: tensors, or names of arguments, whose words say by their bits whether they have arrived. A
            volatile load takes such a word, whoever wrote it, unordered; it is a race to write one that another
            program has taken unless that is known. Plain loads from them are checked like any others.
        one_writer: whether a word that two programs write, though one after the other, is an error.
        empty: the uninitialised bytes of a storage, by the storage's address.
    """

    def __init__(
        self,
        arguments: list[tuple[str, torch.Tensor]],
        programs: list[tuple[int, ...]],
        sites: Sites,
        check_races: bool = True,
        self_validating: Iterable[str | torch.Tensor] = (),
        one_writer: bool = False,
        empty: dict[int, np.ndarray] | None = None,
    ) -> None:
        self._all = [_Argument.of(name, tensor) for name, tensor in arguments]
        self._arguments = [a for a in self._all if a.end > a.start]
        self._programs, self._sites, self._check_races, self._one_writer = programs, sites, check_races, one_writer
        chosen = [a for a in self._arguments if any(a.name == name for name in self_validating)]
        chosen += [_Argument.of("", t) for t in self_validating if isinstance(t, torch.Tensor)]
        self._self_validating = [(a.start, a.end) for a in chosen]
        word_bytes: dict[int, int] = {}
        storages = {}
        for _, tensor in arguments:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
                word = word_bytes.get(storage.data_ptr(), 16)
                word_bytes[storage.data_ptr()] = min(word, tensor.element_size())
        empty = empty or {}
        self._shadows = [_Shadow(at, storages[at], word_bytes[at], empty.get(at)) for at in sorted(storages)]
        self._starts = np.array([shadow.start for shadow in self._shadows], np.uint64)
        self.clocks = np.zeros((len(programs), len(programs)), np.int64)
        np.fill_diagonal(self.clocks, 2)
        # A release comes from one thread: it publishes what the program's other threads did before their last barrier.
        self._settled = np.ones(len(programs), np.int64)
        self._unsettled = np.zeros(len(programs), bool)
        self._released: dict[int, np.ndarray] = {}
        # taken[p, q]: the latest moment of program q whose takings of self-validating words p knows of.
        self._taken = np.zeros_like(self.clocks)
        self._snapshots: list[np.ndarray] = []
        self._steps_of_takes: dict[tuple[int, int], str] = {}
        self._steps: list[list[tuple[int, int]]] = [[] for _ in programs]
        self.checked = 0

    def access(
        self, program: int, kind: str, addresses: np.ndarray, item_bytes: int, site: int, volatile: bool = False
    ) -> None:
        """Check and record one access.

        Args:
            program: number of the program.
            kind: READ, WRITE, ATOMIC_READ or ATOMIC_WRITE.
            addresses: [n] uint64, of the lanes that are not masked, with the numbers of their arguments.
            item_bytes: size of what is at each address.
            site: the line in the kernel.
            volatile: whether a read may take self-validating words.

        Raises:
            OutOfBounds: an address is outside its tensor.
            ReadBeforeWrite: what is read has not been written.
            DataRace: the access is not ordered with an earlier one.
            TwoWriters: another program has written here.
        """
        for shadow, part in self._split(program, kind, addresses, item_bytes, site):
            words = shadow.words(part, item_bytes)
            if shadow.empty is not None:
                self._check_written(shadow, program, kind, words, site)
            if not self._check_races:
                continue
            special = bool(self._self_validating) and self._is_self_validating(part, item_bytes)
            if special and kind == READ and volatile:
                self._take(shadow, program, words)
                continue
            self._check(shadow, program, kind, words, site)
            mark = self.clocks[program, program] << _SITE_BITS | site
            if kind == WRITE:
                if special:
                    self._put(shadow, program, words, site)
                if self._one_writer:
                    self._check_one_writer(shadow, program, words, site)
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
        for address in self._plain(addresses):
            if address in self._released:
                np.maximum(self.clocks[program], self._released[address], out=self.clocks[program])

    def release(self, program: int, addresses: np.ndarray, replace: bool = False) -> None:
        """Publish on these words what the program knows; a plain atomic store (`replace`) hides what was there."""
        if not self._unsettled[program]:
            self.barrier(program)
        known = self.clocks[program].copy()
        known[program] = self._settled[program]
        for address in self._plain(addresses):
            earlier = None if replace else self._released.get(address)
            self._released[address] = known if earlier is None else np.maximum(known, earlier)

    def step(self, program: int, step: int) -> None:
        """Note the step that a program is at: the value of its outermost loop's variable."""
        steps = self._steps[program]
        if not steps or steps[-1][1] != step:
            steps.append((int(self.clocks[program, program]), step))

    def describe(self, address: int) -> str:
        """Return the argument and element at an address, with or without the number of its argument."""
        tag, address = address >> TAG_SHIFT, address & int(_ADDRESS_MASK)
        for argument in self._all[tag - 1 : tag] if tag else self._arguments:
            if tag or argument.start <= address < argument.end:
                return argument.describe(address)
        return f"address {address:#x}"

    @staticmethod
    def _plain(addresses: np.ndarray) -> list[int]:
        return (addresses & _ADDRESS_MASK).tolist()

    def _split(
        self, program: int, kind: str, addresses: np.ndarray, item_bytes: int, site: int
    ) -> Iterator[tuple[_Shadow, np.ndarray]]:
        """Check the bounds; yield the addresses storage by storage: nearly always all are in one."""
        tags = addresses >> np.uint64(TAG_SHIFT)
        addresses = addresses & _ADDRESS_MASK
        while len(addresses):
            tag = int(tags[0])
            same = tags == tags[0]
            own = addresses if same.all() else addresses[same]
            if tag:
                argument = self._all[tag - 1]
                outside = argument.outside(own, item_bytes)
                if outside.any():
                    raise OutOfBounds(self._out_of_bounds(program, kind, argument, int(own[outside.argmax()]), site))
            yield from self._by_storage(program, kind, own, item_bytes, site)
            addresses, tags = addresses[~same], tags[~same]

    def _by_storage(
        self, program: int, kind: str, addresses: np.ndarray, item_bytes: int, site: int
    ) -> Iterator[tuple[_Shadow, np.ndarray]]:
        while len(addresses):
            low, high = int(addresses.min()), int(addresses.max())
            shadow = self._shadows[int(np.searchsorted(self._starts, low, side="right")) - 1] if self._shadows else None
            if shadow is None or not shadow.start <= low <= shadow.end - item_bytes:
                raise OutOfBounds(self._out_of_bounds(program, kind, self._nearest(low), low, site))
            if high <= shadow.end - item_bytes:
                yield shadow, addresses
                return
            inside = addresses <= shadow.end - item_bytes
            yield shadow, addresses[inside]
            addresses = addresses[~inside]

    def _is_self_validating(self, addresses: np.ndarray, item_bytes: int) -> bool:
        low, high = int(addresses.min()), int(addresses.max()) + item_bytes
        return any(start <= low and high <= end for start, end in self._self_validating)

    def _take(self, shadow: _Shadow, program: int, words: np.ndarray) -> None:
        """Note that the program has the words' present values, and what it learns from each."""
        if shadow.values is None:
            return
        written, taken = shadow.values.written, shadow.values.taken[program]
        # The first time that a value is seen counts: who still polls for the next one has no need of this one.
        fresh = words[(taken[words] == 0) & (written[words] > 0)]
        if len(fresh) == 0:
            return
        count = int(self._taken[program, program]) + 1
        self._taken[program, program] = count
        taken[fresh] = count
        shadow.values.moments[program, fresh] = self.clocks[program, program]
        self._unsettled[program] = True
        for number in np.unique(written[fresh]).tolist():
            np.maximum(self._taken[program], self._snapshots[number], out=self._taken[program])
        self._steps_of_takes[program, count] = self._step_at(program, None)

    def _put(self, shadow: _Shadow, program: int, words: np.ndarray, site: int) -> None:
        """Check that whoever took the words' old values did so before the program came to write new ones."""
        if shadow.values is None:
            size = (len(self._programs), len(shadow.written))
            shadow.values = _Values(np.zeros(size[1], np.int32), np.zeros(size, np.int64), np.zeros(size, np.int64))
            if not self._snapshots:
                self._snapshots.append(np.zeros(len(self._programs), np.int64))
        values = shadow.values
        late = values.taken[:, words] > self._taken[program][:, None]
        late &= values.moments[:, words] > self.clocks[program][:, None]
        if late.any():
            by, lane = (int(i) for i in np.argwhere(late)[0])
            name = self.describe(shadow.start + (int(words[lane]) << shadow.shift))
            step = self._steps_of_takes[by, int(values.taken[by, words[lane]])]
            raise DataRace(
                f"read-write race on {name}: nothing says that its old value had been taken before it was replaced\n"
                f"  program {self._programs[by]} took it{step}\n"
                f"  program {self._programs[program]} {WRITE} it{self._step_at(program, None)} at "
                f"{self._sites.describe(site)}"
            )
        values.taken[:, words] = 0
        values.written[words] = len(self._snapshots)
        self._snapshots.append(self._taken[program].copy())

    def _check_written(self, shadow: _Shadow, program: int, kind: str, words: np.ndarray, site: int) -> None:
        assert shadow.empty is not None
        if kind != WRITE and shadow.empty[words].any():
            word = int(words[int(shadow.empty[words].argmax())])
            name = self.describe(shadow.start + (word << shadow.shift))
            raise ReadBeforeWrite(
                f"program {self._programs[program]} {kind} {name}{self._step_at(program, None)}, which nobody has "
                f"written, at {self._sites.describe(site)}"
            )
        shadow.empty[words] = False

    def _check_one_writer(self, shadow: _Shadow, program: int, words: np.ndarray, site: int) -> None:
        by, marks = shadow.writer[words], shadow.written[words]
        others = (marks != 0) & (by != program)
        if others.any():
            lane = int(others.argmax())
            earlier = (int(by[lane]), WRITE, int(marks[lane]))
            name = self.describe(shadow.start + (int(words[lane]) << shadow.shift))
            lines = [f"two programs write {name}", *self._both(earlier, (program, WRITE, site))]
            raise TwoWriters("\n".join(lines))

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
        lines += self._both(earlier, later)
        lines.append("  (a release publishes what its program did before its last tl.debug_barrier)")
        raise DataRace("\n".join(lines))

    def _both(self, earlier: tuple, later: tuple) -> list[str]:
        """Return a line for each of two accesses: of a program, of a kind, at a mark, the later one at a site, now."""
        lines = []
        for (program, kind, mark), is_now in ((earlier, False), (later, True)):
            step = self._step_at(program, None if is_now else mark >> _SITE_BITS)
            where = self._sites.describe(mark & _SITE_MASK)
            lines.append(f"  program {self._programs[program]} {kind} it{step} at {where}")
        return lines

    def _step_at(self, program: int, moment: int | None) -> str:
        """Return the step that a program is at, or was at a moment, as words; a moment may last for two."""
        steps = self._steps[program]
        if not steps:
            return ""
        if moment is None:
            return f" in step {steps[-1][1]}"
        first = bisect.bisect_left(steps, (moment, -1)) - 1
        last = bisect.bisect_left(steps, (moment + 1, -1)) - 1
        if last < 0:
            return ""
        earliest, latest = steps[max(first, 0)][1], steps[last][1]
        return f" in step {latest}" if earliest == latest else f" in step {earliest} to {latest}"

    def _nearest(self, address: int) -> _Argument | None:
        def distance(argument: _Argument) -> int:
            return max(argument.start - address, address - argument.end + 1)

        return min(self._arguments, key=distance, default=None)

    def _out_of_bounds(self, program: int, kind: str, argument: _Argument | None, address: int, site: int) -> str:
        what = argument.describe(address) if argument else f"address {address:#x}"
        step, where = self._step_at(program, None), self._sites.describe(site)
        return f"program {self._programs[program]} {kind} {what}{step}, outside the tensor, at {where}"
