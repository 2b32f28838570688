"""A layer's inputs, drawn from a seed, and what every backend should make of them."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from novolstm_triton.functional import novolstm, novolstm_bidirectional
from novolstm_triton.reference import RECURRENT_GATES

INPUTS = ("x", "h_0", "c_0", "weight_ih", "weight_hh", "bias", "ln_weight", "ln_bias")
RESULTS = ("y", "h_n", "c_n", *(f"grad {name}" for name in INPUTS))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options of one call; `inputs` and `output_grads` follow from them and the seed."""

    steps: int
    batch: int
    hidden: int
    inputs_size: int = 3
    variant: str = "formula"
    lengths: bool = False
    reverse: bool = False
    bidirectional: bool = False
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        """Return sizes and options as one short word."""
        flags = [self.variant, *(flag for flag in ("lengths", "reverse", "bidirectional") if getattr(self, flag))]
        return f"T{self.steps}-B{self.batch}-H{self.hidden}-{'-'.join(flags)}"

    @property
    def gate_gain(self) -> float:
        """A gain with which the gate matters: without one the formula's is O(1/H)."""
        return float(self.hidden) if self.variant == "formula" else 1.0

    def draw(self) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """Return the eight inputs in float64, the lengths, and gradients of y, h_n and c_n.

        All but x and the lengths have a leading dimension of two if the problem is bidirectional.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        hidden, recurrent = self.hidden, RECURRENT_GATES[self.variant] * self.hidden
        both = (2,) if self.bidirectional else ()
        inputs = [
            normal(self.steps, self.batch, self.inputs_size),
            normal(*both, self.batch, hidden),
            normal(*both, self.batch, hidden),
            normal(*both, 5 * hidden, self.inputs_size, scale=self.inputs_size**-0.5),
            normal(*both, recurrent, hidden, scale=hidden**-0.5),
            normal(*both, 5 * hidden, scale=0.5),
            1 + normal(*both, hidden, scale=0.3),
            normal(*both, hidden, scale=0.3),
        ]
        grads = [
            normal(self.steps, self.batch, math.prod(both) * hidden),
            normal(*both, self.batch, hidden),
            normal(*both, self.batch, hidden),
        ]
        lengths = torch.randint(0, self.steps + 1, (self.batch,), generator=generator) if self.lengths else None
        return inputs, lengths, grads

    def run(self, backend: str, dtype: torch.dtype, rounded: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y, h_n, c_n and every gradient, computed in `dtype` from inputs that were rounded to `rounded`."""
        inputs, lengths, grads = self.draw()
        rounded = rounded or dtype
        inputs = [a.to(self.device, rounded).to(dtype).requires_grad_() for a in inputs]
        lengths = None if lengths is None else lengths.to(self.device)
        options: dict[str, Any] = dict(gate_gain=self.gate_gain, variant=self.variant, lengths=lengths, backend=backend)
        if self.bidirectional:
            outputs = novolstm_bidirectional(*inputs, **options)
        else:
            outputs = novolstm(*inputs, reverse=self.reverse, **options)
        gradients = torch.autograd.grad(outputs, inputs, [g.to(self.device, rounded).to(dtype) for g in grads])
        return dict(zip(RESULTS, (*(o.detach() for o in outputs), *gradients), strict=True))


def errors(result: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return each array's largest and root-mean-square error, relative to the truth's largest magnitude."""
    table = {}
    for name, expected in truth.items():
        # An array of nothing but rounding errors (dγ of a single unit) has no scale of its own: take 1e-6 at least.
        scale = expected.abs().max().clamp_min(1e-6).item()
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
