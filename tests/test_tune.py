"""The search for tuned plans: with a measuring that is made up, in a process of its own, and in the interpreter."""

import dataclasses
import math
import textwrap

import pytest
import torch

from novolstm_triton import plan
from novolstm_triton.app import measure, tune
from novolstm_triton.app.cli import main
from novolstm_triton.app.isolated import CallError, Isolated
from novolstm_triton.app.text import UsageError
from novolstm_triton.engines import launch
from novolstm_triton.plans import tuned
from novolstm_triton.plans.tuned import Key
from novolstm_triton.problems import excess
from novolstm_triton.testing import cooperative

from .support.interpreted import ROOMY

GPU = plan.Device("some GPU", "cuda", 90, multiprocessors=64, smem_bytes=232448)
KEY = Key(256, 16, "bf16", "formula", "forward")
RIGHT = {"y": (0.5, 1.0)}


class MadeUp:
    """Measures as told: `cost` gives the time of choices, `check` what a check of them returns or raises."""

    def __init__(self, cost=lambda choices: 1.0, check=lambda choices: RIGHT):
        self.cost, self.check, self.timed = cost, check, []

    def call(self, function, timeout_s, **arguments):
        if function == "describe_device":
            return dataclasses.asdict(GPU)
        if function == "check_plan":
            return self.check(arguments["choices"])
        assert function == "time_plan"
        self.timed.append((Key(**arguments["key"]), arguments["choices"]))
        return self.cost(arguments["choices"])


def run(out, calls, *keys, **options):
    """Return the keys that failed and the lines said."""
    lines = []
    failed = tune.tune(keys or [KEY], out, calls=calls, say=lines.append, **options)
    return failed, lines


def entries(path):
    (file,) = tuned.read(path)
    return {entry.key: entry for entry in file.entries}


@pytest.fixture(autouse=True)
def nothing_in_force():
    yield
    tuned.put_in_force(None)


# --- the search ---


def test_keys_are_all_combinations_in_both_directions():
    keys = list(tune.keys([8, 16], [1, 2], ["bf16", "fp32"], ["formula", "notebook"]))
    assert len(set(keys)) == len(keys) == 32
    assert Key(16, 2, "fp32", "notebook", "backward") in keys


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_candidates_start_with_the_models_choice_and_use_every_exchange(direction):
    key = dataclasses.replace(KEY, hidden=64, direction=direction)
    choices = tune.enumerate_choices(key, GPU)
    modelled = plan.plan(64, 16, torch.bfloat16, GPU, plans=tuned.TunedPlans())
    assert choices[0] == tuned.choices_of(getattr(modelled, direction))
    assert {c["exchange"] for c in choices} == set(plan.EXCHANGES)
    assert len({c["slices"] for c in choices}) > 2
    assert {c["resident"] for c in choices} == {True, False}
    for one in choices:
        # Pinned again, a candidate is a plan with these choices.
        again = plan.candidates(64, 16, torch.bfloat16, GPU, backward=direction == "backward", pins=plan.Pins(**one))
        assert one in [tuned.choices_of(kernel_plan) for kernel_plan in again]


def distance_to(wanted):
    return lambda choices: 1.0 + sum(choices[name] != value for name, value in wanted.items())


def test_fastest_plan_is_found_written_and_planned(tmp_path):
    wanted = dict(exchange="words", num_warps=16, block_k=32, slices=4)
    failed, lines = run(tmp_path / "plans.json", calls := MadeUp(distance_to(wanted)), candidates=100)
    assert failed == []
    assert "1.00 µs a step: " in lines[-1]
    entry = entries(tmp_path / "plans.json")[KEY]
    assert entry.choices.items() >= wanted.items()
    assert entry.step_us == 1.0
    choices = [c for _, c in calls.timed]
    assert all(choices.count(c) == 1 for c in choices)
    before = plan.plan(256, 16, torch.bfloat16, GPU).forward
    tuned.load(tmp_path / "plans.json")
    after = plan.plan(256, 16, torch.bfloat16, GPU).forward
    assert tuned.choices_of(before) != tuned.choices_of(after) == entry.choices


def test_few_candidates_are_the_models_best(tmp_path):
    run(tmp_path / "plans.json", calls := MadeUp(), candidates=3)
    assert [c for _, c in calls.timed[:3]] == tune.enumerate_choices(KEY, GPU)[:3]


def test_models_choice_says_so(tmp_path):
    first = tune.enumerate_choices(KEY, GPU)[0]
    _, lines = run(tmp_path / "plans.json", MadeUp(distance_to(first)))
    assert "(the model's choice)" in lines[-1]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        pytest.param({"y": (0.1, 1.0), "h_n": (2.0, 1.0)}, "wrong results: h_n is off by 2.0e+00", id="wrong"),
        pytest.param({"y": (math.nan, 1.0), "h_n": (0.5, 1.0)}, "wrong results: y is off by nan", id="nan"),
        pytest.param(CallError("no answer within 5 s"), "no answer within 5 s", id="hangs"),
    ],
)
def test_plan_that_fails_its_check_is_left_out_and_reported(outcome, message, tmp_path):
    def check(choices):
        if choices["exchange"] == "words":
            return RIGHT
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    # Without the check it would be the fastest.
    calls = MadeUp(lambda choices: 2.0 if choices["exchange"] == "words" else 1.0, check)
    failed, lines = run(tmp_path / "plans.json", calls)
    assert failed == []
    assert entries(tmp_path / "plans.json")[KEY].choices["exchange"] == "words"
    assert any("left out" in line and message in line for line in lines)


def test_key_without_a_plan_that_passes_is_reported_and_the_others_go_on(tmp_path):
    def check(choices):
        return RIGHT if choices["slices"] == 1 else {"y": (2.0, 1.0)}

    small = dataclasses.replace(KEY, hidden=16)
    # One slice of 2048 units fits no such device.
    failed, lines = run(
        tmp_path / "plans.json", MadeUp(check=check), large := Key(4096, 16, "bf16", "formula", "forward"), small
    )
    assert failed == [large]
    assert any("no candidate passed" in line for line in lines)
    assert list(entries(tmp_path / "plans.json")) == [small]


# --- the file ---


def test_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path):
    out, keys = tmp_path / "plans.json", [KEY, dataclasses.replace(KEY, direction="backward")]

    def interrupt(choices):
        if [key for key, _ in calls.timed][-1] == keys[1]:
            raise KeyboardInterrupt
        return 1.0

    calls = MadeUp(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(out, calls, *keys)
    assert list(entries(out)) == keys[:1]
    _, lines = run(out, again := MadeUp(), *keys)
    assert {key for key, _ in again.timed} == {keys[1]}
    assert list(entries(out)) == keys
    assert "already" in lines[0]


@pytest.mark.parametrize(
    ("device", "versions", "message"),
    [
        pytest.param(dataclasses.replace(GPU, name="other GPU"), None, "another device.*other GPU", id="device"),
        pytest.param(GPU, {"torch": "1.0"}, "another versions|of another", id="versions"),
    ],
)
def test_file_of_another_machine_is_left_alone(device, versions, message, tmp_path):
    out = tmp_path / "plans.json"
    tuned.write(out, device, versions or {}, [])
    before = out.read_text()
    with pytest.raises(UsageError, match=message):
        run(out, MadeUp())
    assert out.read_text() == before


def test_file_that_is_none_of_plans_is_left_alone(tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("my notes")
    with pytest.raises(UsageError, match=r"--out: .*notes\.txt"):
        run(out, MadeUp())
    assert out.read_text() == "my notes"


# --- measuring ---


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_measured_plan_is_the_one_that_runs(direction):
    key = Key(20, 3, "fp32", "formula", direction)
    arguments = dict(key=dataclasses.asdict(key), device=dataclasses.asdict(ROOMY), where="cpu")
    programs = {}
    for slices in (1, 3, 4):
        choices = dict(slices=slices, block_b=16, block_k=32, resident=True)
        with cooperative(1) as report, plan.forced(device=ROOMY):
            checked = measure.check_plan(choices=choices, **arguments)
        assert all(excess(*pair) <= 1 for pair in checked.values())
        programs[slices] = report.programs
    assert programs[4] - programs[3] == 1
    assert programs[3] - programs[1] == 2


def test_wrong_kernel_fails_its_check(monkeypatch):
    vectors = launch.vectors_with_gain
    monkeypatch.setattr(launch, "vectors_with_gain", lambda *arguments: 1.1 * vectors(*arguments))
    device = measure.describe_device("cpu")
    checked = measure.check_plan(dataclasses.asdict(Key(4, 2, "fp32", "formula", "forward")), {}, device, "cpu")
    assert excess(*checked["y"]) > 1


def test_plan_that_cannot_be_or_does_not_run_is_no_measurement():
    device = dataclasses.asdict(GPU)
    with pytest.raises(ValueError, match="some GPU holds 64"):
        measure.check_plan(dataclasses.asdict(KEY), dict(slices=65), device, "cpu")
    with plan.forced(slices=2), pytest.raises(ValueError, match=r"expected .*'slices': 4.* the plan has .*'slices': 2"):
        measure.time_plan(dataclasses.asdict(KEY), dict(slices=4), device, "cpu")


def test_whole_run_in_the_interpreter(tmp_path, monkeypatch):
    # The interpreter is slow: of all neighbours the one that streams its weights.
    monkeypatch.setattr(tune, "_LADDERS", {})
    out = tmp_path / "plans.json"
    keys = list(tune.keys([4], [2], ["fp32"], ["lstm"]))
    lines = []
    failed = tune.tune(keys, out, where="cpu", steps=2, candidates=1, say=lines.append)
    assert failed == [], lines
    (file,) = tuned.read(out)
    assert file.device == plan.INTERPRETER
    assert [entry.key for entry in file.entries] == keys
    assert all(entry.step_us > 0 for entry in file.entries)


# --- processes ---


@pytest.fixture
def process(tmp_path, monkeypatch):
    (tmp_path / "badly_behaved.py").write_text(
        textwrap.dedent("""
        import os, sys, time
        def double(number): print("noise"); return 2 * number
        def hang(): time.sleep(600)
        def die(): print("last words", file=sys.stderr); os._exit(7)
        def fail(): raise ValueError("two\\nlines")
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Isolated("badly_behaved") as process:
        yield process


@pytest.mark.parametrize(
    ("function", "timeout_s", "message"),
    [
        pytest.param("hang", 0.2, "no answer within 0.2 s", id="hangs"),
        pytest.param("die", 60, "ended with 7: last words", id="dies"),
        pytest.param("fail", 60, "ValueError: two lines", id="raises"),
    ],
)
def test_lost_call_costs_itself_alone(function, timeout_s, message, process):
    assert process.call("double", 60, number=4) == 8
    child = process._process
    with pytest.raises(CallError, match=message):
        process.call(function, timeout_s)
    assert child.poll() is not None
    if function == "hang":
        assert process.call("double", 60, number=5) == 10


# --- the command ---


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--hidden", "256,512", "--batch", "16,64", "--dtype", "bf16"]) == 1
    output = capsys.readouterr()
    assert output.err == "novolstm: tune measures plans on a GPU, and PyTorch sees none here\n"
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_command_passes_its_options_on(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", lambda wanted, out, **options: asked.append((wanted, options)) or wanted[:1])
    assert main(["tune", "--hidden", "8,16,8", "--cell", "notebook", "--candidates", "5"]) == 1
    ((wanted, options),) = asked
    assert wanted == list(tune.keys([8, 16], [16], ["bf16"], ["notebook"]))
    assert options == dict(steps=256, candidates=5, timeout_s=120.0)
    assert "3 of 4 kernels tuned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--hidden", "0"], "--hidden: expected numbers of at least 1", id="hidden"),
        pytest.param(["--hidden", str(2**24 + 1)], "at most 16777216, with commas", id="hidden-huge"),
        pytest.param(["--hidden", "9" * 5000], "--hidden: expected numbers of at least 1", id="hidden-long"),
        pytest.param(["--hidden", ""], "--hidden: expected numbers of at least 1", id="hidden-empty"),
        pytest.param(["--hidden", "8", "--timeout", "nan"], "--timeout", id="timeout"),
        pytest.param(["--hidden", "8", "--candidates", "0"], "--candidates", id="candidates"),
        pytest.param(["--hidden", "8", "--steps", "x"], "--steps", id="steps"),
        pytest.param(["--hidden", "8", "--batch", "4,x"], "--batch: expected numbers", id="batch"),
        pytest.param(
            ["--hidden", "8", "--dtype", "fp64"], "--dtype: expected names among bf16, fp16, fp32", id="dtype"
        ),
        pytest.param(["--hidden", "8", "--cell", "no_cell"], "--cell: expected names among", id="cell"),
        pytest.param(
            ["--hidden", "8", "--cell", "gru_reset_before"], "--cell: expected names among", id="cell-without-kernels"
        ),
    ],
)
def test_bad_option_names_itself(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
