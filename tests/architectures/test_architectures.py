"""Architectures of transformers through all commands; those that coverage.json says work."""

from __future__ import annotations

import itertools
from datetime import date, timedelta
from pathlib import Path

import pytest
import transformers

from tests.architectures import coverage
from tests.architectures.checks import run
from tests.architectures.chosen import MOST_USED, QUICK, rotating_tenth
from tests.architectures.registry import architectures

RESULTS = coverage.read()
WORKING = [name for name, result in RESULTS.items() if result.state == "works"]
TODAY = rotating_tenth(WORKING, date.today())
CHOSEN = [name for name in (*MOST_USED, *TODAY) if name in WORKING]

pytestmark = pytest.mark.skipif(
    coverage.version() != transformers.__version__,
    reason=f"coverage.json is of transformers {coverage.version()}.",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CHOSEN]
)
def test_it_works(name: str, tmp_path: Path) -> None:
    result = run(architectures()[name], tmp_path)
    assert result == RESULTS[name]


def test_every_class_is_listed() -> None:
    assert RESULTS.keys() == architectures().keys()


def test_every_working_one_has_its_day() -> None:
    days = [rotating_tenth(WORKING, date(2026, 1, 1) + timedelta(days=i)) for i in range(10)]
    assert sorted(itertools.chain(*days)) == sorted({*WORKING} - {*MOST_USED})


def test_what_does_not_work_says_why() -> None:
    for name, result in RESULTS.items():
        assert (result.state == "works") == (not result.sentence), name


def test_the_table_is_written_as_it_was_read(tmp_path: Path) -> None:
    coverage.write(RESULTS, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == coverage.FILE.read_bytes()
