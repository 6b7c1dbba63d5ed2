"""An experiment: a recipe in its run folder (of one seed, where these differ), with its teachers and arms by name."""

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

    def arm(self, name: str, seed: int) -> Arm:
        """One arm with one seed. Raises RecipeError with the nearest name."""
        mine = self.of(seed)
        return Arm(mine, mine.teachers, arm_recipe(self.recipe, name), seed, name)
