"""What a quick run takes: every combination that it should cover, few cases, and at least one of each test."""

import itertools
from types import SimpleNamespace

import pytest

from .support.selection import covering, mark_the_rest

PRODUCT = list(itertools.product("abc", range(4), (True, False), "xy"))


@pytest.mark.parametrize(("strength", "most"), [(1, 4), (2, 16), (3, 36), (4, 48)])
def test_every_combination_is_covered_by_few_cases(strength, most):
    chosen = [PRODUCT[k] for k in covering(PRODUCT, strength)]
    for places in itertools.combinations(range(4), strength):
        every, found = ({tuple(case[place] for place in places) for case in cases} for cases in (PRODUCT, chosen))
        assert found == every
    assert len(chosen) <= most


def test_combinations_that_no_case_has_are_not_asked_for():
    cases = [(1, "a"), (2, "b"), (2, "b"), (1, "b")]
    assert covering(cases, 1) == [0, 1]
    assert covering(cases, 2) == [0, 1, 3]


class Item:
    """As much of a collected test as the choice looks at."""

    def __init__(self, test: str, marks: list, **params: object) -> None:
        self.parent, self.originalname, self.callspec = SimpleNamespace(nodeid="f.py"), test, SimpleNamespace()
        self.callspec.params, self.marks = params, {mark.name: mark.mark for mark in marks}

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = getattr(pytest.mark, name).mark


def quick(items: list[Item]) -> list[dict]:
    mark_the_rest(items)
    return [item.callspec.params for item in items if "exhaustive" not in item.marks]


def test_each_test_is_covered_for_itself():
    mark, values = pytest.mark.covering(1), ([1], [2])
    items = [Item(test, [mark], a=a, b=b) for test in ("one", "other") for a in values for b in values]
    assert quick(items) == [dict(a=[1], b=[1]), dict(a=[2], b=[2])] * 2
    assert quick([Item("one", [], a=a) for a in range(3)]) == [dict(a=0), dict(a=1), dict(a=2)]


def test_features_are_those_that_the_mark_names():
    mark = pytest.mark.covering(1, of=lambda text: (len(text), text[0]))
    assert quick([Item("one", [mark], text=text) for text in ("a", "b", "ab", "bb")]) == [
        dict(text="a"),
        dict(text="bb"),
    ]


def test_case_that_is_exhaustive_anyway_covers_nothing():
    mark = pytest.mark.covering(1)
    items = [Item("one", [mark, *[pytest.mark.exhaustive] * (a == 0)], a=a, b=b) for a in (0, 1) for b in "xy"]
    assert quick(items) == [dict(a=1, b="x"), dict(a=1, b="y")]
