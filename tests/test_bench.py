"""bench/layers.py, and the throughput suite once, on a single small size."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
layers, report = map(importlib.import_module, ("bench.layers", "bench.report"))

SMALL = layers.Sizes(steps=3, batch=2, inputs=5, hidden=4)


@pytest.mark.parametrize("name", ["torch", "reference", "nn.LSTM"])
def test_layers_run_on_a_cpu(name):
    layer = layers.Layer(name, SMALL, "fp32", "cpu")
    assert layer.plan() is None
    layer.run("forward")
    assert layer.x.grad is None
    layer.run("forward_backward")
    assert layer.x.grad is not None
    assert layer.x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in layer.module.parameters())
    layer.clear()
    assert layer.x.grad is None


def test_backends_compute_the_same():
    ours, reference = (layers.Layer(name, SMALL, "fp32", "cpu") for name in ("torch", "reference"))
    for layer in (ours, reference):
        layer.run("forward_backward")
    torch.testing.assert_close(ours.x.grad, reference.x.grad)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(("gru", "fp32"), "layer: expected"), (("torch", "tf32"), "tf32 for nn.LSTM only"), (("torch", "int8"), "dtype")],
    ids=str,
)
def test_unknown_layers_are_refused(arguments, complaint):
    name, dtype = arguments
    with pytest.raises(ValueError, match=complaint):
        layers.Layer(name, SMALL, dtype, "cpu")
    with pytest.raises(ValueError, match="passes"):
        layers.Layer("torch", SMALL, "fp32", "cpu").run("backward")


def test_flashrnn_is_called_in_its_own_layout(monkeypatch):
    """A stand-in for the package, which needs a GPU: it takes [B, T, G, N, D] and returns [S, B, T, N, D]."""
    seen = []

    class Package:
        @staticmethod
        def flashrnn(gates, weight, bias, *, function, backend):
            seen.append((gates.shape, weight.shape, bias.shape, function))
            h = gates[:, :, 0] + weight.sum() + bias[0]
            return torch.stack([h, h]), None

    monkeypatch.setitem(sys.modules, "flashrnn", Package)
    layer = layers.Layer("flashrnn", SMALL, "fp32", "cpu")
    layer.run("forward_backward")
    assert seen == [((2, 3, 4, 1, 4), (4, 1, 4, 4), (4, 1, 4), "lstm")]
    assert layer.module(layer.x)[0].shape == (3, 2, 4)


def test_suite_measures_time_memory_and_first_call(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", f"--benchmark-json={results}"]
    command += [
        "--benchmark-max-time=0.01",
        "--benchmark-min-rounds=1",
        "-p",
        "no:cacheprovider",
        "-k",
        "torch-fp32 and (T32 or first or (memory and T128))",
    ]
    # Nor is the suite in there a worker of this one, which would measure nothing.
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if torch.cuda.is_available():
        pytest.skip("other sizes on a GPU")
    assert done.returncode == 0, done.stdout + done.stderr
    environment, rows = report.load(results)
    short, long = rows
    assert {"steps": 32, "layer": "torch", "dtype": "fp32"}.items() <= short.items()
    for passes in ("forward", "forward_backward"):
        us_per_step = short[f"{passes}_us_per_step"]
        assert short[f"{passes}_tokens_per_s"] == pytest.approx(16 / us_per_step * 1e6)
        assert 0 < short[f"{passes}_roofline_fraction"] < 2
    assert long["first_call_s"] > 0
    # x, y, dy-sized buffers at the least: T·B·H fp32 values each.
    assert long["peak_mib"] > 128 * 16 * 128 * 4 / 2**20
    assert "machine" not in environment
    assert json.loads(results.read_text())["machine_info"]["torch"] == torch.__version__
