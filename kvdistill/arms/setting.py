"""A recipe in its run folder: what the arms, teachers and seeds of a study share (of one seed, where these differ)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvdistill.arms.pairing import shape_of
from kvdistill.arms.student import CausalStudent
from kvdistill.arms.texts import load_tokenizer_of, spread
from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import read_budgets
from kvdistill.core.config import replicate_recipe
from kvdistill.core.layout import replicate_folder
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import derive_seed, pick_device
from kvdistill.core.tuning import Trial, read_tuned, trials_of
from kvdistill.data.encode import Example
from kvdistill.data.tables import read_split
from kvdistill.data.tokenizers import as_read
from kvdistill.models import ModelShape, load_model, model_config


class Setting:
    """Loads and reads when it is asked.

    Args:
        recipe: the study's.
        run: its folder: arms, stores and fits. Data and teachers are in `data_run` and `teachers_run`.
        seed: whose data and teachers, where these vary (`replicate`); unset: what all seeds share.
    """

    def __init__(self, recipe: Recipe, run: Path, seed: int | None = None) -> None:
        self.study, self.run, self.seed = recipe, run, seed
        self.recipe = replicate_recipe(recipe, seed)
        own = run if seed is None else replicate_folder(run, seed)
        self.data_run = own if recipe.varies_data else run
        self.teachers_run = own if recipe.varies_teachers else run
        self.own_run = own if recipe.varies_data or recipe.varies_teachers else run
        self._splits: dict[str, Sequence[Example]] = {}

    @cached_property
    def device(self) -> torch.device:
        return pick_device(self.recipe.hardware.device)

    @cached_property
    def arms(self) -> dict[str, ArmRecipe]:
        """The complete recipe of every arm; steps of those that are matched are `Experiment.arm`'s to fill in."""
        return {name: arm_recipe(self.recipe, name) for name in self.recipe.every_arm}

    def matched_steps(self, name: str) -> int | None:
        """Steps that were computed for an arm that is matched to another; None: not yet (`arms/budget.py` does)."""
        planned = read_budgets(self.run).get(name.rpartition("@tune")[0] if name in self.trials else name)
        return None if planned is None else int(planned["steps"])

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """The trials of arms that are tuned, by their names."""
        return trials_of(self.recipe)

    def chosen_values(self, name: str) -> dict[str, float] | None:
        """What was chosen for an arm that is tuned; nothing for others. None: not yet (`stages/tune.py` does)."""
        base = self.study.tuned_as(name)
        if base is None:
            return {}
        found = read_tuned(self.run).get(base)
        return None if found is None else dict(found["values"])

    # -- the student --------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The student's, as `prepare` left it. Raises RunFolderError where data is not prepared."""
        return load_tokenizer_of(self.data_run)

    def as_read(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        """A tokenizer as it is saved beside a model: called by itself it begins a text as this recipe's texts begin."""
        return as_read(tokenizer, template=self.recipe.data.template)

    @cached_property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def student_shape(self) -> ModelShape:
        return shape_of(self.recipe.student, self.vocab_size, "student")

    @cached_property
    def student_outline(self) -> CausalStudent:
        """The student without memory for weights: what it would cost."""
        recipe = self.recipe.student
        return CausalStudent.outline(recipe, model_config(recipe, self.vocab_size, "student"))

    def initial_model(self, seed: int) -> PreTrainedModel:
        """The student as training starts it, before adapters, on the CPU: the same bits for every arm of a seed."""
        seed = derive_seed(seed, "student")
        return load_model(self.recipe.student, vocab_size=self.vocab_size, seed=seed, place="student")

    # -- the texts ----------------------------------------------------------------------------------------

    def split(self, name: str) -> Sequence[Example]:
        """A whole split as the student reads it; checked against its checksum when it is first asked for."""
        if name not in self._splits:
            self._splits[name] = read_split(self.data_run, name)
        return self._splits[name]

    @cached_property
    def train_lengths(self) -> list[int]:
        """Tokens of each training example, as the student reads it."""
        return [len(example.input_ids) for example in self.split("train")]

    def numbers(self, split: str) -> Sequence[int]:
        """Rows of a split whose targets are captured: all of train, those of val that curves and match figures use."""
        if split == "train":
            return range(len(self.split(split)))
        arms = [*self.arms.values(), *(trial.recipe for trial in self.trials.values())]
        most = max(arm.train.eval_examples for arm in arms)
        return spread(self.split(split), max(most, self.recipe.evaluate.match_examples))

    def examples(self, split: str) -> Sequence[Example]:
        """The examples whose targets are captured, as the student reads them."""
        examples = self.split(split)
        return examples if split == "train" else [examples[i] for i in self.numbers(split)]
