"""Mistakes put into copies of the kernels and their launcher, to see what finds them."""

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from novolstm_triton import ops, plan
from novolstm_triton.engines import launch
from novolstm_triton.kernels import backward, exchange, forward
from novolstm_triton.testing import GridError, cooperative

from .interpreted import ROOMY, SELF_VALIDATING
from .problems import Problem, assert_as_exact_as_eager

SOURCES = {module.__name__.rpartition(".")[2]: module for module in (forward, backward, exchange, launch)}
USERS = {"forward": [launch], "backward": [launch], "exchange": [forward, backward], "launch": []}


_COPIES = itertools.count()


def source_of(name: str) -> str:
    """Return the text of a file by its name without suffix."""
    return pathlib.Path(str(SOURCES[name].__file__)).read_text()


@contextlib.contextmanager
def mutated(name: str, text: str) -> Iterator[None]:
    """Use this text as a file of the kernels, or as the launcher, inside the block."""
    original = SOURCES[name]
    full_name = f"{original.__name__}_copy_{next(_COPIES)}"
    with contextlib.ExitStack() as stack:
        # The interpreter reads a kernel's lines from its file.
        path = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()), f"{name}.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(full_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        stack.callback(sys.modules.pop, full_name)
        spec.loader.exec_module(module)
        if name == "launch":
            stack.enter_context(mock.patch.object(ops, "_implementation", return_value=module))
        for user in USERS[name]:
            for attribute, value in list(vars(user).items()):
                if value is getattr(original, attribute, None) and hasattr(value, "fn"):
                    stack.enter_context(mock.patch.object(user, attribute, getattr(module, attribute)))
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem, and what of the plan is asked for."""

    problem: Problem
    exchange: str = "barrier"
    exchanges: int | None = None
    nan: bool = False
    """Whether h_0 holds a NaN of all ones."""
    max_spins: int | None = None

    def run(self, seed: int | None) -> None:
        """Run forward and backward with every check on, and compare the numbers with those of the reference."""
        words = SELF_VALIDATING if self.exchange == "words" else ()
        pins: dict[str, Any] = dict(slices=2, chunk=3, exchange=self.exchange, exchanges=self.exchanges)
        pins["max_spins"] = self.max_spins
        checks: dict[str, Any] = dict(poison=True, one_writer=True, self_validating=words)
        with cooperative(seed, **checks), plan.forced(device=ROOMY, **pins):
            if self.nan:
                inputs, _, _ = self.problem.draw()
                inputs = [a.float() for a in inputs]
                inputs[1].view(torch.int32)[0, 0] = -1
                # The first row keeps its h_0.
                lengths = torch.tensor([0] + [self.problem.steps] * (self.problem.batch - 1))
                self.problem.call(inputs, lengths, "triton")
                return
            result = self.problem.run("triton", torch.float32)
        assert_as_exact_as_eager(self.problem, result, torch.float32)


PROBLEM = Problem(steps=4, batch=3, hidden=8)
TWO = Case(PROBLEM, exchanges=2)
ONE = Case(PROBLEM, exchanges=1)
PLAIN = Case(dataclasses.replace(PROBLEM, cell="lstm"))
BOUNDED = Case(PROBLEM, exchanges=2, max_spins=60)
STATE = Case(dataclasses.replace(PROBLEM, cell="layer_norm_lstm"))
TILES = Case(dataclasses.replace(PROBLEM, batch=18, steps=3), exchanges=2)
BOTH = Case(dataclasses.replace(PROBLEM, bidirectional=True), exchanges=2)
LENGTHS = Case(dataclasses.replace(PROBLEM, lengths=True), exchanges=2)
WORDS = Case(PROBLEM, exchange="words", exchanges=2)
ONE_WORDS = Case(PROBLEM, exchange="words", exchanges=1)
NAN_WORDS = Case(PROBLEM, exchange="words", nan=True)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake: in which file what is replaced by what, and a case that runs into it."""

    name: str
    file: str
    old: str
    new: str
    case: Case
    occurrence: int = 0
    """Which of the places that read `old`; −1: all."""

    def text(self) -> str:
        """Return the file's text with the mistake in it.

        Raises:
            ValueError: there is no such place.
        """
        source = source_of(self.file)
        parts = source.split(self.old)
        if len(parts) < 2 or self.occurrence >= len(parts) - 1:
            raise ValueError(f"{self.name}: {self.file}.py has no such place {self.occurrence}: {self.old!r}")
        if self.occurrence < 0:
            return self.new.join(parts)
        first, rest = parts[: self.occurrence + 1], parts[self.occurrence + 1 :]
        return self.old.join(first) + self.new + self.old.join(rest)


_ROWS = "            arrive(counter, EXCHANGE, MAX_SPINS)\n            arrivals += SLICES\n"
_LAST = "            arrive(counter, EXCHANGE, MAX_SPINS)\n            arrivals += SLICES\n        # What nobody"
_H = "            wait(counter, arrivals, EXCHANGE, MAX_SPINS)\n\n    tl.store(c_out"

FAULTS = [
    Fault("no arrival after the row statistics", "forward", _ROWS, "            arrivals += SLICES\n", TWO),
    Fault(
        "row statistics read before they are published",
        "forward",
        "            wait(counter, arrivals, EXCHANGE, MAX_SPINS)\n        parts",
        "        parts",
        TWO,
    ),
    Fault("no arrival after h", "forward", _LAST, "            arrivals += SLICES\n        # What nobody", TWO),
    Fault("no wait for h", "forward", _H, "            pass\n\n    tl.store(c_out", TWO),
    Fault("no wait for h, plain LSTM", "forward", _H, "            pass\n\n    tl.store(c_out", PLAIN),
    Fault("an arrival is not counted", "forward", _ROWS, "            arrive(counter, EXCHANGE, MAX_SPINS)\n", TWO),
    Fault("one arrival too many is awaited", "exchange", "< arrivals:\n", "< arrivals + 1:\n", TWO),
    Fault("one arrival too few is awaited", "exchange", "< arrivals:\n", "< arrivals - 1:\n", TWO),
    Fault("release weakened to relaxed", "exchange", 'sem="release"', 'sem="relaxed"', TWO),
    Fault("acquire weakened to relaxed", "exchange", 'sem="acquire"', 'sem="relaxed"', TWO),
    Fault("release within the thread block only", "exchange", '"release", scope="gpu"', '"release", scope="cta"', TWO),
    Fault("no block barrier before the release", "exchange", "        tl.debug_barrier()\n", "        pass\n", TWO),
    Fault("a counter for all batch tiles", "forward", "counter_ptr + tl.program_id(1) *", "counter_ptr + 0 *", TILES),
    Fault(
        "h published after the arrival",
        "forward",
        "                publish(h_next_ptr + place, h, mask, EXCHANGE)\n" + _ROWS,
        "                pass\n" + _ROWS + "            publish(h_next_ptr + place, h, mask, EXCHANGE)\n",
        TWO,
    ),
    Fault(
        "ring of h with one slot, plain LSTM",
        "launch",
        "if self._words else 2, *h_0",
        "if self._words else 1, *h_0",
        PLAIN,
    ),
    Fault(
        "ring of late dz with one slot", "launch", "(chunk if self._words else 2)", "(chunk if self._words else 1)", ONE
    ),
    Fault("ring of row sums with one slot", "exchange", "step % 2 * batch", "step % 1 * batch", ONE, -1),
    Fault("h of the step before", "forward", "(h_first + step) % h_slots", "(h_first + step + 1) % h_slots", TWO),
    Fault("mask off by one", "forward", "BLOCK_N) < UNITS", "BLOCK_N) <= UNITS", TWO),
    Fault("mask off by one in backward", "backward", "BLOCK_N) < UNITS", "BLOCK_N) <= UNITS", TWO, -1),
    Fault("wrong offset of a slice", "forward", "slice * UNITS", "slice * (UNITS - 1)", TWO),
    Fault(
        "rows beyond the batch are read",
        "backward",
        "dy_ptr + tl.cast(t, tl.int64) * y_size + y_place, mask=mask",
        "dy_ptr + tl.cast(t, tl.int64) * y_size + y_place, mask=is_unit[None, :]",
        TWO,
    ),
    Fault("y a step late", "forward", "(tl.cast(t, tl.int64) * size", "(tl.cast(t + 1, tl.int64) * size", TWO),
    Fault(
        "c after the chunk not stored",
        "forward",
        "    tl.store(c_out_ptr + state_place + place, c, mask=mask)\n",
        "",
        TWO,
    ),
    Fault("dz of a gate not stored", "exchange", "range(len(ORDER))", "range(len(ORDER) - 1)", TWO),
    Fault(
        "both directions write one state",
        "forward",
        "state_place = direction * size + tile_place",
        "state_place = tile_place",
        BOTH,
    ),
    Fault(
        "lengths read beyond the batch",
        "forward",
        "row_first + row, mask=in_batch, other=0)\n",
        "row_first + row)\n",
        LENGTHS,
    ),
    Fault(
        "no wait for dz of the early gates",
        "backward",
        "            if SLICES > 1 and HAS_SUMS:\n                wait(counter, arrivals, EXCHANGE, MAX_SPINS)\n",
        "",
        TWO,
    ),
    Fault(
        "no wait for dz of the late gates",
        "backward",
        "                if HAS_SUMS:\n                    wait(counter, arrivals, EXCHANGE, MAX_SPINS)\n",
        "",
        TWO,
    ),
    Fault(
        "no wait for dz, plain LSTM",
        "backward",
        "                if not HAS_SUMS:\n                    wait(counter, arrivals, EXCHANGE, MAX_SPINS)\n",
        "",
        PLAIN,
    ),
    Fault(
        "no wait with one exchange",
        "backward",
        "            wait(counter, arrivals, EXCHANGE, MAX_SPINS)\n            dh_prev",
        "            dh_prev",
        ONE,
    ),
    Fault(
        "words: plain loads of h",
        "exchange",
        "other=0, volatile=True)\n        missing = missing | (word == -1)",
        "other=0)\n        missing = missing | (word == -1)",
        WORDS,
    ),
    Fault("words: ring of row values with one slot", "exchange", "step % 2 * batch", "step % 1 * batch", ONE_WORDS, -1),
    Fault("words: two slots for h", "launch", "chunk + 1 if self._words else 2", "2", WORDS),
    Fault("words: one slot for late dz", "launch", "(chunk if self._words else 2)", "1", ONE_WORDS),
    Fault(
        "words: a value may look like a missing word",
        "exchange",
        "        value = tl.where(value == value, value, nan)\n",
        "",
        NAN_WORDS,
    ),
    Fault(
        "words: h_0 may look like a missing word",
        "launch",
        'h_0.masked_fill(h_0.isnan(), float("nan")) if self._words else h_0',
        "h_0",
        NAN_WORDS,
    ),
    Fault("words: no tag", "exchange", "(tl.cast(step + 1, tl.int64) << 32) | bits", "bits", WORDS),
    Fault("words: any tag will do", "exchange", "(word >> 32) != tag", "(word >> 32) == 0", WORDS),
    Fault("words: nothing prefilled", "launch", "            _fill_missing(self.buffer)\n", "", WORDS),
]


def find(fault: Fault, seeds: range = range(6)) -> tuple[str, str] | None:
    """Run a fault's case with it under schedule after schedule.

    Returns:
        The name of what found it, and the first line of its report, without line numbers; None if nothing did.
    """
    with mutated(fault.file, fault.text()):
        for seed in seeds:
            try:
                fault.case.run(seed)
            except GridError as error:
                lines = str(error).splitlines()
                shown = " ".join([lines[0], *(line.strip() for line in lines[1:3])])
                return type(error).__name__, re.sub(r"\S*/(\w+\.py):\d+ in ", r"\1, ", shown)
            except AssertionError as error:
                return "wrong numbers", str(error).splitlines()[0]
    return None
