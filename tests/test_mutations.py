"""Every synchronisation in the kernels is needed, and the tests see when one is gone: remove each in turn and look."""

import re

import pytest

from novolstm_triton.testing import GridError

from .support.seeded_faults import BOUNDED, ONE, PLAIN, STATE, TWO, mutated, source_of

NAMES = ("forward", "backward", "exchange")
SYNCHRONISATION = re.compile(r"^\s+(arrive\(|wait\(|arrivals \+= |tl\.debug_barrier|tl\.atomic_add)")
# Two exchanges in a step of backward, or one; the plain LSTM has one anyway, a cell that normalises c three. Bounded
# waits have lines of their own.
CASES = (TWO, ONE, PLAIN, STATE, BOUNDED)


def removals() -> list:
    """List one mutation per line that synchronises, and one per memory order of an atomic: (file, line, new text)."""
    found = []
    for name in NAMES:
        for number, line in enumerate(source_of(name).splitlines()):
            indent = line[: len(line) - len(line.lstrip())]
            where = f"{name}-{number + 1}-{line.strip().split('(')[0].replace(' ', '')}"
            if SYNCHRONISATION.match(line):
                found.append(pytest.param(name, number, indent + "pass", id=where))
            weaker = re.sub('sem="(acquire|release)"', 'sem="relaxed"', line)
            if weaker != line:
                found.append(pytest.param(name, number, weaker, id=f"{where}-relaxed"))
    return found


def test_removals_are_of_every_kind():
    kinds = {re.sub(r"-\d+-", " ", str(case.id)) for case in removals()}
    both = {f"{name} {what}" for name in ("forward", "backward") for what in ("arrive", "arrivals+=SLICES", "wait")}
    assert kinds >= both | {"exchange tl.debug_barrier", "exchange tl.atomic_add", "exchange tl.atomic_add-relaxed"}


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("name", NAMES)
def test_copy_without_mutation_passes(name, case):
    with mutated(name, source_of(name)):
        case.run(0)


def kind_of(name: str, number: int, text: str) -> tuple:
    """Return where a mutation is and what it does, of which a quick run takes one each."""
    operation = source_of(name).splitlines()[number].strip().partition("(")[0]
    return ((name, operation, text.strip() == "pass"),)


@pytest.mark.covering(1, of=kind_of)
@pytest.mark.parametrize(("name", "number", "text"), removals())
def test_removal_is_found(name, number, text):
    lines = source_of(name).splitlines()
    lines[number] = text
    with mutated(name, "\n".join(lines) + "\n"), pytest.raises((GridError, AssertionError)):  # noqa: PT012
        for seed in range(6):
            for case in CASES:
                case.run(seed)
