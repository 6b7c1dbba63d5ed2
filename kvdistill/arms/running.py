"""A teacher on its device, run on a batch: the same targets whether they go to the store or straight to training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvdistill.arms.sources import teacher_place, teacher_recipe, teacher_source
from kvdistill.arms.texts import teacher_vocab_size
from kvdistill.compress import rkv_layer_scores
from kvdistill.core.kv import KV
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import DTYPES
from kvdistill.core.segments import ANSWER
from kvdistill.core.targets import TeacherTargets
from kvdistill.losses import answer_attention
from kvdistill.models import auto_class, load_model, model_config, rotate_keys, teacher_forward


def load_teacher(recipe: Recipe, run: Path, name: str, device: torch.device) -> PreTrainedModel:
    """The teacher on its device, frozen, in eval mode."""
    source, teacher = teacher_source(recipe, run, name), teacher_recipe(recipe, name)
    model = load_model(source, vocab_size=teacher_vocab_size(run, teacher), seed=0, place=teacher_place(recipe, name))
    return model.requires_grad_(False).eval().to(device)  # type: ignore[arg-type]


def run_teacher(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    segments_BS: Tensor,
    *,
    layers: Sequence[int],
    dtype: str,
    want_nll: bool = True,
    top_k: int = 0,
    queries: bool = False,
    scores: bool = False,
) -> TeacherTargets:
    """Targets of one batch straight from the model, rounded to `dtype` as the store would.

    queries: with the KV. scores: what the teacher's attention says of each token (`token_scores`).
    """
    out = teacher_forward(
        model,
        input_ids_BS,
        segments_BS > 0,
        segments_BS,
        layers=list(layers) or None,
        want_kv=bool(layers),
        want_nll=want_nll,
        want_logits_top_k=top_k,
        want_queries=queries,
        scorer=token_scores if scores else None,
    )
    if out.kv is not None and out.kv.keys[0].dtype != DTYPES[dtype]:
        return replace(out, kv=out.kv.map_layers(lambda x: x.to(DTYPES[dtype])))
    return out


def token_scores(kv: KV, segments_BS: Tensor) -> Tensor:
    """Of every token, in every layer and KV head [B, S, M, 3, G]: importance and redundancy (R-KV, over the reasoning
    tokens), and the attention that the answer pays to it (mean over query heads; over all tokens).

    kv: as attention sees it, with queries.
    """
    queries = list(kv.queries)
    if kv.scaling is not None:  # both functions divide by sqrt(size), as most models do
        factors = [one * key.shape[-1] ** 0.5 for one, key in zip(kv.scaling, kv.keys, strict=True)]
        queries = [q * factor for q, factor in zip(queries, factors, strict=True)]
    rkv_MB2GS = rkv_layer_scores(queries, kv.keys, segments_BS)
    q, k = (torch.stack([x.transpose(1, 2) for x in side]) for side in (queries, kv.keys))
    paid_MBS = answer_attention(q, k, segments_BS == ANSWER, kv.mask_BT)
    paid_MB1GS = paid_MBS[:, :, None, None].expand(-1, -1, 1, kv.keys[0].shape[1], -1)
    return torch.cat([rkv_MB2GS, paid_MB1GS], dim=2).permute(1, 4, 0, 2, 3)


def key_frame(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, device: torch.device) -> Callable[[KV], KV]:
    """Targets come unrotated; where the arm compares rotated keys, this turns them, with the teacher's own rotary."""
    if arm.align.keys == "unrotated":
        return lambda kv: kv
    return teacher_rotation(recipe, name, device)


def teacher_rotation(recipe: Recipe, name: str, device: torch.device) -> Callable[[KV], KV]:
    """Keys and queries turned as this teacher turns them, at the positions that the KV carries; without its weights."""
    config = model_config(teacher_recipe(recipe, name), 1, teacher_place(recipe, name))
    small = copy.deepcopy(config)  # one layer and one word: all that is needed of it is the rotary module
    small.num_hidden_layers, small.vocab_size = 1, 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    model = auto_class(small).from_config(small).to(device)
    if getattr(config, "layer_types", None):
        model.config.layer_types = config.layer_types  # which layer turns in which way is still asked by its number
    return lambda kv: rotate_keys(kv, model)
