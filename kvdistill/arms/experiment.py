"""An experiment: a recipe in its run folder, with its teachers and arms by name."""

from __future__ import annotations

from functools import cached_property

from kvdistill.arms.arm import Arm
from kvdistill.arms.setting import Setting
from kvdistill.arms.teacher import Teacher
from kvdistill.core.config import arm_recipe


class Experiment(Setting):
    """What arms and teachers share, and the one place where they are looked up."""

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {teacher.name: Teacher(self, teacher.name) for teacher in self.recipe.teachers}

    def arm(self, name: str, seed: int) -> Arm:
        """One arm with one seed, with the steps it is trained for as far as they are known. RecipeError with the
        nearest name."""
        recipe = arm_recipe(self.recipe, name)
        steps = self.matched_steps(name) if recipe.match is not None else None
        if steps is not None:
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
        return Arm(self, self.teachers, recipe, seed, name)
