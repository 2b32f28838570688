"""Checks of a call's tensors, and the zeros for those that are missing."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from novolstm_triton.call import TENSORS, Call, Options
from novolstm_triton.cells import Cell
from novolstm_triton.checks import check_dense
from novolstm_triton.ops import in_transform, is_traced
from novolstm_triton.plans import constant_in_graphs


def autocast_is_on(device: torch.device) -> bool:
    """Return whether autocast is enabled for tensors on a device; some devices, like "meta", have none."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


# PyTorch 2.11 does not trace it.
@constant_in_graphs
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast(a: Tensor) -> Tensor:
    """Return a tensor in autocast's dtype, if it is a floating one other than float64."""
    eligible = a.is_floating_point() and a.dtype != torch.float64
    return a.to(torch.get_autocast_dtype(a.device.type)) if eligible else a


def check_kinds(cell: Cell, given: tuple[Tensor | None, ...], extras: tuple[Tensor | None, ...]) -> None:
    """Check that every tensor argument is an ordinary tensor.

    Args:
        cell: names the vectors.
        given: x, h_0, c_0, weight_ih, weight_hh, bias and the vectors.
        extras: lengths, h_mask, zoneout_mask and weight_hr.

    Raises:
        TypeError: an argument is something else.
    """
    vectors = [vector.name for vector in cell.vectors]
    names = (*TENSORS[:-1], *vectors, "lengths", "h_mask", "zoneout_mask", "weight_hr")
    needed = ("x", "weight_ih", "weight_hh", *vectors)
    kinds = {
        "lengths": "an integer Tensor",
        "h_mask": "a Tensor of the dtype of x",
        "zoneout_mask": "a Tensor of torch.uint8",
    }
    for name, argument in zip(names, (*given, *extras), strict=True):
        if argument is None and name not in needed:
            continue
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name}: expected {kinds.get(name, 'a Tensor')}, got {type(argument).__name__}")
        check_dense(argument, name)


def checked_call(
    cell: Cell, given: tuple[Tensor | None, ...], extras: tuple[Tensor | None, ...], options: Options, reverse: bool
) -> Call:
    """Return the call, with zeros for missing states and biases, and in autocast's dtype where it is on.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a rank, shape, device or length that does not fit, or an option that a projected layer lacks.
    """
    lengths, h_mask, zoneout_mask, weight_hr = extras
    tensors: dict[str, Any] = dict(zip(TENSORS[:-1], given, strict=False))
    x, weight_ih, weight_hh = (tensors[name] for name in ("x", "weight_ih", "weight_hh"))
    lead, both = tuple(weight_ih.shape[:-2]), "2, " if weight_ih.dim() == 3 else ""
    ranks: tuple[tuple[str, Any, bool, str], ...] = (
        ("x", x, x.dim() == 3, "[T, B, I]"),
        ("weight_ih", weight_ih, weight_ih.dim() > 1 and lead in ((), (2,)), "[G·H, I] or [2, G·H, I]"),
        ("weight_hh", weight_hh, _are_matrices(weight_hh, lead), f"[{both}R·H, H]"),
        ("weight_hr", weight_hr, weight_hr is None or _are_matrices(weight_hr, lead), f"[{both}P, H]"),
    )
    for name, tensor, fits, wanted in ranks:
        if tensor is not None and not fits:
            raise ValueError(f"{name}: expected {wanted}, got shape {list(tensor.shape)}")
    hidden = (weight_hh if weight_hr is None else weight_hr).shape[-1]
    shapes = {
        "h_0": (*lead, x.shape[1], weight_hh.shape[-1]),
        "c_0": (*lead, x.shape[1], hidden),
        "bias": weight_ih.shape[:-1] if not cell.first_input else (*lead, len(cell.blocks) * hidden),
    }
    if cell.states == ("h",) and tensors["h_0"] is None:
        # One tensor for both, as for a state that is given.
        tensors["h_0"] = tensors["c_0"] = x.new_zeros(shapes["h_0"])
    tensors = {name: x.new_zeros(shapes[name]) if a is None else a for name, a in tensors.items()}
    vectors: Any = given[len(tensors) :]
    if autocast_is_on(x.device):
        tensors = {name: autocast(a) for name, a in tensors.items()}
        vectors = [autocast(a) for a in vectors]
        h_mask, weight_hr = (None if a is None else autocast(a) for a in (h_mask, weight_hr))
    _check_tensors(cell, tensors | dict(zip((v.name for v in cell.vectors), vectors, strict=True)), weight_hr)
    return _check_extras(
        Call(
            cell=cell,
            **tensors,
            vectors=torch.cat(vectors, -1) if vectors else x.new_empty(*lead, 0),
            options=options,
            lengths=lengths,
            h_mask=h_mask,
            zoneout_mask=zoneout_mask,
            weight_hr=weight_hr,
            reverse=reverse,
        )
    )


def _are_matrices(tensor: Tensor, lead: tuple[int, ...]) -> bool:
    """Return whether a tensor is a matrix, or, with leading dimensions, several."""
    return tensor.dim() == len(lead) + 2 and tuple(tensor.shape[:-2]) == lead


def _check_tensors(cell: Cell, tensors: dict[str, Tensor], weight_hr: Tensor | None) -> None:
    """Check dtypes, devices and shapes of the tensors that have gradients, by their names."""
    x, h_0, weight_hh = (tensors[name] for name in ("x", "h_0", "weight_hh"))
    if weight_hr is not None:
        tensors = tensors | {"weight_hr": weight_hr}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"{name}: expected a floating dtype of at least 16 bits, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    lead = tuple(tensors["weight_ih"].shape[:-2])
    if h_0.dim() != 2 + len(lead):
        wanted = "[2, B, H]" if lead else "[B, H]"
        raise ValueError(f"h_0: expected {wanted}, got shape {list(h_0.shape)}")
    (steps, batch, inputs), projected = x.shape, weight_hh.shape[-1]
    hidden = projected if weight_hr is None else weight_hr.shape[-1]
    # Like nn.LSTM, which has no features of zero either.
    if steps < 1 or inputs < 1:
        raise ValueError(f"x: expected at least one step and one feature, got shape {list(x.shape)}")
    if projected < 1 or hidden < 1:
        name, tensor = ("weight_hh", weight_hh) if weight_hr is None else ("weight_hr", weight_hr)
        raise ValueError(f"{name}: expected at least one unit, got shape {list(tensor.shape)}")
    shapes = {
        # The sizes are taken from these two and x, so that they come first.
        "weight_hr": (projected, hidden),
        "weight_hh": (cell.recurrent * hidden, projected),
        "h_0": (batch, projected),
        "c_0": (batch, hidden),
        "weight_ih": (cell.inputs * hidden, inputs),
        "bias": (len(cell.blocks) * hidden,),
        **{vector.name: (len(vector.blocks) * hidden,) for vector in cell.vectors},
    }
    for name, own in shapes.items():
        shape = (*lead, *own)
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensors[name].shape)}")


def _check_extras(call: Call) -> Call:
    """Check what a call has besides its tensors with gradients; return it as the backends take it."""
    x, h_0, options = call.x, call.h_0, call.options
    lengths = None if call.lengths is None else check_lengths(call.lengths, x)
    zoneout = call.zoneout_mask is not None or options.zoneout_h or options.zoneout_c
    if call.weight_hr is not None and (call.h_mask is not None or zoneout):
        raise ValueError("weight_hr: a projected layer has no recurrent dropout and no zoneout")
    zoneout_mask_shape = (*x.shape[:2], call.directions * h_0.shape[-1])
    for name, mask, dtype, shape in (
        ("h_mask", call.h_mask, x.dtype, tuple(h_0.shape)),
        ("zoneout_mask", call.zoneout_mask, torch.uint8, zoneout_mask_shape),
    ):
        if mask is None:
            continue
        if mask.dtype != dtype:
            raise TypeError(f"{name}: expected a Tensor of {dtype}, got {mask.dtype}")
        if tuple(mask.shape) != shape or mask.device != x.device:
            got = f"{list(mask.shape)} on {mask.device}"
            raise ValueError(f"{name}: expected shape {list(shape)} on {x.device}, got {got}")
    if call.directions == 2 and call.reverse:
        raise ValueError("reverse: both directions are given, so it must be False")
    h_mask = None if call.h_mask is None else call.h_mask.detach()
    return dataclasses.replace(call, lengths=lengths, h_mask=h_mask)


def check_lengths(lengths: Tensor, x: Tensor) -> Tensor:
    """Return lengths [B] for x [T, B, I] as the backends take them, int32 and where x is.

    Raises:
        TypeError: no integers.
        ValueError: another shape; a length below 0 or above T, if they are on the CPU.
    """
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer Tensor, got {lengths.dtype}")
    if tuple(lengths.shape) != (x.shape[1],):
        raise ValueError(f"lengths: expected shape [{x.shape[1]}], got {list(lengths.shape)}")
    if lengths.is_meta and not x.is_meta:
        raise ValueError(f"lengths: expected a Tensor with values, got one on {lengths.device}")
    # On a GPU the values stay unread (that would stall the stream): the backends clamp them by comparing with t.
    if lengths.device.type == "cpu" and lengths.numel() and is_readable(lengths):
        # PyTorch compares no unsigned integers of more than 8 bits.
        low, high = (int(v) for v in torch.aminmax(lengths.to(torch.int64)))
        if low < 0 or high > x.shape[0]:
            raise ValueError(f"lengths: expected values from 0 to {x.shape[0]}, got {low} to {high}")
    return lengths.to(device=x.device, dtype=torch.int32)


def is_readable(tensor: Tensor) -> bool:
    """Return whether a tensor on the CPU has values: those of tracers and of vmap have none, or several at once."""
    return type(tensor) is Tensor and not is_traced() and not in_transform()
