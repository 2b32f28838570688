"""The model of a step's floor: it reproduces a published measurement, and follows from its terms as it should."""

import importlib
import math
import pathlib
import sys

import pytest
import torch

from novolstm_triton import plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
floor = importlib.import_module("bench.floor")

BF16 = floor.Sizes(steps=1024, batch=16, inputs=512, hidden=512, itemsize=2)


def test_anchor_is_reproduced_and_its_links_are_needed():
    anchor = floor.ANCHOR
    terms = floor.step_terms(anchor.cell, anchor.sizes, anchor.slicing, anchor.gpu)
    total = sum(terms.values())
    # `pytest -s` shows it.
    print(f"\n{anchor.source}: measured {anchor.measured_us} us, modelled {total:.2f} us")
    for name, value in terms.items():
        print(f"    {name:15} {value:6.3f} us  {value / total:4.0%}")
    assert total == pytest.approx(anchor.measured_us, rel=0.2)
    # Without its three largest links the model would not reproduce it: no term makes up for another's absence.
    for name in ("exchange", "gather", "stage"):
        assert total - terms[name] < 0.8 * anchor.measured_us
    assert all(value >= 0 for value in terms.values())


def test_floor_of_two_passes_is_more_than_forward():
    slicing = floor.Slicing(slices=16)
    forward = floor.step_us(floor.NOVOLSTM, BF16, slicing, floor.H200)
    both = floor.step_us(floor.NOVOLSTM, BF16, slicing, floor.H200, backward=slicing)
    # Backward exchanges and multiplies more than forward does.
    assert both > 2 * forward


def test_exchanges_rank_by_their_round_trips():
    times = {name: floor.exchange_us(floor.H200, floor.Slicing(16, exchange=name)) for name in ("barrier", "words")}
    assert times["words"] < times["barrier"]
    assert floor.exchange_us(floor.H200, floor.Slicing(1, exchange="none")) < times["words"]
    with pytest.raises(ValueError, match="no thread-block clusters"):
        floor.exchange_us(floor.A100, floor.Slicing(16, exchange="cluster"))


def test_weights_bound_a_single_slice_and_slices_share_them():
    alone = floor.recurrence_terms(floor.NOVOLSTM, BF16, floor.Slicing(1, exchange="none"), floor.H200)
    shared = floor.recurrence_terms(floor.NOVOLSTM, BF16, floor.Slicing(16), floor.H200)
    # 5·512² weights of two bytes, 128 bytes a clock.
    assert alone["product"] == pytest.approx(5 * 512**2 * 2 / 128 / 1980, rel=1e-6)
    assert shared["product"] < alone["product"] / 4
    assert "gather" not in alone


@pytest.mark.parametrize(
    ("change", "factor"), [(dict(batch=256), 2), (dict(hidden=2048), 2), (dict(itemsize=4), 1.5)], ids=str
)
def test_larger_layers_take_longer(change, factor):
    sizes = floor.Sizes(**{**floor.dataclasses.asdict(BF16), **change})
    larger, base = (floor.step_us(floor.NOVOLSTM, s, floor.Slicing(16), floor.H200) for s in (sizes, BF16))
    assert larger > factor * base


def test_launches_are_spread_over_the_steps():
    short = floor.Sizes(steps=4, batch=16, inputs=512, hidden=512, itemsize=2)
    assert floor.outside_terms(floor.LSTM, short, floor.H100)["launches"] == pytest.approx(floor.H100.launch_us / 4)


def test_measured_constants_replace_the_model():
    gpu = floor.with_measured(floor.H200, {"barrier_us": {"8": 0.5, "16": 0.7}, "handoff_us": 0.3})
    assert floor.barrier_us(gpu, 16) == 0.7
    assert floor.barrier_us(gpu, 12) == pytest.approx(0.6)
    assert floor.barrier_us(gpu, 2) == 0.5
    assert floor.barrier_us(gpu, 64) == 0.7
    assert floor.exchange_us(gpu, floor.Slicing(8, exchange="words")) > 0.3
    with pytest.raises(ValueError, match="a constant of Gpu"):
        floor.with_measured(floor.H200, {"speed": 1.0})
    with pytest.raises(ValueError, match="positive"):
        floor.with_measured(floor.H200, {"clocks_per_us": math.nan})


@pytest.mark.parametrize(
    "fields",
    [dict(slices=0), dict(slices=1), dict(slices=4, exchange="none"), dict(slices=2, exchange="mail")],
    ids=str,
)
def test_impossible_slicings_are_refused(fields):
    with pytest.raises(ValueError, match=r"exchange|expected"):
        floor.Slicing(**fields)


def test_devices_are_found_by_their_full_names():
    assert floor.gpu_named("NVIDIA H200") is floor.H200
    assert floor.gpu_named("NVIDIA A100-SXM4-80GB") is floor.A100
    assert floor.gpu_named("Radeon") is None


def test_cpu_floor_is_operations_or_bytes():
    sizes = floor.Sizes(steps=8, batch=4, inputs=16, hidden=32, itemsize=4)
    slow_sums, slow_reads = floor.Cpu(1.0, 1e9), floor.Cpu(1e9, 1.0)
    assert floor.cpu_step_us(floor.LSTM, sizes, slow_sums) == 2 * 4 * 4 * 32 * 48
    assert floor.cpu_step_us(floor.LSTM, sizes, slow_sums, backward=True) == 3 * 2 * 4 * 4 * 32 * 48
    assert floor.cpu_step_us(floor.LSTM, sizes, slow_reads) == 4 * 32 * 32 * 4


@pytest.mark.parametrize("exchange", plan.EXCHANGES)
def test_plans_of_every_exchange_have_a_floor(exchange):
    sizes = floor.Sizes(steps=1024, batch=16, inputs=128, hidden=128, itemsize=2)
    plans = plan.plan(128, 16, torch.bfloat16, plan.H200, pins=plan.Pins(exchange=exchange))
    both = dict(forward=plans.forward, backward=plans.backward)
    forward, total = (floor.of_plan(floor.NOVOLSTM, sizes, floor.H200, both, backward=b) for b in (False, True))
    assert 0.5 < forward < total < 50


def test_layers_without_a_plan_are_held_to_the_best_slicing():
    best = floor.of_plan(floor.LSTM, BF16, floor.H200, None, backward=False)
    assert best < floor.step_us(floor.LSTM, BF16, floor.Slicing(2), floor.H200)
    # How another's backward works is not known, nor an unknown device.
    assert floor.of_plan(floor.LSTM, BF16, floor.H200, None, backward=True) is None
    assert floor.of_plan(floor.LSTM, BF16, None, None, backward=False) is None


def test_one_exchange_a_step_in_backward_lowers_its_floor():
    plans = [plan.plan(512, 16, torch.bfloat16, plan.H200, pins=plan.Pins(slices=16, exchanges=n)) for n in (1, 2)]
    one, two = (
        floor.of_plan(floor.NOVOLSTM, BF16, floor.H200, dict(forward=p.forward, backward=p.backward), backward=True)
        for p in plans
    )
    saved = floor.exchange_us(floor.H200, floor.Slicing(16, exchange=plans[0].backward.exchange))
    assert two - one == pytest.approx(saved, rel=0.2)
