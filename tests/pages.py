"""Writes the pages of docs/verification from what the checks find: `python -m tests.pages` in a checkout."""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "verification"
SEEDED_FAULTS = "seeded-faults"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def read_rows(page: str) -> list[tuple[str, ...]]:
    """Return the rows of a page's table, without its header."""
    lines = [line for line in (FOLDER / f"{page}.md").read_text().splitlines() if line.startswith("| ")]
    return [tuple(c.strip().replace("\\|", "|") for c in line[1:-1].split(" | ")) for line in lines[2:]]


def seeded_faults() -> str:
    """Return the page of seeded faults."""
    from .seeded_faults import FAULTS, find

    rows = []
    for fault in FAULTS:
        found = find(fault)
        if found is None:
            raise RuntimeError(f"{fault.name}: nothing finds it")
        rows.append((fault.name, *found))
    return (
        "# Seeded faults\n\n"
        "Each line is a mistake that was put into a copy of the kernels or their launcher, what found it, and the\n"
        'report, without line numbers. A name of an error is that of the [checker](../testing.md); "wrong numbers" is\n'
        "the comparison with the reference. The kernels without faults raise no alarm.\n\n"
        + table(("fault", "found by", "report"), rows)
    )


PAGES = {SEEDED_FAULTS: seeded_faults}


def main() -> None:
    """Write all pages."""
    os.environ["TRITON_INTERPRET"] = "1"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / f"{name}.md").write_text(make())


if __name__ == "__main__":
    main()
