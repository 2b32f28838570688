"""What stays in memory between forward and backward."""

import contextlib

import pytest
import torch

from novolstm_triton import NovoLSTM, plan
from novolstm_triton.testing import cooperative

from .support.problems import Problem


def kept_bytes(layer: torch.nn.Module, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the bytes of every storage that the graph of layer(x) keeps, parameters not counted, and y."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = layer(x)
    for parameter in layer.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()), y


@pytest.mark.parametrize("variant", ["formula", "notebook"])
def test_keeps_little_more_than_input_and_output(variant):
    steps, batch, hidden = 2048, 16, 256
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    kept, y = kept_bytes(NovoLSTM(hidden, hidden, variant=variant, backend="torch"), x)
    both = x.nbytes + y.nbytes
    # The lower bound shows that the hooks saw x and y at all.
    assert both <= kept <= 1.6 * both, f"kept {kept / both:.2f} times the bytes of x and y"


def test_the_reference_keeps_more():
    """The measurement itself: an autograd graph over the steps keeps many values a unit."""
    x = torch.randn(64, 4, 32, requires_grad=True)
    kept, y = kept_bytes(NovoLSTM(32, 32, backend="reference"), x)
    assert kept > 5 * (x.nbytes + y.nbytes)


SIZES = ((1, 1), (7, 2), (8, 4), (5, 9))
WAYS = {
    "torch-fp64": ("torch", torch.float64),
    "torch-fp32": ("torch", torch.float32),
    "torch-bf16": ("torch", torch.bfloat16),
    "triton-fp32": ("triton", torch.float32),
    "triton-fp16": ("triton", torch.float16),
}


@pytest.mark.parametrize("cell", ["lstm", "formula"])
@pytest.mark.parametrize(
    ("steps", "chunk", "backend", "dtype"),
    [
        pytest.param(*sizes, *way, id=f"T{sizes[0]}-chunk{sizes[1]}-{name}")
        for sizes in SIZES
        for name, way in WAYS.items()
        # A single step on a CPU runs in PyTorch's operators, which keep what they need.
        if sizes[0] > 1 or name not in ("torch-fp64", "torch-fp32")
    ],
)
def test_keeps_what_is_given_y_and_c_at_every_border_exactly(steps, chunk, cell, backend, dtype):
    """Of the call's own: y in the dtype of x, and c in fp32, or fp64, before every chunk and after the last."""
    problem = Problem(steps, 2, 3, cell=cell)
    inputs = [a.to(dtype).requires_grad_() for a in problem.draw()[0]]
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        plan.forced(chunk=chunk),
        cooperative() if backend == "triton" else contextlib.nullcontext(),
    ):
        y, _, _ = problem.call(inputs, None, backend)
    borders = -(-steps // chunk) + 1
    own = y.nbytes + borders * 2 * 3 * (8 if dtype == torch.float64 else 4)
    assert sum(saved.values()) == sum(a.nbytes for a in inputs) + own
