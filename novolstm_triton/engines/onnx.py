"""A layer in the operators of ONNX, which torch.onnx.export(…, dynamo=True) records in place of the kernels.

The cells that ONNX has become its own LSTM, GRU and RNN, every other a Scan whose body is a step of the reference; all
take any number of steps and rows. None of this has gradients.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from novolstm_triton.call import Call
from novolstm_triton.engines import reference


class Operator(NamedTuple):
    """One of ONNX's recurrent operators."""

    name: str
    inputs: str
    """The cell's blocks that x feeds, a letter each, in ONNX's order."""
    recurrent: str
    """Likewise, those that h feeds."""
    peepholes: str = ""
    """Likewise, the blocks of the cell's vectors."""
    attributes: Mapping[str, Any] = types.MappingProxyType({})
    """Those that tell the cell from others of the same operator."""


OPERATORS = {
    "lstm": Operator("LSTM", "iofg", "iofg"),
    "peephole": Operator("LSTM", "iofg", "iofg", "iof"),
    "gru": Operator("GRU", "zrn", "zrm", attributes=dict(linear_before_reset=1)),
    "gru_reset_before": Operator("GRU", "zrn", "zrn"),
    "elman_tanh": Operator("RNN", "h", "h", attributes=dict(activations=["Tanh"])),
    "elman_relu": Operator("RNN", "h", "h", attributes=dict(activations=["Relu"])),
}
"""ONNX's operators by the names of the cells that they compute."""


def is_exporting() -> bool:
    """Return whether torch.onnx.export is tracing; False in torch.compile and in a plain torch.export."""
    # The flag of torch.export comes first because it is cheap: torch.onnx imports its exporter when it is asked.
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def layer(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Record `reference.layer`."""
    options = call.options
    extras = (call.h_mask, call.zoneout_mask, call.weight_hr)
    regularised = options.zoneout_h or options.zoneout_c or any(a is not None for a in extras)
    operator = None if regularised else OPERATORS.get(call.cell.name)
    return _scan(call) if operator is None else _operator(call, operator)


def _operator(call: Call, operator: Operator) -> tuple[Tensor, Tensor, Tensor]:
    """Record one of ONNX's operators."""
    x, cell, lengths = call.x, call.cell, call.lengths
    given = [call.h_0, call.c_0][: len(cell.states)]
    (steps, batch, _), hidden = x.shape, call.h_0.shape[1]
    if lengths is not None:
        lengths = lengths.clamp(0, steps)
    w = _blocks(call.weight_ih, (block.name for block in cell.blocks if block.input))
    r = _blocks(call.weight_hh, (block.name for block in cell.blocks if block.recurrent))
    b = _blocks(call.bias, cell.gates)
    # ONNX has a bias of the inputs and one of the recurrence: blocks that x does not feed have the latter.
    biases = [b[name] for name in operator.inputs]
    biases += [torch.zeros_like(b[name]) if name in operator.inputs else b[name] for name in operator.recurrent]
    own = [
        *(
            torch.cat([blocks[name] for name in order])
            for blocks, order in ((w, operator.inputs), (r, operator.recurrent))
        ),
        torch.cat(biases),
    ]
    inputs = [x, *(a.unsqueeze(0) for a in own), lengths, *(s.unsqueeze(0) for s in given)]
    if operator.peepholes:
        p = _blocks(call.vectors, cell.vectors[0].blocks)
        inputs.append(torch.cat([p[name] for name in operator.peepholes]).unsqueeze(0))
    y, *last = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        inputs,
        {"hidden_size": hidden, "direction": "reverse" if call.reverse else "forward", **operator.attributes},
        dtypes=[x.dtype] * (1 + len(given)),
        shapes=[(steps, 1, batch, hidden), *[(1, batch, hidden)] * len(given)],
    )
    last = [s.squeeze(0) for s in last]
    if lengths is not None:
        # ONNX gives zeros for the states of a row without steps.
        some = (lengths > 0).unsqueeze(1)
        last = [torch.where(some, s, before) for s, before in zip(last, given, strict=True)]
    return y.squeeze(1), last[0], last[-1]


def _blocks(tensor: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the blocks of a parameter by the names of those that it has, in their order."""
    names = [*names]
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


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
