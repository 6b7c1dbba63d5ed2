"""Which step's weights a training keeps, and when it ends before its last: `train.select` and `train.patience`.

Both go by one figure, the NLL of the completions of held-out validation problems, at the points of the learning curve;
never by test problems. The best weights so far stay in memory, one copy of what learns, and go into every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.core.errors import Diverged
from kvdistill.core.files import open_tensors
from kvdistill.core.recipe import TrainRecipe
from kvdistill.stages.train.checkpoint import trainable


class Selection:
    """The best point so far, and how many have passed since. `add` point after point; `put_back` at the end.

    weights: what learns, as it was at the best point, on the CPU; empty where the last step's weights are kept.
    """

    def __init__(self, train: TrainRecipe) -> None:
        self._train = train
        self.weights: dict[str, Tensor] = {}
        self._best: tuple[int, float] | None = None  # step, NLL
        self._last, self._since = 0, 0  # the newest point; points without a better one

    def is_point(self, step: int) -> bool:
        return self._train.is_point(step)

    @property
    def is_over(self) -> bool:
        """Whether training ends here, before its last step."""
        return self._train.patience is not None and self._since >= self._train.patience

    def add(self, step: int, nll: float, model: nn.Module) -> None:
        """A point with its validation NLL. The lowest counts, of equal ones the earlier; what is no number is none."""
        self._last = step
        if not (nll < (math.inf if self._best is None else self._best[1])):
            self._since += 1
            return
        self._best, self._since = (step, nll), 0
        if self._train.select == "best":
            with torch.no_grad():
                for name, parameter in trainable(model).items():
                    if name not in self.weights:
                        self.weights[name] = torch.empty_like(parameter, device="cpu")
                    self.weights[name].copy_(parameter)

    def put_back(self, model: nn.Module) -> None:
        """Give the model the weights that are kept. Diverged where no point has a finite NLL."""
        if self._train.select == "last":
            return
        if self._best is None:
            raise Diverged(
                "no validation point has a finite NLL, so there are no best weights to keep",
                place="train.select",
                fix="lower train.learning_rate, or look at the validation problems; then run in a new run_dir",
            )
        with torch.no_grad():
            for name, parameter in trainable(model).items():
                parameter.copy_(self.weights[name])

    def facts(self) -> dict[str, Any]:
        """For mark and ledger: the rule, whose weights are kept (a step), the best point, and how training ended."""
        train, best = self._train, self._best
        return {
            "rule": selection_rule(train),
            "select": train.select,
            "patience": train.patience,
            "chosen_step": best[0] if best is not None and train.select == "best" else self._last,
            "best_step": None if best is None else best[0],
            "best_nll": None if best is None else best[1],
            "ended_early": self.is_over and self._last < train.steps,
        }

    # -- checkpoints --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For a checkpoint, beside `weights`."""
        return {"best": self._best, "last": self._last, "since": self._since}

    def restore(self, state: Mapping[str, Any], weights: Path) -> None:
        """As `state` was. weights: the file that `weights` were written to, if there were any."""
        self._best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
        self._last, self._since = int(state["last"]), int(state["since"])
        saved = open_tensors(weights) if weights.is_file() else {}
        self.weights = {name: tensor.clone() for name, tensor in saved.items()}


def selection_rule(train: TrainRecipe) -> str:
    """`train.select` and `train.patience` in words."""
    kept = "of the last step" if train.select == "last" else "with the lowest validation NLL (ties: the earlier)"
    ends = "after all steps"
    if train.patience is not None:
        ends = f"after {train.patience} points without a lower validation NLL, at the latest after {train.steps} steps"
    points = f"every {train.eval_every} steps, completions of at most {train.eval_examples} validation problems"
    return f"weights {kept} are kept; training ends {ends} (NLL: {points})"
