"""The cells against others: PyTorch's layers, ONNX Runtime's for what PyTorch lacks, equations written anew."""

import dataclasses
import functools
from collections.abc import Callable
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from novolstm_triton import RecurrentLayer, plan
from novolstm_triton.cells import CELLS, Block, Cell, Second, Vector, with_kernels
from novolstm_triton.functional import recurrence
from novolstm_triton.problems import NOVOLSTM, Problem, errors
from novolstm_triton.testing import check_cell

T, B, I, H = 4, 3, 2, 5

WEIGHTS = ("weight_ih", "weight_hh", "bias")

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


def in_onnx_lstm(cell: Cell, x: Tensor, states: list[Tensor], given: Weights) -> tuple:
    """Run ONNX's LSTM in float32, which has peepholes, or makes f of i as 1 − i: then i's weights are those of −f."""
    coupled = "i" not in given["bias"]

    def blocks(name: str, order: str) -> Tensor:
        parts = given[name] | ({"i": -given[name]["f"]} if coupled else {})
        return torch.cat([parts[block] for block in order]).unsqueeze(0)

    weights, peepholes = [blocks(name, "iofg") for name in WEIGHTS], None if coupled else blocks("weight_ch", "iof")
    return in_onnx("LSTM", x, states, weights, dict(P=peepholes), input_forget=int(coupled))


def in_onnx_gru(cell: Cell, x: Tensor, states: list[Tensor], given: Weights) -> tuple:
    """Run ONNX's GRU in float32, which resets before the product unless it is told otherwise."""
    weights = [torch.cat([given[name][block] for block in "zrn"]).unsqueeze(0) for name in WEIGHTS]
    return in_onnx("GRU", x, states, weights, {}, linear_before_reset=0)


def in_onnx(
    operator: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    more: dict[str, Tensor | None],
    **options: int,
) -> tuple:
    """Run an operator of ONNX Runtime; the weights are `WEIGHTS`, with the blocks in its order."""
    weight_ih, weight_hh, bias = weights
    inputs = dict(X=x, W=weight_ih, R=weight_hh, B=torch.cat([bias, torch.zeros_like(bias)], 1), sequence_lens=None)
    inputs |= dict(zip(("initial_h", "initial_c"), (s.unsqueeze(0) for s in states), strict=False)) | more
    feeds = {name: a.detach().numpy().astype(np.float32) for name, a in inputs.items() if a is not None}
    names = [name if name in feeds else "" for name in inputs]
    outputs = ["Y", "Y_h", "Y_c"][: 1 + len(states)]
    node = helper.make_node(operator, names, outputs, hidden_size=H, **options)
    typed = [helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape) for name, a in feeds.items()]
    untyped = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "layer", typed, untyped)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    y, *last = (torch.from_numpy(a) for a in onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds))
    return y.squeeze(1), *(s.squeeze(0) for s in last)


def as_keras_says(cell: Cell, x: Tensor, states: list[Tensor], given: Weights) -> tuple:
    """Walk by the equations of keras.layers.GRU with reset_after=False, whose kernels multiply from the right."""
    kernel, recurrent_kernel, bias = (torch.cat([given[name][block] for block in "zrn"]).t() for name in WEIGHTS)
    (h,), y = states, []
    for inputs in x:
        x_z, x_r, x_h = (inputs @ kernel + bias).split(H, 1)
        recurrent_z, recurrent_r = (h @ recurrent_kernel[:, : 2 * H]).split(H, 1)
        z, r = torch.sigmoid(x_z + recurrent_z), torch.sigmoid(x_r + recurrent_r)
        hh = torch.tanh(x_h + (r * h) @ recurrent_kernel[:, 2 * H :])
        h = z * h + (1 - z) * hh
        y.append(h)
    return torch.stack(y), h


def in_layer_norms(cell: Cell, x: Tensor, states: list[Tensor], given: Weights) -> tuple:
    """Run the LSTM of Ba, Kiros and Hinton, equations 20 to 22, in plain operations: no layer_norm, gate by gate."""

    def of(name: str, suffix: str = "") -> dict[str, Tensor]:
        return {gate: given[name][gate + suffix] for gate in "ifgo"}

    def standard(a: Tensor) -> Tensor:
        centred = a - a.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + cell.eps).sqrt()

    def normalised(v: Tensor, weights: dict[str, Tensor], bias: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = standard(torch.cat([v @ weights[gate].t() + bias[gate] for gate in "ifgo"], 1))
        return dict(zip("ifgo", whole.chunk(4, 1), strict=True))

    (h, c), y = states, []
    for x_t in x:
        of_h = normalised(h, of("weight_hh", "_h"), of("bias", "_h"))
        of_x = normalised(x_t, of("weight_ih", "_x"), of("bias", "_x"))
        gamma_h, gamma_x, beta = (of(f"ln_{name}") for name in ("weight_hh", "weight_ih", "bias"))
        a = {k: gamma_h[k] * of_h[k] + gamma_x[k] * of_x[k] + beta[k] for k in "ifgo"}
        c = a["f"].sigmoid() * c + a["i"].sigmoid() * a["g"].tanh()
        h = a["o"].sigmoid() * (given["ln_weight_ch"]["c"] * standard(c) + given["ln_bias_ch"]["c"]).tanh()
        y.append(h)
    return torch.stack(y), h, c


ORACLES: dict[str, Callable[..., tuple]] = {
    "lstm": functools.partial(in_pytorch, nn.LSTM),
    "coupled": in_onnx_lstm,
    "peephole": in_onnx_lstm,
    "elman_tanh": functools.partial(in_pytorch, nn.RNN),
    "elman_relu": functools.partial(in_pytorch, functools.partial(nn.RNN, nonlinearity="relu")),
    "gru": functools.partial(in_pytorch, nn.GRU),
    "gru_reset_before by Keras's equations": as_keras_says,
    "gru_reset_before by ONNX": in_onnx_gru,
    "layer_norm_lstm": in_layer_norms,
}
"""Who else computes what a cell does, by the cell's name, and, after a blank, that of who it is."""


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("oracle", ORACLES)
def test_cell_is_that_of_others(oracle, backend):
    name = oracle.split()[0]
    cell, problem = CELLS[name], Problem(T, B, H, inputs_size=I, cell=name)
    drawn, _, grads = problem.draw()
    leaves = [a.requires_grad_() for a in drawn]
    count = 1 + len(cell.states)
    x, states, (weight_ih, weight_hh, bias, *vectors) = leaves[0], leaves[1:count], leaves[count:]
    y, last = recurrence(cell, x, states, weight_ih, weight_hh, bias, vectors, backend=backend)
    expected = ORACLES[oracle](cell, x, states, by_block(cell, leaves[count:]))
    result, truth = (dict(zip(problem.output_names, a, strict=True)) for a in ((y, *last), expected))
    bound = 1e-6
    if expected[0].requires_grad:
        bound = 1e-12
        for outputs, table in ((y, *last), result), (expected, truth):
            table |= dict(zip(problem.input_names, torch.autograd.grad(outputs, leaves, grads), strict=True))
    for array, (error, _) in errors(result, truth).items():
        assert error <= bound, f"{array}: {error:.1e}"


def _second(z: tuple[Tensor, ...], h: Tensor) -> Tensor:
    m, i = z
    return torch.sigmoid(i) * torch.tanh(m) + h


def _made_up(z: tuple[Tensor, ...], c: Tensor, vectors: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    m, i, f, g, p = z
    c = torch.sigmoid(f + vectors[0]) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.tanh(c + m) * torch.sigmoid(p), c


MADE_UP = Cell(
    name="made_up",
    blocks=(Block("m", input=False), Block("i"), Block("f"), Block("g"), Block("p", recurrent=False)),
    step=_made_up,
    vectors=(Vector("weight_ch", ("f",)),),
    second=Second(("f", "g"), _second),
)
"""A cell with blocks of every kind, of which two wait for a second product."""


@pytest.fixture
def made_up():
    """No other test is to find the cell."""
    with mock.patch.dict(CELLS):
        yield MADE_UP


def test_any_cell_may_have_a_second_product(made_up):
    assert (made_up.at_once, made_up.recurrent) == (2, 4)
    report = check_cell(made_up, seeds=1)
    assert len(report.findings) == 4
    assert all("backend torch" in finding.part for finding in report.findings)


@pytest.mark.parametrize("blocks", [(), ("r", "z", "n"), ("z",), ("n", "z"), ("n", "n"), ("x",)], ids=repr)
def test_second_product_is_of_the_last_blocks(blocks):
    with pytest.raises(ValueError, match=r"second: expected the last of .* h feeds, \['r', 'z', 'n'\], after"):
        dataclasses.replace(CELLS["gru_reset_before"], second=Second(blocks, _second))


def test_second_product_has_no_kernels_and_no_projection(made_up):
    with pytest.raises(ValueError, match="kernels: expected None, for the kernels make no second product, got 'a:B'"):
        dataclasses.replace(made_up, kernels="a:B")
    assert "gru_reset_before" not in with_kernels()
    assert {"lstm", "gru", "formula_all"} <= set(with_kernels())
    x, weight_ih, weight_hh = torch.zeros(1, 1, I), torch.zeros(4 * H, I), torch.zeros(4 * H, H)
    said = "the cell 'made_up' has a second product in a step, and no projection"
    with pytest.raises(ValueError, match=f"weight_hr: {said}"):
        recurrence(made_up, x, None, weight_ih, weight_hh, None, [torch.zeros(H)], weight_hr=torch.zeros(2, H))
    with pytest.raises(ValueError, match=f"proj_size: {said}"):
        RecurrentLayer(made_up, I, H, proj_size=2)


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_second_product_is_refused_by_name(interpreted, monkeypatch):
    """Not for want of a GPU or an interpreter: neither would help."""
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    layer = RecurrentLayer(CELLS["gru_reset_before"], I, H, backend="triton")
    said = r"backend 'triton' does not run the cell 'gru_reset_before' \(its second product .*\): use backend='torch'"
    with pytest.raises(ValueError, match=said):
        layer(torch.zeros(T, B, I))


@pytest.mark.parametrize("name", sorted({*CELLS} - {"lstm", *NOVOLSTM}))
def test_gradients_of_both_orders(name):
    """Of cells that backend "torch" differentiates from their equations."""
    problem = Problem(3, 2, 2, inputs_size=2, cell=name)
    leaves = [a.requires_grad_() for a in problem.draw()[0]]

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        return problem.call(inputs, None, "torch")

    with plan.forced(chunk=2):
        assert torch.autograd.gradcheck(outputs, leaves)
        assert torch.autograd.gradgradcheck(outputs, leaves)


def test_projection_needs_blocks_that_x_feeds():
    with pytest.raises(ValueError, match="proj_size: the cell 'layer_norm_lstm' has blocks that x does not feed"):
        RecurrentLayer(CELLS["layer_norm_lstm"], I, H, proj_size=2)
