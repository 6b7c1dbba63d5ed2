"""A teacher of a study: what it is, what it reads, what the arms want of it, and what it gave."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvdistill.align import layer_map, parse_layer_range
from kvdistill.align.layers import read_layer_similarity
from kvdistill.arms.order import data_order
from kvdistill.arms.pairing import Pairing, shape_of
from kvdistill.arms.setting import Setting
from kvdistill.arms.teacher_pass import run_teacher
from kvdistill.arms.texts import (
    SPAN_NAMES,
    PickedRows,
    SpanTable,
    TeacherText,
    load_prepared_tokenizer,
    may_have_own_text,
    own_table_path,
    own_tokenizer_folder,
    spans_path,
    teacher_place,
)
from kvdistill.core.errors import DataError, RecipeError, RunFolderError
from kvdistill.core.files import open_tensors, read_json, sha256_file, sha256_of, write_json
from kvdistill.core.kv import KV
from kvdistill.core.layout import (
    data_folder,
    layers_folder,
    store_root,
    teacher_folder,
    teacher_texts_folder,
    trained_mark,
)
from kvdistill.core.marks import check_marked, read_mark, read_sealed, sealed
from kvdistill.core.recipe import UNTRAINED, ArmRecipe, ModelRecipe, TeacherRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.core.targets import ChannelMeans
from kvdistill.data.encode import Example
from kvdistill.data.pieces import tell_pieces
from kvdistill.data.tables import check_file, read_table
from kvdistill.models import (
    ModelShape,
    batch_geometry,
    forward_flops,
    load_model,
    model_config,
    rotary_only,
    rotate_keys,
)
from kvdistill.models.generate import right_padded
from kvdistill.store.packed import TargetReader
from kvdistill.store.shards import find_store


class Teacher:
    """One teacher of an experiment, by its name. Asks the disk when it is asked; loads weights only in `load`.

    untrained: the same with random weights (`control: untrained`): texts, layers, layer maps and what is captured are
    the trained one's, its targets and their identity are its own. A scratch teacher is then what its training began
    with, of a `path` its configuration is drawn by the family's own rule, from the teacher's seed.
    """

    def __init__(self, experiment: Setting, name: str, *, untrained: bool = False) -> None:
        self.experiment, self.name, self._data_run = experiment, name, experiment.data_run
        self.recipe: TeacherRecipe = next(t for t in experiment.recipe.teachers if t.name == name)
        self.place = teacher_place(experiment.recipe, name)  # in errors
        self.is_untrained = untrained
        self.stored_as = name + UNTRAINED if untrained else name

    @property
    def folder(self) -> Path:
        """Where it is trained, and what is noted of its weights. Published weights are those of all seeds."""
        scratch = self.recipe.scratch is not None
        return teacher_folder(self.experiment.teachers_run if scratch else self.experiment.run, self.name)

    # -- what it reads ------------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> dict[str, Any]:
        """What `prepare` found about its texts: own_text, one_text, tokenizer, files. Raises RunFolderError."""
        if not may_have_own_text(self.recipe):
            return {"own_text": False, "one_text": True, "tokenizer": None}
        path = teacher_texts_folder(self._data_run, self.name) / "manifest.json"
        if not path.is_file():
            raise RunFolderError(
                f"the texts of teacher {self.name!r} are not prepared",
                place=str(path),
                fix="run `kvdistill prepare` first",
            )
        return read_sealed(path, fix=f"delete {path.parent} and run `kvdistill prepare` again")

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of what this teacher reads; the run's where it has none of its own."""
        folder = own_tokenizer_folder(self._data_run, self.name)
        if self.texts["own_text"] and folder.is_dir():
            return load_prepared_tokenizer(folder, self.texts["tokenizer"])
        return self.experiment.tokenizer

    @property
    def vocab_size(self) -> int:
        own = self.texts["tokenizer"]
        return self.experiment.vocab_size if own is None else int(own["size"])

    @cached_property
    def pieces(self) -> tuple[Tensor, Tensor]:
        """How the pieces of its tokenizer are told in the student's (`tell_pieces`)."""
        return tell_pieces(self.tokenizer, self.experiment.tokenizer)

    def lessons(self, split: str) -> Sequence[Example]:
        """The whole split as this teacher reads it: what it is trained and tested on."""
        if not self.texts["own_text"]:
            return self.experiment.split(split)
        path = own_table_path(self._data_run, self.name, split)
        return read_table(path, self.texts["files"][path.name])

    def studied(self) -> list[Example]:
        """What a scratch teacher is trained on: the students' training problems of its tasks, and the `teach` problems
        beside them.

        `data.disjoint_teachers`: only the latter, so that no student sees a text that its teacher was trained on.
        DataError where there are none.
        """
        splits = ("teach",) if self.experiment.recipe.data.disjoint_teachers else ("train", "teach")
        lessons = (example for split in splits for example in self.lessons(split))
        if found := [example for example in lessons if example.task in self.recipe.train_on]:
            return found
        raise DataError(
            f"no training examples of {', '.join(self.recipe.train_on)}",
            place=self.place,
            fix=f"give these tasks a `{splits[0]}` count above 0",
        )

    def training_order(self, num_examples: int) -> list[int]:
        """Example numbers for the whole training of a scratch teacher, of all ranks."""
        optimiser = self.recipe.optimiser
        num_needed = optimiser.steps * optimiser.batch_size * optimiser.accumulation
        num_needed *= int(os.environ.get("WORLD_SIZE", 1))
        return data_order(num_examples, num_needed, derive_seed(self.recipe.seed, "data", self.name))

    @cached_property
    def training_flops(self) -> tuple[int, int]:
        """Forward and backward of training a scratch teacher. Nothing is trained: it is counted."""
        lengths = [len(example.input_ids) for example in self.studied()]
        tokens, squares = batch_geometry(lengths[i] for i in self.training_order(len(lengths)))
        forward = forward_flops(self.shape, tokens, squares)
        return forward, 2 * forward

    def text(self, split: str) -> TeacherText | None:
        """Its own texts for `Setting.examples(split)`, or None where it reads what the student reads."""
        if not self.texts["own_text"]:
            return None
        theirs, numbers = self.lessons(split), self.experiment.numbers(split)
        assert len(theirs) == len(self.experiment.split(split)), (
            "texts of teachers stand row by row beside the student's"
        )
        tables: list[SpanTable | None] = [None, None]
        if self.texts["one_text"]:
            path = spans_path(self._data_run, self.name, split)
            check_file(path, self.texts["files"][path.name])
            tensors = open_tensors(path)
            tables = [SpanTable(*(tensors[f"{side}.{name}"] for name in SPAN_NAMES)) for side in ("own", "students")]
        return TeacherText(PickedRows(theirs, numbers), int(self.texts["pad_id"]), tables[0], tables[1], numbers)

    def examples(self, split: str) -> Sequence[Example]:
        """`Setting.examples(split)` as this teacher reads them."""
        text = self.text(split)
        return self.experiment.examples(split) if text is None else text.examples

    @cached_property
    def train_sizes(self) -> list[tuple[int, int]]:
        """(tokens, prompt tokens) of each training example, as it reads them."""
        return [(len(example.input_ids), example.num_prompt_tokens) for example in self.examples("train")]

    # -- which model it is --------------------------------------------------------------------------------

    @property
    def shape(self) -> ModelShape:
        return shape_of(self.recipe, self.vocab_size, self.place)

    @property
    def source(self) -> ModelRecipe:
        """Where its weights are: its own path, or the run folder when it is trained on the spot.

        Raises RunFolderError where it is not trained yet.
        """
        path = self.recipe.path
        if self.recipe.scratch is not None:
            folder = self.folder
            if read_mark(trained_mark(folder)) is None:
                raise RunFolderError(
                    f"teacher {self.name!r} is not trained yet",
                    place=str(folder),
                    fix="run `kvdistill teach RECIPE` first",
                )
            path = str(folder / "model")
        kept = {"dtype", "attention", "trust_remote_code", "gguf_file", "keep_layers"}
        options = self.recipe.model_dump(include=kept if self.recipe.path else kept - {"gguf_file", "keep_layers"})
        return ModelRecipe(path=path, **options)

    @property
    def fingerprint(self) -> str:
        """Hash of its weight files; a hub model's commit. Noted in the run folder against size and time. Untrained: of
        what random weights depend on."""
        if self.is_untrained:
            config = json.loads(model_config(self.recipe, self.vocab_size, self.place).to_json_string(use_diff=False))
            for key in ("_name_or_path", "transformers_version"):
                config.pop(key, None)
            return f"untrained:{sha256_of({'config': config, 'seed': self.initial_seed})}"
        source = self.source
        assert source.path is not None
        folder = Path(source.path).expanduser()
        if not folder.is_dir():
            config = model_config(source, 1, self.place)
            return f"hub:{source.path}@{getattr(config, '_commit_hash', None)}"
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf"), *folder.glob("config.json")])
        if not any(folder.glob("*.gguf")) and not (folder / "config.json").is_file():
            self._check_files()  # names it
            raise RunFolderError("this folder has no config.json", place=str(folder), fix="copy the model again")
        stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
        note = self.folder / "fingerprint.json"
        known = read_mark(note)  # a damaged note says nothing
        if known is not None and known["stamp"] == stamp:
            return str(known["files"])
        self._check_files()
        digest = sha256_of([[f.name, sha256_file(f)] for f in files])
        write_json(note, sealed({"stamp": stamp, "files": digest}))
        return digest

    @property
    def initial_seed(self) -> int:
        """Of random weights: those that a scratch teacher's training begins with, and those of an untrained one."""
        return derive_seed(self.recipe.seed, self.name)

    def _check_files(self) -> None:
        if self.recipe.scratch is not None:
            check_marked(trained_mark(self.folder), "model/", fix=f"delete {self.folder} and teach it again")

    @property
    def identities(self) -> dict[str, Any]:
        """What a file of layer similarities is of: `teacher` by its weights, `student` by its source and first seed.

        An untrained teacher's layers are mapped as the trained one's: an arm and its control match the same layers.
        """
        recipe = self.experiment.recipe
        student = recipe.student.model_dump(mode="json", include={"path", "scratch", "dtype"})
        if recipe.student.keep_layers is not None:
            student["keep_layers"] = recipe.student.keep_layers
        seed = recipe.seeds[0] if recipe.student.scratch is not None else None
        trained = Teacher(self.experiment, self.name) if self.is_untrained else self
        return {"teacher": trained.fingerprint, "student": sha256_of({"student": student, "seed": seed})}

    @property
    def similarity_path(self) -> Path:
        """Where `map-layers` leaves how alike the student's layers and this teacher's are."""
        return layers_folder(self.experiment.own_run) / f"{self.name}.json"

    # -- what the arms want of it -------------------------------------------------------------------------

    def pair(self, arm: ArmRecipe) -> Pairing:
        """Sizes and layer map of an arm's student and this teacher. Raises RecipeError for layers outside a model."""
        theirs, mine, align = self.shape, self.experiment.student_shape, arm.align
        layers = tuple(parse_layer_range(arm.loss.distill_layers, mine.num_layers))
        sizes = theirs.num_layers, mine.num_layers
        if align.layers != "cka":
            explicit = align.layer_map if align.layers == "explicit" else None
            return Pairing(theirs, mine, layers, layer_map(align.layers, *sizes, explicit))
        mapping = layer_map(
            "cka",
            *sizes,
            str(align.layer_map or self.similarity_path),
            top_k=align.cka_top_k,
            monotone=align.cka_monotone,
            on=align.cka_on,
            **self.identities,
        )
        return Pairing(theirs, mine, layers, mapping)

    def check_pair(self, arm: ArmRecipe) -> None:
        """What `pair` would say, as far as it can be said before the teacher is trained and its layers are compared."""
        if arm.align.layers != "cka":
            self.pair(arm)
            return
        num_layers, of_student = self.shape.num_layers, self.experiment.student_shape.num_layers
        parse_layer_range(arm.loss.distill_layers, of_student)
        if arm.align.cka_top_k > num_layers:
            raise RecipeError(
                f"{arm.align.cka_top_k} teacher layers for each student layer, the teacher has {num_layers}",
                place="align.cka_top_k",
                fix=f"choose between 1 and {num_layers}",
            )
        if isinstance(arm.align.layer_map, dict):
            raise RecipeError(
                "layers: cka reads a file that map-layers wrote",
                place="align.layer_map",
                fix="leave it out, or name a file",
            )
        if isinstance(arm.align.layer_map, str):  # of models that are not trained yet: their numbers of layers at least
            who = {} if self.recipe.scratch is not None else self.identities
            read_layer_similarity(arm.align.layer_map, num_layers, of_student, on=arm.align.cka_on, **who)

    @cached_property
    def _arms(self) -> list[ArmRecipe]:
        return [arm for arm in self.experiment.arms.values() if self.name in arm.teachers]

    @property
    def layers(self) -> list[int]:
        """Its layers that any arm matches, ascending; none where only its logits are used."""
        needed: set[int] = set()
        for arm in self._arms:
            if arm.needs_kv:
                needed.update(self.pair(arm).teacher_layers)
        return sorted(needed)

    @property
    def top_k(self) -> int:
        """Logits per token that the store keeps: none where no arm distils this teacher's logits."""
        wanted = any(arm.needs_logits for arm in self._arms)
        return self.experiment.recipe.capture.logits_top_k if wanted else 0

    @property
    def queries(self) -> bool:
        """Whether an arm compares this teacher's attention: keys and values are not enough then."""
        return any(arm.needs_queries for arm in self._arms)

    @property
    def scores(self) -> bool:
        """Whether an arm asks which of its tokens this teacher finds important."""
        return any(arm.needs_scores for arm in self._arms)

    @property
    def is_centred(self) -> bool:
        """Whether rounding to `capture.dtype` loses something, so that each channel's mean is taken out before it."""
        return self.experiment.recipe.capture.dtype not in ("float32", self.recipe.dtype)

    def channel_means(self, model: PreTrainedModel) -> ChannelMeans | None:
        """Of the first training texts: the same for the store and for a teacher that runs in every step.

        None where nothing is lost, or no keys and values are wanted.
        """
        if not self.is_centred or not self.layers:
            return None
        rows = self.examples("train")[: self.experiment.recipe.capture.batch_size]
        ids = right_padded([row.input_ids for row in rows], self.tokenizer.pad_token_id).to(model.device)
        segments = right_padded([row.segments for row in rows], 0).to(model.device)
        options: dict[str, Any] = {"layers": self.layers, "dtype": "float32", "queries": self.queries}
        return ChannelMeans.of(run_teacher(model, ids, segments, want_nll=False, **options))

    # -- what it gave -------------------------------------------------------------------------------------

    def target_identity(self, split: str) -> dict[str, Any]:
        """Everything that captured targets depend on: weights, tokenizer, texts, layers, options."""
        capture = self.experiment.recipe.capture
        manifest = self.texts if self.texts["tokenizer"] else read_json(data_folder(self._data_run) / "manifest.json")
        return {
            "teacher": self.fingerprint,
            "tokenizer": str(manifest["tokenizer"]["fingerprint"]),
            "texts": sha256_of([[e.doc_hash, e.style, len(e.input_ids)] for e in self.examples(split)]),
            "layers": self.layers,
            "dtype": capture.dtype,
            "logits_top_k": self.top_k,
            "attention": self.recipe.attention,
            "teacher_dtype": self.recipe.dtype,
            **({"centred": True} if self.is_centred and self.layers else {}),
            **({"queries": True} if self.queries else {}),
            **({"scores": True} if self.scores else {}),
            **{key: value for key in ("gguf_file", "keep_layers") if (value := getattr(self.recipe, key)) is not None},
            # 1: with each layer's window, cap and sink
            **({"attention_rules": 1} if self.queries or self.scores else {}),
        }

    def target_folder(self, split: str) -> Path:
        """Where its captured targets are. A StoreError says what differs."""
        identity = self.target_identity(split)
        return find_store(
            store_root(self.experiment.run),
            f"targets-{split}",
            self.stored_as,
            identity,
            make="kvdistill capture RECIPE",
        )

    def targets(self, split: str) -> TargetReader:
        """Its captured targets. A StoreError says what differs, or which shard is broken."""
        return TargetReader(self.target_folder(split))

    # -- how it is run ------------------------------------------------------------------------------------

    def load(self) -> PreTrainedModel:
        """The model on the experiment's device, frozen, in eval mode. RunFolderError where its files were altered."""
        if self.is_untrained:
            options: dict[str, Any] = {"seed": self.initial_seed, "place": self.place, "untrained": True}
            model = load_model(self.recipe, vocab_size=self.vocab_size, **options)
        else:
            self._check_files()
            model = load_model(self.source, vocab_size=self.vocab_size, seed=0, place=self.place)
        return model.requires_grad_(False).eval().to(self.experiment.device)  # type: ignore[arg-type]

    def rotation(self) -> Callable[[KV], KV]:
        """Keys and queries turned as it turns them, at the positions that the KV carries; without its weights."""
        model = rotary_only(model_config(self.recipe, 1, self.place), self.experiment.device)
        return lambda kv: rotate_keys(kv, model)
