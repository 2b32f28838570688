"""A layer's inputs, drawn from a seed, and the assertion that a backend makes of them what it should."""

import torch
from torch import Tensor

from novolstm_triton.problems import FLOORS, NOVOLSTM, Problem, bounds, errors

__all__ = ["FLOORS", "INPUTS", "NOVOLSTM", "RESULTS", "Problem", "assert_as_exact_as_eager", "bounds", "errors"]


INPUTS = Problem(1, 1, 1).input_names
"""The names of NovoLSTM's inputs."""

RESULTS = Problem(1, 1, 1).result_names
"""And of its results."""


def assert_as_exact_as_eager(
    problem: Problem,
    result: dict[str, Tensor],
    dtype: torch.dtype,
    truth: dict[str, Tensor] | None = None,
    conditioned: bool = False,
) -> None:
    """Require errors against float64 of at most twice those of the eager loop in `dtype`, plus the dtype's floor.

    Args:
        problem: what was computed.
        result: its results in `dtype`, or some of them.
        dtype: to which the inputs were rounded.
        truth: what the results should be, or None: those of the reference in float64.
        conditioned: whether to allow, besides, ten times what the rounding of the inputs alone makes of the results.
            A problem that was not chosen with care may make hundreds of times as much of a rounding error as others.
    """
    truth = truth or problem.run("reference", torch.float64, rounded=dtype)
    bound = bounds(problem, dtype, truth)
    slack = errors(problem.run("reference", torch.float64), truth) if conditioned else {}
    for name, found in errors(result, truth).items():
        moved = slack.get(name, (0.0, 0.0))
        for kind, error, most, shift in zip(("error", "rms error"), found, bound[name], moved, strict=True):
            assert error <= most + 10 * shift, f"{name}: {kind} {error:.1e}, bound {most + 10 * shift:.1e}"
