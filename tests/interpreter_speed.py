"""Makes the interpreters of Triton 3.6 to 3.9 faster: they build the same few shapes and types for every operation.

What is kept is what their own constructors make, so that no result changes.
"""

import contextlib
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter

_SHAPES: dict[tuple[int, ...], tuple] = {}
"""A tensor's `shape` and `numel` by its sizes."""

_BLOCKS: dict[tuple[int, ...], tuple] = {}
"""A block type's `shape`, `numel` and the text of the shape by its sizes."""

_DTYPES: dict = {}
"""numpy's dtype by the name of Triton's."""


def faster(check_overflow: bool) -> contextlib.ExitStack:
    """Returns a context in which interpreted programs are faster.

    Args:
        check_overflow: whether sums and products of 32-bit integers are computed in 64 bits, too, to compare them.
    """
    core, options = tl.core, interpreter.interpreter_builder.options
    make_tensor, make_block, numpy_dtype = (
        core.tensor.__init__,
        core.block_type.__init__,
        interpreter._get_np_dtype,
    )
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def tensor(self, handle, type):
        sizes = tuple(type.shape) if type.is_block() else ()
        known = _SHAPES.get(sizes)
        if known is None:
            make_tensor(self, handle, type)
            _SHAPES[sizes] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known

    def block_type(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        known = _BLOCKS.get(sizes)
        if known is None:
            make_block(self, element_ty, shape)
            _BLOCKS[sizes] = self.shape, self.numel, f"<{self.shape}, "
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known
        self.name = f"{text}{element_ty}>"

    def broadcast_impl_value(self, left, right):
        # Equal shapes are one object here.
        if left.shape is right.shape:
            return left, right
        return broadcast(self, left, right)

    def np_dtype(dtype):
        name = dtype.name
        known = _DTYPES.get(name)
        if known is None:
            known = _DTYPES[name] = numpy_dtype(dtype)
        return known

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(core.tensor, "__init__", tensor))
    stack.enter_context(mock.patch.object(core.block_type, "__init__", block_type))
    stack.enter_context(mock.patch.object(semantic, "broadcast_impl_value", broadcast_impl_value))
    stack.enter_context(mock.patch.object(interpreter, "_get_np_dtype", np_dtype))
    checked = type(options)(sanitize_overflow=check_overflow)
    stack.enter_context(mock.patch.object(interpreter.interpreter_builder, "options", checked))
    return stack
