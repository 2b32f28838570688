"""Any cell by its equations alone: backend "torch" for cells without a hand-written backward.

Kept between forward and backward are x, y and the carried state at every chunk border, as in `bptt.py`. Backward takes
the chunks in reverse order, runs each once more and differentiates it by autograd, with respect to the pre-activations
that x gives; what the weights get follows by one product each. Everything is computed in fp32, or fp64 for fp64
tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from novolstm_triton.call import Call, Result, Saved, multiply_by_gain, state_dtype
from novolstm_triton.engines import reference
from novolstm_triton.engines.chunks import chunk_spans, h_before, valid_steps

_TRANSFORM_KEYS = tuple(
    getattr(torch._C.DispatchKey, f"FuncTorch{name}")
    for name in ("DynamicLayerFrontMode", "DynamicLayerBackMode", "GradWrapper", "Batched", "VmapMode")
)


def forward(call: Call, chunk: int) -> Result:
    """Run the layer over a sequence, in one direction, `chunk` steps at a time; see `bptt.forward`."""
    wide, steps, x = _widened(call), call.x.shape[0], call.x
    weights, valid = reference.weights_of(wide), valid_steps(call.lengths, steps)
    y = x.new_empty(call.x.shape[:2] + call.h_0.shape[1:])
    h, c = wide.h_0, wide.c_0
    borders = [c]
    for low, high in chunk_spans(steps, chunk, call.reverse):
        z = _project(wide, weights, low, high, valid)
        y[low:high], _, h, c = _walk(wide, weights, low, valid, z, h, c)
        borders.append(c)
    return Result(y, h.to(x.dtype, copy=True), c.to(x.dtype, copy=True), torch.stack(borders))


def backward(saved: Saved, grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Differentiate `forward`; see `bptt.backward`."""
    call, y, c_border, chunk = saved
    wide, steps, cell = _widened(call), call.x.shape[0], call.cell
    weights, valid = reference.weights_of(wide), valid_steps(call.lengths, steps)
    hidden, fed, seen = call.c_0.shape[1], cell.first_input, cell.recurrent
    dy, dh, dc = (g.to(wide.x.dtype) for g in grads)
    dx = torch.empty_like(wide.x, memory_format=torch.contiguous_format) if needs[0] else None
    parameters = zip((wide.weight_ih, wide.weight_hh, wide.bias), needs[3:6], strict=True)
    dweight_ih, dweight_hh, dbias = (torch.zeros_like(a) if needed else None for a, needed in parameters)
    dvectors = [torch.zeros_like(vector) for vector in weights.vectors]
    spans = chunk_spans(steps, chunk, call.reverse)
    for (low, high), border in zip(reversed(spans), reversed(c_border[:-1].unbind(0)), strict=True):
        # A single state is carried in full precision; y has it rounded.
        h = border
        if "c" in cell.states:
            first = high - 1 if call.reverse else low
            h = h_before(first, first + 1, y, call.h_0, valid, call.reverse)[0].to(border.dtype)

        def walk(
            z: Tensor, h: Tensor, c: Tensor, *vectors: Tensor, low: int = low
        ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
            own, h_seen, h, c = _walk(wide, weights._replace(vectors=vectors), low, valid, z, h, c)
            return (own, h, c), h_seen

        z = _project(wide, weights, low, high, valid)
        with _transforms():
            _, pull, h_seen = torch.func.vjp(  # pyright: ignore[reportAssignmentType]
                walk, z, h, border, *weights.vectors, has_aux=True
            )
            dz, dh, dc, *more = pull((dy[low:high], dh, dc))
        for total, part in zip(dvectors, more, strict=True):
            total += part
        dz = dz.flatten(0, 1)
        x = _without_padding(wide.x[low:high], low, valid)
        if dx is not None:
            dx[low:high] = (dz[:, fed * hidden :] @ wide.weight_ih).view_as(x)
        if dweight_ih is not None:
            dweight_ih.addmm_(dz[:, fed * hidden :].t(), x.flatten(0, 1))
        if dweight_hh is not None:
            h_seen, first = h_seen.flatten(0, 1), cell.at_once * hidden
            dweight_hh[:first].addmm_(dz[:, :first].t(), h_seen)
            if cell.second is not None:
                z_first = reference.first_product(z.flatten(0, 1), h_seen, weights, cell)[: cell.at_once]
                dweight_hh[first:].addmm_(dz[:, first : seen * hidden].t(), cell.second.gate(tuple(z_first), h_seen))
        if dbias is not None:
            dbias += dz.sum(0)
    flat = torch.cat(dvectors) if dvectors else wide.bias.new_empty(0)
    multiply_by_gain(flat, call)
    gradients = (dx, dh, dc, dweight_ih, dweight_hh, dbias, flat)
    pairs = zip(gradients, needs, strict=True)
    return [g.to(call.x.dtype) if needed and g is not None else None for g, needed in pairs]


@contextlib.contextmanager
def _transforms() -> Iterator[None]:
    """Let torch.func work in a TorchDispatchMode, like FlopCounterMode, which shuts it off within an operator."""
    # The guard puts back what was excluded before.
    with torch._C._PreserveDispatchKeyGuard():
        for key in _TRANSFORM_KEYS:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


def _widened(call: Call) -> Call:
    """Return the call with every tensor in the dtype of computation."""
    dtype = state_dtype(call.x.dtype)
    h_mask = None if call.h_mask is None else call.h_mask.to(dtype)
    return dataclasses.replace(call.with_tensors([a.to(dtype) for a in call.tensors]), h_mask=h_mask)


def _without_padding(x: Tensor, low: int, valid: Tensor | None) -> Tensor:
    """Return x [n, B, I] from t = low on with zeros for padding, which may hold NaN: zero times it must be zero."""
    return x if valid is None else x.masked_fill(~valid[low : low + len(x)], 0)


def _project(call: Call, weights: reference.Weights, low: int, high: int, valid: Tensor | None) -> Tensor:
    """Return what the inputs of a chunk give, [n, B, G·H]."""
    x = _without_padding(call.x[low:high], low, valid)
    return reference.project(x.flatten(0, 1), weights, call.cell).unflatten(0, x.shape[:2])


def _walk(
    call: Call, weights: reference.Weights, low: int, valid: Tensor | None, z: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk over a chunk, z [n, B, G·H]; return y and the h that met weight_hh [n, B, H] each, and h and c [B, H]."""
    y, seen = [h] * len(z), [h] * len(z)
    for n in reversed(range(len(z))) if call.reverse else range(len(z)):
        t = low + n
        seen[n] = h if call.h_mask is None else h * call.h_mask
        step_valid = None if valid is None else valid[t]
        mask = None if call.zoneout_mask is None else call.zoneout_mask[t]
        y[n], h, c = reference.advance(call, weights, z[n], h, c, step_valid, mask)
    return torch.stack(y), torch.stack(seen), h, c
