"""What calls leave behind and what they leave alone: leaks, writes, shared memory, threads, forks, the import."""

import gc
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import weakref

import greenlet
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from novolstm_triton import LSTMCell, NovoLSTMCell, plan, use_backend
from novolstm_triton.engines import launch
from novolstm_triton.testing import cooperative

from .support.interpreted import ROOMY
from .support.layers import REGULARISED, B, H, I, T, assert_equal, both, layer, sequence, states
from .support.twins import BACKENDS, differentiate, running_on

on_backends = pytest.mark.parametrize("backend", BACKENDS)
ROOT = pathlib.Path(__file__).resolve().parents[1]


def train(module: nn.Module, x: Tensor) -> None:
    """Call a layer and go back; leave nothing but the parameters' gradients."""
    y, (h_n, c_n) = module(x)
    (y.sum() + h_n.sum() + c_n.sum()).backward()


def live(kind: type) -> int:
    gc.collect()
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- leaks ---


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
@both
def test_hundreds_of_calls_leave_nothing(kind):
    """No tensor, no object of Python's, and none of C++, of which the smallest with rows would have 16 KiB."""
    module, x = kind(4, 64, backend="torch"), torch.randn(2, 64, 4, requires_grad=True)

    def counts() -> tuple[int, int, int]:
        return live(Tensor), sys.getallocatedblocks(), resident_bytes()

    # Until what Python and the allocator put by for later has reached its size.
    for _ in range(200):
        train(module, x)
    found = [counts()]
    for _ in range(3):
        for _ in range(200):
            train(module, x)
        found.append(counts())
    growth = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(found)]
    tensors, blocks, resident = zip(*growth, strict=True)
    assert tensors == (0, 0, 0)
    # A single one for every call would be two hundred, each time; a cache grows once.
    assert min(blocks) < 100
    assert min(resident) < 2**21


@both
def test_interpreted_runs_leave_nothing(kind):
    module, x = kind(2, 2, backend="triton"), torch.randn(2, 1, 2)
    counts = []
    # The first run fills caches.
    for runs in (1, 6):
        for _ in range(runs):
            with cooperative(), plan.forced(device=ROOMY, slices=2, chunk=1):
                train(module, x)
        counts.append((live(Tensor), live(greenlet.greenlet)))
    assert counts[0] == counts[1]


@both
@on_backends
def test_tensors_end_with_their_last_name(kind, backend):
    """Without the garbage collector, but for the interpreter's; the cache of plans keeps none of them."""
    module, x = layer(kind, num_layers=2), sequence(requires_grad=True)
    with running_on(backend):
        y, (h_n, c_n) = module(x)
        y.sum().backward()
    things = [module, x, x.grad, y, h_n, c_n, *module.parameters(), *(p.grad for p in module.parameters())]
    dead = [weakref.ref(thing) for thing in things]
    gc.collect()
    gc.disable()
    try:
        del module, x, y, h_n, c_n, things
        assert [ref for ref in dead if ref() is not None] == []
    finally:
        gc.enable()
    assert backend != "triton" or launch._cached_plan.cache_info().currsize > 0


@both
def test_pickle_of_a_layer_is_that_of_its_parameters(kind):
    """Before its first call and after training; nothing of a call stays in it."""
    module = layer(kind, **REGULARISED)
    new = pickle.dumps(module)
    train(module, sequence())
    assert pickle.dumps(module) == new
    parameters = sum(p.nbytes for p in module.parameters())
    # Twice 64 parameters' names, and the options.
    assert parameters < len(new) < parameters + 2**14


# --- what is left alone ---


@pytest.mark.covering(2)
@both
@on_backends
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(), id="plain"),
        pytest.param(dict(bidirectional=True, recurrent_dropout=0.3, zoneout_h=0.2, zoneout_c=0.1), id="regularised"),
        pytest.param(dict(proj_size=2), id="projected"),
    ],
)
def test_nothing_given_is_written(kind, options, backend):
    module, x = layer(kind, **options), sequence(requires_grad=True)
    hx, lengths = tuple(s.requires_grad_() for s in states(module)), torch.tensor([T, 0, 2])
    leaves = [x, *hx, *module.parameters()]

    def state(tensors: list[Tensor]) -> list[tuple[int, list]]:
        return [(a._version, a.tolist()) for a in tensors]

    before = state([lengths, *leaves])
    with running_on(backend):
        y, last = module(x, hx, lengths=lengths)
        results = [y, *last]
        upstream = [torch.randn_like(a) for a in results]
        between = state(results + upstream)
        torch.autograd.grad(results, leaves, upstream)
    assert state([lengths, *leaves]) == before
    assert state(results + upstream) == between


def flat(results) -> list[Tensor]:
    """Return the tensors in what a layer or a cell returns."""
    if isinstance(results, Tensor):
        return [results]
    return flat(results.data) if isinstance(results, PackedSequence) else [a for r in results for a in flat(r)]


SHAPES = {"usual": (2, B), "one-step": (1, B), "no-row": (T, 0), "one-of-all": (1, 1)}


@pytest.mark.covering(2)
@both
@on_backends
@pytest.mark.parametrize(("steps", "rows"), SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(proj_size=2, batch_first=True)], ids=str)
def test_results_share_no_memory(kind, options, steps, rows, backend):
    """Neither with each other nor with what was given; gradients neither with those of the results."""
    module, shape = layer(kind, **options), (rows, steps) if options.get("batch_first") else (steps, rows)
    x, hx = sequence(*shape, requires_grad=True), tuple(s.requires_grad_() for s in states(module, rows))
    leaves = [x, *hx, *module.parameters()]
    with running_on(backend):
        results = flat(module(x, hx))
        upstream = [torch.randn_like(a) for a in results]
        torch.autograd.backward(results, upstream)
        if rows:
            packed = pack_padded_sequence(x.detach(), [steps] * rows, batch_first=options.get("batch_first", False))
            results += flat(module(packed, hx))
    own = [a for a in (*leaves, *results, *upstream) if a.numel()]
    assert len({a.untyped_storage().data_ptr() for a in own}) == len(own)
    # Gradients of stacked weights are parts of one storage.
    everything = [*own, *(a.grad for a in leaves if a.grad is not None and a.numel())]
    spans = sorted((a.data_ptr(), a.data_ptr() + a.nbytes) for a in everything)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("kind", [NovoLSTMCell, LSTMCell])
@on_backends
def test_results_of_a_cell_share_no_memory(kind, backend):
    cell, x, hx = kind(I, H), torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))
    with running_on(backend):
        places = [a.untyped_storage().data_ptr() for a in (x, *hx, *cell(x, hx))]
    assert len(set(places)) == len(places)


@pytest.mark.covering(2)
@both
@on_backends
@pytest.mark.parametrize("written", ["y", "h_n", "c_n"])
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        pytest.param(2, dict(), id="usual"),
        pytest.param(1, dict(), id="one-step"),
        pytest.param(2, dict(bidirectional=True), id="both"),
        pytest.param(2, dict(proj_size=2), id="projected"),
    ],
)
def test_writing_into_results_is_right_or_refused(kind, options, steps, written, backend):
    module, x = layer(kind, **options), sequence(steps, requires_grad=True)

    def gradients(write: bool) -> tuple[Tensor, ...]:
        y, (h_n, c_n) = module(x)
        results = {"y": y, "h_n": h_n, "c_n": c_n}
        results[written] = results[written].mul_(3) if write else results[written] * 3
        total = torch.stack([a.square().sum() for a in results.values()]).sum()
        return torch.autograd.grad(total, [x, *module.parameters()])

    with running_on(backend):
        expected = gradients(write=False)
        try:
            found = gradients(write=True)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            assert written == "y"
            return
    torch.testing.assert_close(found, expected)


# --- threads and processes ---


@both
@pytest.mark.parametrize("shared", [False, True], ids=["own-layers", "one-layer"])
def test_threads_compute_what_each_computes_alone(kind, shared):
    """Also with other pins and another backend in force in each."""
    modules = [layer(kind, seed=seed) for seed in (0, 0 if shared else 1)]
    if shared:
        modules[1] = modules[0]
    inputs = [sequence(seed=seed, requires_grad=True) for seed in (1, 2)]
    ways = [("torch", 2), ("reference", 3)]

    def run(k: int) -> dict[str, Tensor]:
        backend, chunk = ways[k]
        with use_backend(backend), plan.forced(chunk=chunk):
            return differentiate(modules[k], inputs[k])

    alone, found, start = [run(0), run(1)], {}, threading.Barrier(2)

    def repeat(k: int) -> None:
        start.wait()
        found[k] = [run(k) for _ in range(8)]

    threads = [threading.Thread(target=repeat, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        for results in found[k]:
            assert_equal(results, alone[k])


CHILD = """
import multiprocessing
import sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("the device was initialised")

torch.cuda._lazy_init = refuse
torch.set_num_threads(1)
before = set(sys.modules)
import novolstm_triton
print(*{name.partition(".")[0] for name in set(sys.modules) - before})

def gradients():
    torch.manual_seed(0)
    found = []
    for kind in (novolstm_triton.LSTM, novolstm_triton.NovoLSTM):
        layer = kind(3, 4, num_layers=2, bidirectional=True)
        layer(torch.randn(5, 2, 3))[0].square().sum().backward()
        found += [p.grad for p in layer.parameters()]
    return [g.tolist() for g in found]

def child(connection):
    connection.send(gradients())

context = multiprocessing.get_context("fork")
receiver, sender = context.Pipe(duplex=False)
process = context.Process(target=child, args=(sender,))
process.start()
results = receiver.recv()
process.join()
assert process.exitcode == 0
print(results == gradients())
print(torch.cuda.is_initialized() or "novolstm_triton.engines.launch" in sys.modules)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_import_brings_nothing_else_and_layers_work_after_a_fork_without_a_device():
    """In a process of its own, which has imported PyTorch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    new, same, touched = run.stdout.splitlines()
    assert (new, same, touched) == ("novolstm_triton", "True", "False")
