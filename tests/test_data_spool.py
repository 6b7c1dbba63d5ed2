"""Problems on disk: what goes in comes out, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.data.problems import Problem
from kvdistill.data.spool import Selection, Spool, spool_beside

texts = st.text(st.characters(exclude_categories=["Cs"]))
problems = st.builds(Problem, texts, texts, texts, texts, texts, texts)


@given(st.lists(problems, max_size=12))
def test_what_goes_in_comes_out_also_between_appends(tmp_path_factory: pytest.TempPathFactory, given: list[Problem]):
    spool = Spool(tmp_path_factory.getbasetemp())
    for number, problem in enumerate(given):
        assert spool.append(problem) == number and spool.read([number]) == [problem]
    assert spool.read(range(len(given))) == given
    chosen = Selection(spool, reversed(range(len(given))))
    assert chosen == given[::-1] and list(chosen[1:3]) == given[::-1][1:3]
    assert list(chosen.without({0})) == given[:0:-1]
    with pytest.raises(IndexError):
        spool.read([len(given)])
    with pytest.raises(IndexError):
        chosen[len(given)]


def test_no_file_is_ever_seen(tmp_path: Path) -> None:
    spool = spool_beside(tmp_path / "not" / "there" / "yet")
    for number in range(3000):
        spool.append(Problem("t", str(number), "q" * 500, "r", "1"))
    assert list(tmp_path.iterdir()) == [] and spool.read([2999])[0].id == "2999"
