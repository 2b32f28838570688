"""Backends against TensorFlow's own autodiff: see data/README.md."""

import pathlib

import numpy as np
import pytest
import torch
from torch import Tensor

from novolstm_triton.functional import novolstm
from novolstm_triton.testing import cooperative

DATA = pathlib.Path(__file__).parent / "data"
BACKENDS = ("reference", "torch", "triton")
# The names that the recordings have for our gates i|f|g|o|p.
GATES = ("i", "f", "c", "o", "i_prime")
CASES = sorted(path.stem for path in DATA.glob("*.npz"))


def load(name: str) -> tuple[str, dict[str, Tensor]]:
    """Return the variant and all arrays of one recording."""
    with np.load(DATA / f"{name}.npz") as file:
        return name.split("_")[0], {key: torch.from_numpy(value) for key, value in file.items()}


def stack(arrays: dict[str, Tensor], kind: str, prefix: str) -> Tensor:
    """Return the blocks <prefix>.<kind>_<gate> as rows i|f|g|o|p, transposed where they are matrices."""
    names = [f"{prefix}.{kind}_{gate}" for gate in GATES]
    return torch.cat(
        [arrays[name].t() if arrays[name].dim() == 2 else arrays[name] for name in names if name in arrays]
    )


def parameters(arrays: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """Return weight_ih, weight_hh, bias, ln_weight and ln_bias, or (prefix "grad") their gradients."""
    return [*(stack(arrays, kind, prefix) for kind in "wub"), arrays[f"{prefix}.gamma"], arrays[f"{prefix}.beta"]]


def test_recordings_are_there():
    assert {name.split("_")[0] for name in CASES} == {"formula", "notebook"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_tensorflow(backend, name):
    variant, arrays = load(name)
    inputs = [arrays["x"].transpose(0, 1), arrays["h0"], arrays["c0"], *parameters(arrays, "w")]
    inputs = [a.clone().requires_grad_() for a in inputs]
    output_grads = (arrays["gy"].transpose(0, 1), arrays["gh"], arrays["gc"])
    with cooperative():
        outputs = novolstm(*inputs, eps=arrays["eps"].item(), variant=variant, backend=backend)
        gradients = torch.autograd.grad(outputs, inputs, output_grads)

    names = ("y", "hn", "cn", "gx", "gh0", "gc0", "weight_ih", "weight_hh", "bias", "ln_weight", "ln_bias")
    expected = [arrays["y"].transpose(0, 1), arrays["hn"], arrays["cn"]]
    expected += [arrays["gx"].transpose(0, 1), arrays["gh0"], arrays["gc0"], *parameters(arrays, "grad")]
    for label, got, want in zip(names, (*outputs, *gradients), expected, strict=True):
        error = (got - want).abs().max() / want.abs().max()
        assert error <= 1e-5, f"{label}: error {error:.1e} of the largest magnitude"
