"""Checks of files from untrusted sources, made before and while they are parsed."""

import json
import os
import zipfile
from typing import Any

_MOST_INFLATED = 100
"""An entry may be at most this many times as large as its archive; numbers and text stay far below."""


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a path leads to something that is not a file, like a folder, or a pipe that may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)}: expected a file, got a folder or a device")


def check_path(path: Any, name: str = "path") -> None:
    """Check that a value can be the name of a file.

    Raises:
        TypeError: the value is neither a string nor a path.
        ValueError: no file can have this name.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a str or os.PathLike, got {type(path).__name__}")
    if "\0" in str(os.fspath(path)):
        raise ValueError(f"{name}: expected the name of a file, got {os.fspath(path)!r}")


def check_inflated(size: int, stored: int, what: str) -> None:
    """Raise ValueError if data would be absurdly larger in memory than the file that it is read from.

    Args:
        size: its size in bytes, according to the file.
        stored: size of the file in bytes.
        what: a name for the message.
    """
    if size > _MOST_INFLATED * stored:
        raise ValueError(f"{what} would take {size} bytes, more than {_MOST_INFLATED} times the {stored} of the file")


def read_entry(archive: zipfile.ZipFile, name: str, stored: int) -> bytes:
    """Return an entry of a zip archive of `stored` bytes.

    Raises:
        ValueError: the entry would be absurdly large.
        KeyError: the archive has no entry of this name.
    """
    entry = archive.getinfo(name)
    # No more than this is inflated, whatever the stream holds.
    check_inflated(entry.file_size, stored, name)
    return archive.read(entry)


def strict_json(text: str | bytes) -> Any:
    """Parse JSON that every reader understands alike.

    Raises:
        ValueError: the text is not JSON, repeats a name in one object, has NaN or Infinity, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} appears twice in one object")
    return content
