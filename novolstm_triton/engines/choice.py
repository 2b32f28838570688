"""Which backend runs a call: what `backend=` names, the block of code, the environment or the device."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import torch

from novolstm_triton.plans import constant_in_graphs

BACKENDS = ("auto", "reference", "torch", "triton")
"""What `backend=` accepts: see `novolstm_triton.functional.novolstm`."""

_backend_in_use: contextvars.ContextVar[str | None] = contextvars.ContextVar("novolstm_backend", default=None)


@constant_in_graphs
def _backend_of_block() -> str | None:
    return _backend_in_use.get()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `backend="auto"` mean `name` inside the `with` block (of this thread or async task).

    Args:
        name: "reference", "torch", "triton", or "auto" for the built-in choice. It outranks the environment
            variable NOVOLSTM_BACKEND; a backend named in a call outranks both.

    Raises:
        ValueError: an unknown name.
    """
    check_backend_name(name, "use_backend")
    token = _backend_in_use.set(name)
    try:
        yield
    finally:
        _backend_in_use.reset(token)


def resolve_backend(backend: str, device: torch.device) -> str:
    """Turn `backend` as given to `novolstm` into "reference", "torch" or "triton" for tensors on `device`.

    Raises:
        ValueError: an unknown name, given here or in the environment variable NOVOLSTM_BACKEND.
    """
    return explain_backend(backend, device)[0]


def explain_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """Return what `resolve_backend` does and what decided it: "call", "use_backend", "NOVOLSTM_BACKEND" or "device".

    Raises:
        ValueError: an unknown name, given here or in the environment variable NOVOLSTM_BACKEND.
    """
    check_backend_name(backend, "backend")
    if backend != "auto":
        return backend, "call"
    if (used := _backend_of_block() or "auto") != "auto":
        return used, "use_backend"
    if (named := os.environ.get("NOVOLSTM_BACKEND") or "auto") != "auto":
        check_backend_name(named, "NOVOLSTM_BACKEND")
        return named, "NOVOLSTM_BACKEND"
    return ("triton" if device.type == "cuda" else "torch"), "device"


def check_backend_name(name: str, where: str) -> None:
    """Raise ValueError unless there is a backend of this name, given as the argument or variable `where`."""
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {list(BACKENDS)}, got {name!r}")


def check_triton(dtype: torch.dtype, device: torch.device) -> None:
    """Check that backend "triton" takes tensors of a dtype on a device.

    Raises:
        TypeError: it does not take the dtype.
        ValueError: it does not run on the device.
    """
    if dtype == torch.float64:
        raise TypeError("backend 'triton' has no float64: use backend='torch', or cast to float32")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"backend 'triton': expected float32, float16 or bfloat16, got {dtype}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got {device}: use backend='torch', "
            "or set TRITON_INTERPRET=1 before the first import of triton to debug its kernels on a CPU"
        )
