"""A teacher that is a linear image of the student is recovered by the whole pipeline, an unrelated one is not.

The image goes through every axis at once: other heads and head sizes (a random map a layer), more layers, permuted,
with unrelated ones between them; each segment stretched to 2n - 1 tokens, so that `segment` takes it back exactly; and
another rotary base. It is handed over as what a forward pass of such a model would give: rotated keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_alignment_arms import byte_level_tokenizer
from tiny_models import inputs, tiny_model
from torch import Tensor

from kvdistill.align import (
    CKALayerMapper,
    MapProjectionAligner,
    SharedSpaceFit,
    TimeWarper,
    layer_map,
    time_map,
)
from kvdistill.align.heads import spread_heads
from kvdistill.align.tokens import token_coverage, token_map
from kvdistill.arms.controls import mismatched_partner
from kvdistill.arms.experiment import Experiment
from kvdistill.core.config import make_recipe
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import AlignRecipe, Recipe
from kvdistill.core.runtime import quiet_libraries
from kvdistill.core.segments import TEXT
from kvdistill.data import load_multi_task_dataset
from kvdistill.data.spans import token_spans
from kvdistill.data.tokenizers import load_tokenizer
from kvdistill.match import TeacherMatch
from kvdistill.models import capture_kv, positions_from_mask, rotate_keys, unrotate_keys
from kvdistill.stages.capture import capture
from kvdistill.stages.fit import fit
from kvdistill.stages.prepare import prepare
from kvdistill.stages.train import match_on_held_out

quiet_libraries()

L, H, D = 3, 2, 10  # the student: layers, KV heads, head size (those of `tiny_model`)
M, G, E = 5, 3, 12  # the teacher
PERMUTED = [4, 0, 2]  # the teacher layer behind each student layer; 1 and 3 are of another model
B, NUM_CALIBRATION, NUM_HELD_OUT = 8, 10, 4
EXPLICIT: dict[str, Any] = {"layers": "explicit", "layer_map": {n: [m] for n, m in enumerate(PERMUTED)}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- two models, and the image ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One batch: both KV unrotated, both sides' segments, and the map between them."""

    teacher: KV
    student: KV
    mapping: SparseMap


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def teacher_model(theta: float = 500_000.0) -> Any:
    """Never run: the teacher's KV is made, and turned by this model's own rotary module."""
    sizes = {"num_attention_heads": G, "num_key_value_heads": G, "head_dim": E, "num_hidden_layers": M}
    return tiny_model("llama", **sizes, **rope(theta), max_position_embeddings=128)


def some_segments(seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 9, (B, 3), generator=random).tolist()
    return [[code for code, n in zip((1, 2, 3), row, strict=True) for _ in range(n)] for row in counts]


def stretched(codes: Sequence[int]) -> list[int]:
    return [code for part in (1, 2, 3) for code in [part] * max(0, 2 * codes.count(part) - 1)]


def padded(rows: Sequence[Sequence[int]], side: str) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor(
        [[0] * (width - len(r)) + [*r] if side == "left" else [*r] + [0] * (width - len(r)) for r in rows]
    )


def run_student(model: Any, segments_BT: Tensor, seed: int) -> KV:
    """Keys and values of random texts as a forward pass leaves them, unrotated."""
    random = torch.Generator().manual_seed(seed)
    mask_BT = segments_BT > 0
    ids = torch.randint(1, 37, mask_BT.shape, generator=random) * mask_BT
    with torch.no_grad(), capture_kv(model) as captured:
        model(**inputs(ids, mask_BT))
    return unrotate_keys(captured.kv(mask_BT, positions_from_mask(mask_BT)), model)


def stretch_map(mine_BT: Tensor, theirs_BS: Tensor) -> Tensor:
    """[B, S, T]: teacher token j of a segment lies at place j / 2 of the student's, written with loops."""
    out = torch.zeros(*theirs_BS.shape, mine_BT.shape[1])
    for b in range(len(mine_BT)):
        for code in (1, 2, 3):
            mine, theirs = ((x[b] == code).nonzero()[:, 0].tolist() for x in (mine_BT, theirs_BS))
            for j, s in enumerate(theirs):
                out[b, s, mine[j // 2]] += 0.5
                out[b, s, mine[(j + 1) // 2]] += 0.5
    return out


def image_of(student: KV, other: KV, weights: dict[str, list[Tensor]], stretch_BST: Tensor) -> dict[str, tuple]:
    """Layer PERMUTED[l] of the teacher is a linear image of layer l; the others are of an unrelated model."""
    made: dict[str, tuple] = {}
    for side in ("keys", "values"):
        layers: list[Tensor] = []
        for m in range(M):
            source = getattr(student, side)[PERMUTED.index(m)] if m in PERMUTED else getattr(other, side)[m % L]
            flat_BTC = source.transpose(1, 2).flatten(2)
            x_BSC = stretch_BST @ flat_BTC @ weights[side][m] + (1 + m)
            layers.append(x_BSC.unflatten(2, (G, E)).transpose(1, 2))
        made[side] = tuple(layers)
    return made


def maps_of_kind(kind: str) -> dict[str, list[Tensor]]:
    """One [H·D, G·E] a teacher layer and side: any; of heads and size apart; of rank 6; …"""
    random = torch.Generator().manual_seed(3)

    def one() -> Tensor:
        if kind == "structured":
            # turned, not stretched: back in the student's space the closed form takes the nearest *weights* of this
            # form, which a penalty moves in the weak directions of an uneven map
            sizes = [torch.linalg.qr(torch.randn(b, a, generator=random))[0].T for a, b in ((H, G), (D, E))]
            return torch.einsum("hg,de->hdge", *sizes).reshape(H * D, G * E)
        if kind == "per head":  # a head of the teacher reads the heads of the student that stand where it stands
            mixer = torch.randn(H, G, generator=random) * (spread_heads(H, G) > 0)
            return torch.einsum("hg,gde->hdge", mixer, torch.randn(G, D, E, generator=random)).reshape(H * D, G * E)
        if kind == "low rank":
            return torch.randn(H * D, 6, generator=random) @ torch.randn(6, G * E, generator=random)
        return torch.randn(H * D, G * E, generator=random)

    return {side: [one() for _ in range(M)] for side in ("keys", "values")}


class World:
    """Batches of both models, made once a kind of image."""

    def __init__(self) -> None:
        self.student = tiny_model("qwen2", seed=1, **rope(10_000.0))
        self.other = tiny_model("qwen2", seed=2, **rope(10_000.0))
        self.teacher = teacher_model()
        self._made: dict[Any, list[Pair]] = {}

    def __call__(self, kind: str = "any", turned_back_by: Any = None) -> tuple[list[Pair], list[Pair]]:
        """(calibration, held out). turned_back_by: a model with the wrong rotary base, for the counter-proof."""
        key = kind, turned_back_by is None
        if key not in self._made:
            weights = maps_of_kind(kind)
            numbers = range(NUM_CALIBRATION + NUM_HELD_OUT)
            self._made[key] = [self._pair(n, weights, turned_back_by or self.teacher) for n in numbers]
        return self._made[key][:NUM_CALIBRATION], self._made[key][NUM_CALIBRATION:]

    def _pair(self, number: int, weights: dict[str, list[Tensor]], turned_back_by: Any) -> Pair:
        codes = some_segments(number)
        mine_BT, theirs_BS = padded(codes, "left"), padded([stretched(c) for c in codes], "right")
        student = run_student(self.student, mine_BT, 100 + number)
        other = run_student(self.other, mine_BT, 900 + number)
        mask_BS = theirs_BS > 0
        made = image_of(student, other, weights, stretch_map(mine_BT, theirs_BS))
        positions = positions_from_mask(mask_BS)
        unrotated = KV(**made, mask_BT=mask_BS, positions_BT=positions, rope="unrotated")
        handed_over = rotate_keys(unrotated, self.teacher)  # what a model with that base would leave in its cache
        assert handed_over.rope == "rotated"
        mapping = TimeWarper("segment").map(theirs_BS, mine_BT)
        assert mapping is not None and torch.equal(mapping.mask(), mine_BT > 0)
        return Pair(unrotate_keys(handed_over, turned_back_by), student, mapping)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


# -- the real path --------------------------------------------------------------------------------------


def fitted(pairs: Sequence[Pair], chosen: SparseMap | None = None, **options: Any) -> MapProjectionAligner:
    """Statistics and the closed form on calibration batches, as the fit stage does it."""
    recipe = AlignRecipe(**{"time": "segment", "init": "ridge", "ridge_l2": 1e-6} | EXPLICIT | options)
    aligner = MapProjectionAligner(recipe, (M, G, E), (L, H, D), layer_map=chosen)
    if recipe.standardise:
        aligner.fit_statistics((pair.teacher, pair.mapping) for pair in pairs)
    if recipe.match_in == "shared":
        aligner.set_adapters(*shared_spaces(aligner, pairs), "teacher", "student")
    else:
        aligner.fit_projector((pair.teacher, pair.student, pair.mapping) for pair in pairs)
    return aligner


def shared_spaces(aligner: MapProjectionAligner, pairs: Sequence[Pair]) -> list[Any]:
    sizes = {"teacher": G * E, "student": H * D}
    fits = [SharedSpaceFit(sizes, L, H * D, aligner.recipe.shared_fit) for _ in "kv"]
    for pair in pairs:
        theirs, mask_BT = aligner.teacher_channels(pair.teacher, pair.mapping)
        for one, x, y in zip(fits, theirs, aligner.student_channels(pair.student), strict=True):
            one.update({"teacher": x, "student": y}, mask_BT)
    return [one.solve(aligner.recipe.ridge_l2, drop_spare=True) for one in fits]


@torch.no_grad()
def measured(aligner: MapProjectionAligner, pairs: Sequence[Pair]) -> list[float]:
    """R² on these batches: [K, V] of the worst layer."""
    meter = TeacherMatch(L)
    for pair in pairs:
        source = aligner.sources(pair.student)
        target, mask_BT = aligner.targets(pair.teacher, pair.mapping)
        meter.keys.add(source.k, target.k, mask_BT)
        meter.values.add(source.v, target.v, mask_BT)
    return [min(layer[side]["r2"] for layer in meter.fragment()["by_layer"]) for side in "kv"]


IN_STUDENT = {"match_in": "student"}
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("any", {"projection": "flat"}),
    ("any", {"projection": "flat", "standardise": False}),
    ("any", {"projection": "flat", **IN_STUDENT}),
    ("any", {"projection": "flat", "residual": True}),
    ("any", {"projection": "elastic", "residual": True}),
    ("any", {"projection": "elastic", "residual": True, "train_projector": True, **IN_STUDENT}),
    ("structured", {"projection": "structured", "standardise": False}),
    ("structured", {"projection": "structured", "standardise": False, **IN_STUDENT}),
    ("per head", {"projection": "structured", "per_head": True}),
    ("per head", {"projection": "flat", "per_head": True}),
    ("low rank", {"projection": "flat", "rank": 6}),
    ("any", {"match_in": "shared", "shared_fit": "gcca"}),
]


@pytest.mark.parametrize(
    ("kind", "options"), EXACT, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_a_linear_image_is_recovered_on_texts_it_was_not_fitted_on(world, kind, options):
    calibration, held_out = world(kind)
    assert min(measured(fitted(calibration, **options), held_out)) >= 0.999


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("any", {"projection": "flat", "rank": 6}),
        ("any", {"projection": "structured", "standardise": False}),
        ("low rank", {"projection": "flat", "rank": 3}),
        ("low rank", IN_STUDENT),  # six channels do not hold twenty
    ],
)
def test_what_a_form_cannot_be_is_not_recovered(world, kind, options):
    calibration, held_out = world(kind)
    assert max(measured(fitted(calibration, **options), held_out)) < 0.97


NEAREST: list[tuple[str, dict[str, Any]]] = [
    ("any", {"rank": 6}),
    ("any", {"projection": "structured"}),
    ("any", {"projection": "structured", "per_head": True, "ridge_on": "kv", **IN_STUDENT}),
    ("any", {"projection": "elastic", "elastic_hidden": 8}),
    ("low rank", {"rank": 3, "share_layers": True}),
]


@pytest.mark.parametrize(("kind", "options"), NEAREST, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_a_projector_that_is_only_near_the_closed_form_still_takes_the_mean_to_the_mean(world, kind, options):
    """Penalty or not: least squares has no error on average, and a nearest weight needs a bias of its own for that."""
    calibration, _ = world(kind)
    aligner = fitted(calibration, **options)
    for side, projector in enumerate((aligner.proj_k, aligner.proj_v)):
        given, wanted = [], []
        for pair in calibration:
            theirs, mask = aligner.teacher_channels(pair.teacher, pair.mapping)
            mine = aligner.student_channels(pair.student)
            both = (mine, theirs) if aligner.recipe.match_in == "teacher" else (theirs, mine)
            given.append(both[0][side][:, mask])
            wanted.append(both[1][side][:, mask])
        with torch.no_grad():
            error_LRC = projector(torch.cat(given, 1)) - torch.cat(wanted, 1)
        axes = (0, 1) if aligner.recipe.share_layers else 1
        assert float(error_LRC.square().mean()) > 1e-2  # far from the closed form, or this would say nothing
        assert float(error_LRC.mean(axes).abs().max()) < 1e-4


def test_every_step_is_needed(world):
    """Leave one axis out, and the same teacher is no longer recovered: by keys, by values, or both."""
    calibration, held_out = world()

    def without(change: Callable[[Pair], Pair], **options: Any) -> list[float]:
        aligner = fitted([change(pair) for pair in calibration], **options)
        return measured(aligner, [change(pair) for pair in held_out])

    def timed(mode: str) -> Callable[[Pair], Pair]:
        def change(pair: Pair) -> Pair:
            codes = (pair.teacher.mask_BT.long(), pair.student.mask_BT.long())
            return replace(pair, mapping=time_map(mode, *codes))

        return change

    assert max(without(timed("pad"))) < 0.8
    assert max(without(timed("proportional"))) < 0.95
    unpermuted = {"layers": "explicit", "layer_map": {n: [m] for n, m in enumerate(reversed(PERMUTED))}}
    assert max(without(lambda pair: pair, **unpermuted)) < 0.9
    wrong_base, wrong_held_out = world(turned_back_by=teacher_model(theta=10_000.0))
    keys, values = measured(fitted(wrong_base), wrong_held_out)
    assert keys < 0.9 and values >= 0.999  # values do not turn
    rotated = replace(held_out[0].teacher, rope="rotated")
    with pytest.raises(AlignmentError, match="keys are rotated"):
        fitted(calibration).targets(rotated, held_out[0].mapping)


def test_cka_finds_the_permuted_layers_and_they_recover_the_image(world):
    """Keys of all teacher layers against keys of all student layers; two of the five belong to nobody."""
    calibration, held_out = world()
    mapper = CKALayerMapper(top_k=1)
    for pair in calibration:
        theirs = torch.stack([pair.mapping.apply(k.transpose(1, 2), 1).flatten(2) for k in pair.teacher.keys])
        mine = torch.stack([k.transpose(1, 2).flatten(2) for k in pair.student.keys])
        mapper.update(theirs.flatten(1, 2), mine.flatten(1, 2), pair.student.mask_BT.flatten())
    found = mapper.map()
    assert found.index[:, 0].tolist() == PERMUTED
    chosen = layer_map("explicit", M, L, EXPLICIT["layer_map"])
    assert torch.equal(found.index, chosen.index) and torch.equal(found.weight, chosen.weight)
    assert min(measured(fitted(calibration, chosen=found), held_out)) >= 0.999


def test_a_penalty_of_a_hundredth_costs_what_it_says(world):
    """The recipe's default, ridge_l2: 0.01: cautious, and still far from the placebo."""
    calibration, held_out = world()
    figures = measured(fitted(calibration, ridge_l2=1e-2), held_out)
    assert 0.9 < min(figures) < max(figures) < 0.9999


@pytest.mark.parametrize("match_in", ["teacher", "student"])
def test_a_projector_learns_the_image_by_gradient(world, match_in):
    """The student is frozen; Adam, 300 steps on all calibration texts at once: R² above .99 on the others."""
    calibration, held_out = world()
    options = {"init": "orthogonal", "match_in": match_in, "train_projector": True}
    recipe = AlignRecipe(time="segment", **EXPLICIT, **options)
    aligner = MapProjectionAligner(recipe, (M, G, E), (L, H, D), seed=5)
    aligner.fit_statistics((pair.teacher, pair.mapping) for pair in calibration)
    flat = [(*aligner.teacher_channels(p.teacher, p.mapping), aligner.student_channels(p.student)) for p in calibration]
    theirs, mine = (
        [torch.cat([row[part][side][:, row[1]] for row in flat], 1) for side in range(2)] for part in (0, 2)
    )
    given, wanted = (mine, theirs) if match_in == "teacher" else (theirs, mine)
    optimiser = torch.optim.Adam(aligner.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 300)
    losses = []
    for _ in range(300):
        projectors = (aligner.proj_k, aligner.proj_v)
        loss = sum((p(x) - y).square().mean() for p, x, y in zip(projectors, given, wanted, strict=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 50
    assert min(measured(aligner, held_out)) > 0.99


# -- an unrelated teacher -------------------------------------------------------------------------------


@pytest.mark.parametrize("match_in", ["teacher", "student"])
def test_an_unrelated_teacher_is_not_distinguished_from_the_placebo(world, match_in):
    """Another random model on other texts: R² on held-out texts is near 0 or below, and lies among the placebo's.

    Placebo: the same texts, mismatched (`mismatched_partner`), six times over. Within noise: at most four standard
    deviations of those from their mean (and 0.02 as the least, where they happen to lie closer than that).
    """
    width = 12  # one length, so that any text can be paired with any
    segments = torch.tensor([[1] * 4 + [2] * 4 + [3] * 4] * B)
    mine = [run_student(world.student, segments, seed) for seed in range(24)]
    theirs = [run_student(world.other, segments, 5000 + seed) for seed in range(24)]
    identity = SparseMap(torch.arange(width)[None, :, None].expand(B, -1, -1), torch.ones(B, width, 1), width)

    def figures(order: Sequence[int]) -> Tensor:
        pairs = [Pair(theirs[j], mine[i], identity) for i, j in enumerate(order)]
        recipe = AlignRecipe(time="pad", init="ridge", ridge_l2=1e-2, match_in=match_in)
        aligner = MapProjectionAligner(recipe, (L, H, D), (L, H, D))
        aligner.fit_statistics((pair.teacher, None) for pair in pairs[:16])
        aligner.fit_projector((pair.teacher, pair.student, None) for pair in pairs[:16])
        meter = TeacherMatch(L)
        for pair in pairs[16:]:
            source, (target, mask) = aligner.sources(pair.student), aligner.targets(pair.teacher)
            meter.keys.add(source.k.detach(), target.k, mask)
            meter.values.add(source.v.detach(), target.v, mask)
        found = meter.fragment()
        return torch.tensor([found["k"]["r2"], found["v"]["r2"]])

    real = figures(range(24))
    placebo = torch.stack([figures(mismatched_partner(24, seed)) for seed in range(6)])
    assert bool((real < 0.05).all()) and bool((placebo < 0.05).all())
    noise = (4 * placebo.std(0)).clamp_min(0.02)
    assert bool(((real - placebo.mean(0)).abs() <= noise).all()), (real, placebo.mean(0), placebo.std(0))


# -- through files -----------------------------------------------------------------------------------------


def save_pair(folder: Path) -> None:
    """Two model folders with one tokenizer. The teacher's layer 1 has as its keys and values a random linear image of
    those of the student's layer 0, in other heads, sizes and rotary base: its layer 0 adds nothing to the residual
    stream, and embeddings and norm are the student's."""
    # many words: whatever depends on the token alone is linear in twenty channels where there are no more than twenty
    tokenizer = load_tokenizer(str(byte_level_tokenizer(folder / "tokenizer")))
    vocabulary = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "tie_word_embeddings": True}
    student = tiny_model("llama", seed=1, **vocabulary, **rope(10_000.0))
    sizes = {"num_attention_heads": G, "num_key_value_heads": G, "head_dim": E, "num_hidden_layers": M}
    teacher = tiny_model("llama", seed=2, **vocabulary, **sizes, **rope(500_000.0))
    mine, silent, theirs = student.model.layers[0], teacher.model.layers[0], teacher.model.layers[1]
    with torch.no_grad():
        teacher.model.embed_tokens.weight.copy_(student.model.embed_tokens.weight)
        silent.self_attn.o_proj.weight.zero_()
        silent.mlp.down_proj.weight.zero_()
        theirs.input_layernorm.weight.copy_(mine.input_layernorm.weight)
        for name in ("k_proj", "v_proj"):
            image = torch.randn(G * E, H * D)
            getattr(theirs.self_attn, name).weight.copy_(image @ getattr(mine.self_attn, name).weight)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


SPACES = {
    "teacher": {"ridge_l2": 1e-6},
    "student": {"ridge_l2": 1e-6, "match_in": "student"},
    "shared": {"ridge_l2": 1e-5, "match_in": "shared"},
}


def file_study(folder: Path, dtype: str) -> Recipe:
    align = {"layers": "explicit", "layer_map": {0: [1], 1: [0], 2: [4]}, "init": "ridge"}
    arms = {name: {"align": options} for name, options in SPACES.items()}
    arms["unrelated"] = {"align": {"ridge_l2": 1e-6, "layer_map": {0: [3], 1: [0], 2: [4]}}}  # another layer of it
    tasks = [{"name": name, "train": 60, "val": 16, "test": 2} for name in ("chain", "product")]
    return make_recipe(
        {
            "name": "recovery",
            "run_dir": str(folder / f"run-{dtype}"),
            "seeds": [3],
            "data": {"tasks": tasks, "tokenizer": str(folder / "student"), "max_length": 120},
            "teachers": [{"name": "image", "path": str(folder / "teacher")}],
            "student": {"path": str(folder / "student")},
            "capture": {"dtype": dtype},
            "evaluate": {"match_examples": 16},
            "loss": {"distill_layers": "0"},
            "align": align,
            "arms": arms,
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("recovery")
    save_pair(folder)
    return folder


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999), ("bfloat16", 0.99)])
def test_the_image_is_recovered_through_prepare_capture_store_and_fit(folders, dtype, least):
    """The untrained student's match on validation texts, measured as training does it."""
    recipe = file_study(folders, dtype)
    run = Path(recipe.run_dir or "")
    prepare(recipe, run)
    experiment = Experiment(recipe, run)
    capture(experiment.teachers["image"])
    for name in recipe.arms:
        fit(experiment.arm(name, 3))
    seen = set()
    for name in recipe.arms:
        arm = experiment.arm(name, 3)
        found = match_on_held_out(arm, arm.distiller)["image"]
        assert len(found["by_layer"]) == 1 and found["k"]["tokens"] > 200
        figures = [found[side]["r2"] for side in "kv"]
        assert max(figures) < 0.9 if name == "unrelated" else min(figures) >= least, (name, figures)
        batch = arm.batches("train")(range(120))
        assert batch.targets and not batch.maps  # one tokenizer, one text: no map at all
        seen.update(batch.input_ids_BT.unique().tolist())
    assert len(seen) > H * D + 5


# -- other tokenizers ------------------------------------------------------------------------------------------


NUM_ROWS, SMOOTH = 40, 24  # a character's vector changes slowly: half its correlation is left after about 12 characters


class Cut:
    """Texts cut by one tokenizer, and a KV that is a function of their characters: each token holds the mean, over
    its span, of a random vector per character."""

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], characters: Sequence[Tensor], heads: tuple[int, int]
    ) -> None:
        found = token_spans(tokenizer, texts)
        width = max(len(one.ids) for one in found)
        self.spans = torch.zeros(len(texts), width, 2)
        self.roles = torch.zeros(len(texts), width, dtype=torch.int64)
        size = characters[0].shape[1]
        self.x_BTC = torch.zeros(len(texts), width, size)
        for b, (one, x_NC) in enumerate(zip(found, characters, strict=True)):
            n = len(one.ids)
            self.spans[b, :n] = torch.stack([torch.tensor(side) for side in (one.start, one.end)], 1).float()
            self.roles[b, :n] = TEXT
            total_NC = torch.cat([torch.zeros(1, size), x_NC.cumsum(0)])
            for t, (start, end) in enumerate(zip(one.start.tolist(), one.end.tolist(), strict=True)):
                first, behind = int(start), max(int(start) + 1, int(-(-end // 1)))  # whole characters of cut ones
                self.x_BTC[b, t] = (total_NC[min(behind, len(x_NC))] - total_NC[first]) / (behind - first)
        self.heads = heads

    def kv(self, rows: slice, weight: Tensor) -> KV:
        mask = self.roles[rows] == TEXT
        x = (self.x_BTC[rows] @ weight).unflatten(2, self.heads).transpose(1, 2)
        return KV((x,), (-x,), mask_BT=mask, positions_BT=positions_from_mask(mask), rope="none")


def character_vectors(texts: Sequence[str], size: int) -> list[Tensor]:
    """Unit-variance vectors, white noise under a triangle of SMOOTH characters on either side."""
    random = torch.Generator().manual_seed(8)
    weights = 1 - (torch.arange(-SMOOTH, SMOOTH + 1).abs() / (SMOOTH + 1))
    weights = weights / weights.square().sum().sqrt()
    noise = [torch.randn(size, 1, len(text) + 2 * SMOOTH, generator=random) for text in texts]
    return [torch.nn.functional.conv1d(x, weights[None, None])[:, 0].T for x in noise]


PAIRS = [
    ("gsm8k", "gpt2", "qwen2.5"),
    ("gsm8k", "bert-base-uncased", "gpt2"),
    ("gsm8k", "qwen2.5", "t5-small"),
    ("math23k", "qwen2.5", "gpt2"),
    ("math23k", "gpt2", "qwen2.5"),
]


@pytest.fixture(scope="module")
def texts(data_root: Path) -> dict[str, list[str]]:
    found = {}
    for name in ("gsm8k", "math23k"):
        rows = load_multi_task_dataset([name], split="test", num_problems=NUM_ROWS, root=data_root)
        found[name] = [row.problem.question[:160] for row in rows]
    return found


@pytest.fixture(scope="module")
def real_tokenizers(data_root: Path) -> Callable[[str], Any]:
    return functools.cache(lambda name: load_tokenizer(str(data_root / "tokenizers" / name)))


@pytest.mark.parametrize(("task", "theirs", "mine"), PAIRS, ids=lambda x: x)
def test_what_a_teacher_knows_of_characters_reaches_the_students_tokens(texts, real_tokenizers, task, theirs, mine):
    """Fitted on 30 real texts, R² on 10 others; the placebo reads the tokens of another text at the same map."""
    size, rows = 8, texts[task]
    characters = character_vectors(rows, size)
    teacher = Cut(real_tokenizers(theirs), rows, characters, (3, 4))
    student = Cut(real_tokenizers(mine), rows, characters, (2, 4))
    mapping = token_map(teacher.spans, student.spans, teacher.roles, student.roles)
    lost = token_coverage(teacher.spans, student.spans, teacher.roles, student.roles).lost_share_B
    assert float(lost.mean()) < 0.2  # WordPiece leaves white space out, which the student's tokens carry
    apart = mapping.apply(teacher.x_BTC, 1) - student.x_BTC
    near = apart[mapping.mask()].square().mean() / student.x_BTC[mapping.mask()].square().mean()
    assert float(near) < 0.05
    image = torch.randn(size, 12)
    recipe = AlignRecipe(init="ridge", ridge_l2=1e-6)
    aligner = MapProjectionAligner(recipe, (1, 3, 4), (1, 2, 4))
    part = [slice(0, 30), slice(30, NUM_ROWS)]
    held_out = [
        (
            teacher.kv(p, image),
            student.kv(p, torch.eye(size)),
            SparseMap(mapping.index[p], mapping.weight[p], mapping.n_in),
        )
        for p in part
    ]
    aligner.fit_statistics([(held_out[0][0], held_out[0][2])])
    aligner.fit_projector([held_out[0]])
    their_kv, my_kv, theirs_to_mine = held_out[1]

    def r2(kv: KV) -> float:
        meter = TeacherMatch(1)
        (target, mask), source = aligner.targets(kv, theirs_to_mine), aligner.sources(my_kv)
        meter.values.add(source.v.detach(), target.v, mask)
        meter.keys.add(source.k.detach(), target.k, mask)
        return min(meter.fragment()[side]["r2"] for side in "kv")

    other = their_kv.map_layers(lambda x: x.roll(1, 0))
    assert r2(their_kv) > 0.95
    assert r2(replace(other, mask_BT=their_kv.mask_BT)) < 0
