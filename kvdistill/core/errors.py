"""The one exception family. A user's mistake says what is wrong, where, and how to mend it.

The command line prints these as one message and exits with 2; anything else is a bug of ours and exits with 1.
A message names files and words of strangers, so whatever a terminal would obey is made visible in it.
Imports nothing heavy, so that the command line can start without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from kvdistill.core.quoting import printable


class KVDistillError(Exception):
    """Base of every error that a user can mend.

    what: the mistake, one sentence. place: the recipe key, `file:line`, model or folder it is in.
    fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, place: str = "", fix: str = "") -> None:
        self.what, self.place, self.fix = what, place, fix
        super().__init__(self.message())

    def message(self) -> str:
        what, fix = ("\n".join(map(printable, text.split("\n"))) for text in (self.what, self.fix))
        head = f"{printable(self.place)}: {what}" if self.place else what
        return f"{head}\n  fix: {fix}" if fix else head

    def __reduce__(self):  # survives the way back from a worker process
        return partial(type(self), self.what, place=self.place, fix=self.fix), ()


class RecipeError(KVDistillError):
    """The recipe or an override: unknown key, wrong type, values that do not go together."""


def require_known(word: str, words: Iterable[str], what: str, place: str) -> None:
    """RecipeError at the key `place` unless `word` is one of the words there are for `what`."""
    if word not in (there := [*words]):
        raise RecipeError(f"unknown {what} {word!r}", place=place, fix=f"one of {', '.join(there)}")


class DataError(KVDistillError):
    """A data file, a task, a split or a tokenizer."""


class ModelError(KVDistillError):
    """A model that cannot be loaded, or whose attention cannot be captured."""


class AlignmentError(KVDistillError):
    """Shapes, maps, frames or layers that do not fit together."""


class StoreError(KVDistillError):
    """A store made of something else, torn, or altered."""


class RunFolderError(KVDistillError):
    """A run folder that belongs to another recipe, or lacks what an earlier stage should have left."""


class TrainingStopped(KVDistillError):
    """Training stopped on purpose, with the last good checkpoint kept: NaN in a loss term, a full disk."""


class Diverged(TrainingStopped):
    """A loss, a weight or every validation figure is no number any more."""


class StatisticsRefused(KVDistillError):
    """A comparison that would not mean anything: unpaired, too few seeds, budgets apart."""


class JobsFailed(KVDistillError):
    """Several jobs of a study failed, each for its own reason; `exit_code` is that of the first."""
