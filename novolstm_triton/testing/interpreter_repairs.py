"""Corrects what the interpreters of Triton 3.6 to 3.9 get wrong and GPUs do not: mostly bfloat16, and slow parts.

Each function takes the interpreter's own method first, then its arguments; `cooperative` puts them in place.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def _to_float32(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bfloat16(values: np.ndarray) -> TensorHandle:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, nearest_even).astype(np.uint16), tl.bfloat16)


def cast(operation, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """The interpreter cuts float32 off instead of rounding it, and takes other types' values for bits."""
    if source.dtype.scalar == target.scalar or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
        return operation(source, target)
    source = _to_float32(source)
    return _to_bfloat16(source.data) if target.scalar == tl.bfloat16 else operation(source, target)


def binary(operation, left: TensorHandle, right: TensorHandle, compute) -> TensorHandle:
    """The interpreter computes with the bits of bfloat16 as if they were integers."""
    if left.dtype.scalar != tl.bfloat16 or compute in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
        return operation(left, right, compute)
    result = compute(_to_float32(left).data, _to_float32(right).data)
    return TensorHandle(result, tl.int1) if result.dtype == bool else _to_bfloat16(result)


def dot(operation, left: TensorHandle, right: TensorHandle, *rest) -> TensorHandle:
    """As for `binary`; a product of two bfloat16 numbers is exact in float32."""
    if left.dtype.scalar == tl.bfloat16:
        left, right = _to_float32(left), _to_float32(right)
    return operation(left, right, *rest)


def splat(operation, shape, scalar: TensorHandle) -> TensorHandle:
    """The interpreter turns a scalar condition into integers, which make no mask for Triton 3.9."""
    block = operation(shape, scalar)
    return TensorHandle(block.data.astype(scalar.data.dtype), block.dtype)


def generic_reduce(operation, reduction, inputs: tuple) -> list:
    """The interpreter combines one element after another; here all rows at once, and pairs of columns as a GPU does."""
    if reduction.axis is None:
        return operation(reduction, inputs)
    columns = [np.moveaxis(tile.handle.data, reduction.axis, 0) for tile in inputs]
    while (count := len(columns[0])) > 1:
        half = count // 2
        parts = [values[first : first + half] for first in (0, half) for values in columns]
        tensors = [reduction.to_tensor(part, tile.dtype) for part, tile in zip(parts, inputs * 2, strict=True)]
        combined = reduction.combine_fn.fn(*tensors)
        combined = combined if isinstance(combined, tuple) else (combined,)
        rest = [values[2 * half :] for values in columns]
        columns = [np.concatenate([new.handle.data, old]) for new, old in zip(combined, rest, strict=True)]
    results = [values[0] for values in columns]
    if reduction.keep_dims:
        results = [np.expand_dims(values, reduction.axis) for values in results]
    return [reduction.to_tensor(values, tile.dtype) for values, tile in zip(results, inputs, strict=True)]


REPAIRS = {"cast_impl": cast, "binary_op": binary, "create_dot": dot, "create_splat": splat}
