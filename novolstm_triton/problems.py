"""A layer's inputs, drawn from a seed, and the results that every backend should give for them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from novolstm_triton.cells import CELLS, LAYER_NORMS, VARIANTS, novolstm_cell
from novolstm_triton.functional import lstm, novolstm, recurrence

NOVOLSTM = {novolstm_cell(v, n): dict(variant=v, layer_norm=n) for v in VARIANTS for n in LAYER_NORMS}
"""The options of `novolstm` by the cell that they name."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options of one call; `inputs` and `output_grads` follow from them and the seed."""

    steps: int
    batch: int
    hidden: int
    inputs_size: int = 3
    cell: str = "formula"
    lengths: bool = False
    reverse: bool = False
    bidirectional: bool = False
    h_mask: bool = False
    zoneout: str = "none"
    """"none", "masks" or "average"."""
    projection: int = 0
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        """Return sizes and options as one short word."""
        flags = [
            self.cell,
            *(flag for flag in ("lengths", "reverse", "bidirectional", "h_mask") if getattr(self, flag)),
        ]
        flags += [] if self.zoneout == "none" else [f"zoneout_{self.zoneout}"]
        flags += [f"P{self.projection}"] if self.projection else []
        return f"T{self.steps}-B{self.batch}-H{self.hidden}-{'-'.join(flags)}"

    @property
    def gate_gain(self) -> float:
        """A gain with which the gate matters: without one the formula's is O(1/H)."""
        return float(self.hidden) if NOVOLSTM.get(self.cell, {}).get("variant") == "formula" else 1.0

    def draw(self) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """Return the inputs in float64, the lengths, and gradients of the outputs.

        All but x and the lengths have a leading dimension of two if the problem is bidirectional.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        hidden, cell, seen = self.hidden, CELLS[self.cell], self.projection or self.hidden
        both = (2,) if self.bidirectional else ()
        units = {"h": seen, "c": hidden}
        shapes = cell.shapes(self.inputs_size, hidden, projected=self.projection)
        inputs = [
            normal(self.steps, self.batch, self.inputs_size),
            *(normal(*both, self.batch, units[state]) for state in cell.states),
            normal(*both, *shapes["weight_ih"], scale=self.inputs_size**-0.5),
            normal(*both, *shapes["weight_hh"], scale=hidden**-0.5),
            normal(*both, len(cell.blocks) * hidden, scale=0.5),
        ]
        for vector in cell.vectors:
            inputs.append((vector.initial or 0) + normal(*both, *shapes[vector.name], scale=0.3))
        grads = [
            normal(self.steps, self.batch, math.prod(both) * seen),
            *(normal(*both, self.batch, units[state]) for state in cell.states),
        ]
        lengths = torch.randint(0, self.steps + 1, (self.batch,), generator=generator) if self.lengths else None
        if self.projection:
            inputs.append(normal(*both, seen, hidden, scale=hidden**-0.5))
        return inputs, lengths, grads

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs that `draw` returns."""
        cell = CELLS[self.cell]
        states, vectors = (f"{state}_0" for state in cell.states), (vector.name for vector in cell.vectors)
        projection = ("weight_hr",) if self.projection else ()
        return ("x", *states, "weight_ih", "weight_hh", "bias", *vectors, *projection)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of what `call` returns."""
        return ("y", *(f"{state}_n" for state in CELLS[self.cell].states))

    @property
    def result_names(self) -> tuple[str, ...]:
        """The names of what `run` returns, in its order."""
        return (*self.output_names, *(f"grad {name}" for name in self.input_names))

    def options(self) -> dict[str, Any]:
        """Return the call's options except the lengths and the backend; masks are drawn from the seed."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        directions = 2 if self.bidirectional else 1
        options: dict[str, Any] = {}
        if self.cell in NOVOLSTM:
            options |= dict(NOVOLSTM[self.cell], gate_gain=self.gate_gain)
        if not self.bidirectional:
            options["reverse"] = self.reverse
        if self.h_mask:
            shape = (*[2] * self.bidirectional, self.batch, self.hidden)
            options["h_mask"] = (torch.rand(shape, generator=generator) < 0.5).double() * 2
        if self.zoneout == "masks":
            shape = (self.steps, self.batch, directions * self.hidden)
            options["zoneout_mask"] = torch.randint(0, 4, shape, generator=generator, dtype=torch.uint8)
        elif self.zoneout == "average":
            options["zoneout"] = (0.25, 0.125)[: len(CELLS[self.cell].states)]
        return options

    def call(
        self, inputs: Sequence[Tensor], lengths: Tensor | None, backend: str, **changes: Any
    ) -> tuple[Tensor, ...]:
        """Return y and the states of inputs like those of `draw`, in any dtype; `changes` replace some of `options`."""
        options, device = self.options() | changes, inputs[0].device
        for name, dtype in (("h_mask", inputs[0].dtype), ("zoneout_mask", torch.uint8)):
            if options.get(name) is not None:
                options[name] = options[name].to(device, dtype)
        if self.projection:
            *inputs, options["weight_hr"] = inputs
        options |= dict(lengths=lengths, backend=backend)
        if self.cell == "lstm":
            return lstm(*inputs, **options)
        if self.cell in NOVOLSTM:
            return novolstm(*inputs, **options)
        cell = CELLS[self.cell]
        count = 1 + len(cell.states)
        weight_ih, weight_hh, bias, *vectors = inputs[count:]
        y, states = recurrence(cell, inputs[0], inputs[1:count], weight_ih, weight_hh, bias, vectors, **options)
        return y, *states

    def run(self, backend: str, dtype: torch.dtype, rounded: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y, h_n, c_n and every gradient, computed in `dtype` from inputs that were rounded to `rounded`."""
        inputs, lengths, grads = self.draw()
        rounded = rounded or dtype
        inputs = [a.to(self.device, rounded).to(dtype).requires_grad_() for a in inputs]
        lengths = None if lengths is None else lengths.to(self.device)
        outputs = self.call(inputs, lengths, backend)
        outgoing = [g.to(self.device, rounded).to(dtype) for g in grads]
        gradients = torch.autograd.grad(outputs, inputs, outgoing)
        results = dict(zip(self.output_names, (o.detach() for o in outputs), strict=True))
        return results | {f"grad {name}": g for name, g in zip(self.input_names, gradients, strict=True)}


def errors(result: dict[str, Tensor], truth: dict[str, Tensor], least: float = 1e-6) -> dict[str, tuple[float, float]]:
    """Return each array's largest and root-mean-square error, relative to the truth's largest magnitude."""
    table = {}
    for name, expected in truth.items():
        # An array of nothing but rounding errors (dγ of a single unit) has no scale of its own: take 1e-6 at least.
        scale = max(expected.abs().max().item(), least)
        difference = (result[name].double() - expected.double()) / scale
        table[name] = (difference.abs().max().item(), difference.square().mean().sqrt().item())
    return table


FLOORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Error allowed on top of twice the eager error, relative to an array's largest magnitude: about two roundings."""


def bounds(problem: Problem, dtype: torch.dtype, truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return each array's bounds on `errors`: twice those of the eager loop in `dtype`, plus the dtype's floor."""
    eager = errors(problem.run("reference", dtype), truth)
    floor = FLOORS[dtype]
    return {name: (2 * largest + floor, 2 * rms + floor) for name, (largest, rms) in eager.items()}


def compare(
    problem: Problem, backend: str, dtype: torch.dtype, truth_backend: str = "reference"
) -> dict[str, tuple[float, float]]:
    """Return each array's error and its bound: the largest error or the root mean square, whichever is nearer to it.

    Args:
        problem: what is computed.
        backend: what computes it, in `dtype`.
        dtype: to which the inputs are rounded for all.
        truth_backend: what computes it in float64.
    """
    found = errors(problem.run(backend, dtype), truth := problem.run(truth_backend, torch.float64, rounded=dtype))
    allowed = bounds(problem, dtype, truth)
    return {name: max(zip(found[name], allowed[name], strict=True), key=lambda pair: excess(*pair)) for name in allowed}


def excess(error: float, bound: float) -> float:
    """Return an error in units of its bound, infinity if it is not a number: more than 1 fails."""
    return error / bound if math.isfinite(error) else math.inf
