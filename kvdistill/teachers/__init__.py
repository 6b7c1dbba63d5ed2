"""What stages agree on about teachers. Rank 2: they would have to import each other otherwise.

sources.py     which teacher a name means, and where its weights are
identity.py    whose weights these are
texts.py       what each model reads: its tokenizer, its examples, the characters behind its tokens
tokenizers.py  whether two models cut text alike
pairing.py     sizes and layer maps of student and teacher; what the arms want of each teacher
targets.py     what captured targets depend on, and where they are
running.py     a teacher run on a batch
checks.py      everything that can be wrong before training
"""

from __future__ import annotations

from kvdistill.teachers.checks import check_models
from kvdistill.teachers.identity import model_identities, similarity_path, weights_fingerprint
from kvdistill.teachers.pairing import (
    Pairing,
    captured_top_k,
    captures_queries,
    captures_scores,
    layer_sources_of,
    needed_layers,
    pair,
    shape_of_student,
    shape_of_teacher,
    shared_size,
)
from kvdistill.teachers.running import key_frame, load_teacher, run_teacher, teacher_rotation
from kvdistill.teachers.sources import teacher_place, teacher_recipe, teacher_source
from kvdistill.teachers.targets import open_targets, target_identity
from kvdistill.teachers.texts import (
    TeacherText,
    load_teacher_tokenizer,
    load_tokenizer_of,
    read_examples,
    split_examples,
    spread,
    teacher_lessons,
    teacher_text,
    teacher_texts,
)
from kvdistill.teachers.tokenizers import check_same_tokenizer, check_saved_tokenizer, tokenizer_difference

__all__ = [
    "Pairing",
    "TeacherText",
    "captured_top_k",
    "captures_queries",
    "captures_scores",
    "check_models",
    "check_same_tokenizer",
    "check_saved_tokenizer",
    "key_frame",
    "layer_sources_of",
    "load_teacher",
    "load_teacher_tokenizer",
    "load_tokenizer_of",
    "model_identities",
    "needed_layers",
    "open_targets",
    "pair",
    "read_examples",
    "run_teacher",
    "shape_of_student",
    "shape_of_teacher",
    "shared_size",
    "similarity_path",
    "split_examples",
    "spread",
    "target_identity",
    "teacher_lessons",
    "teacher_place",
    "teacher_recipe",
    "teacher_rotation",
    "teacher_source",
    "teacher_text",
    "teacher_texts",
    "tokenizer_difference",
    "weights_fingerprint",
]
