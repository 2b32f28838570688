"""bench/gpu without a GPU: its order, clock, files and workers; and all of it once, in the interpreter."""

import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

from novolstm_triton import plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Its files find each other so; at the end, where they hide nothing.
sys.path.append(str(ROOT / "bench"))
gpu_run, gpu_processes, gpu_results, gpu_tasks = map(
    importlib.import_module, ("gpu.run", "gpu.processes", "gpu.results", "gpu.tasks")
)

# Answers each task as the task itself says.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    task = json.loads(line)
    print(json.dumps({"at": task["name"]}), flush=True)
    if task.get("hang"):
        time.sleep(60)
    if task.get("die"):
        os._exit(7)
    if task.get("lost"):
        print(json.dumps({"lost": "illegal access"}), flush=True)
    else:
        results = [{"name": task["name"], "ok": True, "message": "-"}]
        print(json.dumps({"result": {"results": results, "seconds": 1.5}}), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    workers = []

    def start():
        workers.append(gpu_processes.Worker([sys.executable, "-c", WORKER], tmp_path / "log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


KINDS = ("check", "micro", "memory", "rows")
SIZES = [(h, b) for h in (128, 256, 512, 768, 1024, 2048) for b in (1, 16, 64, 256)]


def timed(**wanted):
    """Return (H, B) of every entry of the GPU's tasks that is like `wanted`."""
    return {
        (task["hidden"], task["batch"])
        for task in gpu_tasks.all_tasks(flashrnn=True)
        if task["kind"] == "rows"
        for entry in task["entries"]
        if all(entry[name] == value for name, value in wanted.items())
    }


def test_core_comes_first_checks_before_measurements():
    tasks = gpu_tasks.all_tasks()
    order = [(not task["core"], KINDS.index(task["kind"])) for task in tasks]
    assert order == sorted(order)
    core = [(task["hidden"], task["batch"]) for task in tasks if task["kind"] == "rows" and task["core"]]
    assert sorted(core) == sorted(SIZES)


def test_every_size_is_timed_with_every_layer_and_exchange():
    for pins in ({}, dict(exchange="barrier"), dict(exchange="words")):
        assert timed(layer="novolstm", dtype="bf16", pins=pins) >= set(SIZES)
    assert timed(pins=dict(exchange="none")) == {(h, b) for h, b in SIZES if h <= 512}
    for dtype in ("fp16", "bf16", "tf32"):
        assert timed(layer="nn.LSTM", dtype=dtype) >= set(SIZES)
    assert timed(layer="flashrnn") == set(SIZES)
    for layer in ("reference", "graphed"):
        assert timed(layer=layer) >= {(h, 16) for h, _ in SIZES}
    assert (512, 16) in timed(layer="compiled")
    assert timed(layer="novolstm", dtype="fp32") >= {(h, b) for h, b in SIZES if h in (128, 256, 512, 1024)}


def test_names_of_tasks_are_unique():
    for tasks in (gpu_tasks.all_tasks(), gpu_tasks.smoke_tasks(), gpu_tasks.compilations(gpu_tasks.all_tasks())):
        names = [task["name"] for task in tasks]
        assert len(set(names)) == len(names)


def test_every_pinned_plan_fits_an_h200():
    tasks = gpu_tasks.compilations(gpu_tasks.all_tasks())
    assert {task["dtype"] for task in tasks} == {"bf16", "fp16", "fp32"}
    dtypes = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)
    for task in tasks:
        sizes = task["problem"]["hidden"], task["problem"]["batch"], dtypes[task["dtype"]]
        try:
            with plan.forced(**task["pins"]):
                kernel_plan = plan.plan(*sizes, plan.H200).forward
        except ValueError:
            # An exchange alone is asked of every size, and may be refused; other choices are made to fit.
            assert list(task["pins"]) == ["exchange"], task
            continue
        for name, value in task["pins"].items():
            assert name in ("chunk", "split_k") or getattr(kernel_plan, name) == value


def test_nothing_is_timed_while_others_compile():
    timing, checking = {"kind": "rows"}, {"kind": "check"}
    assert gpu_tasks.next_task([timing, checking], compiling=True) is checking
    assert gpu_tasks.next_task([timing], compiling=True) is None
    assert gpu_tasks.next_task([timing, checking], compiling=False) is timing
    assert gpu_tasks.next_task([], compiling=False) is None


def test_lost_entry_is_left_out_of_the_rest():
    task = gpu_tasks.rows(8, 1, 2, gpu_tasks.entry("novolstm", "bf16"), gpu_tasks.entry("nn.LSTM", "bf16"))
    rest = gpu_tasks.without_lost(task, "novolstm bf16")
    assert [entry["layer"] for entry in rest["entries"]] == ["nn.LSTM"]
    assert gpu_tasks.without_lost(rest, "nn.LSTM bf16") is None
    assert gpu_tasks.without_lost(task, "") is None
    assert gpu_tasks.without_lost(gpu_tasks.check("exact", 1, 1, 1, "fp32"), "triton") is None
    check = gpu_tasks.check("exact", 1, 1, 1, "fp32")
    again = gpu_tasks.with_bounded_waits(check, "silent for 30 s")
    assert again == check | dict(name=f"{check['name']}, waits bounded", pins=dict(max_spins=10**6))
    assert gpu_tasks.with_bounded_waits(again, "silent for 30 s") is None
    assert gpu_tasks.with_bounded_waits(check, "the process ended with 1") is None
    assert gpu_tasks.with_bounded_waits(task, "silent for 30 s") is None
    (row,) = gpu_results.failed(task, "silent", "novolstm bf16")
    assert (row["layer"], row["error"]) == ("novolstm", "silent")
    assert len(gpu_results.failed(task, "silent")) == 2


def test_slug():
    assert gpu_results.slug("NVIDIA H200 (141GB)") == "nvidia-h200-141gb"


def test_report_is_valid_json_and_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    gpu_results.write_json(path, {"old": 1})
    gpu_results.write_json(path, {"error": math.nan, "nested": [(math.inf, 1.5)]})
    assert json.loads(path.read_text()) == {"error": None, "nested": [[None, 1.5]]}
    with pytest.raises(TypeError):
        gpu_results.write_json(path, {"not": object()})
    assert json.loads(path.read_text())["nested"]
    assert os.listdir(tmp_path).count("report.json") == 1


@pytest.mark.parametrize(
    ("task", "reason"),
    [({"hang": True}, "silent for 1 s"), ({"die": True}, "ended with 7"), ({"lost": True}, "illegal access")],
    ids=["hangs", "dies", "gives-up"],
)
def test_lost_worker_says_what_it_was_at(start, task, reason):
    worker = start()
    assert worker.run({"name": "fine"})["results"][0]["ok"]
    with pytest.raises(gpu_processes.Lost, match=reason) as lost:
        worker.run({"name": "spinning", **task}, stall_s=1.0)
    assert lost.value.at == "spinning"
    assert worker.process.poll() is not None


def test_worker_ends_at_the_deadline(start):
    worker = start()
    with pytest.raises(gpu_processes.Lost, match="out of time"):
        worker.run({"name": "late", "hang": True}, deadline=0.0)
    assert worker.process.poll() is not None


def join(compilers):
    for thread in compilers._threads:
        thread.join()


def test_compilers_outlive_a_lost_worker_and_stop_at_once(start):
    compilers = gpu_processes.Compilers([{"name": "a"}, {"name": "b", "die": True}, {"name": "c"}], 1, start)
    join(compilers)
    assert compilers.seconds == {"a": 1.5, "c": 1.5}
    compilers = gpu_processes.Compilers([{"name": "a", "hang": True}], 2, start)
    compilers.stop()
    join(compilers)
    assert not compilers.busy()


def test_run_goes_on_after_a_lost_worker(start, tmp_path, capsys):
    run = gpu_run.Run(tmp_path, "cuda", 60.0, 1)
    run.start = start
    tasks = [gpu_tasks.check("exact", 1, 1, hidden, "fp32") for hidden in (1, 2, 3)]
    tasks[1]["die"] = True
    run._work_off(tasks, gpu_processes.Compilers([], 0, start))
    assert [check["ok"] for check in json.loads(run.path.read_text())["checks"]] == [True, False, True]
    assert "ended with 7" in capsys.readouterr().out
    run.drop()


class Timed:
    """A worker whose every task takes some seconds of a clock that nobody else turns."""

    now, takes = 0.0, 0.0

    def run(self, task, stall_s, deadline):
        Timed.now += self.takes
        if Timed.now > deadline:
            raise gpu_processes.Lost("", "out of time")
        return {"results": [{"name": task["name"], "ok": True, "message": "-"}]}

    def kill(self):
        pass


@pytest.mark.parametrize("takes", [10.0, 11.0], ids=["before-a-task", "within-a-task"])
def test_time_ends(takes, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "time", SimpleNamespace(monotonic=lambda: Timed.now))
    monkeypatch.setattr(gpu_run, "least_seconds", lambda task: 1.0)
    monkeypatch.setattr(Timed, "now", 0.0)
    monkeypatch.setattr(Timed, "takes", takes)
    run = gpu_run.Run(tmp_path, "cpu", 20.5, 1)
    run.start = Timed
    tasks = [gpu_tasks.check("exact", 1, 1, hidden, "fp32") for hidden in (1, 2, 3)]
    names = [task["name"] for task in tasks]
    run._work_off(tasks, gpu_processes.Compilers([], 0, Timed))
    done = 2 if takes == 10 else 1
    assert [check["name"] for check in run.report["checks"]] == names[:done]
    assert run.report["unfinished"] == names[done:]


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    # The script chooses for itself whether to interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHON": sys.executable})


@pytest.mark.parametrize("module", ["checks", "timing"])
def test_workers_use_the_library_of_this_checkout_beside_another(module, tmp_path):
    (tmp_path / "novolstm_triton.py").write_text("raise ImportError('another library')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "bench")])}
    command = [sys.executable, "-c", f"import gpu.{module}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


def test_bad_arguments_and_a_missing_device_exit_with_2(tmp_path):
    assert run_script().returncode == 2
    result = run_script(str(tmp_path), "--seconds", "0")
    assert (result.returncode, "positive" in result.stderr) == (2, True)


needs_interpreter = pytest.mark.skipif(
    triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 needs NumPy before 2.4",
)


@needs_interpreter
def test_workers_check_and_time_in_the_interpreter(tmp_path):
    check, *_ = gpu_tasks.smoke_tasks()
    rows = gpu_tasks.rows(2, 1, 2, gpu_tasks.entry("reference", "fp32"), rounds=1)
    run = gpu_run.Run(tmp_path, "cpu", math.inf, 1)
    assert run.go([check, rows]) == 0, (tmp_path / "workers.log").read_text()
    report = json.loads((tmp_path / "cpu-interpreter.json").read_text())
    assert [(c["name"], c["ok"]) for c in report["checks"]] == [(check["name"], True)]
    assert [row["forward_us_per_step"] > 0 for row in report["rows"]] == [True]


@needs_interpreter
@pytest.mark.exhaustive
def test_whole_script_in_the_interpreter(tmp_path):
    result = run_script(str(tmp_path), "--device", "cpu", "--seconds", "120")
    assert result.returncode == 0, result.stdout + result.stderr + (tmp_path / "workers.log").read_text()
    report = json.loads((tmp_path / "cpu-interpreter.json").read_text())
    assert report["environment"]["device"] == "cpu-interpreter"
    assert report["unfinished"] == []
    assert len(report["checks"]) == 5
    (refused,) = [row for row in report["rows"] if "error" in row]
    assert refused["error"].startswith("refused: exchange='barrier' needs two slices")
    assert {"barrier_us", "l2_latency_us", "l2_bytes_per_us", "launch_us"} <= {r["constant"] for r in report["micro"]}
    (memory,) = [row for row in report["rows"] if "forward_us_per_step" not in row and "error" not in row]
    assert (memory["layer"], memory["peak_mib"]) == ("nn.LSTM", None)
    report["rows"] = [row for row in report["rows"] if row not in (refused, memory)]
    assert all(check["ok"] and check["error"] <= check["bound"] for check in report["checks"])
    layers = [row["layer"] for row in report["rows"]]
    assert layers == ["novolstm", "nn.LSTM", "novolstm", "novolstm", "reference"]
    for row in report["rows"]:
        assert row["forward_us_per_step"] > 0
        assert row["forward_backward_us_per_step"] > 0
    assert report["rows"][0]["plan"]["forward"]["exchange"] == report["rows"][0]["exchange"] == "none"
