"""Do two models cut text alike? Compared by what tokenizers do, never by their size or by how they are written down."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvdistill.arms.texts import load_tokenizer_of
from kvdistill.core.errors import AlignmentError, ModelError
from kvdistill.core.files import write_json
from kvdistill.core.recipe import ScratchRecipe
from kvdistill.data.encode import Example
from kvdistill.data.tables import read_split

COMPARED_EXAMPLES = 200
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_model_tokenizer(path: str, place: str) -> Any:
    """The tokenizer beside a model's weights. Raises ModelError where there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers would make an empty one up
        raise ModelError(f"{path} has no tokenizer", place=place, fix="keep the tokenizer files beside the weights")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no tokenizer ({first})", place=place, fix="keep the tokenizer files beside the weights"
        ) from None


def check_same_tokenizer(run: Path, path: str, place: str) -> None:
    """Raise unless a pretrained model cuts text exactly as the run does (compared as tokenizers, never by size)."""
    theirs = load_model_tokenizer(path, place)
    if difference := tokenizer_difference(load_tokenizer_of(run), theirs, read_split(run, "train")[:COMPARED_EXAMPLES]):
        raise AlignmentError(
            f"this model's tokenizer differs from data.tokenizer: {difference}",
            place=place,
            fix="set data.tokenizer to the student's own, and data.trim_vocabulary: false with a pretrained student",
        )


def check_saved_tokenizer(run: Path, scratch: ScratchRecipe, place: str, ours: Any | None = None) -> None:
    """Raise where a model of this family, saved beside the tokenizer, would come back with another one.

    ours: unset, the run's. transformers 5 replaces the tokenizer class of some families (qwen2) on loading, whatever
    was saved.
    """
    ours = load_tokenizer_of(run) if ours is None else ours
    with tempfile.TemporaryDirectory(dir=run, prefix=".check-") as folder:
        ours.save_pretrained(folder)
        write_json(Path(folder) / "config.json", {"model_type": scratch.architecture})
        theirs = AutoTokenizer.from_pretrained(folder)
    if difference := tokenizer_difference(ours, theirs, read_split(run, "train")[:COMPARED_EXAMPLES]):
        raise AlignmentError(
            f"transformers would load this tokenizer differently beside a {scratch.architecture} model ({difference})",
            place=f"{place}.scratch.architecture",
            fix="choose another architecture for it, for example qwen3 or llama",
        )


def tokenizer_difference(ours: Any, theirs: Any, examples: Sequence[Example]) -> str | None:
    """The first thing two tokenizers disagree on: a piece's number, or how one of these texts is cut. None: they agree.

    Compared by what they do, not by how they are written down: transformers rebuilds some families' files on loading.
    Pieces that only they have do not matter; none of our texts uses them.
    """
    their_pieces = theirs.get_vocab()
    for piece, number in ours.get_vocab().items():
        if their_pieces.get(piece) != number:
            return f"piece {piece!r} is {number} here and {their_pieces.get(piece)} there"
    for example in examples:
        for text in (example.prompt, example.reasoning):
            here, there = (t(text, add_special_tokens=False)["input_ids"] for t in (ours, theirs))
            if here != there:
                return f"{text[:40]!r} is cut into {len(here)} pieces here and {len(there)} there"
    return None
