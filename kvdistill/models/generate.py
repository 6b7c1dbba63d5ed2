"""Greedy answers and gold likelihoods from a causal model: the one generator of training, studies and evaluations.

Knows no task: prompts are token ids. Sorting by length keeps padding small and does not change any answer beyond
floating-point rounding. Greedy means greedy: a publisher's repetition penalty or sampler is not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from kvdistill.core.errors import ModelError
from kvdistill.core.runtime import elements_at_once
from kvdistill.models.describe import describe_model
from kvdistill.models.forward import head_at

T = TypeVar("T")
ROOM = 256  # tokens that a cache gets room for at a time


class Answer(NamedTuple):
    """text: up to the first stop text, without special tokens. ids: the new tokens, without the end token.

    forward_passes: of this row alone, however many rows ran beside it; the one that gave the end token counts.
    """

    text: str
    ids: list[int]
    forward_passes: int


class Rows:
    """How many rows run side by side: as many as asked for, and half as many once the device had no memory for them."""

    def __init__(self, most: int) -> None:
        self.most = most

    def batches(
        self, items: Sequence[T], elements: Callable[[Sequence[T]], int] = len, limit: int | None = None
    ) -> Iterator[Sequence[T]]:
        """elements: numbers that a batch makes live together; limit: how many may be (one row may always run)."""
        start = 0
        while start < len(items):
            batch = items[start : start + self.most]
            while limit is not None and len(batch) > 1 and elements(batch) > limit:
                batch = batch[: len(batch) // 2]
            start += len(batch)
            yield batch

    def run(self, work: Callable[[Sequence[T]], Sequence[Any]], batch: Sequence[T]) -> list[Any]:
        """`work(batch)`, one result a row; in halves where the device has no memory for the whole.

        Raises ModelError where one row alone is too much.
        """
        try:
            return list(work(batch))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise ModelError(
                    "the device has not enough memory for one question",
                    place="hardware.device",
                    fix="use another device, dtype=bfloat16, or fewer examples in the prompt (--num-fewshot)",
                ) from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(batch) // 2
        self.most = min(self.most, half)
        return [*self.run(work, batch[:half]), *self.run(work, batch[half:])]


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and mask [B, T] with padding on the left."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids_BT = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left")
    mask_BT = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    return ids_BT.to(device), mask_BT.to(device)


def right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token ids [B, T] with padding on the right."""
    T = max(len(row) for row in rows)
    return torch.tensor([[*row, *([pad_id] * (T - len(row)))] for row in rows])


@contextmanager
def _answering(model: Any, config: GenerationConfig) -> Iterator[None]:
    """In eval mode, with `config` and nothing else: transformers merges in what the publisher suggests."""
    inner = getattr(getattr(model, "base_model", None), "model", None)  # peft hands its own on to the model inside
    touched: list[Any] = [one for one in (model, inner) if hasattr(one, "generation_config")]
    suggested, was_training = [one.generation_config for one in touched], model.training
    model.eval()
    for one in touched:
        one.generation_config = config
    try:
        yield
    finally:
        for one, its_own in zip(touched, suggested, strict=True):
            one.generation_config = its_own
        model.train(was_training)


@torch.no_grad()
def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    rows: Rows,
    end_ids: Sequence[int] | None = None,
    stops: Sequence[str] = (),
    progress: Callable[[float], None] | None = None,
    draw: Callable[[Sequence[int]], LogitsProcessor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """The greedy continuation of each prompt, in the order given: up to an end token, a stop text or the limit.

    Args:
        model: a causal model, plain or wrapped (peft).
        prompts: token ids. tokenizer: for padding and for text.
        rows: how many run side by side.
        end_ids: tokens that end an answer; None: the tokenizer's end-of-text.
        stops: texts that end an answer and do not belong to it.
        progress: called with the number of answers so far; one that is being written counts by its length.
        draw: of the prompts with these numbers, what changes logits before the largest is taken (`Sampled`).
        options: what a model's own `generate` is told beside.
    """
    ends = [tokenizer.eos_token_id] if end_ids is None else [*end_ids]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: dict[int, Answer] = {}
    before = getattr(model, "num_passes_before_answer", 0)  # of a model that thinks in latents

    def go_on(chosen: Sequence[int]) -> list[Answer]:
        ids_BT, mask_BT = left_padded([prompts[i] for i in chosen], tokenizer.pad_token_id, model.device)
        row_ends = _RowEnds(tokenizer, stops, ends, ids_BT)
        if progress is not None:
            row_ends.on_step = lambda num_ended, length: progress(
                len(answers) + num_ended + (len(chosen) - num_ended) * length / max_new_tokens
            )
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=config,
            past_key_values=roomy_cache(model),
            stopping_criteria=StoppingCriteriaList([row_ends]),
            logits_processor=None if draw is None else LogitsProcessorList([draw(chosen)]),
            **(options or {}),
        )
        found = []
        new_BT = out_BT[:, ids_BT.shape[1] :]
        for row, length in zip(new_BT.tolist(), row_ends.lengths_B.tolist(), strict=True):
            row = row[: length or len(row)]
            ids = row[:-1] if row and row[-1] in ends else row
            text = tokenizer.decode(ids, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            found.append(Answer(text, ids, before + len(row)))
        return found

    with _answering(model, config):
        for batch in rows.batches(sorted(range(len(prompts)), key=lambda i: len(prompts[i]))):
            answers |= dict(zip(batch, rows.run(go_on, batch), strict=True))
            if progress is not None:
                progress(len(answers))
    return [answers[i] for i in range(len(prompts))]


class Sampled(LogitsProcessor):
    """Makes greedy generation draw from softmax(logits / temperature): the largest of logits with Gumbel noise on them
    is a sample (Gumbel's trick). Each row's noise is from its own seed: whatever runs beside it, and on which device.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [torch.empty(scores.shape[-1]).exponential_(generator=one).log() for one in self._generators]
        return scores.float() / self._temperature - torch.stack(noise).to(scores.device)


class _RowEnds(StoppingCriteria):
    """Which rows have ended, each at its own end token or stop text; ended rows are only padded from then on.

    lengths_B: new tokens of each row up to its end, the end token included; 0 where it has not ended. on_step: called
    with the number of ended rows and the new tokens of the others.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], end_ids: Sequence[int], prompts_BT: Tensor) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, prompts_BT.shape[1]
        self._end_ids = torch.tensor(end_ids, dtype=torch.long, device=prompts_BT.device)
        self.lengths_B = torch.zeros_like(prompts_BT[:, 0])
        # a token is at least a byte; two more for a stop that begins inside one
        self._look_back = max((len(stop.encode()) for stop in stops), default=0) + 2
        self.on_step: Callable[[int, int], None] | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length, open_B = input_ids.shape[1] - self._start, self.lengths_B == 0
        ended_B = torch.isin(input_ids[:, -1], self._end_ids)
        if self._stops:
            recent = input_ids[:, max(self._start, input_ids.shape[1] - self._look_back) :].tolist()
            open_rows = open_B.nonzero()[:, 0].tolist()
            texts = self._tokenizer.batch_decode([recent[b] for b in open_rows])
            for b, text in zip(open_rows, texts, strict=True):
                ended_B[b] |= any(stop in text for stop in self._stops)
        self.lengths_B = torch.where(open_B & ended_B, length, self.lengths_B)
        if self.on_step is not None:
            self.on_step(int((self.lengths_B > 0).sum()), length)
        return self.lengths_B > 0


@torch.no_grad()
def segment_nll(
    model: Any,
    rows: Sequence[Sequence[int]],
    counted: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int,
    num_parts: int = 1,
) -> list[list[float]]:
    """Mean NLL (nats per token) of each part of each row, teacher-forced; NaN for a part without tokens.

    model: a causal model, plain or wrapped (peft); its head runs on counted tokens alone. counted: for every token the
    number of the part it belongs to, from 1; 0: to none.
    """
    shape = describe_model(model)

    def elements(chosen: Sequence[int]) -> int:
        num_predicted = sum(sum(map(bool, counted[i])) for i in chosen)
        # logits, in float32, and their exponentials; what an MLP holds
        return 3 * shape.vocab_size * num_predicted + 4 * shape.intermediate_size * len(chosen) * len(rows[chosen[-1]])

    def score(chosen: Sequence[int]) -> list[list[float]]:
        ids_BT = right_padded([rows[i] for i in chosen], pad_id).to(model.device)
        mask_BT = right_padded([[1] * len(rows[i]) for i in chosen], 0).to(model.device)
        part_BT = right_padded([[int(c) for c in counted[i]] for i in chosen], 0).to(model.device)
        part_BT = torch.nn.functional.pad(part_BT[:, 1:], (0, 1))  # at the position that predicts the token
        if not bool(part_BT.any()):
            return [[float("nan")] * num_parts for _ in chosen]
        with head_at(model, part_BT > 0):
            logits_1NV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        b, t = part_BT.nonzero(as_tuple=True)
        nll_N = torch.nn.functional.cross_entropy(logits_1NV[0].float(), ids_BT[b, t + 1], reduction="none").cpu()
        place_N = (b * num_parts + part_BT[b, t] - 1).cpu()
        sums = torch.zeros(len(chosen) * num_parts).index_add_(0, place_N, nll_N)  # a GPU adds in no fixed order
        return (sums / torch.bincount(place_N, minlength=len(sums))).view(-1, num_parts).tolist()

    result = [[float("nan")] * num_parts for _ in rows]
    fitting, was_training = Rows(batch_size), model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for batch in fitting.batches(order, elements, elements_at_once(model.device)):
        for i, value in zip(batch, fitting.run(score, batch), strict=True):
            result[i] = value
    model.train(was_training)
    return result


# -- a cache with room for tokens to come ---------------------------------------------------------


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, H, T, D]: views of the first T places of longer tensors. Never reordered.

    transformers' own layer is copied whole for every token, which on a CPU takes three quarters of the time of a long
    answer. This one grows by ROOM tokens at a time. The numbers are the same to the bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._length = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._length, self._room = 0, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far, the new ones at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._room is None or self._length > self._room[0].shape[-2]:
            self._room = (self._longer(self.keys, key_states), self._longer(self.values, value_states))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start : self._length] = new
        self.keys, self.values = (room[:, :, : self._length] for room in self._room)
        return self.keys, self.values

    def _longer(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Room for what there is, what comes now, and ROOM more."""
        longer = new.new_empty(*new.shape[:2], self._length + ROOM, new.shape[-1])
        if old is not None and old.numel():
            longer[:, :, : old.shape[-2]] = old
        return longer


def roomy_cache(model: Any) -> DynamicCache | None:
    """An empty cache for `model.generate(past_key_values=…)`, or None for a model with another kind of cache.

    Layers that keep a sliding window or a state stay transformers' own.
    """
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is None or not supports():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache if cache.layers else None
