"""Validation, choice of backend and mixed precision of `functional.novolstm`."""

import threading

import pytest
import torch

from novolstm_triton import plan, use_backend
from novolstm_triton.engines import launch
from novolstm_triton.functional import novolstm, resolve_backend
from novolstm_triton.testing import cooperative

from .support.problems import INPUTS, Problem, errors

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BACKENDS = ("reference", "torch", "triton")


def arguments(**sizes) -> dict[str, torch.Tensor]:
    inputs, _, _ = Problem(**(dict(steps=3, batch=2, hidden=4) | sizes)).draw()
    return {name: a.float() for name, a in zip(INPUTS, inputs, strict=True)}


def test_auto_takes_triton_on_a_gpu_and_torch_elsewhere():
    assert resolve_backend("auto", GPU) == "triton"
    assert resolve_backend("auto", CPU) == "torch"


def test_call_outranks_context_outranks_environment(monkeypatch):
    monkeypatch.setenv("NOVOLSTM_BACKEND", "triton")
    assert resolve_backend("auto", CPU) == "triton"
    with use_backend("reference"):
        assert resolve_backend("auto", CPU) == "reference"
        assert resolve_backend("torch", CPU) == "torch"
        with use_backend("torch"):
            assert resolve_backend("auto", CPU) == "torch"
        assert resolve_backend("auto", CPU) == "reference"
    assert resolve_backend("auto", CPU) == "triton"


def test_unknown_backends(monkeypatch):
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'cuda'"):
        novolstm(**arguments(), backend="cuda")
    with pytest.raises(ValueError, match="use_backend: expected one of"), use_backend("cuda"):
        pass
    monkeypatch.setenv("NOVOLSTM_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"NOVOLSTM_BACKEND: expected one of .*, got 'fast'"):
        novolstm(**arguments())


def test_triton_on_a_cpu_tensor_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on a GPU, got cpu"):
        novolstm(**arguments(), backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(dict(x=torch.zeros(3, 2, 9)), ValueError, "weight_ih: expected shape .20, 9., got", id="inputs"),
        pytest.param(dict(x=torch.zeros(3, 2)), ValueError, "x: expected .T, B, I., got shape", id="rank"),
        pytest.param(dict(x=torch.zeros(0, 2, 3)), ValueError, "at least one step", id="no-steps"),
        pytest.param(dict(x=torch.zeros(3, 2, 3).long()), TypeError, "x: expected a floating dtype", id="integer"),
        pytest.param(dict(x=[1.0]), TypeError, "x: expected a Tensor, got list", id="list"),
        pytest.param(
            dict(c_0=torch.zeros(3, 4)), ValueError, r"c_0: expected shape \[2, 4\], got \[3, 4\]", id="state"
        ),
        pytest.param(dict(h_0=torch.zeros(2, 4).double()), TypeError, "h_0: expected the dtype of x", id="dtype"),
        pytest.param(dict(bias=torch.zeros(19)), ValueError, r"bias: expected shape \[20\], got \[19\]", id="bias"),
        pytest.param(dict(weight_hh=torch.zeros(16, 4)), ValueError, "weight_hh: expected shape .20, 4.", id="blocks"),
        pytest.param(dict(variant="paper"), ValueError, "variant: expected one of .*'paper'", id="variant"),
        pytest.param(dict(lengths=torch.tensor([1, 4])), ValueError, "values from 0 to 3, got 1 to 4", id="too-long"),
        pytest.param(dict(lengths=torch.tensor([1, -1])), ValueError, "values from 0 to 3, got -1", id="negative"),
        pytest.param(dict(lengths=torch.tensor([1])), ValueError, "lengths: expected shape .2., got .1.", id="rows"),
        pytest.param(dict(lengths=[1, 2]), TypeError, "lengths: expected an integer Tensor, got list", id="no-tensor"),
        pytest.param(dict(lengths=torch.ones(2)), TypeError, "lengths: .* got torch.float32", id="float-lengths"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        novolstm(**(arguments() | changes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bias_is_a_zero_bias(backend):
    with cooperative():
        given = arguments()
        zero = novolstm(**(given | dict(bias=torch.zeros(20))), backend=backend)
        for a, b in zip(novolstm(**(given | dict(bias=None)), backend=backend), zero, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_sets_the_dtype_of_the_layer(backend):
    given = {name: a.requires_grad_() for name, a in arguments().items()}
    with cooperative(), torch.autocast("cpu", torch.bfloat16):
        y, h_n, c_n = novolstm(**given, backend=backend)
        assert {y.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
        with torch.autocast("cpu", enabled=False):
            assert novolstm(**given, backend=backend)[0].dtype == torch.float32
    with cooperative():
        y.float().sum().backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in given.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_only_casts_what_comes_in(backend):
    """Autocast is for the user's operators: inside ours it would round every product."""
    given = arguments(seed=1)
    with cooperative():
        with torch.autocast("cpu", torch.bfloat16):
            inside = novolstm(**given, backend=backend)
        outside = novolstm(**{name: a.bfloat16() for name, a in given.items()}, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_inside_autocast_keeps_its_precision(backend):
    gradients = []
    for enabled in (False, True):
        given = {name: a.requires_grad_() for name, a in arguments(seed=1).items()}
        with cooperative():
            y, _, _ = novolstm(**given, backend=backend)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y.sum().backward()
        gradients.append([a.grad for a in given.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_differentiating_twice_goes_through_the_reference(backend):
    second = []
    for name in (backend, "reference"):
        with cooperative():
            given = {name: a.requires_grad_() for name, a in arguments().items()}
            y, _, _ = novolstm(**given, backend=name)
            (first,) = torch.autograd.grad(y.square().sum(), [given["x"]], create_graph=True)
            second.append(torch.autograd.grad(first.sum(), [given["weight_hh"]])[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_kept_without_grad(backend):
    with cooperative():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            novolstm(**arguments(), backend=backend)
        assert kept == []


def test_pins_reach_the_torch_backend():
    given = arguments(steps=5)
    whole = novolstm(**given, backend="torch")
    with plan.forced(chunk=2):
        parts = novolstm(**given, backend="torch")
    assert errors({"y": parts[0]}, {"y": whole[0]})["y"][0] < 1e-6


def test_pins_hold_in_backward_whichever_thread_runs_it(monkeypatch):
    """On a GPU autograd's own thread runs backward, and a context variable's value stays behind."""
    with cooperative():
        given = {name: a.requires_grad_() for name, a in arguments().items()}
        with plan.forced(block_b=32):
            y, _, _ = novolstm(**given, backend="triton")
        seen = []
        original = launch.launch_plan
        monkeypatch.setattr(launch, "launch_plan", lambda *a: seen.append(original(*a)) or seen[-1])
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
        assert [p.backward.block_b for p in seen] == [32]


@pytest.mark.parametrize(
    ("setting", "dtype", "expected"),
    [
        pytest.param("highest", torch.float32, "ieee", id="fp32-highest"),
        pytest.param("high", torch.float32, "tf32", id="fp32-high"),
        pytest.param("medium", torch.float32, "tf32", id="fp32-medium"),
        pytest.param("medium", torch.bfloat16, "ieee", id="bf16"),
    ],
)
def test_float32_products_follow_the_matmul_precision(setting, dtype, expected):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert launch.product_precision(torch.zeros(1, dtype=dtype)) == expected
    finally:
        torch.set_float32_matmul_precision(before)
