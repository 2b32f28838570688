"""The layers that are compared, by name, each ready to run: forward, or forward and backward, on random data.

novolstm    this package's kernels; pins of its plan (`exchange="words"`, for one) tell its rows apart
torch       this package's hand-written backward in PyTorch
reference   this package's equations as a loop under autograd; compiled: under torch.compile; graphed: as one CUDA
            graph, of both passes together where both are timed
nn.LSTM     PyTorch's, cuDNN on a GPU; dtype "tf32" is fp32 with tf32 products
flashrnn    the LSTM of the package `flashrnn` with one head, and a product for its input in front
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import novolstm_triton

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32, tf32=torch.float32)
NAMES = ("novolstm", "torch", "reference", "compiled", "graphed", "nn.LSTM", "flashrnn")
NOVOLSTM_BACKENDS = dict(
    novolstm="triton", torch="torch", reference="reference", compiled="reference", graphed="reference"
)


class Sizes(NamedTuple):
    """T, B, I and H."""

    steps: int
    batch: int
    inputs: int
    hidden: int


@contextlib.contextmanager
def pinned(pins: dict) -> Iterator[None]:
    """Pin the plan, in backward, too: it runs in a thread of autograd's own unless that is switched off."""
    with contextlib.ExitStack() as stack:
        if pins:
            stack.enter_context(novolstm_triton.plan.forced(**pins))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def has_flashrnn() -> bool:
    """Tell whether FlashRNN can be imported."""
    return importlib.util.find_spec("flashrnn") is not None


class FlashRNN(torch.nn.Module):
    """FlashRNN's LSTM of one head, called as `nn.LSTM` is: x [T, B, I] to (y [T, B, H], None)."""

    def __init__(self, inputs: int, hidden: int, **where: Any) -> None:
        super().__init__()
        scale = hidden**-0.5
        self.weight_ih = torch.nn.Parameter(torch.empty(4 * hidden, inputs, **where).uniform_(-scale, scale))
        self.weight_hh = torch.nn.Parameter(torch.empty(4, 1, hidden, hidden, **where).uniform_(-scale, scale))
        self.bias = torch.nn.Parameter(torch.zeros(4, 1, hidden, **where))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Run the layer; FlashRNN takes [B, T, gates, heads, H] and returns [states, B, T, heads, H]."""
        (steps, batch, _), hidden = x.shape, self.bias.shape[2]
        gates = torch.nn.functional.linear(x.transpose(0, 1), self.weight_ih).view(batch, steps, 4, 1, hidden)
        flashrnn = importlib.import_module("flashrnn").flashrnn
        states, _ = flashrnn(gates, self.weight_hh, self.bias, function="lstm", backend="cuda_fused")
        return states[0, :, :, 0].transpose(0, 1), None


class Layer:
    """A layer with its input and output gradient.

    Args:
        name: one of NAMES.
        sizes: T, B, I and H.
        dtype: a key of DTYPES.
        device: "cuda" or "cpu".
        pins: arguments of `plan.forced`; for "novolstm" only.

    Raises:
        ValueError: a name or dtype that is not known, or a plan that the device does not allow.
    """

    def __init__(self, name: str, sizes: Sizes, dtype: str, device: str, pins: dict | None = None) -> None:
        if name not in NAMES:
            raise ValueError(f"layer: expected one of {list(NAMES)}, got {name!r}")
        if dtype not in DTYPES or (dtype == "tf32" and name != "nn.LSTM"):
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, tf32 for nn.LSTM only, got {dtype!r} for {name}")
        self.name, self.sizes, self.dtype, self.device, self.pins = name, sizes, dtype, device, pins or {}
        where: dict[str, Any] = dict(device=device, dtype=DTYPES[dtype])
        torch.manual_seed(0)
        if name == "nn.LSTM":
            self.module: torch.nn.Module = torch.nn.LSTM(sizes.inputs, sizes.hidden, **where)
        elif name == "flashrnn":
            self.module = FlashRNN(sizes.inputs, sizes.hidden, **where)
        else:
            options: dict[str, Any] = dict(gate_gain="hidden", backend=NOVOLSTM_BACKENDS[name])
            self.module = novolstm_triton.NovoLSTM(sizes.inputs, sizes.hidden, **options, **where)
        self.call: Callable = torch.compile(self.module) if name == "compiled" else self.module
        self.x = torch.randn(sizes.steps, sizes.batch, sizes.inputs, **where).requires_grad_()
        self.dy = torch.randn(sizes.steps, sizes.batch, sizes.hidden, **where)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Put the plan's pins and the precision of products in force."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.dtype == "tf32"
        try:
            with pinned(self.pins):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def plan(self) -> dict[str, Any] | None:
        """Return the plans of the kernels, {"forward": …, "backward": …}; None for other layers."""
        if self.name != "novolstm":
            return None
        # It imports triton.
        from novolstm_triton.engines import launch

        with pinned(self.pins):
            plans = launch.launch_plan(self.x, self.sizes.hidden, "formula")
        return {"forward": plans.forward, "backward": plans.backward}

    def run(self, passes: str) -> None:
        """Run "forward", for the output alone, or "forward_backward", to the gradients of parameters and x.

        A layer named "graphed" is captured when it first runs, and replayed.
        """
        if passes not in ("forward", "forward_backward"):
            raise ValueError(f"passes: expected forward or forward_backward, got {passes!r}")
        with self.settings():
            if self.name != "graphed":
                self._eager(passes)
                return
            if passes not in self._graphs:
                self._graphs[passes] = self._capture(passes)
            self._graphs[passes].replay()

    def clear(self) -> None:
        """Free the gradients."""
        self.x.grad = None
        for parameter in self.module.parameters():
            parameter.grad = None

    def _eager(self, passes: str) -> None:
        if passes == "forward":
            self.module.eval()
            with torch.no_grad():
                self.call(self.x)
        else:
            self.module.train()
            self.clear()
            self.call(self.x)[0].backward(self.dy)

    def _capture(self, passes: str) -> torch.cuda.CUDAGraph:
        # As torch.cuda.graph's documentation says: warm up on a side stream, then capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._eager(passes)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager(passes)
        return graph


def compared(device: str, hidden: int) -> list[tuple[str, str, dict]]:
    """Return (name, dtype, pins) of every layer that is worth comparing on a device at a number of units."""
    if device == "cpu":
        return [("torch", "fp32", {}), ("nn.LSTM", "fp32", {}), ("reference", "fp32", {})]
    exchanges = [{}] + [dict(exchange=name) for name in novolstm_triton.plan.EXCHANGES]
    layers = [("novolstm", "bf16", pins) for pins in exchanges]
    layers += [("nn.LSTM", dtype, {}) for dtype in ("fp16", "bf16", "tf32")]
    layers += [(name, "bf16", {}) for name in ("reference", "compiled", "graphed") if hidden <= 1024]
    return layers + ([("flashrnn", "bf16", {})] if has_flashrnn() else [])
