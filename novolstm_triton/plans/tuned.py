"""Plans measured on a device, as data: a JSON file per GPU, read, checked and looked up; `../app/tune.py` writes them.

A file says on which device and with which versions it was measured, and holds an entry for each hidden size, batch,
dtype, cell and direction: the plan's choices, and the time of a step under them. The format is described in
data/README.md, where the files of this package lie.

An entry is for one hidden size, dtype, cell and direction, on a device that is equal in every property. Of these the
one with the nearest batch at or above the layer's is taken, else `model.py` decides. A pin that contradicts an entry
sets all of it aside.
"""

import dataclasses
import functools
import json
import os
import pathlib
import reprlib
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from novolstm_triton.cells import with_kernels
from novolstm_triton.files import check_path, check_regular, strict_json
from novolstm_triton.plans import pins
from novolstm_triton.plans.device import Device
from novolstm_triton.plans.model import KernelPlan, candidates
from novolstm_triton.plans.pins import Pins

SCHEMA = 1
"""Version of the file format."""

SHIPPED = pathlib.Path(__file__).parent / "data"
"""Where the files of this package lie."""

VARIABLE = "NOVOLSTM_PLANS"
"""Environment variable: the path of a file of plans, or of a folder of them."""

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
"""Dtypes that a kernel takes, by the names that files and commands use."""

MAX_SIZE = 2**24
"""Most units, or rows, of an entry."""

_MAX_BYTES = 2**24
_CHOICES: dict[str, type] = {
    field: typing.get_args(hint)[0]
    for field, hint in typing.get_type_hints(Pins).items()
    if field in {of_plan.name for of_plan in dataclasses.fields(KernelPlan)}
}
_DEVICE = typing.get_type_hints(Device)


@dataclasses.dataclass(frozen=True)
class Key:
    """What an entry is for."""

    hidden: int
    batch: int
    dtype: str
    """A name in `DTYPES`."""
    cell: str
    """Its name in `novolstm_triton.cells.CELLS`."""
    direction: str
    """"forward" or "backward"."""

    @property
    def kernel(self) -> tuple[int, torch.dtype, str, str]:
        """All fields but the batch."""
        return self.hidden, DTYPES[self.dtype], self.cell, self.direction

    def __str__(self) -> str:
        """Return the key as one short phrase."""
        return f"H={self.hidden} B={self.batch} {self.dtype} {self.cell} {self.direction}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measured plan."""

    key: Key
    choices: dict[str, Any]
    """Values of pins; what is left out is the model's choice."""
    step_us: float
    """Time of a step, of a call of the whole layer in this direction, in µs."""


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """The contents of one file."""

    path: str
    device: Device
    versions: dict[str, str]
    """Of the libraries and the driver that it was measured with."""
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TunedPlans:
    """Files to look plans up in, the first outranking the later ones. Two are equal only if they are one object."""

    files: tuple[PlanFile, ...] = ()

    def find(
        self, hidden: int, batch: int, dtype: torch.dtype, device: Device, *, cell: str = "formula", backward: bool
    ) -> tuple[PlanFile, Entry] | None:
        """Return the entry for a layer's kernel and its file, or None; arguments as of `plan.plan`."""
        wanted = (hidden, dtype, cell, "backward" if backward else "forward")
        for file in self.files:
            if file.device == device:
                above = [entry for entry in file.entries if entry.key.kernel == wanted and entry.key.batch >= batch]
                if above:
                    return file, min(above, key=lambda entry: entry.key.batch)
        return None

    def choose(
        self,
        hidden: int,
        batch: int,
        dtype: torch.dtype,
        device: Device,
        *,
        cell: str = "formula",
        backward: bool,
        pins: Pins,
    ) -> Pins:
        """Return the pins with the choices of the entry that applies, or the pins alone if none does."""
        found = self.find(hidden, batch, dtype, device, cell=cell, backward=backward)
        if found is None:
            return pins
        choices = found[1].choices
        contradicted = any(getattr(pins, name) not in (None, choices.get(name)) for name in _CHOICES)
        return pins if contradicted else dataclasses.replace(pins, **choices)


def choices_of(kernel_plan: KernelPlan) -> dict[str, Any]:
    """Return the choices of a plan: what can be pinned."""
    return {name: getattr(kernel_plan, name) for name in _CHOICES}


_loaded: TunedPlans | None = None


def in_force() -> TunedPlans:
    """Return the plans that `plan.plan` looks up: those of `load`, else of NOVOLSTM_PLANS; then this package's.

    Files are read once in a process.

    Raises:
        ValueError: see `read`.
    """
    return _of_environment(os.environ.get(VARIABLE) or None) if _loaded is None else _loaded


def load(path: str | os.PathLike) -> None:
    """Use the plans of a file, or of a folder's files, from now on in every thread, instead of NOVOLSTM_PLANS.

    Args:
        path: a file that `novolstm tune` has written, or a folder of such files (`*.json`).

    Raises:
        TypeError, ValueError: see `read`. The plans in force then stay so.
    """
    put_in_force(TunedPlans((*read(path), *_shipped())))


def put_in_force(plans: TunedPlans | None) -> TunedPlans | None:
    """Use these plans alone, in every thread; None puts those of NOVOLSTM_PLANS and of this package back in force.

    Returns:
        The argument of the last such call, to be put back in force later.

    Raises:
        TypeError: `plans` is neither.
    """
    global _loaded
    if not isinstance(plans, (TunedPlans, type(None))):
        raise TypeError(f"plans: expected a TunedPlans or None, got {type(plans).__name__}")
    before, _loaded = _loaded, plans
    return before


@functools.lru_cache(maxsize=8)
def _of_environment(path: str | None) -> TunedPlans:
    if path is None:
        return TunedPlans(_shipped())
    try:
        return TunedPlans((*read(path), *_shipped()))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error


@functools.cache
def _shipped() -> tuple[PlanFile, ...]:
    return read(SHIPPED) if SHIPPED.is_dir() else ()


def read(path: str | os.PathLike) -> tuple[PlanFile, ...]:
    """Read and check a file, or a folder's files by name.

    Raises:
        TypeError: `path` is not a path.
        ValueError: a file that cannot be read, is not of this format, or has an entry that the limits of its device do
            not allow; the message names the file and the entry.
    """
    check_path(path)
    path = pathlib.Path(path)
    try:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        return tuple(_read(file) for file in files)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}") from error


def _read(path: pathlib.Path) -> PlanFile:
    check_regular(path)
    with open(path, "rb") as file:
        text = file.read(_MAX_BYTES + 1)
    try:
        if len(text) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        return _parse(str(path), strict_json(text))
    except ValueError as error:
        raise ValueError(f"{path}: not a file of tuned plans: {error}") from error


def _parse(path: str, content: Any) -> PlanFile:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {_shown(content)}")
    # Before anything else: another version may differ in everything but this.
    if content.get("schema") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, got {_shown(content.get('schema'))}")
    _expect_fields(content, ("schema", "device", "versions", "entries"), "the file")
    _expect(content["device"], dict, "device")
    _expect_fields(content["device"], _DEVICE, "device")
    for name, kind in _DEVICE.items():
        _expect(content["device"][name], kind, f"device: {name}")
    device = Device(**content["device"])
    _expect(content["versions"], dict, "versions")
    for name, version in content["versions"].items():
        _expect(version, str, f"versions: {name}")
    _expect(content["entries"], list, "entries")
    entries: dict[Key, Entry] = {}
    for number, fields in enumerate(content["entries"]):
        where = f"entry {number}"
        try:
            entry = _parse_entry(fields)
            where += f" ({entry.key})"
            if entry.key in entries:
                raise ValueError("another entry is for the same layer")
            _check_allowed(entry, device)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        entries[entry.key] = entry
    return PlanFile(path, device, content["versions"], tuple(entries.values()))


def _parse_entry(fields: Any) -> Entry:
    _expect(fields, dict, "the entry")
    kinds = typing.get_type_hints(Key)
    _expect_fields(fields, (*kinds, "choices", "step_us"), "the entry")
    for name, kind in kinds.items():
        _expect(fields[name], kind, name)
    key = Key(**{name: fields[name] for name in kinds})
    for name, value, choices in (
        ("dtype", key.dtype, list(DTYPES)),
        ("cell", key.cell, with_kernels()),
        ("direction", key.direction, ["forward", "backward"]),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {_shown(value)}")
    for name, size in (("hidden", key.hidden), ("batch", key.batch)):
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"{name}: expected 1 to {MAX_SIZE}, got {_shown(size)}")
    if type(fields["step_us"]) not in (int, float) or not 0 < fields["step_us"] < 1e9:
        raise ValueError(f"step_us: expected a positive number, got {_shown(fields['step_us'])}")
    _expect(fields["choices"], dict, "choices")
    for name, value in fields["choices"].items():
        if name not in _CHOICES:
            raise ValueError(f"choices: expected names among {list(_CHOICES)}, got {_shown(name)}")
        _expect(value, _CHOICES[name], f"choices: {name}")
    return Entry(key, fields["choices"], float(fields["step_us"]))


def _check_allowed(entry: Entry, device: Device) -> None:
    """Raise ValueError if no plan on the device has the entry's choices."""
    key = entry.key
    # Whatever is pinned around the call that reads the file.
    with pins.in_force(Pins()), pins.forced(**entry.choices):
        sizes = (key.hidden, key.batch, DTYPES[key.dtype], device)
        backward = key.direction == "backward"
        candidates(*sizes, cell=key.cell, backward=backward, pins=pins.pinned())


def _expect_fields(fields: dict[str, Any], names: Iterable[str], where: str) -> None:
    names = set(names)
    if set(fields) != names:
        missing, unknown = sorted(names - set(fields)), sorted(set(fields) - names)
        what = f"lacks {', '.join(missing)}" if missing else f"has no field {_shown(unknown[0])}"
        raise ValueError(f"{where} {what}")


def _expect(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError if a value is not of a type, or of one of a union's; a bool is not a number."""
    kinds = typing.get_args(kind) or (kind,)
    if type(value) not in kinds:
        names = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{where}: expected {names}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value from a file as a short text, however large it is."""
    return "nothing" if value is None else reprlib.repr(value)


def write(path: str | os.PathLike, device: Device, versions: dict[str, str], entries: Sequence[Entry]) -> None:
    """Write a file whole: an interrupted call leaves the one before.

    Args:
        path: the file.
        device: what the entries were measured on.
        versions: with which libraries and driver.
        entries: one per key.

    Raises:
        OSError: the file cannot be written.
        ValueError: `read` would refuse the file.
    """
    path = pathlib.Path(path)
    listed = [dict(dataclasses.asdict(entry.key), choices=entry.choices, step_us=entry.step_us) for entry in entries]
    content = dict(schema=SCHEMA, device=dataclasses.asdict(device), versions=versions, entries=listed)
    _parse(str(path), json.loads(json.dumps(content)))
    # In the same folder: a rename does not cross file systems.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
