"""The cells against implementations of others: PyTorch's layers, and ONNX Runtime's LSTM for what PyTorch lacks."""

import functools
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from novolstm_triton import plan
from novolstm_triton.cells import CELLS, Cell
from novolstm_triton.functional import recurrence
from novolstm_triton.problems import Problem, errors

T, B, I, H = 4, 3, 2, 5

Weights = dict[str, dict[str, Tensor]]
"""weight_ih, weight_hh, bias and the vectors by the names of their blocks."""


def by_block(cell: Cell, weights: list[Tensor]) -> Weights:
    """Return the weights of a problem, cut into blocks."""
    blocks = {
        "weight_ih": [block.name for block in cell.blocks if block.input],
        "weight_hh": [block.name for block in cell.blocks if block.recurrent],
        "bias": [block.name for block in cell.blocks],
    }
    blocks |= {vector.name: list(vector.blocks) for vector in cell.vectors}
    pairs = zip(blocks.items(), weights, strict=True)
    return {name: dict(zip(names, a.chunk(len(names)), strict=True)) for (name, names), a in pairs}


def in_pytorch(kind: Callable[..., nn.Module], cell: Cell, x: Tensor, states: list[Tensor], given: Weights) -> tuple:
    """Run a layer of torch.nn in float64: a bias that x's product has not is the recurrent one."""
    order = cell.recurrent_order or tuple(given["weight_hh"])
    zero, bias = torch.zeros(H, dtype=torch.float64), given["bias"]
    parameters = {
        "weight_ih_l0": torch.cat([*given["weight_ih"].values()]),
        "weight_hh_l0": torch.cat([given["weight_hh"][name] for name in order]),
        "bias_ih_l0": torch.cat([bias[name] for name in given["weight_ih"]]),
        "bias_hh_l0": torch.cat([zero if name in given["weight_ih"] else bias[name] for name in order]),
    }
    hx = [s.unsqueeze(0) for s in states]
    arguments = (x, hx[0] if len(hx) == 1 else tuple(hx))
    y, last = torch.func.functional_call(kind(I, H, dtype=torch.float64), parameters, arguments)
    return y, *(s.squeeze(0) for s in (last if isinstance(last, tuple) else (last,)))


def in_onnx(cell: Cell, x: Tensor, states: list[Tensor], given: Weights) -> tuple:
    """Run ONNX's LSTM in float32, which has peepholes, or makes f of i as 1 − i: then i's weights are those of −f."""
    coupled = "i" not in given["bias"]

    def blocks(name: str, order: str) -> Tensor:
        parts = given[name] | ({"i": -given[name]["f"]} if coupled else {})
        return torch.cat([parts[block] for block in order]).unsqueeze(0)

    bias = blocks("bias", "iofg")
    inputs = dict(X=x, W=blocks("weight_ih", "iofg"), R=blocks("weight_hh", "iofg"))
    inputs |= dict(B=torch.cat([bias, torch.zeros_like(bias)], 1), sequence_lens=None)
    inputs |= dict(zip(("initial_h", "initial_c"), (s.unsqueeze(0) for s in states), strict=True))
    inputs |= dict(P=None if coupled else blocks("weight_ch", "iof"))
    feeds = {name: a.detach().numpy().astype(np.float32) for name, a in inputs.items() if a is not None}
    names = [name if name in feeds else "" for name in inputs]
    outputs = ["Y", "Y_h", "Y_c"]
    node = helper.make_node("LSTM", names, outputs, hidden_size=H, input_forget=int(coupled))
    typed = [helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape) for name, a in feeds.items()]
    untyped = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "lstm", typed, untyped)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    y, *last = (torch.from_numpy(a) for a in onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds))
    return y.squeeze(1), *(s.squeeze(0) for s in last)


ORACLES: dict[str, Callable[..., tuple]] = {
    "lstm": functools.partial(in_pytorch, nn.LSTM),
    "coupled": in_onnx,
    "peephole": in_onnx,
    "elman_tanh": functools.partial(in_pytorch, nn.RNN),
    "elman_relu": functools.partial(in_pytorch, functools.partial(nn.RNN, nonlinearity="relu")),
    "gru": functools.partial(in_pytorch, nn.GRU),
}
"""Who else computes what a cell does."""


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ORACLES)
def test_cell_is_that_of_others(name, backend):
    cell, problem = CELLS[name], Problem(T, B, H, inputs_size=I, cell=name)
    drawn, _, grads = problem.draw()
    leaves = [a.requires_grad_() for a in drawn]
    count = 1 + len(cell.states)
    x, states, (weight_ih, weight_hh, bias, *vectors) = leaves[0], leaves[1:count], leaves[count:]
    y, last = recurrence(cell, x, states, weight_ih, weight_hh, bias, vectors, backend=backend)
    expected = ORACLES[name](cell, x, states, by_block(cell, leaves[count:]))
    result, truth = (dict(zip(problem.output_names, a, strict=True)) for a in ((y, *last), expected))
    bound = 1e-6
    if expected[0].requires_grad:
        bound = 1e-12
        for outputs, table in ((y, *last), result), (expected, truth):
            table |= dict(zip(problem.input_names, torch.autograd.grad(outputs, leaves, grads), strict=True))
    for array, (error, _) in errors(result, truth).items():
        assert error <= bound, f"{array}: {error:.1e}"


@pytest.mark.parametrize("name", ["coupled", "peephole", "elman_tanh", "elman_relu", "gru"])
def test_gradients_of_both_orders(name):
    """Of cells that backend "torch" differentiates from their equations."""
    problem = Problem(3, 2, 2, inputs_size=2, cell=name)
    leaves = [a.requires_grad_() for a in problem.draw()[0]]

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        return problem.call(inputs, None, "torch")

    with plan.forced(chunk=2):
        assert torch.autograd.gradcheck(outputs, leaves)
        assert torch.autograd.gradgradcheck(outputs, leaves)
