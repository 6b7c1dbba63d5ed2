"""Learning curves: KV loss, likelihood and accuracy on validation (and training) problems, every so many steps.

Rows go into the run's log.jsonl beside the training rows. Accuracy is greedy generation on the same problems at
every point; it is measured on validation problems only, so that nothing is ever chosen on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvdistill.arms.batches import BatchMaker, arm_batches, moved_to, token_counts
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.targets import open_targets
from kvdistill.arms.texts import spread
from kvdistill.core.files import append_json_line
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.data.answers import is_correct
from kvdistill.data.encode import Example
from kvdistill.data.tables import read_split
from kvdistill.models.generate import Rows, generate_greedy

BATCH = 64


class LearningCurve:
    """Points of one run's learning curve. `point(step, distiller)` measures and logs at the recipe's steps."""

    def __init__(self, recipe: Recipe, run: Path, arm: ArmRecipe, tokenizer: Any, log_file: Path, seed: int) -> None:
        self._train = recipe.train
        self._tokenizer, self._log_file, self._arm = tokenizer, log_file, arm
        self._max_new_tokens = recipe.evaluate.max_new_tokens
        uses_targets = arm.needs_kv or arm.needs_logits
        readers = {n: open_targets(recipe, run, n, "val") for n in arm.teachers} if uses_targets else {}
        pad_id = tokenizer.pad_token_id
        self._val = arm_batches(recipe, run, arm, "val", pad_id, readers, seed)
        self._chosen = spread(self._val.examples, recipe.train.eval_examples)
        # the training side has stored targets only where the store is used; its likelihood is enough for the gap
        self._seen = BatchMaker(read_split(run, "train"), pad_id)
        self._seen_chosen = spread(self._seen.examples, recipe.train.eval_examples)

    def point(self, step: int, distiller: Distiller) -> None:
        every = self._train.eval_every
        if step != self._train.steps and (every == 0 or step % every):
            return
        was_training = distiller.training
        distiller.eval()
        val: dict[str, Any] = self._losses(distiller, self._val, self._chosen)
        examples = [self._val.examples[i] for i in self._chosen]
        by_task = accuracy_by_task(distiller.student, self._tokenizer, examples, self._max_new_tokens)
        val |= {"accuracy_by_task": by_task, "accuracy": sum(by_task.values()) / max(1, len(by_task))}
        train = self._losses(distiller, self._seen, self._seen_chosen, plain=True)
        append_json_line(self._log_file, {"step": step, "val": val, "train": train})
        distiller.train(was_training)

    @torch.no_grad()
    def _losses(
        self, distiller: Distiller, batches: BatchMaker, chosen: Sequence[int], *, plain: bool = False
    ) -> dict[str, float | None]:
        """Mean cross-entropy, and the mean of the raw KV terms (over teachers, K and V), per token."""
        device = next(distiller.parameters()).device
        sums: dict[str, float] = {}
        tokens = 0.0
        for start in range(0, len(chosen), BATCH):
            batch = batches(chosen[start : start + BATCH])
            counts = (
                token_counts(batch, self._arm if not plain else self._arm.model_copy(update={"teachers": []}))
                .float()
                .clamp_min(1)
                .to(device)
            )
            moved = moved_to(batch, device)
            if plain:
                terms = {"ce": distiller.cross_entropy_only(moved["input_ids"], moved["segments"], counts)}
            else:
                terms = {
                    name: raw for name, (raw, _, _) in distiller(**moved, counts=counts, kv_weight=1.0).terms.items()
                }
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) * float(counts[0])
            tokens += float(counts[0])
        means = {name: value / max(tokens, 1.0) for name, value in sums.items()}
        kv = [value for name, value in means.items() if name.startswith("kv/")]
        return {"ce": means["ce"], "nll": means["ce"], "kv_loss": sum(kv) / len(kv) if kv else None}


def accuracy_by_task(model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int) -> dict[str, float]:
    """Share of greedy answers that are right, per task."""
    prompts = [example.prompt_ids for example in examples]
    answers = generate_greedy(model, prompts, tokenizer, max_new_tokens=max_new_tokens, rows=Rows(2 * BATCH))
    right: dict[str, list[bool]] = {}
    for example, one in zip(examples, answers, strict=True):
        right.setdefault(example.task, []).append(is_correct(example.task, one.text, example.answer))
    return {task: sum(values) / len(values) for task, values in sorted(right.items())}
