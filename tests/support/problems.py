"""A layer's inputs, drawn from a seed, and the assertion that a backend makes of them what it should."""

import torch
from torch import Tensor

from novolstm_triton.problems import FLOORS, INPUTS, RESULTS, Problem, bounds, errors

__all__ = ["FLOORS", "INPUTS", "RESULTS", "Problem", "assert_as_exact_as_eager", "bounds", "errors"]


def assert_as_exact_as_eager(
    problem: Problem, result: dict[str, Tensor], dtype: torch.dtype, truth: dict[str, Tensor] | None = None
) -> None:
    """Require errors against float64 of at most twice those of the eager loop in `dtype`, plus the dtype's floor."""
    truth = truth or problem.run("reference", torch.float64, rounded=dtype)
    bound = bounds(problem, dtype, truth)
    for name, (largest, rms) in errors(result, truth).items():
        assert largest <= bound[name][0], f"{name}: error {largest:.1e}, bound {bound[name][0]:.1e}"
        assert rms <= bound[name][1], f"{name}: rms error {rms:.1e}, bound {bound[name][1]:.1e}"
