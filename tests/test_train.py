"""The command-line job, as its user meets it: messages, files, resuming, interrupting, several processes."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from novolstm_triton.app.bytemodel import load_model, printable
from novolstm_triton.app.cli import main
from novolstm_triton.app.text import ByteStream, UsageError, read_text, split_text
from novolstm_triton.app.train import TrainConfig, learning_rate

COMMAND = [sys.executable, "-m", "novolstm_triton", "train"]
SMALL = ["--backend", "reference", "--hidden", "12", "--batch", "4", "--seq", "8", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sizes are so small here that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some kilobytes of words with structure to learn."""
    words = ["the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(1).choices(words, k=2000)))
    return path


def train(out, *arguments, text=None):
    source = ["--text", str(text)] if text else []
    return main(["train", *source, "--out", str(out), *SMALL, *map(str, arguments)])


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    """The rows without the speed, which differs from run to run."""
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows(out)]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of an uninterrupted run of 40 steps."""
    out = tmp_path_factory.mktemp("run") / "finished"
    assert train(out, "--steps", 40, "--lr", 0.03, text=text) == 0
    return out


def environment():
    return os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


# --- a run and its files ---


def test_writes_all_files_and_nothing_else(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoint.pt",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_rows(finished):
    written = rows(finished)
    assert all(list(row) == ["step", "cell", "train_bpb", "valid_bpb", "tokens_per_s"] for row in written)
    assert [row["step"] for row in written] == [1, *range(2, 41, 2)]
    assert all(row["tokens_per_s"] > 0 for row in written)


def test_loss_goes_down(finished):
    written = rows(finished)
    assert written[0]["train_bpb"] == pytest.approx(8, abs=0.3)
    assert written[-1]["train_bpb"] < 5
    assert written[-1]["valid_bpb"] < 5


def test_model_file_rebuilds_the_model(finished, text):
    model = load_model(finished / "model.safetensors")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    weights = checkpoint["learners"]["novolstm"]["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.rnn.gate_gain == "hidden"

    # Its loss on the held-out text is the one that was logged last.
    data = split_text(text.read_bytes(), rows=4, seq=8)[1]
    stream = ByteStream(data, 4, 8, slice(0, 4), torch.device("cpu"))
    total, state = 0.0, None
    with torch.no_grad():
        for index in range(stream.windows):
            x, y = stream.window(index)
            logits, state = model(x, state)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert total / stream.windows / torch.log(torch.tensor(2.0)).item() == pytest.approx(
        rows(finished)[-1]["valid_bpb"], abs=1e-5
    )


def test_same_seed_same_losses(finished, text, tmp_path):
    assert train(tmp_path / "again", "--steps", 40, "--lr", 0.03, text=text) == 0
    assert losses(tmp_path / "again") == losses(finished)
    assert train(tmp_path / "other", "--steps", 2, "--seed", 5, text=text) == 0
    assert losses(tmp_path / "other")[0] != losses(finished)[0]


def test_prints_summary_and_sample(text, tmp_path, capsys):
    assert train(tmp_path / "run", "--steps", 3, text=text) == 0
    out, err = capsys.readouterr()
    assert "held-out" in out
    assert "continued by novolstm" in out
    assert str(tmp_path / "run" / "model.safetensors") in out
    assert [line.split()[:2] for line in err.splitlines()] == [["step", "1/3"], ["step", "2/3"], ["step", "3/3"]]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--cell", "lstm"], id="lstm"),
        pytest.param(["--layers", "2", "--variant", "notebook", "--gate-gain", "2.5"], id="notebook-two-layers"),
        pytest.param(["--dtype", "bf16"], id="bf16"),
        pytest.param(["--dtype", "fp16"], id="fp16"),
        pytest.param(["--dtype", "bf16", "--cell", "lstm"], id="bf16-lstm"),
    ],
)
def test_options_run_and_reload(arguments, text, tmp_path):
    assert train(tmp_path / "run", "--steps", 6, *arguments, text=text) == 0
    assert rows(tmp_path / "run")[-1]["train_bpb"] < 8.5
    model = load_model(tmp_path / "run" / "model.safetensors")
    assert model(torch.zeros(3, 2, dtype=torch.long))[0].shape == (3, 2, 256)


def test_compare_trains_both_cells_on_the_same_batches(text, tmp_path):
    assert train(tmp_path / "both", "--steps", 10, "--compare", text=text) == 0
    both = losses(tmp_path / "both")
    for cell, name in (("novolstm", "model.safetensors"), ("lstm", "model-lstm.safetensors")):
        assert train(tmp_path / cell, "--steps", 10, "--cell", cell, text=text) == 0
        assert [row for row in both if row["cell"] == cell] == losses(tmp_path / cell)
        assert load_model(tmp_path / "both" / name).arguments["cell"] == cell
    assert (tmp_path / "both" / "loss.png").stat().st_size > 10_000


def test_cells_start_from_the_same_embedding_and_head(text, tmp_path):
    assert train(tmp_path / "run", "--steps", 1, "--lr", 1e-12, "--compare", text=text) == 0
    ours, theirs = (load_model(tmp_path / "run" / name) for name in ("model.safetensors", "model-lstm.safetensors"))
    torch.testing.assert_close(ours.embedding.weight, theirs.embedding.weight)
    torch.testing.assert_close(ours.head.weight, theirs.head.weight)


# --- earlier runs ---


def test_default_folder_is_numbered(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert main(["train", "--text", str(text), "--steps", "1", *SMALL]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["novolstm-run", "novolstm-run-2", "novolstm-run-3"]


def test_keeps_an_earlier_run_unless_told(finished, text, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert train(out, "--steps", 1, text=text) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert rows(out) == rows(finished)
    assert train(out, "--steps", 1, "--overwrite", text=text) == 0
    assert len(rows(out)) == 1


# --- resuming ---


def interrupt_after(monkeypatch, step):
    """Send SIGINT to this process in the given step of the run."""

    def rate(at, config):
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(at, config)

    monkeypatch.setattr("novolstm_triton.app.train.learning_rate", rate)


@pytest.mark.parametrize("step", [1, 11, 16], ids=["first", "between-rows", "at-a-row"])
def test_resumed_run_equals_uninterrupted(step, finished, text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        assert train(out, "--steps", 40, "--lr", 0.03, text=text) == 130
    assert f"--resume {out}" in capsys.readouterr().out
    assert (out / "loss.png").exists()
    assert load_model(out / "model.safetensors").training is False
    assert main(["train", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)
    trained, reference = (load_model(folder / "model.safetensors").state_dict() for folder in (out, finished))
    assert all(torch.equal(trained[name], reference[name]) for name in reference)


def test_resumes_over_an_epoch_with_both_cells(tmp_path, text, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_bytes(text.read_bytes()[:400])  # 11 windows to the epoch
    arguments = ("--compare", "--steps", 30)
    assert train(tmp_path / "whole", *arguments, text=short) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 15)
        assert train(tmp_path / "parts", *arguments, text=short) == 130
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_resume_goes_on_beyond_the_end_and_into_another_folder(finished, tmp_path):
    out = tmp_path / "longer"
    assert main(["train", "--resume", str(finished), "--steps", "60", "--out", str(out)]) == 0
    assert losses(out)[: len(losses(finished))] == losses(finished)
    assert rows(out)[-1]["step"] == 60
    assert rows(finished)[-1]["step"] == 40


def test_interrupted_process_leaves_a_run_to_resume(text, tmp_path):
    out = tmp_path / "run"
    command = [*COMMAND, "--text", str(text), "--out", str(out), "--steps", "100000", *SMALL]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr is not None
        # The first step is done.
        assert any(line.startswith("step 1/") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"novolstm train --resume {out}" in stdout
    assert "Traceback" not in stderr
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 1
    assert (out / "loss.png").exists()
    assert main(["train", "--resume", str(out), "--steps", str(step + 2)]) == 0
    assert rows(out)[-1]["step"] == step + 2


# --- requests that cannot be met ---

BAD = {
    "missing-text": (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
    "empty-text": (["--text", "empty.txt"], "no text found"),
    "empty-folder": (["--text", "hollow"], "no text found"),
    "short-text": (["--text", "short.txt"], "too short"),
    "device-file": (["--text", "/dev/null"], "neither a file nor a folder"),
    "hidden-zero": (["--hidden", "0"], "--hidden: expected at least 1, got 0"),
    "layers-negative": (["--layers", "-1"], "--layers"),
    "steps-zero": (["--steps", "0"], "--steps"),
    "batch-zero": (["--batch", "0"], "--batch"),
    "batch-too-large": (["--batch", "100000"], "too short"),
    "seq-zero": (["--seq", "0"], "--seq"),
    "hidden-no-number": (["--hidden", "many"], "--hidden"),
    "lr-negative": (["--lr", "-1"], "--lr"),
    "lr-nan": (["--lr", "nan"], "--lr"),
    "lr-infinite": (["--lr", "inf"], "--lr"),
    "seed-negative": (["--seed", "-1"], "--seed"),
    "seed-beyond-63-bits": (["--seed", str(2**63)], "--seed: expected 0 to 2^63 - 1"),
    "steps-fraction": (["--steps", "1.5"], "--steps"),
    "max-bytes-zero": (["--max-bytes", "0"], "--max-bytes: expected at least 1, got 0"),
    "hidden-huge": (["--hidden", str(10**15)], "this configuration does not run here"),
    "dtype": (["--dtype", "fp8"], "expected one of auto, fp32, bf16, fp16, got 'fp8'"),
    "backend": (["--backend", "cuda"], "--backend"),
    "device": (["--device", "tpu"], "--device"),
    "cell": (["--cell", "gru"], "--cell"),
    "variant": (["--variant", "paper"], "--variant"),
    "gate-gain": (["--gate-gain", "big"], "--gate-gain"),
    "gate-gain-nan": (["--gate-gain", "nan"], "--gate-gain"),
    "gate-gain-infinite": (["--gate-gain", "inf"], "--gate-gain"),
    "unknown-flag": (["--speed", "9"], "--speed"),
    "argument": (["words"], "words"),
    "text-without-path": (["--text"], "--text"),
    "resume-nothing": (["--resume", "hollow"], "no checkpoint.pt in hollow"),
    "resume-garbage": (["--resume", "garbage"], "cannot read garbage"),
    "resume-foreign": (["--resume", "foreign"], "not a checkpoint"),
    "out-is-a-file": (["--out", "short.txt"], "cannot write to short.txt"),
    "out-below-a-file": (["--out", "short.txt/run"], "cannot write to"),
    "out-unwritable": (["--out", "/proc/run"], "cannot write to /proc/run"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_request_ends_in_one_line_and_code_2(arguments, message, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "checkpoint.pt").write_text("no checkpoint")
    (tmp_path / "foreign").mkdir()
    torch.save({"step": 1}, tmp_path / "foreign" / "checkpoint.pt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too little")
    before = sorted(tmp_path.rglob("*"))
    good = [] if "--resume" in arguments else ["--steps", "2", *SMALL]
    if "--text" not in arguments and "--resume" not in arguments:
        good += ["--text", str(text)]
    assert main(["train", *good, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("novolstm: ")
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--backend", "triton"], "needs tensors on a GPU", id="triton-on-cpu"),
        pytest.param(["--device", "cuda"], "no GPU", id="cuda"),
    ],
)
def test_gpu_wanted_without_one(arguments, message, text, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert train(tmp_path / "run", *arguments, text=text) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--hidden", "13"], "--hidden 13: the run to resume has 12", id="other-size"),
        pytest.param([], "has done its 40 steps", id="finished"),
        pytest.param(["--steps", "60", "--text", __file__], "not the one", id="other-text"),
    ],
)
def test_resume_refuses(arguments, message, finished, capsys):
    assert main(["train", "--resume", str(finished), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_loss_beyond_all_bounds_ends_in_one_line_and_code_1(text, tmp_path, capsys):
    assert train(tmp_path / "run", "--steps", 40, "--lr", 1e30, text=text) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("novolstm: ")
    assert "lower --lr" in line


def test_vanished_folder_ends_in_one_line_and_code_1(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("novolstm_triton.app.train.learning_rate", lambda *_: shutil.rmtree(tmp_path / "run") or 0.01)
    assert train(tmp_path / "run", "--steps", 5, text=text) == 1
    err = capsys.readouterr().err
    assert err.startswith("novolstm: cannot write")
    assert err.count("\n") == 1


def test_missing_extra_names_the_install_command(tmp_path):
    # A module that is found nowhere, as on a machine without the extra.
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'typer' else f(n, *a)"
    run = "import runpy; runpy.run_module('novolstm_triton', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", f"{hide}; {run}"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "novolstm needs typer: pip install 'novolstm-triton[train]'\n"


# --- ways to start it ---


def test_python_m_and_help(tmp_path):
    result = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0
    for field in TrainConfig.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in result.stdout
    result = subprocess.run([*COMMAND, "--lr", "-1"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")


def test_without_a_command_it_shows_help(capsys):
    assert main([]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()


def test_two_processes_equal_one_with_twice_the_batch(text, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    shared = ["--text", str(text), "--steps", "20", *SMALL]
    command = [*launcher, "-m", "novolstm_triton", "train", *shared, "--out", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out text") == 1
    assert train(tmp_path / "one", "--steps", 20, "--batch", 8, text=text) == 0
    for two, one in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert two["step"] == one["step"]
        assert two["train_bpb"] == pytest.approx(one["train_bpb"], abs=1e-4)
        assert two["valid_bpb"] == pytest.approx(one["valid_bpb"], abs=1e-4)
    # One process can take over, with the states of both.
    states = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["learners"]["novolstm"]["state"]
    assert [tuple(s.shape) for s in states] == [(1, 8, 12)] * 2
    assert main(["train", "--resume", str(tmp_path / "two"), "--steps", "22"]) == 0
    assert main(["train", "--resume", str(tmp_path / "one"), "--steps", "22"]) == 0
    assert rows(tmp_path / "two")[-1]["valid_bpb"] == pytest.approx(rows(tmp_path / "one")[-1]["valid_bpb"], abs=1e-4)


# --- the text ---


def test_reads_files_and_folders_in_order_and_once(tmp_path):
    for name, content in {
        "b/z.txt": "3",
        "b/a/x.txt": "2",
        "a.txt": "1",
        "b/.git/config": "no",
        "b/y.bin": "\0",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    names = [str(tmp_path / name) for name in ("b", "a.txt", "b/z.txt")]
    assert read_text(names, 100) == b"321"
    assert read_text(names, 2) == b"32"


def test_several_paths_after_one_flag(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else " * 100)
    paths = ["--text", str(text), str(other)]
    assert main(["train", *paths, "--steps", "1", "--out", str(tmp_path / "run"), *SMALL]) == 0
    config = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["config"]
    assert [Path(name).name for name in config["text"]] == ["words.txt", "other.txt"]


def test_standard_library_is_the_default():
    text = read_text((), 2**26)
    assert len(text) > 2**20
    assert text == read_text((), 2**26)


def test_stream_is_consecutive_and_held_out_is_the_end():
    data, held_out = split_text(bytes(range(200)), rows=3, seq=4)
    assert bytes(data.tolist() + held_out.tolist()) == bytes(range(200))
    assert len(held_out) == 10
    whole = ByteStream(data, 3, 4, slice(0, 3), torch.device("cpu"))
    share = ByteStream(data, 3, 4, slice(1, 3), torch.device("cpu"))
    assert whole.windows == (189 // 3) // 4
    x, y = (torch.cat(parts) for parts in zip(*map(whole.window, range(whole.windows)), strict=True))
    assert torch.equal(y, x + 1)
    assert torch.equal(x[1:], y[:-1])
    assert torch.equal(share.window(2)[0], whole.window(2)[0][:, 1:])


def test_shortest_text_that_fits():
    with pytest.raises(UsageError) as caught:
        split_text(bytes(10), 3, 4)
    needed = int(str(caught.value).split("at least ")[1].split(" ")[0])
    split_text(bytes(needed), 3, 4)
    for length in range(10, needed - 1):
        with pytest.raises(UsageError):
            split_text(bytes(length), 3, 4)


def test_sample_cannot_steer_the_terminal():
    assert printable(b"a\x1b[31m\n\tb\xff\r") == "a\ufffd[31m\n\tb\ufffd\ufffd"


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.1
