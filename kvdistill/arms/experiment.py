"""An experiment: a recipe in its run folder, with its teachers and arms by name."""

from __future__ import annotations

from functools import cached_property

from kvdistill.arms.arm import Arm
from kvdistill.arms.setting import Setting
from kvdistill.arms.teacher import Teacher
from kvdistill.core.config import arm_recipe
from kvdistill.core.recipe import UNTRAINED


class Experiment(Setting):
    """What arms and teachers share, and the one place where they are looked up."""

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {teacher.name: Teacher(self, teacher.name) for teacher in self.recipe.teachers}

    @cached_property
    def untrained(self) -> dict[str, Teacher]:
        """The same with random weights, for arms with `control: untrained`."""
        return {teacher.name: Teacher(self, teacher.name, untrained=True) for teacher in self.recipe.teachers}

    def teacher(self, stored_as: str) -> Teacher:
        """By the name that its targets are stored under."""
        name = stored_as.removesuffix(UNTRAINED)
        return (self.teachers if name == stored_as else self.untrained)[name]

    def arm(self, name: str, seed: int) -> Arm:
        """One arm with one seed. Raises RecipeError with the nearest name."""
        recipe = arm_recipe(self.recipe, name)
        teachers = self.untrained if recipe.control == "untrained" else self.teachers
        return Arm(self, teachers, recipe, seed, name, judges=self.teachers)
