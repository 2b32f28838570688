"""Checks of arguments that functions, modules and plans share."""

import numbers
import reprlib
import sys
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Return whether a value is a real number; bools and tensors do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= float(value) <= 1


def check_finite(value: Any, name: str, expected: str = "a finite number", *, above: float | None = None) -> float:
    """Return a number as a float.

    Args:
        value: the value to check.
        name: the argument's name, for the message.
        expected: what a valid value is, for the message.
        above: the number that it has to exceed, if any.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value is infinite, NaN, too large for a float, or not above the bound.
    """
    if not is_number(value):
        raise TypeError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
    if not abs(value) <= sys.float_info.max or (above is not None and value <= above):
        raise ValueError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
    return float(value)


def check_int(value: Any, name: str, least: int = 1, most: int | None = None) -> None:
    """Check an integer.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the value is out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {reprlib.repr(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {reprlib.repr(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most}, got {reprlib.repr(value)}")


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless a tensor is an ordinary one: not sparse, nested or quantised, nor in oneDNN's layout."""
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.").lstrip("_")
    elif tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantised"
    else:
        return
    raise TypeError(f"{name}: expected a dense Tensor, got a {kind} one")
