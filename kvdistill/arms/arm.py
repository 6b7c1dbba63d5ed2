"""An arm with a seed: whatever fitting, training, matching, profiling and evaluating ask about it, asked of one object.

Its recipe says what it does, its experiment holds what it shares with the others. Loads and reads when it is asked;
what a stage computes of it (fits, weights) is written by the stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvdistill.align import MapProjectionAligner
from kvdistill.align.layers import parse_layer_range
from kvdistill.arms.batches import ITSELF, Batch, BatchMaker
from kvdistill.arms.controls import Moments
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.latent_student import LatentStudent
from kvdistill.arms.lessons import RowsBehind, studied_beside, written_beside
from kvdistill.arms.order import data_order
from kvdistill.arms.pairing import Pairing
from kvdistill.arms.questions import as_read, question_sizes
from kvdistill.arms.setting import Setting
from kvdistill.arms.student import CausalStudent, Student
from kvdistill.arms.teacher import Teacher
from kvdistill.arms.teacher_pass import run_teacher
from kvdistill.arms.texts import first_share, spread
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV
from kvdistill.core.layout import arm_folder, fit_root
from kvdistill.core.recipe import ArmRecipe, StudentRecipe
from kvdistill.core.runtime import derive_seed, elements_at_once
from kvdistill.core.segments import PROMPT
from kvdistill.core.targets import TeacherTargets
from kvdistill.data.encode import Example
from kvdistill.data.steps import StepMarks
from kvdistill.fuse import build_fusion
from kvdistill.models.generate import Rows
from kvdistill.store.packed import TargetReader
from kvdistill.store.shards import StoreReader, find_store

FIT_KIND = "aligner"
MEASURED = 64  # examples of a batch that is only looked at


class Arm:
    """One arm of an experiment with one seed.

    Args:
        experiment: what it shares with the others: recipe, run folder, texts.
        teachers: by name, among others those that it learns from.
        recipe: the arm's own, complete.
        name: in the study; empty for a made-up arm.
        trained: by name, the teachers with their own weights, where those that it learns from have random ones: whose
            NLL tells competence, and who wrote what it reads. Unset: `teachers`.
    """

    def __init__(
        self,
        experiment: Setting,
        teachers: Mapping[str, Teacher],
        recipe: ArmRecipe,
        seed: int,
        name: str = "",
        trained: Mapping[str, Teacher] | None = None,
    ) -> None:
        self.experiment, self.recipe, self.seed, self.name = experiment, recipe, seed, name
        self.teachers: dict[str, Teacher] = {teacher: teachers[teacher] for teacher in recipe.teachers}
        self.writers = {teacher: (trained or teachers)[teacher] for teacher in recipe.writers}
        self._judges = trained if trained is not None and recipe.control == "untrained" else {}
        self.device = experiment.device
        self.uses_teachers = recipe.needs_kv or recipe.needs_logits
        self._readers: dict[str, dict[str, TargetReader]] = {}  # by split: checked once
        self._nll: dict[str, dict[str, Tensor]] = {}  # by split, of the judges
        self._running: dict[str, Callable[[Tensor, Tensor], TeacherTargets]] = {}
        self._outlines: dict[str, MapProjectionAligner] = {}

    @property
    def folder(self) -> Path:
        """Where training and evaluation leave what they make."""
        return arm_folder(self.experiment.run, self.name, self.seed)

    @property
    def runs_online(self) -> bool:
        """Whether its teachers run while it trains, and only held-out targets are stored."""
        return self.experiment.recipe.capture.source == "online"

    def alone(self, name: str) -> Arm:
        """The same arm with one of its teachers, its own texts and no control: what is fitted to that teacher."""
        recipe = self.recipe.model_copy(update={"teachers": [name], "control": None})
        return Arm(self.experiment, self.teachers, recipe, self.seed)

    # -- student beside teachers --------------------------------------------------------------------------

    @cached_property
    def pairings(self) -> dict[str, Pairing]:
        """By teacher whose keys and values are matched."""
        return {name: teacher.pair(self.recipe) for name, teacher in self.teachers.items() if self.recipe.needs_kv}

    @property
    def shared_size(self) -> int:
        """Channels of the arm's shared space: as asked, else those of its narrowest model.

        Raises AlignmentError where a model is narrower than what is asked for.
        """
        shapes = {name: teacher.shape for name, teacher in self.teachers.items()}
        shapes["the student"] = self.experiment.student_shape  # no teacher can have this name
        widths = {name: shape.num_kv_heads * shape.head_size for name, shape in shapes.items()}
        narrowest = min(widths, key=widths.__getitem__)
        asked = self.recipe.align.shared_size
        if (asked or 0) > widths[narrowest]:
            raise AlignmentError(
                f"{asked} shared channels, but {narrowest!r} has {widths[narrowest]}",
                place="align.shared_size",
                fix=f"1 to {widths[narrowest]}, or leave it out",
            )
        return asked or widths[narrowest]

    def new_aligner(self, name: str) -> MapProjectionAligner:
        """The aligner to one teacher, with its seeded initial projector and nothing fitted yet."""
        sizes = self.pairings[name]
        teacher, student = sizes.teacher, sizes.student
        return MapProjectionAligner(
            self.recipe.align,
            (teacher.num_layers, teacher.num_kv_heads, teacher.head_size),
            (student.num_layers, student.num_kv_heads, student.head_size),
            sizes.student_layers,
            seed=derive_seed(self.seed, "aligner", name),
            layer_map=sizes.mapping,
            query_heads=(teacher.num_heads, student.num_heads) if self.recipe.compares_attention else None,
            shared_size=self.shared_size if self.recipe.align.match_in == "shared" else None,
        )

    def outline_of_aligner(self, name: str) -> MapProjectionAligner:
        """An aligner to one teacher of the right sizes, for what it would cost: which layers it reads may not be known
        yet. Kept."""
        if name not in self._outlines:
            align = self.recipe.align
            if align.layers == "cka":
                align = align.model_copy(update={"layers": "ratio", "layer_map": None})
            recipe = self.recipe.model_copy(update={"align": align})
            self._outlines[name] = Arm(self.experiment, self.teachers, recipe, self.seed).new_aligner(name)
        return self._outlines[name]

    # -- fits ---------------------------------------------------------------------------------------------

    def fit_identity(self, name: str) -> dict[str, Any]:
        """Everything that the fit to one teacher depends on."""
        mapping = self.pairings[name].mapping
        shared = self.teachers.values() if self.recipe.align.match_in == "shared" else ()
        own = fit_options(self.recipe, self.experiment.recipe.student, self.seed)
        return {
            **self.teachers[name].target_identity("train"),
            "align": own.pop("align"),
            "layer_map": [mapping.index.tolist(), mapping.weight.tolist()],
            "together": {teacher.name: teacher.target_identity("train") for teacher in shared},
            **own,
        }

    def fitted(self, name: str) -> StoreReader:
        """What `fit` left for one teacher. Raises StoreError where it is not there.

        Shard 0: `aligner.*`, `prototypes` for similarity, and `moments.*` for noise. extra: what it noted of the
        calibration texts.
        """
        identity = self.fit_identity(name)
        return StoreReader(
            find_store(fit_root(self.experiment.run), FIT_KIND, name, identity, make="kvdistill fit RECIPE")
        )

    # -- texts and targets --------------------------------------------------------------------------------

    @cached_property
    def own_numbers(self) -> Sequence[int]:
        """Rows of the run's training split that it has: all, or those of the first share (`problems`) of each task."""
        own = self.experiment.split("train")
        return range(len(own)) if self.recipe.problems == 1 else first_share(own, self.recipe.problems)

    @cached_property
    def lessons(self) -> Sequence[Example]:
        """What its batches are of: the run's training problems, and behind them those that `texts` adds. It trains on
        `own_numbers` of the first, and on all of the others."""
        own = self.experiment.split("train")
        if self.recipe.texts == "teachers":
            own = RowsBehind(own, studied_beside(self.experiment, self.recipe.texts_from))
        elif self.recipe.texts == "written":
            own = RowsBehind(own, written_beside(self.experiment, self.recipe.texts_from, self.own_numbers))
        return self.as_read(own)

    def as_read(self, rows: Sequence[Example]) -> Sequence[Example]:
        """Rows as its student reads them."""
        return as_read(rows, self.recipe.reasoning)

    def batches(
        self, split: str, *, mismatched: bool | None = None, seed: int | None = None, stored: bool = True
    ) -> BatchMaker:
        """Batches of the examples whose targets are captured, with all that the arm's teachers read and gave.

        Args:
            split: `train` (as training reads it) or `val`.
            mismatched: teachers' texts of other examples, or those of the same without a control, whatever the arm
                says; unset: as it says.
            seed: of mismatches and random compression; unset: the arm's.
            stored: with the targets in the store, where the arm reads any; else teachers are to be run.
        """
        arm = self.recipe
        if mismatched is not None:
            arm = arm.model_copy(update={"control": "placebo" if mismatched else None})
        stored = stored and self.uses_teachers and (split != "train" or not self.runs_online)
        if stored and split not in self._readers:
            self._readers[split] = {name: teacher.targets(split) for name, teacher in self.teachers.items()}
            if arm.needs_nll:
                judges = {name: self._judges[name].targets(split).nll() for name in self.teachers if self._judges}
                self._nll[split] = {name: nll_N for name, nll_N in judges.items() if nll_N is not None}
        texts = {name: teacher.text(split) for name, teacher in self.teachers.items()}
        return BatchMaker(
            self.lessons if split == "train" else self.as_read(self.experiment.examples(split)),
            self.experiment.tokenizer.pad_token_id,
            arm,
            self._readers[split] if stored else {},
            self.seed if seed is None else seed,
            {name: text for name, text in texts.items() if text is not None},
            {name: one.sources for name, one in self.pairings.items()} if arm.needs_scores else {},
            self._moments if arm.control == "noise" and arm.needs_kv else {},
            self._nll.get(split, {}) if stored else {},
            self.experiment.vocab_size,
            pieces={name: self.teachers[name].pieces for name, text in texts.items() if text and arm.needs_logits},
            partners=self.own_numbers if split == "train" else None,
            step_marks=self.step_marks,
        )

    @cached_property
    def step_marks(self) -> dict[str, StepMarks]:
        """What finds the ends of steps in each teacher's tokens; none where the arm does not ask for them."""
        compress, arm = self.recipe.compress, self.recipe
        if compress.kv_compression != "steps" or compress.step_mark is None:
            return {}
        read_by = {name: teacher.tokenizer for name, teacher in self.teachers.items() if arm.needs_kv}
        read_by |= {ITSELF: self.experiment.tokenizer} if arm.learns_from_itself else {}
        return {name: StepMarks(tokenizer, compress.step_mark) for name, tokenizer in read_by.items()}

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        """Of every teacher's channels, as its fit noted them: on the device, where noise is drawn."""
        return {name: Moments.from_tensors(self.fitted(name).shards[0]).to(self.device) for name in self.teachers}

    def load(self, batches: BatchMaker, numbers: Sequence[int]) -> Batch:
        """One batch on the device, with targets."""
        return self.run_teachers(batches(numbers).to(self.device))

    def run_teachers(self, batch: Batch) -> Batch:
        """The batch with targets, where teachers run online; else as it is."""
        if not batch.teacher_inputs:
            return batch
        for name in batch.teacher_inputs.keys() - self._running.keys():
            self._running[name] = self._online(self.teachers[name])
        return batch.with_targets({name: self._running[name](*given) for name, given in batch.teacher_inputs.items()})

    def _online(self, teacher: Teacher) -> Callable[[Tensor, Tensor], TeacherTargets]:
        """A function (ids, segments) -> targets that runs the teacher now, and only as far as this arm needs."""
        model, arm = teacher.load(), self.recipe
        layers = teacher.layers if arm.needs_kv else []
        top_k = teacher.top_k if arm.needs_logits else 0
        means = teacher.channel_means(model) if layers else None

        def run_now(ids_BS: Tensor, segments_BS: Tensor) -> TeacherTargets:
            return run_teacher(
                model,
                ids_BS,
                segments_BS,
                layers=layers,
                dtype=self.experiment.recipe.capture.dtype,
                want_nll=arm.needs_nll,
                top_k=top_k,
                queries=arm.needs_queries,
                means=means,
            )

        return run_now

    def training_order(self, num_batches: int | None = None) -> list[int]:
        """Numbers of `lessons` for the whole training (of all ranks), or for its first batches; the same for every arm
        that reads the same, and of any two of them the shorter one begins the longer one."""
        if num_batches is None:
            num_batches = self.num_batches(self.recipe.train.steps)
        return self.order_of(len(self.lessons), num_batches)

    def order_of(self, num_lessons: int, num_batches: int) -> list[int]:
        """The same for so many lessons, also where they are still to be written."""
        numbers = [*self.own_numbers, *range(len(self.experiment.split("train")), num_lessons)]
        num_needed = num_batches * self.recipe.train.batch_size
        return [numbers[i] for i in data_order(len(numbers), num_needed, derive_seed(self.seed, "data"))]

    def num_batches(self, steps: int) -> int:
        """Micro-batches of so many steps, of all ranks."""
        return steps * self.recipe.train.accumulation * int(os.environ.get("WORLD_SIZE", 1))

    @cached_property
    def lesson_lengths(self) -> Sequence[int]:
        """Tokens of each of its lessons."""
        own = self.recipe.texts == "own" and self.recipe.reasoning != "none"
        return self.experiment.train_lengths if own else [len(example.input_ids) for example in self.lessons]

    @cached_property
    def question_sizes(self) -> Sequence[tuple[int, int]]:
        """Tokens of the prompt and of the answer of each of its lessons."""
        return question_sizes(self.lessons)

    def calibration_rows(self, most: int | None = None) -> list[int]:
        """Numbers of the training examples that aligners are fitted on, or the first `most` of them."""
        generator = torch.Generator().manual_seed(derive_seed(self.experiment.recipe.data.seed, "calibration"))
        order = torch.randperm(len(self.own_numbers), generator=generator).tolist()
        return [self.own_numbers[i] for i in order[: self.recipe.align.calibration_examples][:most]]

    def calibration_numbers(self, most: int | None = None) -> list[list[int]]:
        """The same in batches."""
        return self._in_batches(self.experiment.examples("train"), self.calibration_rows(most))

    def held_out_numbers(self, most: int) -> list[list[int]]:
        """Of `batches("val")`, evenly over the tasks, in batches."""
        most = min(most, self.experiment.recipe.evaluate.match_examples)
        examples = self.experiment.examples("val")
        return self._in_batches(examples, spread(examples, most))

    def measured_in(
        self, examples: Sequence[Example], numbers: Sequence[int], *, head: bool, kv: bool, most: int = MEASURED
    ) -> list[list[int]]:
        """These examples in batches of what a pass without a graph has room for, at most `most` of them each.

        head: logits of completions are made. kv: keys and values of both sides are held beside each other.
        """
        mine, layers = self.experiment.student_shape, 0
        per_token = 4 * mine.intermediate_size
        for sizes in self.pairings.values() if kv else ():
            layers = len(sizes.student_layers)
            theirs = sizes.teacher.num_kv_heads * sizes.teacher.head_size
            # captured; mapped or projected on both sides; their difference
            per_token += 2 * theirs * (len(sizes.teacher_layers) + 3 * layers)
        per_token += 2 * 3 * layers * mine.num_kv_heads * mine.head_size

        def elements(chosen: Sequence[int]) -> int:
            segments = [examples[i].segments for i in chosen]
            num_predicted = sum(code != PROMPT for row in segments for code in row) if head else 0
            return 3 * mine.vocab_size * num_predicted + per_token * len(chosen) * max(map(len, segments))

        rows = Rows(most).batches(numbers, elements, elements_at_once(self.device))
        return [list(chosen) for chosen in rows]

    def _in_batches(self, examples: Sequence[Example], numbers: Sequence[int]) -> list[list[int]]:
        most = self.experiment.recipe.capture.batch_size
        return self.measured_in(examples, numbers, head=False, kv=True, most=most)

    # -- both sides ---------------------------------------------------------------------------------------

    @cached_property
    def frames(self) -> dict[str, Callable[[KV], KV]]:
        """By teacher: targets come unrotated; where the arm compares rotated keys, this turns them as it does."""
        rotated = self.recipe.align.keys == "rotated"
        return {name: teacher.rotation() if rotated else _as_it_is for name, teacher in self.teachers.items()}

    def teacher_kv(self, batch: Batch, name: str) -> KV:
        """A teacher's keys and values for a batch, in the frame in which they are compared."""
        kv = batch.targets[name].kv
        assert kv is not None
        return self.frames[name](kv)

    def student_kv(self, student: Student, batch: Batch) -> KV:
        """The student's, without graph; with queries where the arm compares attention."""
        layers = next(iter(self.pairings.values())).student_layers
        with torch.no_grad():
            kv = student(
                batch.input_ids_BT,
                batch.mask_BT,
                layers=layers,
                queries=self.recipe.compares_attention,
                keys=self.recipe.align.keys,
                head=False,
            ).kv
        assert kv is not None
        return kv

    def pairs(
        self, student: Student, batches: BatchMaker, numbers: Sequence[Sequence[int]], name: str
    ) -> Iterator[tuple[Batch, KV, KV]]:
        """Batch after batch: (batch, teacher's KV, student's KV)."""
        for chosen in numbers:
            batch = self.load(batches, chosen)
            yield batch, self.teacher_kv(batch, name), self.student_kv(student, batch)

    # -- what learns --------------------------------------------------------------------------------------

    @cached_property
    def initial_model(self) -> PreTrainedModel:
        """The student's model as training starts it. `distiller` goes on with this very one."""
        return self.experiment.initial_model(self.seed)

    @cached_property
    def distiller(self) -> Distiller:
        """Student (with adapters where asked for), fitted aligners and fusion, ready to train, on the device."""
        student = self._new_student().to(self.device)
        if not self.uses_teachers:
            alone = self.recipe.model_copy(update={"teachers": []})
            return Distiller(student, alone, student_layers=self.own_layers if alone.learns_from_itself else ())
        in_teacher = self.recipe.compares_attention and self.recipe.align.match_in == "teacher"
        aligners: dict[str, MapProjectionAligner] = {}
        prototypes: list[Tensor] = []
        rotations: dict[str, Callable[[KV], KV]] = {}
        layers: tuple[int, ...] = ()
        for name, pairing in self.pairings.items():
            tensors: Mapping[str, Tensor] = self.fitted(name).shards[0]
            aligner = self.new_aligner(name)
            fitted = {k.removeprefix("aligner."): v for k, v in tensors.items() if k.startswith("aligner.")}
            aligner.load_state_dict({**aligner.state_dict(), **fitted})
            aligners[name], layers = aligner.to(self.device), pairing.student_layers
            if in_teacher:
                rotations[name] = self.teachers[name].rotation()
            if "prototypes" in tensors:
                prototypes.append(tensors["prototypes"].to(self.device))
        fusion = build_fusion(self.recipe.fuse, self.recipe.teachers, max(1, len(layers)), prototypes or None)
        frames = self.frames if self.recipe.needs_kv else {}
        return Distiller(student, self.recipe, aligners, fusion, layers, frames, rotations)

    def _new_student(self) -> CausalStudent | LatentStudent:
        recipe = self.experiment.recipe.student
        options: dict[str, Any] = {
            "lora": recipe.lora,
            "seed": derive_seed(self.seed, "lora"),
            "gradient_checkpointing": recipe.gradient_checkpointing,
        }
        if self.recipe.thinks:
            return LatentStudent.around(self.initial_model, self.recipe.latent, **options)
        return CausalStudent(self.initial_model, **options)

    @property
    def own_layers(self) -> list[int]:
        """Of the student, those whose keys and values are compared (loss.distill_layers)."""
        return parse_layer_range(self.recipe.loss.distill_layers, self.experiment.student_shape.num_layers)


def fit_options(arm: ArmRecipe, student: StudentRecipe, seed: int) -> dict[str, Any]:
    """What the fits of an arm depend on beside the teachers' targets and the layers that are read."""
    align, similarity = arm.align, arm.fuse.fusion_strategy == "similarity"
    trained = align.match_in == "teacher" if align.train_projector is None else align.train_projector
    # a closed-form projector is fitted against the student's own initial keys and values
    needs_student = align.init == "ridge" or not trained
    return {
        "align": align.model_dump(mode="json"),
        "attention": arm.compares_attention,
        "distill_layers": arm.loss.distill_layers,
        "compress": arm.compress.model_dump(mode="json"),
        "kv_on": arm.loss.kv_on,
        "student": student.model_dump(mode="json"),
        "seed": seed if needs_student or (similarity and align.match_in != "teacher") else None,
        "prototype": [arm.fuse.prototype, arm.fuse.num_prototypes] if similarity else None,
        **({"moments": True} if arm.control == "noise" else {}),
        **({"problems": arm.problems} if arm.problems < 1 else {}),
        **({"slots": arm.latent.tokens} if arm.thinks else {}),
    }


def _as_it_is(kv: KV) -> KV:
    return kv
