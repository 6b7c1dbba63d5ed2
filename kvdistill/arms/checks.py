"""Everything about models that can be wrong and shows without weights: looked at before any training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import ITSELF
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.latent_student import LatentStudent
from kvdistill.arms.student import CausalStudent
from kvdistill.arms.teacher import Teacher
from kvdistill.core.errors import AlignmentError, ModelError, RecipeError
from kvdistill.core.files import file_stamps, sha256_of, write_json
from kvdistill.core.marks import read_mark, sealed
from kvdistill.core.progress import Progress, silent
from kvdistill.core.quoting import quoted
from kvdistill.core.recipe import ModelRecipe, Recipe, ScratchRecipe
from kvdistill.core.segments import ANSWER
from kvdistill.data.encode import Example
from kvdistill.data.tokenizers import fingerprint_tokenizer, load_tokenizer
from kvdistill.models import ModelShape, Probe, model_config, probe_config
from kvdistill.models.generate import right_padded

COMPARED_EXAMPLES = 200
_CHUNK = 500  # rows
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_models(experiment: Experiment, progress: Progress = silent) -> None:
    """Raises ModelError (missing folders, weights, sizes, a scratch teacher that is not causal), RecipeError (layers
    outside a model), AlignmentError (what an arm cannot bring together). Data is prepared.
    """
    recipe, teachers = experiment.recipe, experiment.teachers
    _check_kinds(experiment)
    if recipe.student.path is not None:
        check_same_tokenizer(experiment, recipe.student.path, "student", recipe.student.gguf_file)
    elif recipe.student.scratch is not None:
        check_saved_tokenizer(experiment, recipe.student.scratch, "student", experiment.tokenizer)
    check_positions(experiment)
    try_saving(experiment)
    for number, teacher in enumerate(teachers.values()):
        scratch = teacher.recipe.scratch
        if scratch is not None:
            check_saved_tokenizer(experiment, scratch, teacher.place, teacher.tokenizer)
        progress("check", number + 1, len(teachers))
    for name in recipe.arms:
        arm = experiment.arm(name, recipe.seeds[0] if experiment.seed is None else experiment.seed)
        for teacher in arm.teachers.values() if arm.uses_teachers else ():
            _check_gives(arm, teacher)
            _check_meets(arm, teacher)
            _check_exact(arm, teacher)
        if arm.recipe.learns_from_itself:
            _check_exact(arm, None)
            _check_steps(arm, ITSELF, experiment.examples("train"))
        if arm.recipe.needs_kv and arm.recipe.align.match_in == "shared":
            try:
                _ = arm.shared_size
            except AlignmentError as error:
                raise AlignmentError(error.what, place=f"arms.{name}: {error.place}", fix=error.fix) from None


def check_sizes(recipe: Recipe, run: Path) -> None:
    """What is wrong with models and layers whatever the data says: looked at before any data is read, in a second."""
    experiment = Experiment(recipe, run, recipe.seeds[0])
    experiment.vocab_size = 1  # not known yet: the smallest there is
    for teacher in experiment.teachers.values():
        teacher.texts = {"own_text": False, "one_text": True, "tokenizer": None}
    _check_kinds(experiment)
    for name in recipe.arms:
        arm = experiment.arm(name, recipe.seeds[0])
        for teacher in (experiment.teachers[writer] for writer in arm.recipe.writers):
            if teacher.shape.kind != "decoder":
                raise ModelError(
                    f"this teacher is an {teacher.shape.kind}: it does not write a solution from left to right",
                    place=f"arms.{name}.texts with teacher {teacher.name!r}",
                    fix="name causal teachers in texts_from",
                )
        for teacher in arm.teachers.values() if arm.uses_teachers else ():
            _check_gives(arm, teacher)
            if arm.recipe.needs_kv and not isinstance(arm.recipe.align.layer_map, str):  # of a file: with the data
                _check_layers(arm, teacher)


def _check_kinds(experiment: Experiment) -> None:
    """The student's sizes, and every teacher's: each a model that can do what is asked of it."""
    _ = experiment.student_shape
    for teacher in experiment.teachers.values():
        try:
            kind = teacher.shape.kind
        except ModelError as error:  # what is wrong inside a model knows the model's name, not whose it is
            if error.place.startswith(teacher.place):
                raise
            raise ModelError(error.what, place=f"{teacher.place}: {error.place}", fix=error.fix) from None
        scratch = teacher.recipe.scratch
        if scratch is not None and kind != "decoder":
            raise ModelError(
                f"{scratch.architecture} is an {kind}: it cannot be trained on the spot to continue a text from "
                "left to right",
                place=f"{teacher.place}.scratch.architecture",
                fix="choose a causal architecture (qwen2, llama, gpt2, …), or give a pretrained one with `path`",
            )


def check_positions(experiment: Experiment) -> None:
    """Raise ModelError where a text is longer than a model with learned positions can read; all such models at once.

    Counted in each model's own tokens: what the student reads and writes, what teachers read.
    """
    mistakes: list[str] = []

    def compare(place: str, shape: ModelShape, needs: Mapping[str, int]) -> None:
        limit = shape.most_positions
        if limit is not None and (over := {what: length for what, length in needs.items() if length > limit}):
            said = ", ".join(f"{what} has {length}" for what, length in over.items())
            mistakes.append(f"{place} ({shape.family}) reads at most {limit} tokens: {said}")

    new = experiment.recipe.evaluate.max_new_tokens
    # of test too: the answer that is right is scored behind its whole reasoning, which max_length does not bound there
    texts = {f"the longest text of {split}": experiment.split(split) for split in ("train", "val", "test")}
    needs = {what: max((len(e.input_ids) for e in examples), default=0) for what, examples in texts.items()}
    prompts = [e.num_prompt_tokens for split in ("val", "test") for e in experiment.split(split)]
    needs[f"the longest prompt with {new} new tokens (evaluate.max_new_tokens)"] = max(prompts, default=0) + new
    questions = [e.num_prompt_tokens + e.segments.count(ANSWER) for examples in texts.values() for e in examples]
    longest = max(max(questions, default=0), max(prompts, default=0) + new)
    for name, arm in experiment.arms.items():
        if arm.thinks:  # <bot>, slots, <eot> between question and answer
            what = f"the longest question of arms.{name} with its {arm.latent.tokens} latent slots (latent.tokens)"
            needs[what] = longest + arm.latent.tokens + 2
    compare("student", experiment.student_shape, needs)
    for teacher in experiment.teachers.values():
        splits = ("train", "val", "teach") if teacher.recipe.scratch is not None else ("train", "val")
        texts = {f"the longest text of {split}": teacher.lessons(split) for split in splits}
        needs = {what: max((len(e.input_ids) for e in examples), default=0) for what, examples in texts.items()}
        if any(teacher.name in arm.writers for arm in experiment.arms.values()):
            write = experiment.recipe.write
            most = write.max_new_tokens or new
            asked = max((e.num_prompt_tokens for e in teacher.lessons(write.questions)), default=0)
            needs[f"the longest question to write a solution of, with {most} new tokens,"] = asked + most
        compare(teacher.place, teacher.shape, needs)
    if mistakes:
        raise ModelError(
            "; ".join(mistakes),
            place="data.max_length",
            fix="lower it (and evaluate.max_new_tokens), or take models with more positions (test texts count whole)",
        )


def _check_gives(arm: Arm, teacher: Teacher) -> None:
    """An encoder gives keys and values. It predicts no next token: no logits, and no NLL to tell competence by. What
    computes attention in a way of its own gives logits, and no keys and values."""
    shape, place = teacher.shape, f"arms.{arm.name} with teacher {teacher.name!r}"
    kind = shape.kind
    if arm.recipe.needs_kv and not shape.is_captured:
        raise ModelError(
            f"{shape.family}: its attention bypasses transformers' attention interface, so that its keys and values "
            "cannot be recorded",
            place=place,
            fix="use a family with ALL_ATTENTION_FUNCTIONS in its code (T5: a transformers newer than 5.13), or set "
            "loss.kv_weight: 0 and distil its logits",
        )
    if kind == "decoder":
        return
    if arm.recipe.needs_logits:
        raise AlignmentError(
            f"this teacher is an {kind} and predicts no next token: it has no logits to distil",
            place=f"{place}: loss.logit_weight",
            fix="set loss.logit_weight: 0 for this arm, or name causal teachers",
        )
    if arm.recipe.needs_nll:
        raise AlignmentError(
            f"competence asks how likely a teacher finds the gold text, and this one is an {kind}: it has no NLL",
            place=f"{place}: fuse.fusion_strategy",
            fix="set fuse.fusion_strategy: fixed or similarity",
        )


def _check_exact(arm: Arm, teacher: Teacher | None) -> None:
    """Whether keys and values of teacher (None: the student is its own) and student, and their attention where the arm
    looks at it, are what they are taken for: found out by running a small model of each one's configuration."""
    recipe = arm.recipe
    if teacher is not None and not recipe.needs_kv:
        return
    meets_in_teacher = recipe.align.match_in == "teacher"
    looks = {
        "loss.kind": recipe.compares_attention,
        "align.ridge_on": recipe.align.ridge_on == "attention",
        "compress.kv_compression": recipe.compress.kv_compression == "r-kv",
        "loss.attention_weighted": recipe.loss.attention_weighted,
    }
    of_teacher = [key for key, does in looks.items() if does and (key != "loss.kind" or meets_in_teacher)]
    of_student = ["loss.kind"] if recipe.compares_attention and not meets_in_teacher else []
    if teacher is None and looks["compress.kv_compression"]:
        of_student = ["compress.kv_compression"]
    experiment = arm.experiment
    models: list[tuple[ModelRecipe, int, str, list[str]]] = []
    if teacher is not None:
        models.append((teacher.recipe, teacher.vocab_size, teacher.place, of_teacher))
    models.append((experiment.recipe.student, experiment.vocab_size, "student", of_student))
    for model, vocab_size, place, looked_at in models:
        probe, family = probe_of(model, vocab_size, place)
        for verdict, what in ((probe.keys, "captured"), (probe.unrotated, "unrotated")):
            if not verdict.is_exact:
                fix = "use another family (docs/models.md has a table), or set loss.kv_weight: 0 and distil logits"
                eager = model.model_copy(update={"attention": "eager"})
                if model.attention != "eager" and probe_of(eager, vocab_size, place)[0].unrotated.is_exact:
                    fix = f"set attention: eager for it ({place}.attention), which can do it"
                raise ModelError(
                    f"{family}: its keys and values cannot be {what} exactly: {verdict.reason}",
                    place=f"arms.{arm.name}: {place}",
                    fix=fix,
                )
        if looked_at and not probe.attention.is_exact:
            raise ModelError(
                f"{family}: its attention weights cannot be made again: {probe.attention.reason}",
                place=f"arms.{arm.name}: {place}: {looked_at[0]}",
                fix=f"use another family (docs/models.md has a table), or do without {', '.join(looked_at)}",
            )


_PROBES: dict[str, Probe] = {}


def probe_of(model: ModelRecipe, vocab_size: int, place: str) -> tuple[Probe, str]:
    """What can be done with a recipe's model, and its family. Kept: it takes a second or two for each configuration."""
    config = model_config(model, vocab_size, place)
    attention = model.attention if model.attention == "sdpa" else "eager"  # flash attention needs a GPU
    key = f"{attention} {config.to_json_string()}"
    if key not in _PROBES:
        _PROBES[key] = probe_config(config, attention)
    return _PROBES[key], config.model_type


def _check_meets(arm: Arm, teacher: Teacher) -> None:
    """Whether the texts and layers that this teacher has are such that the arm can bring them to the student's."""
    place, texts, recipe = f"arms.{arm.name} with teacher {teacher.name!r}", teacher.texts, arm.recipe
    own_tokenizer, own_chains = texts["tokenizer"] is not None, texts["own_text"] and not texts["one_text"]
    if recipe.needs_logits and own_chains:
        raise AlignmentError(
            "logits can be distilled from a teacher that reads the student's text; this one has its own chains",
            place=f"{place}: loss.logit_weight",
            fix="set loss.logit_weight: 0 for this arm, or name other teachers",
        )
    disturbed = recipe.control not in (None, "untrained")
    if recipe.needs_logits and own_tokenizer and (recipe.loss.logit_match == "same" or disturbed):
        what = f"control: {recipe.control}" if disturbed else "logit_match: same"
        raise AlignmentError(
            f"{what}, and this teacher has other tokens than the student: no position of the one is one of the other",
            place=f"{place}: loss.logit_match",
            fix="set loss.logit_weight: 0" if disturbed else "set loss.logit_match: auto",
        )
    if not recipe.needs_kv:
        return
    same_places = not recipe.thinks  # latent slots are filled from each teacher's own tokens: no times to align
    unlike = {"own_tokenizer": own_tokenizer and same_places, "own_chains": own_chains and same_places}
    for key, what, fix in recipe.align.time_mistakes(**unlike):
        raise AlignmentError(what, place=f"{place}: {key}", fix=fix)
    if own_chains and recipe.needs_nll:
        raise AlignmentError(
            "competence compares how well teachers explain one text, and this teacher has chains of its own (traces)",
            place=f"{place}: fuse.fusion_strategy",
            fix="set fuse.fusion_strategy: fixed or similarity",
        )
    _check_layers(arm, teacher)
    _check_steps(arm, teacher.name, teacher.examples("train"))


def _check_steps(arm: Arm, whose: str, examples: Sequence[Example]) -> None:
    """Whether the reasoning that a teacher reads marks steps, where only their ends are kept: in one row at least,
    since a reasoning of one step needs no mark. whose: the teacher's name, or ITSELF."""
    marks = arm.step_marks.get(whose)
    if marks is None:
        return
    for start in range(0, len(examples), _CHUNK):
        rows = [examples[i] for i in range(start, min(start + _CHUNK, len(examples)))]
        ids_BS = right_padded([row.input_ids for row in rows], 0)
        if bool(marks.ends(ids_BS, right_padded([row.segments for row in rows], 0)).marked_B.any()):
            return
    example = next((one.reasoning for one in examples if one.reasoning), "")
    raise AlignmentError(
        f"kv_compression steps: no reasoning of the training problems holds the mark {marks.mark!r} in this "
        f"{'student' if whose == ITSELF else 'teacher'}'s tokens; the first one is {quoted(example)}",
        place=f"arms.{arm.name} with {'itself' if whose == ITSELF else f'teacher {whose!r}'}: compress.step_mark",
        fix="give the text that stands between steps, or another compress.kv_compression",
    )


def _check_layers(arm: Arm, teacher: Teacher) -> None:
    try:
        teacher.check_pair(arm.recipe)
    except RecipeError as error:
        place = f"arms.{arm.name} with teacher {teacher.name!r}: {error.place}"
        raise RecipeError(error.what, place=place, fix=error.fix) from None


# -- tokenizers: compared by what they do, never by their size or by how they are written down ---------


def load_model_tokenizer(path: str, place: str, gguf_file: str | None = None) -> Any:
    """The tokenizer beside a model's weights. Raises ModelError where there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir() and gguf_file is None and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers would make an empty one up
        raise ModelError(f"{path} has no tokenizer", place=place, fix="keep the tokenizer files beside the weights")
    try:
        return AutoTokenizer.from_pretrained(path, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    except Exception as error:  # a stranger's file: the libraries raise whatever they come across in it
        first = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise ModelError(
            f"no tokenizer ({first})", place=place, fix="keep the tokenizer files beside the weights"
        ) from None


def try_saving(experiment: Experiment) -> None:
    """Save the student as training will in the end, load it and compare; noted in `check.json`, and done once.

    Its adapters are made to matter first: those that training starts from change nothing. Raises ModelError where it
    comes back as another one, and whatever saving raises.
    """
    student, note = experiment.recipe.student, experiment.run / "check.json"
    shapes = {  # of what is saved; the rest of the section is of training
        (arm.latent.tokens, arm.latent.passes, arm.latent.projection_size): arm.latent
        for arm in experiment.arms.values()
        if arm.thinks
    }
    what = sha256_of(
        ({"latents": list(shapes)} if shapes else {})
        | {
            "student": student.model_dump(mode="json"),
            "files": [] if student.path is None else file_stamps(Path(student.path).expanduser()),
            "tokenizer": fingerprint_tokenizer(experiment.tokenizer),
            "versions": [version(name) for name in ("torch", "transformers", "peft", "safetensors")],
        }
    )
    if (read_mark(note) or {}).get("saved") == what:
        return
    seed = experiment.recipe.seeds[0]
    made: list[CausalStudent | LatentStudent] = [CausalStudent(experiment.initial_model(seed), lora=student.lora)]
    made += [LatentStudent.around(experiment.initial_model(seed), one, lora=student.lora) for one in shapes.values()]
    with tempfile.TemporaryDirectory(dir=experiment.run, prefix=".check-") as folder:
        for one in made:
            generator = torch.Generator().manual_seed(0)
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    with torch.no_grad():
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            try:
                one.save(Path(folder) / "model", experiment.as_read(experiment.tokenizer))
            except ModelError as error:  # of a folder that nobody will see
                place = f"student{'' if student.path is None else f'.path: {student.path}'}"
                raise ModelError(error.what, place=place, fix=error.fix) from None
        theirs = AutoTokenizer.from_pretrained(Path(folder) / "model")
    special = [*experiment.tokenizer.get_added_vocab()]
    for example in experiment.split("train")[:COMPARED_EXAMPLES]:
        if not any(token in example.prompt for token in special) and theirs(example.prompt)["input_ids"] != (
            example.prompt_ids
        ):
            raise AlignmentError(
                f"the tokenizer that is saved with the student would read {example.prompt[:40]!r} otherwise than "
                "training does",
                place="data.tokenizer",
                fix="use the tokenizer of the student's own family",
            )
    write_json(note, sealed({"saved": what}))


def check_same_tokenizer(experiment: Experiment, path: str, place: str, gguf_file: str | None = None) -> None:
    """Raise unless a pretrained model cuts text exactly as the run does (compared as tokenizers, never by size)."""
    theirs = load_model_tokenizer(path, place, gguf_file)
    ours, texts = experiment.tokenizer, experiment.split("train")[:COMPARED_EXAMPLES]
    if difference := tokenizer_difference(ours, theirs, texts):
        as_written = (Path(path).expanduser() / "tokenizer.json").is_file() and load_tokenizer(path, place=place)
        if as_written and tokenizer_difference(ours, as_written, texts) is None:
            raise AlignmentError(
                f"transformers does not read this folder's tokenizer as it is written: AutoTokenizer makes a "
                f"{type(theirs).__name__} of it because of the model's family, and that cuts texts otherwise "
                f"({difference})",
                place=place,
                fix="keep a tokenizer of the model's own family beside it (and as data.tokenizer), or take a student "
                "of another family for this tokenizer (llama, qwen3, …)",
            )
        raise AlignmentError(
            f"this model's tokenizer differs from data.tokenizer: {difference}",
            place=place,
            fix="set data.tokenizer to the student's own, and data.trim_vocabulary: false with a pretrained student",
        )


def check_saved_tokenizer(experiment: Experiment, scratch: ScratchRecipe, place: str, ours: Any) -> None:
    """Raise where a model of this family, saved beside the tokenizer, would come back with another one.

    transformers 5 replaces the tokenizer class of some families (qwen2) on loading, whatever
    was saved.
    """
    with tempfile.TemporaryDirectory(dir=experiment.run, prefix=f".check.part-{os.getpid()}-") as folder:
        ours.save_pretrained(folder)
        write_json(Path(folder) / "config.json", {"model_type": scratch.architecture})
        theirs = AutoTokenizer.from_pretrained(folder)
    if difference := tokenizer_difference(ours, theirs, experiment.split("train")[:COMPARED_EXAMPLES]):
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
