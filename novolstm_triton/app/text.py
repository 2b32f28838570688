"""Text as a stream of bytes: which files are read, and how they become batches of consecutive windows."""

import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.05
"""Share of the text, at its end, that is never trained on."""

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "node_modules"}


class UsageError(ValueError):
    """A request that cannot be met, with a message of one line that tells the user what to change."""


def read_text(paths: Sequence[str], max_bytes: int) -> bytes:
    """Read files, and folders recursively, into one text; Python's standard library if no path is given.

    The order is that of `paths`, and by name within a folder, so that a text is the same on every run. Of a folder,
    hidden entries, binary files and (in the standard library) tests and installed packages are left out.

    Args:
        paths: files and folders; empty for the sources of the running Python's standard library.
        max_bytes: reading stops after this many bytes.

    Raises:
        UsageError: a path that does not exist or cannot be read, or no text at all.
    """
    text = bytearray()
    try:
        for path in _files(paths):
            with path.open("rb") as file:
                text += file.read(max_bytes - len(text))
            if len(text) >= max_bytes:
                break
    except OSError as error:
        raise UsageError(f"--text: cannot read {error.filename}: {error.strerror}") from error
    if not text:
        source = " ".join(paths) or "the standard library, which has no sources here: pass --text PATH"
        raise UsageError(f"--text: no text found in {source}")
    return bytes(text)


def _files(paths: Sequence[str]) -> Iterator[Path]:
    """Yield each file to be read once, in order."""
    seen = set()
    for path in _expand(paths):
        identity = path.resolve()
        if identity not in seen:
            seen.add(identity)
            yield path


def _expand(paths: Sequence[str]) -> Iterator[Path]:
    if not paths:
        yield from _walk(Path(sysconfig.get_path("stdlib")), suffix=".py", skipped=_SKIPPED_FOLDERS)
    for name in paths:
        path = Path(name)
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path
        else:
            what = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise UsageError(f"--text: {name} {what}")


def _walk(root: Path, suffix: str = "", skipped: Collection[str] = ()) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file() and not _is_binary(path):
                yield path


def _raise(error: OSError) -> None:
    raise error


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def split_text(text: bytes, rows: int, seq: int) -> tuple[Tensor, Tensor]:
    """Cut a text into what is trained on and what is held out, the last `HELD_OUT` of it.

    Args:
        text: the bytes.
        rows: rows of a batch, over all processes.
        seq: bytes per row and step.

    Returns:
        Two uint8 tensors, of at least rows·seq + 1 and rows + 1 bytes.

    Raises:
        UsageError: the text is too short for one window.
    """
    held_out = max(int(len(text) * HELD_OUT), rows + 1)
    if len(text) - held_out < rows * seq + 1:
        raise UsageError(
            f"--text: {len(text):,} bytes are too short for {rows} rows of --seq {seq} "
            f"and a held-out part: give at least {int((rows * seq + rows + 2) / (1 - HELD_OUT)) + 1:,} bytes, "
            "or lower --batch or --seq"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[:-held_out], data[-held_out:]


class ByteStream:
    """A text as `rows` contiguous parts side by side, read in consecutive windows, so that a state can be carried over.

    Window n of row r continues window n - 1 of row r. A stream holds a range of the rows: the share of one process.

    Args:
        data: [N] uint8, N > rows.
        rows: number of parts the text is cut into.
        seq: bytes per window; shortened to the length of a part.
        share: the rows that this stream returns.
        device: where the windows are returned.
    """

    def __init__(self, data: Tensor, rows: int, seq: int, share: slice, device: torch.device) -> None:
        length = (len(data) - 1) // rows
        self.seq = min(seq, length)
        self.windows = length // self.seq
        """Number of whole windows in a part, one epoch."""
        self._inputs = data[: rows * length].view(rows, length)[share].to(device)
        self._targets = data[1 : rows * length + 1].view(rows, length)[share].to(device)

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, the bytes after them, of a window: [seq, rows of the share] int64 each."""
        part = slice(index * self.seq, (index + 1) * self.seq)
        return self._inputs[:, part].t().long(), self._targets[:, part].t().long()
