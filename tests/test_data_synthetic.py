"""The generated families against brute force: every problem once, right, and the same from the same seed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import DataError
from kvdistill.data.synthetic import CHAIN, PRODUCT, AbstractFamily, ChainFamily, ProductFamily

SMALL = [ChainFamily(num_steps=2, max_value=5, max_step=3), ProductFamily(min_factor=2, max_factor=4)]


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


@pytest.mark.parametrize("family", [CHAIN, PRODUCT], ids=lambda family: family.name)
@given(number=st.integers(min_value=0))
def test_answers_and_intermediate_results_are_right(family: AbstractFamily, number: int) -> None:
    question, reasoning, answer = family.write(number % family.count())
    if family is CHAIN:
        terms = question.replace("-", "+-").split("+")
        values = list(itertools.accumulate(map(int, terms)))[1:]
        assert [*map(int, reasoning.split(",")), int(answer)] == values
        assert all(0 <= value <= CHAIN.max_value for value in values)
    else:
        products = [int(a) * int(b) for a, b in (term.split("*") for term in question.split("+"))]
        assert [*map(int, reasoning.split(","))] == products and int(answer) == sum(products)


@pytest.mark.parametrize("family", SMALL, ids=lambda family: family.name)
def test_draw_is_unique_seeded_and_a_prefix_of_a_longer_draw(family: AbstractFamily) -> None:
    everything = family.draw(family.count(), seed=3)
    assert len({problem.question for problem in everything}) == family.count()
    assert family.draw(17, seed=3) == everything[:17]
    assert family.draw(17, seed=4) != everything[:17]


def test_draw_is_uniform() -> None:
    family, counts = SMALL[1], {}
    for seed in range(3000):
        first = family.draw(1, seed)[0].question
        counts[first] = counts.get(first, 0) + 1
    chi_square = sum((count - 3000 / 81) ** 2 / (3000 / 81) for count in counts.values())
    assert len(counts) == 81 and chi_square < 136  # 80 degrees of freedom: p = 1e-4


def test_more_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(DataError, match="only 4096 different") as caught:
        PRODUCT.draw(4097, seed=0)
    assert "4096" in caught.value.fix
