"""PyTorch's own samples for nn.LSTM, and the checks that its generic tests of modules make with them, on our `LSTM`.

All samples are unbatched; `test_matrix.py` has the other calls.
"""

import copy
import io
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from novolstm_triton import LSTM

from .support.twins import BACKENDS, NO_ONEDNN, assert_close, copied, differentiate, lstm_like, running_on

# What PyTorch says is found out once.
pytestmark = [pytest.mark.filterwarnings(NO_ONEDNN), pytest.mark.xdist_group("PyTorch's tests")]

CHECKS = {
    "test_forward": "test_results_are_those_of_nn_lstm, test_unbatched_is_a_batch_of_one",
    "test_factory_kwargs": "test_factory_arguments_reach_all_parameters",
    "test_device_ctx_init": "test_factory_arguments_reach_all_parameters",
    "test_multiple_device_transfer": "test_to_the_meta_device_and_back",
    "test_to_empty": "test_to_the_meta_device_and_back",
    "test_to": "test_conversion_to_another_dtype",
    "test_repr": "test_repr_is_that_of_nn_lstm",
    "test_pickle": "test_copies_compute_the_same",
    "test_save_load": "test_copies_compute_the_same",
    "test_non_contiguous_tensors": "test_strides_change_nothing",
    "test_grad": "test_gradients",
    "test_gradgrad": "test_second_gradients",
    "test_if_train_and_eval_modes_differ": "test_modes_differ_by_dropout_only",
    "test_errors": "test_error_samples_raise",
}
"""PyTorch's tests of modules by name, and the tests below that check the same."""

NOT_APPLICABLE = {
    "test_check_inplace": "the layer has no argument inplace",
    "test_memory_format": "channels_last is a format of images; a sequence has three dimensions at most",
    "test_cpu_gpu_parity": "needs a GPU; tests/test_gpu.py compares the kernels with the CPU's reference",
}
"""The others, with the reason."""

# In a process of its own: at its import this part of PyTorch changes the settings of hypothesis and of PyTorch.
SCRIPT = """
import sys, torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

info = next(info for info in module_db if info.module_cls is torch.nn.LSTM)
arguments = dict(device="cpu", dtype=torch.float64, requires_grad=False, training=True)
torch.manual_seed(3)

def plain(sample):
    given = [sample.constructor_input, sample.forward_input]
    return [part for g in given for part in ((g.args, g.kwargs) if g is not None else ((), {}))]

errors = info.module_error_inputs_func(info, **arguments)
torch.save(
    dict(
        samples=[plain(sample) for sample in info.module_inputs_func(info, **arguments)],
        errors=[
            (*plain(e.module_error_input), e.error_on is ModuleErrorEnum.FORWARD_ERROR, e.error_type, e.error_regex)
            for e in errors
        ],
        named={decorator.test_name for decorator in info.decorators} - {None},
    ),
    sys.argv[1],
)
"""


class Sample(NamedTuple):
    """What nn.LSTM is made of, and called with, in float64."""

    sizes: tuple
    options: dict[str, Any]
    inputs: tuple

    def twins(self) -> tuple[nn.LSTM, LSTM]:
        """Return nn.LSTM and ours with the same parameters."""
        # Pytest shows it where a test fails.
        print(self.sizes, self.options, "with a state" if len(self.inputs) > 1 else "without a state")
        theirs = nn.LSTM(*self.sizes, **self.options, dtype=torch.float64)
        return theirs, lstm_like(theirs)

    def leaves(self) -> tuple:
        """Return the inputs, to be differentiated."""
        x, *state = self.inputs
        return x.clone().requires_grad_(), *(tuple(s.clone().requires_grad_() for s in pair) for pair in state)


@pytest.fixture(scope="module")
def pytorch(tmp_path_factory) -> dict[str, Any]:
    """What PyTorch says about tests of nn.LSTM."""
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True)
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def samples(pytorch) -> list[Sample]:
    assert not any(options for *_, options in pytorch["samples"])
    return [Sample(*parts) for *parts, _ in pytorch["samples"]]


def test_samples_are_various(samples):
    assert len(samples) >= 32
    assert {len(sample.inputs) for sample in samples} == {1, 2}
    for name in ("bias", "batch_first", "bidirectional", "proj_size"):
        assert len({sample.options[name] for sample in samples}) == 2


def test_every_check_of_pytorch_has_its_place(pytorch):
    assert not set(CHECKS) & set(NOT_APPLICABLE)
    assert pytorch["named"] <= set(CHECKS) | set(NOT_APPLICABLE)
    assert {name for names in CHECKS.values() for name in names.split(", ")} <= set(globals())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_results_are_those_of_nn_lstm(samples, backend):
    for sample in samples:
        theirs, ours = sample.twins()
        for inputs, training in ((sample.inputs, False), (sample.leaves(), True)):
            with running_on(backend):
                results = differentiate(ours.train(training), *copied(inputs))
            assert_close(results, differentiate(theirs.train(training), *copied(inputs)))


def test_results_on_triton(samples):
    for sample in samples[:: max(1, len(samples) // 10)]:
        theirs, ours = sample.twins()
        theirs, ours, inputs = theirs.float(), ours.float(), copied(sample.leaves(), torch.float32)
        with running_on("triton"):
            results = differentiate(ours, *inputs)
        eager = differentiate(theirs, *copied(inputs))
        assert_close(results, differentiate(theirs.double(), *copied(inputs, torch.float64)), eager)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_unbatched_is_a_batch_of_one(samples, backend):
    for sample in samples:
        _, ours = sample.twins()
        batch = 0 if ours.batch_first else 1
        x, *state = sample.inputs
        with running_on(backend):
            y, states = ours(*sample.inputs)
            rows, states_of_rows = ours(x.unsqueeze(batch), *(tuple(s.unsqueeze(1) for s in pair) for pair in state))
        torch.testing.assert_close(y, rows.squeeze(batch))
        torch.testing.assert_close(states, tuple(s.squeeze(1) for s in states_of_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_arguments_reach_all_parameters(samples, device, dtype):
    for sample in samples:
        by_argument = LSTM(*sample.sizes, **sample.options, device=device, dtype=dtype)
        with torch.device(device):
            in_block = LSTM(*sample.sizes, **sample.options, dtype=dtype)
        for layer in (by_argument, in_block):
            assert {(p.device.type, p.dtype) for p in layer.parameters()} == {(device, dtype)}
            assert not list(layer.buffers())


def test_repr_is_that_of_nn_lstm(samples):
    for sample in samples:
        theirs, ours = sample.twins()
        assert repr(ours) == repr(theirs)


def test_copies_compute_the_same(samples):
    for sample in samples:
        _, ours = sample.twins()
        saved, weights = io.BytesIO(), io.BytesIO()
        torch.save(ours, saved)
        torch.save(ours.state_dict(), weights)
        saved.seek(0)
        weights.seek(0)
        loaded = LSTM(*sample.sizes, **sample.options).double()
        loaded.load_state_dict(torch.load(weights, weights_only=True))
        whole = torch.load(saved, weights_only=False)
        expected = differentiate(ours, *sample.leaves())
        for twin in (whole, loaded, copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
            results = differentiate(twin, *sample.leaves())
            assert all(torch.equal(results[name], value) for name, value in expected.items())
            assert repr(twin) == repr(ours)


def as_function(sample: Sample) -> tuple[Any, tuple[Tensor, ...]]:
    """Return a layer as a function of its inputs and parameters, and these."""
    _, ours = sample.twins()
    x, *state = sample.leaves()
    names = [name for name, _ in ours.named_parameters()]

    def function(x, *others):
        hx, parameters = (others[:2], others[2:]) if state else (None, others)
        y, states = torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x, hx))
        return y, *states

    return function, (x, *(s for pair in state for s in pair), *ours.parameters())


def test_gradients(samples):
    for sample in samples:
        assert gradcheck(*as_function(sample), fast_mode=True, check_batched_grad=True)


def test_second_gradients(samples):
    # The others are these with less, or with another order of a batch that is not there.
    fullest = [s for s in samples if len(s.inputs) == 2 and s.options["bias"] and not s.options["batch_first"]]
    assert len(fullest) >= 4
    for sample in fullest:
        assert gradgradcheck(*as_function(sample), fast_mode=True)


def strided(value: Any) -> Any:
    """Return leaves with the same values, each with its elements apart in memory."""
    if isinstance(value, tuple):
        return tuple(strided(v) for v in value)
    spread = torch.stack([value.detach(), torch.full_like(value, torch.nan)], -1)[..., 0]
    assert not spread.is_contiguous()
    return spread.requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_strides_change_nothing(samples, backend):
    for sample in samples:
        _, ours = sample.twins()
        with running_on(backend):
            expected = differentiate(ours, *sample.leaves())
            assert_close(differentiate(ours, *strided(sample.inputs)), expected)
            for name, parameter in ours.named_parameters():
                setattr(ours, name, nn.Parameter(strided(parameter)))
            assert_close(differentiate(ours, *sample.leaves()), expected)


def test_to_the_meta_device_and_back(samples):
    for sample in samples:
        _, ours = sample.twins()
        y, states = ours(*sample.inputs)
        weights = copy.deepcopy(ours.state_dict())
        ours.to("meta")
        x, *state = sample.inputs
        on_meta, states_on_meta = ours(x.to("meta"), *(tuple(s.to("meta") for s in pair) for pair in state))
        assert on_meta.is_meta
        assert [a.shape for a in (on_meta, *states_on_meta)] == [a.shape for a in (y, *states)]
        ours.to_empty(device="cpu")
        ours.load_state_dict(weights)
        assert torch.equal(ours(*sample.inputs)[0], y)
        # As is usual after to_empty.
        ours.to_empty(device="cpu").reset_parameters()
        assert all(p.abs().max() <= ours.hidden_size**-0.5 for p in ours.parameters())


@pytest.mark.parametrize("swap", [False, True], ids=["set-data", "swap-tensors"])
def test_conversion_to_another_dtype(samples, swap, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
    for sample in samples:
        theirs, ours = sample.twins()
        assert {p.dtype for p in ours.float().parameters()} == {torch.float32}
        results = differentiate(ours.double(), *sample.leaves())
        assert_close(results, differentiate(theirs.float().double(), *sample.leaves()))


def test_modes_differ_by_dropout_only(samples):
    for sample in samples:
        _, ours = sample.twins()
        plain = ours.train()(*sample.inputs)[0]
        assert torch.equal(ours.eval()(*sample.inputs)[0], plain)
        ours.dropout = 0.5
        assert torch.equal(ours(*sample.inputs)[0], plain)
        assert any(not torch.equal(ours.train()(*sample.inputs)[0], plain) for _ in range(8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_samples_raise(pytorch, backend):
    assert len(pytorch["errors"]) >= 10
    for sizes, options, inputs, input_options, in_forward, error, message in pytorch["errors"]:
        print(sizes, options)
        with running_on(backend):
            if in_forward:
                layer = LSTM(*sizes, **options)
                with pytest.raises(error, match=message):
                    layer(*inputs, **input_options)
            else:
                with pytest.raises(error, match=message):
                    LSTM(*sizes, **options)
