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

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdistill.align.layers import cka_map, layer_sources, map_notes, read_layer_similarity
from kvdistill.arms.arm import Arm
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.teacher import Teacher
from kvdistill.core.cka import CKAAccumulator
from kvdistill.core.errors import AlignmentError, KVDistillError
from kvdistill.core.files import sha256_of, write_json
from kvdistill.core.layout import folder_lock, layers_folder
from kvdistill.core.maps import SparseMap
from kvdistill.core.marks import read_sealed, sealed
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, CompressRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.models import capture_kv, find_backbone, model_kind, positions_from_mask, unrotate_keys

FORMAT = 1  # that `align.layers` reads
BATCH_TEXTS = 8  # all layers of two models at once: small batches


def map_layers(experiment: Experiment, progress: Progress = silent) -> None:
    """Measure every teacher of the recipe.

    Raises AlignmentError naming model and layer where features do not vary or there are too few common tokens,
    RecipeError for more layers (`align.cka_top_k`) than a teacher has.
    """
    align, folder = experiment.recipe.align, layers_folder(experiment.own_run)
    settings = {"top_k": align.cka_top_k, "monotone": align.cka_monotone}
    with folder_lock(folder, wait=True):
        for number, teacher in enumerate(experiment.teachers.values()):
            measuring = _Measuring(teacher)
            found = measuring.known() or measuring.measure(
                lambda done, number=number: progress("map-layers", number + done, len(experiment.teachers))
            )
            similarities = {kind: torch.tensor(rows, dtype=torch.float64) for kind, rows in found["similarity"].items()}
            try:
                maps = {kind: cka_map(one, align.cka_top_k, align.cka_monotone) for kind, one in similarities.items()}
            except AlignmentError as error:
                place = f"teacher {teacher.name} and the student"
                raise AlignmentError(error.what, place=place, fix=error.fix) from None
            _draw(folder, similarities, maps, found)
            rows = {kind: layer_sources(mapping, range(mapping.n_out)) for kind, mapping in maps.items()}
            layer_maps = {  # student layer -> [[teacher layer, weight], …]
                kind: {str(layer): [[m, round(w, 6)] for m, w in pairs] for layer, pairs in enumerate(sources)}
                for kind, sources in rows.items()
            }
            notes = {kind: map_notes(similarities[kind], mapping) for kind, mapping in maps.items()}
            found |= {"settings": settings, "layer_map": layer_maps, "notes": notes}
            write_json(teacher.similarity_path, sealed(found))
            progress("map-layers", number + 1, len(experiment.teachers))


class _Measuring:
    """How alike one teacher's layers and the student's are: known from its file, or measured."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.experiment = teacher, teacher.experiment
        arms = [arm for arm in self.experiment.arms.values() if teacher.name in arm.teachers]
        align = self.experiment.recipe.align
        # what the recipe's alignment asks for, and what its arms do
        self.kinds = sorted({align.cka_on} | {arm.align.cka_on for arm in arms if arm.align.layers == "cka"})

    @cached_property
    def arm(self) -> Arm:
        """The teacher beside the student, all tokens, nothing compressed, run now."""
        recipe = self.experiment.recipe
        changes = {"kv_weight": 1.0, "kv_on": "all", "logit_weight": 0.0, "attention_weighted": False}
        made = ArmRecipe(
            teachers=[self.teacher.name],
            align=recipe.align,
            compress=CompressRecipe(),
            fuse=recipe.fuse,
            loss=recipe.loss.model_copy(update=changes),
            train=recipe.train,
        )
        return Arm(self.experiment, {self.teacher.name: self.teacher}, made, recipe.seeds[0])

    @cached_property
    def numbers(self) -> list[int]:
        """Of the training examples that are read."""
        recipe = self.experiment.recipe
        generator = torch.Generator().manual_seed(derive_seed(recipe.data.seed, "map-layers"))
        num_examples = len(self.experiment.examples("train"))
        return sorted(torch.randperm(num_examples, generator=generator)[: recipe.align.cka_texts].tolist())

    def measured_on(self) -> dict[str, Any]:
        """All that similarities depend on beside the models."""
        text, align = self.teacher.text("train"), self.experiment.recipe.align
        read = [self.experiment.examples("train"), *([] if text is None else [text.examples])]
        rows = [[[e.doc_hash, e.style, len(e.input_ids)] for e in (side[i] for side in read)] for i in self.numbers]
        time = {"mode": align.time, "segment_ratio": dict(align.segment_ratio), "smoothness": dict(align.smoothness)}
        return {"texts": sha256_of(rows), "num_texts": len(rows), "time": time}

    def known(self) -> dict[str, Any] | None:
        """What the file holds, where it is of the same models and texts and has all that is wanted."""
        path = self.teacher.similarity_path
        try:
            found = read_sealed(path, fix="none: it is measured anew")
            sizes = found["teacher"]["num_layers"], found["student"]["num_layers"]
            for kind in self.kinds:
                matrix = read_layer_similarity(path, *sizes, on=kind, **self.teacher.identities)
                if not bool(matrix.isfinite().all()):
                    return None
            return found if found["measured_on"] == self.measured_on() else None
        except (KVDistillError, KeyError, TypeError, AttributeError):  # missing, torn or of others: measured anew
            return None

    def measure(self, progress: Any) -> dict[str, Any]:
        sides = f"teacher {self.teacher.name}", "the student"
        sums = {kind: CKAAccumulator(names=sides) for kind in self.kinds}
        num_batches = -(-len(self.numbers) // BATCH_TEXTS)
        for done, (theirs, mine, mask_BT) in enumerate(self._paired_batches()):
            for kind in self.kinds:
                sums[kind].update(theirs[kind].flatten(1, 2), mine[kind].flatten(1, 2), mask_BT.flatten())
            progress((done + 1) / (num_batches + 1))
        matrices = {kind: sums[kind].matrix() for kind in self.kinds}
        first, identities = matrices[self.kinds[0]], self.teacher.identities
        return {
            "format": FORMAT,
            "what": "linear CKA with the unbiased HSIC estimator; rows: student layers, columns: teacher layers",
            "teacher": {"name": self.teacher.name, "num_layers": first.shape[1], "identity": identities["teacher"]},
            "student": {"name": "student", "num_layers": first.shape[0], "identity": identities["student"]},
            "measured_on": self.measured_on(),
            "num_vectors": sums[self.kinds[0]].num_vectors,
            "similarity": {kind: matrix.tolist() for kind, matrix in matrices.items()},
        }

    def _paired_batches(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
        """States of all layers at the same places, by kind (keys, values, hidden): teacher [M, B, T, C], student
        [L, B, T, D], T student tokens; and which [B, T] are real and have a teacher behind them. The teacher's go
        through the time map where there is one.
        """
        maker, name = self.arm.batches("train", stored=False), self.teacher.name
        teacher, student = self.teacher.load(), self.arm.initial_model.to(self.arm.device)  # type: ignore[arg-type]
        for start in range(0, len(self.numbers), BATCH_TEXTS):
            batch = maker(self.numbers[start : start + BATCH_TEXTS]).to(self.arm.device)
            theirs = _states(teacher, *batch.teacher_inputs[name], self.kinds)
            mine = _states(student, batch.input_ids_BT, batch.segments_BT, self.kinds)
            mapping: SparseMap | None = batch.maps.get(name)
            if mapping is not None:
                theirs = {
                    kind: torch.stack([mapping.apply(x_BSC, 1) for x_BSC in states]) for kind, states in theirs.items()
                }
            yield theirs, mine, batch.kv_masks[name]


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
    folder: Path, similarities: Mapping[str, Tensor], maps: Mapping[str, SparseMap], found: Mapping[str, Any]
) -> None:
    """NAME.png and NAME.svg: a panel per kind, student layers down, teacher layers across, dark is alike.

    Rings mark the chosen cells, their areas the weights: seen in grey as well as in colour.
    """
    import matplotlib  # a second to import
    from matplotlib.figure import Figure

    from kvdistill.stages.report.canvas import INK, WIDTH, Picture, printed

    rules: Any = {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "kvdistill", "text.parse_math": False}
    L, M = next(iter(similarities.values())).shape
    name = found["teacher"]["name"]
    with matplotlib.rc_context(rules):
        panel = WIDTH / max(2, len(maps))
        height = 1.6 + min(panel, max(1.0, panel * 0.8 * L / M))
        figure = Figure(figsize=(panel * len(maps), height), dpi=150, layout="constrained", facecolor="white")
        grid = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, (kind, mapping) in zip(grid, maps.items(), strict=True):
            cells_LM = similarities[kind].numpy()
            image = axes.imshow(cells_LM, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for layer, sources in enumerate(layer_sources(mapping, range(L))):
                for m, weight in sources:
                    ring = {"s": min(90.0, 2000.0 / max(L, M)) * weight, "facecolors": "none", "linewidths": 1.3}
                    axes.scatter(m, layer, edgecolors="white" if cells_LM[layer, m] > 0.6 else INK, **ring)
            axes.set(xlabel="teacher layer", ylabel="student layer")
            axes.set_xticks(range(0, M, 1 + (M - 1) // 14))
            axes.set_yticks(range(0, L, 1 + (L - 1) // 14))
            axes.set_title(f"{kind}: {name}", loc="left", fontweight="bold", fontsize=9.5)
        figure.colorbar(image, ax=list(grid), label="CKA", shrink=0.9, pad=0.02)
        Picture(name, "", "", *printed(figure)).save(folder)
