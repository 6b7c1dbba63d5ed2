"""MapProjectionAligner against the same chain written with dense matrices and loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvdistill.align import AlignedKV, KVStatistics, MapProjectionAligner, TimeWarper, time_map
from kvdistill.align.attention import attention_rows, head_shares
from kvdistill.align.channels import ChannelStatistics
from kvdistill.align.layers import layer_map
from kvdistill.compress import kept_tokens
from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.kv import KV
from kvdistill.core.recipe import AlignRecipe

M, G, E, S = 7, 2, 5, 11  # teacher
L, H, D, T = 4, 3, 6, 9  # student
B = 8
LAYERS = [0, 2, 3]
TEACHER, STUDENT = (M, G, E), (L, H, D)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def segments(width: int, seed: int, left: bool) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(B):
        n = torch.randint(1, 1 + width // 3, (3,), generator=random).tolist()
        codes = [1] * n[0] + [2] * n[1] + [3] * n[2]
        pad = [0] * (width - len(codes))
        rows.append(pad + codes if left else codes + pad)
    return torch.tensor(rows)


SOURCE, TARGET = segments(S, 0, left=False), segments(T, 1, left=True)


def make_kv(layers, heads, size, codes, seed=0, **options) -> KV:
    random = torch.Generator().manual_seed(seed)
    shape = (B, heads, codes.shape[1], size)

    def tensors():
        return tuple(torch.randn(shape, generator=random) * (1 + i) + i for i in range(len(layers)))

    fields = {"layers": tuple(layers), "rope": "unrotated"} | options
    positions = torch.arange(codes.shape[1]).expand_as(codes)
    return KV(tensors(), tensors(), mask_BT=codes > 0, positions_BT=positions, **fields)


def teacher_kv(codes=SOURCE, **options) -> KV:
    return make_kv(range(M), G, E, codes, **options)


def student_kv(codes=TARGET, **options) -> KV:
    return make_kv(range(L), H, D, codes, seed=9, **options)


def some_statistics(rows: int) -> KVStatistics:
    random = torch.Generator().manual_seed(4)

    def one():
        return ChannelStatistics(
            torch.randn(rows, G * E, generator=random), torch.rand(rows, G * E, generator=random) + 0.5
        )

    return KVStatistics(one(), one())


def make_aligner(statistics=True, student_layers=LAYERS, **options) -> MapProjectionAligner:
    recipe = AlignRecipe(**{"time": "segment", **options})
    given = some_statistics(len(student_layers)) if statistics and recipe.standardise else None
    return MapProjectionAligner(recipe, TEACHER, STUDENT, student_layers, seed=5, statistics=given)


def slow_teacher(tensors, stats, recipe, mapping) -> torch.Tensor:
    """[L', B, T, G·E]: dense time matrix, then dense layer matrix, then (x - mean) / std."""
    time_BTS = mapping.to_dense()
    layer_LM = layer_map(recipe.layers, M, L, recipe.layer_map).to_dense()
    rows = []
    for i, layer in enumerate(LAYERS):
        total = torch.zeros(B, T, G, E)
        for m in range(M):
            for g in range(G):
                total[:, :, g] += layer_LM[layer, m] * (time_BTS @ tensors[m][:, g])
        flat = total.reshape(B, T, G * E)
        rows.append((flat - stats.mean_LC[i]) / stats.std_LC[i] if stats else flat)
    return torch.stack(rows)


@pytest.mark.parametrize("layers", ["ratio", "interpolate", "terminal"])
@pytest.mark.parametrize("mode", ["index", "pad", "proportional", "segment"])
@pytest.mark.parametrize("standardise", [True, False])
def test_targets_are_the_slow_chain(layers, mode, standardise):
    aligner = make_aligner(layers=layers, time=mode, standardise=standardise)
    kv, mapping = teacher_kv(), time_map(mode, SOURCE, TARGET)
    target, mask = aligner.targets(kv, mapping)
    assert isinstance(target, AlignedKV) and target.k.shape == (len(LAYERS), B, T, G * E)
    assert torch.equal(mask, mapping.mask())
    stats = some_statistics(len(LAYERS)) if standardise else None
    for got, tensors, part in ((target.k, kv.keys, "keys"), (target.v, kv.values, "values")):
        expected = slow_teacher(tensors, stats and getattr(stats, part), aligner.recipe, mapping)
        torch.testing.assert_close(got[:, mask], expected[:, mask], atol=1e-4, rtol=1e-4)
        assert torch.isfinite(got).all()
        assert not got.requires_grad


@pytest.mark.parametrize("layers", ["ratio", "interpolate"])
def test_no_map_is_the_identity_map(layers):
    aligner = make_aligner(layers=layers, time="pad")
    kv = teacher_kv()
    assert TimeWarper("pad").map(SOURCE, SOURCE) is None
    plain, mask = aligner.targets(kv, None)
    mapped, mapped_mask = aligner.targets(kv, time_map("pad", SOURCE, SOURCE))
    assert torch.equal(mask, mapped_mask) and torch.equal(mask, SOURCE > 0)
    for a, b in zip(plain, mapped, strict=True):
        torch.testing.assert_close(a[:, mask], b[:, mask], atol=0, rtol=0)


def test_how_the_teacher_lies_in_memory_changes_nothing():
    aligner, mapping = make_aligner(), time_map("segment", SOURCE, TARGET)
    kv = teacher_kv()
    stored = kv.map_layers(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    for chosen in (None, mapping):
        for a, b in zip(aligner.targets(kv, chosen)[0], aligner.targets(stored, chosen)[0], strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_layers_are_found_by_their_number():
    aligner = make_aligner(layers="interpolate")
    assert aligner.teacher_layers == [0, 4, 6]
    kv = teacher_kv()
    mapping = time_map("segment", SOURCE, TARGET)
    few = kv.select_layers([6, 0, 4])
    for a, b in zip(aligner.targets(kv, mapping)[0], aligner.targets(few, mapping)[0], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AlignmentError, match=r"teacher's KV holds layers \[0, 4\], layer 6"):
        aligner.targets(kv.select_layers([0, 4]), mapping)
    with pytest.raises(AlignmentError, match="student's KV holds"):
        aligner.sources(student_kv().select_layers([0, 1]))


@pytest.mark.parametrize("projection", ["flat", "structured"])
@pytest.mark.parametrize("share_layers", [False, True])
def test_sources_project_the_student_in_teacher_space(projection, share_layers):
    aligner = make_aligner(projection=projection, share_layers=share_layers, init="orthogonal")
    kv = student_kv().map_layers(lambda x: x.requires_grad_())
    source = aligner.sources(kv)
    for got, tensors, projector in ((source.k, kv.keys, aligner.proj_k), (source.v, kv.values, aligner.proj_v)):
        weight, bias = projector.to_flat()
        for i, layer in enumerate(LAYERS):
            row = 0 if share_layers else i
            expected = torch.zeros(B, T, G * E)
            for h in range(H):
                expected += tensors[layer][:, h] @ weight[row, h * D : (h + 1) * D]
            torch.testing.assert_close(got[i], expected + bias[row], atol=1e-4, rtol=1e-4)
    (source.k.square().mean() + source.v.square().mean()).backward()
    assert all((kv.keys[layer].grad is not None) == (layer in LAYERS) for layer in range(L))
    assert all(p.grad is not None for p in aligner.parameters())
    assert not torch.equal(aligner.proj_k.to_flat()[0], aligner.proj_v.to_flat()[0])


@pytest.mark.parametrize("train", [None, True])
def test_student_space_projects_the_teacher(train):
    aligner = make_aligner(match_in="student", train_projector=train, init="xavier")
    kv, mapping = teacher_kv().map_layers(lambda x: x.requires_grad_()), time_map("segment", SOURCE, TARGET)
    if train is None:
        with pytest.raises(AlignmentError, match="was not"):
            aligner.targets(kv, mapping)
        aligner.is_fitted = True
    target, mask = aligner.targets(kv, mapping)
    flat, _ = aligner.teacher_channels(kv, mapping)
    torch.testing.assert_close(target.k, aligner.proj_k(flat.k), atol=0, rtol=0)
    assert target.k.shape == (len(LAYERS), B, T, H * D)
    assert target.k.requires_grad == bool(train)
    if train:
        target.k[:, mask].sum().backward()
        assert kv.keys[0].grad is None and aligner.proj_k.weight.grad is not None
    source = aligner.sources(student_kv())
    expected = torch.stack([student_kv().keys[layer].transpose(1, 2).reshape(B, T, H * D) for layer in LAYERS])
    assert torch.equal(source.k, expected)


@pytest.mark.parametrize("mode", ["pad", "proportional"])
def test_tokens_the_teacher_masks_take_no_part(mode):
    aligner = make_aligner(time=mode)
    kv, mapping = teacher_kv(), time_map(mode, SOURCE, TARGET)
    kept = kept_tokens("crop", SOURCE, 1)
    target, mask = aligner.targets(replace(kv, mask_BT=kept), mapping)
    explicit = mapping.masked_source(kept)
    assert torch.equal(mask, explicit.mask()) and mask.sum() < mapping.mask().sum()
    torch.testing.assert_close(target.k[:, mask], aligner.targets(kv, explicit)[0].k[:, mask])


@pytest.mark.parametrize("mode", ["pad", "proportional", "segment"])
@pytest.mark.parametrize("layers", ["ratio", "interpolate"])
def test_fitted_targets_have_mean_0_and_std_1_under_the_mask(mode, layers):
    aligner = make_aligner(statistics=False, time=mode, layers=layers)
    with pytest.raises(AlignmentError, match="without channel statistics"):
        aligner.targets(teacher_kv())
    mapping = time_map(mode, SOURCE, TARGET)
    stream = [(teacher_kv(seed=s), mapping) for s in range(4)]
    aligner.fit_statistics(stream)
    results = [aligner.targets(*batch) for batch in stream]
    for part in (0, 1):
        rows = torch.cat([target[part][:, mask] for target, mask in results], dim=1)
        torch.testing.assert_close(rows.mean(1), torch.zeros(len(LAYERS), G * E), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.std(1, correction=0), torch.ones(len(LAYERS), G * E), atol=1e-4, rtol=0)


def linear_teacher(student: KV, weight: torch.Tensor) -> KV:
    """A teacher of the student's depth whose every layer is one linear map of the student's."""

    def project(tensors):
        return tuple(
            (x.transpose(1, 2).reshape(B, -1, H * D) @ weight + 3).view(B, -1, G, E).transpose(1, 2) for x in tensors
        )

    return replace(student, keys=project(student.keys), values=project(student.values))


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("projection", ["flat", "structured"])
def test_ridge_recovers_a_linear_teacher(share_layers, projection):
    mixer, size = torch.randn(H, G), torch.randn(D, E)
    weight = torch.einsum("hg,de->hdge", mixer, size).reshape(H * D, G * E)
    recipe = AlignRecipe(
        init="ridge", projection=projection, share_layers=share_layers, ridge_l2=1e-6, standardise=False
    )
    aligner = MapProjectionAligner(recipe, (L, G, E), STUDENT, LAYERS)
    batches = [make_kv(range(L), H, D, TARGET, seed=s) for s in range(12)]
    with pytest.raises(AlignmentError, match="fit_projector"):
        aligner.sources(batches[0])
    aligner.fit_projector((linear_teacher(kv, weight), kv, None) for kv in batches[:-1])
    target, mask = aligner.targets(linear_teacher(batches[-1], weight))
    source = aligner.sources(batches[-1])
    for s, t in zip(source, target, strict=True):
        s, t = s[:, mask], t[:, mask]
        r2 = 1 - (s - t).square().sum() / (t - t.mean(1, keepdim=True)).square().sum()
        assert r2 >= 0.999
    assert aligner.is_trained and all(p.requires_grad for p in aligner.parameters())


PROJECTIONS = [
    {"projection": "flat", "rank": 4},
    {"projection": "structured", "per_head": True},
    {"projection": "elastic"},
    {"projection": "elastic", "elastic_hidden": 40, "residual": True},
    {"projection": "structured", "residual": True},
]


@pytest.mark.parametrize("match_in", ["teacher", "student"])
@pytest.mark.parametrize("init", ["uniform", "ridge"])
@pytest.mark.parametrize("options", PROJECTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_projection_of_the_recipe_is_made_fitted_and_saved(options, init, match_in, tmp_path):
    options = options | {"match_in": match_in, "init": init, "train_projector": True}
    aligner = make_aligner(**options)
    kv, student, mapping = teacher_kv(), student_kv(), time_map("segment", SOURCE, TARGET)
    if init == "ridge":
        with pytest.raises(AlignmentError, match="fit_projector"):
            aligner.targets(kv, mapping)
            aligner.sources(student)
        aligner.fit_projector([(kv, student, mapping)])
    (target, mask), source = aligner.targets(kv, mapping), aligner.sources(student)
    assert target.k.shape == source.k.shape
    ((source.k - target.k)[:, mask].square().mean() + (source.v - target.v)[:, mask].square().mean()).backward()
    gated = [name for name, p in aligner.named_parameters() if p.grad is None]
    assert not gated, f"no gradient for {gated}"
    save_file(aligner.state_dict(), tmp_path / "a.safetensors")
    other = MapProjectionAligner(aligner.recipe, TEACHER, STUDENT, LAYERS, seed=77)
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other.targets(kv, mapping)[0].v, target.v) and torch.equal(other.sources(student).k, source.k)
    assert aligner.num_parameters == sum(p.numel() for p in aligner.parameters())


def r2(source: AlignedKV, target: AlignedKV, mask: torch.Tensor) -> list[float]:
    return [
        float(
            1
            - (s[:, mask] - t[:, mask]).square().sum() / (t[:, mask] - t[:, mask].mean(1, keepdim=True)).square().sum()
        )
        for s, t in zip(source, target, strict=True)
    ]


def spectral_teacher(student: KV, weight: torch.Tensor, shape: tuple[int, int]) -> KV:
    """A teacher of the student's depth and text: one linear map of all its channels, cut into heads."""

    def project(tensors):
        return tuple((x.transpose(1, 2).flatten(2) @ weight).unflatten(2, shape).transpose(1, 2) for x in tensors)

    return replace(student, keys=project(student.keys), values=project(student.values))


def fit_on_linear(weight, shape, **options):
    """An aligner with ridge init fitted to that teacher, and its R² (K, V) on a batch it has not seen."""
    recipe = AlignRecipe(**{"init": "ridge", "ridge_l2": 1e-6, "standardise": False, **options})
    aligner = MapProjectionAligner(recipe, (L, *shape), STUDENT, LAYERS)
    batches = [make_kv(range(L), H, D, TARGET, seed=s) for s in range(12)]
    aligner.fit_projector((spectral_teacher(kv, weight, shape), kv, None) for kv in batches[:-1])
    target, mask = aligner.targets(spectral_teacher(batches[-1], weight, shape))
    with torch.no_grad():
        return aligner, r2(aligner.sources(batches[-1]), target, mask)


def test_ridge_takes_over_what_each_form_can_be():
    low_rank = torch.randn(H * D, 3) @ torch.randn(3, G * E)
    assert min(fit_on_linear(low_rank, (G, E), rank=3)[1]) >= 0.999
    assert max(fit_on_linear(low_rank, (G, E), rank=1)[1]) < 0.95
    full = torch.randn(H * D, G * E)
    assert min(fit_on_linear(full, (G, E), projection="elastic", residual=True)[1]) >= 0.999
    assert min(fit_on_linear(full, (G, E), projection="structured", residual=True)[1]) >= 0.999
    elastic = fit_on_linear(full, (G, E), projection="elastic", elastic_hidden=2 * G * E)[1]
    assert min(elastic) > 0.8 and max(elastic) < 0.999  # a linear map, but of normalised tokens
    assert max(fit_on_linear(full, (G, E), per_head=True)[1]) < 0.9  # it reads one head, the teacher read them all


@pytest.mark.parametrize("projection", ["flat", "structured"])
@pytest.mark.parametrize("share_layers", [False, True])
def test_per_head_ridge_recovers_a_teacher_whose_heads_read_one_head_each(projection, share_layers):
    blocks = torch.zeros(H, D, 6, E)  # 3 -> 6 heads: each is read by two
    for out in range(6):
        blocks[out // 2, :, out] = torch.randn(D, E)
    aligner, (of_k, of_v) = fit_on_linear(
        blocks.reshape(H * D, 6 * E), (6, E), per_head=True, projection=projection, share_layers=share_layers
    )
    assert min(of_k, of_v) >= 0.999
    weight = aligner.proj_v.to_flat()[0].view(-1, H, D, 6, E)
    elsewhere = [weight[:, h, :, out].abs().max() for out in range(6) for h in range(H) if h != out // 2]
    assert max(elsewhere) <= (0 if projection == "flat" else 1e-6)


def with_queries(kv: KV, seed: int) -> KV:
    random = torch.Generator().manual_seed(seed)
    shape = (B, 2 * G, kv.mask_BT.shape[1], E)
    return replace(kv, queries=tuple(torch.randn(shape, generator=random) for _ in kv.keys))


@torch.no_grad()
def read_error(aligner: MapProjectionAligner, batches, match_in: str) -> float:
    """Error of softmax(qk)v over real queries with the teacher's own attention, layer by layer, for values."""
    total = 0.0
    for teacher, student, _ in batches:
        (target, mask), source = aligner.targets(teacher), aligner.sources(student)
        error = (target.v - source.v) * mask[..., None]
        heads = G if match_in == "teacher" else H
        for row, layer in enumerate(LAYERS):
            a = attention_rows(teacher.queries[layer], teacher.keys[layer], mask)
            shares = head_shares(2 * G, G, heads)
            read = torch.einsum("bqts,bsje->bqtje", a, error[row].unflatten(2, (heads, -1))).square().sum((0, 2, 4))
            total += float((read * shares).sum())
    return total


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("match_in", ["teacher", "student"])
def test_ridge_on_attention_reads_better_than_ridge_on_values(match_in, share_layers):
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(H * D, G * E, generator=random)
    batches = []
    for seed in range(4):
        student = make_kv(range(L), H, D, TARGET, seed=seed, rope="none")
        kv = spectral_teacher(student, weight, (G, E))
        bent = tuple(v + 0.2 * v.square() + torch.randn(v.shape, generator=random) for v in kv.values)
        batches.append((with_queries(replace(kv, values=bent), seed), student, None))
    errors = {}
    for ridge_on in ("kv", "attention"):
        recipe = AlignRecipe(
            init="ridge",
            ridge_on=ridge_on,
            ridge_l2=1e-6,
            standardise=False,
            match_in=match_in,
            share_layers=share_layers,
        )
        aligner = MapProjectionAligner(recipe, (L, G, E), STUDENT, LAYERS)
        aligner.fit_projector(batches)
        errors[ridge_on] = read_error(aligner, batches, match_in)
    assert errors["attention"] < 0.99 * errors["kv"]


def test_ridge_on_attention_needs_queries_in_their_frame_and_follows_time_and_layer_maps():
    aligner = make_aligner(init="ridge", ridge_on="attention", layers="interpolate", per_head=True)
    mapping, student = time_map("segment", SOURCE, TARGET), student_kv()
    with pytest.raises(AlignmentError, match="needs queries"):
        aligner.fit_projector([(teacher_kv(), student, mapping)])
    kv = with_queries(teacher_kv(), 1)
    with pytest.raises(AlignmentError, match="they are unrotated"):
        aligner.fit_projector([(kv, student, mapping)])
    seen = []

    def rotate(kv: KV) -> KV:
        seen.append(kv)
        return replace(kv, rope="rotated")

    aligner.fit_projector([(kv, student, mapping)], rotate)
    assert seen == [kv] and torch.isfinite(aligner.sources(student).k).all()
    fitted = aligner.proj_v.to_flat()[0].clone()
    dirty = replace(
        student, values=tuple(v.masked_fill(TARGET[:, None, :, None] == 0, torch.nan) for v in student.values)
    )
    aligner.fit_projector([(kv, dirty, mapping)], rotate)
    torch.testing.assert_close(aligner.proj_v.to_flat()[0], fitted)


def test_options_without_a_meaning_are_refused():
    with pytest.raises(RecipeError, match=r"align\.per_head: per_head with projection flat"):
        make_aligner(per_head=True)
    with pytest.raises(RecipeError, match=r"align\.rank"):
        make_aligner(projection="elastic", rank=3)


def test_ridge_in_student_space_maps_back_and_stays_frozen():
    weight = torch.linalg.qr(torch.randn(G * E, G * E))[0]
    recipe = AlignRecipe(match_in="student", ridge_l2=1e-8)
    aligner = MapProjectionAligner(recipe, (L, G, E), (L, G, E))
    batches = [make_kv(range(L), G, E, SOURCE, seed=s) for s in range(10)]

    def teacher(kv: KV) -> KV:
        return kv.map_layers(
            lambda x: (x.transpose(1, 2).reshape(B, S, G * E) @ weight).view(B, S, G, E).transpose(1, 2)
        )

    aligner.fit_statistics((teacher(kv), None) for kv in batches)
    aligner.fit_projector((teacher(kv), kv, None) for kv in batches)
    target, mask = aligner.targets(teacher(batches[0]))
    source = aligner.sources(batches[0])
    torch.testing.assert_close(target.v[:, mask], source.v[:, mask], atol=1e-2, rtol=1e-2)
    assert not any(p.requires_grad for p in aligner.parameters())


def test_state_travels_through_safetensors(tmp_path):
    one = make_aligner(init="ridge")
    one.is_fitted = True
    other = MapProjectionAligner(one.recipe, TEACHER, STUDENT, LAYERS, seed=77)
    save_file(one.state_dict(), tmp_path / "a.safetensors")
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert set(one.state_dict()) == {
        *(f"proj_{kind}.{name}" for kind in "kv" for name in ("weight", "bias")),
        *(f"{kind}_{name}" for kind in "kv" for name in ("scale", "shift")),
    }
    kv, mapping = teacher_kv(), time_map("segment", SOURCE, TARGET)
    assert torch.equal(one.targets(kv, mapping)[0].k, other.targets(kv, mapping)[0].k)
    assert torch.equal(one.sources(student_kv()).v, other.sources(student_kv()).v)
    assert one.num_parameters == 2 * len(LAYERS) * (H * D * G * E + G * E)


def test_samples_do_not_see_each_other():
    aligner = make_aligner()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    kv = teacher_kv()
    shuffled = kv.map_layers(lambda x: x[order])
    shuffled = replace(shuffled, mask_BT=kv.mask_BT[order])
    target, mask = aligner.targets(kv, time_map("segment", SOURCE, TARGET))
    other, other_mask = aligner.targets(shuffled, time_map("segment", SOURCE[order], TARGET[order]))
    assert torch.equal(other.k, target.k[:, order]) and torch.equal(other_mask, mask[order])


def test_frames_and_shapes_are_checked():
    aligner = make_aligner()
    with pytest.raises(AlignmentError, match="keys are rotated"):
        aligner.sources(student_kv(rope="rotated"))
    with pytest.raises(AlignmentError, match="keys are rotated"):
        aligner.targets(teacher_kv(rope="rotated"))
    rotated = make_aligner(keys="rotated", time="pad")
    assert rotated.sources(student_kv(rope="rotated")).k.shape == (len(LAYERS), B, T, G * E)
    with pytest.raises(RecipeError, match=r"align\.keys"):
        make_aligner(keys="rotated", time="segment")
    with pytest.raises(AlignmentError, match="built for 2 of 5"):
        aligner.targets(make_kv(range(M), E, G, SOURCE))
    with pytest.raises(AlignmentError, match="time map"):
        aligner.targets(teacher_kv(), time_map("pad", TARGET, TARGET))
    with pytest.raises(AlignmentError, match="layer map"):
        MapProjectionAligner(AlignRecipe(), TEACHER, STUDENT, layer_map=layer_map("ratio", M + 1, L))
    with pytest.raises(AlignmentError, match="student layers"):
        make_aligner(student_layers=[0, L])
    with pytest.raises(AlignmentError, match="statistics"):
        aligner.set_statistics(some_statistics(2))
