"""Products and sigmoids that make the same bits of a row wherever it lies, and whatever lies beside it.

PyTorch's own do not on a CPU. A matrix product adds a row's terms in an order that depends on how many rows there are,
and where its rows go to kernels of several rows at a time, on the row's place, too. torch.sigmoid computes the elements
that are left over at the end of an array, too few for a vector, by another formula. Of what the layers compute row by
row nothing else does: with these in place of them, a row's results and gradients can be compared bit for bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from novolstm_triton.engines import bptt, launch, recompute


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a [..., m, k] times b [..., k, n], the terms added one after the other."""
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for column, row in zip(a.unbind(-1), b.unbind(-2), strict=True):
        total = total + column.unsqueeze(-1) * row.unsqueeze(-2)
    return total


def _added_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _product(a, b) * alpha
    # As in BLAS, what is multiplied by no β may hold anything.
    return c * beta + product if beta else product


def _sigmoid(x: Tensor) -> Tensor:
    # No vector is longer, so that nothing is left over.
    whole = x.new_zeros(-(-x.numel() // 256) * 256)
    whole[: x.numel()] = x.flatten()
    return whole.sigmoid()[: x.numel()].view(x.shape)


_ORDERED = {
    # Within an operator PyTorch leaves this one whole.
    "aten::matmul": _product,
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _added_product,
    "aten::baddbmm": _added_product,
    "aten::sigmoid": _sigmoid,
}


class _Ordered(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        name = func._schema.name
        ordered = _ORDERED.get(name.removesuffix("_"))
        if ordered is None:
            return func(*args, **options)
        target = args[0] if name.endswith("_") else options.pop("out", None)
        result = ordered(*args, **options)
        return result if target is None else target.copy_(result)


@contextlib.contextmanager
def ordered() -> Iterator[None]:
    """Use these inside the block: in every backend, forward and backward."""

    def entered(implementation: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _Ordered():
                return implementation(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        # A mode is off inside the operators that it sees: their implementations enter it again.
        for module in (bptt, recompute, launch):
            for name in ("forward", "backward"):
                stack.enter_context(mock.patch.object(module, name, entered(getattr(module, name))))
        stack.enter_context(_Ordered())
        yield
