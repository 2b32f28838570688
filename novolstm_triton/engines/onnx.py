"""A layer in the operators of ONNX, which torch.onnx.export(…, dynamo=True) records in place of the kernels.

The plain cell becomes ONNX's own LSTM, every other a Scan whose body is a step of the reference; both take any number
of steps and rows. None of this has gradients.
"""

import dataclasses

import torch
from torch import Tensor

from novolstm_triton.call import Call
from novolstm_triton.engines import reference


def is_exporting() -> bool:
    """Return whether torch.onnx.export is tracing; False in torch.compile and in a plain torch.export."""
    # The flag of torch.export comes first because it is cheap: torch.onnx imports its exporter when it is asked.
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def layer(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Record `reference.layer`."""
    options = call.options
    extras = (call.h_mask, call.zoneout_mask, call.weight_hr)
    regularised = options.zoneout_h or options.zoneout_c or any(a is not None for a in extras)
    return _lstm(call) if call.cell.name == "lstm" and not regularised else _scan(call)


def _lstm(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Record ONNX's LSTM, whose blocks are i|o|f|g."""
    x, h_0, c_0, lengths = call.x, call.h_0, call.c_0, call.lengths
    (steps, batch, _), hidden = x.shape, h_0.shape[1]
    if lengths is not None:
        lengths = lengths.clamp(0, steps)
    parameters = (call.weight_ih, call.weight_hh, call.bias)
    w, r, b = (torch.cat([a.chunk(4)[k] for k in (0, 3, 1, 2)]).unsqueeze(0) for a in parameters)
    # ONNX has a bias of the inputs and one of the recurrence.
    b = torch.cat((b, torch.zeros_like(b)), 1)
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x, w, r, b, lengths, h_0.unsqueeze(0), c_0.unsqueeze(0)),
        {"hidden_size": hidden, "direction": "reverse" if call.reverse else "forward"},
        dtypes=[x.dtype] * 3,
        shapes=[(steps, 1, batch, hidden), (1, batch, hidden), (1, batch, hidden)],
    )
    y, h_n, c_n = y.squeeze(1), h_n.squeeze(0), c_n.squeeze(0)
    if lengths is not None:
        # ONNX gives zeros for the states of a row without steps.
        some = (lengths > 0).unsqueeze(1)
        h_n, c_n = torch.where(some, h_n, h_0), torch.where(some, c_n, c_0)
    return y, h_n, c_n


def _scan(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Record a scan over the steps."""
    # A private module of PyTorch, imported only where it is needed.
    from torch._higher_order_ops.scan import scan_op

    x, lengths, valid = call.x, call.lengths, None
    if lengths is not None:
        t = torch.arange(x.shape[0], dtype=lengths.dtype, device=lengths.device)
        valid = (t.unsqueeze(1) < lengths).unsqueeze(2)
    given = [None if a is None else a.flip(0) if call.reverse else a for a in (x, valid, call.zoneout_mask)]
    weights = reference.weights_of(call)
    constants = (call.h_mask, weights.weight_ih, weights.weight_hh, weights.bias, weights.weight_hr, *weights.vectors)

    def body(h: Tensor, c: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Only operands that exist are handed over: a scan takes no None, and makes constants of what its body closes
        # over.
        values = iter(others)
        x_t, valid_t, zoneout_mask_t, mask, *own = (None if a is None else next(values) for a in (*given, *constants))
        weight_ih, weight_hh, bias, weight_hr, *vectors = own
        own_weights = reference.Weights(weight_ih, weight_hh, bias, tuple(vectors), weight_hr)  # pyright: ignore[reportArgumentType]
        own_call = dataclasses.replace(call, h_mask=mask)
        projected = reference.project(x_t, own_weights, call.cell)  # pyright: ignore[reportArgumentType]
        y_t, h, c = reference.advance(own_call, own_weights, projected, h, c, valid_t, zoneout_mask_t)
        # No result of the body may share memory with another.
        return h, c.clone() if c is h else c, y_t.clone()

    # With gradients the scan would be partitioned into a forward and a backward half, for nothing; and none of its
    # operands may share memory with another, as views of one tensor do. Neither is left in the ONNX graph.
    state, inputs, fixed = (
        [a.detach().clone() for a in operands if a is not None] for operands in ((call.h_0, call.c_0), given, constants)
    )
    # Not `scan`, which compiles its body by torch.compile: that generalises sizes when a second layer comes along.
    h_n, c_n, y = scan_op(body, state, inputs, tuple(fixed))
    return (y.flip(0) if call.reverse else y), h_n, c_n
