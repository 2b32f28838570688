"""The model of a step's roofline: it reproduces a published measurement, and follows from its terms as it should."""

import importlib
import math
import pathlib
import sys

import pytest
import torch

from novolstm_triton import plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
roofline = importlib.import_module("bench.roofline")

BF16 = roofline.Sizes(steps=1024, batch=16, inputs=512, hidden=512, itemsize=2)


def test_anchor_is_reproduced_and_its_links_are_needed():
    anchor = roofline.ANCHOR
    terms = roofline.step_terms(anchor.cell, anchor.sizes, anchor.slicing, anchor.gpu)
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


def test_roofline_of_two_passes_is_more_than_forward():
    slicing = roofline.Slicing(slices=16)
    forward = roofline.step_us(roofline.NOVOLSTM, BF16, slicing, roofline.H200)
    both = roofline.step_us(roofline.NOVOLSTM, BF16, slicing, roofline.H200, backward=slicing)
    # Backward exchanges and multiplies more than forward does.
    assert both > 2 * forward


def test_exchanges_rank_by_their_round_trips():
    times = {
        name: roofline.exchange_us(roofline.H200, roofline.Slicing(16, exchange=name)) for name in ("barrier", "words")
    }
    assert times["words"] < times["barrier"]
    assert roofline.exchange_us(roofline.H200, roofline.Slicing(1, exchange="none")) < times["words"]
    with pytest.raises(ValueError, match="no thread-block clusters"):
        roofline.exchange_us(roofline.A100, roofline.Slicing(16, exchange="cluster"))


def test_weights_bound_a_single_slice_and_slices_share_them():
    alone = roofline.recurrence_terms(roofline.NOVOLSTM, BF16, roofline.Slicing(1, exchange="none"), roofline.H200)
    shared = roofline.recurrence_terms(roofline.NOVOLSTM, BF16, roofline.Slicing(16), roofline.H200)
    # 5·512² weights of two bytes, 128 bytes a clock.
    assert alone["product"] == pytest.approx(5 * 512**2 * 2 / 128 / 1980, rel=1e-6)
    assert shared["product"] < alone["product"] / 4
    assert "gather" not in alone


@pytest.mark.parametrize(
    ("change", "factor"), [(dict(batch=256), 2), (dict(hidden=2048), 2), (dict(itemsize=4), 1.5)], ids=str
)
def test_larger_layers_take_longer(change, factor):
    sizes = roofline.Sizes(**{**roofline.dataclasses.asdict(BF16), **change})
    larger, base = (roofline.step_us(roofline.NOVOLSTM, s, roofline.Slicing(16), roofline.H200) for s in (sizes, BF16))
    assert larger > factor * base


def test_launches_are_spread_over_the_steps():
    short = roofline.Sizes(steps=4, batch=16, inputs=512, hidden=512, itemsize=2)
    assert roofline.outside_terms(roofline.LSTM, short, roofline.H100)["launches"] == pytest.approx(
        roofline.H100.launch_us / 4
    )


def test_measured_constants_replace_the_model():
    gpu = roofline.with_measured(roofline.H200, {"barrier_us": {"8": 0.5, "16": 0.7}, "handoff_us": 0.3})
    assert roofline.barrier_us(gpu, 16) == 0.7
    assert roofline.barrier_us(gpu, 12) == pytest.approx(0.6)
    assert roofline.barrier_us(gpu, 2) == 0.5
    assert roofline.barrier_us(gpu, 64) == 0.7
    assert roofline.exchange_us(gpu, roofline.Slicing(8, exchange="words")) > 0.3
    with pytest.raises(ValueError, match="a constant of Gpu"):
        roofline.with_measured(roofline.H200, {"speed": 1.0})
    with pytest.raises(ValueError, match="positive"):
        roofline.with_measured(roofline.H200, {"clocks_per_us": math.nan})


@pytest.mark.parametrize(
    "fields",
    [dict(slices=0), dict(slices=1), dict(slices=4, exchange="none"), dict(slices=2, exchange="mail")],
    ids=str,
)
def test_impossible_slicings_are_refused(fields):
    with pytest.raises(ValueError, match=r"exchange|expected"):
        roofline.Slicing(**fields)


def test_devices_are_found_by_their_full_names():
    assert roofline.gpu_named("NVIDIA H200") is roofline.H200
    assert roofline.gpu_named("NVIDIA A100-SXM4-80GB") is roofline.A100
    assert roofline.gpu_named("Radeon") is None


def test_cpu_roofline_is_operations_or_bytes():
    sizes = roofline.Sizes(steps=8, batch=4, inputs=16, hidden=32, itemsize=4)
    slow_sums, slow_reads = roofline.Cpu(1.0, 1e9), roofline.Cpu(1e9, 1.0)
    assert roofline.cpu_step_us(roofline.LSTM, sizes, slow_sums) == 2 * 4 * 4 * 32 * 48
    assert roofline.cpu_step_us(roofline.LSTM, sizes, slow_sums, backward=True) == 3 * 2 * 4 * 4 * 32 * 48
    assert roofline.cpu_step_us(roofline.LSTM, sizes, slow_reads) == 4 * 32 * 32 * 4


@pytest.mark.parametrize("exchange", plan.EXCHANGES)
def test_plans_of_every_exchange_have_a_roofline(exchange):
    sizes = roofline.Sizes(steps=1024, batch=16, inputs=128, hidden=128, itemsize=2)
    plans = plan.plan(128, 16, torch.bfloat16, plan.H200, pins=plan.Pins(exchange=exchange))
    both = dict(forward=plans.forward, backward=plans.backward)
    forward, total = (
        roofline.of_plan(roofline.NOVOLSTM, sizes, roofline.H200, both, backward=b) for b in (False, True)
    )
    assert 0.5 < forward < total < 50


def test_layers_without_a_plan_are_held_to_the_best_slicing():
    best = roofline.of_plan(roofline.LSTM, BF16, roofline.H200, None, backward=False)
    assert best < roofline.step_us(roofline.LSTM, BF16, roofline.Slicing(2), roofline.H200)
    # How another's backward works is not known, nor an unknown device.
    assert roofline.of_plan(roofline.LSTM, BF16, roofline.H200, None, backward=True) is None
    assert roofline.of_plan(roofline.LSTM, BF16, None, None, backward=False) is None


def test_one_exchange_a_step_in_backward_lowers_its_roofline():
    plans = [plan.plan(512, 16, torch.bfloat16, plan.H200, pins=plan.Pins(slices=16, exchanges=n)) for n in (1, 2)]
    one, two = (
        roofline.of_plan(
            roofline.NOVOLSTM, BF16, roofline.H200, dict(forward=p.forward, backward=p.backward), backward=True
        )
        for p in plans
    )
    saved = roofline.exchange_us(roofline.H200, roofline.Slicing(16, exchange=plans[0].backward.exchange))
    assert two - one == pytest.approx(saved, rel=0.2)
