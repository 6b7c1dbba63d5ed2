"""What counts as the same answer: hand-checked pairs of every task, properties, and which part of a text counts."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from answer_pairs import LATEX_DIFFERENT, LATEX_EQUAL, PAIRS, completion_of
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.data.answers.chinese import read_numeral, spell_in_digits
from kvdistill.data.answers.latex import compare_latex_pairs, fold_latex, last_boxed, same_latex
from kvdistill.data.answers.numbers import (
    leading_number,
    leading_ratio,
    normalise_ratio,
    same_ratio,
    same_value,
    unwrap,
)
from kvdistill.data.grading import check_answers, extract_answer, is_correct
from kvdistill.data.sets import TASKS, arc_challenge, gsm8k, hotpotqa, math, math23k, strategyqa, svamp
from kvdistill.data.sources import read_rows

MARKED = ("gsm8k", "svamp", "strategyqa", "math23k", "math", "arc_challenge", "hotpotqa", "jsonl")
READERS = {
    gsm8k.read_row: ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    svamp.read_row: ("svamp/SVAMP.json",),
    strategyqa.read_row: ("strategyqa/train.json",),
    math23k.read_row: ("math23k/math23k_test.json", "math23k/mwptoolkit_testset.json"),
    math.read_row: ("math/test_first1000.jsonl", "math500/test.jsonl"),
    arc_challenge.read_row: (
        "arc_challenge/test.jsonl",
        "arc_challenge/train_subset.jsonl",
        "arc_challenge/hf_validation",
    ),
    hotpotqa.read_row: ("hotpotqa/dev_v1_simplified.json",),
}


@pytest.mark.parametrize(("task", "gold", "equal", "unequal"), PAIRS, ids=[f"{t}-{g}" for t, g, _, _ in PAIRS])
def test_hand_checked_answers(task: str, gold: str, equal: list[str], unequal: list[str]) -> None:
    said = [*equal, *unequal]
    checked = check_answers(task, [(completion_of(task, answer), gold) for answer in said])
    found = {answer: each.verdict for answer, each in zip(said, checked, strict=True)}
    assert found == dict.fromkeys(equal, "equal") | dict.fromkeys(unequal, "different")


def test_there_are_enough_pairs_and_their_golds_are_published(data_root: Path) -> None:
    num_equal, num_unequal = (sum(len(pair[i]) for pair in PAIRS) for i in (2, 3))
    assert num_equal + num_unequal >= 700 and num_unequal >= (num_equal + num_unequal) / 3
    published: dict[str, set[str]] = {}
    for read, files in READERS.items():
        for file in files:
            for row in read_rows(data_root / file, place="data.root"):
                problem = read(row, "x")
                published.setdefault(problem.task, set()).add(problem.answer)
    named = {task for task, _, _, _ in PAIRS}
    assert named == set(published) | {"chain", "product", "my-file"}
    assert [(task, gold) for task, gold, _, _ in PAIRS if task in published and gold not in published[task]] == []


def test_answers_are_compared_alike_in_both_directions() -> None:
    latex = [(answer, gold) for task, gold, equal, unequal in PAIRS if task == "math" for answer in (*equal, *unequal)]
    assert compare_latex_pairs(latex) == compare_latex_pairs([(gold, answer) for answer, gold in latex])
    for task, gold, equal, unequal in PAIRS:
        for answer in (*equal, *unequal):
            read = extract_answer(task, completion_of(task, answer))
            assert read is not None and TASKS.get(task, TASKS["jsonl"]).same(read, gold) == (answer in equal)
            if task != "math":
                assert TASKS.get(task, TASKS["jsonl"]).same(gold, read) == (answer in equal)


def test_every_form_of_latex_that_has_a_rule() -> None:
    for pairs, verdict in ((LATEX_EQUAL, "equal"), (LATEX_DIFFERENT, "different")):
        turned = [(second, first) for first, second in pairs]
        for asked in (pairs, turned):
            found = zip(asked, compare_latex_pairs(asked), strict=True)
            assert [(pair, said) for pair, said in found if said != verdict] == []


def test_the_first_mark_counts_and_math_may_box_instead() -> None:
    for task in MARKED:
        assert extract_answer(task, "so 12, or #### A\n#### B") == "A"
        assert extract_answer(task, "so 12, or ####A ####\n#### B") == "A"
        assert extract_answer(task, "") is None and extract_answer(task, "12") is None
        assert extract_answer(task, "12 ####") is None and extract_answer(task, "12 #### \n") is None
    assert extract_answer("math", "so \\boxed{\\frac{1}{2}}, I mean \\boxed{3}") == "3"
    assert extract_answer("math", "\\boxed{1} #### 2") == "2"
    assert extract_answer("svamp", "\\boxed{3}") is None


@pytest.mark.parametrize(
    "ending", ["", "\n", ".", " .", "\n#### 99", " ####", "<|im_end|>", "</s>", "\nQuestion: What is 3?", "\r\n"]
)
def test_what_follows_an_answer_does_not_change_it(ending: str) -> None:
    for task, gold in {
        "gsm8k": "1080",
        "math23k": "57/10",
        "strategyqa": "yes",
        "arc_challenge": "B",
        "math": "x+1",
    }.items():
        assert is_correct(task, f"7 and so\n#### {gold}{ending}", gold), task


def test_an_expression_is_no_answer_to_a_question_for_a_number() -> None:
    for task, expression in (("gsm8k", "76 - 25"), ("svamp", "76 - 25"), ("math23k", "76-25"), ("math23k", "x=76-25")):
        assert not is_correct(task, f"#### {expression}", "51")
    assert is_correct("math", "#### 76 - 25", "51")


def test_ratios() -> None:
    given = {"((14)/(20))": "7/10", "5((7)/(10))": "57/10", "-1/2": "-1/2", "1,080.50": "1080.5", ".5%": "0.5%"}
    assert {text: normalise_ratio(text) for text in given} == given
    for text in ("", "%", "1/0", "((1)/(2)", "1/2%", "5(7)", "1/-2", "1 2", "x", "1e999", "inf", "nan", "1_000"):
        assert normalise_ratio(text) is None and not same_ratio(text, text)
    assert leading_ratio("3千米") == "3" and leading_ratio("3千") == "3000" and leading_ratio("3/4 of it") == "3/4"
    assert leading_ratio("1,080元") == "1080" and leading_ratio("1,08") is None
    assert normalise_ratio("9" * 200) == "9" * 200


@given(st.integers(0, 10**12 - 1))
def test_chinese_numerals(number: int) -> None:
    written = _in_chinese(number)
    assert read_numeral(written) == number and spell_in_digits(f"{written}个") == f"{number}个"
    assert read_numeral(written.removeprefix("一")) == number or not written.startswith("一十")


def _in_chinese(number: int) -> str:
    """Four digits at a time, without the zeros that end a group; 零 for a run of zeros inside."""
    text = ""
    for value, name in ((number // 10**8, "亿"), (number // 10**4 % 10**4, "万"), (number % 10**4, "")):
        places = zip(f"{value:04}", ("千", "百", "十", ""), strict=True)
        group = "".join("零" if c == "0" else "零一二三四五六七八九"[int(c)] + place for c, place in places)
        text += group.rstrip("零") + name if value else "零"
    while "零零" in text:
        text = text.replace("零零", "零")
    return text.strip("零") or "零"


SPACES = ("", " ", "\u00a0", "\u2009", "\u3000")


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(SPACES), st.sampled_from(("$", "", "€", "£")), st.data())
def test_how_a_number_is_written_does_not_matter(value: Decimal, space: str, sign: str, data: st.DataObject) -> None:
    plain, minus = f"{abs(value):f}", "-" if value < 0 else ""
    grouped = f"{abs(value):,.2f}"
    written = minus + sign + space * bool(sign) + data.draw(st.sampled_from((plain, grouped)))
    if data.draw(st.booleans()):
        written = written.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    wrapped = data.draw(
        st.sampled_from(("{}", "**{}**", "\\boxed{{{}}}", "{}.", "{} apples", "The answer is {}.", "x = {}"))
    )
    gold = str(TASKS["gsm8k"].extract(f"#### {value:f}"))
    for task in ("gsm8k", "svamp", "math23k"):
        assert is_correct(task, f"#### {wrapped.format(written)}", gold), written
        assert not is_correct(task, f"#### {wrapped.format(written)}", f"{value + Decimal('0.01'):f}")


@given(st.fractions(-1000, 1000, max_denominator=500), st.fractions(-1000, 1000, max_denominator=500))
def test_fractions_are_equal_when_they_are(first: Fraction, second: Fraction) -> None:
    def forms(value: Fraction) -> list[str]:
        whole, rest = divmod(abs(value), 1)
        sign = "-" if value < 0 else ""
        mixed = f"{sign}{whole}(({rest.numerator})/({rest.denominator}))"
        return [str(value), f"{value.numerator * 3}/{value.denominator * 3}", mixed]

    def latex(value: Fraction) -> str:
        return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"

    for one in forms(first):
        assert all(same_ratio(one, other) for other in forms(first))
        assert same_ratio(one, str(second)) == same_ratio(str(second), one) == (first == second)
    assert same_latex(latex(first), str(first)) and same_latex(latex(first), latex(second)) == (first == second)


@given(st.text(max_size=40))
def test_any_text_is_read_without_an_error_and_equals_itself(text: str) -> None:
    for task in MARKED:
        answer = extract_answer(task, f"#### {text}")
        if answer is None or task == "math":
            continue
        again = TASKS[task].extract(f"#### {answer}")
        assert again is None or TASKS[task].same(again, again) or task in ("gsm8k", "svamp", "math23k")
    assert same_value(text, text) and unwrap(unwrap(text)) == unwrap(text)
    assert leading_number(text) is None or "\n" not in str(leading_number(text))
    assert fold_latex(fold_latex(text)) == fold_latex(text) or "\\" in text or "$" in text


def test_boxes() -> None:
    assert last_boxed("\\boxed{a{b}\\}c} and \\fbox{d}") == "d" and last_boxed("\\boxed{a{b}\\}c}") == "a{b}\\}c"
    assert last_boxed("\\boxed 5") == "5" and last_boxed("\\boxed{never closed") is None and last_boxed("none") is None


def test_long_answers_are_settled_quickly_by_their_text() -> None:
    long = "x+" * 500_000
    for text in (
        long,
        "9" * 1_000_000,
        "{" * 1_000_000,
        "\\frac" * 200_000,
        "百" * 100_000,
        "$" * 1_000_001,
        "(" * 100_000,
    ):
        for task in MARKED:
            gold = "B" if task == "arc_challenge" else "51"
            assert not is_correct(task, f"#### {text}", gold)
    assert same_latex(long, long) and not same_latex(long, long + "1") and same_value("7" * 10**6, "7" * 10**6 + ".0")
