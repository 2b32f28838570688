"""Files of tuned plans: what is looked up when, what outranks it, and that a bad file is refused in clear words."""

import copy
import dataclasses
import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from novolstm_triton import plan
from novolstm_triton.engines import launch
from novolstm_triton.plans import Pins, tuned
from novolstm_triton.plans.tuned import Entry, Key, PlanFile, TunedPlans
from novolstm_triton.testing import cooperative

from .support.problems import Problem, assert_as_exact_as_eager

GPU = plan.Device("some GPU", "cuda", 90, multiprocessors=64, smem_bytes=232448)
CHOICES = dict(slices=8, block_b=32, resident=True, exchange="barrier")
SIZES = (256, 16, torch.bfloat16, GPU)


@pytest.fixture(autouse=True)
def nothing_in_force(monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    tuned.put_in_force(None)
    tuned._of_environment.cache_clear()
    tuned._shipped.cache_clear()


def entry(choices=CHOICES, **fields) -> Entry:
    key = dict(hidden=256, batch=16, dtype="bf16", cell="formula", direction="forward")
    return Entry(Key(**{**key, **fields}), choices, 1.5)


def plans(*entries, device=GPU) -> TunedPlans:
    return TunedPlans((PlanFile("file", device, {}, entries),))


def write(path, *entries, device=GPU):
    tuned.write(path, device, {"torch": "2.13"}, entries)
    return path


# --- what applies ---


def test_entry_decides_its_direction_alone():
    modelled = plan.plan(*SIZES, plans=TunedPlans())
    both = plan.plan(*SIZES, plans=plans(entry()))
    assert modelled.forward.block_b != CHOICES["block_b"]
    assert tuned.choices_of(both.forward).items() >= CHOICES.items()
    assert both.backward == modelled.backward


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(entry(hidden=255), id="hidden"),
        pytest.param(entry(batch=15), id="smaller-batch"),
        pytest.param(entry(dtype="fp16"), id="dtype"),
        pytest.param(entry(cell="notebook"), id="cell"),
        pytest.param(entry(direction="backward"), id="direction"),
    ],
)
def test_entry_for_something_else_does_not_apply(other):
    assert plans(other).find(*SIZES, backward=False) is None


def test_nearest_batch_at_or_above_applies():
    table = plans(*(entry(dict(slices=slices), batch=batch) for batch, slices in ((64, 4), (16, 8), (256, 2))))
    slices = [plan.plan(256, b, torch.bfloat16, GPU, plans=table).forward.slices for b in (1, 16, 17, 64, 65, 256)]
    assert slices == [8, 8, 4, 4, 2, 2]
    beyond = 256, 257, torch.bfloat16, GPU
    assert plan.plan(*beyond, plans=table) == plan.plan(*beyond, plans=TunedPlans())


def test_device_with_other_limits_is_another_device():
    fewer = dataclasses.replace(GPU, multiprocessors=63)
    assert plans(entry()).find(256, 16, torch.bfloat16, fewer, backward=False) is None


@pytest.mark.parametrize(
    ("pins", "applies"),
    [
        pytest.param(Pins(), True, id="none"),
        pytest.param(Pins(slices=8), True, id="the-same"),
        pytest.param(Pins(chunk=3), True, id="no-choice-of-a-kernel"),
        pytest.param(Pins(slices=4), False, id="another-value"),
        pytest.param(Pins(resident=False), False, id="another-flag"),
        pytest.param(Pins(block_k=16), False, id="left-to-the-model"),
    ],
)
def test_pin_outranks_an_entry_and_sets_all_of_it_aside(pins, applies):
    without = plan.plan(*SIZES, pins=pins, plans=TunedPlans())
    found = plan.plan(*SIZES, pins=pins, plans=plans(entry()))
    assert (found != without) is applies
    for name in tuned.choices_of(found.forward):
        assert getattr(pins, name) in (None, getattr(found.forward, name))


def test_first_file_outranks_the_later_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.SHIPPED.mkdir()
    write(tuned.SHIPPED / "gpu.json", entry(dict(slices=2)), entry(dict(slices=4), batch=64))
    assert plan.plan(*SIZES).forward.slices == 2
    monkeypatch.setenv(tuned.VARIABLE, str(write(tmp_path / "user.json", entry())))
    assert plan.plan(*SIZES).forward.slices == 8
    tuned.load(write(tmp_path / "loaded.json", entry(dict(slices=16))))
    assert plan.plan(*SIZES).forward.slices == 16
    # Of a batch that the user's files lack, the shipped file still knows.
    assert plan.plan(256, 64, torch.bfloat16, GPU).forward.slices == 4


def test_folder_of_files(tmp_path, monkeypatch):
    other = dataclasses.replace(GPU, name="another GPU")
    write(tmp_path / "a.json", entry(dict(slices=4)), device=other)
    write(tmp_path / "b.json", entry())
    (tmp_path / "README.md").write_text("no plans")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    assert plan.plan(*SIZES).forward.slices == 8
    assert plan.plan(256, 16, torch.bfloat16, other).forward.slices == 4


def test_entry_changes_the_plan_that_runs(tmp_path):
    roomy = plan.Device("roomy", "cuda", 90, multiprocessors=64, smem_bytes=2**40)
    problem = Problem(steps=3, batch=3, hidden=20)
    key = dict(hidden=20, batch=3, dtype="fp32")
    path = write(
        tmp_path / "plans.json",
        entry(dict(slices=5), **key),
        entry(dict(slices=3), **key, direction="backward"),
        device=roomy,
    )
    programs = []
    # The first call has put the model's plan into the cache.
    for load in (False, True):
        if load:
            tuned.load(path)
        with cooperative(1) as report, plan.forced(device=roomy):
            result = problem.run("triton", torch.float32)
            kernel_plans = launch.launch_plan(torch.empty(1, 3, 1), 20, "formula")
        assert_as_exact_as_eager(problem, result, torch.float32)
        programs.append((report.programs, kernel_plans.forward.slices, kernel_plans.backward.slices))
    (before, forward, backward), (after, *slices) = programs
    assert slices == [5, 3]
    assert after - before == 5 + 3 - forward - backward
    assert after != before


# --- files ---


def test_written_file_is_read_back(tmp_path):
    entries = (entry(), entry(batch=64, direction="backward", cell="notebook"))
    (file,) = tuned.read(write(tmp_path / "plans.json", *entries))
    assert (file.device, file.versions, file.entries) == (GPU, {"torch": "2.13"}, entries)
    assert [path.name for path in tmp_path.iterdir()] == ["plans.json"]


def test_entry_that_would_be_refused_is_not_written(tmp_path):
    before = write(tmp_path / "plans.json", entry()).read_text()
    with pytest.raises(ValueError, match="slices=65"):
        write(tmp_path / "plans.json", entry(dict(slices=65)))
    assert (tmp_path / "plans.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plans.json"]


VALID = json.loads(
    json.dumps(
        dict(
            schema=1,
            device=dataclasses.asdict(GPU),
            versions={"torch": "2.13"},
            entries=[
                dict(
                    hidden=256,
                    batch=16,
                    dtype="bf16",
                    cell="formula",
                    direction="forward",
                    choices=CHOICES,
                    step_us=1.5,
                )
            ],
        )
    )
)
ENTRY = r"entry 0 \(H=256 B=16 bf16 formula forward\): "


def changed(*path, value=None, remove=False):
    """Return a copy of the valid file with one place changed."""
    content = copy.deepcopy(VALID)
    place = content
    for step in path[:-1]:
        place = place[step]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param([], "expected an object", id="list"),
        pytest.param(changed("schema", value=2), "schema: expected 1, got 2", id="schema"),
        pytest.param(changed("schema", remove=True), "schema: expected 1, got nothing", id="no-schema"),
        pytest.param(changed("entries", remove=True), "lacks entries", id="no-entries"),
        pytest.param(changed("code", value="import os"), "no field 'code'", id="unknown-field"),
        pytest.param(changed("device", "smem_bytes", value="232448"), "smem_bytes: expected int", id="device"),
        pytest.param(changed("device", "name", remove=True), "device lacks name", id="no-device-name"),
        pytest.param(changed("device", "multiprocessors", value=0), "multiprocessors: expected at least", id="none"),
        pytest.param(changed("device", "warp_size", value=-32), "warp_size: expected at least 1", id="warp"),
        pytest.param(changed("device", "backend", value="tpu"), "backend: expected cuda, hip or", id="backend"),
        pytest.param(changed("entries", 0, "choices", "slices", value=2**70), "slices=1180591620717411", id="2^70"),
        pytest.param(changed("versions", "torch", value=2.13), "versions: torch: expected str", id="versions"),
        pytest.param(changed("entries", value={}), "entries: expected list", id="entries"),
        pytest.param(changed("entries", 0, value=7), "entry 0: .* expected dict, got 7", id="entry"),
        pytest.param(changed("entries", 0, "hidden", value=0), "entry 0: hidden: expected 1 to", id="hidden"),
        pytest.param(changed("entries", 0, "batch", value=10**400), "entry 0: batch: expected 1 to", id="huge"),
        pytest.param(changed("entries", 0, "dtype", value="int8"), "dtype: expected one of .*'int8'", id="dtype"),
        pytest.param(changed("entries", 0, "hidden", value=True), "hidden: expected int, got True", id="bool"),
        pytest.param(changed("entries", 0, "cell", value="no_cell"), "cell: expected one of .*'no_cell'", id="cell"),
        pytest.param(
            changed("entries", 0, "cell", value="gru_reset_before"),
            "cell: expected one of .*, got 'gru_reset_before'",
            id="cell-without-kernels",
        ),
        pytest.param(changed("entries", 0, "direction", value="up"), "direction: expected one of", id="direction"),
        pytest.param(changed("entries", 0, "step_us", value=-1), "step_us: expected a positive number", id="time"),
        pytest.param(changed("entries", 0, "step_us", value=10**400), "step_us: expected a positive", id="huge-time"),
        pytest.param(changed("entries", 0, "choices", "device", value="x"), "got 'device'", id="unknown-choice"),
        pytest.param(changed("entries", 0, "choices", "slices", value="8"), "slices: expected int", id="type"),
        pytest.param(
            changed("entries", 0, "choices", "slices", value=65), ENTRY + "slices=65: .* some GPU holds 64", id="limit"
        ),
        pytest.param(
            changed("entries", 0, "choices", "block_b", value=2**40), ENTRY + "no plan .* limit 232448", id="smem"
        ),
        pytest.param(
            changed("entries", 0, "choices", "block_b", value=24), ENTRY + "block_b: .* power of two", id="24"
        ),
        pytest.param(changed("entries", 0, "choices", "exchange", value="x"), ENTRY + "exchange: ", id="exchange"),
        pytest.param(
            changed("entries", 0, "choices", "exchange", value="cluster"), ENTRY + "exchange: .* a race", id="cluster"
        ),
        pytest.param(
            changed("entries", 0, "choices", "exchange", value="none"), ENTRY + "exchange='none'", id="contradiction"
        ),
        pytest.param(
            changed("entries", value=VALID["entries"] * 2),
            r"entry 1 \(H=256.*another entry is for the same layer",
            id="twice",
        ),
    ],
)
def test_bad_content_names_file_and_entry(content, message, tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as refused:
        tuned.load(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(b"", "Expecting value", id="empty"),
        pytest.param(b"\xff\xfe\x00", "decode", id="not-text"),
        pytest.param(pickle.dumps(VALID), "decode|Expecting value", id="pickle"),
        pytest.param(b'{"schema": NaN}', "NaN is not a JSON number", id="nan"),
        pytest.param(b'{"schema": 1e400}', "schema: expected 1, got inf", id="beyond-floats"),
        pytest.param(b'{"schema": -Infinity}', "-Infinity is not a JSON number", id="infinity"),
        pytest.param(b'{"schema": 1, "schema": 1}', "'schema' appears twice", id="field-twice"),
        pytest.param(
            b'{"schema": 1, "more": [' + b'{"x": 1, "x": 1},' * 10**5 + b"1]}", "'x' appears twice", id="repeated"
        ),
        pytest.param(b"[" * 10**6, "nested too deeply|Expecting", id="deep"),
        pytest.param(b'{"schema": ' + b"1" * 10**5 + b"}", "limit", id="long-number"),
        pytest.param(b" " * (2**24 + 1), "larger than", id="large"),
    ],
)
def test_bad_text_names_the_file(text, message, tmp_path):
    path = tmp_path / "plans.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as refused:
        tuned.load(path)
    assert str(path) in str(refused.value)


def test_path_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: expected a file, got a folder or a device"):
        tuned.load(tmp_path / "pipe.json")
    (tmp_path / "folder" / "plans.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"plans\.json: expected a file, got a folder or a device"):
        tuned.load(tmp_path / "folder")
    (tmp_path / "link.json").symlink_to(write(tmp_path / "plans.json", entry()))
    tuned.load(tmp_path / "link.json")
    assert plan.plan(*SIZES).forward.slices == 8
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(ValueError, match=r"loop\.json"):
        tuned.load(tmp_path / "loop.json")


def test_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = write(tmp_path / "plans.json", entry())
    text = path.read_text().rstrip()
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(ValueError, match=r"plans\.json"):
            tuned.read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = [(name,) for name in VALID]
PLACES += [("device", name) for name in VALID["device"]]
PLACES += [("entries", 0, name) for name in VALID["entries"][0]]
PLACES += [("entries", 0, "choices", name) for name in tuned.choices_of(plan.plan(*SIZES).forward)]


@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_anywhere_is_taken_or_refused(place, value):
    content = changed(*place, value=value)
    try:
        entries = tuned._parse("plans.json", content).entries
    except ValueError as error:
        message = str(error)
        # A traceback of several lines would be no message.
        assert message and len(message) < 500  # noqa: PT018
        return
    assert len(entries) == len(content["entries"])


def test_missing_file_is_named_and_so_is_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"NOVOLSTM_PLANS: .*nowhere\.json: No such file"):
        plan.plan(*SIZES)


def test_refused_file_leaves_what_was_in_force(tmp_path):
    tuned.load(write(tmp_path / "plans.json", entry()))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        tuned.load(tmp_path / "bad.json")
    assert plan.plan(*SIZES).forward.slices == 8


def test_pins_around_the_first_call_do_not_reach_the_check(tmp_path):
    path = write(tmp_path / "plans.json", entry())
    # Too large for any device, and left open by the entry.
    with plan.forced(block_k=2**20):
        tuned.load(path)
    assert plan.plan(*SIZES).forward.slices == 8
