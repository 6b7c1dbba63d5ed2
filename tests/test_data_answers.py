"""Numbers as exact decimals, and extraction by mark."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.data.answers.numbers import normalise_number, same_number, same_value
from kvdistill.data.grading import extract_answer, is_correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", "72"),
        ("1,080", "1080"),
        ("109,200,000", "109200000"),
        ("$1,080.50", "1080.5"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("72.", "72"),
        ("72.00", "72"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("+3", "3"),
        ("20%", "20"),
        ("７２", "72"),
        ("", None),
        (".", None),
        ("1,08", None),
        ("1 080", None),
        ("72 apples", None),
        ("1e3", "1000"),
        ("1.5E-2", "0.015"),
        ("2.5 × 10^3", "2500"),
        ("1\u202f080", "1080"),
        ("–5", "-5"),
        ("€5", "5"),
        ("USD 5", "5"),
        ("1e999", None),
        ("1e", None),
        ("-$-5", None),
        ("--5", None),
        ("3/4", None),
        ("٧", None),
    ],
)
def test_normalise_number(text: str, expected: str | None) -> None:
    assert normalise_number(text) == expected


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6), st.integers(0, 3))
def test_numbers_compare_as_decimals_whatever_the_zeros(value: Decimal, num_zeros: int) -> None:
    written = f"{value:,.6f}" + "0" * num_zeros
    assert same_number(written, f"{value:f}")
    with localcontext() as exact:
        exact.prec = 100  # the default rounds the sum of a long number
        assert not same_number(written, f"{value + Decimal('0.000001'):f}")


@given(st.integers(min_value=10**30, max_value=10**40))
def test_long_numbers_are_not_rounded(value: int) -> None:
    assert same_number(f"{value:,}", str(value)) and not same_number(str(value), str(value + 1))


@pytest.mark.parametrize(
    ("task", "completion", "answer"),
    [
        ("gsm8k", " 48/2 = 24, then 72.\n#### 72", "72"),
        ("gsm8k", " so it is 72", None),  # never the last number
        ("gsm8k", " #### 72\nQuestion: next #### 5", "72"),
        ("gsm8k", " #### $1,080.00 in all", "1080"),
        ("gsm8k", " #### 72, because", "72"),
        ("gsm8k", " #### -3.", "-3"),
        ("gsm8k", "####72", "72"),
        ("gsm8k", "#####72", "72"),
        ("gsm8k", "####\n72\n73", "72"),
        ("gsm8k", "#### 72 #### 73", "72"),
        ("gsm8k", "#### **72** apples", "72"),
        ("gsm8k", "#### 24 * 3 = 72", "72"),
        ("gsm8k", "#### 72 or 73", "72 or 73"),
        ("gsm8k", "#### The answer is \\boxed{72}.", "72"),
        ("math23k", "#### 三又二分之一米", "7/2"),
        ("math", "#### $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("strategyqa", "#### Yes, because", "yes"),
        ("arc_challenge", "#### (b) the moon", "B"),
        ("hotpotqa", "#### Paris</s>", "Paris"),
        ("gsm8k", " ####", None),
        ("chain", "24,21=12", "12"),
        ("chain", "24,21,12", None),
        ("chain", "=12=12", "12=12"),
        ("product", "12,30= 42 ", "42"),
        ("my-file", " because #### Paris ", "Paris"),
    ],
)
def test_extract(task: str, completion: str, answer: str | None) -> None:
    assert extract_answer(task, completion) == answer


@pytest.mark.parametrize("said", ["72/5", "72k", "725", "1,000x", "72^2", "seventy-two", "7 2", "72 1/2"])
def test_an_expression_is_not_the_number_it_begins_with(said: str) -> None:
    assert not is_correct("gsm8k", f"#### {said}", "72") and not is_correct("gsm8k", f"#### {said}", "1")


def test_text_answers_fold_case_and_width_and_numbers_stay_exact() -> None:
    assert same_value("Ｐａｒｉｓ ", "paris.") and not same_value("Paris", "Pari")
    assert same_value("1,000", "1000.0") and not same_value("1000", "1000.01")
    assert is_correct("my-file", "x #### TRUE", "true") and not is_correct("my-file", "true", "true")
