"""Layers in every combination of their options: those of PyTorch compute the same, NovoLSTM what it is defined as."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from novolstm_triton import NovoLSTM
from novolstm_triton.cells import CELLS, VARIANTS
from novolstm_triton.engines import reference
from novolstm_triton.layers.recurrent import State
from novolstm_triton.problems import NOVOLSTM

from .support.selection import covering
from .support.twins import NO_ONEDNN, assert_close, differentiate, ours_like, running_on, tuple_of

pytestmark = pytest.mark.filterwarnings(NO_ONEDNN)

T, B, I, H, P = 4, 3, 3, 5, 2

LENGTHS = {"whole": [4, 4, 4], "lengths": [4, 0, 2], "sorted": [4, 3, 1], "unsorted": [1, 4, 3]}
"""Ways to give a batch, and the rows' lengths; the last two are of a PackedSequence."""

PYTORCH = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "elman_tanh": nn.RNN,
    "elman_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
"""PyTorch's layers by the names of their cells."""

AXES: dict[str, tuple] = {
    "cell": (*PYTORCH, *NOVOLSTM),
    "bidirectional": (False, True),
    "num_layers": (1, 2),
    "proj_size": (0, P),
    "way": tuple(LENGTHS),
    "batch_first": (False, True),
}

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's options, and how it is called."""

    cell: str
    bidirectional: bool
    num_layers: int
    proj_size: int
    way: str
    batch_first: bool

    def __str__(self) -> str:
        """Return the options as one short word."""
        direction = "bidirectional" if self.bidirectional else "one-way"
        first = "B-first" if self.batch_first else "T-first"
        return f"{self.cell}-{direction}-L{self.num_layers}-P{self.proj_size}-{self.way}-{first}"

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(LENGTHS[self.way])

    @property
    def gate_gain(self) -> float:
        """A gain with which the gate matters: without one the formula's is O(1/H)."""
        return float(H) if self.cell.startswith("formula") else 1.0

    def layer(self, rounded: torch.dtype) -> nn.Module:
        """Return a layer of PyTorch or NovoLSTM in float64, its parameters drawn anew and rounded to a dtype."""
        names = ["num_layers", "bidirectional", "batch_first"] + ["proj_size"] * (self.proj_size > 0)
        options: dict[str, Any] = dict(dtype=torch.float64) | {name: getattr(self, name) for name in names}
        if self.cell in PYTORCH:
            layer = PYTORCH[self.cell](I, H, **options)
        else:
            variant, _, every = self.cell.partition("_")
            options |= dict(variant=variant, layer_norm=every or "input_gate", gate_gain=self.gate_gain)
            layer = NovoLSTM(I, H, **options)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in layer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
            parameter.data = (drawn + name.startswith("ln_weight")).to(rounded).double()
        return layer

    def arguments(self, rounded: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Return x [T, B, I], with something in its padding, and (h_0, c_0), or h_0, as leaves."""
        generator = torch.Generator().manual_seed(2)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        shapes = ((T, B, I), (layers, B, self.proj_size or H), (layers, B, H))
        x, h_0, c_0 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        x[torch.arange(T).unsqueeze(1) >= self.lengths] = 100.0
        x, h_0, c_0 = (a.to(rounded).to(dtype).requires_grad_() for a in (x, h_0, c_0))
        return x, (h_0, c_0) if "c" in CELLS[self.cell].states else h_0


class Called(nn.Module):
    """A layer that is called in a case's way, from outside always with x [T, B, I], and y [T, B, ·]."""

    def __init__(self, case: Case, layer: nn.Module) -> None:
        super().__init__()
        self.case, self.layer = case, layer

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        case, first = self.case, self.case.batch_first
        x = x.transpose(0, 1) if first else x
        if case.way in ("whole", "lengths"):
            y, state = self.layer(x, hx, lengths=None if case.way == "whole" else case.lengths)
        else:
            packed = pack_padded_sequence(x, case.lengths, first, enforce_sorted=case.way == "sorted")
            packed, state = self.layer(packed, hx)
            y, _ = pad_packed_sequence(packed, first, total_length=T)
        return (y.transpose(0, 1) if first else y), state


class OfPyTorch(Called):
    """A layer of PyTorch: rows with steps as a PackedSequence; those without, which it does not take, as they are."""

    def forward(self, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        rows = self.case.lengths.nonzero().squeeze(1)
        packed = pack_padded_sequence(x[:, rows], self.case.lengths[rows], enforce_sorted=False)
        own = [s[:, rows] for s in tuple_of(hx)]
        packed, states = self.layer(packed, tuple(own) if len(own) > 1 else own[0])
        y, _ = pad_packed_sequence(packed, total_length=T)
        last = tuple(s.index_copy(1, rows, new) for s, new in zip(tuple_of(hx), tuple_of(states), strict=True))
        return y.new_zeros(T, B, y.shape[2]).index_copy(1, rows, y), last


class RowByRow(Called):
    """The equations of one step, for each layer, direction and row in turn, over the row's own steps."""

    def forward(self, x: Tensor, hx: State) -> tuple[Tensor, State]:
        last: list[list[Tensor]] = [[], []]
        for number in range(self.case.num_layers):
            outputs = []
            for suffix in ("", "_reverse")[: 1 + self.case.bidirectional]:
                k = len(last[0])
                rows = [
                    self.row(x[:n, b], hx[0][k, b : b + 1], hx[1][k, b : b + 1], f"_l{number}{suffix}")
                    for b, n in enumerate(self.case.lengths.tolist())
                ]
                y, h, c = zip(*rows, strict=True)
                outputs.append(torch.stack(y, 1))
                last[0].append(torch.cat(h))
                last[1].append(torch.cat(c))
            x = torch.cat(outputs, 2)
        return x, (torch.stack(last[0]), torch.stack(last[1]))

    def row(self, x: Tensor, h: Tensor, c: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return y [T, P], h and c of a row's own steps [t, I]."""
        w = {name.removesuffix(suffix): p for name, p in self.layer.named_parameters() if name.endswith(suffix)}
        bias, recurrent = w.pop("bias_ih"), w.pop("bias_hh")
        # The notebook's p has no recurrent part, which comes last.
        bias = torch.cat((bias[: len(recurrent)] + recurrent, bias[len(recurrent) :]))
        cell, hidden = CELLS[self.case.cell], c.shape[1]
        vectors = [block for vector in cell.vectors for block in w[vector.name].split(hidden)]
        for block in cell.gained:
            vectors[block] = vectors[block] * self.case.gate_gain
        weights = reference.Weights(w["weight_ih"], w["weight_hh"], bias, tuple(vectors), w.get("weight_hr"))
        eps = getattr(self.layer, "ln_eps", 0.0)
        y = [torch.zeros_like(h)] * T
        for t in range(len(x))[:: -1 if "reverse" in suffix else 1]:
            h, c = reference.step(x[t : t + 1], h, c, weights, cell, eps)
            y[t] = h
        return torch.cat(y), h, c


@functools.cache
def expected(case: Case, rounded: torch.dtype, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all results in a dtype, of arguments and parameters that were rounded to another."""
    exact = OfPyTorch if case.cell in PYTORCH else RowByRow
    return differentiate(exact(case, case.layer(rounded).to(dtype)), *case.arguments(rounded, dtype))


def assert_right(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Require all results of a backend to be as exact as those of PyTorch's operations in the same dtype."""
    layer = case.layer(dtype)
    layer = (ours_like(layer) if case.cell in PYTORCH else layer).to(dtype)
    with running_on(backend):
        results = differentiate(Called(case, layer), *case.arguments(dtype, dtype))
    case = dataclasses.replace(case, batch_first=False)
    eager = None if dtype == torch.float64 else expected(case, dtype, dtype)
    assert_close(results, expected(case, dtype, torch.float64), eager)


def fields(case: Case, **others: Any) -> tuple:
    """Return what a case is covered by."""
    return *dataclasses.astuple(case), *others.values()


def exists(case: Case) -> bool:
    """Return whether there is such a layer: of PyTorch's only the LSTM has projections."""
    return not case.proj_size or case.cell not in PYTORCH or case.cell == "lstm"


def pairs(dtypes: tuple[str, ...]) -> list:
    """Return cases, with a dtype each, in which every two values of two axes come together at least once."""
    product = [values for values in itertools.product(*AXES.values(), dtypes) if exists(Case(*values[:-1]))]
    cases = [(Case(*product[k][:-1]), product[k][-1]) for k in covering(product, 2)]
    return [pytest.param(case, DTYPES[dtype], id=f"{case}-{dtype}") for case, dtype in cases]


CASES = [Case(*values) for values in itertools.product((*PYTORCH, *VARIANTS), *list(AXES.values())[1:])]


@pytest.mark.covering(2, of=fields)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", [*filter(exists, CASES)], ids=str)
def test_float64(case, backend):
    assert_right(case, backend, torch.float64)


@pytest.mark.covering(1, of=fields)
@pytest.mark.parametrize(("case", "dtype"), pairs(("fp32", "bf16", "fp16")))
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lower_precision(case, dtype, backend):
    assert_right(case, backend, dtype)


@pytest.mark.parametrize(("case", "dtype"), pairs(("fp64", "fp32")))
def test_reference(case, dtype):
    assert_right(case, "reference", dtype)


@pytest.mark.parametrize("way", LENGTHS)
def test_rows_one_by_one_make_nn_lstm(way):
    """So NovoLSTM is held to as much as `LSTM`."""
    case = Case("lstm", bidirectional=True, num_layers=2, proj_size=P, way=way, batch_first=False)
    results = differentiate(RowByRow(case, case.layer(torch.float64)), *case.arguments(torch.float64, torch.float64))
    assert_close(results, expected(case, torch.float64, torch.float64))
