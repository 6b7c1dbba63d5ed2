"""The map-layers stage: how alike every student layer is to every layer of each teacher, measured by linear CKA.

Both models read the same training texts (`align.cka_texts`, a seeded choice). At every student token that has teacher
tokens behind it (`align.time`), keys, values or hidden states of all layers of both are compared (`core/cka.py`). Per
teacher it leaves layers/NAME.json, written last, with similarities, settings, both models' identities and the map the
recipe chooses; and NAME.png and NAME.svg, the heatmap. A file of the same models and texts is not measured again.

The student is the one that training starts from. With random weights (`scratch`) its keys still depend on the tokens
it reads, so that CKA has a value, but it says little about what layers will come to mean: use a trained student, or
prefer layers: ratio. Targets are not needed and not stored: all teacher layers are looked at, once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvdistill.align.layers import cka_map, layer_sources, read_layer_similarity
from kvdistill.arms.batches import BatchMaker, moved_to
from kvdistill.arms.identity import model_identities, similarity_path
from kvdistill.arms.running import load_teacher
from kvdistill.arms.texts import load_tokenizer_of, split_examples, teacher_texts
from kvdistill.core.cka import CKAAccumulator
from kvdistill.core.config import arm_recipe
from kvdistill.core.errors import AlignmentError, KVDistillError
from kvdistill.core.files import read_json, replacing, sha256_of, write_json
from kvdistill.core.layout import folder_lock, layers_folder
from kvdistill.core.maps import SparseMap
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import AlignRecipe, ArmRecipe, CompressRecipe, Recipe
from kvdistill.core.runtime import derive_seed, pick_device
from kvdistill.models import capture_kv, find_backbone, load_model, model_kind, positions_from_mask, unrotate_keys

FORMAT = 1  # that `align.layers` reads
BATCH_TEXTS = 8  # all layers of two models at once: small batches
_INK, _WIDTH_INCHES = "#1c1c1c", 9.0


class Pairs(NamedTuple):
    """States of all layers at the same places, by kind (keys, values, hidden), and where there is something to compare.

    teacher, student: [M, B, T, C] and [L, B, T, D], T student tokens. mask_BT: real tokens with a teacher behind them.
    """

    teacher: dict[str, Tensor]
    student: dict[str, Tensor]
    mask_BT: Tensor


def map_layers(recipe: Recipe, run: Path, progress: Progress = silent) -> dict[str, Any]:
    """Measure every teacher of the recipe. Returns per teacher its file, figures, number of vectors, and map.

    Raises AlignmentError naming model and layer where features do not vary or there are too few common tokens,
    RecipeError for more layers (`align.cka_top_k`) than a teacher has.
    """
    done: dict[str, Any] = {}
    with folder_lock(layers_folder(run), wait=True):
        for number, teacher in enumerate(recipe.teachers):
            name = teacher.name
            found = _known(recipe, run, name) or _measure(recipe, run, name, progress, number)
            similarities = {kind: torch.tensor(rows, dtype=torch.float64) for kind, rows in found["similarity"].items()}
            maps = {kind: _chosen(recipe.align, matrix, name) for kind, matrix in similarities.items()}
            figures = _draw(layers_folder(run) / name, similarities, maps, found)
            settings = {"top_k": recipe.align.cka_top_k, "monotone": recipe.align.cka_monotone}
            layer_maps = {kind: _as_words(mapping) for kind, mapping in maps.items()}
            write_json(similarity_path(run, name), found | {"settings": settings, "layer_map": layer_maps})
            done[name] = {
                "file": str(similarity_path(run, name)),
                "figures": [str(figure) for figure in figures],
                "num_vectors": found["num_vectors"],
                "layer_map": layer_maps[recipe.align.cka_on],
            }
            progress("map-layers", number + 1, len(recipe.teachers))
    return done


def _kinds(recipe: Recipe, name: str) -> list[str]:
    """What is measured: what the recipe's alignment asks for, and what its arms do."""
    arms = [arm_recipe(recipe, arm) for arm in recipe.arms]
    wanted = {arm.align.cka_on for arm in arms if name in arm.teachers and arm.align.layers == "cka"}
    return sorted({recipe.align.cka_on} | wanted)


def _texts(recipe: Recipe, run: Path) -> list[int]:
    """Numbers of the training examples that are read."""
    num_examples = len(split_examples(recipe, run, "train"))
    generator = torch.Generator().manual_seed(derive_seed(recipe.data.seed, "map-layers"))
    return sorted(torch.randperm(num_examples, generator=generator)[: recipe.align.cka_texts].tolist())


def _measured_on(recipe: Recipe, run: Path, name: str) -> dict[str, Any]:
    """All that similarities depend on beside the models."""
    batches, align = _batch_maker(recipe, run, name), recipe.align
    read = [batches.examples, *(text.examples for text in batches.texts.values())]
    rows = [[[e.doc_hash, e.style, len(e.input_ids)] for e in (side[i] for side in read)] for i in _texts(recipe, run)]
    time = {"mode": align.time, "segment_ratio": dict(align.segment_ratio), "smoothness": dict(align.smoothness)}
    return {"texts": sha256_of(rows), "num_texts": len(rows), "time": time}


def _known(recipe: Recipe, run: Path, name: str) -> dict[str, Any] | None:
    """What the file holds, where it is of the same models and texts and has all that is wanted."""
    path = similarity_path(run, name)
    try:
        found = read_json(path)
        sizes = found["teacher"]["num_layers"], found["student"]["num_layers"]
        who = model_identities(recipe, run, name)
        for kind in _kinds(recipe, name):
            matrix = read_layer_similarity(path, *sizes, on=kind, teacher=who["teacher"], student=who["student"])
            if not bool(matrix.isfinite().all()):
                return None
        same = found["measured_on"] == _measured_on(recipe, run, name)
    except (KVDistillError, KeyError, TypeError, AttributeError):  # missing, torn or of others: measured anew
        return None
    return found if same else None


def _measure(recipe: Recipe, run: Path, name: str, progress: Progress, number: int) -> dict[str, Any]:
    kinds = _kinds(recipe, name)
    sides = f"teacher {name}", "the student"
    sums = {kind: CKAAccumulator(names=sides) for kind in kinds}
    num_batches = -(-len(_texts(recipe, run)) // BATCH_TEXTS)
    batches = _paired_batches(recipe, run, name, pick_device(recipe.hardware.device), kinds)
    for done, pairs in enumerate(batches):
        for kind in kinds:
            x, y = pairs.teacher[kind].flatten(1, 2), pairs.student[kind].flatten(1, 2)
            sums[kind].update(x, y, pairs.mask_BT.flatten())
        progress("map-layers", number + (done + 1) / (num_batches + 1), len(recipe.teachers))
    matrices = {kind: sums[kind].matrix() for kind in kinds}
    first, identities = matrices[kinds[0]], model_identities(recipe, run, name)
    return {
        "format": FORMAT,
        "what": "linear CKA with the unbiased HSIC estimator; rows: student layers, columns: teacher layers",
        "teacher": {"name": name, "num_layers": first.shape[1], "identity": identities["teacher"]},
        "student": {"name": "student", "num_layers": first.shape[0], "identity": identities["student"]},
        "measured_on": _measured_on(recipe, run, name),
        "num_vectors": sums[kinds[0]].num_vectors,
        "similarity": {kind: matrix.tolist() for kind, matrix in matrices.items()},
    }


def _chosen(align: AlignRecipe, similarity_LM: Tensor, name: str) -> SparseMap:
    try:
        return cka_map(similarity_LM, align.cka_top_k, align.cka_monotone)
    except AlignmentError as error:
        raise AlignmentError(error.what, place=f"teacher {name} and the student", fix=error.fix) from None


def _as_words(mapping: SparseMap) -> dict[str, list[list[float]]]:
    """student layer -> [[teacher layer, weight], …]"""
    sources = layer_sources(mapping, range(mapping.n_out))
    return {str(layer): [[m, round(w, 6)] for m, w in pairs] for layer, pairs in enumerate(sources)}


# -- both models on the same texts --------------------------------------------------------------------


def _batch_maker(recipe: Recipe, run: Path, name: str) -> BatchMaker:
    """Batches of one teacher beside the student, all tokens, nothing compressed."""
    loss = recipe.loss.model_copy(update={"kv_weight": 1.0, "kv_on": "all", "logit_weight": 0.0})
    arm = ArmRecipe(
        teachers=[name], placebo=False, align=recipe.align, compress=CompressRecipe(), fuse=recipe.fuse, loss=loss
    )
    examples = split_examples(recipe, run, "train")
    texts = teacher_texts(recipe, run, arm, "train")
    return BatchMaker(examples, load_tokenizer_of(run).pad_token_id, arm, texts=texts)


def _paired_batches(
    recipe: Recipe, run: Path, name: str, device: torch.device, kinds: Sequence[str]
) -> Iterator[Pairs]:
    """Both models' states at paired positions: the teacher's go through the time map where there is one."""
    batches, numbers = _batch_maker(recipe, run, name), _texts(recipe, run)
    teacher = load_teacher(recipe, run, name, device)
    vocab_size, seed = len(load_tokenizer_of(run)), derive_seed(recipe.seeds[0], "student")  # as training starts it
    student = load_model(recipe.student, vocab_size=vocab_size, seed=seed, place="student").to(device)  # type: ignore[arg-type]
    for start in range(0, len(numbers), BATCH_TEXTS):
        batch = moved_to(batches(numbers[start : start + BATCH_TEXTS]), device)
        teacher_ids, teacher_segments = batch["teacher_inputs"][name]
        theirs = _states(teacher, teacher_ids, teacher_segments, kinds)
        mine = _states(student, batch["input_ids"], batch["segments"], kinds)
        mapping: SparseMap | None = batch["maps"].get(name)
        if mapping is not None:
            theirs = {
                kind: torch.stack([mapping.apply(x_BSC, 1) for x_BSC in states]) for kind, states in theirs.items()
            }
        yield Pairs(theirs, mine, batch["kv_masks"][name])


@torch.no_grad()
def _states(model: Any, ids_BT: Tensor, segments_BT: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """[M, B, T, C] of each kind: keys unrotated, heads side by side; hidden: what each layer gives to the next."""
    mask_BT = segments_BT > 0
    positions_BT = positions_from_mask(mask_BT)
    inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
    if model_kind(model.config) == "decoder":
        inputs |= {"position_ids": positions_BT, "use_cache": False}
    with capture_kv(model.eval(), hidden="hidden" in kinds, stop_early=True) as capture:
        find_backbone(model)(**inputs)
    kv = capture.kv(mask_BT, positions_BT)
    found: dict[str, Tensor] = {}
    if "keys" in kinds:
        found["keys"] = torch.stack([k.transpose(1, 2).flatten(2) for k in unrotate_keys(kv, model).keys])
    if "values" in kinds:
        found["values"] = torch.stack([v.transpose(1, 2).flatten(2) for v in kv.values])
    if "hidden" in kinds:
        found["hidden"] = torch.stack(capture.hidden())
    return found


# -- the figure ---------------------------------------------------------------------------------------


def _draw(
    stem: Path, similarities: Mapping[str, Tensor], maps: Mapping[str, SparseMap], found: Mapping[str, Any]
) -> list[Path]:
    """stem.png and stem.svg: a panel per kind, student layers down, teacher layers across, dark is alike.

    Rings mark the chosen cells, their areas the weights: seen in grey as well as in colour.
    """
    import matplotlib  # a second to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rules: Any = {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "kvdistill", "text.parse_math": False}
    L, M = next(iter(similarities.values())).shape
    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(rules):
        panel = _WIDTH_INCHES / max(2, len(maps))
        height = 1.6 + min(panel, max(1.0, panel * 0.8 * L / M))
        figure = Figure(figsize=(panel * len(maps), height), dpi=150, layout="constrained", facecolor="white")
        grid = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, (kind, mapping) in zip(grid, maps.items(), strict=True):
            image = _draw_panel(axes, similarities[kind].numpy(), mapping)
            axes.set_title(f"{kind}: {found['teacher']['name']}", loc="left", fontweight="bold", fontsize=9.5)
        figure.colorbar(image, ax=list(grid), label="CKA", shrink=0.9, pad=0.02)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # type: ignore[dict-item]
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    files = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]  # a name may hold dots
    for file, drawn in zip(files, (png, svg), strict=True):
        with replacing(file) as part:
            part.write_bytes(drawn.getvalue())
    return files


def _draw_panel(axes: Any, cells_LM: Any, mapping: SparseMap) -> Any:
    L, M = cells_LM.shape
    image = axes.imshow(cells_LM, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    size = min(90.0, 2000.0 / max(L, M))
    for layer, sources in enumerate(layer_sources(mapping, range(L))):
        for m, weight in sources:
            colour = "white" if cells_LM[layer, m] > 0.6 else _INK
            axes.scatter(m, layer, s=size * weight, facecolors="none", edgecolors=colour, linewidths=1.3)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("student layer")
    axes.set_xticks(range(0, M, 1 + (M - 1) // 14))
    axes.set_yticks(range(0, L, 1 + (L - 1) // 14))
    return image
