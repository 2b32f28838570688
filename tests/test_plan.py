"""The plan is pure, stays within its device, and honours pins or says why not."""

import dataclasses
import itertools
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from novolstm_triton import plan
from novolstm_triton.cells import with_kernels
from novolstm_triton.functional import novolstm

from .support.problems import Problem

DEVICES = [plan.H100, plan.H200, plan.B200, plan.A100, plan.RTX_4090, plan.MI300X, plan.INTERPRETER]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def kernel_plans(hidden, batch, dtype, device, **options):
    both = plan.plan(hidden, batch, dtype, device, **options)
    return [both.forward, both.backward]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@given(
    hidden=st.integers(1, 8192),
    batch=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    cell=st.sampled_from(sorted(with_kernels())),
)
def test_stays_within_the_device(device, hidden, batch, dtype, cell):
    for p in kernel_plans(hidden, batch, dtype, device, cell=cell):
        assert p.smem_bytes <= device.smem_bytes
        assert p.slices == 1 or p.slices * p.tiles_per_launch <= device.multiprocessors
        assert (p.exchange == "none") == (p.slices == 1)
        # Every unit and every row has a program, and every tile is one that tl.dot takes.
        assert (p.slices - 1) * p.units < hidden <= p.slices * p.units
        assert p.units <= p.block_n
        assert 1 <= p.tiles_per_launch <= p.tiles == -(-batch // p.block_b)
        for size in (p.block_b, p.block_n, p.block_k):
            assert size >= 16
            assert size & (size - 1) == 0


def test_is_pure_and_frozen():
    first, second = (plan.plan(512, 16, torch.bfloat16, plan.H100) for _ in range(2))
    assert first == second
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(first.forward, "slices", 2)  # noqa: B010


@pytest.mark.parametrize(
    ("device", "hidden", "dtype", "slices", "resident"),
    [
        pytest.param(plan.H100, 128, torch.bfloat16, 1, True, id="H100-128-one-slice"),
        pytest.param(plan.H200, 512, torch.bfloat16, 16, True, id="H200-512"),
        pytest.param(plan.H100, 1024, torch.bfloat16, 64, True, id="H100-1024"),
        pytest.param(plan.A100, 128, torch.bfloat16, 4, True, id="A100-128-does-not-fit-one"),
        pytest.param(plan.A100, 1024, torch.bfloat16, 64, False, id="A100-1024-streams"),
        pytest.param(plan.H100, 2048, torch.bfloat16, None, False, id="H100-2048-streams"),
        pytest.param(plan.H100, 4096, torch.bfloat16, None, False, id="H100-4096-streams"),
        pytest.param(plan.RTX_4090, 512, torch.bfloat16, 32, True, id="4090-512"),
        pytest.param(plan.INTERPRETER, 1000, torch.float32, 1, True, id="interpreter"),
    ],
)
def test_known_choices(device, hidden, dtype, slices, resident):
    p = plan.plan(hidden, 16, dtype, device).forward
    assert slices is None or p.slices == slices
    assert p.resident is resident


def test_hidden_beyond_the_device_names_limit_and_value():
    with pytest.raises(ValueError, match=r"no plan for hidden=100000 fits RTX 4090: .* the limit 101376"):
        plan.plan(100_000, 1, torch.float32, plan.RTX_4090)


def test_large_batch_runs_in_successive_launches():
    p = plan.plan(1024, 4096, torch.bfloat16, plan.H100).forward
    assert p.tiles > p.tiles_per_launch


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
@pytest.mark.parametrize("hidden", [8, 64, 100, 257])
def test_pins_are_honoured(hidden, slices):
    with plan.forced(slices=slices, block_b=32, block_k=16, resident=False, num_warps=2):
        for p in kernel_plans(hidden, 40, torch.bfloat16, plan.H100):
            assert (p.slices, p.block_b, p.block_k, p.resident, p.num_warps) == (slices, 32, 16, False, 2)


def test_pins_nest_and_end():
    with plan.forced(slices=4):
        with plan.forced(block_b=32):
            assert plan.pinned() == plan.Pins(slices=4, block_b=32)
        assert plan.pinned() == plan.Pins(slices=4)
    assert plan.pinned() == plan.Pins()


@pytest.mark.parametrize("exchange", plan.EXCHANGES)
@pytest.mark.parametrize("hidden", [20, 64])
def test_exchange_pin(exchange, hidden):
    with plan.forced(exchange=exchange):
        for p in kernel_plans(hidden, 4, torch.bfloat16, plan.H100):
            assert p.exchange == exchange


def test_split_k_pin():
    assert [p.parts for p in kernel_plans(1024, 16, torch.bfloat16, plan.H100)] == [4, 4]
    with plan.forced(split_k=False):
        assert [p.parts for p in kernel_plans(1024, 16, torch.bfloat16, plan.H100)] == [1, 1]


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        pytest.param(dict(slices=0), "slices: expected at least 1, got 0", id="slices-0"),
        pytest.param(dict(chunk=-1), "chunk: expected at least 1, got -1", id="chunk"),
        pytest.param(dict(block_b=24), "block_b: expected a power of two of at least 16, got 24", id="block_b"),
        pytest.param(dict(block_k=8), "block_k: expected a power of two of at least 16, got 8", id="block_k"),
        pytest.param(dict(num_warps=3), "num_warps: expected a power of two from 1 to 32, got 3", id="num_warps"),
        pytest.param(dict(ctas=3), r"ctas: expected one of \[1, 2, 4, 8, 16\], got 3", id="ctas"),
        pytest.param(dict(exchanges=3), "exchanges: expected 1 or 2, got 3", id="exchanges"),
        pytest.param(dict(exchange="pigeon"), "exchange: expected one of .*barrier.*, got 'pigeon'", id="exchange"),
    ],
)
def test_pins_that_no_plan_can_have(pins, message):
    with pytest.raises(ValueError, match=message), plan.forced(**pins):
        pass


@pytest.mark.parametrize(
    ("pins", "hidden", "device", "message"),
    [
        pytest.param(dict(slices=9), 8, plan.H100, "slices=9: .* hidden=8", id="more-slices-than-units"),
        pytest.param(dict(slices=200), 512, plan.H100, "slices=200: .* H100 holds 132", id="more-than-resident"),
        pytest.param(
            dict(slices=2, exchange="none"), 64, plan.H100, "slices=2 needs 'barrier' or 'words'", id="no-exchange"
        ),
        pytest.param(dict(slices=1, exchange="barrier"), 64, plan.H100, "slices=1 needs 'none'", id="one-slice"),
        pytest.param(dict(exchange="barrier"), 1, plan.H100, "needs two slices: hidden=1", id="barrier-of-one"),
        pytest.param(
            dict(slices=1, resident=True),
            1024,
            plan.H100,
            r"least shared memory .* \d+ bytes, the limit 232448",
            id="smem",
        ),
        pytest.param(dict(exchange="words"), 4096, plan.H100, "least shared memory", id="words-do-not-fit"),
        pytest.param(dict(exchange="words", resident=False), 64, plan.H100, "needs the weights on chip", id="words"),
        pytest.param(dict(num_warps=32), 64, plan.MI300X, "num_warps=32: .* 1024 threads", id="threads"),
        pytest.param(dict(slices=2), 64, plan.INTERPRETER, "interpreter holds 1", id="interpreter"),
    ],
)
def test_impossible_pins_name_limit_and_value(pins, hidden, device, message):
    with plan.forced(**pins), pytest.raises(ValueError, match=message):
        plan.plan(hidden, 16, torch.bfloat16, device)


def test_impossible_pin_stops_the_call_before_anything_runs():
    inputs, _, _ = Problem(steps=2, batch=2, hidden=4).draw()
    with plan.forced(slices=2), pytest.raises(ValueError, match="interpreter holds 1"):
        novolstm(*(a.float() for a in inputs), backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_chunk(backend):
    with plan.forced(chunk=3):
        assert plan.chunk_steps(64, 512, 5, 2, backend) == 3
    assert 100 <= plan.chunk_steps(64, 512, 5, 2, "triton") <= 500
    assert plan.chunk_steps(1024, 4096, 5, 2, backend) >= 8


def test_no_cliff_from_one_row_to_thousands():
    """Twice the rows never cost much more than twice the time, nor does a row cost more in a larger batch."""
    for hidden, device in itertools.product((64, 256, 512, 1024, 2048, 4096), (plan.H200, plan.A100)):
        launches = [plan.plan(hidden, 2**n, torch.bfloat16, device) for n in range(13)]
        for small, large in itertools.pairwise(launches):
            for a, b in ((small.forward, large.forward), (small.backward, large.backward)):
                assert a.step_us <= b.step_us * 1.001
                assert b.step_us <= 2.3 * a.step_us, f"{hidden} {device.name}: {a} to {b}"


@pytest.mark.parametrize("batch", [1024, 4096])
@pytest.mark.parametrize("hidden", [256, 512, 1024, 2048])
def test_large_batches_run_forward_in_tiles_of_a_warp_group(hidden, batch):
    assert plan.plan(hidden, batch, torch.bfloat16, plan.H200).forward.block_b == 64


class TestCluster:
    PINS: ClassVar[dict[str, Any]] = dict(exchange=plan.RACY, allow_races=True)

    def test_is_refused_for_its_race(self):
        words = r"expected one of .*, got 'cluster', which is refused: .* a race"
        with pytest.raises(ValueError, match=words):
            plan.Pins(exchange="cluster")
        with pytest.raises(ValueError, match=words), plan.forced(exchange="cluster"):
            pass

    def test_is_no_choice_of_the_plan(self):
        for p in (k for hidden in (64, 256, 512) for k in kernel_plans(hidden, 16, torch.bfloat16, plan.H200)):
            assert (p.exchange in plan.EXCHANGES, p.ctas) == (True, 1)

    def test_shares_out_the_weights(self):
        launch = plan.plan(512, 16, torch.bfloat16, plan.H200, pins=plan.Pins(**self.PINS))
        assert (launch.forward.exchange, launch.forward.slices, launch.forward.ctas) == ("cluster", 1, 16)
        assert launch.forward.smem_bytes < plan.H200.smem_bytes < 5 * 512 * 512 * 2

    def test_takes_the_pinned_size(self):
        launch = plan.plan(256, 16, torch.bfloat16, plan.H200, pins=plan.Pins(**self.PINS, ctas=4))
        assert launch.forward.ctas == launch.backward.ctas == 4

    @pytest.mark.parametrize(
        ("hidden", "device", "pins", "words"),
        [
            (256, plan.A100, {}, "compute capability 9.0"),
            (256, plan.MI300X, {}, "compute capability 9.0"),
            (256, plan.H200, dict(slices=2), "slices=2: a cluster is a single slice"),
            (256, plan.H200, dict(ctas=1), "ctas=1: exchange='cluster' needs one of"),
            (256, plan.H200, dict(exchange="barrier", ctas=4), "ctas: expected 1, got 4: only a cluster"),
            (256, plan.H200, dict(resident=False), "needs the weights on chip"),
            (64, plan.H200, dict(ctas=16), "16 thread blocks need hidden > 128, got 64"),
            (2048, plan.H200, {}, "no plan for hidden=2048 fits H200"),
        ],
    )
    def test_does_not_fit(self, hidden, device, pins, words):
        with pytest.raises(ValueError, match=words):
            plan.plan(hidden, 16, torch.bfloat16, device, pins=plan.Pins(**(self.PINS | pins)))
