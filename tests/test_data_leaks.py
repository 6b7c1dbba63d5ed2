"""Exact leaks across splits and tasks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import DataError
from kvdistill.data.leaks import find_leaks, fold_question, question_hash, refuse_leaks
from kvdistill.data.problems import Problem


def _problem(question: str, task: str = "t", id: str = "1") -> Problem:
    return Problem(task, id, question, "r", "1")


def test_case_whitespace_and_width_are_folded_but_not_signs() -> None:
    assert question_hash("How  many?\n") == question_hash(" how MANY？")
    assert question_hash("５＋３") == question_hash("5+3")
    assert len({question_hash(q) for q in ("5+3", "5-3", "53", "5 3")}) == 4


@given(st.text())
def test_folding_twice_is_folding_once(text: str) -> None:
    assert fold_question(fold_question(text)) == fold_question(text)


@given(st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), st.integers(0, 5)), max_size=20))
def test_leaks_are_exactly_the_questions_in_two_splits(placed: list[tuple[str, int]]) -> None:
    splits = {name: [_problem(f"q{n}") for split, n in placed if split == name] for name in ("train", "val", "test")}
    expected = {
        (first, second, n)
        for first, second in itertools.combinations(splits, 2)
        for n in range(6)
        if (first, n) in placed and (second, n) in placed
    }
    found = find_leaks(splits)
    assert {(leak.first.split, leak.second.split, int(leak.question[1:])) for leak in found} == expected
    assert len(found) == len(expected)


def test_a_leak_names_both_places_also_across_tasks() -> None:
    splits = {
        "train": [_problem("Why?", "chain", "5"), _problem("why ?", "chain", "6")],
        "test": [_problem("WHY？", "mine", "line-3")],
    }
    leaks = find_leaks(splits)
    with pytest.raises(DataError) as caught:
        refuse_leaks(leaks)
    assert "train / chain / 5" in str(caught.value) and "test / mine / line-3" in str(caught.value)
    assert "allow_leaks" in caught.value.fix
    refuse_leaks([])


def test_the_same_question_twice_in_one_split_is_no_leak() -> None:
    assert find_leaks({"train": [_problem("q", "a"), _problem("q", "b")], "test": [_problem("p")]}) == []
