"""The built-in tasks `chain`, `product`, `digits`, `quotient`, `affine`, `permute`: made from the seed, not downloaded.

Every family numbers its problems 0 … count()-1 and can write down any of them. Drawing numbers without replacement
makes problems that are unique by construction and uniform over the family. Rearrangements of one problem (3*4+5*6 and
6*5+4*3) never stand on both sides of a split. Written `3*4+5*6:12,30=42`; style direct asks with `?` in place of `:`.

    chain     question 12+7-5        reasoning 19             answer 14
    product   question 3*4+5*6       reasoning 12,30          answer 42
    digits    question 493817        reasoning 13,16,24,25    answer 32
    quotient  question (79-7)/8+5    reasoning 72,9           answer 14
    affine    question 4+3*5+2*4     reasoning 4+3>0,0*5>0,0+2>2    answer 1
    permute   question 3bdka         reasoning 3b>6,6d>7,7k>3       answer 4

The last two are for students that think in latents: their steps do not commute, so that few layers cannot skip them,
and every step is written out, its state (one digit) last, all steps but the one that gives the answer.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, groupby
from typing import final

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.data.answers.numbers import normalise_number, same_number, text_after
from kvdistill.data.problems import Problem, Row, Style
from kvdistill.data.sets.base import DataSet, Task
from kvdistill.data.sets.published import Loaded, refuse_keys_of_own_files
from kvdistill.data.sources import Source

_MARK = "="
_ENDINGS: dict[Style, str] = {"cot": ":", "direct": "?"}


class AbstractFamily(ABC):
    """A finite, numbered set of problems."""

    name: str

    @abstractmethod
    def count(self) -> int:
        """How many different problems there are."""

    @abstractmethod
    def write(self, number: int) -> tuple[str, str, str]:
        """Question, reasoning and answer of problem `number`, 0 <= number < count()."""

    def kin(self, number: int) -> int:
        """One number for all rearrangements of problem `number`: whoever has seen one of them has seen them all."""
        return number

    def draw(self, num_held_out: int, num_more: int, seed: int, more_seed: int | None = None) -> list[Problem]:
        """Different problems, the same ones for the same seed: first the held-out ones, then those to learn from.

        No two held-out problems are kin, and none of the others is kin to a held-out one.
        more_seed: of those to learn from; unset: one order for both. DataError where too few exist.
        """
        held_out: dict[int, int] = {}
        more: list[int] = []
        numbers = _draw_numbers(self.count(), self.count(), derive_seed(seed, self.name, "problems"))
        while len(held_out) < num_held_out and (number := next(numbers, None)) is not None:
            held_out.setdefault(self.kin(number), number)
        if more_seed is not None:
            numbers = _draw_numbers(self.count(), self.count(), derive_seed(more_seed, self.name, "learned"))
        while len(more) < num_more and (number := next(numbers, None)) is not None:
            if self.kin(number) not in held_out:
                more.append(number)
        if len(held_out) < num_held_out or len(more) < num_more:
            raise DataError(
                f"{num_held_out} held-out problems and {num_more} others asked for, but only {self.count()} different "
                f"ones exist: {len(held_out)} held out, and {len(more)} that are not rearrangements of those",
                place=f"data.tasks ({self.name})",
                fix=f"lower train + teach of {self.name} to {len(more)}, or val + test",
            )
        return [Problem(self.name, str(number), *self.write(number)) for number in [*held_out.values(), *more]]


@final
@dataclass(frozen=True)
class ChainFamily(AbstractFamily):
    """A start value and `num_steps` times + or − a step; every value stays in 0 … max_value."""

    num_steps: int = 3
    max_value: int = 20
    max_step: int = 9
    name: str = "chain"

    @cached_property
    def _ways(self) -> list[list[int]]:
        """ways[n][v]: how many chains of n steps begin at value v."""
        ways = [[1] * (self.max_value + 1)]
        for _ in range(self.num_steps):
            ways.append(
                [sum(ways[-1][after] for _, after in self._moves(value)) for value in range(self.max_value + 1)]
            )
        return ways

    def _moves(self, value: int) -> Iterator[tuple[str, int]]:
        for step in range(1, self.max_step + 1):
            if value + step <= self.max_value:
                yield f"+{step}", value + step
            if value - step >= 0:
                yield f"-{step}", value - step

    def count(self) -> int:
        return sum(self._ways[self.num_steps])

    def write(self, number: int) -> tuple[str, str, str]:
        value = 0
        while number >= self._ways[self.num_steps][value]:
            number -= self._ways[self.num_steps][value]
            value += 1
        question, values = str(value), []
        for left in range(self.num_steps - 1, -1, -1):
            for step, after in self._moves(value):
                if number < self._ways[left][after]:
                    question, value = question + step, after
                    break
                number -= self._ways[left][after]
            else:
                raise AssertionError("a number beyond count()")
            values.append(str(value))
        return question, ",".join(values[:-1]), values[-1]


@final
@dataclass(frozen=True)
class ProductFamily(AbstractFamily):
    """a*b + c*d with factors in min_factor … max_factor."""

    min_factor: int = 1
    max_factor: int = 12
    name: str = "product"

    def count(self) -> int:
        return self._size**4

    def write(self, number: int) -> tuple[str, str, str]:
        a, b, c, d = (self.min_factor + digit for digit in _digits(number, self._size, 4))
        return f"{a}*{b}+{c}*{d}", f"{a * b},{c * d}", str(a * b + c * d)

    def kin(self, number: int) -> int:
        digits, size = _digits(number, self._size, 4), self._size
        (a, b), (c, d) = sorted((sorted(digits[:2]), sorted(digits[2:])))
        return a + size * (b + size * (c + size * d))

    @property
    def _size(self) -> int:
        return self.max_factor - self.min_factor + 1


@final
@dataclass(frozen=True)
class DigitsFamily(AbstractFamily):
    """The sum of the digits of a number of `num_digits` digits, none of them 0; the reasoning is the running sum."""

    num_digits: int = 6
    name: str = "digits"

    def count(self) -> int:
        return 9**self.num_digits

    def write(self, number: int) -> tuple[str, str, str]:
        digits = self._digits(number)
        sums = list(accumulate(digits))
        return "".join(map(str, digits)), ",".join(map(str, sums[1:-1])), str(sums[-1])

    def kin(self, number: int) -> int:
        return int("".join(map(str, sorted(self._digits(number)))))

    def _digits(self, number: int) -> list[int]:
        return [1 + digit for digit in _digits(number, 9, self.num_digits)]


@final
@dataclass(frozen=True)
class QuotientFamily(AbstractFamily):
    """(a - b)/c + d, where the quotient is 2 … max_quotient, c is 2 … max_divisor and b, d are 1 … max_term."""

    max_quotient: int = 12
    max_divisor: int = 12
    max_term: int = 20
    name: str = "quotient"

    def count(self) -> int:
        return (self.max_quotient - 1) * (self.max_divisor - 1) * self.max_term**2

    def write(self, number: int) -> tuple[str, str, str]:
        number, quotient = divmod(number, self.max_quotient - 1)
        number, divisor = divmod(number, self.max_divisor - 1)
        last, taken = divmod(number, self.max_term)
        quotient, divisor, last, taken = quotient + 2, divisor + 2, last + 1, taken + 1
        whole = quotient * divisor
        return f"({whole + taken}-{taken})/{divisor}+{last}", f"{whole},{quotient}", str(quotient + last)

    def kin(self, number: int) -> int:
        """The problem with the least to take away: (79-7)/8+5 and (80-8)/8+5 have the same reasoning from 72 on."""
        ways = (self.max_quotient - 1) * (self.max_divisor - 1)
        return number - number // ways % self.max_term * ways


@final
@dataclass(frozen=True)
class AffineFamily(AbstractFamily):
    """A start value 0 … modulus-1, then `num_steps` times `+d` or `*d` modulo a prime, applied from left to right.

    d is 1 … modulus-1 behind `+` and 2 … modulus-1 behind `*`, so that every step is a bijection: over the starts, and
    so over the family, all answers are equally frequent, and the best constant guess is right once in `modulus`.
    """

    modulus: int = 7
    num_steps: int = 4
    name: str = "affine"

    def count(self) -> int:
        return self.modulus * self._num_moves**self.num_steps

    def write(self, number: int) -> tuple[str, str, str]:
        value, moves = self._parts(number)
        question, steps = str(value), []
        for move in moves:
            adds = move < self.modulus - 1
            operand = move + 1 if adds else move - self.modulus + 3
            step = f"{'+' if adds else '*'}{operand}"
            after = (value + operand if adds else value * operand) % self.modulus
            question += step
            steps.append(f"{value}{step}>{after}")
            value = after
        return question, ",".join(steps[:-1]), str(value)

    def kin(self, number: int) -> int:
        """Neighbours that add commute, and so do neighbours that multiply: 4+3+2*5 and 4+2+3*5 are rearrangements."""
        start, moves = self._parts(number)
        runs = groupby(moves, key=lambda move: move < self.modulus - 1)
        ordered = [move for _, run in runs for move in sorted(run)]
        return start + self.modulus * sum(move * self._num_moves**place for place, move in enumerate(ordered))

    def _parts(self, number: int) -> tuple[int, list[int]]:
        """The start value, and each step's number: first those that add, then those that multiply."""
        number, start = divmod(number, self.modulus)
        return start, _digits(number, self._num_moves, self.num_steps)

    @property
    def _num_moves(self) -> int:
        return 2 * self.modulus - 3


# Of `permute`: where each letter sends 1, 2, … 7. Two Latin squares without their first rows: of either half, each
# letter sends a place to another one, so that the start says nothing of the answer (1/7 each, to a thousandth of it).
# No two of the twelve commute, and together they make all 5,040 permutations: no algebra of the group shortens a word.
_PERMUTATIONS = {
    **{"a": "2547316", "b": "3761245", "c": "4623751", "d": "5412673", "e": "6175432", "f": "7356124"},
    **{"g": "2673415", "h": "3142756", "i": "4567132", "j": "5726341", "k": "6415273", "l": "7351624"},
}


@final
@dataclass(frozen=True)
class PermuteFamily(AbstractFamily):
    """A place 1 … 7, then `num_steps` letters, each of which sends every place to another, always in the same way.

    What a letter does stands in no question: it is learned from reasoning. All places are equally frequent among the
    answers: the best constant guess is right once in seven. No two letters commute, so that no two questions are
    rearrangements of each other.
    """

    num_steps: int = 4
    name: str = "permute"

    def count(self) -> int:
        return 7 * len(_PERMUTATIONS) ** self.num_steps

    def write(self, number: int) -> tuple[str, str, str]:
        number, start = divmod(number, 7)
        names, place = list(_PERMUTATIONS), str(start + 1)
        letters = [names[digit] for digit in _digits(number, len(names), self.num_steps)]
        question, steps = place + "".join(letters), []
        for letter in letters:
            after = _PERMUTATIONS[letter][int(place) - 1]
            steps.append(f"{place}{letter}>{after}")
            place = after
        return question, ",".join(steps[:-1]), place


def _digits(number: int, base: int, places: int) -> list[int]:
    """Of a number below base ** places, the last one first."""
    return [number // base**place % base for place in range(places)]


def _draw_numbers(total: int, count: int, seed: int) -> Iterator[int]:
    """`count` different numbers below `total`: a Fisher–Yates shuffle that remembers only what it moved."""
    stream = random.Random(seed)
    moved: dict[int, int] = {}
    for i in range(count):
        j = stream.randrange(i, total)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def load_generated(task: TaskRecipe, data: DataRecipe, *, family: AbstractFamily) -> Loaded:
    """As many different problems as all splits need together, held-out ones first, so that they cannot overlap."""
    refuse_keys_of_own_files(task)
    problems = family.draw(task.test + task.val, task.train + task.teach, data.seed, data.train_seed)
    return Loaded(problems, [Source(family.name, "generated", repr(family))], in_order=True)


def write_symbols(problem: Problem, style: Style) -> Row:
    """`3*4+5*6:` `12,30` `=42`; style direct asks with `?` in place of `:`."""
    reasoning = problem.reasoning if style == "cot" else ""
    return Row(problem, style, problem.question + _ENDINGS[style], reasoning, _MARK + problem.answer)


def extract_symbols(completion: str) -> str | None:
    """All that follows the first `=`; text after the number is kept and makes the answer wrong."""
    answer = text_after(_MARK, completion, to_line_end=False)
    return (normalise_number(answer) or answer) if answer is not None else None


def _generated(family: AbstractFamily) -> DataSet:
    load = partial(load_generated, family=family)
    return DataSet(
        Task(family.name, load, write_symbols, extract_symbols, same_number, published=False, generated=True)
    )


# The sizes that the built-in study uses.
CHAIN, PRODUCT = _generated(ChainFamily()), _generated(ProductFamily())
DIGITS, QUOTIENT = _generated(DigitsFamily()), _generated(QuotientFamily())
AFFINE, PERMUTE = _generated(AffineFamily()), _generated(PermuteFamily())
