"""What a run reports: records of checks and rows, their lines of text, and the JSON file."""

import json
import math
import os
import pathlib
import re
from typing import Any

from .tasks import Task, entry_name


def failed(task: Task, reason: str, at: str = "") -> list[dict]:
    """Return the results of a task that has none: a check, or a row for each entry that `at` names (all if none)."""
    if task["kind"] == "micro":
        return [dict(name=f"{task['name']} {at}".strip(), ok=False, message=reason)]
    if task["kind"] == "check":
        how = {key: task[key] for key in ("name", "dtype", "pins")}
        return [dict(how, shape=shape_of(task["problem"]), error=None, bound=None, ok=False, message=reason)]
    lost = [e for e in task["entries"] if entry_name(e) == at] or task["entries"]
    return [dict(row_head(task, e), error=reason) for e in lost]


def shape_of(problem: dict) -> list[int]:
    """Return [T, B, I, H] of a check."""
    return [problem[key] for key in ("steps", "batch")] + [problem.get("inputs_size", 3), problem["hidden"]]


def row_head(task: Task, entry: Task) -> dict:
    """Return the part of a row that is known before it runs."""
    head = {key: entry[key] for key in ("layer", "dtype", "pins")}
    return dict(head, exchange=None, inputs=task["hidden"], **{key: task[key] for key in ("hidden", "batch", "steps")})


def slug(name: str) -> str:
    """Return a device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def finite(value: Any) -> Any:
    """Return `value` with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: pathlib.Path, report: dict) -> None:
    """Write a report so that a reader, or an interrupted run, finds the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def line_of(result: dict) -> str:
    """Return a check or a row as one line of text."""
    if "ok" in result:
        text = f"{'ok    ' if result['ok'] else 'FAILED'} {result['name']:70} "
        if "message" in result:
            return text + result["message"].splitlines()[0][:300]
        return text + f"error {number(result['error'], '.2e')} of {number(result['bound'], '.2e')} {result['detail']}"
    if "constant" in result:
        return f"micro  {result['constant']}: {result['value']} {result['unit']}"
    sizes = f"T={result['steps']:<5} H={result['hidden']:<5} B={result['batch']:<4}"
    text = f"row    {result['layer']:9} {result['dtype']:4} {sizes}"
    if "error" in result:
        return text + result["error"].splitlines()[0][:300]
    for key in ("forward", "forward_backward"):
        text += f" {key} {number(result.get(f'{key}_us_per_step'), '8.3f')}"
    text += f" us/step  peak {number(result.get('peak_mib'), '.0f')} MiB"
    text += f"  first call {number(result.get('first_call_s'), '.1f')} s"
    plans = [f"{p['slices']}x({p['block_b']}x{p['block_n']}x{p['block_k']})" for p in result.get("plan", {}).values()]
    return f"{text}  {result['exchange'] or ''} {' '.join(plans)}".rstrip()


def number(value: float | None, form: str) -> str:
    """Return a number, or a dash for none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)
