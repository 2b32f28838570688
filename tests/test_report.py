"""bench/report.py: either kind of results becomes a table and plots."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
report = importlib.import_module("bench.report")

PNG = b"\x89PNG"


def row(layer="torch", hidden=128, batch=16, steps=64, **measured):
    sizes = dict(steps=steps, batch=batch, inputs=hidden, hidden=hidden)
    return dict(layer=layer, dtype="fp32", exchange=None, pins={}, **sizes, **measured)


def of_pytest(rows):
    machine = dict(device="2 cores", torch="2.13", triton="none")
    return dict(machine_info=machine, benchmarks=[dict(name="t", extra_info=r) for r in rows])


def of_gpu(rows):
    return dict(environment=dict(device="NVIDIA H200", torch="2.11", cudnn=91002), rows=rows, checks=[], micro=[])


@pytest.fixture
def saved(tmp_path):
    def save(content, name="results.json"):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return save


@pytest.mark.parametrize("kind", [of_pytest, of_gpu])
def test_rows_of_one_layer_and_size_become_one(saved, kind):
    rows = [
        row(forward_us_per_step=2.0),
        row(peak_mib=3.5),
        row(hidden=64, first_call_s=0.25),
        row(batch=1, peak_mib=1),
    ]
    environment, merged = report.load(saved(kind(rows)))
    assert environment["device"] in ("2 cores", "NVIDIA H200")
    assert [(r["hidden"], r["batch"]) for r in merged] == [(64, 16), (128, 1), (128, 16)]
    assert (merged[2]["forward_us_per_step"], merged[2]["peak_mib"]) == (2.0, 3.5)


def test_exchanges_and_pins_tell_rows_apart():
    rows = [
        row("novolstm", forward_us_per_step=1.0) | dict(exchange=e, pins=p) for e, p in (("words", {}), ("none", {}))
    ]
    rows.append(rows[0] | dict(pins=dict(slices=4)))
    assert [report.name_of(r) for r in report.merged(rows)] == [
        "novolstm fp32 none",
        "novolstm fp32 words",
        "novolstm fp32 words slices=4",
    ]


def test_table_has_a_column_for_what_was_measured_only():
    rows = report.merged([row(forward_us_per_step=1234.5, forward_roofline_fraction=0.256), row(batch=1, peak_mib=0.5)])
    head, _, *lines = report.table(rows).splitlines()
    assert head == "| T | B | I | H | layer | forward µs/step | roofline, forward | peak MiB |"
    assert lines == [
        "| 64 | 1 | 128 | 128 | torch fp32 | – | – | 0.5 |",
        "| 64 | 16 | 128 | 128 | torch fp32 | 1,230 | 26% | – |",
    ]


def test_plot_varies_one_size_and_fixes_the_others():
    rows = [row(hidden=h, forward_us_per_step=h / 10) for h in (64, 256, 128)]
    rows += [row(hidden=512, batch=1, forward_us_per_step=1.0), row("nn.LSTM", hidden=64, forward_us_per_step=3.0)]
    fixed, lines = report.series(rows, "hidden", "forward_us_per_step")
    assert fixed == dict(batch=16, steps=64)
    assert lines == {"torch fp32": [(64, 6.4), (128, 12.8), (256, 25.6)], "nn.LSTM fp32": [(64, 3.0)]}
    assert report.series(rows, "hidden", "peak_mib") == ({}, {})


def test_command_writes_table_plots_and_reasons(saved):
    rows = [row(hidden=h, batch=b, forward_us_per_step=1.0 * h) for h in (64, 128) for b in (1, 16)]
    rows += [row(steps=t, peak_mib=t / 8) for t in (64, 128)]
    rows.append(row("novolstm") | dict(pins=dict(exchange="words"), error="refused: no\nplan"))
    path = saved(of_gpu(rows))
    command = [sys.executable, "-m", "bench.report", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    written = [pathlib.Path(line) for line in result.stdout.split("\n")[:-1]]
    assert [p.name for p in written] == ["results.md", "results-time.png", "results-memory.png"]
    assert all(p.read_bytes().startswith(PNG) for p in written[1:])
    text = written[0].read_text()
    assert "# NVIDIA H200" in text
    assert "- novolstm fp32 words, T 64, B 16, H 128: refused: no plan" in text
    assert all(f"({p.name})" in text for p in written[1:])


@pytest.mark.parametrize(
    ("content", "complaint"), [("[]", "expected results"), ("{", "not JSON"), ('{"a": 1}', "expected results")]
)
def test_other_files_get_one_clear_error(tmp_path, capsys, content, complaint):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    assert complaint in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing.json")]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_are_reported_as_they_are(path):
    _, rows = report.load(path)
    text = path.with_suffix(".md").read_text()
    assert report.table(rows) in text
    # Results name a kind of machine, not a machine.
    assert not re.search(r'"(node|hostname)"', path.read_text())
