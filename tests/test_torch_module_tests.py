"""PyTorch's own samples for its recurrent modules, and what its generic tests of modules check with them, on ours.

All samples are unbatched; `test_matrix.py` has the other calls of the LSTM, `test_twins.py` those of GRU and RNN.
"""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import novolstm_triton

from .support.twins import (
    BACKENDS,
    NO_ONEDNN,
    OURS,
    assert_close,
    copied,
    differentiate,
    ours_like,
    running_on,
    tuple_of,
)

# What PyTorch says is found out once.
pytestmark = [pytest.mark.filterwarnings(NO_ONEDNN), pytest.mark.xdist_group("PyTorch's tests")]

CHECKS = {
    "test_forward": "test_results_are_those_of_pytorch, test_unbatched_is_a_batch_of_one",
    "test_factory_kwargs": "test_factory_arguments_reach_all_parameters",
    "test_device_ctx_init": "test_factory_arguments_reach_all_parameters",
    "test_multiple_device_transfer": "test_to_the_meta_device_and_back",
    "test_to_empty": "test_to_the_meta_device_and_back",
    "test_to": "test_conversion_to_another_dtype",
    "test_repr": "test_repr_is_that_of_pytorch",
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

CELLS = ("LSTMCell", "GRUCell", "RNNCell")

# In a process of its own: at its import this part of PyTorch changes the settings of hypothesis and of PyTorch.
SCRIPT = """
import sys, torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

arguments = dict(device="cpu", dtype=torch.float64, requires_grad=False, training=True)
torch.manual_seed(3)
infos = {info.module_cls.__name__: info for info in module_db if info.module_cls.__module__ == "torch.nn.modules.rnn"}

def plain(sample):
    given = [sample.constructor_input, sample.forward_input]
    return [part for g in given for part in ((g.args, g.kwargs) if g is not None else ((), {}))]

def error(e):
    return *plain(e.module_error_input), e.error_on is ModuleErrorEnum.FORWARD_ERROR, e.error_type, e.error_regex

torch.save(
    {
        name: dict(
            samples=[plain(sample) for sample in info.module_inputs_func(info, **arguments)],
            errors=[error(e) for e in info.module_error_inputs_func(info, **arguments)],
            named={decorator.test_name for decorator in info.decorators} - {None},
        )
        for name, info in infos.items()
    },
    sys.argv[1],
)
"""


class Sample(NamedTuple):
    """What one of PyTorch's layers is made of, and called with, in float64."""

    kind: Any
    sizes: tuple
    options: dict[str, Any]
    inputs: tuple

    def twins(self) -> tuple[Any, Any]:
        """Return PyTorch's layer and ours with the same parameters."""
        # Pytest shows it where a test fails.
        print(self.kind, self.sizes, self.options, "with a state" if len(self.inputs) > 1 else "without a state")
        torch.manual_seed(0)
        theirs = self.kind(*self.sizes, **self.options, dtype=torch.float64)
        return theirs, ours_like(theirs)

    def ours(self, **options: Any) -> Any:
        """Return a new layer of ours."""
        return OURS[self.kind](*self.sizes, **self.options, **options)

    def leaves(self) -> tuple:
        """Return the inputs, to be differentiated."""
        return on_each(lambda a: a.clone().requires_grad_(), self.inputs)


def on_each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a tensor, or tensors in tuples, with a function of each in its place."""
    return tuple(on_each(function, v) for v in value) if isinstance(value, tuple) else function(value)


@pytest.fixture(scope="module")
def pytorch(tmp_path_factory) -> dict[str, Any]:
    """What PyTorch says about tests of its recurrent modules."""
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True)
    return torch.load(path, weights_only=False)


LAYERS = {nn.LSTM: "proj_size", nn.GRU: "bias", nn.RNN: "nonlinearity"}
"""Each layer, and an option that varies among its samples."""


@pytest.fixture(scope="module", params=LAYERS, ids=lambda kind: kind.__name__)
def samples(pytorch, request) -> list[Sample]:
    given = pytorch[request.param.__name__]["samples"]
    assert not any(options for *_, options in given)
    return [Sample(request.param, *parts) for *parts, _ in given]


def test_samples_are_various(samples):
    assert len(samples) >= 16
    assert {len(sample.inputs) for sample in samples} == {1, 2}
    for name in ("bias", "batch_first", "bidirectional", LAYERS[samples[0].kind]):
        assert len({sample.options[name] for sample in samples}) == 2


def test_every_check_of_pytorch_has_its_place(pytorch):
    assert not set(CHECKS) & set(NOT_APPLICABLE)
    assert {kind.__name__ for kind in LAYERS} | set(CELLS) == set(pytorch)
    assert {name for kind in pytorch.values() for name in kind["named"]} <= set(CHECKS) | set(NOT_APPLICABLE)
    assert {name for names in CHECKS.values() for name in names.split(", ")} <= set(globals())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_results_are_those_of_pytorch(samples, backend):
    for sample in samples:
        theirs, ours = sample.twins()
        for inputs, training in ((sample.inputs, False), (sample.leaves(), True)):
            with running_on(backend):
                results = differentiate(ours.train(training), *copied(inputs))
            assert_close(results, differentiate(theirs.train(training), *copied(inputs)))


def test_results_on_triton(samples):
    for sample in samples[:: max(1, len(samples) // (10 if samples[0].kind is nn.LSTM else 3))]:
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
            rows, states_of_rows = ours(x.unsqueeze(batch), *on_each(lambda s: s.unsqueeze(1), tuple(state)))
        torch.testing.assert_close(y, rows.squeeze(batch))
        torch.testing.assert_close(states, on_each(lambda s: s.squeeze(1), states_of_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_arguments_reach_all_parameters(samples, device, dtype):
    for sample in samples:
        by_argument = sample.ours(device=device, dtype=dtype)
        with torch.device(device):
            in_block = sample.ours(dtype=dtype)
        for layer in (by_argument, in_block):
            assert {(p.device.type, p.dtype) for p in layer.parameters()} == {(device, dtype)}
            assert not list(layer.buffers())


def test_repr_is_that_of_pytorch(samples):
    for sample in samples:
        theirs, ours = sample.twins()
        # nn.RNN shows all options but this one, which decides what it computes.
        assert repr(ours).replace(", nonlinearity='relu'", "") == repr(theirs)
        assert ("relu" in repr(ours)) == (sample.options.get("nonlinearity") == "relu")


def test_copies_compute_the_same(samples):
    for sample in samples:
        _, ours = sample.twins()
        saved, weights = io.BytesIO(), io.BytesIO()
        torch.save(ours, saved)
        torch.save(ours.state_dict(), weights)
        saved.seek(0)
        weights.seek(0)
        loaded = sample.ours().double()
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

    flat = [s for hx in state for s in tuple_of(hx)]

    def function(x, *others):
        hx, parameters = others[: len(flat)], others[len(flat) :]
        hx = None if not state else hx if len(hx) == 2 else hx[0]
        y, states = torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x, hx))
        return y, *tuple_of(states)

    return function, (x, *flat, *ours.parameters())


def test_gradients(samples):
    for sample in samples if samples[0].kind is nn.LSTM else samples[1::4]:
        assert gradcheck(*as_function(sample), fast_mode=True, check_batched_grad=True)


def test_second_gradients(samples):
    # The others are these with less, or with another order of a batch that is not there.
    fullest = [s for s in samples if len(s.inputs) == 2 and s.options["bias"] and not s.options["batch_first"]]
    assert len(fullest) >= 2
    for sample in fullest:
        assert gradgradcheck(*as_function(sample), fast_mode=True)


def strided(value: Tensor) -> Tensor:
    """Return a leaf with the same values, its elements apart in memory."""
    spread = torch.stack([value.detach(), torch.full_like(value, torch.nan)], -1)[..., 0]
    assert not spread.is_contiguous()
    return spread.requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_strides_change_nothing(samples, backend):
    for sample in samples:
        _, ours = sample.twins()
        with running_on(backend):
            expected = differentiate(ours, *sample.leaves())
            assert_close(differentiate(ours, *on_each(strided, sample.inputs)), expected)
            for name, parameter in ours.named_parameters():
                setattr(ours, name, nn.Parameter(strided(parameter)))
            assert_close(differentiate(ours, *sample.leaves()), expected)


def test_to_the_meta_device_and_back(samples):
    for sample in samples:
        _, ours = sample.twins()
        y, states = ours(*sample.inputs)
        weights = copy.deepcopy(ours.state_dict())
        ours.to("meta")
        on_meta, states_on_meta = ours(*on_each(lambda a: a.to("meta"), sample.inputs))
        assert on_meta.is_meta
        shapes = [[a.shape for a in (y, *tuple_of(hx))] for y, hx in ((on_meta, states_on_meta), (y, states))]
        assert shapes[0] == shapes[1]
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
        # Two units with relu may all be zero, and dropout change nothing: not so if all numbers are positive.
        inputs = on_each(torch.abs, sample.inputs)
        ours.load_state_dict({name: weight.abs() for name, weight in ours.state_dict().items()})
        plain = ours.train()(*inputs)[0]
        assert torch.equal(ours.eval()(*inputs)[0], plain)
        ours.dropout = 0.5
        assert torch.equal(ours(*inputs)[0], plain)
        assert any(not torch.equal(ours.train()(*inputs)[0], plain) for _ in range(8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*(kind.__name__ for kind in LAYERS), *CELLS])
def test_error_samples_raise(pytorch, name, backend):
    errors, kind = pytorch[name]["errors"], getattr(novolstm_triton, name)
    assert len(errors) >= (4 if name in CELLS else 10)
    for sizes, options, inputs, input_options, in_forward, error, message in errors:
        print(sizes, options)
        with running_on(backend):
            if sizes[2:] and isinstance(sizes[2], str):
                # A nonlinearity in the place of bias, which PyTorch takes for true.
                with pytest.raises(TypeError, match="bias should be of type bool, got: str"):
                    kind(*sizes, **options)
                sizes = sizes[:2]
            if in_forward:
                module = kind(*sizes, **options, **({"dtype": torch.float64} if name in CELLS else {}))
                with pytest.raises(error, match=message):
                    module(*inputs, **input_options)
            else:
                with pytest.raises(error, match=message):
                    kind(*sizes, **options)


def as_step(cell: nn.Module) -> Callable[..., Any]:
    """Return a cell as a function of its input, states and parameters."""
    names, states = (
        [name for name, _ in cell.named_parameters()],
        2 if isinstance(cell, novolstm_triton.LSTMCell) else 1,
    )

    def function(x, *others):
        hx = others[:states] if states == 2 else others[0]
        return torch.func.functional_call(cell, dict(zip(names, others[states:], strict=True)), (x, hx))

    return function


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("name", CELLS)
def test_samples_of_cells(pytorch, name, backend):
    for sizes, options, (x, hx), _ in pytorch[name]["samples"]:
        print(sizes, options)
        theirs = getattr(nn, name)(*sizes, **options, dtype=torch.float64)
        ours = getattr(novolstm_triton, name)(*sizes, **options, dtype=torch.float64, backend=backend)
        assert repr(ours).replace(f", backend={backend!r}", "").replace("'", "") == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        for inputs in ((x, hx), (x,), on_each(lambda a: a.expand(3, -1), (x, hx))):
            torch.testing.assert_close(ours(*inputs), theirs(*inputs))
        given, parameters = [a.clone().requires_grad_() for a in (x, *tuple_of(hx))], list(ours.parameters())

        assert gradcheck(as_step(ours), (*given, *parameters), fast_mode=True)
