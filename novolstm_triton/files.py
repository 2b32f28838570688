"""Files that anyone may have written: what is checked before, and while, they are parsed."""

import json
import os
import zipfile
from typing import Any

_MOST_INFLATED = 100
"""How many times the size of its archive an entry may have: numbers and text get nowhere near it."""


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if there is something at a path that is no file: a folder, or a pipe, which might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)}: expected a file, got a folder or a device")


def check_path(path: Any, name: str = "path") -> None:
    """Check that something can be the name of a file.

    Raises:
        TypeError: it is neither a string nor a path.
        ValueError: no file can have this name.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a str or os.PathLike, got {type(path).__name__}")
    if "\0" in str(os.fspath(path)):
        raise ValueError(f"{name}: expected the name of a file, got {os.fspath(path)!r}")


def check_inflated(size: int, stored: int, what: str) -> None:
    """Raise ValueError if something would be absurdly larger in memory than what it is read from.

    Args:
        size: bytes that it says it has.
        stored: bytes of the file.
        what: a name for the message.
    """
    if size > _MOST_INFLATED * stored:
        raise ValueError(f"{what} would take {size} bytes, more than {_MOST_INFLATED} times the {stored} of the file")


def read_entry(archive: zipfile.ZipFile, name: str, stored: int) -> bytes:
    """Return an entry of a zip archive of `stored` bytes.

    Raises:
        ValueError: it would be absurdly large.
        KeyError: there is none of this name.
    """
    entry = archive.getinfo(name)
    # No more than this is inflated, whatever the stream holds.
    check_inflated(entry.file_size, stored, name)
    return archive.read(entry)


def strict_json(text: str | bytes) -> Any:
    """Parse JSON of which every reader makes the same.

    Raises:
        ValueError: it is none, has a name twice in one object, NaN or Infinity, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} stands twice in one object")
    return content
