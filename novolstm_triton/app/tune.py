"""Measures plans on this machine's GPU and writes the fastest ones to a file that `plan.plan` reads: `novolstm tune`.

For each kernel the plan's own candidates are measured, under every exchange, the best by the model first; then plans
that differ from the fastest in one choice, until none is faster. A candidate is compiled and checked, then timed, in a
process of its own. One that fails in any of this is reported and left out.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from novolstm_triton import plans
from novolstm_triton.app import environment
from novolstm_triton.app.isolated import CallError, Isolated
from novolstm_triton.app.text import UsageError
from novolstm_triton.plans import Device, Pins, tuned
from novolstm_triton.plans.tuned import DTYPES, Entry, Key
from novolstm_triton.problems import excess

_LADDERS: dict[str, tuple] = dict(
    block_k=(16, 32, 64, 128, 256, 512), num_warps=(2, 4, 8, 16), exchange=plans.EXCHANGES, exchanges=(1, 2)
)
"""Values to try for the choices that are not bools and in which the candidates do not differ already.

A name that is not a pin is ignored.
"""

Choices = dict[str, Any]
"""Values of pins by name."""


class Calls(Protocol):
    """What `Isolated` offers; the functions are those of `measure.py`."""

    def call(self, function: str, timeout_s: float, **arguments: Any) -> Any:
        """Call a function and return its result; raise CallError if it fails."""


def keys(hidden: Sequence[int], batch: Sequence[int], dtype: Sequence[str], cell: Sequence[str]) -> Iterator[Key]:
    """Yield a key for each combination and both directions."""
    for c, d, h, b in itertools.product(cell, dtype, hidden, batch):
        for direction in ("forward", "backward"):
            yield Key(h, b, d, c, direction)


def tune(
    wanted: Sequence[Key],
    out: str | os.PathLike,
    *,
    where: str = "cuda",
    steps: int = 256,
    candidates: int = 24,
    timeout_s: float = 120.0,
    calls: Calls | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> list[Key]:
    """Measure plans and write the fastest of each key to a file, after each key; continue an existing file.

    Args:
        wanted: what to tune; what the file holds already is left as it is.
        out: the file.
        where: name of the PyTorch device.
        steps: time steps T of a timed call.
        candidates: how many of the plan's candidates are measured at first, the best by its model.
        timeout_s: how long one check or timing may take, compilation included.
        calls: what measures; None means a process of its own.
        say: takes a line for each key and for each candidate left out.

    Returns:
        Keys for which no candidate passed.

    Raises:
        UsageError: the file is of another device or of other versions, cannot be written, or is not a file of plans.
        CallError: the device cannot be described.
    """
    if calls is None:
        with Isolated("novolstm_triton.app.measure") as process:
            return tune(
                wanted,
                out,
                where=where,
                steps=steps,
                candidates=candidates,
                timeout_s=timeout_s,
                calls=process,
                say=say,
            )
    device = Device(**calls.call("describe_device", timeout_s, where=where))
    versions = environment.versions()
    entries = _resume(pathlib.Path(out), device, versions)
    done = {entry.key for entry in entries}
    failed = []
    for key in wanted:
        if key in done:
            say(f"{key}: in {out} already")
            continue
        best = _Search(key, device, where, steps, timeout_s, calls, say).run(candidates)
        if best is None:
            failed.append(key)
            continue
        entries.append(best)
        try:
            tuned.write(out, device, versions, entries)
        except OSError as error:
            raise UsageError(f"--out: cannot write {out}: {error.strerror}") from error
    return failed


def _resume(out: pathlib.Path, device: Device, versions: dict[str, str]) -> list[Entry]:
    """Return the entries that an earlier run has written."""
    if not out.exists():
        return []
    try:
        (file,) = tuned.read(out)
    except ValueError as error:
        raise UsageError(f"--out: {error}") from error
    for what, theirs, ours in (("device", file.device, device), ("versions", file.versions, versions)):
        if theirs != ours:
            raise UsageError(f"--out: {out} is of another {what}, choose another file: it has {theirs}, here is {ours}")
    return list(file.entries)


class _Search:
    """The search for the plan of one key."""

    def __init__(
        self,
        key: Key,
        device: Device,
        where: str,
        steps: int,
        timeout_s: float,
        calls: Calls,
        say: Callable[[str], None],
    ) -> None:
        self._key, self._device, self._steps = key, device, steps
        self._timeout_s, self._calls, self._say = timeout_s, calls, say
        self._arguments: dict[str, Any] = dict(
            key=dataclasses.asdict(key), device=dataclasses.asdict(device), where=where
        )
        self._seen: list[Choices] = []
        self._fastest: Entry | None = None

    def run(self, candidates: int) -> Entry | None:
        """Return the fastest plan, or None if none passed."""
        with tqdm(desc=str(self._key), unit=" plans", disable=None, leave=False) as bar:
            first = enumerate_choices(self._key, self._device)
            for choices in first[:candidates]:
                self._measure(choices)
                bar.update()
            modelled = self._fastest if self._fastest and self._fastest.choices == first[0] else None
            improved = self._fastest is not None
            while improved:
                assert self._fastest is not None
                before = self._fastest
                for choices in neighbours(before.choices, self._key, self._device):
                    self._measure(choices)
                    bar.update()
                improved = self._fastest is not before
        if self._fastest is None:
            self._say(f"{self._key}: no candidate passed")
        else:
            same = " (the model's choice)" if self._fastest is modelled else ""
            shown = " ".join(f"{name}={value}" for name, value in self._fastest.choices.items())
            self._say(f"{self._key}: {self._fastest.step_us:.2f} µs a step{same}: {shown}")
        return self._fastest

    def _measure(self, choices: Choices) -> None:
        """Check and time a plan, unless it has been before."""
        if choices in self._seen:
            return
        self._seen.append(choices)
        try:
            checked = self._calls.call("check_plan", self._timeout_s, choices=choices, **self._arguments)
            worst = max(checked, key=lambda name: excess(*checked[name]))
            error, bound = checked[worst]
            if excess(error, bound) > 1:
                raise CallError(f"wrong results: {worst} is off by {error:.1e}, allowed are {bound:.1e}")
            step_us = self._calls.call(
                "time_plan", self._timeout_s, choices=choices, steps=self._steps, **self._arguments
            )
        except CallError as error:
            self._say(f"{self._key}: left out {choices}: {error}")
            return
        if self._fastest is None or step_us < self._fastest.step_us:
            self._fastest = Entry(self._key, choices, step_us)


def enumerate_choices(key: Key, device: Device) -> list[Choices]:
    """Return the choices of the plan's candidates under every exchange, the best by its model first.

    Raises:
        ValueError: no plan fits the device.
    """
    # Without pins first: an exchange may allow none, but then another does, or that raises.
    kernel_plans = _candidates(key, device, Pins())
    for exchange in plans.EXCHANGES:
        try:
            kernel_plans += _candidates(key, device, Pins(exchange=exchange))
        except ValueError:
            continue
    kernel_plans.sort(key=lambda p: (p.step_us, p.slices, p.block_b))
    choices: list[Choices] = []
    for kernel_plan in kernel_plans:
        if (chosen := tuned.choices_of(kernel_plan)) not in choices:
            choices.append(chosen)
    return choices


def neighbours(choices: Choices, key: Key, device: Device) -> Iterator[Choices]:
    """Yield choices that differ from these in one, as far as a plan can have them."""
    for name, value in choices.items():
        for other in (not value,) if isinstance(value, bool) else _LADDERS.get(name, ()):
            if other == value:
                continue
            changed: Choices = choices | {name: other}
            try:
                allowed = _candidates(key, device, Pins(**changed))
            except ValueError:
                continue
            if any(tuned.choices_of(kernel_plan) == changed for kernel_plan in allowed):
                yield changed


def _candidates(key: Key, device: Device, pins: Pins) -> list[plans.KernelPlan]:
    return plans.candidates(
        key.hidden,
        key.batch,
        DTYPES[key.dtype],
        device,
        cell=key.cell,
        backward=key.direction == "backward",
        pins=pins,
    )
