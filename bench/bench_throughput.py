"""Throughput, memory and first calls of this layer and of others: `pytest bench --benchmark-only`.

On a CPU: the torch backend, nn.LSTM and the reference, in fp32 with one thread, which other work disturbs least. On a
GPU: what `layers.compared` lists. `--benchmark-json=bench/results/NAME.json` keeps them, and `python -m bench.report`
makes a table of them. A benchmark's `extra_info` is a row of the report; rows of one layer and size are merged there.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from . import roofline
from .layers import Layer, Sizes, compared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOOPS = ("reference", "compiled", "graphed")
"""Layers that take their time step by step, and so get fewer of them on a GPU."""

# One size varies at a time on a CPU; on a GPU every pair of H and B, and T.
if DEVICE == "cpu":
    SIZES = [(128, 16, h) for h in (64, 128, 256, 512)] + [(128, b, 128) for b in (1, 64)]
    SIZES += [(t, 16, 128) for t in (32, 512)]
    MEMORY = [(t, 16, 128) for t in (128, 512, 2048)]
    FIRST = [(128, 16, 128)]
else:
    SIZES = [(1024, b, h) for h in (128, 256, 512, 768, 1024, 2048) for b in (1, 16, 64, 256)]
    SIZES += [(t, 16, 512) for t in (64, 256, 4096)]
    MEMORY = [(t, 64, 512) for t in (512, 2048, 8192)]
    FIRST = [(64, 16, 512)]
SECONDS = 0.6
"""Time for each benchmark's rounds."""


def cases(sizes: list[tuple[int, int, int]]) -> list:
    """Return a parameter for each layer at each (T, B, H); the inputs are as many as the units."""
    params = []
    for steps, batch, hidden in sizes:
        for name, dtype, pins in compared(DEVICE, hidden):
            shorter = min(steps, 64) if DEVICE == "cuda" and name in LOOPS else steps
            case = (name, dtype, pins, Sizes(shorter, batch, hidden, hidden))
            label = " ".join([name, dtype, *pins.values()])
            params.append(pytest.param(case, id=f"T{shorter}-B{batch}-H{hidden}-{label.replace(' ', '-')}"))
    return list({param.id: param for param in params}.values())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def layer(case):
    name, dtype, pins, sizes = case
    try:
        layer = Layer(name, sizes, dtype, DEVICE, pins)
        layer.plan()
    except ValueError as refused:
        pytest.skip(f"refused: {refused}")
    return layer


@functools.cache
def cpu_constants(hidden: int) -> roofline.Cpu:
    """Measure the CPU's rates: a product of 1024 x 1024 matrices, and weights [4H, H] times a vector, cached."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    weights, vector = torch.randn(4 * hidden, hidden), torch.randn(hidden)
    return roofline.Cpu(2 * 1024**3 / least_us(lambda: a @ b), weights.nbytes / least_us(lambda: weights @ vector))


def least_us(function: Callable[[], object]) -> float:
    """Return the least time of a call in µs, over some 0.2 s."""
    times, end = [], time.perf_counter() + 0.2
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times) * 1e6


def roofline_us(layer: Layer, passes: str) -> float | None:
    """Return the roofline of a step of a layer; None where there is no model of it."""
    cell = roofline.LSTM if layer.name in ("nn.LSTM", "flashrnn") else roofline.NOVOLSTM
    sizes = roofline.Sizes(*layer.sizes, itemsize=layer.x.element_size())
    backward = passes == "forward_backward"
    if DEVICE == "cpu":
        return roofline.cpu_step_us(cell, sizes, cpu_constants(layer.sizes.hidden), backward=backward)
    return roofline.of_plan(
        cell, sizes, roofline.gpu_named(torch.cuda.get_device_name()), layer.plan(), backward=backward
    )


def row_of(layer: Layer) -> dict:
    """Return what names a row of the report."""
    plans = layer.plan()
    return dict(
        layer=layer.name,
        dtype=layer.dtype,
        exchange=plans["forward"].exchange if plans else None,
        pins=layer.pins,
        **layer.sizes._asdict(),
    )


def run_and_wait(layer: Layer, passes: str) -> None:
    layer.run(passes)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
@pytest.mark.parametrize("case", cases(SIZES))
def test_time(benchmark, layer, passes):
    run_and_wait(layer, passes)
    began = time.perf_counter()
    run_and_wait(layer, passes)
    rounds = min(50, max(5, int(SECONDS / (time.perf_counter() - began))))
    benchmark.group = "T{} B{} I{} H{} {}".format(*layer.sizes, passes)
    benchmark.pedantic(run_and_wait, (layer, passes), rounds=rounds)
    time_us = statistics.median(benchmark.stats.stats.data) * 1e6
    us_per_step, least_us = time_us / layer.sizes.steps, roofline_us(layer, passes)
    figures = dict(
        us_per_step=us_per_step,
        tokens_per_s=layer.sizes.batch / us_per_step * 1e6,
        roofline_fraction=None if least_us is None else least_us / us_per_step,
    )
    benchmark.extra_info |= row_of(layer) | {f"{passes}_{name}": value for name, value in figures.items()}


def peak_mib(layer: Layer) -> float:
    """Return the peak of memory during forward and backward beyond what was there before, gradients included."""
    layer.run("forward_backward")
    layer.clear()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_and_wait(layer, "forward_backward")
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # PyTorch 2.11 warns unless told whether to keep events.
    options = dict(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with torch.profiler.profile(**options) as profile:
        layer.run("forward_backward")
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert memory, "the profiler recorded no allocation"
    now = peak = 0
    for _, size in memory:
        now += size
        peak = max(peak, now)
    return peak / 2**20


@pytest.mark.parametrize("case", [c for c in cases(MEMORY) if DEVICE == "cuda" or c.values[0][0] != "compiled"])
def test_peak_memory(benchmark, layer):
    if layer.name == "graphed":
        pytest.skip("a replay allocates nothing")
    benchmark.group = "peak memory T{} B{} I{} H{}".format(*layer.sizes)
    peak = benchmark.pedantic(peak_mib, (layer,), rounds=1)
    benchmark.extra_info |= row_of(layer) | dict(peak_mib=peak)


FIRST_CALL = """
import importlib, json, sys, time, torch
sys.path.append(sys.argv[1])
layers = importlib.import_module("bench.layers")
name, dtype, pins, sizes, device = json.loads(sys.argv[2])
torch.set_num_threads(1)
layer = layers.Layer(name, layers.Sizes(*sizes), dtype, device, pins)
torch.zeros(1, device=device)
began = time.perf_counter()
layer.run("forward_backward")
if device == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - began)
"""


@pytest.mark.parametrize("case", cases(FIRST))
def test_first_call(benchmark, case, layer, pytestconfig):
    """The first forward and backward of a fresh process, Triton's cache on disk as it is; not the import of torch."""
    name, dtype, pins, sizes = case
    command = [sys.executable, "-c", FIRST_CALL, str(pytestconfig.rootpath)]
    command.append(json.dumps([name, dtype, pins, sizes, DEVICE]))

    def first_call_s() -> float:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        return float(result.stdout.splitlines()[-1])

    benchmark.group = "first call"
    seconds = benchmark.pedantic(first_call_s, rounds=1)
    benchmark.extra_info |= row_of(layer) | dict(first_call_s=seconds)
