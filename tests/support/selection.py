"""Which cases of the tests a quick run takes, and which it leaves to `pytest --exhaustive`.

A case with the mark `exhaustive` is left out. `@pytest.mark.covering(strength)` on a test chooses among its cases, from
however many `parametrize` they come: a quick run takes a few in which every `strength` values of different parameters
that some case has together still meet, 1 for every value and 2 for every pair, and the others are marked `exhaustive`.
`of=function` says what to cover if it is not the parameters themselves: it takes them by name and returns features.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest


def covering(cases: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """Return the indices of a few cases that have every combination of `strength` features that any case has.

    Greedy: each next case has the most combinations that are still missing, and is the first of these. A later one
    whose combinations the others all have is then dropped, so that the choice is always the same and near the least.
    """
    combinations = [
        set(itertools.combinations(enumerate(features), min(strength, len(features)))) for features in cases
    ]
    missing, chosen = set().union(*combinations), []
    while missing:
        best = max(range(len(cases)), key=lambda k: (len(combinations[k] & missing), -k))
        missing -= combinations[best]
        chosen.append(best)
    for k in list(chosen):
        if combinations[k] <= set().union(*(combinations[other] for other in chosen if other != k)):
            chosen.remove(k)
    return sorted(chosen)


def _features(item: Any, mark: pytest.Mark) -> tuple[Hashable, ...]:
    if "of" in mark.kwargs:
        return tuple(mark.kwargs["of"](**item.callspec.params))
    # A value of `parametrize` is one object in all cases, and need not be hashable.
    return tuple(map(id, item.callspec.params.values()))


def mark_the_rest(items: Iterable[Any]) -> None:
    """Mark as `exhaustive` what the covering choices leave out."""
    tests: dict[tuple, list[Any]] = {}
    for item in items:
        mark = item.get_closest_marker("covering")
        if mark is not None and item.get_closest_marker("exhaustive") is None:
            tests.setdefault((item.parent.nodeid, item.originalname), []).append((item, mark))
    for cases in tests.values():
        mark = cases[0][1]
        chosen = covering([_features(item, mark) for item, _ in cases], *mark.args)
        for k, (item, _) in enumerate(cases):
            if k not in chosen:
                item.add_marker("exhaustive")
