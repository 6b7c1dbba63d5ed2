"""Learning curves: KV loss, likelihood and accuracy on validation (and training) problems, every so many steps.

Rows go into the run's log.jsonl beside the training rows. Accuracy is greedy generation on the same problems at
every point; it is measured on validation problems only, so that nothing is ever chosen on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvdistill.arms.arm import MEASURED, Arm
from kvdistill.arms.batches import ITSELF, BatchMaker, token_counts
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.latent_student import LatentStudent, thinking_cost
from kvdistill.arms.questions import question_sizes
from kvdistill.arms.student import Student
from kvdistill.arms.texts import PickedRows, spread
from kvdistill.core.files import append_json_line
from kvdistill.data.encode import Example
from kvdistill.data.grading import is_correct
from kvdistill.models import batch_geometry
from kvdistill.models.generate import Answer


class LearningCurve:
    """Points of one run's learning curve. `point(step, distiller)` measures and logs at the recipe's steps."""

    def __init__(self, arm: Arm, log_file: Path) -> None:
        self._arm, self._log_file, train = arm, log_file, arm.recipe.train
        self._val = arm.batches("val")
        self._chosen = spread(self._val.examples, train.eval_examples)
        alone = {"teachers": [], "latent": arm.recipe.latent.model_copy(update={"self_weight": 0.0})}
        asks = arm.recipe.model_copy(update=alone) if arm.recipe.thinks else None  # its batches hold questions as well
        self._plain_val = BatchMaker(self._val.examples, arm.experiment.tokenizer.pad_token_id, asks)
        # the training side has stored targets only where the store is used; its likelihood is enough for the gap
        seen = PickedRows(arm.as_read(arm.experiment.split("train")), arm.own_numbers)
        self._seen = BatchMaker(seen, arm.experiment.tokenizer.pad_token_id)
        self._seen_chosen = spread(self._seen.examples, train.eval_examples)

    def point(self, step: int, distiller: Distiller) -> float | None:
        """Measure and append a row to the log, where this step is one of the recipe's.

        Returns the validation NLL of the completions, nats per token, where it decides something (`selection.py`).
        """
        recipe, train = self._arm.experiment.recipe, self._arm.recipe.train
        if not train.is_point(step):
            return None
        was_training = distiller.training
        distiller.eval()
        val: dict[str, Any] = self._losses(distiller, self._val, self._chosen)
        examples = [self._val.examples[i] for i in self._chosen]
        tokenizer = self._arm.experiment.tokenizer
        answers = answers_to(distiller.student, tokenizer, examples, recipe.evaluate.max_new_tokens)
        by_task = accuracy_by_task(examples, answers)
        val |= {"accuracy_by_task": by_task, "accuracy": sum(by_task.values()) / max(1, len(by_task))}
        seen = self._losses(distiller, self._seen, self._seen_chosen, plain=True)
        nll = self._completion_nll(distiller) if train.asks_validation else None
        if nll is not None:
            val["completion_nll"] = nll
        flops = self._flops(distiller.student, examples, answers)
        append_json_line(self._log_file, {"step": step, "val": val, "train": seen, "flops": flops})
        distiller.train(was_training)
        return nll

    @torch.no_grad()
    def _completion_nll(self, distiller: Distiller) -> float:
        """Mean over all tokens after the prompts of the point's validation problems, whatever an arm's loss is of: arms
        are chosen from by one rule. Logits in float32, sums in float64."""
        total, count = 0.0, 0
        for numbers in self._arm.measured_in(self._val.examples, self._chosen, head=True, kv=False):
            batch = self._plain_val(numbers).to(self._arm.device)
            nll, tokens = distiller.completion_nll(batch)
            total, count = total + nll, count + tokens
        return total / count

    def _flops(self, student: Student, examples: Sequence[Example], answers: Sequence[Answer]) -> int:
        """Of a point: both sides read once (validation once more where it decides), and the answers written."""
        again = examples if self._arm.recipe.train.asks_validation else ()
        seen = [self._seen.examples[i] for i in self._seen_chosen]
        if self._arm.recipe.thinks:  # validation is read as it is written and thought about, and each answer thought of
            assert isinstance(student, LatentStudent)
            asked = [*question_sizes([*examples, *again])]
            asked += [(e.num_prompt_tokens, len(a.ids)) for e, a in zip(examples, answers, strict=True)]
            written = student.flops(*batch_geometry(len(example.input_ids) for example in (*examples, *seen)))
            return written[0] + thinking_cost(student.writer, self._arm.recipe.latent, asked)[0]
        read = [*examples, *again, *seen]
        lengths = [len(example.input_ids) for example in read]
        lengths += [e.num_prompt_tokens + len(a.ids) for e, a in zip(examples, answers, strict=True)]
        return student.flops(*batch_geometry(lengths))[0]

    @torch.no_grad()
    def _losses(
        self, distiller: Distiller, batches: BatchMaker, chosen: Sequence[int], *, plain: bool = False
    ) -> dict[str, float | None]:
        """Mean cross-entropy, and the mean of the raw KV terms (over teachers, K and V), per token."""
        alone = {"teachers": [], "reasoning": "written"}
        arm = self._arm.recipe.model_copy(update=alone) if plain else self._arm.recipe
        sums: dict[str, float] = {}
        tokens: dict[str, float] = {}
        for numbers in self._arm.measured_in(batches.examples, chosen, head=True, kv=arm.needs_kv and not plain):
            batch = batches(numbers)
            counts = token_counts(batch, arm).float().clamp_min(1).to(self._arm.device)
            batch = batch.to(self._arm.device)
            if plain:
                terms = {"ce": distiller.cross_entropy_only(batch, counts)}
            else:
                found = distiller(batch, counts, kv_weight=1.0, self_weight=1.0)
                terms = {name: raw for name, (raw, _, _) in found.terms.items()}
            of_teacher = dict(zip(arm.teachers, counts[1:].tolist(), strict=False))
            if arm.thinks:
                of_teacher[ITSELF] = float(counts[-1])
            for name, value in terms.items():  # kv/TEACHER/k is a mean over the teacher's own tokens
                count = float(counts[0]) if name != "answer" else float(counts[-2])
                if name.startswith("kv/"):
                    count = of_teacher.get(name.split("/", 1)[1].rpartition("/")[0], max(of_teacher.values()))
                sums[name] = sums.get(name, 0.0) + float(value) * count
                tokens[name] = tokens.get(name, 0.0) + count
        means = {name: value / tokens[name] for name, value in sums.items()}
        kv = [value for name, value in means.items() if name.startswith("kv/")]
        nll = means.get("answer", means["ce"])  # with latents: of the answer behind them
        return {"ce": means["ce"], "nll": nll, "kv_loss": sum(kv) / len(kv) if kv else None}


def answers_to(student: Student, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int) -> list[Answer]:
    """The greedy answer to each example's prompt."""
    prompts = [example.prompt_ids for example in examples]
    return student.generate(prompts, tokenizer, max_new_tokens=max_new_tokens, batch_size=2 * MEASURED)


def accuracy_by_task(examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, float]:
    """Share of answers that are right, per task."""
    right: dict[str, list[bool]] = {}
    for example, one in zip(examples, answers, strict=True):
        right.setdefault(example.task, []).append(is_correct(example.task, one.text, example.answer, example.rule))
    return {task: sum(values) / len(values) for task, values in sorted(right.items())}
