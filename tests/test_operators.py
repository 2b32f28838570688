"""The two custom operators by torch.library's own checks: schema, fakes, autograd, tracing with any sizes."""

import pytest
import torch

from novolstm_triton import ops
from novolstm_triton.testing import cooperative

from .support.problems import Problem

PROBLEMS = [
    Problem(steps=2, batch=2, hidden=3),
    Problem(steps=2, batch=2, hidden=3, cell="lstm", lengths=True),
    Problem(steps=2, batch=2, hidden=3, cell="notebook", reverse=True, h_mask=True),
    Problem(steps=2, batch=2, hidden=3, cell="formula_all", zoneout="masks"),
    Problem(steps=2, batch=2, hidden=3, cell="notebook_all", zoneout="average", lengths=True, reverse=True),
    Problem(steps=2, batch=2, hidden=3, cell="lstm", reverse=True, h_mask=True, zoneout="masks"),
]
BOTH_WAYS = Problem(steps=2, batch=2, hidden=3, lengths=True, bidirectional=True)
CASES = [
    pytest.param(problem, backend, id=f"{backend}-{problem}")
    for backend, problems in (("torch", PROBLEMS), ("triton", [PROBLEMS[-1], BOTH_WAYS]))
    for problem in problems
]


def operands(problem, backend, requires_grad):
    """Return the gradients of the results, and the arguments of the forward operator: tensors and options."""
    dtype = torch.float32
    inputs, lengths, grads = problem.draw()
    options = problem.options()
    h_mask = options.get("h_mask")
    extras = (
        None if lengths is None else lengths.int(),
        None if h_mask is None else h_mask.to(dtype),
        options.get("zoneout_mask"),
    )
    # The last operand of a cell is all of its vectors.
    inputs[6:] = [torch.cat(inputs[6:], -1) if inputs[6:] else inputs[5].new_empty(*inputs[5].shape[:-1], 0)]
    tensors = [a.to(dtype).requires_grad_(requires_grad) for a in inputs]
    numbers = [1e-5, options.get("gate_gain", 1.0), *options.get("zoneout", (0.0, 0.0))]
    return [g.to(dtype) for g in grads], (*tensors, *extras), (numbers, problem.cell, problem.reverse, backend, 1)


@pytest.mark.parametrize(("problem", "backend"), CASES)
def test_forward_passes_opcheck(problem, backend):
    _, tensors, options = operands(problem, backend, requires_grad=True)
    with cooperative():
        torch.library.opcheck(ops.forward_op, (*tensors, *options))


def check_backward(problem, backend, needs=None, requires_grad=False):
    grads, tensors, options = operands(problem, backend, requires_grad)
    needs = needs or [True] * 7
    with cooperative():
        y, _, _, c_border = (result.detach() for result in ops.forward_op(*tensors, *options))
        torch.library.opcheck(ops.backward_op, (*grads, *tensors, y, c_border, *options, needs))


@pytest.mark.parametrize(("problem", "backend"), CASES)
def test_backward_passes_opcheck(problem, backend):
    check_backward(problem, backend)


@pytest.mark.parametrize("needs", [[True, False] * 3 + [True], [False, True] * 3 + [False]], ids=["even", "odd"])
def test_backward_of_some_passes_opcheck(needs):
    check_backward(PROBLEMS[0], "torch", needs)


@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=str)
def test_backward_passes_opcheck_with_its_own_derivatives(problem):
    check_backward(problem, "torch", requires_grad=True)
