"""PyTorch's own inputs for tests of nn.LSTM, and the checks of its generic module tests, on our LSTM."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

from novolstm_triton import LSTM

from .twins import BACKENDS, NO_ONEDNN, assert_close, copied, differentiate, lstm_like, running_on

pytestmark = pytest.mark.filterwarnings(NO_ONEDNN)

INFO = next(info for info in module_db if info.module_cls is nn.LSTM)

CHECKS = {
    "test_forward": "test_forward_is_that_of_nn_lstm, test_unbatched_input_is_a_batch_of_one",
    "test_factory_kwargs": "test_factory_arguments_reach_all_parameters",
    "test_device_ctx_init": "test_factory_arguments_reach_all_parameters",
    "test_multiple_device_transfer": "test_to_the_meta_device_and_back",
    "test_to_empty": "test_to_the_meta_device_and_back",
    "test_to": "test_conversion_to_another_dtype",
    "test_repr": "test_repr_is_that_of_nn_lstm",
    "test_save_load": "test_copies_compute_the_same",
    "test_pickle": "test_copies_compute_the_same",
    "test_non_contiguous_tensors": "test_strides_change_nothing",
    "test_grad": "test_gradients_of_both_orders",
    "test_gradgrad": "test_gradients_of_both_orders",
    "test_if_train_and_eval_modes_differ": "test_modes_differ_by_dropout_only",
    "test_errors": "test_error_inputs_raise",
}
"""PyTorch's generic module tests, and the tests below that make the same checks."""

NOT_APPLICABLE = {
    "test_check_inplace": "the layer has no argument inplace",
    "test_memory_format": "channels_last is a format of images; a sequence has three dimensions at most",
    "test_cpu_gpu_parity": "needs a GPU; tests/test_gpu.py compares the kernels with the CPU's reference",
    "test_jit": "the layer is a custom operator: torch.compile and torch.export take it, TorchScript does not",
}
"""The others, with the reason."""

NOT_RUN: dict[str, str] = {}
"""Inputs by their name that our LSTM is not given, with the reason."""


def inputs(dtype: torch.dtype = torch.float64, requires_grad: bool = False, training: bool = True) -> dict:
    """Return PyTorch's inputs by a name made of the arguments."""
    torch.manual_seed(3)
    arguments = dict(device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    named = {}
    for sample in INFO.module_inputs_func(INFO, **arguments):
        args, options = sample.constructor_input.args, sample.constructor_input.kwargs
        words = [*map(str, args), *(f"{name}={value}" for name, value in options.items())]
        call = sample.forward_input
        shapes = [list(call.args[0].shape), *(f"{name}=" for name in call.kwargs), *["hx"] * (len(call.args) > 1)]
        named[" ".join([*words, *map(str, shapes)])] = sample
    return named


CASES = [pytest.param(name, id=name.replace(" ", "-")) for name in inputs() if name not in NOT_RUN]
all_cases = pytest.mark.parametrize("case", CASES)


def twins(case: str, **options) -> tuple[nn.LSTM, LSTM, tuple]:
    """Return nn.LSTM, ours, and the arguments of a call."""
    sample = inputs(**options)[case]
    constructor, call = sample.constructor_input, sample.forward_input
    assert not call.kwargs
    theirs = nn.LSTM(*constructor.args, **constructor.kwargs).to(options.get("dtype", torch.float64))
    theirs.train(options.get("training", True))
    return theirs, lstm_like(theirs), call.args


def test_every_input_of_pytorch_is_run():
    names = inputs()
    assert len(names) == len(INFO.module_inputs_func(INFO, "cpu", torch.float64, requires_grad=False, training=True))
    assert len(names) >= 32
    assert set(NOT_RUN) <= set(names)
    for requires_grad in (False, True):
        for training in (False, True):
            assert set(inputs(requires_grad=requires_grad, training=training)) == set(names)


def test_every_check_that_pytorch_names_has_its_place():
    known = set(CHECKS) | set(NOT_APPLICABLE)
    assert not set(CHECKS) & set(NOT_APPLICABLE)
    assert {d.test_name for d in INFO.decorators if getattr(d, "test_name", None)} <= known
    assert {name for names in CHECKS.values() for name in names.split(", ")} <= set(globals())


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inputs-fixed", "inputs-grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@all_cases
def test_forward_is_that_of_nn_lstm(case, backend, training, requires_grad):
    theirs, ours, args = twins(case, training=training, requires_grad=requires_grad)
    with running_on(backend):
        results = differentiate(ours, *copied(args))
    assert_close(results, differentiate(theirs, *copied(args)))


@all_cases
def test_forward_on_triton(case):
    theirs, ours, args = twins(case, dtype=torch.float32, requires_grad=True)
    with running_on("triton"):
        results = differentiate(ours, *copied(args))
    eager = differentiate(theirs, *copied(args))
    assert_close(results, differentiate(theirs.double(), *copied(args, torch.float64)), eager)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@all_cases
def test_unbatched_input_is_a_batch_of_one(case, backend):
    _, ours, args = twins(case)
    with running_on(backend):
        y, states = ours(*args)
        expected_y, expected_states = inputs()[case].reference_fn(ours, None, *args)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(states, tuple(expected_states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@all_cases
def test_factory_arguments_reach_all_parameters(case, device, dtype):
    constructor = inputs()[case].constructor_input
    by_argument = LSTM(*constructor.args, **constructor.kwargs, device=device, dtype=dtype)
    with torch.device(device):
        in_block = LSTM(*constructor.args, **constructor.kwargs, dtype=dtype)
    for layer in (by_argument, in_block):
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {(device, dtype)}
        assert not list(layer.buffers())


@all_cases
def test_repr_is_that_of_nn_lstm(case):
    theirs, ours, _ = twins(case)
    assert repr(ours) == repr(theirs)


@all_cases
def test_copies_compute_the_same(case):
    _, ours, args = twins(case)
    saved, weights = io.BytesIO(), io.BytesIO()
    torch.save(ours, saved)
    torch.save(ours.state_dict(), weights)
    constructor = inputs()[case].constructor_input
    loaded = LSTM(*constructor.args, **constructor.kwargs).double()
    loaded.load_state_dict(torch.load(io.BytesIO(weights.getvalue()), weights_only=True))
    whole = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    expected = differentiate(ours, *copied(args))
    for twin in (whole, loaded, copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        results = differentiate(twin, *copied(args))
        assert all(torch.equal(results[name], value) for name, value in expected.items())
        assert repr(twin) == repr(ours)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@all_cases
def test_gradients_of_both_orders(case, backend):
    _, ours, args = twins(case, requires_grad=True)
    x, *state = args
    names = [name for name, _ in ours.named_parameters()]

    def function(x, *others):
        hx = others[:2] if state else None
        parameters = dict(zip(names, others[2 if state else 0 :], strict=True))
        y, (h_n, c_n) = torch.func.functional_call(ours, parameters, (x, hx))
        return y, h_n, c_n

    leaves = (x, *(s for pair in state for s in pair), *ours.parameters())
    with running_on(backend):
        assert gradcheck(function, leaves, fast_mode=True, check_batched_grad=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@all_cases
def test_strides_change_nothing(case, backend):
    _, ours, args = twins(case, requires_grad=True)

    def strided(value):
        if isinstance(value, tuple):
            return tuple(strided(v) for v in value)
        spread = torch.stack([value.detach(), torch.full_like(value, torch.nan)], -1)[..., 0]
        assert not spread.is_contiguous()
        return spread.requires_grad_()

    with running_on(backend):
        expected = differentiate(ours, *copied(args))
        results = differentiate(ours, *strided(args))
        for name, parameter in ours.named_parameters():
            setattr(ours, name, nn.Parameter(strided(parameter)))
        strided_weights = differentiate(ours, *copied(args))
    assert_close(results, expected)
    assert_close(strided_weights, expected)


@all_cases
def test_to_the_meta_device_and_back(case):
    _, ours, args = twins(case)
    y, states = ours(*args)
    weights = copy.deepcopy(ours.state_dict())
    ours.to("meta")
    on_meta = ours(*(tuple(s.to("meta") for s in a) if isinstance(a, tuple) else a.to("meta") for a in args))
    assert on_meta[0].is_meta
    assert [on_meta[0].shape, *(s.shape for s in on_meta[1])] == [y.shape, *(s.shape for s in states)]
    ours.to_empty(device="cpu")
    assert {p.device.type for p in ours.parameters()} == {"cpu"}
    ours.load_state_dict(weights)
    assert torch.equal(ours(*args)[0], y)
    # Where the values are drawn anew, as is usual after to_empty, they are finite and within bounds.
    ours.to_empty(device="cpu").reset_parameters()
    assert all(p.abs().max() <= ours.hidden_size**-0.5 for p in ours.parameters())


@pytest.mark.parametrize("swap", [False, True], ids=["set-data", "swap-tensors"])
@all_cases
def test_conversion_to_another_dtype(case, swap, monkeypatch):
    theirs, ours, args = twins(case)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
    ours.float()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours.double()
    theirs.float().double()
    assert_close(differentiate(ours, *copied(args)), differentiate(theirs, *copied(args)))


@all_cases
def test_modes_differ_by_dropout_only(case):
    _, ours, args = twins(case)
    assert torch.equal(ours.train()(*args)[0], ours.eval()(*args)[0])
    ours.dropout = 0.5
    trained = [ours.train()(*args)[0] for _ in range(8)]
    assert not all(torch.equal(y, trained[0]) for y in trained)
    assert torch.equal(ours.eval()(*args)[0], ours.eval()(*args)[0])


ERRORS = INFO.module_error_inputs_func(INFO, "cpu", torch.float64, requires_grad=False, training=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_error_inputs_raise(number, backend):
    error = ERRORS[number]
    sample = error.module_error_input
    constructor, call = sample.constructor_input, sample.forward_input
    with running_on(backend):
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                LSTM(*constructor.args, **constructor.kwargs)
        else:
            ours = LSTM(*constructor.args, **constructor.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(*call.args, **call.kwargs)
    assert re.compile(error.error_regex)
