"""What a study with latent arms measures of each student beside its records: `latent.json`.

Of every student what an answer takes: forward passes, places in the KV cache and their bytes, seconds. Of one that
thinks in latents also

* causal checks: the same questions answered again with the latents' keys and values as they are, zeroed, replaced by
  their mean over the batch, and exchanged with another question's. Nothing else is touched. Answers that stay right
  without what the latents say were not reasoned in them;
* a read-out: which tokens the LM head finds nearest to each slot after each pass.

Changes nothing that the student was trained to or is scored by.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvdistill.arms.latent_student import LatentStudent
from kvdistill.arms.student import Student
from kvdistill.arms.texts import spread
from kvdistill.core.errors import ModelError
from kvdistill.core.records import Record
from kvdistill.core.runtime import derive_seed
from kvdistill.data.encode import Example
from kvdistill.data.grading import is_correct

SCHEMA = 1
AS_IT_IS, CHANGES = "none", ("zero", "mean", "shuffle")
TIMED = 5  # questions answered alone, by the clock
READ, NEAREST = 1, 3  # questions of each task that are read out; tokens per slot and pass
MOST_PASSES, MOST_SLOTS = 8, 16  # that a person can read


def measure_answers(
    student: Student,
    tokenizer: Any,
    asked: Sequence[Example],
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    batch_size: int,
    most: int,
    seed: int,
) -> dict[str, Any]:
    """What `latent.json` holds. asked: the run's test questions, `records` the answers to them. most: questions of
    the causal checks. seed: of who changes latents with whom."""
    chosen = [asked[i] for i in spread(asked, most)]
    own = [one for one in records if one.tokens_in is not None and one.forward_passes is not None]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "cost": answer_cost(student, own)
        | {"seconds_alone": seconds_alone(student, tokenizer, chosen, max_new_tokens), "timed": min(TIMED, len(chosen))}
        | {"seconds": _mean([one.seconds for one in own if one.seconds is not None]), "batch_size": batch_size},
    }
    if isinstance(student, LatentStudent):
        config = student.thinker.config
        ask = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        found |= {
            "latents": config.num_latents,
            "passes": config.num_passes,
            "causal": causal_checks(student, tokenizer, chosen, seed=seed, **ask),
            "readout": read_out(student, tokenizer, asked, records),
        }
    return found


def answer_cost(student: Any, records: Sequence[Record]) -> dict[str, Any]:
    """Mean forward passes of an answer, and the places and bytes of its KV cache at the end: prompt, `<bot>`,
    slots, `<eot>`, and all new tokens but the last, which nothing reads any more. Closed forms of the model's shape."""
    shape, size = student.shape, next(student.parameters()).element_size()
    places = []
    for one in records:
        assert one.tokens_in is not None and one.forward_passes is not None
        written, beside = one.forward_passes, 0
        if isinstance(student, LatentStudent):
            written -= student.thinker.num_passes_before_answer
            beside = 2 + student.thinker.config.num_latents
        places.append(one.tokens_in + beside + written - 1)
    cached = _mean(places)
    per_place = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * size
    return {
        "questions": len(places),
        "forward_passes": _mean([one.forward_passes for one in records]),
        "cache_places": cached,
        "cache_bytes": None if cached is None else cached * per_place,
    }


def seconds_alone(student: Student, tokenizer: Any, asked: Sequence[Example], max_new_tokens: int) -> float | None:
    """Median over a few questions of the wall time of one answer with nothing beside it, after one to warm up."""
    took = []
    for example in [*asked[:1], *asked[:TIMED]]:
        begun = time.perf_counter()
        answer_alone(student, example.prompt_ids, tokenizer.eos_token_id, max_new_tokens)
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:]) if took else None


@torch.no_grad()
def answer_alone(student: Any, prompt: Sequence[int], end_id: int, max_new_tokens: int) -> list[int]:
    """The new tokens of a greedy answer, an end token among them, by one plain loop for students of every kind:
    transformers' generate takes longer for a token than the model itself does, where that is small."""
    was_training = student.training
    student.eval()
    model = student.model
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids_1P = torch.tensor([list(prompt)], device=next(student.parameters()).device)
    cache: Any = DynamicCache()
    if isinstance(student, LatentStudent):
        thoughts = model.think(ids_1P, torch.ones_like(ids_1P))
        hidden, cache = model.answer_hidden(thoughts, ids_1P[:, :0], ids_1P[:, :0]), thoughts.cache
    else:
        hidden = decoder(input_ids=ids_1P, past_key_values=cache, use_cache=True).last_hidden_state
    answer = [int(head(hidden[:, -1]).argmax(-1))]
    while len(answer) < max_new_tokens and answer[-1] != end_id:
        last_11 = ids_1P.new_tensor([[answer[-1]]])
        hidden = decoder(input_ids=last_11, past_key_values=cache, use_cache=True).last_hidden_state
        answer.append(int(head(hidden[:, -1]).argmax(-1)))
    student.train(was_training)
    return answer


def causal_checks(
    student: LatentStudent,
    tokenizer: Any,
    asked: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """{"questions": [[task, id, style]], "correct": change -> right or wrong, question by question}.

    Within a task, questions of like length together, at least two in a batch: a task of one question is left out.
    """
    by_task: dict[str, list[Example]] = {}
    for example in asked:
        by_task.setdefault(example.task, []).append(example)
    batches = [(task, batch) for task, rows in by_task.items() if len(rows) > 1 for batch in even(rows, batch_size)]
    correct: dict[str, list[bool]] = {kind: [] for kind in (AS_IT_IS, *CHANGES)}
    for number, (task, batch) in enumerate(batches):
        changes = {AS_IT_IS: None, **changes_of(derive_seed(seed, "shuffled latents", task, number))}
        for kind, change in changes.items():
            answers = student.generate(
                [example.prompt_ids for example in batch],
                tokenizer,
                max_new_tokens=max_new_tokens,
                batch_size=len(batch),
                change=change,
            )
            pairs = zip(batch, answers, strict=True)
            correct[kind] += [is_correct(task, answer.text, one.answer, one.rule) for one, answer in pairs]
    questions = [[one.task, one.id, one.style] for _, batch in batches for one in batch]
    return {"questions": questions, "correct": correct}


def even(rows: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """At least two rows in batches of about equal size and like lengths, at least two in each."""
    ordered = sorted(rows, key=lambda one: one.num_prompt_tokens)
    count = max(1, min(-(-len(ordered) // max(2, batch_size)), len(ordered) // 2))
    edges = [len(ordered) * n // count for n in range(count + 1)]
    return [ordered[begin:end] for begin, end in itertools.pairwise(edges)]


def changes_of(seed: int) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """What becomes of the slots' keys or values [B, …] in each check, alike for all layers.

    Raises ModelError for a batch of one (which a device without memory for two makes): nothing to mix it with.
    """

    def several(x_B: Tensor) -> Tensor:
        if len(x_B) < 2:
            raise ModelError(
                "the device has not enough memory for two questions at once, which the checks of latents need",
                place="hardware.device",
                fix="use another device, or student.dtype: bfloat16",
            )
        return x_B

    def mean(x_B: Tensor) -> Tensor:
        x_B = several(x_B)
        return x_B.mean(0, keepdim=True).expand_as(x_B)

    def shuffle(x_B: Tensor) -> Tensor:
        """Each question gets the latents of another one: all in one ring, so nobody keeps their own."""
        ring = torch.randperm(len(several(x_B)), generator=torch.Generator().manual_seed(seed))
        giver = torch.empty_like(ring)
        giver[ring] = ring.roll(1)
        return x_B[giver.to(x_B.device)]

    return {"zero": torch.zeros_like, "mean": mean, "shuffle": shuffle}


def read_out(
    student: LatentStudent, tokenizer: Any, asked: Sequence[Example], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """Of the first question of each task, by its id: what was answered, and `tokens` [pass][slot] of (text, share)."""
    T, M = student.thinker.config.num_passes, student.thinker.config.num_latents
    parts = min(T, MOST_PASSES)
    passes = [round(n * T / max(1, parts)) for n in range(parts + 1)]
    answers = {one.question: one for one in records}
    shown: dict[str, list[Example]] = {}
    for example in sorted(asked, key=lambda one: (one.id, one.style)):
        shown.setdefault(example.task, []).append(example)
    found = []
    for example in [one for rows in shown.values() for one in rows[:READ]]:
        near = student.read_out(example.prompt_ids, passes, NEAREST)
        answer = answers.get((example.task, example.id, example.style))
        found.append(
            {
                "question": [example.task, example.id, example.style],
                "completion": answer and answer.completion,
                "correct": answer and answer.correct,
                "passes": passes,
                "slots": min(M, MOST_SLOTS),
                "tokens": [
                    [[[tokenizer.decode([token]), share] for token, share in slot] for slot in slots[:MOST_SLOTS]]
                    for slots in near
                ],
            }
        )
    return found


def _mean(values: Sequence[Any]) -> float | None:
    return statistics.fmean(values) if values else None
