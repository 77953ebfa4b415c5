"""Every fault of `docs/reliability.md` happens again: nothing wrong is returned, nothing is lost, the page is right."""

from __future__ import annotations

import pytest

from medmim.errors import WeightsError
from reliability import CASES, CLIENT, PAGE, Stage, measure, page, read_page, staged

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)


@pytest.fixture(scope="module")
def rows():
    """The page: fault -> what the client does, what medmim does."""
    return {title: cells for title, *cells in read_page()}


def test_the_page_has_every_fault():
    rows = read_page()
    assert len(rows) >= 25
    assert [row[0] for row in rows] == [case.title for case in CASES]
    measured = PAGE.read_text(encoding="utf-8").partition("client alone (")[2].partition(")")[0]
    assert PAGE.read_text(encoding="utf-8").replace(measured, CLIENT, 1) == page(rows)


@each_case
def test_medmim(case, rows):
    with staged(case) as stage:
        outcome = measure(stage, stage.fetch)
        assert outcome.is_right is not False
        if outcome.error is not None:
            assert isinstance(outcome.error, WeightsError)
            assert "\n" not in str(outcome.error)
        stage.recover()
        assert measure(stage, stage.fetch).is_right
    assert outcome.text == rows[case.title][1], "python tests/reliability.py writes the page again"


@each_case
def test_the_client_alone(case, rows):
    with staged(case) as stage:
        outcome = measure(stage, lambda: Stage.fetch_bare(stage))
    if CLIENT not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page was measured with another version of the client")
    assert outcome.text == rows[case.title][0], "python tests/reliability.py writes the page again"
