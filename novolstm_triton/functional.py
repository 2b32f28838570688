"""The functional layers: every cell over a whole sequence, checked, on the backend of choice.

Equations: `novolstm_triton.cells`.
"""

import contextlib
import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from novolstm_triton.call import Call, Options, join_directions
from novolstm_triton.cells import CELLS, Cell, novolstm_cell, register
from novolstm_triton.checks import check_finite, is_number, is_share
from novolstm_triton.engines import onnx, reference
from novolstm_triton.engines.choice import BACKENDS, check_triton, explain_backend, resolve_backend, use_backend
from novolstm_triton.ops import in_transform, is_traced, run
from novolstm_triton.validation import autocast_is_on, check_kinds, check_lengths, checked_call

__all__ = [
    "BACKENDS",
    "check_lengths",
    "explain_backend",
    "lstm",
    "novolstm",
    "recurrence",
    "resolve_backend",
    "takes_plain_steps",
    "use_backend",
]


def novolstm(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    weight_hr: Tensor | None = None,
    eps: float | None = None,
    gate_gain: float = 1.0,
    variant: str = "formula",
    layer_norm: str = "input_gate",
    lengths: Tensor | None = None,
    reverse: bool = False,
    h_mask: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    zoneout_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one NovoLSTM layer over a whole sequence, in one direction or in both.

    Equations: `novolstm_triton.cells.novolstm`. All floating tensors share one dtype and one device. Under autocast
    they are cast to its dtype first, except fp64. Saved for backward are x, y and c at every chunk border.

    With a leading dimension of two on the weights, the states and `h_mask`, the layer runs in both directions over x:
    [0] from the first step to the last, [1] from the last to the first. Backend "triton" walks both at once.

    Args:
        x: [T, B, I] input, T ≥ 1; bf16, fp16, fp32, or (not on triton) fp64.
        h_0: [B, P] initial hidden state, or None for zero; P = H unless there is a projection.
        c_0: [B, H] initial cell state, or None for zero.
        weight_ih: [5H, I] input weights, blocks i|f|g|o|p.
        weight_hh: [5H, P] recurrent weights, blocks i|f|g|o|p; [4H, P], blocks i|f|g|o, for variant "notebook".
        bias: [5H] sum of input and recurrent bias, or None for zero.
        ln_weight: [H] γ of the input gate's layer normalisation; [4H], blocks i|f|g|o, if all are normalised.
        ln_bias: [H] or [4H] β, likewise.
        weight_hr: [P, H] projection of the hidden state, or None.
        eps: ε of the layer normalisations; None means 1e-5 (formula) or 1e-3 (notebook).
        gate_gain: constant factor on the input gate, which is O(1/H) without one.
        variant: "formula", i = LN(σ(z_i))·softmax(z_p); "notebook", i = LN(σ(z_i)·softmax(x W_pᵀ + b_p)).
        layer_norm: "input_gate", or "all": the pre-activations of f, g and o are normalised, too.
        lengths: [B] integer number of valid steps of each row, 0 to T; y is zero after them, h_n and c_n are the
            states at a row's last valid step. None: all T.
        reverse: walk from the last step to the first; a row with a length begins at its own last step.
        h_mask: [B, H] factor on h wherever it meets weight_hh: the mask of recurrent dropout. No gradient.
        zoneout: shares of h and of c that a step keeps of the step before, from 0 to 1.
        zoneout_mask: [T, B, H] ([T, B, 2H] for both directions) uint8, which replaces the shares by a choice for
            every unit and step: bit 0, h keeps its value; bit 1, c does.
        backend: "auto" (triton on a GPU tensor, torch elsewhere; see `use_backend`), "reference" (a loop under
            autograd), "torch" (hand-written backward, any device), "triton" (kernels; NVIDIA or AMD GPU).

    Returns:
        y [T, B, P] ([T, B, 2P] for both directions), h_n [B, P], c_n [B, H], in the dtype of x.

    Raises:
        TypeError: an argument of the wrong type, or a dtype that the backend cannot take.
        ValueError: a shape, device, length, option or backend that does not fit.
    """
    cell = CELLS[novolstm_cell(variant, layer_norm)]
    weights = (weight_ih, weight_hh, bias, (ln_weight, ln_bias))
    extras: dict[str, Any] = dict(weight_hr=weight_hr, lengths=lengths, h_mask=h_mask, zoneout_mask=zoneout_mask)
    options: dict[str, Any] = dict(eps=eps, gate_gain=gate_gain, reverse=reverse, zoneout=zoneout, backend=backend)
    y, (h_n, c_n) = recurrence(cell, x, (h_0, c_0), *weights, **extras, **options)
    return y, h_n, c_n


def lstm(
    x: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    *,
    weight_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    h_mask: Tensor | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    zoneout_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer of the plain LSTM, the function of `torch.nn.LSTM`, in one direction or in both.

    Arguments, results and errors are those of `novolstm`, except that the weights have blocks i|f|g|o.

    Args:
        x: [T, B, I] input.
        h_0: [B, P] initial hidden state, or None for zero; P = H unless there is a projection.
        c_0: [B, H] initial cell state, or None for zero.
        weight_ih: [4H, I] input weights.
        weight_hh: [4H, P] recurrent weights.
        bias: [4H] sum of input and recurrent bias, or None for zero.
        weight_hr: [P, H] projection of the hidden state, or None.
        lengths: [B] integer number of valid steps of each row, or None.
        reverse: walk from the last step to the first.
        h_mask: [B, H] mask of recurrent dropout.
        zoneout: shares of h and of c that a step keeps of the step before.
        zoneout_mask: [T, B, H] uint8, bit 0: h keeps its value, bit 1: c does.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [T, B, P], h_n [B, P], c_n [B, H].

    Raises:
        TypeError: an argument of the wrong type, or a dtype that the backend cannot take.
        ValueError: a shape, device, length, option or backend that does not fit.
    """
    weights = (weight_ih, weight_hh, bias)
    extras: dict[str, Any] = dict(weight_hr=weight_hr, lengths=lengths, h_mask=h_mask, zoneout_mask=zoneout_mask)
    options: dict[str, Any] = dict(reverse=reverse, zoneout=zoneout, backend=backend)
    y, (h_n, c_n) = recurrence(CELLS["lstm"], x, (h_0, c_0), *weights, **extras, **options)
    return y, h_n, c_n


def recurrence(
    cell: Cell,
    x: Tensor,
    state: Sequence[Tensor | None] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor] = (),
    *,
    weight_hr: Tensor | None = None,
    eps: float | None = None,
    gate_gain: float = 1.0,
    lengths: Tensor | None = None,
    reverse: bool = False,
    h_mask: Tensor | None = None,
    zoneout: tuple[float, ...] = (),
    zoneout_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer of any cell over a whole sequence, in one direction or in both.

    What is not said here is as in `novolstm`. G blocks of pre-activations: N that x feeds and R that h feeds.

    Args:
        cell: its equations and parameters, one of `novolstm_triton.cells` or a user's own.
        x: [T, B, I] input.
        state: (h_0 [B, P], c_0 [B, H]), or (h_0,) for a cell with one state; None, there or in it, for zero.
        weight_ih: [N·H, I] input weights, in the order of the cell's blocks.
        weight_hh: [R·H, P] recurrent weights, likewise.
        bias: [G·H], or None for zero.
        vectors: the cell's vectors, [V·H] each for its V blocks.
        weight_hr: [P, H] projection of the hidden state, or None; for cells with two states and no `second`.
        eps: ε of the layer normalisations; None means the cell's own.
        gate_gain: constant factor on those blocks of the vectors that the cell calls `gained`.
        lengths: [B] integer number of valid steps of each row, or None.
        reverse: walk from the last step to the first.
        h_mask: [B, H] mask of recurrent dropout.
        zoneout: the share of each state that a step keeps of the step before; () for none.
        zoneout_mask: [T, B, H] uint8, bit 0: h keeps its value, bit 1: c does.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [T, B, P] ([T, B, 2P] for both directions), and the state after the last step.

    Raises:
        TypeError: an argument of the wrong type, or a dtype that the backend cannot take.
        ValueError: a shape, device, length, option or backend that does not fit.
    """
    register(cell)
    alone = cell.states == ("h",)
    if state is not None and (not isinstance(state, (tuple, list)) or len(state) != len(cell.states)):
        raise TypeError(f"state: expected a tuple of {', '.join(f'{name}_0' for name in cell.states)}, or None")
    if len(vectors) != len(cell.vectors):
        names = [vector.name for vector in cell.vectors]
        raise ValueError(f"vectors: expected {len(names)}, {names}, got {len(vectors)}")
    if weight_hr is not None:
        cell.check_projection("weight_hr")
    options = _options(cell, eps, gate_gain, zoneout, reverse)
    h_0, c_0 = (None, None) if state is None else (state[0], state[-1])
    if alone and isinstance(zoneout_mask, Tensor):
        # h is what is carried: both copies of it keep their value, or neither.
        zoneout_mask = (zoneout_mask & 1) * 3
    given, extras = (x, h_0, c_0, weight_ih, weight_hh, bias, *vectors), (lengths, h_mask, zoneout_mask, weight_hr)
    check_kinds(cell, given, extras)
    call, device = checked_call(cell, given, extras, options, reverse), x.device
    backend = resolve_backend(backend, device)
    # Inside the layer autocast has done its work: a nested cast would change the dtype of single products.
    with torch.autocast(device.type, enabled=False) if autocast_is_on(device) else contextlib.nullcontext():
        if backend == "triton":
            cell.check_kernels()
            check_triton(call.x.dtype, device)
        if call.directions == 1 or (backend == "triton" and weight_hr is None and x.shape[1] > 0):
            y, *states = _run(call, h_0 is not None, backend)
        else:
            y, *states = join_directions([_run(one, h_0 is not None, backend) for one in call.each_direction()])
    return y, tuple(states[: len(cell.states)])


def _options(cell: Cell, eps: Any, gate_gain: Any, zoneout: Any, reverse: Any) -> Options:
    """Check the numbers that the functions share.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.
    """
    eps = cell.eps if eps is None else check_finite(eps, "eps", "a positive finite number", above=0)
    gate_gain = check_finite(gate_gain, "gate_gain")
    names, zoneout = cell.states, (0.0,) * len(cell.states) if zoneout == () else zoneout
    wanted = "a pair of numbers, the shares of h and c" if len(names) == 2 else "a tuple of one number, the share of h"
    if not isinstance(zoneout, (tuple, list)) or len(zoneout) != len(names) or not all(map(is_number, zoneout)):
        raise TypeError(f"zoneout: expected {wanted}, got {reprlib.repr(zoneout)}")
    for name, share in zip(names, zoneout, strict=True):
        if not is_share(share):
            raise ValueError(f"zoneout: expected shares of {' and '.join(names)} from 0 to 1, got {share} of {name}")
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse: expected a bool, got {reprlib.repr(reverse)}")
    # The share of h is that of the carried h, too, where there is no c.
    return Options(eps, gate_gain, float(zoneout[0]), float(zoneout[-1]))


def _run(call: Call, has_h_0: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction, or both if the backend takes both at once, with everything checked."""
    x = call.x
    if onnx.is_exporting():
        return onnx.layer(call)
    # Without rows there is nothing to launch: the loop gives the right shapes.
    if backend == "reference" or x.shape[1] == 0 or (takes_plain_steps(x, backend) and x.shape[0] == 1):
        return reference.layer(call)
    if call.weight_hr is not None:
        return _run_projected(call, has_h_0, backend)
    return run(call, backend)


def takes_plain_steps(x: Tensor, backend: str) -> bool:
    """Return whether single steps of x run in PyTorch's own operators: on a CPU one of ours costs more than a step.

    Not where a call is recorded, where it should be one node, nor in 16 bits, which are computed in fp32.
    """
    if is_traced() or in_transform() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return not torch.is_autocast_enabled("cpu") and resolve_backend(backend, x.device) == "torch"


def _run_projected(call: Call, has_h_0: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction of a layer with a projection, h = m W_hrᵀ, as a layer of the unprojected m without one.

    h W_hhᵀ = m (W_hh W_hr)ᵀ, so one product before the recurrence replaces one in every step. h_0 need not be the
    image of an m: it enters through the inputs of each row's first step.
    """
    x, h_0, weight_ih, weight_hh, weight_hr = call.x, call.h_0, call.weight_ih, call.weight_hh, call.weight_hr
    assert weight_hr is not None
    steps, lengths = x.shape[0], call.lengths
    t = torch.arange(steps, device=x.device).unsqueeze(1)
    if has_h_0:
        first = 0 if not call.reverse else steps - 1 if lengths is None else lengths - 1
        is_first = (t == first).unsqueeze(2)
        x = torch.cat((x, torch.where(is_first, h_0, torch.zeros_like(h_0)).expand(steps, *h_0.shape)), 2)
        missing = weight_ih.shape[0] - weight_hh.shape[0]
        weight_ih = torch.cat((weight_ih, torch.nn.functional.pad(weight_hh, (0, 0, 0, missing))), 1)
    plain = dataclasses.replace(
        call,
        x=x,
        h_0=torch.zeros_like(call.c_0),
        weight_ih=weight_ih,
        weight_hh=weight_hh @ weight_hr,
        weight_hr=None,
    )
    y, h_n, c_n = _run(plain, False, backend)
    y, h_n = y @ weight_hr.t(), h_n @ weight_hr.t()
    if lengths is not None:
        # Zeros as they are; but the gradient of padding may be anything, even NaN, and stops here.
        y = y.masked_fill((t >= lengths).unsqueeze(2), 0)
        if has_h_0:
            h_n = torch.where((lengths > 0).unsqueeze(1), h_n, h_0)
    return y, h_n, c_n
