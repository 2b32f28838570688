"""The programs in examples/, as their users run them, and what they promise."""

import importlib.util
import pathlib
import random
import re
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
import typer
from typer.testing import CliRunner

from novolstm_triton.app.bytemodel import ByteModel, load_model
from novolstm_triton.cells import CELLS

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


def load(name: str, folder: pathlib.Path = EXAMPLES) -> ModuleType:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


forecaster, byte_generator = load("forecaster"), load("byte_generator")


def call(module: ModuleType, *arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of an example's command line in this process."""
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def run(module: ModuleType, *arguments: object, stdin: str | None = None) -> str:
    """Return what an example writes in a process of its own."""
    command = [sys.executable, module.__file__, *map(str, arguments)]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def table(output: str) -> dict[str, list[float]]:
    """Return the rows of the forecaster's table."""
    rows = re.findall(r"^(\S.*?)((?: +\d+\.\d+)+)$", output, flags=re.MULTILINE)
    return {name: [float(value) for value in values.split()] for name, values in rows}


FEW = ("--steps", 40, "--hidden", 16, "--batch", 8, "--lr", 0.03)


@pytest.mark.parametrize("layer", ["nn.LSTM", "LSTM", "NovoLSTM"])
def test_forecaster_learns_with_every_layer(layer):
    code, output, _ = call(forecaster, "--layer", layer, *FEW)
    assert code == 0
    rows = table(output)
    assert list(rows) == ["persistence", "change of last year", f"{layer}, untrained", f"{layer}, 40 steps"]
    (persistence, last_year, untrained, trained) = (row[-1] for row in rows.values())
    assert trained < untrained / 2
    assert last_year < persistence


def test_forecaster_as_a_program_gives_lstm_the_errors_of_nn_lstm():
    few = (*FEW, "--steps", 8)
    outputs = run(forecaster, "--layer", "LSTM", *few), call(forecaster, "--layer", "nn.LSTM", *few)[1]
    ours, theirs = (list(table(output).values()) for output in outputs)
    assert ours == [pytest.approx(row, abs=0.011) for row in theirs]


def test_forecaster_trains_on_nothing_that_it_is_tested_on():
    ppm = 300 + torch.rand(1000).cumsum(0)
    later = torch.arange(1000) >= 800
    series, other = (forecaster.Series.of(values) for values in (ppm, torch.where(later, 9.0, ppm)))
    batches = [s.windows(64, torch.Generator().manual_seed(0)) for s in (series, other)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert series.scale == other.scale
    assert torch.equal(series.mean, other.mean)


def test_forecaster_measures_a_perfect_forecast_as_perfect():
    ppm = 300 + torch.rand(1000).cumsum(0)
    series = forecaster.Series.of(ppm)
    week = torch.arange(forecaster.YEAR, 1000 - forecaster.HORIZON).unsqueeze(1)
    change = ppm[week + torch.arange(1, forecaster.HORIZON + 1)] - ppm[week]
    torch.testing.assert_close(series.errors(change), torch.zeros(forecaster.HORIZON), rtol=0, atol=1e-3)
    torch.testing.assert_close(series.errors(change + 2), torch.full((forecaster.HORIZON,), 2.0), rtol=0, atol=1e-3)


def test_forecaster_knows_its_layers():
    code, _, errors = call(forecaster, "--layer", "GRU")
    assert code == 2
    assert "NovoLSTM" in errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[object, ...]:
    """Return the arguments that name a model of the byte generator, which its first call trained."""
    folder = tmp_path_factory.mktemp("bytes")
    text = folder / "words.txt"
    text.write_text(" ".join(random.Random(1).choices(["the", "sea", "and", "sand"], k=4000)))
    arguments = ("--folder", folder / "run")
    code, output, _ = call(
        byte_generator, "the", "--length", 0, *arguments, "--text", text, "--steps", 60, "--hidden", 16
    )
    assert code == 0
    # What the training says goes elsewhere.
    assert output == "the\n"
    return arguments


@pytest.fixture
def model(trained) -> ByteModel:
    return load_model(trained[1] / "model.safetensors")


def test_byte_generator_continues_a_prompt_alike_from_argument_and_stdin(trained):
    prompt = "the sea and"
    options = ("--length", 60, "--temperature", 0.3, *trained)
    piped = run(byte_generator, *options, stdin=prompt)
    code, output, errors = call(byte_generator, prompt, *options)
    assert (code, errors) == (0, "")
    assert piped == output
    assert output.startswith(prompt)
    assert output.endswith("\n")
    assert len(output) == len(prompt) + 60 + 1
    # It has learned the letters, at least.
    assert set(output[len(prompt) : -1]) <= set("theseaandsand ")


def test_byte_generator_repeats_itself_with_the_same_seed_only(trained):
    outputs = [call(byte_generator, "a", *trained, "--seed", seed)[1] for seed in (3, 3, 4)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_byte_generator_without_a_prompt(trained):
    code, output, _ = call(byte_generator, "--length", 5, *trained, stdin="")
    assert code == 0
    assert len(output) == 6


def test_prompt_in_pieces_is_the_prompt_whole(model):
    text = b"the sea and the sand"
    whole, pieces = (byte_generator.Stream(model, seed=1) for _ in range(2))
    whole.read(text)
    for piece in (text[:3], b"", text[3:4], text[4:]):
        pieces.read(piece)
    assert torch.equal(whole.logits, pieces.logits)
    assert all(torch.equal(a, b) for a, b in zip(whole.state, pieces.state, strict=True))
    assert [*whole.write(20, 0.7)] == [*pieces.write(12, 0.7), *pieces.write(8, 0.7)]
    assert torch.equal(whole.logits, pieces.logits)


@pytest.mark.parametrize("cell", ["novolstm", "lstm"])
def test_stream_expects_what_the_model_expects_of_the_whole_text(cell):
    torch.manual_seed(0)
    model = ByteModel(cell, 12, 2).eval()
    text = list(b"the sea and the sand")
    with torch.no_grad():
        logits, (h, c) = model(torch.tensor(text).unsqueeze(1))
    stream = byte_generator.Stream(model, seed=0)
    stream.read(text)
    torch.testing.assert_close(stream.logits, logits[-1, 0])
    for got, expected in zip(stream.state, (h, c), strict=True):
        torch.testing.assert_close(got, expected[:, 0])


def test_byte_generator_says_what_is_wrong_with_a_request(tmp_path):
    arguments = ("--folder", tmp_path / "run", "--text", tmp_path / "absent.txt")
    code, output, errors = call(byte_generator, "the", *arguments)
    assert (code, output) == (2, "")
    assert "does not exist" in " ".join(re.findall(r"\w+", errors))
    assert not (tmp_path / "run").exists()


def shown_on(page: str) -> list[str]:
    """Return what a page of the documentation shows as the output of programs."""
    text = (EXAMPLES.parent / "docs" / f"{page}.md").read_text()
    return re.findall(r"^```text\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_race_is_found_as_the_documentation_shows(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (shown,) = shown_on("testing")
    assert re.sub(r"\S*find_a_race.py", "examples/find_a_race.py", run(load("find_a_race"))) == shown


def test_custom_cell_learns_and_passes_the_check_as_the_documentation_shows(capsys):
    with mock.patch.dict(CELLS):
        load("custom_cell").main()
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^update +\d+: loss (\S+)$", output, flags=re.MULTILINE)]
    assert losses[-1] < losses[0] / 10

    def parts(text: str) -> list[str]:
        # Which array is nearest to its bound depends on the processor.
        return re.findall(r"^(cell .*|  .*?): .*, bound", text, flags=re.MULTILINE)

    assert parts(output) == parts(shown_on("own_cell")[0])


def test_mistake_in_the_custom_cell_is_found_as_the_documentation_shows(tmp_path):
    source = (EXAMPLES / "custom_cell.py").read_text()
    line = "    dh += dc\n"
    assert source.count(line) == 1
    (tmp_path / "mistaken_cell.py").write_text(source.replace(line, ""))
    mistaken = load("mistaken_cell", tmp_path)
    with mock.patch.dict(CELLS), pytest.raises(AssertionError) as error:
        mistaken.check_cell(mistaken.JANET)
    assert f"{error.value}\n" == shown_on("own_cell")[1]
