"""Uninitialised memory: `torch.empty` and its like, filled with a pattern that no computation produces."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor

_PATTERNS = {1: 0xA5, 2: 0xFFE5, 4: 0xFFE5A5A5, 8: 0xFFFDA5A5A5A5A5A5}
"""By the size of an element in bytes: in every floating dtype a NaN, with bits that no operation produces."""

_INTEGERS = {1: 0xA5, 2: 0x7A5A, 4: 0x7A5A5A5A, 8: 0x7A5A5A5A5A5A5A5A}
"""The patterns of integers: large numbers."""


class Allocations:
    """Tensors that were allocated uninitialised while `poisoned_allocations` was in force."""

    def __init__(self) -> None:
        # They are kept alive, so that no later one gets the address of an earlier one.
        self._tensors: dict[int, tuple[Tensor, int]] = {}

    def add(self, tensor: Tensor) -> None:
        """Fill a tensor and remember it."""
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.numel() == 0 or tensor.is_complex():
            return
        size = tensor.element_size()
        pattern = (_PATTERNS if tensor.is_floating_point() else _INTEGERS)[size]
        numbers = np.frombuffer(pattern.to_bytes(size, "little"), f"int{8 * size}")
        with torch.no_grad():
            storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            storage.view(_SIGNED[size]).fill_(int(numbers[0]))
        self._tensors[tensor.untyped_storage().data_ptr()] = storage, pattern

    def empty_bytes(self, tensor: Tensor) -> np.ndarray | None:
        """Return which bytes of a tensor's storage are still uninitialised, or None if that is not known."""
        found = self._tensors.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return None
        storage, pattern = found
        size = storage.element_size()
        elements = storage.view(_SIGNED[size]).numpy().view(f"uint{8 * size}")
        return (elements == pattern).repeat(size)


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor full of NaN, or of a large integer."""
    with poisoned_allocations():
        return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[Allocations]:
    """Fill uninitialised memory on the CPU (of `torch.empty`, `new_empty`, ...) with NaN or large integers.

    A kernel that reads such memory before writing it is then found: by its results, and by `cooperative`.
    """
    allocations = Allocations()

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            allocations.add(tensor)
            return tensor

        return allocate_and_fill

    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, filling(getattr(owner, name))))
        yield allocations
