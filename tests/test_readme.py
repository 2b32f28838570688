"""The README's examples run, and its figures about the gate hold."""

import pathlib
import re

import pytest
import torch

from novolstm_triton import NovoLSTM

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_example_runs():
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    scope = {}
    exec(example, scope)
    assert scope["y"].shape == (50, 8, 128)
    assert scope["layer"].weight_ih_l0.grad.abs().sum() > 0


@pytest.mark.parametrize("hidden", [128, 1024])
def test_gate_is_as_small_as_stated(hidden):
    (stated,) = re.findall(rf"(0\.\d+) at H = {hidden}\b", README)
    torch.manual_seed(0)
    layer, x = NovoLSTM(hidden, hidden), torch.randn(16, hidden)
    # At the first step h is zero.
    weight, *biases = (layer.get_parameter(name) for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"))
    z = x @ weight.t() + sum(biases)
    z_i, *_, z_p = z.chunk(5, dim=1)
    gate = torch.nn.functional.layer_norm(z_i.sigmoid(), (hidden,)) * z_p.softmax(dim=1)
    assert gate.square().mean().sqrt().item() == pytest.approx(float(stated), rel=0.05)
    assert (gate < 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
