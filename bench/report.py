"""Make a Markdown table and plots of benchmark results: `python -m bench.report bench/results/*.json`.

Reads what `pytest bench --benchmark-json=FILE` and `bash bench/gpu.sh OUT_DIR` write: rows, dictionaries of

    layer, dtype, exchange, pins, steps, batch, inputs, hidden              what was measured
    {forward,forward_backward}_{us_per_step,tokens_per_s,roofline_fraction}    any of these,
    peak_mib, first_call_s                                                  and of these
    error                                                                   or why there is nothing

Rows of the same layer and sizes are merged. FILE.json becomes FILE.md, FILE-time.png and FILE-memory.png.
"""

import argparse
import collections
import json
import pathlib
import sys
from typing import Any

Row = dict[str, Any]

KEY = ("layer", "dtype", "exchange", "pins", "steps", "batch", "inputs", "hidden")
SIZES = {"hidden": "H", "batch": "B", "steps": "T"}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
COLUMNS = {
    "forward_us_per_step": ("forward µs/step", ".3g"),
    "forward_backward_us_per_step": ("forward + backward µs/step", ".3g"),
    "forward_backward_tokens_per_s": ("tokens/s, both", ".3g"),
    "forward_roofline_fraction": ("roofline, forward", ".0%"),
    "forward_backward_roofline_fraction": ("roofline, both", ".0%"),
    "peak_mib": ("peak MiB", ".3g"),
    "first_call_s": ("first call s", ".2g"),
}


def load(path: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    """Return a file's environment and its rows, merged.

    Raises:
        ValueError: the file is not one of the two kinds.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(content, dict) and "benchmarks" in content:
        rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        environment = content["machine_info"]
    elif isinstance(content, dict) and "rows" in content:
        rows, environment = content["rows"], content["environment"]
    else:
        raise ValueError(f"{path}: expected results of pytest-benchmark or of bench/gpu.sh")
    # bench_cpu.py has benchmarks without a row.
    return environment, merged([row for row in rows if "layer" in row])


def merged(rows: list[Row]) -> list[Row]:
    """Return the rows with those of one key made one, in order of sizes and layers."""
    groups: dict[str, Row] = {}
    for row in rows:
        row = {"inputs": row["hidden"], "pins": {}, "exchange": None} | row
        key = json.dumps([row[name] for name in KEY], sort_keys=True)
        groups[key] = groups.get(key, {}) | {name: value for name, value in row.items() if value is not None}
    return sorted(groups.values(), key=lambda row: (row["hidden"], row["batch"], row["steps"], name_of(row)))


def name_of(row: Row) -> str:
    """Return a layer with its dtype and pins, as the table and the legends call it."""
    pins = dict(row.get("pins") or {})
    exchange = row.get("exchange") or pins.get("exchange")
    choices = [f"{name}={value}" for name, value in pins.items() if name != "exchange"]
    return " ".join([row["layer"], row["dtype"], *([exchange] if exchange else []), *choices])


def table(rows: list[Row]) -> str:
    """Return a Markdown table of the rows, without columns that none of them has."""
    columns = {name: how for name, how in COLUMNS.items() if any(row.get(name) is not None for row in rows)}
    lines = ["| T | B | I | H | layer | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines += ["|" + "--:|" * 4 + "---|" + "--:|" * len(columns)]
    for row in rows:
        if any(row.get(name) is not None for name in columns):
            cells = [str(row[name]) for name in ("steps", "batch", "inputs", "hidden")] + [name_of(row)]
            cells += ["–" if row.get(name) is None else number(row[name], how) for name, (_, how) in columns.items()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float, how: str) -> str:
    """Return a number in a format, never with an exponent."""
    text = format(value, how)
    return f"{float(text):,.0f}" if "e" in text else text


def refusals(rows: list[Row]) -> str:
    """Return a list of what was not measured, and why."""
    lines = []
    for row in rows:
        if "error" in row:
            why = " ".join(str(row["error"]).split())
            lines.append(f"- {name_of(row)}, T {row['steps']}, B {row['batch']}, H {row['hidden']}: {why}")
    return "\n".join(lines)


def series(rows: list[Row], axis: str, measure: str) -> tuple[dict[str, int], dict[str, list[tuple[float, float]]]]:
    """Return the lines of a plot: points (size, value) of each layer, where only the size `axis` varies.

    Of all pairs of the other two sizes the one with most points is taken, the largest of several; it is returned, too.
    """
    others = [name for name in SIZES if name != axis]
    groups: dict[tuple, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row.get(measure) is not None:
            groups[tuple(row[name] for name in others)].append(row)
    if not groups:
        return {}, {}
    fixed = max(groups, key=lambda key: (len({row[axis] for row in groups[key]}), len(groups[key]), key))
    lines: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for row in groups[fixed]:
        lines[name_of(row)].append((row[axis], row[measure]))
    return dict(zip(others, fixed, strict=True)), {name: sorted(points) for name, points in sorted(lines.items())}


def plot(rows: list[Row], stem: pathlib.Path, device: str) -> list[pathlib.Path]:
    """Write the plots that the rows suffice for and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    panels = [(axis, f"{passes}_us_per_step", title) for passes, title in PASSES.items() for axis in SIZES]
    time = _figure(rows, panels, 3, f"µs per step, {device}", stem.with_name(f"{stem.name}-time.png"))
    memory_panel = [("steps", "peak_mib", "peak of forward + backward, MiB")]
    memory = _figure(rows, memory_panel, 1, device, stem.with_name(f"{stem.name}-memory.png"))
    return [path for path in (time, memory) if path]


def _figure(
    rows: list[Row], panels: list[tuple[str, str, str]], columns: int, title: str, path: pathlib.Path
) -> pathlib.Path | None:
    from matplotlib import pyplot

    drawn = [(axis, what, *series(rows, axis, measure)) for axis, measure, what in panels]
    if not any(lines for *_, lines in drawn):
        return None
    names = sorted({name for *_, lines in drawn for name in lines})
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(4.2 * columns + 0.6, 3.4 * height), squeeze=False)
    for position, (axis, what, fixed, lines) in zip(axes.flat, drawn, strict=True):
        for name, points in lines.items():
            style = dict(marker="o", markersize=4, color=f"C{names.index(name) % 10}")
            position.plot(*zip(*points, strict=True), label=name, **style)
        position.set(xscale="log", yscale="log", xlabel=SIZES[axis])
        position.set_xscale("log", base=2)
        position.grid(alpha=0.3, which="both")
        position.set_title(f"{what}; " + ", ".join(f"{SIZES[k]} = {v}" for k, v in fixed.items()), fontsize=9)
    handles = {label: line for a in axes.flat for line, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(5, len(handles)), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.1 / height + 0.02 * (len(handles) // 5), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def write(path: pathlib.Path) -> list[pathlib.Path]:
    """Write a file's table and plots beside it and return their paths."""
    environment, rows = load(path)
    device = str(environment.get("device"))
    stem = path.with_suffix("")
    plots = plot(rows, stem, device)
    known = ("device", "torch", "triton", "cuda", "cudnn", "driver", "python")
    versions = ", ".join(
        f"{name} {environment[name]}" for name in known[1:] if environment.get(name) not in (None, "none")
    )
    parts = [f"# {device}", f"{versions}. `python -m bench.report` made this from [{path.name}]({path.name})."]
    parts += [f"![{image.stem}]({image.name})" for image in plots] + [table(rows)]
    if reasons := refusals(rows):
        parts += ["Not measured:", reasons]
    text = stem.with_suffix(".md")
    text.write_text("\n\n".join(parts) + "\n")
    return [text, *plots]


def main(arguments: list[str] | None = None) -> int:
    """Write a report of each file; the exit code is 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE.json")
    for path in parser.parse_args(arguments).files:
        try:
            for written in write(path):
                print(written)
        except (OSError, ValueError) as error:
            print(f"bench.report: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
