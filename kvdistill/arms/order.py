"""The order of the examples: which texts come when, and how two trainings are known to have read the same.

The order is one list of example numbers for the whole training, a function of (seed, examples, steps, batch)
only: every arm of a study sees the same examples in the same order, and resuming is skipping a prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

from kvdistill.core.errors import DataError
from kvdistill.core.runtime import derive_seed
from kvdistill.data.encode import Example


def data_order(num_examples: int, num_needed: int, seed: int) -> list[int]:
    """Seeded permutations one after another, cut to `num_needed` example numbers. DataError where there is none."""
    if num_examples < 1:
        raise DataError("no examples to learn from", place="data.tasks", fix="give a task a `train` count above 0")
    order: list[int] = []
    epoch = 0
    while len(order) < num_needed:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        order += torch.randperm(num_examples, generator=generator).tolist()
        epoch += 1
    return order[:num_needed]


def order_fingerprint(order: Sequence[int], examples: Sequence[Example]) -> str:
    """Hash of which texts come when."""
    digest = hashlib.sha256()
    for i in order:
        digest.update(examples[i].doc_hash.encode())
        digest.update(examples[i].style.encode())
    return digest.hexdigest()


def order_prefixes(order: Sequence[int], examples: Sequence[Example]) -> dict[str, str]:
    """The same of the first 1, 2, 4, … texts, by their number: two trainings of unlike length read the same texts in
    the same order if they agree in the longest beginning that both have."""
    digest, found = hashlib.sha256(), {}
    for number, i in enumerate(order, start=1):
        digest.update(examples[i].doc_hash.encode())
        digest.update(examples[i].style.encode())
        if number & (number - 1) == 0:
            found[str(number)] = digest.hexdigest()[:16]
    return found


class ExampleNumbers(Dataset[int]):
    """The numbers 0..n-1: batches are made from numbers by `BatchMaker`, which knows the rest."""

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> int:
        return index


class FixedOrder(Sampler[int]):
    """Example numbers in the order given."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
