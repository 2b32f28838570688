"""Writes the tables of docs/verification from what the checks find.

In a checkout: `python -m tests.support.pages` for all of them, or with the names of some.
"""

import os
import pathlib
import re
import sys

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "verification"

FAULTS, DEVICES, PROTOCOLS = "seeded-faults", "devices", "protocols"
NUMERICS, DRIFT = "numerics", "drift"


def faults() -> list[tuple[str, ...]]:
    """Return fault, what found it, and the report, for every seeded fault."""
    from . import seeded_faults

    return [fault_row(fault) for fault in seeded_faults.FAULTS]


def fault_row(fault) -> tuple[str, ...]:
    """Return the row of one seeded fault.

    Raises:
        RuntimeError: nothing finds it.
    """
    from .seeded_faults import find

    if (found := find(fault)) is None:
        raise RuntimeError(f"{fault.name}: nothing finds it")
    return fault.name, *found


def devices() -> list[tuple[str, ...]]:
    """Return what plans there are for every device."""
    from . import plan_space

    return [device_row(device) for device in plan_space.DEVICES]


def device_row(device) -> tuple[str, ...]:
    """Return the row of one device.

    Raises:
        RuntimeError: a plan has a flaw.
    """
    from .plan_space import survey

    found = survey(device)
    if found.flaws:
        raise RuntimeError(f"{device.name}: {found.flaws[0]}")
    numbers = (device.multiprocessors, found.plans, found.waiting, found.most)
    return device.name, *(f"{number:,}" for number in numbers)


def protocols() -> list[tuple[str, ...]]:
    """Return kernel, exchange, exchanges a step, sums and waits of every protocol."""
    from . import plan_space

    kinds = set().union(*(plan_space.survey(device).protocols for device in plan_space.DEVICES))
    return [protocol_row(kind) for kind in sorted(kinds)]


def protocol_row(kind) -> tuple[str, ...]:
    """Return the row of one protocol.

    Raises:
        RuntimeError: it does not keep the rule.
    """
    from .plan_space import protocol

    waits = []
    for slices in (2, 3):
        count, found = protocol(kind, slices)
        if found:
            raise RuntimeError(f"{kind}: {found[0]}")
        waits.append(str(count))
    name, sums = "backward" if kind.backward else "forward", "yes" if kind.rows else "no"
    return name, kind.exchange, str(kind.exchanges), sums, " and ".join(waits)


def numerics() -> list[tuple[str, ...]]:
    """Return case, cell, backend, dtype, and the errors and bound of the array that is nearest to its bound.

    Raises:
        RuntimeError: an error exceeds its bound.
    """
    from . import numerics as cases

    rows = []
    for key in cases.ROWS:
        found = cases.measure(*key)
        if found.error > found.bound:
            raise RuntimeError(f"{', '.join(key)}: {found}")
        rows.append((*key, *(f"{number:.1e}" for number in found[1:])))
    return rows


def drift() -> list[tuple[str, ...]]:
    """Return t and the errors of y until then, of every cell and backend, where it has walked so far."""
    from .numerics import DRIFT_COLUMNS
    from .numerics import drift as walked

    errors = [walked(*column) for column in DRIFT_COLUMNS]
    return [(f"{t:,}", *(f"{found[t]:.1e}" if t in found else "" for found in errors)) for t in errors[0]]


TABLES = {FAULTS: faults, DEVICES: devices, PROTOCOLS: protocols, NUMERICS: numerics, DRIFT: drift}
"""What makes the rows below the line `<!-- table NAME -->` and the table's header."""


def _place(name: str) -> tuple[pathlib.Path, re.Match]:
    """Return the page that has a table, and where its rows are."""
    pattern = re.compile(rf"<!-- table {name} -->\n\n\|.*\n\| ---.*\n(?P<rows>(?:\|.*\n)*)")
    for path in FOLDER.glob("*.md"):
        if found := pattern.search(path.read_text()):
            return path, found
    raise ValueError(f"name: expected a table of docs/verification, got {name!r}")


def read_rows(name: str) -> list[tuple[str, ...]]:
    """Return a table's rows as they stand on their page."""
    lines = _place(name)[1]["rows"].splitlines()
    return [tuple(cell.strip().replace("\\|", "|") for cell in line[1:-1].split(" | ")) for line in lines]


def write_rows(name: str, rows: list[tuple[str, ...]]) -> None:
    """Put rows in the place of a table's."""
    path, found = _place(name)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows]
    text = path.read_text()
    path.write_text(text[: found.start("rows")] + "".join(lines) + text[found.end("rows") :])


def main() -> None:
    """Write all tables, or those that are named."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in sys.argv[1:] or TABLES:
        write_rows(name, TABLES[name]())


if __name__ == "__main__":
    main()
