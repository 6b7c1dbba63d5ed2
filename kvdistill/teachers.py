"""What the stages agree on about teachers: which layers are needed, what targets are made of, how to open them.

    recipe + arms ──▶ needed layers ──▶ identity of the targets ──▶ the same store folder for whoever asks

Rank 2: above the parts, below the stages, which otherwise meet on disk only.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvdistill.align import layer_map, needed_teacher_layers, parse_layer_range
from kvdistill.core.config import arm_recipe
from kvdistill.core.files import read_json, sha256_file, sha256_of, write_json
from kvdistill.core.kv import KV
from kvdistill.core.layout import data_folder, store_root, teacher_folder, tokenizer_folder, trained_mark
from kvdistill.core.maps import SparseMap
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, ModelRecipe, Recipe, ScratchRecipe, TeacherRecipe
from kvdistill.core.runtime import DTYPES, AlignmentError, ModelError, RecipeError, RunFolderError
from kvdistill.core.store import find_store
from kvdistill.core.targets import TargetReader, TeacherTargets
from kvdistill.data.encode import Example
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.models import ModelShape, describe_config, load_model, model_config, rotate_keys, teacher_forward

COMPARED_EXAMPLES = 200
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Pairing:
    """How one arm pairs the student with one teacher: sizes, distilled layers, and the layer map."""

    teacher: ModelShape
    student: ModelShape
    student_layers: tuple[int, ...]
    mapping: SparseMap

    @property
    def teacher_layers(self) -> list[int]:
        return needed_teacher_layers(self.mapping, self.student_layers)


def teacher_recipe(recipe: Recipe, name: str) -> TeacherRecipe:
    return next(teacher for teacher in recipe.teachers if teacher.name == name)


def teacher_source(recipe: Recipe, run: Path, name: str) -> ModelRecipe:
    """Where this teacher's weights are: its own path, or the run folder when it was trained on the spot."""
    teacher = teacher_recipe(recipe, name)
    path = teacher.path
    if teacher.scratch is not None:
        folder = teacher_folder(run, name)
        if not trained_mark(folder).exists():
            raise RunFolderError(
                f"teacher {name!r} is not trained yet", place=str(folder), fix="run `kvdistill teach RECIPE` first"
            )
        path = str(folder / "model")
    return ModelRecipe(
        path=path, dtype=teacher.dtype, attention=teacher.attention, trust_remote_code=teacher.trust_remote_code
    )


def teacher_place(recipe: Recipe, name: str) -> str:
    return f"teachers.{[t.name for t in recipe.teachers].index(name)} ({name})"


def load_tokenizer_of(run: Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer, as `prepare` left it."""
    read_manifest(run)  # says so where prepare has not finished
    return AutoTokenizer.from_pretrained(tokenizer_folder(run))


def pair(recipe: Recipe, run: Path, arm: ArmRecipe, name: str) -> Pairing:
    """Sizes and layer map of one arm's student and teacher. Raises RecipeError for layers outside either model."""
    teacher, student = shape_of_teacher(recipe, run, name), shape_of_student(recipe, run)
    explicit = arm.align.layer_map if arm.align.layers == "explicit" else None
    mapping = layer_map(arm.align.layers, teacher.num_layers, student.num_layers, explicit)
    layers = parse_layer_range(arm.loss.distill_layers, student.num_layers)
    return Pairing(teacher, student, tuple(layers), mapping)


def shape_of_student(recipe: Recipe, run: Path) -> ModelShape:
    config = model_config(recipe.student, _vocab_size(run), "student")
    return _shape(config.to_json_string(), config)


def shape_of_teacher(recipe: Recipe, run: Path, name: str) -> ModelShape:
    teacher = teacher_recipe(recipe, name)
    config = model_config(teacher, _vocab_size(run), teacher_place(recipe, name))
    return _shape(config.to_json_string(), config)


_SHAPES: dict[str, ModelShape] = {}


def _shape(key: str, config: Any) -> ModelShape:
    if key not in _SHAPES:
        _SHAPES[key] = describe_config(config)
    return _SHAPES[key]


@functools.lru_cache(maxsize=4)
def _vocab_size(run: Path) -> int:
    return len(load_tokenizer_of(run))


def needed_layers(recipe: Recipe, run: Path, name: str) -> list[int]:
    """Layers of this teacher that any arm matches, ascending; none where only its logits are used."""
    needed: set[int] = set()
    for arm_name in recipe.arms:
        arm = arm_recipe(recipe, arm_name)
        if name in arm.teachers and arm.needs_kv:
            needed.update(pair(recipe, run, arm, name).teacher_layers)
    return sorted(needed)


def captured_top_k(recipe: Recipe, name: str) -> int:
    """Teacher logits per token that the store keeps: none where no arm distils this teacher's logits."""
    arms = [arm_recipe(recipe, arm) for arm in recipe.arms]
    return recipe.capture.logits_top_k if any(arm.needs_logits and name in arm.teachers for arm in arms) else 0


def check_models(recipe: Recipe, run: Path, progress: Progress = silent) -> None:
    """Everything about models that can be wrong and shows without weights: before any training. Data is prepared.

    Raises ModelError (missing folders, weights, sizes), RecipeError (layers outside a model), AlignmentError
    (tokenizers that differ).
    """
    shape_of_student(recipe, run)
    if recipe.student.path is not None:
        check_same_tokenizer(run, recipe.student.path, "student")
    elif recipe.student.scratch is not None:
        check_saved_tokenizer(run, recipe.student.scratch, "student")
    for number, teacher in enumerate(recipe.teachers):
        shape_of_teacher(recipe, run, teacher.name)
        if teacher.path is not None:
            check_same_tokenizer(run, teacher.path, teacher_place(recipe, teacher.name))
        elif teacher.scratch is not None:
            check_saved_tokenizer(run, teacher.scratch, teacher_place(recipe, teacher.name))
        progress("check", number + 1, len(recipe.teachers))
    for arm_name in recipe.arms:
        arm = arm_recipe(recipe, arm_name)
        for name in arm.teachers if arm.needs_kv else ():
            try:
                pair(recipe, run, arm, name)
            except RecipeError as error:
                place = f"arms.{arm_name} with teacher {name!r}: {error.place}"
                raise RecipeError(error.what, place=place, fix=error.fix) from None


# -- captured targets ---------------------------------------------------------------------------------


def split_examples(recipe: Recipe, run: Path, split: str) -> Sequence[Example]:
    """The examples whose targets are captured: all of train, those of val that curves and match figures use."""
    examples = read_split(run, split)
    if split == "train":
        return examples
    return [examples[i] for i in spread(examples, max(recipe.train.eval_examples, recipe.evaluate.match_examples))]


def spread(examples: Sequence[Example], number: int) -> list[int]:
    """`number` example numbers, as evenly over the tasks as there are examples, in order."""
    by_task: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_task.setdefault(example.task, []).append(i)
    share = max(1, number // max(1, len(by_task)))
    return sorted(i for numbers in by_task.values() for i in numbers[:share])


def target_identity(recipe: Recipe, run: Path, name: str, split: str) -> dict[str, Any]:
    """Everything that captured targets depend on: weights, tokenizer, texts, layers, options."""
    manifest = read_json(data_folder(run) / "manifest.json")
    examples = split_examples(recipe, run, split)
    return {
        "teacher": weights_fingerprint(recipe, run, name),
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        "texts": sha256_of([[e.doc_hash, e.style, len(e.input_ids)] for e in examples]),
        "layers": needed_layers(recipe, run, name),
        "dtype": recipe.capture.dtype,
        "logits_top_k": captured_top_k(recipe, name),
        "attention": teacher_recipe(recipe, name).attention,
        "teacher_dtype": teacher_recipe(recipe, name).dtype,
    }


def open_targets(recipe: Recipe, run: Path, name: str, split: str) -> TargetReader:
    """The captured targets of one teacher; a StoreError says what differs, or which shard is broken."""
    identity = target_identity(recipe, run, name, split)
    folder = find_store(store_root(run), f"targets-{split}", name, identity, make="kvdistill capture RECIPE")
    return TargetReader(folder)


def weights_fingerprint(recipe: Recipe, run: Path, name: str) -> str:
    """Hash of the teacher's weight files; a hub model's commit. Noted in the run folder against size and time."""
    source = teacher_source(recipe, run, name)
    assert source.path is not None
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        config = model_config(source, 1, teacher_place(recipe, name))
        return f"hub:{source.path}@{getattr(config, '_commit_hash', None)}"
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    note = teacher_folder(run, name) / "fingerprint.json"
    if note.exists() and (known := read_json(note))["stamp"] == stamp:
        return str(known["sha256"])
    digest = sha256_of([[f.name, sha256_file(f)] for f in files])
    write_json(note, {"stamp": stamp, "sha256": digest})
    return digest


def key_frame(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, device: torch.device) -> Callable[[KV], KV]:
    """Targets come unrotated; where the arm compares rotated keys, this turns them, with the teacher's own rotary."""
    if arm.align.keys == "unrotated":
        return lambda kv: kv
    config = model_config(teacher_recipe(recipe, name), 1, teacher_place(recipe, name))
    small = copy.deepcopy(config)  # one layer and one word: all that is needed of it is the rotary module
    small.num_hidden_layers, small.vocab_size = 1, 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    model = AutoModelForCausalLM.from_config(small).to(device)
    return lambda kv: rotate_keys(kv, model)


# -- running one --------------------------------------------------------------------------------------


def load_teacher(recipe: Recipe, run: Path, name: str, device: torch.device) -> PreTrainedModel:
    """The teacher on its device, frozen, in eval mode; its tokenizer is checked against the student's."""
    source = teacher_source(recipe, run, name)
    place = teacher_place(recipe, name)
    if teacher_recipe(recipe, name).scratch is None:
        check_same_tokenizer(run, str(source.path), place)
    model = load_model(source, vocab_size=_vocab_size(run), seed=0, place=place)
    return model.requires_grad_(False).eval().to(device)  # type: ignore[arg-type]


def check_same_tokenizer(run: Path, path: str, place: str) -> None:
    """Raise unless a pretrained model cuts text exactly as the run does (compared as tokenizers, never by size)."""
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers would make an empty one up
        raise ModelError(f"{path} has no tokenizer", place=place, fix="keep the tokenizer files beside the weights")
    try:
        theirs = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no tokenizer ({first})", place=place, fix="keep the tokenizer files beside the weights"
        ) from None
    if difference := tokenizer_difference(load_tokenizer_of(run), theirs, read_split(run, "train")[:COMPARED_EXAMPLES]):
        raise AlignmentError(
            f"this model's tokenizer differs from data.tokenizer: {difference}",
            place=place,
            fix="use models of one tokenizer family, and data.trim_vocabulary: false with pretrained models",
        )


def check_saved_tokenizer(run: Path, scratch: ScratchRecipe, place: str) -> None:
    """Raise where a model of this family, saved beside the run's tokenizer, would come back with another one.

    transformers 5 replaces the tokenizer class of some families (qwen2) on loading, whatever was saved.
    """
    ours = load_tokenizer_of(run)
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


def run_teacher(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    segments_BS: Tensor,
    *,
    layers: Sequence[int],
    dtype: str,
    want_nll: bool = True,
    top_k: int = 0,
) -> TeacherTargets:
    """Targets of one batch straight from the model, rounded to `dtype` as the store would."""
    out = teacher_forward(
        model,
        input_ids_BS,
        segments_BS > 0,
        segments_BS,
        layers=list(layers) or None,
        want_kv=bool(layers),
        want_nll=want_nll,
        want_logits_top_k=top_k,
    )
    if out.kv is not None and out.kv.keys[0].dtype != DTYPES[dtype]:
        return replace(out, kv=out.kv.map_layers(lambda x: x.to(DTYPES[dtype])))
    return out
