"""Controls: what an arm's teachers give, less one thing, at the cost of the arm.

    placebo    of a mismatched example: the teacher's states, of no use for this text
    untrained  of the right text, by the same teacher with random weights (`Teacher(untrained=True)`)
    shuffled   of the right text, its tokens permuted within each segment: right in sum, wrong at every place
    noise      Gaussian, each channel with the mean and deviation that the teacher's has

A text is learned from many times, and real targets are the same each time. So is what stands in for them: partners,
permutations and noise are functions of (seed, example) alone. Nothing else of the arm changes: time maps and kept
tokens are those of the teacher's places, fits and competence (NLL) those of the teacher itself, but for the placebo,
which has the NLL of the text it is given, and for an untrained teacher, whose fits are its own.

Logits: a placebo's are the predictions of the mismatched completion, in order, from its beginning again where it is
shorter; shuffled ones go with the token that they predict; noise keeps a position's log-probabilities and gives them
to tokens drawn at random. docs/controls.md says what each control rules out. Knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvdistill.core.kv import KV
from kvdistill.core.runtime import derive_seed
from kvdistill.core.segments import ANSWER, PADDING, REASONING
from kvdistill.core.targets import TeacherTargets

_PREFIX = "moments."


def mismatched_partner(num_examples: int, seed: int) -> list[int]:
    """For each example another one, no example its own: a seeded cycle through all of them."""
    return _cycle(num_examples, torch.Generator().manual_seed(derive_seed(seed, "placebo")))


def _cycle(number: int, generator: torch.Generator) -> list[int]:
    """For each of 0..n-1 another one, where there are two: one random cycle through all."""
    cycle = torch.randperm(number, generator=generator).tolist()
    other = [0] * number
    for here, there in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True):
        other[here] = there
    return other


def permuted_places(segments_BS: Int[Tensor, "B S"], seeds: Sequence[int]) -> Int[Tensor, "B S"]:
    """For each place the one whose token is put there, within its segment and example; padding stays.

    No token stays where it is, but for one that is alone in its segment. seeds: one for each example.
    """
    order_BS = torch.arange(segments_BS.shape[1]).repeat(len(segments_BS), 1)
    for order, segments, seed in zip(order_BS, segments_BS.cpu(), seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for code in sorted({*segments.tolist()} - {PADDING}):
            places = (segments == code).nonzero().squeeze(1)
            order[places] = places[_cycle(len(places), generator)]
    return order_BS


def predicting_places(order_BS: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """`permuted_places` of tokens as places of predictions, each of which stands one place before its token."""
    rows_BS = torch.arange(order_BS.shape[1]).repeat(len(order_BS), 1).to(order_BS)
    rows_BS[:, :-1] = (order_BS[:, 1:] - 1).clamp_min(0)
    return rows_BS


def mismatched_predictions(mine_BT: Int[Tensor, "B T"], theirs_BS: Int[Tensor, "B S"]) -> Int[Tensor, "B T"]:
    """For each place that predicts a completion token, the place among the mismatched text's that does: the first for
    the first and so on, from the first again where that text is shorter. Segment codes of both; 0 elsewhere."""
    rows_BT = torch.zeros_like(mine_BT)
    for rows, mine, theirs in zip(rows_BT, mine_BT, theirs_BS, strict=True):
        here, there = (((one[1:] == REASONING) | (one[1:] == ANSWER)).nonzero().squeeze(1) for one in (mine, theirs))
        if len(there):
            rows[here] = there[torch.arange(len(here)) % len(there)]
    return rows_BT


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of every channel of a teacher's captured layers, float32: keys and values
    [M, 2, G, E], queries [M, H, E] or None."""

    mean_M2GE: Tensor
    std_M2GE: Tensor
    query_mean_MHE: Tensor | None = None
    query_std_MHE: Tensor | None = None

    @staticmethod
    def of(batches: Iterable[KV]) -> Moments:
        """Over all real tokens, in float64, deviations divided by n."""
        count, centres, sums = 0, list[Tensor](), list[list[Tensor]]()
        for kv in batches:
            real_BS = kv.mask_BT
            sides = [[torch.stack(pair) for pair in zip(kv.keys, kv.values, strict=True)], list(kv.queries)]
            rows = [  # [tokens, M, 2, G, E] and, with queries, [tokens, M, H, E]
                torch.stack([x.transpose(-3, -2)[..., real_BS, :, :].movedim(-3, 0) for x in side], dim=1).double()
                for side in sides
                if side
            ]
            centres = centres or [x.mean(0) for x in rows]  # so that no large squares cancel
            off = [x - centre for x, centre in zip(rows, centres, strict=True)]
            new = [[x.sum(0), x.square().sum(0)] for x in off]
            sums = (
                new
                if not sums
                else [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, new, strict=True)]
            )
            count += int(real_BS.sum())
        assert count, "moments of nothing"
        found: list[Tensor] = []
        for centre, (total, squares) in zip(centres, sums, strict=True):
            shift = total / count
            found += [(centre + shift).float(), (squares / count - shift.square()).clamp_min(0).sqrt().float()]
        return Moments(*found)

    def tensors(self) -> dict[str, Tensor]:
        """For the file of a fit; `from_tensors` reads them."""
        return {_PREFIX + name: x.cpu() for name, x in vars(self).items() if x is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        return cls(**{k.removeprefix(_PREFIX): x for k, x in tensors.items() if k.startswith(_PREFIX)})

    def to(self, device: torch.device | str) -> Moments:
        return Moments(*(None if x is None else x.to(device) for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Change:
    """What a control does with what one teacher gives for a batch.

    order_BS: the place whose token's states and scores are put at each place. rows_BT: the place whose prediction is.
    seeds: of the noise in each example. moments: of that in keys, values and queries. vocab_size: from which tokens
    that in predictions is drawn.
    """

    order_BS: Int[Tensor, "B S"] | None = None
    rows_BT: Int[Tensor, "B _"] | None = None
    seeds: tuple[int, ...] = ()
    moments: Moments | None = None
    vocab_size: int = 1

    def to(self, device: torch.device | str) -> Change:
        parts = {name: getattr(self, name) for name in ("order_BS", "rows_BT", "moments")}
        return replace(self, **{name: x.to(device) for name, x in parts.items() if x is not None})

    def apply(self, targets: TeacherTargets) -> TeacherTargets:
        """The targets changed; NLL and segments are as they were."""
        kv, changed = targets.kv, dict[str, Any]()
        if self.order_BS is not None:
            row_B1, order_BS = _rows(self.order_BS), self.order_BS.to(targets.segments_BS.device)
            row_B1 = row_B1.to(order_BS.device)
            if kv is not None:
                changed["kv"] = kv.map_layers(lambda x: x.transpose(1, 2)[row_B1, order_BS].transpose(1, 2))
            if targets.scores_BSMRG is not None:
                changed["scores_BSMRG"] = targets.scores_BSMRG[row_B1, order_BS]
        index_BSK, logprob_BSK = targets.topk_index_BSK, targets.topk_logprob_BSK
        if self.rows_BT is not None and index_BSK is not None and logprob_BSK is not None:
            row_B1, rows_BT = _rows(self.rows_BT).to(index_BSK.device), self.rows_BT.to(index_BSK.device)
            changed["topk_index_BSK"], changed["topk_logprob_BSK"] = (
                x[row_B1, rows_BT] for x in (index_BSK, logprob_BSK)
            )
        if self.seeds and kv is not None:
            assert self.moments is not None
            changed["kv"] = noisy(kv, self.moments, self.seeds)
        if self.seeds and index_BSK is not None:
            changed["topk_index_BSK"] = random_tokens(index_BSK, self.vocab_size, self.seeds)
        return replace(targets, **changed)


def _rows(x_BT: Tensor) -> Tensor:
    return torch.arange(len(x_BT))[:, None]


def noisy(kv: KV, moments: Moments, seeds: Sequence[int]) -> KV:
    """Keys and values (and queries, where there are any) drawn anew: each example's from its seed, whatever stands
    beside it; 0 at padding, as it was in the frame that it was.

    Drawn where the moments are, wherever `kv` is: stored targets wait in memory, and a step would wait for that much
    noise to be made there and brought to the device. One seed is other noise on another kind of device."""
    queried, device = bool(kv.queries), moments.mean_M2GE.device
    kept = torch.zeros(len(seeds), kv.mask_BT.shape[1], *moments.mean_M2GE.shape, device=device)
    asked: Tensor | None = None
    if moments.query_mean_MHE is not None:
        asked = torch.zeros(*kept.shape[:2], *moments.query_mean_MHE.shape, device=device)
    for b, (seed, mask) in enumerate(zip(seeds, kv.mask_BT, strict=True)):
        places, generator = mask.nonzero().squeeze(1).to(device), torch.Generator(device).manual_seed(seed)
        drawn = torch.randn(len(places), *moments.mean_M2GE.shape, generator=generator, device=device)
        kept[b, places] = drawn * moments.std_M2GE + moments.mean_M2GE
        if asked is not None:
            assert moments.query_std_MHE is not None and moments.query_mean_MHE is not None
            drawn = torch.randn(len(places), *moments.query_mean_MHE.shape, generator=generator, device=device)
            asked[b, places] = drawn * moments.query_std_MHE + moments.query_mean_MHE
    dtype, layers = kv.keys[0].dtype, range(kv.num_layers)
    keys, values = (tuple(kept[:, :, m, side].transpose(1, 2).to(dtype) for m in layers) for side in (0, 1))
    queries: tuple[Tensor, ...] = ()
    if queried:
        assert asked is not None
        queries = tuple(asked[:, :, m].transpose(1, 2).to(dtype) for m in layers)
    return replace(kv, keys=keys, values=values, queries=queries)


def random_tokens(index_BSK: Int[Tensor, "B S K"], vocab_size: int, seeds: Sequence[int]) -> Int[Tensor, "B S K"]:
    """K different tokens at each place, every choice and order as likely as any other; each example's from its seed."""
    _, S, K = index_BSK.shape
    size = max(vocab_size, K)
    drawn: list[Tensor] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(derive_seed(seed, "tokens"))
        chosen_SK = torch.full((S, K), -1)
        for k in range(K):  # Floyd's way to choose without replacement: no [S, V] is made
            top = size - K + k
            pick_S = torch.randint(top + 1, (S,), generator=generator)
            taken_S = (chosen_SK[:, :k] == pick_S[:, None]).any(1)
            chosen_SK[:, k] = torch.where(taken_S, top, pick_S)
        shuffle_SK = torch.rand(S, K, generator=generator).argsort(1)
        drawn.append(chosen_SK.gather(1, shuffle_SK))
    return torch.stack(drawn).to(index_BSK)
