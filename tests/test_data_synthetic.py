"""The generated families against brute force: every problem once, right, and the same from the same seed."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import DataError
from kvdistill.data.sets.generated import (
    _PERMUTATIONS,
    AbstractFamily,
    AffineFamily,
    ChainFamily,
    DigitsFamily,
    PermuteFamily,
    ProductFamily,
    QuotientFamily,
)

CHAIN, PRODUCT = ChainFamily(), ProductFamily()  # the sizes that the built-in study uses
DIGITS, QUOTIENT = DigitsFamily(), QuotientFamily()
AFFINE, PERMUTE = AffineFamily(), PermuteFamily()
SMALL = [
    ChainFamily(num_steps=2, max_value=5, max_step=3),
    ProductFamily(min_factor=2, max_factor=4),
    DigitsFamily(num_digits=3),
    QuotientFamily(max_quotient=4, max_divisor=3, max_term=5),
    AffineFamily(modulus=5, num_steps=3),
    PermuteFamily(num_steps=2),
]


def _chains_slowly(num_steps: int, max_value: int, max_step: int) -> set[tuple[str, str, str]]:
    moves = [sign * step for sign in (1, -1) for step in range(1, max_step + 1)]
    found = set()
    for start in range(max_value + 1):
        for steps in itertools.product(moves, repeat=num_steps):
            values = list(itertools.accumulate(steps, initial=start))[1:]
            if all(0 <= value <= max_value for value in values):
                question = str(start) + "".join(f"{step:+d}" for step in steps)
                found.add((question, ",".join(map(str, values[:-1])), str(values[-1])))
    return found


def test_chain_family_is_exactly_the_chains_there_are() -> None:
    family = SMALL[0]
    written = [family.write(number) for number in range(family.count())]
    assert len(written) == len(set(written)) == family.count()
    assert set(written) == _chains_slowly(2, 5, 3)


def test_product_family_is_exactly_the_products_there_are() -> None:
    written = {SMALL[1].write(number) for number in range(SMALL[1].count())}
    expected = {
        (f"{a}*{b}+{c}*{d}", f"{a * b},{c * d}", str(a * b + c * d))
        for a, b, c, d in itertools.product(range(2, 5), repeat=4)
    }
    assert written == expected and len(written) == 81


def test_digits_family_is_exactly_the_numbers_without_a_zero() -> None:
    written = {SMALL[2].write(number) for number in range(SMALL[2].count())}
    expected = {
        (str(n), str(sum(map(int, str(n)[:2]))), str(sum(map(int, str(n)))))
        for n in range(111, 1000)
        if "0" not in str(n)
    }
    assert written == expected and len(written) == 729


def test_quotient_family_is_exactly_the_quotients_there_are() -> None:
    written = {SMALL[3].write(number) for number in range(SMALL[3].count())}
    expected = {
        (f"({whole}-{taken})/{divisor}+{last}", f"{whole - taken},{(whole - taken) // divisor}",
         str((whole - taken) // divisor + last))
        for whole in range(1, 50)
        for divisor in (2, 3)
        for taken, last in itertools.product(range(1, 6), repeat=2)
        if (whole - taken) % divisor == 0 and 2 <= (whole - taken) // divisor <= 4
    }  # fmt: skip
    assert written == expected and len(written) == SMALL[3].count() == 150


def _affine_slowly(modulus: int, num_steps: int) -> dict[str, tuple[str, str]]:
    """Question -> reasoning and answer, by evaluating the text of each step."""
    moves = [f"+{d}" for d in range(1, modulus)] + [f"*{d}" for d in range(2, modulus)]
    found = {}
    for start, steps in itertools.product(range(modulus), itertools.product(moves, repeat=num_steps)):
        value, lines = start, []
        for step in steps:
            after = eval(f"({value}{step}) % {modulus}")
            lines.append(f"{value}{step}>{after}")
            value = after
        found[f"{start}{''.join(steps)}"] = ",".join(lines[:-1]), str(value)
    return found


def test_affine_family_is_exactly_the_chains_modulo_a_prime() -> None:
    family = SMALL[4]
    written = [family.write(number) for number in range(family.count())]
    assert {question: (reasoning, answer) for question, reasoning, answer in written} == _affine_slowly(5, 3)
    assert len(written) == family.count() == 5 * 7**3
    n = 4 + 7 * (2 + 11 * (9 + 11 * (1 + 11 * 8)))
    assert AFFINE.write(n) == ("4+3*5+2*4", "4+3>0,0*5>0,0+2>2", "1")


def test_permute_family_is_exactly_the_words_of_twelve_letters() -> None:
    family, expected = SMALL[5], set()
    for start, first, second in itertools.product("1234567", "abcdefghijkl", "abcdefghijkl"):
        between = _PERMUTATIONS[first][int(start) - 1]
        expected.add((start + first + second, f"{start}{first}>{between}", _PERMUTATIONS[second][int(between) - 1]))
    written = [family.write(number) for number in range(family.count())]
    assert set(written) == expected and len(written) == family.count() == 7 * 12**2


@pytest.mark.parametrize("family", [AffineFamily(num_steps=3), PermuteFamily(num_steps=3)], ids=lambda one: one.name)
def test_answers_of_chained_steps_are_uniform_so_chance_is_one_in_seven(family: AbstractFamily) -> None:
    counts = Counter(family.write(number)[2] for number in range(family.count()))
    assert len(counts) == 7 and set(counts.values()) == {family.count() // 7}


@pytest.mark.parametrize("family", [AFFINE, PERMUTE], ids=lambda family: family.name)
def test_neither_the_start_nor_the_last_step_tells_the_answer_of_four_steps(family: AbstractFamily) -> None:
    problems = family.draw(0, 20_000, seed=1)
    for part in (lambda question: question[0], lambda question: question[-2:]):
        seen: dict[str, Counter[str]] = {}
        for problem in problems[:10_000]:
            seen.setdefault(part(problem.question), Counter())[problem.answer] += 1
        right = sum(
            seen[part(p.question)].most_common(1)[0][0] == p.answer
            for p in problems[10_000:]
            if part(p.question) in seen
        )
        assert abs(right / 10_000 - 1 / 7) < 0.015  # four standard errors


@pytest.mark.parametrize("family", [AFFINE, PERMUTE], ids=lambda family: family.name)
@given(number=st.integers(min_value=0))
def test_chained_steps_are_written_out_with_their_state_last(family: AbstractFamily, number: int) -> None:
    question, reasoning, answer = family.write(number % family.count())
    steps = reasoning.split(",")
    assert len(steps) == 3 and all(len(step) == (5 if family is AFFINE else 4) for step in steps)
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(steps)) and question[0] == steps[0][0]
    assert question.startswith(question[0] + "".join(step[1:-2] for step in steps)) and len(answer) == 1
    assert not set(question + reasoning) & set("=:?")  # the marks of what follows


def test_letters_that_permute_never_commute_stay_or_agree() -> None:
    tables = {letter: [int(place) - 1 for place in word] for letter, word in _PERMUTATIONS.items()}
    assert all(sorted(table) == list(range(7)) for table in tables.values())
    for a, b in itertools.combinations(tables.values(), 2):
        assert [a[place] for place in b] != [b[place] for place in a]
    for half in ("abcdef", "ghijkl"):  # with staying, each sends a place to each other place exactly once
        for place in range(7):
            assert {place, *(tables[letter][place] for letter in half)} == set(range(7))


def test_affine_kin_are_the_questions_whose_like_neighbours_change_places() -> None:
    family, of = SMALL[4], {}
    for number in range(family.count()):
        question, _, answer = family.write(number)
        runs = re.findall(r"(?:\+\d)+|(?:\*\d)+", question)
        ordered = question[0] + "".join("".join(sorted(re.findall(r"[+*]\d", run))) for run in runs)
        of.setdefault(ordered, set()).add((family.kin(number), answer))
    assert all(len(found) == 1 for found in of.values())  # one number for all of them, and one answer
    assert len({kin for found in of.values() for kin, _ in found}) == len(of) < family.count()
    held_out, *more = AFFINE.draw(1, 40_000, seed=0)
    kin = AFFINE.kin(int(held_out.id))
    assert all(AFFINE.kin(int(problem.id)) != kin for problem in more)


def test_a_number_and_its_digits_in_another_order_are_kin() -> None:
    of = {DIGITS.write(number)[0]: DIGITS.kin(number) for number in range(0, DIGITS.count(), 97)}
    assert all((sorted(a) == sorted(b)) == (of[a] == of[b]) for a in list(of)[:60] for b in of)


def test_quotients_are_kin_where_only_what_is_taken_away_differs() -> None:
    """(79-7)/8+5 and (80-8)/8+5 are, (72-8)/8+5 and (79-7)/8+6 are not: from the difference on they are one text."""
    family = SMALL[3]
    texts: dict[int, set[tuple[str, str, str]]] = {}
    for number in range(family.count()):
        question, reasoning, answer = family.write(number)
        texts.setdefault(family.kin(number), set()).add((question.partition(")")[2], reasoning, answer))
        assert family.kin(family.kin(number)) == family.kin(number) and "-1)" in family.write(family.kin(number))[0]
    assert all(len(of_kin) == 1 for of_kin in texts.values())
    assert len(texts) == len(set().union(*texts.values())) == 3 * 2 * 5, "quotients, divisors, last terms"
    problems = QUOTIENT.draw(264, 16300, seed=0)  # as few-problems-new draws them
    rest = [(problem.question.partition(")")[2], problem.reasoning) for problem in problems]
    assert len({*rest[:264]}) == 264 and not {*rest[:264]} & {*rest[264:]}


@pytest.mark.parametrize("family", [CHAIN, PRODUCT, DIGITS, QUOTIENT], ids=lambda family: family.name)
@given(number=st.integers(min_value=0))
def test_answers_and_intermediate_results_are_right(family: AbstractFamily, number: int) -> None:
    question, reasoning, answer = family.write(number % family.count())
    if family is CHAIN:
        terms = question.replace("-", "+-").split("+")
        values = list(itertools.accumulate(map(int, terms)))[1:]
        assert [*map(int, reasoning.split(",")), int(answer)] == values
        assert all(0 <= value <= CHAIN.max_value for value in values)
    elif family is DIGITS:
        sums = list(itertools.accumulate(map(int, question)))[1:]
        assert len(question) == 6 and "0" not in question and [*map(int, reasoning.split(",")), int(answer)] == sums
    elif family is QUOTIENT:
        inner, last = question.removeprefix("(").split("+")
        difference, divisor = inner.split(")/")
        whole = int(difference.split("-")[0]) - int(difference.split("-")[1])
        assert whole % int(divisor) == 0 and reasoning == f"{whole},{whole // int(divisor)}"
        assert int(answer) == whole // int(divisor) + int(last)
    else:
        products = [int(a) * int(b) for a, b in (term.split("*") for term in question.split("+"))]
        assert [*map(int, reasoning.split(","))] == products and int(answer) == sum(products)


@pytest.mark.parametrize("family", SMALL, ids=lambda family: family.name)
def test_draw_is_unique_and_seeded(family: AbstractFamily) -> None:
    everything = family.draw(0, family.count(), seed=3)
    assert len({problem.question for problem in everything}) == family.count()
    assert family.draw(0, 17, seed=3) == everything[:17]
    assert family.draw(0, 17, seed=4) != everything[:17]
    held_out = family.draw(7, 10, seed=3)[:7]
    assert held_out == family.draw(7, 0, seed=3)  # what is held out does not depend on what is asked for beside it


def test_draw_is_uniform() -> None:
    family, counts = SMALL[1], {}
    for seed in range(3000):
        first = family.draw(1, 0, seed)[0].question
        counts[first] = counts.get(first, 0) + 1
    chi_square = sum((count - 3000 / 81) ** 2 / (3000 / 81) for count in counts.values())
    assert len(counts) == 81 and chi_square < 136  # 80 degrees of freedom: p = 1e-4


def _rearrangements(question: str) -> set[str]:
    found = set()
    for first, second in itertools.permutations(question.split("+")):
        for a in (first, "*".join(reversed(first.split("*")))):
            for b in (second, "*".join(reversed(second.split("*")))):
                found.add(f"{a}+{b}")
    return found


def test_rearrangements_of_held_out_products_are_nowhere_else() -> None:
    problems = PRODUCT.draw(264, 17500, seed=0)
    held_out, more = problems[:264], {problem.question for problem in problems[264:]}
    assert len(more) == 17500
    for problem in held_out:
        kin = _rearrangements(problem.question)
        assert not kin & more
        assert sum(other.question in kin for other in held_out) == 1


def test_kin_is_the_same_for_all_rearrangements_and_for_nothing_else() -> None:
    family = SMALL[1]
    questions = {number: family.write(number)[0] for number in range(family.count())}
    for number, question in questions.items():
        same = {other for other, text in questions.items() if text in _rearrangements(question)}
        assert same == {other for other in questions if family.kin(other) == family.kin(number)}


def test_more_than_there_are_says_how_many_there_are() -> None:
    family = SMALL[1]
    with pytest.raises(DataError, match="only 81 different") as caught:
        family.draw(3, 79, seed=0)
    left = int(str(caught.value.fix).split(" to ")[1].split(",")[0])
    assert len(family.draw(3, left, seed=0)) == 3 + left
