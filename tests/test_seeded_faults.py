"""The checks see every mistake that was put into a copy of the kernels, and none where there is none."""

import dataclasses

import pytest

from .support.pages import FAULTS as FAULT_TABLE
from .support.pages import fault_row, read_rows
from .support.seeded_faults import BOTH, FAULTS, LENGTHS, NAN_WORDS, ONE, ONE_WORDS, PLAIN, TILES, TWO, WORDS

CASES = (TWO, ONE, PLAIN, TILES, BOTH, LENGTHS, WORDS, ONE_WORDS, NAN_WORDS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault_is_found_as_the_page_says(fault):
    assert fault_row(fault) in read_rows(FAULT_TABLE)


def test_page_has_all_faults_and_no_others():
    assert [name for name, *_ in read_rows(FAULT_TABLE)] == [fault.name for fault in FAULTS]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_kernels_without_faults_raise_no_alarm(case, seed):
    case.run(seed)


def test_fault_that_fits_nowhere_is_an_error():
    fault = dataclasses.replace(FAULTS[0], old="no such text")
    with pytest.raises(ValueError, match="no such place"):
        fault.text()
