"""Model files and checkpoints that are damaged or made to harm: refused in words that name the file, nothing executed.

Files of Keras are in test_keras_weights.py, files of plans in test_tuned.py.
"""

import ast
import json
import os
import pathlib
import pickle
import random
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save

import novolstm_triton
from novolstm_triton.app import bytemodel
from novolstm_triton.app.cli import main
from novolstm_triton.app.train import CHECKPOINT, TrainConfig, load_checkpoint

PACKAGE = pathlib.Path(novolstm_triton.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "bench").rglob("*.py")])

RUNS = {"eval", "exec", "compile", "__import__"}
"""Built-in functions that run text."""

READS = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "runpy", "code"}
"""Modules that run, or may run, what they read."""


def unsafe_calls(source: str) -> list[str]:
    """Return what in a module could run what a file or a user says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.partition(".")[0] in READS]
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in RUNS or (name.startswith("os.") and name[3:] in ("system", "popen")):
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        found += [f"{name} with {k}" for k in ("shell", "allow_pickle") if options.get(k, "False") != "False"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_in_the_package_runs_what_it_reads(path):
    assert unsafe_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_and_it_would_be_seen(source):
    assert unsafe_calls(source) != []


# --- model.safetensors ---

MODEL = bytemodel.ByteModel("novolstm", 4, 1)
WEIGHTS = {name: value.detach() for name, value in MODEL.state_dict().items()}


def described(text: str, weights: dict[str, torch.Tensor] = WEIGHTS) -> bytes:
    return save(weights, metadata={"model": text})


def changed(**arguments) -> bytes:
    return described(json.dumps(MODEL.arguments | arguments))


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged"),
    "no-safetensors": (b"no model", "damaged"),
    "pickle": (pickle.dumps(MODEL.arguments), "damaged"),
    "header-of-1-GB": (struct.pack("<Q", 2**30) + b" " * 100, "damaged"),
    "header-longer-than-the-file": (struct.pack("<Q", 1000) + b"{}", "damaged"),
    "header-deep": (struct.pack("<Q", 10**5) + b"[" * 10**5, "damaged"),
    "no-metadata": (save(WEIGHTS), "it has no description of a model"),
    "description-deep": (described("[" * 10**5), "nested too deeply"),
    "description-list": (described("[]"), "expected a description with cell, hidden and layers, got []"),
    "description-empty": (described(""), "Expecting value"),
    "description-nan": (described('{"cell": "novolstm", "hidden": 4, "layers": 1, "gate_gain": NaN}'), "NaN is not a"),
    "description-twice": (described('{"cell": "lstm", "cell": "novolstm"}'), "'cell' appears twice in one object"),
    "cell": (changed(cell="gru"), "cell: expected one of ['novolstm', 'lstm'], got 'gru'"),
    "hidden-larger": (changed(hidden=5), "expected shape"),
    "hidden-huge": (changed(hidden=10**12), "damaged"),
    "hidden-beyond-64-bits": (changed(hidden=2**70), "damaged"),
    "hidden-text": (changed(hidden="4"), "hidden should be of type int, got: str"),
    "layers-more": (changed(layers=2), "expected shape"),
    "layers-a-thousand-million": (changed(layers=10**9), "layers: expected at most 9, got 1000000000"),
    "option-unknown": (changed(script="import os"), "unexpected keyword argument 'script'"),
    "option-out-of-range": (changed(gate_gain="big"), "gate_gain: expected a finite number or \"hidden\", got 'big'"),
    "tensor-missing": (
        described(json.dumps(MODEL.arguments), {k: v for k, v in WEIGHTS.items() if k != "head.bias"}),
        "head.bias: expected shape [256], got None",
    ),
    "tensor-more": (
        described(json.dumps(MODEL.arguments), WEIGHTS | {"extra": torch.zeros(1)}),
        "extra: expected shape None, got [1]",
    ),
    "tensor-shape": (
        described(json.dumps(MODEL.arguments), WEIGHTS | {"head.bias": torch.zeros(255)}),
        "head.bias: expected shape [256], got [255]",
    ),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=list(FILES))
def test_bad_model_file(content, words, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a model of novolstm train") as refused:
        bytemodel.load_model(path)
    assert str(refused.value).startswith(f"{path}: damaged")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500 + len(str(path))


def test_model_file_with_changed_bytes_is_a_model_or_an_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "model.safetensors"
    bytemodel.save_model(MODEL, path)
    whole, refused = path.read_bytes(), 0
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            content[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            bytemodel.load_model(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
    assert refused > 100


def test_model_path_that_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bytemodel.load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a file, got a folder or a device"):
        bytemodel.load_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file, got a folder or a device"):
        bytemodel.load_model(str(tmp_path / "pipe"))
    bytemodel.save_model(MODEL, tmp_path / "model.safetensors")
    (tmp_path / "link").symlink_to("model.safetensors")
    assert bytemodel.load_model(tmp_path / "link").arguments == MODEL.arguments


# --- checkpoint.pt ---

SMALL = ["--backend", "reference", "--hidden", "4", "--batch", "2", "--seq", "4", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("text " * 100)
    command = ["train", "--text", str(folder / "text.txt"), "--out", str(folder), "--steps", "1", *SMALL]
    assert main(command) == 0
    return folder


def resumed(run: pathlib.Path, folder: pathlib.Path, change) -> int:
    """Resume the run with a checkpoint that a function has changed; return the exit code."""
    checkpoint = torch.load(run / CHECKPOINT, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / CHECKPOINT)
    return main(["train", "--resume", str(folder), "--steps", "2"])


def learner(checkpoint: dict) -> dict:
    return checkpoint["learners"]["novolstm"]


CHECKPOINTS: dict[str, tuple] = {
    "no-config": (lambda c: c.pop("config"), "is damaged: config: expected dict, got None"),
    "config-list": (lambda c: c.update(config=[1]), "is damaged: config: expected dict, got [1]"),
    "config-short": (lambda c: c["config"].pop("hidden"), "is damaged: config: expected ['backend'"),
    "config-more": (lambda c: c["config"].update(code="x"), "is damaged: config: expected ['backend'"),
    "config-text": (lambda c: c["config"].update(text=[1]), "is damaged: text: expected names of files"),
    "hidden-text": (lambda c: c["config"].update(hidden="4"), "is damaged: hidden: expected int, got '4'"),
    "hidden-bool": (lambda c: c["config"].update(hidden=True), "is damaged: hidden: expected int, got True"),
    "hidden-other": (lambda c: c["config"].update(hidden=5), "does not fit the run it describes: RuntimeError"),
    "hidden-zero": (lambda c: c["config"].update(hidden=0), "--hidden: expected at least 1, got 0"),
    "rows-zero": (lambda c: c.update(rows_per_step=0), "is damaged: rows_per_step: expected at least 1, got 0"),
    "step-negative": (lambda c: c.update(step=-1), "is damaged: step: expected at least 1, got -1"),
    "step-tensor": (lambda c: c.update(step=torch.ones(1)), "is damaged: step: expected int, got tensor([1.])"),
    "no-learner": (lambda c: c["learners"].clear(), "does not fit the run it describes: KeyError: 'novolstm'"),
    "no-optimizer": (lambda c: learner(c).pop("optimizer"), "does not fit the run it describes: KeyError: 'optimizer'"),
    "model-list": (lambda c: learner(c).update(model=[]), "does not fit the run it describes: TypeError"),
    "curve-list": (lambda c: learner(c).update(curve=[]), "does not fit the run it describes: AttributeError"),
    "state-number": (lambda c: learner(c).update(state=3), "does not fit the run it describes: TypeError"),
}


@pytest.mark.parametrize(("change", "words"), CHECKPOINTS.values(), ids=list(CHECKPOINTS))
def test_bad_checkpoint_ends_in_one_line_and_code_2(change, words, run, tmp_path, capsys):
    assert resumed(run, tmp_path, change) == 2
    error = capsys.readouterr().err
    assert error.startswith("novolstm: ")
    assert words in error
    assert CHECKPOINT in error or "--hidden" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_unchanged_checkpoint_is_resumed(run, tmp_path):
    assert resumed(run, tmp_path, lambda checkpoint: None) == 0


class Spy:
    """Leaves a trace where its pickle is run."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def test_checkpoint_with_code_is_not_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert resumed(run, tmp_path, lambda checkpoint: checkpoint.update(spy=Spy())) == 2
    assert f"cannot read {tmp_path / CHECKPOINT}: UnpicklingError" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_checkpoint(kept, run, tmp_path):
    whole = (run / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=f"--resume: cannot read .*{CHECKPOINT}"):
        load_checkpoint(tmp_path)


def test_inflated_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / CHECKPOINT, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**22))
    with pytest.raises(ValueError, match=f"--resume: cannot read .*{CHECKPOINT}: ValueError"):
        load_checkpoint(tmp_path)


def test_checkpoint_has_every_field_that_is_asked_for(run):
    checkpoint = load_checkpoint(run)
    assert checkpoint["config"].keys() == TrainConfig.__dataclass_fields__.keys()
