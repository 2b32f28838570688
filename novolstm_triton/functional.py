"""The functional layers: validation, choice of backend, the two custom operators with their fakes and derivatives.

Every backend answers the same question with the same arguments; see `reference.py` for the equations and glossary.
The operators are opaque to torch.compile and torch.export, and are registered with autograd and vmap themselves.
"""

import contextlib
import contextvars
import importlib
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from novolstm_triton import flops, onnx_export, reference
from novolstm_triton.cells import CELLS, novolstm_cell
from novolstm_triton.checks import check_dense, check_finite, is_number, is_share
from novolstm_triton.plans import Pins, chunk_steps, constant_in_graphs, in_force, pinned

BACKENDS = ("auto", "reference", "torch", "triton")
"""What `backend=` accepts: see `novolstm`."""

_backend_in_use: contextvars.ContextVar[str | None] = contextvars.ContextVar("novolstm_backend", default=None)

# Modules with forward(…) and backward(…), imported at first use: a machine without triton can use the rest.
_IMPLEMENTATIONS = {"torch": "novolstm_triton.bptt", "triton": "novolstm_triton.launch"}

_GRADIENTS = ("x", "h_0", "c_0", "weight_ih", "weight_hh", "bias", "ln_weight", "ln_bias")

_TENSORS = len(_GRADIENTS) + 3
"""Tensors that `forward_op` is given: those with a gradient, lengths, h_mask and zoneout_mask."""


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
    _check_backend_name(name, "use_backend")
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
    _check_backend_name(backend, "backend")
    if backend != "auto":
        return backend, "call"
    if (used := _backend_of_block() or "auto") != "auto":
        return used, "use_backend"
    if (named := os.environ.get("NOVOLSTM_BACKEND") or "auto") != "auto":
        _check_backend_name(named, "NOVOLSTM_BACKEND")
        return named, "NOVOLSTM_BACKEND"
    return ("triton" if device.type == "cuda" else "torch"), "device"


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

    Equations: `novolstm_triton.reference.step`. All floating tensors share one dtype and one device. Under autocast
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
    cell = novolstm_cell(variant, layer_norm)
    eps = CELLS[cell].eps if eps is None else check_finite(eps, "eps", "a positive finite number", above=0)
    options = _options(eps, check_finite(gate_gain, "gate_gain"), zoneout, cell, reverse)
    given = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
    return _layer(given, weight_hr, _Extras(lengths, h_mask, zoneout_mask), options, backend)


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
    options = _options(CELLS["lstm"].eps, 1.0, zoneout, "lstm", reverse)
    given = (x, h_0, c_0, weight_ih, weight_hh, bias, None, None)
    return _layer(given, weight_hr, _Extras(lengths, h_mask, zoneout_mask), options, backend)


class _Options(NamedTuple):
    """The operators' arguments other than tensors and the backend."""

    eps: float
    gate_gain: float
    zoneout_h: float
    zoneout_c: float
    cell: str
    reverse: bool


def _options(eps: float, gate_gain: float, zoneout: Any, cell: str, reverse: Any) -> _Options:
    """Check the options that the functions share.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.
    """
    if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2 or not all(map(is_number, zoneout)):
        raise TypeError(f"zoneout: expected a pair of numbers, the shares of h and c, got {reprlib.repr(zoneout)}")
    for name, share in zip("hc", zoneout, strict=True):
        if not is_share(share):
            raise ValueError(f"zoneout: expected shares of h and c from 0 to 1, got {share} of {name}")
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse: expected a bool, got {reprlib.repr(reverse)}")
    return _Options(eps, gate_gain, float(zoneout[0]), float(zoneout[1]), cell, reverse)


class _Extras(NamedTuple):
    """Optional tensors without gradients."""

    lengths: Tensor | None
    h_mask: Tensor | None
    zoneout_mask: Tensor | None


def _layer(
    given: tuple[Tensor | None, ...], weight_hr: Tensor | None, extras: _Extras, options: _Options, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the eight tensors of a layer and all else, choose the backend, and run one direction or both."""
    _check_kinds(given, weight_hr, extras, options.cell)
    has_h_0, arguments = given[1] is not None, _filled(given, weight_hr)
    device = arguments[0].device
    if autocast_is_on(device):
        arguments = tuple(_autocast(a) for a in arguments)
        weight_hr = weight_hr if weight_hr is None else _autocast(weight_hr)
        extras = extras._replace(h_mask=None if extras.h_mask is None else _autocast(extras.h_mask))
    directions = 2 if arguments[3].dim() == 3 else 1
    _check_tensors(arguments, weight_hr, options.cell, directions)
    extras = _check_extras(extras, weight_hr, arguments, options)
    if directions == 2 and options.reverse:
        raise ValueError("reverse: both directions are given, so it must be False")
    backend = resolve_backend(backend, device)
    # Inside the layer autocast has done its work: a nested cast would change the dtype of single products.
    with torch.autocast(device.type, enabled=False) if autocast_is_on(device) else contextlib.nullcontext():
        if backend == "triton":
            check_triton(arguments[0].dtype, device)
        if directions == 1 or (backend == "triton" and weight_hr is None and arguments[0].shape[1] > 0):
            return _run(arguments, weight_hr, has_h_0, extras, options, backend)
        results = []
        for d, own in enumerate(zip(*(a.unbind(0) for a in arguments[1:]), strict=True)):
            zoneout_mask = None if extras.zoneout_mask is None else extras.zoneout_mask.chunk(2, dim=2)[d]
            own_extras = extras._replace(
                h_mask=None if extras.h_mask is None else extras.h_mask[d], zoneout_mask=zoneout_mask
            )
            own_hr = None if weight_hr is None else weight_hr[d]
            own_options = options._replace(reverse=d == 1)
            results.append(_run((arguments[0], *own), own_hr, has_h_0, own_extras, own_options, backend))
        (y, *states), (y_reverse, *states_reverse) = results
        h_n, c_n = (torch.stack(pair) for pair in zip(states, states_reverse, strict=True))
        return torch.cat((y, y_reverse), -1), h_n, c_n


def autocast_is_on(device: torch.device) -> bool:
    """Return whether autocast is enabled for tensors on a device; some devices, like "meta", have none."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


# PyTorch 2.11 does not trace it.
@constant_in_graphs
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _autocast(a: Tensor) -> Tensor:
    """Cast as autocast does: floating tensors, except float64."""
    eligible = a.is_floating_point() and a.dtype != torch.float64
    return a.to(torch.get_autocast_dtype(a.device.type)) if eligible else a


def _check_kinds(given: tuple[Tensor | None, ...], weight_hr: Tensor | None, extras: _Extras, cell: str) -> None:
    """Check that every tensor argument is an ordinary tensor.

    Raises:
        TypeError: an argument is something else.
    """
    named = zip(
        (*_GRADIENTS, "weight_hr", "lengths", "h_mask", "zoneout_mask"), (*given, weight_hr, *extras), strict=True
    )
    needed = ("x", "weight_ih", "weight_hh", *(("ln_weight", "ln_bias") if CELLS[cell].normalised else ()))
    kinds = {
        "lengths": "an integer Tensor",
        "h_mask": "a Tensor of the dtype of x",
        "zoneout_mask": "a Tensor of torch.uint8",
    }
    for name, argument in named:
        if argument is None and name not in needed:
            continue
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name}: expected {kinds.get(name, 'a Tensor')}, got {type(argument).__name__}")
        check_dense(argument, name)


def _filled(given: tuple[Tensor | None, ...], weight_hr: Tensor | None) -> tuple[Tensor, ...]:
    """Fill in zeros for missing states and biases, and empty tensors for normalisations that the cell lacks.

    Raises:
        ValueError: a tensor that these shapes follow from has the wrong rank.
    """
    tensors: dict[str, Any] = dict(zip(_GRADIENTS, given, strict=True))
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
        "bias": weight_ih.shape[:-1],
        "ln_weight": (*lead, 0),
        "ln_bias": (*lead, 0),
    }
    return tuple(x.new_zeros(shapes[name]) if a is None else a for name, a in tensors.items())


def _are_matrices(tensor: Tensor, lead: tuple[int, ...]) -> bool:
    """Return whether a tensor is a matrix, or, with leading dimensions, several."""
    return tensor.dim() == len(lead) + 2 and tuple(tensor.shape[:-2]) == lead


def _run(
    arguments: tuple[Tensor, ...],
    weight_hr: Tensor | None,
    has_h_0: bool,
    extras: _Extras,
    options: _Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction, or both if the backend takes both at once, with everything checked."""
    x, h_0 = arguments[:2]
    everything: tuple[Any, ...] = (*arguments, *extras, weight_hr)
    if onnx_export.is_exporting():
        return onnx_export.layer(*everything, **options._asdict())
    # Without rows there is nothing to launch: the loop gives the right shapes.
    if backend == "reference" or x.shape[1] == 0 or (takes_plain_steps(x, backend) and x.shape[0] == 1):
        return reference.layer(*everything, **options._asdict())
    if weight_hr is not None:
        return _run_projected(arguments, weight_hr, has_h_0, extras, options, backend)
    # In torch.jit.trace sizes are tensors; there the chunk is that of the tracing.
    *rows, hidden = map(int, h_0.shape) if _is_jit_tracing() else h_0.shape
    gates = len(CELLS[options.cell].gates)
    chunk = chunk_steps(math.prod(rows), hidden, gates, x.element_size(), backend)
    if torch.compiler.is_exporting():
        # torch.export.draft_export takes None, which it cannot compare before and after, for a tensor that was changed.
        extras = _Extras(*(x.new_empty(0) if a is None else a for a in extras))
    y, h_n, c_n, _ = _call_forward(*arguments, *extras, *options, backend, chunk)
    return y, h_n, c_n


def takes_plain_steps(x: Tensor, backend: str) -> bool:
    """Return whether single steps of x run in PyTorch's own operators: on a CPU one of ours costs more than a step.

    Not where a call is recorded, where it should be one node, nor in 16 bits, which are computed in fp32.
    """
    if _is_traced() or _in_transform() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return not torch.is_autocast_enabled("cpu") and resolve_backend(backend, x.device) == "torch"


def _run_projected(
    arguments: tuple[Tensor, ...],
    weight_hr: Tensor,
    has_h_0: bool,
    extras: _Extras,
    options: _Options,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction of a layer with a projection, h = m W_hrᵀ, as a layer of the unprojected m without one.

    h W_hhᵀ = m (W_hh W_hr)ᵀ, so one product before the recurrence replaces one in every step. h_0 need not be the
    image of an m: it enters through the inputs of each row's first step.
    """
    x, h_0, c_0, weight_ih, weight_hh, *others = arguments
    steps, lengths, recurrent = x.shape[0], extras.lengths, weight_hh
    t = torch.arange(steps, device=x.device).unsqueeze(1)
    if has_h_0:
        first = 0 if not options.reverse else steps - 1 if lengths is None else lengths - 1
        is_first = (t == first).unsqueeze(2)
        x = torch.cat((x, torch.where(is_first, h_0, torch.zeros_like(h_0)).expand(steps, *h_0.shape)), 2)
        missing = weight_ih.shape[0] - weight_hh.shape[0]
        weight_ih = torch.cat((weight_ih, torch.nn.functional.pad(weight_hh, (0, 0, 0, missing))), 1)
    plain = (x, torch.zeros_like(c_0), c_0, weight_ih, recurrent @ weight_hr, *others)
    y, h_n, c_n = _run(plain, None, False, extras, options, backend)
    y, h_n = y @ weight_hr.t(), h_n @ weight_hr.t()
    if lengths is not None:
        # Zeros as they are; but the gradient of padding may be anything, even NaN, and stops here.
        y = y.masked_fill((t >= lengths).unsqueeze(2), 0)
        if has_h_0:
            h_n = torch.where((lengths > 0).unsqueeze(1), h_n, h_0)
    return y, h_n, c_n


def _given(*extras: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return None for those that are missing, which exported programs say by an empty tensor; there are rows here."""
    return tuple(None if a is None or a.numel() == 0 else a for a in extras)


@torch.library.custom_op("novolstm_triton::forward", mutates_args=())
def forward_op(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None,
    h_mask: Tensor | None,
    zoneout_mask: Tensor | None,
    eps: float,
    gate_gain: float,
    zoneout_h: float,
    zoneout_c: float,
    cell: str,
    reverse: bool,
    backend: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, B, H], h_n [B, H], c_n [B, H] and c_border [⌈T/chunk⌉ + 1, B, H]; see `reference.layer`.

    c_border is c before each chunk, in walking order, and after the last: two at least, so that torch.compile, which
    treats sizes of one apart, need not tell one chunk from several.

    Backend "triton" also takes both directions at once, all tensors but x, lengths and zoneout_mask with a leading
    dimension of two; then `reverse` is not looked at, y and zoneout_mask are [T, B, 2H], and the others have the
    leading dimension before B.
    """
    implementation = importlib.import_module(_IMPLEMENTATIONS[backend])
    inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
    options = _Options(eps, gate_gain, zoneout_h, zoneout_c, cell, reverse)._asdict()
    return implementation.forward(*inputs, *_given(lengths, h_mask, zoneout_mask), **options, chunk=chunk)


@forward_op.register_fake
def _(x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias, lengths, h_mask, zoneout_mask, *options):
    steps, (*directions, batch, hidden), chunk = x.shape[0], h_0.shape, options[-1]
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
    ln_weight: Tensor,
    ln_bias: Tensor,
    lengths: Tensor | None,
    h_mask: Tensor | None,
    zoneout_mask: Tensor | None,
    y: Tensor,
    c_border: Tensor,
    eps: float,
    gate_gain: float,
    zoneout_h: float,
    zoneout_c: float,
    cell: str,
    reverse: bool,
    backend: str,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias.

    A gradient that `needs` rules out is an empty tensor, because an operator cannot return None. Directions are as in
    `forward_op`.
    """
    implementation = importlib.import_module(_IMPLEMENTATIONS[backend])
    inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
    options = _Options(eps, gate_gain, zoneout_h, zoneout_c, cell, reverse)._asdict()
    saved = (*inputs, *_given(lengths, h_mask, zoneout_mask), y, c_border)
    # A user may call backward inside an autocast region: that would round the products in here, too.
    with torch.autocast(x.device.type, enabled=False):
        gradients = implementation.backward(dy, dh_n, dc_n, *saved, **options, chunk=chunk, needs=needs)
    # The operator's schema needs the eight spelled out.
    return tuple(x.new_empty(0) if g is None else g for g in gradients)  # pyright: ignore[reportReturnType]


@backward_op.register_fake
def _(dy, dh_n, dc_n, x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias, *others):
    inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
    pairs = zip(inputs, others[-1], strict=True)
    return tuple(a.new_empty(a.shape) if needed else x.new_empty(0) for a, needed in pairs)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep what backward needs: the inputs, y and c at the chunk borders."""
    tensors, ctx.options = inputs[:_TENSORS], inputs[_TENSORS:]
    y, _, _, c_border = output
    ctx.save_for_backward(*tensors, y, c_border)
    # Compiled code keeps the chunk of its tracing, and has no other pins in backward.
    ctx.pins = Pins() if torch.compiler.is_compiling() else pinned()
    ctx.mark_non_differentiable(c_border)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *grads: Tensor) -> tuple:
    """Run the backward operator, under the pins of the forward call."""
    needs = list(ctx.needs_input_grad[: len(_GRADIENTS)])
    with contextlib.nullcontext() if torch.compiler.is_compiling() else in_force(ctx.pins):
        gradients = _call_backward(*(g.contiguous() for g in grads[:3]), *ctx.saved_tensors, *ctx.options, needs)
    pairs = zip(gradients, needs, strict=True)
    return *(g if needed else None for g, needed in pairs), *[None] * (len(ctx.needs_input_grad) - len(needs))


forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_second_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tensors = inputs[: 3 + _TENSORS]
    ctx.save_for_backward(*tensors)
    options = _Options(*inputs[len(tensors) + 2 :][: len(_Options._fields)])
    ctx.options, ctx.needs = options, inputs[-1]
    ctx.inputs = len(inputs)


def _second_backward(ctx: Any, *grads: Tensor | None) -> tuple:
    """Differentiate the backward operator: by autograd, through the reference."""
    *floating, lengths, h_mask, zoneout_mask = ctx.saved_tensors
    if _in_transform():
        # In here autograd's own functions are forbidden; elsewhere these transforms forbid hooks on saved tensors.
        def layer(*inputs: Tensor) -> tuple[Tensor, ...]:
            return _layer(inputs, None, _Extras(lengths, h_mask, zoneout_mask), ctx.options, "reference")

        def gradients(*given: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(layer, *given[3:])[1](given[:3])

        transformed: Any = torch.func.vjp(gradients, *floating)
        first, pull = transformed
        pairs = zip(first, grads, ctx.needs, strict=True)
        second = pull(tuple(torch.zeros_like(g) if d is None or not needed else d for g, d, needed in pairs))
        return *second, *[None] * (ctx.inputs - len(floating))
    with torch.enable_grad():
        # Aliases, so that a gradient is of this operand alone, even where one is made from another.
        given = [a.view_as(a) if a.requires_grad else a.detach().requires_grad_() for a in floating]
        outgoing, inputs = given[:3], given[3:]
        outputs = _layer(tuple(inputs), None, _Extras(lengths, h_mask, zoneout_mask), ctx.options, "reference")
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
    return *second, *[None] * (ctx.inputs - len(given))


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


def _call_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the forward operator differentiably: as it is for tracers, to which it is one node, or as a function."""
    if torch.compiler.is_compiling() and _in_transform():
        # PyTorch's operators have no derivatives in there. Raised while tracing, this makes the graph break.
        raise NotImplementedError("torch.compile: within transforms of torch.func, like grad, use backend='reference'")
    return forward_op(*arguments) if _is_traced() else RecurrentFunction.apply(*arguments)


def _call_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return backward_op(*arguments) if _is_traced() else RecurrentBackward.apply(*arguments)


def _is_traced() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records this call."""
    return torch.compiler.is_compiling() or _is_jit_tracing()


def _is_jit_tracing() -> bool:
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def _in_transform() -> bool:
    """Return whether a transform of torch.func, like grad or vmap, runs this call."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


flops.register_formulas()


@forward_op.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _map_over_batch(forward_op, in_dims, args)


@backward_op.register_vmap
def _(info: Any, in_dims: tuple, *args: Any) -> tuple:
    return _map_over_batch(backward_op, in_dims, args)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which c is carried for tensors of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_backend_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {list(BACKENDS)}, got {name!r}")


def _check_tensors(arguments: tuple[Tensor, ...], weight_hr: Tensor | None, cell: str, directions: int) -> None:
    x, h_0, _, _, weight_hh, *_ = arguments
    named: list[tuple[str, Tensor]] = list(zip(_GRADIENTS, arguments, strict=True))
    if weight_hr is not None:
        named.append(("weight_hr", weight_hr))
    for name, tensor in named:
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"{name}: expected a floating dtype of at least 16 bits, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    lead = () if directions == 1 else (directions,)
    if h_0.dim() != 2 + len(lead):
        wanted = "[B, H]" if directions == 1 else "[2, B, H]"
        raise ValueError(f"h_0: expected {wanted}, got shape {list(h_0.shape)}")
    (steps, batch, inputs), projected = x.shape, weight_hh.shape[-1]
    hidden = projected if weight_hr is None else weight_hr.shape[-1]
    # Like nn.LSTM, which has no features of zero either.
    if steps < 1 or inputs < 1:
        raise ValueError(f"x: expected at least one step and one feature, got shape {list(x.shape)}")
    if projected < 1 or hidden < 1:
        name, tensor = ("weight_hh", weight_hh) if weight_hr is None else ("weight_hr", weight_hr)
        raise ValueError(f"{name}: expected at least one unit, got shape {list(tensor.shape)}")
    blocks = CELLS[cell]
    gates, norms = len(blocks.gates) * hidden, (len(blocks.normalised) * hidden,)
    shapes = {
        # The sizes are taken from these two and x, so that they come first.
        "weight_hr": (projected, hidden),
        "weight_hh": (blocks.recurrent * hidden, projected),
        "h_0": (batch, projected),
        "c_0": (batch, hidden),
        "weight_ih": (gates, inputs),
        "bias": (gates,),
        "ln_weight": norms,
        "ln_bias": norms,
    }
    given = dict(named)
    for name, own in shapes.items():
        shape = (*lead, *own)
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(given[name].shape)}")


def _check_extras(
    extras: _Extras, weight_hr: Tensor | None, arguments: tuple[Tensor, ...], options: _Options
) -> _Extras:
    """Check what is given besides the eight tensors; return it as the backends take it."""
    x, h_0 = arguments[:2]
    lengths = None if extras.lengths is None else check_lengths(extras.lengths, x)
    zoneout = extras.zoneout_mask is not None or options.zoneout_h or options.zoneout_c
    if weight_hr is not None and (extras.h_mask is not None or zoneout):
        raise ValueError("weight_hr: a projected layer has no recurrent dropout and no zoneout")
    directions = h_0.shape[0] if h_0.dim() == 3 else 1
    zoneout_mask_shape = (*x.shape[:2], directions * h_0.shape[-1])
    for name, mask, dtype, shape in (
        ("h_mask", extras.h_mask, x.dtype, tuple(h_0.shape)),
        ("zoneout_mask", extras.zoneout_mask, torch.uint8, zoneout_mask_shape),
    ):
        if mask is None:
            continue
        if mask.dtype != dtype:
            raise TypeError(f"{name}: expected a Tensor of {dtype}, got {mask.dtype}")
        if tuple(mask.shape) != shape or mask.device != x.device:
            got = f"{list(mask.shape)} on {mask.device}"
            raise ValueError(f"{name}: expected shape {list(shape)} on {x.device}, got {got}")
    h_mask = None if extras.h_mask is None else extras.h_mask.detach()
    return _Extras(lengths, h_mask, extras.zoneout_mask)


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
    return type(tensor) is Tensor and not _is_traced() and not _in_transform()


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
