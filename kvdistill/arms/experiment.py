"""An experiment: a recipe in its run folder (of one seed, where these differ), with its teachers and arms by name."""

from __future__ import annotations

from functools import cached_property

from kvdistill.arms.arm import Arm
from kvdistill.arms.setting import Setting
from kvdistill.arms.teacher import Teacher
from kvdistill.core.arms import arm_recipe
from kvdistill.core.recipe import UNTRAINED
from kvdistill.core.tuning import with_values


class Experiment(Setting):
    """What arms and teachers share, and the one place where they are looked up."""

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {teacher.name: Teacher(self, teacher.name) for teacher in self.recipe.teachers}

    def of(self, seed: int | None) -> Experiment:
        """The experiment with this seed's data and teachers: itself, where all seeds have the same."""
        if seed == self.seed or self.study.replicate == "student":
            return self
        if seed not in self._of_seeds:
            self._of_seeds[seed] = Experiment(self.study, self.run, seed)
        return self._of_seeds[seed]

    @cached_property
    def _of_seeds(self) -> dict[int | None, Experiment]:
        return {}

    @cached_property
    def untrained(self) -> dict[str, Teacher]:
        """The same with random weights, for arms with `control: untrained`."""
        return {teacher.name: Teacher(self, teacher.name, untrained=True) for teacher in self.recipe.teachers}

    def teacher(self, stored_as: str) -> Teacher:
        """By the name that its targets are stored under."""
        name = stored_as.removesuffix(UNTRAINED)
        return (self.teachers if name == stored_as else self.untrained)[name]

    def arm(self, name: str, seed: int) -> Arm:
        """One arm (or trial) with one seed, with the steps it is trained for and the values that were chosen for it as
        far as they are known. RecipeError with the nearest name."""
        mine = self.of(seed)
        recipe = self.trials[name].recipe if name in self.trials else arm_recipe(self.recipe, name)
        recipe = with_values(recipe, self.chosen_values(name) or {})
        steps = self.matched_steps(name) if recipe.match is not None else None
        if steps is not None:
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
        teachers = mine.untrained if recipe.control == "untrained" else mine.teachers
        return Arm(mine, teachers, recipe, seed, name, trained=mine.teachers)
