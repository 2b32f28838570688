"""Layers at the edges of their numbers: cases, what their results should be, and how far each backend is from that."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor

from novolstm_triton import plan
from novolstm_triton.cells import CELLS, with_kernels
from novolstm_triton.problems import FLOORS, NOVOLSTM, Problem, errors, excess
from novolstm_triton.testing import cooperative

from .interpreted import ROOMY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("torch", "triton")

GRADS = ("dy", "dh_n", "dc_n")

_TINY = {torch.float32: 1e-39, torch.float16: 2e-6}
_HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 1e4}
_GAIN = {torch.float32: 1e6, torch.bfloat16: 1e6, torch.float16: 1e3}


class Operands:
    """A problem's inputs and outgoing gradients by their names, to be changed in place, in float64."""

    def __init__(self, problem: "Extreme", inputs: list[Tensor], grads: list[Tensor]) -> None:
        self.grads = GRADS[: len(grads)]
        self.all = dict(zip((*problem.input_names, *self.grads), (*inputs, *grads), strict=True))
        self._vectors = [vector.name for vector in CELLS[problem.cell].vectors]
        self.dtype, self.hidden = problem.dtype, problem.hidden
        self._gates = CELLS[problem.cell].gates
        self._generator = torch.Generator().manual_seed(17)

    def __getitem__(self, name: str) -> Tensor:
        """Return one of them."""
        return self.all[name]

    def block(self, name: str, gate: str) -> Tensor:
        """Return the rows of a gate in weight_ih, weight_hh or bias: none if the cell has no such gate."""
        first = self._gates.index(gate) * self.hidden if gate in self._gates else len(self.all[name])
        return self.all[name][first : first + self.hidden]

    def bias(self, gate: str, values: Tensor | float) -> None:
        """Set a gate's bias, if there is such a gate."""
        if len(rows := self.block("bias", gate)):
            rows.copy_(torch.as_tensor(values, dtype=rows.dtype))

    def equal_units(self, *gates: str) -> None:
        """Make a gate's pre-activations equal in all units, whatever the input."""
        for gate in gates:
            for name in ("weight_ih", "weight_hh", "bias"):
                rows = self.block(name, gate)
                rows.copy_(rows[:1].clone().expand_as(rows))

    def reorder(self, order: Tensor) -> None:
        """Put the units of everything that has units into another order."""
        for name in self.all.keys() & {"h_0", "c_0", "weight_hh", *GRADS}:
            self.all[name] = self.all[name][..., order]
        for name in ("weight_ih", "weight_hh", "bias", *self._vectors):
            self.all[name] = self.all[name].unflatten(0, (-1, self.hidden))[:, order].flatten(0, 1)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers from 0 to 1."""
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64)


def _large(a: Operands, count: int) -> Tensor:
    """Draw numbers of either sign with magnitudes from 1e2 to 1e4."""
    return 10 ** (2 + 2 * a.uniform(count)) * torch.where(a.uniform(count) < 0.5, -1.0, 1.0)


def some_saturated(a: Operands) -> None:
    bias = a["bias"]
    bias.copy_(torch.where(a.uniform(len(bias)) < 0.5, _large(a, len(bias)), bias))


def all_saturated(a: Operands) -> None:
    bias = a["bias"]
    bias.copy_(_large(a, len(bias)))
    # No two units may come close to sharing the softmax; the last one, which has it all, is let in and out.
    a.bias("p", torch.linspace(-1e4, 1e4, a.hidden))
    for gate in "io":
        a.bias(gate, torch.where(torch.arange(a.hidden) % 2 == a.hidden % 2, -1e4, 1e4))


def one_hot(a: Operands) -> None:
    a.bias("p", torch.eye(a.hidden)[1] * 1e4)


def uniform_softmax(a: Operands) -> None:
    a.equal_units("p")


def uniform_softmax_far_out(a: Operands) -> None:
    a.equal_units("p")
    a.bias("p", 1e4)


def zero_variance(a: Operands) -> None:
    # Of σ(z_i), and of σ(z_i)·p, too.
    a.equal_units("i", "p")


def small_variance(a: Operands) -> None:
    a.equal_units("i", "p")
    a.bias("i", 0.7 + 0.02 * a.uniform(a.hidden))


def equal_preactivations(a: Operands) -> None:
    """As in a first step from zero: of f, g and o only the bias is left."""
    for gate in "fgo":
        for name in ("weight_ih", "weight_hh"):
            a.block(name, gate).zero_()
        a.bias(gate, 0.7)


def slices_apart(a: Operands) -> None:
    """In the first of two slices σ(z_i) is near 0 and z_p far below, in the other σ(z_i) is near 1."""
    low = torch.arange(a.hidden) < -(-a.hidden // 2)
    a.bias("i", torch.where(low, -8.0, 8.0))
    a.bias("p", torch.where(low, -1e3, 0.0))


def gamma_zero(a: Operands) -> None:
    a["ln_weight"].zero_()


def beta_large(a: Operands) -> None:
    """And g away from zero, where a rounding error would turn the sign of h."""
    a["ln_bias"][: a.hidden] += 1e3
    for name in ("weight_ih", "weight_hh"):
        a.block(name, "g").mul_(0.1)
    a.bias("g", torch.where(torch.arange(a.hidden) % 2 == 0, 1.0, -1.0))


def subnormal(a: Operands) -> None:
    for name in a.all.keys() & {"x", "h_0", "c_0"}:
        a[name].mul_(_TINY[a.dtype])
    a["bias"].zero_()


def huge(a: Operands) -> None:
    """The weights make up for it, so that the gates are where they usually are."""
    a["x"].mul_(_HUGE[a.dtype])
    a["weight_ih"].div_(_HUGE[a.dtype])
    for name in a.grads:
        a[name].mul_(0.1)


def huge_preactivations(a: Operands) -> None:
    a["x"].mul_(_HUGE[a.dtype])


def growing_state(a: Operands) -> None:
    a.bias("f", 30.0)
    for gate in "ig":
        a.bias(gate, 3.0)


def unchanged(a: Operands) -> None:
    """Leave everything as it was drawn."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked of which cells."""

    change: Callable[[Operands], None]
    cells: tuple[str, ...] = ("formula", "notebook")
    sizes: tuple[tuple[str, int], ...] = ()
    lengths: bool = False
    gain: dict[torch.dtype, float] | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)
    zero: tuple[str, ...] = ()
    """Results that are zero in exact arithmetic: their error is absolute."""
    scale: float = 1.0
    """What that error is relative to, at the least."""

    def problem(self, cell: str, dtype: torch.dtype) -> "Extreme":
        """Return the case's problem for a cell whose inputs are rounded to `dtype`."""
        sizes = dict(steps=3, batch=16, hidden=7, inputs_size=3) | dict(self.sizes)
        gain = None if self.gain is None else self.gain[dtype]
        return Extreme(**sizes, cell=cell, lengths=self.lengths, change=self.change, dtype=dtype, gain=gain)


@dataclasses.dataclass(frozen=True)
class Extreme(Problem):
    """A problem whose inputs are changed after they are drawn."""

    change: Callable[[Operands], None] = unchanged
    dtype: torch.dtype = torch.float32
    gain: float | None = None
    order: int = 0
    """Which order of the units: 0 is the one drawn. All orders are the same problem, with other rounding errors."""

    @property
    def gate_gain(self) -> float:
        """The case's gain, if it has one."""
        return super().gate_gain if self.gain is None else self.gain

    def draw(self) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """Return the inputs of `Problem.draw`, changed."""
        inputs, lengths, grads = super().draw()
        operands = Operands(self, inputs, grads)
        self.change(operands)
        if self.order:
            operands.reorder(torch.randperm(self.hidden, generator=torch.Generator().manual_seed(self.order)))
        return [operands[name] for name in self.input_names], lengths, [operands[name] for name in operands.grads]


_GATED = ("coupled", "peephole", "gru", "gru_reset_before")
_OTHERS = (*_GATED, "elman_tanh", "elman_relu")
"""Cells without sums over the units, besides the LSTM."""

_WEIGHTS = ("grad x", "grad h_0", "grad weight_ih", "grad weight_hh", "grad bias")

CASES = {
    "some gates saturated": Case(some_saturated, ("lstm", *NOVOLSTM, *_GATED, "elman_tanh")),
    "all gates saturated": Case(all_saturated, ("lstm", "formula", "notebook"), zero=_WEIGHTS),
    "some gates saturated, lengths": Case(some_saturated, lengths=True, sizes=(("steps", 5),)),
    "one-hot softmax": Case(one_hot),
    "one-hot softmax, lengths": Case(one_hot, lengths=True, sizes=(("steps", 5),)),
    "uniform softmax": Case(uniform_softmax),
    "uniform softmax, z_p = 1e4": Case(uniform_softmax_far_out),
    # A rounding error of the mean, at most 2^-25, times 1/√ε = 316, in each of T·B = 48 terms that add up at random.
    "zero variance": Case(zero_variance, zero=("grad ln_weight",), scale=8.0),
    "small variance": Case(small_variance, ("formula",)),
    "equal pre-activations": Case(equal_preactivations, ("formula_all", "notebook_all")),
    "slices far apart": Case(slices_apart),
    "one unit": Case(unchanged, ("lstm", "formula", "notebook"), sizes=(("hidden", 1),), zero=("grad ln_weight",)),
    "one unit, normalised": Case(
        unchanged, ("formula_all", "notebook_all"), sizes=(("hidden", 1),), zero=(*_WEIGHTS, "grad ln_weight")
    ),
    "γ = 0": Case(gamma_zero),
    "β about 1e3": Case(beta_large),
    "products and c normalised": Case(unchanged, ("layer_norm_lstm",)),
    "subnormal inputs": Case(
        subnormal,
        ("lstm", "formula", "notebook", *_OTHERS),
        dtypes=("fp32", "fp16"),
        zero=("grad ln_weight", "grad weight_ch"),
    ),
    "huge inputs": Case(huge, ("lstm", "formula", "notebook", "layer_norm_lstm", *_OTHERS)),
    "huge pre-activations": Case(
        huge_preactivations, ("lstm", "formula", "notebook"), dtypes=("fp32", "bf16"), zero=_WEIGHTS
    ),
    "gain 1e-6": Case(unchanged, ("formula",), gain=dict.fromkeys(DTYPES.values(), 1e-6)),
    "gain 1e6, fp16 1e3": Case(unchanged, gain=_GAIN),
    "growing c": Case(growing_state, ("lstm", "formula", "notebook"), sizes=(("steps", 12),)),
}


class Expected(NamedTuple):
    """What a case's results should be."""

    truth: dict[str, Tensor]
    """The reference's results in float64."""
    least: dict[str, float]
    """What each array's error is relative to, if the truth's largest magnitude is less."""
    eager: dict[str, float]
    """The largest errors of the reference in the dtype itself, over four orders of the units."""


class Measured(NamedTuple):
    """The array of a run that is nearest to its bound: its error, the eager loop's, and the bound."""

    array: str
    error: float
    eager: float
    bound: float


@functools.cache
def expected(name: str, cell: str, dtype: torch.dtype) -> Expected:
    """Return what a case's results in `dtype` should be."""
    case = CASES[name]
    problem = case.problem(cell, dtype)
    truth = _truth(problem)
    # Of a result that is zero the error is absolute, but for dz times x: where x is huge, so is a rounding error of dz.
    x = problem.draw()[0][0].abs().max().item()
    zero = {array: max(case.scale, x if array == "grad weight_ih" else 0.0) for array in case.zero}
    least = {array: zero.get(array, 1e-45) for array in truth}
    eager = dict.fromkeys(truth, 0.0)
    for order in range(4):
        # An order's errors may happen to cancel, in an array whose error is one element's.
        ordered = dataclasses.replace(problem, order=order)
        found = distances(ordered.run("reference", dtype), _truth(ordered), least)
        eager = {array: max(eager[array], found[array]) for array in truth}
    return Expected(truth, least, eager)


def _truth(problem: "Extreme") -> dict[str, Tensor]:
    return problem.run("reference", torch.float64, rounded=problem.dtype)


def distances(result: dict[str, Tensor], truth: dict[str, Tensor], least: dict[str, float]) -> dict[str, float]:
    """Return each array's largest error, relative to the truth's largest magnitude, or to `least` if that is more."""
    return {array: errors({array: result[array]}, {array: truth[array]}, least[array])[array][0] for array in truth}


def measure(name: str, cell: str, backend: str, dtype_name: str) -> Measured:
    """Run a row of the table, on "triton" in two slices if it has as many units, in two chunks."""
    dtype = DTYPES[dtype_name]
    problem, should = CASES[name].problem(cell, dtype), expected(name, cell, dtype)
    pins = dict(slices=min(2, problem.hidden), chunk=(problem.steps + 1) // 2)
    with cooperative(0, check_races=False), plan.forced(device=ROOMY, **pins):
        found = distances(problem.run(backend, dtype), should.truth, should.least)
    rows = [
        Measured(array, error, should.eager[array], 2 * should.eager[array] + FLOORS[dtype])
        for array, error in found.items()
    ]
    return max(rows, key=lambda row: excess(row.error, row.bound))


ROWS = [
    (name, cell, backend, dtype)
    for name, case in CASES.items()
    for cell in case.cells
    for backend in BACKENDS
    if backend != "triton" or cell in with_kernels()
    for dtype in case.dtypes
]
"""The rows of the page's first table: case, cell, backend, dtype."""


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + mpmath.exp(-z))


def _coupled(z: list, c: Any, vectors: list) -> tuple[Any, Any]:
    f = _sigmoid(z[0])
    c = f * c + (1 - f) * mpmath.tanh(z[1])
    return _sigmoid(z[2]) * mpmath.tanh(c), c


def _peephole(z: list, c: Any, vectors: list) -> tuple[Any, Any]:
    w_i, w_f, w_o = vectors
    c = _sigmoid(z[1] + w_f * c) * c + _sigmoid(z[0] + w_i * c) * mpmath.tanh(z[2])
    return _sigmoid(z[3] + w_o * c) * mpmath.tanh(c), c


def _gru(z: list, c: Any, vectors: list) -> tuple[Any, Any]:
    m, r, u, n = z
    h = (1 - _sigmoid(u)) * mpmath.tanh(n + _sigmoid(r) * m) + _sigmoid(u) * c
    return h, h


def _gru_reset_before(z: list, c: Any, vectors: list) -> tuple[Any, Any]:
    _, u, n = z
    h = (1 - _sigmoid(u)) * mpmath.tanh(n) + _sigmoid(u) * c
    return h, h


SEEN: dict[str, Callable[[list, list], list]] = {
    "gru_reset_before": lambda z, h: [_sigmoid(r) * v for r, v in zip(z[: len(h)], h, strict=True)],
}
"""What the weights of the second product meet, of cells that have one."""

UNIT_BY_UNIT: dict[str, Callable[[list, Any, list], tuple[Any, Any]]] = {
    "coupled": _coupled,
    "peephole": _peephole,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
    "elman_tanh": lambda z, c, vectors: (mpmath.tanh(z[0]),) * 2,
    "elman_relu": lambda z, c, vectors: (max(z[0], mpmath.mpf(0)),) * 2,
}
"""h and c of one unit after a step, of cells whose units do not see each other."""


class Exact:
    """The equations of `reference.layer` in numbers of a hundred digits, without lengths; for small problems."""

    def __init__(self, problem: Problem) -> None:
        self.cell, self.hidden, self.gain = problem.cell, problem.hidden, mpmath.mpf(problem.gate_gain)
        self.blocks = CELLS[problem.cell]
        inputs, _, grads = problem.draw()
        self.inputs = {name: self._exact(a.float()) for name, a in zip(problem.input_names, inputs, strict=True)}
        self.grads = [self._exact(g.float()) for g in grads]

    @staticmethod
    def _exact(a: Tensor) -> list:
        def convert(values):
            return [convert(v) for v in values] if isinstance(values, list) else mpmath.mpf(values)

        return convert(a.double().tolist())

    def outputs(self, inputs: dict[str, list]) -> tuple[list, ...]:
        """Return y, h_n and c_n."""
        h, y = inputs["h_0"], []
        c = inputs.get("c_0", h)
        for x in inputs["x"]:
            pairs = [self._row(*states, inputs) for states in zip(x, h, c, strict=True)]
            h, c = ([pair[k] for pair in pairs] for k in (0, 1))
            y.append(h)
        return (y, h, c)[: len(self.grads)]

    def _row(self, x: list, h: list, c: list, inputs: dict[str, list]) -> tuple[list, list]:
        """Return h and c of one row after a step."""
        hidden, z = self.hidden, [*inputs["bias"]]
        for k, weights in enumerate(inputs["weight_ih"], self.blocks.first_input * hidden):
            z[k] += mpmath.fdot(x, weights)
        seen = h
        for k, weights in enumerate(inputs["weight_hh"]):
            if k == self.blocks.at_once * hidden:
                seen = SEEN[self.cell](z, h)
            z[k] += mpmath.fdot(seen, weights)
        if self.cell == "layer_norm_lstm":
            return self._layer_norm_lstm(z, c, inputs)
        if self.cell in UNIT_BY_UNIT:
            vectors = [v for vector in self.blocks.vectors for v in inputs[vector.name]]
            units = [(z[k::hidden], c[k], vectors[k::hidden]) for k in range(hidden)]
            pairs = [UNIT_BY_UNIT[self.cell](*unit) for unit in units]
            return [h for h, _ in pairs], [c for _, c in pairs]
        gates = dict(zip(self.blocks.gates, (z[k : k + hidden] for k in range(0, len(z), hidden)), strict=True))
        if self.blocks.vector_blocks > 2:
            gates |= {gate: self._norm(gate, gates[gate], inputs) for gate in "fgo"}
        i = [1 / (1 + mpmath.exp(-v)) for v in gates["i"]]
        if self.cell != "lstm":
            top = max(gates["p"])
            powers = [mpmath.exp(v - top) for v in gates["p"]]
            p = [power / sum(powers) for power in powers]
            if self.cell.startswith("formula"):
                i = [self.gain * n * v for n, v in zip(self._norm("i", i, inputs), p, strict=True)]
            else:
                products = [s * v for s, v in zip(i, p, strict=True)]
                i = [self.gain * n for n in self._norm("i", products, inputs)]
        new_c = [
            v / (1 + mpmath.exp(-f)) + i_k * mpmath.tanh(g)
            for v, f, i_k, g in zip(c, gates["f"], i, gates["g"], strict=True)
        ]
        return [mpmath.tanh(v) / (1 + mpmath.exp(-o)) for v, o in zip(new_c, gates["o"], strict=True)], new_c

    def _layer_norm_lstm(self, z: list, c: list, inputs: dict[str, list]) -> tuple[list, list]:
        """Return h and c of the LSTM with layer normalisation after a step."""
        half, hidden = len(z) // 2, self.hidden
        names = ("ln_weight_hh", "ln_weight_ih", "ln_bias")
        terms = zip(self._standard(z[:half]), self._standard(z[half:]), *(inputs[name] for name in names), strict=True)
        a = [gamma_h * of_h + gamma_x * of_x + beta for of_h, of_x, gamma_h, gamma_x, beta in terms]
        i, f, g, o = (a[k : k + hidden] for k in range(0, half, hidden))
        new_c = [_sigmoid(f[k]) * c[k] + _sigmoid(i[k]) * mpmath.tanh(g[k]) for k in range(hidden)]
        affine = zip(self._standard(new_c), inputs["ln_weight_ch"], inputs["ln_bias_ch"], strict=True)
        u = [gamma * v + beta for v, gamma, beta in affine]
        return [_sigmoid(o[k]) * mpmath.tanh(u[k]) for k in range(hidden)], new_c

    def _standard(self, a: list) -> list:
        """Return numbers less their mean, over their deviation."""
        mean = sum(a) / len(a)
        rstd = 1 / mpmath.sqrt(sum((v - mean) ** 2 for v in a) / len(a) + mpmath.mpf(self.blocks.eps))
        return [(v - mean) * rstd for v in a]

    def _norm(self, gate: str, a: list, inputs: dict[str, list]) -> list:
        """Return the layer normalisation of a gate."""
        first, hidden = self.blocks.vectors[0].blocks.index(gate) * self.hidden, self.hidden
        weights, biases = (inputs[name][first : first + hidden] for name in ("ln_weight", "ln_bias"))
        return [w * v + b for v, w, b in zip(self._standard(a), weights, biases, strict=True)]

    def loss(self, inputs: dict[str, list]) -> Any:
        """Return Σ outgoing gradient · output."""
        return mpmath.fdot(flat(self.grads), flat(list(self.outputs(inputs))))

    def slope(self, name: str, signs: Tensor) -> Any:
        """Return the derivative of the loss in the direction of `signs`, which has the shape of an input."""
        step = mpmath.mpf(10) ** -50
        moved = _add(self.inputs[name], self._exact(signs * 1.0), step)
        return (self.loss(self.inputs | {name: moved}) - self.loss(self.inputs)) / step


def flat(values: list) -> list:
    """Return the numbers of lists of lists, in their order."""
    return [v for part in values for v in flat(part)] if isinstance(values, list) else [values]


def _add(a: list, b: list, factor: Any) -> list:
    return [_add(u, v, factor) for u, v in zip(a, b, strict=True)] if isinstance(a, list) else a + factor * b


DRIFT_BACKENDS = {"torch": 2**17, "reference": 2**13, "triton": 2**11}
"""How many steps each backend walks: an interpreted kernel takes a thousand times as long as a step of "torch"."""

DRIFT_COLUMNS = [("lstm", "torch"), ("formula", "torch"), ("formula", "reference"), ("lstm", "triton")]
"""Cell and backend of every column of the page's second table but the first."""

DRIFT_BOUND = 5e-5
"""On the error of y, whose values are between −1 and 1, in fp32."""


def long_walk(cell: str, backend: str, dtype: torch.dtype, steps: int) -> Tensor:
    """Return y [steps, 4] of a walk through up to 2**17 steps, in float64; about twenty of them are remembered."""
    inputs, _, _ = Problem(2**17, 1, 4, inputs_size=2, cell=cell).draw()
    inputs = [a.to(torch.float32).to(dtype) for a in inputs]
    inputs[0] = inputs[0][:steps]
    # With larger recurrent weights the formula's layer is close to chaos, where every rounding error grows.
    inputs[4] *= 0.2
    inputs[5][4:8] = 3.0
    problem = Problem(steps, 1, 4, inputs_size=2, cell=cell)
    with torch.no_grad(), cooperative(0, check_races=False), plan.forced(device=ROOMY, slices=1, chunk=512):
        return problem.call(inputs, None, backend)[0].double().squeeze(1)


@functools.cache
def drift(cell: str, backend: str, share: int = 1) -> dict[int, float]:
    """Return, for every t = 2^k, the largest error of y in fp32 since the power before, in a share of all steps."""
    steps = DRIFT_BACKENDS[backend] // share
    error = (long_walk(cell, backend, torch.float32, steps) - _exact_walk(cell, share)[:steps]).abs().amax(1)
    return {t: error[t // 2 : t].max().item() for t in (2**k for k in range(1, steps.bit_length()))}


@functools.cache
def _exact_walk(cell: str, share: int) -> Tensor:
    return long_walk(cell, "torch", torch.float64, DRIFT_BACKENDS["torch"] // share)
