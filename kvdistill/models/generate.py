"""Greedy answers and gold likelihoods from a causal model, batched and left-padded where it matters.

Knows no task: prompts are token ids, answers come back as token ids. Sorting by length keeps padding small
and does not change any answer beyond floating-point rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and mask [B, T] with padding on the left."""
    T = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), T), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), T), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BT[b, T - len(row) :] = torch.tensor(row)
        mask_BT[b, T - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Token ids [B, T] with padding on the right."""
    T = max(len(row) for row in rows)
    return torch.tensor([[*row, *([pad_id] * (T - len(row)))] for row in rows])


@contextmanager
def _only(config: GenerationConfig, model: Any) -> Iterator[None]:
    """`config` and nothing else: transformers merges in what the publisher suggests, such as a repetition penalty."""
    inner = getattr(getattr(model, "base_model", None), "model", None)  # peft hands its own on to the model inside
    touched: list[Any] = [one for one in (model, inner) if hasattr(one, "generation_config")]
    suggested = [one.generation_config for one in touched]
    for one in touched:
        one.generation_config = config
    try:
        yield
    finally:
        for one, its_own in zip(touched, suggested, strict=True):
            one.generation_config = its_own


@torch.no_grad()
def generate_greedy(
    model: Any,  # a causal model, plain or wrapped (peft)
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to and without the end token, in the order given."""
    was_training = model.training
    model.eval()
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=eos_id, pad_token_id=pad_id
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids_BT, mask_BT = left_padded([prompts[i] for i in chosen], pad_id, model.device)
        with _only(config, model):
            out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
        for i, row in zip(chosen, out_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            answers[i] = row[: row.index(eos_id)] if eos_id in row else row
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    model.train(was_training)
    return answers


@torch.no_grad()
def segment_nll(
    model: Any,  # a causal model, plain or wrapped (peft)
    rows: Sequence[Sequence[int]],
    counted: Sequence[Sequence[bool]],
    *,
    pad_id: int,
    batch_size: int,
) -> list[float]:
    """Mean NLL (nats per token) of the counted tokens of each row, teacher-forced; NaN where none is counted."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    result = [float("nan")] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids_BT = right_padded([rows[i] for i in chosen], pad_id).to(model.device)
        mask_BT = right_padded([[1] * len(rows[i]) for i in chosen], 0).to(model.device)
        wanted_BT = right_padded([[int(c) for c in counted[i]] for i in chosen], 0).to(model.device)[:, 1:] > 0
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
        b, t = wanted_BT.nonzero(as_tuple=True)
        nll = torch.nn.functional.cross_entropy(logits_BTV[b, t].float(), ids_BT[:, 1:][b, t], reduction="none")
        sums = torch.zeros(len(chosen), device=nll.device).index_add_(0, b, nll)
        means = (sums / wanted_BT.sum(1)).tolist()
        for i, value in zip(chosen, means, strict=True):
            result[i] = value
    model.train(was_training)
    return result
