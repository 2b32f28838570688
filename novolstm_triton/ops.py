"""The two custom operators with their fakes and derivatives, and the function that runs a checked call through them.

They are opaque to torch.compile and torch.export, and are registered with autograd and vmap themselves.
"""

import contextlib
import importlib
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from novolstm_triton import flops
from novolstm_triton.call import TENSORS, Call, Options, Saved, join_directions, state_dtype
from novolstm_triton.cells import CELLS
from novolstm_triton.engines import bptt, reference
from novolstm_triton.plans import Pins, chunk_steps, in_force, pinned


def _implementation(backend: str, cell: str) -> Any:
    """Return the module with `forward` and `backward`, imported at first use: Triton need not be there for others."""
    name = "launch" if backend == "triton" else "bptt" if cell in bptt.CELLS else "recompute"
    return importlib.import_module(f"novolstm_triton.engines.{name}")


def run(call: Call, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h_n and c_n of a checked call on backend "torch" or "triton", differentiably."""
    # In torch.jit.trace sizes are tensors; there the chunk is that of the tracing.
    *rows, hidden = map(int, call.h_0.shape) if is_jit_tracing() else call.h_0.shape
    chunk = chunk_steps(math.prod(rows), hidden, len(call.cell.blocks), call.x.element_size(), backend)
    extras = (call.lengths, call.h_mask, call.zoneout_mask)
    if torch.compiler.is_exporting():
        # torch.export.draft_export takes None, which it cannot compare before and after, for a tensor that was changed.
        extras = tuple(call.x.new_empty(0) if a is None else a for a in extras)
    arguments = (*call.tensors, *extras, list(call.options), call.cell.name, call.reverse, backend, chunk)
    if torch.compiler.is_compiling() and in_transform():
        # PyTorch's operators have no derivatives in there. Raised while tracing, this makes the graph break.
        raise NotImplementedError("torch.compile: within transforms of torch.func, like grad, use backend='reference'")
    # For tracers the operator as it is, one node; else in the form that transforms need.
    y, h_n, c_n, _ = forward_op(*arguments) if is_traced() else RecurrentFunction.apply(*arguments)
    return y, h_n, c_n


def run_reference(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h_n and c_n of a call, in one direction or both, by the reference."""
    if call.directions == 1:
        return reference.layer(call)
    return join_directions([reference.layer(one) for one in call.each_direction()])


def _call(
    tensors: Sequence[Tensor], extras: Sequence[Tensor | None], options: Sequence[float], cell: str, reverse: bool
) -> Call:
    """Return the call that an operator's arguments describe."""
    x, h_0, c_0, weight_ih, weight_hh, bias, vectors = tensors
    # Exported programs say by an empty tensor that there is none; there are rows here.
    lengths, h_mask, zoneout_mask = (None if a is None or a.numel() == 0 else a for a in extras)
    return Call(
        cell=CELLS[cell],
        x=x,
        h_0=h_0,
        c_0=c_0,
        weight_ih=weight_ih,
        weight_hh=weight_hh,
        bias=bias,
        vectors=vectors,
        options=Options(*options),
        lengths=lengths,
        h_mask=h_mask,
        zoneout_mask=zoneout_mask,
        reverse=reverse,
    )


@torch.library.custom_op("novolstm_triton::forward", mutates_args=())
def forward_op(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    vectors: Tensor,
    lengths: Tensor | None,
    h_mask: Tensor | None,
    zoneout_mask: Tensor | None,
    options: list[float],
    cell: str,
    reverse: bool,
    backend: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, B, H], h_n [B, H], c_n [B, H] and c_border [⌈T/chunk⌉ + 1, B, H]: see `Call` and `Result`.

    options are the numbers of `Options`. Borders are two at least, so that torch.compile, which treats sizes of one
    apart, need not tell one chunk from several. Both directions at once are for backend "triton".
    """
    tensors = (x, h_0, c_0, weight_ih, weight_hh, bias, vectors)
    call = _call(tensors, (lengths, h_mask, zoneout_mask), options, cell, reverse)
    return _implementation(backend, cell).forward(call, chunk)


@forward_op.register_fake
def _(x, h_0, c_0, *others):
    steps, (*directions, batch, hidden), chunk = x.shape[0], h_0.shape, others[-1]
    y = x.new_empty(steps, batch, math.prod(directions) * hidden)
    borders = (steps + chunk - 1) // chunk + 1
    c_border = c_0.new_empty(borders, *c_0.shape, dtype=state_dtype(x.dtype))
    return y, h_0.new_empty(h_0.shape), c_0.new_empty(c_0.shape), c_border


@torch.library.custom_op("novolstm_triton::backward", mutates_args=())
def backward_op(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    vectors: Tensor,
    lengths: Tensor | None,
    h_mask: Tensor | None,
    zoneout_mask: Tensor | None,
    y: Tensor,
    c_border: Tensor,
    options: list[float],
    cell: str,
    reverse: bool,
    backend: str,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `Call.tensors`.

    A gradient that `needs` rules out is an empty tensor, because an operator cannot return None.
    """
    tensors = (x, h_0, c_0, weight_ih, weight_hh, bias, vectors)
    call = _call(tensors, (lengths, h_mask, zoneout_mask), options, cell, reverse)
    # A user may call backward inside an autocast region: that would round the products in here, too.
    with torch.autocast(x.device.type, enabled=False):
        saved = Saved(call, y, c_border, chunk)
        gradients = _implementation(backend, cell).backward(saved, (dy, dh_n, dc_n), needs)
    # The operator's schema needs the seven spelled out.
    return tuple(x.new_empty(0) if g is None else g for g in gradients)  # pyright: ignore[reportReturnType]


@backward_op.register_fake
def _(dy, dh_n, dc_n, *others):
    tensors, needs = others[: len(TENSORS)], others[-1]
    return tuple(a.new_empty(a.shape if needed else 0) for a, needed in zip(tensors, needs, strict=True))


_EXTRAS = 3
"""Tensors that an operator is given besides: lengths, h_mask and zoneout_mask."""


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs: the inputs, y and c at the chunk borders."""
    given = len(TENSORS) + _EXTRAS
    tensors, ctx.constants = inputs[:given], inputs[given:]
    y, _, _, c_border = output
    ctx.save_for_backward(*tensors, y, c_border)
    # Compiled code keeps the chunk of its tracing, and has no other pins in backward.
    ctx.pins = Pins() if torch.compiler.is_compiling() else pinned()
    ctx.mark_non_differentiable(c_border)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *grads: Tensor) -> tuple:
    """Run the backward operator, under the pins of the forward call."""
    needs = list(ctx.needs_input_grad[: len(TENSORS)])
    operator = backward_op if is_traced() else RecurrentBackward.apply
    with contextlib.nullcontext() if torch.compiler.is_compiling() else in_force(ctx.pins):
        gradients = operator(*(g.contiguous() for g in grads[:3]), *ctx.saved_tensors, *ctx.constants, needs)
    pairs = zip(gradients, needs, strict=True)
    return *(g if needed else None for g, needed in pairs), *[None] * (len(ctx.needs_input_grad) - len(needs))


forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_second_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    given = 3 + len(TENSORS) + _EXTRAS
    ctx.save_for_backward(*inputs[:given])
    # After y and c_border: options, cell, reverse, backend, chunk, needs.
    ctx.constants, ctx.needs = inputs[given + 2 : given + 5], inputs[-1]
    ctx.inputs = len(inputs)


def _second_backward(ctx: Any, *grads: Tensor | None) -> tuple:
    """Differentiate the backward operator: by autograd, through the reference."""
    # Read once: under activation checkpointing there is no second time.
    saved = ctx.saved_tensors
    floating, extras = saved[:-_EXTRAS], saved[-_EXTRAS:]
    call, rest = _call(floating[3:], extras, *ctx.constants), [None] * (ctx.inputs - len(floating))
    if in_transform():
        # In here autograd's own functions are forbidden; elsewhere these transforms forbid hooks on saved tensors.
        def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
            return run_reference(call.with_tensors(tensors))

        def gradients(*given: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(layer, *given[3:])[1](given[:3])

        transformed: Any = torch.func.vjp(gradients, *floating)
        first, pull = transformed
        pairs = zip(first, grads, ctx.needs, strict=True)
        return *pull(tuple(torch.zeros_like(g) if d is None or not needed else d for g, d, needed in pairs)), *rest
    with torch.enable_grad():
        # Aliases, so that a gradient is of this operand alone, even where one is made from another.
        given = [a.view_as(a) if a.requires_grad else a.detach().requires_grad_() for a in floating]
        outgoing, inputs = given[:3], given[3:]
        outputs = run_reference(call.with_tensors(inputs))
        first = torch.autograd.grad(outputs, inputs, outgoing, create_graph=True, allow_unused=True)
    pairs = [
        (g, outer)
        for g, outer, needed in zip(first, grads, ctx.needs, strict=True)
        if needed and g is not None and outer is not None and g.requires_grad
    ]
    second: Sequence[Tensor | None] = [None] * len(given)
    if pairs:
        again, outer = zip(*pairs, strict=True)
        second = torch.autograd.grad(again, given, outer, create_graph=torch.is_grad_enabled(), allow_unused=True)
    return *second, *rest


backward_op.register_autograd(_second_backward, setup_context=_save_for_second_backward)


def _map_over_batch(op: Any, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run an operator for each member of a batch that vmap has made, one after the other."""
    # A list has a list of dimensions, none of which is mapped over.
    places = [d if isinstance(d, int) else None for d in in_dims]
    batch = next(a.shape[d] for a, d in zip(args, places, strict=True) if d is not None)
    if batch == 0:
        # A member of zeros shows the shapes that an empty batch would have.
        one = [
            a if d is None else a.new_zeros(*a.shape[:d], 1, *a.shape[d + 1 :])
            for a, d in zip(args, places, strict=True)
        ]
        results, dims = _map_over_batch(op, in_dims, tuple(one))
        return tuple(r[:0] for r in results), dims
    results = []
    for k in range(batch):
        results.append(op(*(a if d is None else a.select(d, k) for a, d in zip(args, places, strict=True))))
    stacked = tuple(torch.stack(member) for member in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _no_forward_mode(ctx: Any, *tangents: Any) -> NoReturn:
    """Say what to do instead of forward mode, and of torch.func.hessian, which uses it."""
    raise NotImplementedError(
        "forward-mode differentiation (jvp, jacfwd, linearize, hessian) needs backend='reference'; "
        "reverse mode (vjp, jacrev, and jacrev of jacrev for a Hessian) works with every backend"
    )


class RecurrentFunction(torch.autograd.Function):
    """The forward operator, with its arguments, in the form that the transforms of torch.func need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Run the operator."""
        return forward_op(*arguments)

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_backward)
    jvp = staticmethod(_no_forward_mode)


class RecurrentBackward(torch.autograd.Function):
    """The backward operator in the same form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Run the operator."""
        return backward_op(*arguments)

    setup_context = staticmethod(_save_for_second_backward)
    backward = staticmethod(_second_backward)
    jvp = staticmethod(_no_forward_mode)


@forward_op.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _map_over_batch(forward_op, in_dims, args)


@backward_op.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _map_over_batch(backward_op, in_dims, args)


def is_traced() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records this call."""
    return torch.compiler.is_compiling() or is_jit_tracing()


def is_jit_tracing() -> bool:
    """Return whether torch.jit.trace records this call."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def in_transform() -> bool:
    """Return whether a transform of torch.func, like grad or vmap, runs this call."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


flops.register_formulas()
