"""The functional layer: validation, choice of backend, the two custom operators and their fakes, the autograd function.

Every backend answers the same question with the same arguments; see `reference.py` for the equations and glossary.
"""

import contextlib
import contextvars
import importlib
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from novolstm_triton import reference
from novolstm_triton.plan import chunk_steps, constant_in_graphs, in_force, pinned

BACKENDS = ("auto", "reference", "torch", "triton")
"""What `backend=` accepts: see `novolstm`."""

_backend_in_use: contextvars.ContextVar[str | None] = contextvars.ContextVar("novolstm_backend", default=None)

# Modules with forward(…) and backward(…), imported at first use: a machine without triton can use the rest.
_IMPLEMENTATIONS = {"torch": "novolstm_triton.bptt", "triton": "novolstm_triton.launch"}

_GRADIENTS = ("x", "h_0", "c_0", "weight_ih", "weight_hh", "bias", "ln_weight", "ln_bias")


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
        ValueError: the name is no backend.
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
        ValueError: a name that is no backend, here or in the environment variable NOVOLSTM_BACKEND.
    """
    return explain_backend(backend, device)[0]


def explain_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """Return what `resolve_backend` does and what decided it: "call", "use_backend", "NOVOLSTM_BACKEND" or "device".

    Raises:
        ValueError: a name that is no backend, here or in the environment variable NOVOLSTM_BACKEND.
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
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float | None = None,
    gate_gain: float = 1.0,
    variant: str = "formula",
    lengths: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one NovoLSTM layer in one direction over a whole sequence (equations: `novolstm_triton.reference.novolstm`).

    All floating tensors share one dtype and one device. Under autocast they are cast to its dtype first.
    Saved for backward are x, y and c at every chunk border, whenever an input requires grad.

    Args:
        x: [T, B, I] input, T ≥ 1, B ≥ 1; bf16, fp16, fp32, or (not on triton) fp64.
        h_0: [B, H] initial hidden state.
        c_0: [B, H] initial cell state.
        weight_ih: [5H, I] input weights, blocks i|f|g|o|p.
        weight_hh: [5H, H] recurrent weights, blocks i|f|g|o|p; [4H, H], blocks i|f|g|o, for variant "notebook".
        bias: [5H] sum of input and recurrent bias, or None for zero.
        ln_weight: [H] γ of the input gate's layer normalisation.
        ln_bias: [H] β of the input gate's layer normalisation.
        eps: ε of the layer normalisation; None means 1e-5 (formula) or 1e-3 (notebook).
        gate_gain: constant factor on the input gate, which is O(1/H) without one.
        variant: "formula", i = LN(σ(z_i))·softmax(z_p); "notebook", i = LN(σ(z_i)·softmax(x W_pᵀ + b_p)).
        lengths: [B] integer number of valid steps of each row, 0 to T; y is zero after them, h_n and c_n are the
            states at a row's last valid step. None: all T.
        reverse: walk from the last step to the first; a row with a length begins at its own last step.
        backend: "auto" (triton on a GPU tensor, torch elsewhere; see `use_backend`), "reference" (a loop under
            autograd), "torch" (hand-written backward, any device), "triton" (kernels; NVIDIA or AMD GPU).

    Returns:
        y [T, B, H], h_n [B, H], c_n [B, H], in the dtype of x.

    Raises:
        TypeError: an argument of the wrong type, or a dtype that the backend cannot take.
        ValueError: a shape, device, length, variant or backend that does not fit.
    """
    options = _Options(eps, gate_gain, variant, reverse, backend)
    return _layer((x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias), lengths, options, 1)


def novolstm_bidirectional(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float | None = None,
    gate_gain: float = 1.0,
    variant: str = "formula",
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one NovoLSTM layer in both directions: direction 0 as `novolstm` does, direction 1 as with reverse=True.

    Backend "triton" walks both at once, in one launch per chunk where the device has room for both. The others run one
    after the other. Options, and what is not said of the arguments, are those of `novolstm`.

    Args:
        x: [T, B, I] input of both directions.
        h_0: [2, B, H] initial hidden states.
        c_0: [2, B, H] initial cell states.
        weight_ih: [2, 5H, I] input weights.
        weight_hh: [2, 5H, H] recurrent weights; [2, 4H, H] for variant "notebook".
        bias: [2, 5H], or None for zero.
        ln_weight: [2, H] γ of the input gates' layer normalisations.
        ln_bias: [2, H] β of the input gates' layer normalisations.
        eps: ε of the layer normalisation.
        gate_gain: constant factor on the input gate.
        variant: "formula" or "notebook".
        lengths: [B] integer number of valid steps of each row; direction 1 begins at each row's own last step.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        y [T, B, 2H], the outputs of direction 0 before those of direction 1; h_n [2, B, H]; c_n [2, B, H].

    Raises:
        TypeError: an argument of the wrong type, or a dtype that the backend cannot take.
        ValueError: a shape, device, length, variant or backend that does not fit.
    """
    options = _Options(eps, gate_gain, variant, False, backend)
    return _layer((x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias), lengths, options, 2)


class _Options(NamedTuple):
    """The options of `novolstm` as given, and whether its one direction walks backward."""

    eps: float | None
    gate_gain: float
    variant: str
    reverse: bool
    backend: str


def _layer(
    given: tuple[Tensor | None, ...], lengths: Tensor | None, options: _Options, directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the eight tensors and the options, choose the backend, and run one direction or both."""
    if options.variant not in reference.RECURRENT_GATES:
        raise ValueError(f"variant: expected one of {sorted(reference.RECURRENT_GATES)}, got {options.variant!r}")
    tensors: list[Tensor] = []
    for name, argument in zip(_GRADIENTS, given, strict=True):
        if name == "bias" and argument is None:
            weight_ih = tensors[_GRADIENTS.index("weight_ih")]
            argument = weight_ih.new_zeros(weight_ih.shape[:-1])
        if not isinstance(argument, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(argument).__name__}")
        tensors.append(argument)
    arguments, device = tuple(tensors), tensors[0].device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        arguments = tuple(a.to(dtype) if a.is_floating_point() else a for a in arguments)
    _check_tensors(arguments, options.variant, directions)
    lengths = _check_lengths(lengths, arguments[0])
    eps = reference.DEFAULT_EPS[options.variant] if options.eps is None else float(options.eps)
    options = options._replace(
        eps=eps, gate_gain=float(options.gate_gain), backend=resolve_backend(options.backend, device)
    )
    # Inside the layer autocast has done its work: a nested cast would change the dtype of single products.
    with torch.autocast(device.type, enabled=False):
        if options.backend == "triton":
            check_triton(arguments[0].dtype, device)
        if directions == 1 or options.backend == "triton":
            return _run(arguments, lengths, options)
        both = zip(*(a.unbind(0) for a in arguments[1:]), strict=True)
        results = [_run((arguments[0], *own), lengths, options._replace(reverse=d == 1)) for d, own in enumerate(both)]
        (y, *states), (y_reverse, *states_reverse) = results
        h_n, c_n = (torch.stack(pair) for pair in zip(states, states_reverse, strict=True))
        return torch.cat((y, y_reverse), -1), h_n, c_n


def _run(arguments: tuple[Tensor, ...], lengths: Tensor | None, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction, or both if the backend takes both at once, with everything checked."""
    if options.backend == "reference":
        kwargs = options._asdict()
        del kwargs["backend"]
        return reference.novolstm(*arguments, lengths=lengths, **kwargs)
    return NovoLSTMFunction.apply(*arguments, lengths, *options)


class NovoLSTMFunction(torch.autograd.Function):
    """Autograd over the two operators.

    Arguments: the tensors of `novolstm` in its order, or with backend "triton" those of `novolstm_bidirectional`, then
    lengths, eps, gate_gain, variant, reverse, backend.
    """

    @staticmethod
    def forward(ctx, x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias, lengths, *options):
        """Run the forward operator and keep what backward needs: the inputs, y and c at the chunk borders."""
        backend = options[-1]
        *rows, hidden = h_0.shape
        chunk = chunk_steps(math.prod(rows), hidden, x.element_size(), backend)
        inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
        y, h_n, c_n, c_border = forward_op(*inputs, lengths, *options, chunk)
        ctx.save_for_backward(*inputs, lengths, y, c_border)
        ctx.options = (*options, chunk)
        # Compiled code keeps the chunk of its tracing, and has no other pins in backward.
        ctx.pins = None if torch.compiler.is_compiling() else pinned()
        ctx.set_materialize_grads(True)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, *grads):
        """Run the backward operator. Differentiating it once more raises, because it has no formula of its own."""
        dy, dh_n, dc_n = (g.contiguous() for g in grads)
        needs = list(ctx.needs_input_grad[: len(_GRADIENTS)])
        if ctx.pins is None:
            gradients = backward_op(dy, dh_n, dc_n, *ctx.saved_tensors, *ctx.options, needs)
        else:
            with in_force(ctx.pins):
                gradients = backward_op(dy, dh_n, dc_n, *ctx.saved_tensors, *ctx.options, needs)
        pairs = zip(gradients, needs, strict=True)
        return *(g if needed else None for g, needed in pairs), None, None, None, None, None, None


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
    eps: float,
    gate_gain: float,
    variant: str,
    reverse: bool,
    backend: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [T, B, H], h_n [B, H], c_n [B, H] and c_border [⌈T/chunk⌉ + 1, B, H].

    c_border is c before each chunk, in walking order, and after the last: two at least, so that torch.compile, which
    treats sizes of one apart, need not tell one chunk from several.

    Backend "triton" also takes both directions at once, all tensors but x and lengths with a leading dimension of two;
    then `reverse` is not looked at, y is [T, B, 2H], and the others have the leading dimension before B.
    """
    implementation = importlib.import_module(_IMPLEMENTATIONS[backend])
    options = dict(eps=eps, gate_gain=gate_gain, variant=variant, reverse=reverse, chunk=chunk)
    return implementation.forward(x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias, lengths, **options)


@forward_op.register_fake
def _(x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias, lengths, *options):
    steps, (*directions, batch, hidden), chunk = x.shape[0], h_0.shape, options[-1]
    y = x.new_empty(steps, batch, math.prod(directions) * hidden)
    borders = (steps + chunk - 1) // chunk + 1
    c_border = c_0.new_empty(borders, *c_0.shape, dtype=state_dtype(x.dtype))
    return y, torch.empty_like(h_0), torch.empty_like(c_0), c_border


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
    y: Tensor,
    c_border: Tensor,
    eps: float,
    gate_gain: float,
    variant: str,
    reverse: bool,
    backend: str,
    chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias.

    What `needs` rules out is an empty tensor: an operator cannot return None. Directions are as in `forward_op`.
    """
    implementation = importlib.import_module(_IMPLEMENTATIONS[backend])
    inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
    options = dict(eps=eps, gate_gain=gate_gain, variant=variant, reverse=reverse, chunk=chunk, needs=needs)
    # A user may call backward inside an autocast region: that would round the products in here, too.
    with torch.autocast(x.device.type, enabled=False):
        gradients = implementation.backward(dy, dh_n, dc_n, *inputs, lengths, y, c_border, **options)
    # The operator's schema wants the eight spelled out.
    return tuple(x.new_empty(0) if g is None else g for g in gradients)  # pyright: ignore[reportReturnType]


@backward_op.register_fake
def _(dy, dh_n, dc_n, x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias, lengths, y, c_border, *options):
    inputs = (x, h_0, c_0, weight_ih, weight_hh, bias, ln_weight, ln_bias)
    pairs = zip(inputs, options[-1], strict=True)
    return tuple(a.new_empty(a.shape) if needed else x.new_empty(0) for a, needed in pairs)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which c is carried for tensors of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_backend_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {list(BACKENDS)}, got {name!r}")


def _check_tensors(arguments: tuple[Tensor, ...], variant: str, directions: int) -> None:
    x, h_0 = arguments[:2]
    for name, tensor in zip(_GRADIENTS, arguments, strict=True):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    lead = () if directions == 1 else (directions,)
    if x.dim() != 3 or h_0.dim() != 2 + len(lead):
        wanted = "[B, H]" if directions == 1 else "[2, B, H]"
        raise ValueError(f"expected x [T, B, I] and h_0 {wanted}, got {list(x.shape)} and {list(h_0.shape)}")
    (steps, batch, inputs), hidden = x.shape, h_0.shape[-1]
    if steps < 1 or batch < 1 or hidden < 1:
        raise ValueError(f"expected at least one step, row and unit, got x {list(x.shape)}, h_0 {list(h_0.shape)}")
    state, units = (batch, hidden), (hidden,)
    recurrent = reference.RECURRENT_GATES[variant] * hidden
    shapes = (state, state, (5 * hidden, inputs), (recurrent, hidden), (5 * hidden,), units, units)
    for name, tensor, one in zip(_GRADIENTS[1:], arguments[1:], shapes, strict=True):
        shape = (*lead, *one)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def _check_lengths(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected an integer Tensor, got {got}")
    if tuple(lengths.shape) != (x.shape[1],):
        raise ValueError(f"lengths: expected shape [{x.shape[1]}], got {list(lengths.shape)}")
    # On a GPU the values stay unread (that would stall the stream): the backends clamp them by comparing with t.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > x.shape[0]:
            raise ValueError(f"lengths: expected values from 0 to {x.shape[0]}, got {low} to {high}")
    return lengths.to(device=x.device, dtype=torch.int32)


def check_triton(dtype: torch.dtype, device: torch.device) -> None:
    """Check that backend "triton" takes tensors of a dtype on a device.

    Raises:
        TypeError: not that dtype.
        ValueError: not on that device.
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
