"""The CUDA branches of bench/ with a stand-in for the device: what they call, in which order, and what follows."""

import contextlib
import importlib
import pathlib
import sys

import pytest
import torch

from novolstm_triton import problems

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
layers, gpu_claims = map(importlib.import_module, ("layers", "gpu.claims"))


class Device:
    """A log of what was asked of a device; its graphs do nothing."""

    def __init__(self) -> None:
        self.calls = []

    def log(self, name, result=None):
        def call(*arguments, **_):
            self.calls.append((name, *arguments))
            return result() if callable(result) else result

        return call

    @contextlib.contextmanager
    def graph(self, graph):
        self.calls.append(("capture",))
        yield


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Graph:
        def replay(self):
            device.calls.append(("replay",))

    class Stream:
        def wait_stream(self, other):
            device.calls.append(("wait_stream",))

    patches = dict(
        Stream=Stream,
        CUDAGraph=Graph,
        graph=device.graph,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=Stream,
        synchronize=device.log("synchronize"),
        empty_cache=device.log("empty_cache"),
        reset_peak_memory_stats=device.log("reset"),
        memory_allocated=device.log("allocated", lambda: 100),
        max_memory_allocated=device.log("peak", iter([160, 140, 310, 300]).__next__),
        get_sync_debug_mode=device.log("get", lambda: 0),
        set_sync_debug_mode=device.log("mode"),
    )
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device


def names(device) -> list[str]:
    return [call[0] for call in device.calls]


def test_graphed_layer_warms_up_captures_once_and_replays(device):
    layer = layers.Layer("graphed", layers.Sizes(2, 1, 3, 4), "fp32", "cpu")
    for _ in range(2):
        layer.run("forward_backward")
    layer.run("forward")
    one = ["wait_stream", "wait_stream", "capture", "replay"]
    assert names(device) == [*one, "replay", *one]


def test_graph_claim_counts_arrays_that_a_replay_leaves_wrong(device, monkeypatch):
    """The stand-in's replay computes nothing, so that what was captured stays that of the inputs before the change."""
    call = problems.Problem.call
    monkeypatch.setattr(problems.Problem, "call", lambda self, inputs, lengths, _: call(self, inputs, lengths, "torch"))
    problem = problems.Problem(3, 2, 4)
    # y, h_n, c_n and eight gradients, all of which depend on x.
    assert gpu_claims.graph_differences(problem, torch.float32) == 11
    assert names(device).count("replay") == 3


def test_waits_are_errors_during_the_call_alone(device, monkeypatch):
    modes = []

    def call(self, inputs, lengths, backend):
        modes.append([call[1:] for call in device.calls if call[0] == "mode"])
        return original(self, inputs, lengths, "torch")

    original = problems.Problem.call
    monkeypatch.setattr(problems.Problem, "call", call)
    gpu_claims.run_without_waiting(problems.Problem(3, 2, 4), torch.float32)
    assert modes == [[], [("error",)]]
    assert [call for call in device.calls if call[0] == "mode"] == [("mode", "error"), ("mode", 0)]


def test_peaks_are_those_of_the_second_calls(device, monkeypatch):
    randn, layer, lstm = torch.randn, gpu_claims.NovoLSTM, torch.nn.LSTM
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    monkeypatch.setattr(
        gpu_claims, "NovoLSTM", lambda *a, backend, device, dtype: layer(*a, backend="torch", dtype=dtype)
    )
    monkeypatch.setattr(torch.nn, "LSTM", lambda *a, device, dtype: lstm(*a, dtype=dtype))
    assert gpu_claims.peaks(3, 2, 4, 5, torch.float32) == (40, 200)
    order = names(device)
    assert order.index("reset") < order.index("allocated") < order.index("peak")
