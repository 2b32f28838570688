"""The layers under PyTorch's global modes: defaults, inference, determinism, threads."""

import threading

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from novolstm_triton import functional, use_backend
from novolstm_triton.functional import resolve_backend

from .support.layers import REGULARISED, I, T, assert_equal, both, layer, sequence, states
from .support.twins import BACKENDS, assert_close, differentiate, running_on

on_backends = pytest.mark.parametrize("backend", BACKENDS)


@both
def test_default_dtype(kind):
    torch.set_default_dtype(torch.float64)
    try:
        module = layer(kind, **REGULARISED)
        assert {p.dtype for p in module.parameters()} == {torch.float64}
        results = differentiate(module, torch.randn(T, 2, I, requires_grad=True), lengths=torch.tensor([3, 5]))
        assert {r.dtype for r in results.values()} == {torch.float64}
        # A layer keeps the dtype that it was given.
        small = layer(kind, dtype=torch.float32, **REGULARISED)
        assert small(torch.randn(T, 2, I, dtype=torch.float32))[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@both
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_default_device_is_for_new_tensors_only(kind, backend):
    """A layer on another device than the default one makes nothing on the default one."""
    module = layer(kind, **REGULARISED | dict(bidirectional=True))
    x, lengths = sequence(requires_grad=True), torch.tensor([5, 0, 2])
    packed = pack_padded_sequence(sequence(), torch.tensor([5, 3, 1]))
    results = []
    with use_backend(backend):
        for device in ("cpu", "meta"):
            with torch.device(device):
                torch.manual_seed(3)
                y, (h_n, c_n) = module(x, lengths=lengths)
                gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
                results.append([y, h_n, c_n, *gradients, module(packed)[0].data])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.device("meta"):
        assert layer(kind).weight_ih_l0.is_meta
        assert layer(kind)(torch.randn(T, 2, I))[0].is_meta


@both
@on_backends
def test_inference_and_no_grad(kind, backend):
    module = layer(kind)
    with running_on(backend):
        expected, _ = module(sequence())
        with torch.no_grad():
            y, state = module(sequence())
            assert not y.requires_grad
        with torch.inference_mode():
            inferred, inferred_state = module(sequence())
            again, _ = module(sequence(), inferred_state)
        assert inferred.is_inference()
        assert torch.equal(y, expected)
        assert torch.equal(inferred, expected)
        assert torch.equal(again, module(sequence(), state)[0])


@both
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inference_tensors_are_no_part_of_training(kind, backend):
    module = layer(kind)
    with torch.inference_mode():
        x = sequence()
    with running_on(backend), pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)


@both
@on_backends
def test_deterministic_algorithms_change_nothing(kind, backend, deterministic):
    """With uninitialised memory filled, so that a buffer that is read before it is written shows as NaN."""
    options = dict(recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1, bidirectional=True)
    module, x, lengths = layer(kind, **options), sequence(requires_grad=True), torch.tensor([5, 0, 2])
    state = states(module, requires_grad=True)
    results = []
    with running_on(backend):
        for enabled in (False, True):
            deterministic(enabled)
            torch.manual_seed(3)
            results.append(differentiate(module, x, state, lengths=lengths))
    assert_equal(*results)
    assert all(torch.isfinite(r).all() for r in results[0].values())


@both
def test_deterministic_algorithms_take_packed_rows(kind, deterministic):
    module, packed = layer(kind), pack_padded_sequence(sequence(), torch.tensor([2, 5, 3]), enforce_sorted=False)
    expected = differentiate(module, packed)
    deterministic(True)
    assert_equal(differentiate(module, packed), expected)


@pytest.fixture
def deterministic():
    """Return what turns deterministic algorithms, which also fill uninitialised memory, on and off."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@both
def test_threads_choose_backends_of_their_own(kind, monkeypatch):
    """Each thread enters its block while the other is inside of its own."""
    names = ("reference", "torch")
    used = {name: set() for name in names}
    plain = functional._run

    def recording(*arguments):
        used[threading.current_thread().name].add(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr(functional, "_run", recording)
    modules = {name: layer(kind, num_layers=2) for name in names}
    results, inside = {}, threading.Barrier(2, timeout=30)

    def work():
        name = threading.current_thread().name
        with use_backend(name):
            inside.wait()
            results[name] = [differentiate(modules[name], sequence(requires_grad=True)) for _ in range(5)][-1]
            inside.wait()

    threads = [threading.Thread(target=work, name=name) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used == {name: {name} for name in names}
    assert_close(results["torch"], results["reference"])
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
