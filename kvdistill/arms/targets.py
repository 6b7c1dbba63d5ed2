"""What captured targets depend on, and where they are: capture and whoever reads them agree on it to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvdistill.arms.identity import weights_fingerprint
from kvdistill.arms.pairing import captured_top_k, captures_queries, captures_scores, needed_layers, teacher_recipe
from kvdistill.arms.texts import read_examples, tokenizer_fingerprint
from kvdistill.core.files import sha256_of
from kvdistill.core.layout import store_root
from kvdistill.core.recipe import Recipe
from kvdistill.store.packed import TargetReader
from kvdistill.store.shards import find_store


def target_identity(recipe: Recipe, run: Path, name: str, split: str) -> dict[str, Any]:
    """Everything that captured targets depend on: weights, tokenizer, texts, layers, options."""
    teacher = teacher_recipe(recipe, name)
    examples = read_examples(recipe, run, split, teacher)
    extra = {"queries": captures_queries(recipe, name), "scores": captures_scores(recipe, name)}
    return {
        "teacher": weights_fingerprint(recipe, run, name),
        "tokenizer": tokenizer_fingerprint(run, teacher),
        "texts": sha256_of([[e.doc_hash, e.style, len(e.input_ids)] for e in examples]),
        "layers": needed_layers(recipe, run, name),
        "dtype": recipe.capture.dtype,
        "logits_top_k": captured_top_k(recipe, name),
        "attention": teacher.attention,
        "teacher_dtype": teacher.dtype,
        **{what: True for what, wanted in extra.items() if wanted},
    }


def open_targets(recipe: Recipe, run: Path, name: str, split: str) -> TargetReader:
    """The captured targets of one teacher; a StoreError says what differs, or which shard is broken."""
    identity = target_identity(recipe, run, name, split)
    folder = find_store(store_root(run), f"targets-{split}", name, identity, make="kvdistill capture RECIPE")
    return TargetReader(folder)
