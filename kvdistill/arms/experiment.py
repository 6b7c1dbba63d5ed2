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
        """One arm with one seed. Raises RecipeError with the nearest name."""
        return Arm(self, self.teachers, arm_recipe(self.recipe, name), seed, name)
