"""Leaks: what is learned from and held out as well, exactly or nearly, across splits, tasks and evaluations."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import DataError
from kvdistill.data.leaks import LEARNED, find_leaks, fold_question, question_hash, refuse_leaks, shorten
from kvdistill.data.problems import Problem

STORY = (
    "Anna has {a} apples and buys {b} more at the market on Monday. She gives half of all her apples to her brother "
    "and eats one of the others. How many apples does Anna have in the end?"
)


def _problem(question: str, task: str = "t", id: str = "1") -> Problem:
    return Problem(task, id, question, "r", "1")


def test_case_whitespace_and_width_are_folded_but_not_signs() -> None:
    assert question_hash("How  many?\n") == question_hash(" how MANY？")
    assert question_hash("５＋３") == question_hash("5+3")
    assert len({question_hash(q) for q in ("5+3", "5-3", "53", "5 3")}) == 4


@given(st.text())
def test_folding_twice_is_folding_once(text: str) -> None:
    assert fold_question(fold_question(text)) == fold_question(text)


@given(st.lists(st.tuples(st.sampled_from(["train", "teach", "val", "test"]), st.integers(0, 5)), max_size=20))
def test_leaks_are_exactly_the_questions_learned_from_and_held_out(placed: list[tuple[str, int]]) -> None:
    names = ("train", "val", "test", "teach")
    splits = {
        name: [_problem(f"q{n}", id=f"{n}") for n in sorted({n for s, n in placed if s == name})] for name in names
    }
    expected = {
        (first, second, n)
        for first, second in itertools.product(LEARNED, ("val", "test"))
        for n in range(6)
        if first != second and (first, n) in placed and (second, n) in placed
    }
    found = find_leaks(splits)
    assert {(leak.first.split, leak.second.split, int(leak.question[1:])) for leak in found.leaks} == expected
    assert len(found.leaks) == len(expected) and all(leak.kind == "exact" for leak in found.leaks)
    for split in LEARNED:
        gone = {int(splits[split][i].id) for i in found.leaking[split]}
        assert gone == {n for first, _, n in expected if first == split}


def test_a_leak_names_both_places_and_both_texts_also_across_tasks() -> None:
    splits = {
        "train": [_problem("Why?", "chain", "5"), _problem("why ?", "chain", "6")],
        "test": [_problem("WHY？", "mine", "line-3")],
    }
    leaks = find_leaks(splits).leaks
    with pytest.raises(DataError) as caught:
        refuse_leaks(leaks)
    assert "train / chain / 5" in str(caught.value) and "test / mine / line-3" in str(caught.value)
    assert "data.leaks=drop" in caught.value.fix and "WHY" in caught.value.what
    refuse_leaks([])


def test_a_reworded_problem_is_a_leak_and_one_with_other_numbers_is_not() -> None:
    asked = STORY.format(a=12, b=30)
    splits = {
        "train": [_problem(asked.replace("Anna", "Maria"), id="near"), _problem(STORY.format(a=7, b=55), id="other")]
    }
    found = find_leaks(splits | {"test": [_problem(asked, id="gold")]})
    assert [(leak.kind, leak.first.id) for leak in found.leaks] == [("near", "near")]
    assert found.leaking["train"] == {0} and found.num_variants == 1 and found.variants[0].first.id == "other"
    assert found.counts() == {"train against test, near": 1}


def test_evaluations_are_held_out_from_everything_but_test() -> None:
    question = STORY.format(a=3, b=4)
    public = [("gsm8k", "gsm8k", "17", question), ("bbh", "bbh_navigate", "1", "Another question?")]
    splits = {name: [_problem(question, id=name)] for name in ("train", "val", "test")}
    found = find_leaks(splits, public, missing=["gpqa"])
    pairs = {(leak.first.split, leak.second.split, leak.second.task) for leak in found.leaks}
    assert pairs == {
        ("train", "val", "t"), ("train", "test", "t"), ("train", "evaluation", "gsm8k"),
        ("val", "test", "t"), ("val", "evaluation", "gsm8k"),
    }  # fmt: skip
    assert found.checked == {"gsm8k": 1, "bbh": 1} and found.missing == ["gpqa"]


def test_the_same_question_twice_in_one_split_is_no_leak() -> None:
    splits = {"train": [_problem("q", "a"), _problem("q", "b")], "val": [_problem("v", "a"), _problem("v", "b")]}
    assert find_leaks(splits | {"test": [_problem("p")]}).leaks == []


@given(st.text(max_size=300))
def test_a_shortened_text_is_one_line_of_the_length(text: str) -> None:
    short = shorten(text)
    assert len(short) <= 80 and "\n" not in short
