"""No plan holds more programs that wait for each other than its device, and none of them waits forever."""

import dataclasses

import pytest
import torch

from novolstm_triton import plan
from novolstm_triton.engines import launch
from novolstm_triton.testing import cooperative

from .support.interpreted import ROOMY
from .support.pages import DEVICES as DEVICE_TABLE
from .support.pages import PROTOCOLS as PROTOCOL_TABLE
from .support.pages import device_row, protocol_row, read_rows
from .support.plan_space import DEVICES, Protocol, flaws, protocol, survey
from .support.seeded_faults import BOUNDED, FAULTS, TWO, mutated

# A device's plans are surveyed once.
pytestmark = pytest.mark.xdist_group("plan space")
ROWS = {
    Protocol(kernel == "backward", exchange, int(exchanges), sums == "yes"): (kernel, exchange, exchanges, sums, waits)
    for kernel, exchange, exchanges, sums, waits in read_rows(PROTOCOL_TABLE)
}


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(device, id=device.name, marks=[pytest.mark.exhaustive] if device is not DEVICES[0] else [])
        for device in DEVICES
    ],
)
def test_plans_of_a_device(device):
    assert device_row(device) in read_rows(DEVICE_TABLE)


def test_table_has_every_protocol():
    assert survey(DEVICES[0]).protocols == set(ROWS)


@pytest.mark.covering(1, of=lambda kind: kind)
@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: "-".join(map(str, kind)))
def test_programs_do_the_same_and_need_nothing_later(kind):
    assert protocol_row(kind) == ROWS[kind]


@pytest.mark.parametrize("name", ["an arrival is not counted", "one arrival too few is awaited"])
def test_sequence_that_does_not_keep_the_rule_is_seen(name):
    """Not by luck: the recorder takes the thresholds as they are."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    kind = Protocol(False, "barrier", 2, True)
    with mutated(fault.file, fault.text()), pytest.raises(Exception, match=r"nobody has written|race"):
        protocol(kind, 2)


def test_flaws_are_seen():
    kernel_plan = next(
        iter(plan.candidates(512, 64, torch.bfloat16, plan.H100, backward=False, pins=plan.Pins(slices=16)))
    )
    assert flaws(plan.H100, 512, kernel_plan) == []
    for changes, words in (
        (dict(tiles_per_launch=9), "144 programs wait for each other on 132"),
        (dict(smem_bytes=10**6), "bytes of shared memory"),
        (dict(num_warps=64), "64 warps"),
        (dict(units=31), "16 slices of 31 units"),
        (dict(tiles_per_launch=0), "no tile"),
    ):
        assert words in flaws(plan.H100, 512, dataclasses.replace(kernel_plan, **changes))[0]


def test_launch_with_more_programs_than_the_device_holds_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "_cached_plan", launch._cached_plan.__wrapped__)
    small = dataclasses.replace(ROOMY, multiprocessors=3)
    right = launch.planning.plan

    def too_many(*args, **kwargs):
        found = right(*args, **kwargs)
        return dataclasses.replace(found, forward=dataclasses.replace(found.forward, tiles_per_launch=2, tiles=2))

    monkeypatch.setattr(launch.planning, "plan", too_many)
    with cooperative() as report, plan.forced(device=small, slices=2):
        with pytest.raises(ValueError, match=r"4 programs wait for each other, and roomy holds 3"):
            TWO.problem.run("triton", torch.float32)
        assert report.programs == 0


def hung(name: str, exchange: str = "barrier") -> str:
    """Return the error of a layer with a mistake whose waits are bounded."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    pins = dict(device=ROOMY, slices=3, chunk=3, exchange=exchange, max_spins=60)
    message = r"^max_spins=60: programs of forward, chunk 0"
    with mutated(fault.file, fault.text()), pytest.raises(RuntimeError, match=message) as error:  # noqa: SIM117
        with cooperative(1, check_races=False), plan.forced(**pins):
            fault.case.problem.run("triton", torch.float32)
    return str(error.value)


def test_bounded_waits_say_who_waited_for_whom():
    assert "slice 1: for 3 arrivals and saw 0" in hung("no arrival after the row statistics")
    assert "arrivals by slice" in hung("no arrival after h")


def test_bounded_waits_name_the_slice_that_is_late():
    source = "            arrive(counter, EXCHANGE, MAX_SPINS)\n            arrivals += SLICES\n        # What nobody"
    skipped = source.replace(
        "            arrive(", "            if (slice != 1) | (step != 1):\n                arrive("
    )
    fault = dataclasses.replace(FAULTS[0], old=source, new=skipped)
    pins = dict(device=ROOMY, slices=3, chunk=3, max_spins=60)
    message = r"slice 0: for 18 arrivals and saw 17; .*, so for slice 1\n"
    with mutated("forward", fault.text()), pytest.raises(RuntimeError, match=message):  # noqa: SIM117
        with cooperative(1, check_races=False), plan.forced(**pins):
            TWO.problem.run("triton", torch.float32)


@pytest.mark.parametrize("exchange", ["barrier", "words"])
def test_bounded_waits_change_nothing_where_nobody_is_late(exchange):
    dataclasses.replace(BOUNDED, exchange=exchange).run(0)
