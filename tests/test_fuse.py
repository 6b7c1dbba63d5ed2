"""Weights per teacher, fused caches and the routing record, against loops and hand-made cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from scipy.special import softmax
from scipy.stats import entropy

from kvdistill.core.errors import AlignmentError, DataError, KVDistillError, RecipeError
from kvdistill.core.recipe import FuseRecipe
from kvdistill.fuse import (
    Fusion,
    RoutingRecord,
    build_fusion,
    competence_weights,
    fit_prototypes,
    fixed_weights,
    fuse_caches,
    k_means,
    similarity_weights,
)
from kvdistill.fuse.similarity import METRICS

N, L, B, T, C = 3, 2, 4, 5, 6
NAMES = ("ada", "bob", "cyd")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def left_and_right_padded() -> torch.Tensor:
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    mask_BT[0, :2] = False
    mask_BT[1, 3:] = False
    return mask_BT


# -- fixed and competence ---------------------------------------------------------------------


def test_fixed_weights() -> None:
    torch.testing.assert_close(fixed_weights(None, 4, 3), torch.full((4, 3), 0.25))
    torch.testing.assert_close(fixed_weights([7, 3, 0], 3, 2), torch.tensor([[0.7, 0.7], [0.3, 0.3], [0.0, 0.0]]))
    with pytest.raises(RecipeError, match=r"fuse\.weights.*2 weights for 3 teachers"):
        fixed_weights([0.5, 0.5], 3, 2)
    for bad in ([0.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [math.nan, 1.0]):
        with pytest.raises(RecipeError, match=r"fuse\.weights"):
            fixed_weights(bad, 2, 1)
    with pytest.raises(RecipeError, match="no teacher"):
        fixed_weights(None, 0, 1)


def test_competence_weights() -> None:
    nll_BN = draw(B, N).abs()
    expected = softmax(-nll_BN.double().numpy() / 0.3, axis=1)
    np.testing.assert_allclose(competence_weights(nll_BN, 0.3), expected, atol=1e-6)
    assert competence_weights(nll_BN.requires_grad_(), 0.3).requires_grad is False


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_competence_without_a_finite_nll(broken: float) -> None:
    nll_BN = draw(B, N).abs()
    nll_BN[2, 1] = broken
    weight = competence_weights(nll_BN, 1.0)
    assert weight[2, 1] == 0
    torch.testing.assert_close(weight[2, [0, 2]], (-nll_BN[2, [0, 2]]).softmax(0))
    nll_BN[2] = broken
    with pytest.raises(DataError, match=r"1 of 4 examples \(rows \[2\]"):
        competence_weights(nll_BN, 1.0)


# -- similarity -------------------------------------------------------------------------------


def slow_similarity(metric: str, q: np.ndarray, p: np.ndarray) -> float:
    if metric == "cosine":
        return float(q @ p / np.linalg.norm(q) / np.linalg.norm(p))
    return float(q @ p / math.sqrt(len(q))) if metric == "dot" else float(-np.linalg.norm(q - p) / math.sqrt(len(q)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("grain", ["example", "layer", "token"])
def test_similarity_is_the_loop(metric: str, grain: str) -> None:
    """Teachers of unlike sizes and numbers of prototypes; padding holds NaN and must not be read."""
    sizes, counts, mask_BT = (6, 7, 8), (1, 3, 2), left_and_right_padded()
    queries = [draw(L, B, T, c, seed=c).masked_fill(~mask_BT[..., None], math.nan) for c in sizes]
    prototypes = [draw(L, p, c, seed=10 + c) for p, c in zip(counts, sizes, strict=True)]
    got = similarity_weights(queries, mask_BT, prototypes, metric, 0.7, grain)
    assert got.shape == {"example": (N, 1, B, 1), "layer": (N, L, B, 1), "token": (N, 1, B, T)}[grain]
    for b in range(B):
        for l in range(got.shape[1]):
            for t in range(got.shape[3]):
                if grain == "token" and not mask_BT[b, t]:
                    continue
                scores = []
                for q, p in zip(queries, prototypes, strict=True):
                    per_layer = []
                    for layer in [l] if grain == "layer" else range(L):
                        x = q[layer, b, t] if grain == "token" else q[layer, b][mask_BT[b]].mean(0)
                        per_layer.append(max(slow_similarity(metric, x.numpy(), c) for c in p[layer].numpy()))
                    scores.append(np.mean(per_layer))
                np.testing.assert_allclose(got[:, l, b, t], softmax(np.array(scores) / 0.7), atol=2e-5)


def test_similarity_prefers_the_nearer_and_refuses_what_does_not_fit() -> None:
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    query = draw(L, B, T, C)
    near = query.mean(2).mean(1, keepdim=True)
    weights = similarity_weights([query] * 2, mask_BT, [near, -near], "euclidean", 0.1)
    assert (weights[0] > 0.5).all()
    with pytest.raises(AlignmentError, match="6 channels, prototypes of 7"):
        similarity_weights([query], mask_BT, [draw(L, 1, C + 1)])
    with pytest.raises(AlignmentError, match="1 student queries and prototypes of 2"):
        similarity_weights([query], mask_BT, [near, near])


@pytest.mark.parametrize("kind", ["mean", "first", "max"])
def test_prototypes_are_the_loop(kind: str) -> None:
    mask_BT = left_and_right_padded()
    mask_BT[3] = False  # an example without tokens does not count
    x = draw(L, B, T, C).masked_fill(~mask_BT[..., None], math.nan)
    batches = [(x[:, :1], mask_BT[:1]), (x[:, 1:], mask_BT[1:])]
    pool = {"mean": lambda rows: rows.mean(0), "first": lambda rows: rows[0], "max": lambda rows: rows.amax(0)}[kind]
    expected = torch.stack([torch.stack([pool(x[l, b][mask_BT[b]]) for b in range(3)]).mean(0) for l in range(L)])
    torch.testing.assert_close(fit_prototypes(batches, kind), expected[:, None])
    with pytest.raises(DataError, match=r"fuse\.prototype"):
        fit_prototypes([(x, torch.zeros(B, T, dtype=torch.bool))], kind)


def test_k_means_finds_clusters_and_is_deterministic() -> None:
    true = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
    rows = (true[:, None] + draw(4, 25, 2)).flatten(0, 1)[
        torch.randperm(100, generator=torch.Generator().manual_seed(1))
    ]
    found = k_means(rows, 4, seed=3)
    assert torch.equal(found, k_means(rows, 4, seed=3))
    expected, _ = kmeans2(rows.double().numpy(), true.double().numpy(), minit="matrix")
    order = torch.cdist(torch.as_tensor(expected).float(), found).argmin(1)
    np.testing.assert_allclose(found[order], expected, atol=1e-4)
    assert k_means(rows[:2], 4).shape == (2, 2)  # no more centres than rows
    same = k_means(torch.ones(5, 2), 3)
    assert torch.equal(same, torch.ones(3, 2))  # identical rows
    x = rows.view(1, 100, 1, 2)
    centres = fit_prototypes([(x, torch.ones(100, 1, dtype=torch.bool))], "k-means", 4, seed=3)
    torch.testing.assert_close(centres[0], found)


# -- Fusion -----------------------------------------------------------------------------------


def every_fusion() -> list[tuple[Fusion, dict]]:
    mask_BT = left_and_right_padded()
    prototypes = [draw(L, 2, C, seed=n) for n in range(N)]
    queries = [draw(L, B, T, C, seed=9)] * N
    similar = FuseRecipe(fusion_strategy="similarity", temperature=0.2)
    similar_inputs = {"query_N_LBTC": queries, "mask_BT": mask_BT}
    return [
        (build_fusion(FuseRecipe(weights=[1, 2, 5]), NAMES, L), {}),
        (build_fusion(FuseRecipe(fusion_strategy="competence"), NAMES, L), {"nll_BN": draw(B, N).abs()}),
        *(
            (build_fusion(similar, NAMES, L, prototypes, grain), similar_inputs)
            for grain in ("example", "token", "layer")
        ),
    ]


def test_every_strategy_gives_broadcastable_weights_that_sum_to_one() -> None:
    for fusion, inputs in every_fusion():
        assert fusion.needs == set(inputs) and fusion.teacher_names == NAMES
        weights = fusion.weights(B, **inputs)
        assert torch.broadcast_shapes(weights.shape, (N, L, B, T)) == (N, L, B, T) and weights.shape[2] == B
        assert weights.requires_grad is False
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1:]))
        if inputs:
            with pytest.raises(AlignmentError, match=sorted(inputs)[0]):
                fusion.weights(B)


def test_strategies_are_the_functions() -> None:
    fixed, competence = (fusion.weights(B, **inputs) for fusion, inputs in every_fusion()[:2])
    torch.testing.assert_close(fixed[:, 0, :, 0], fixed_weights([1, 2, 5], N, B))
    torch.testing.assert_close(competence[:, 0, :, 0], competence_weights(draw(B, N).abs(), 1.0).T)


def test_build_fusion_refuses_what_does_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"fuse\.weights.*2 weights for 3 teachers"):
        build_fusion(FuseRecipe(weights=[1, 2]), NAMES, L)
    for prototypes in (None, [draw(L, 1, C)], [draw(L + 1, 1, C)] * N):
        with pytest.raises(AlignmentError, match="fit_prototypes"):
            build_fusion(FuseRecipe(fusion_strategy="similarity"), NAMES, L, prototypes)
    with pytest.raises(KVDistillError, match=r"fuse\.fusion_strategy"):
        build_fusion(FuseRecipe().model_copy(update={"fusion_strategy": "vote"}), NAMES, L)
    competence = build_fusion(FuseRecipe(fusion_strategy="competence"), NAMES, L)
    with pytest.raises(AlignmentError, match="3 teachers"):
        competence.weights(B, nll_BN=draw(B, N - 1))


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(N)), seed=st.integers(0, 99), grain=st.sampled_from(["example", "token", "layer"]))
def test_teachers_in_another_order_give_the_same_weights_in_that_order(order: list[int], seed: int, grain: str) -> None:
    order = list(order)
    nll_BN, mask_BT = draw(B, N, seed=seed).abs(), left_and_right_padded()
    torch.testing.assert_close(competence_weights(nll_BN)[:, order], competence_weights(nll_BN[:, order]))
    queries = [draw(L, B, T, C + n, seed=seed + n) for n in range(N)]
    prototypes = [draw(L, 2, C + n, seed=seed + n + 7) for n in range(N)]
    plain = similarity_weights(queries, mask_BT, prototypes, "cosine", 0.3, grain)
    moved = similarity_weights(
        [queries[i] for i in order], mask_BT, [prototypes[i] for i in order], "cosine", 0.3, grain
    )
    torch.testing.assert_close(plain[order], moved)
    torch.testing.assert_close(moved.sum(0), torch.ones(moved.shape[1:]))
    targets = [draw(L, B, T, C, seed=seed + n) for n in range(N)]
    masks = [torch.rand(B, T, generator=torch.Generator().manual_seed(seed + n)) < 0.6 for n in range(N)]
    fused, mask = fuse_caches(targets, masks, plain)
    fused_moved, mask_moved = fuse_caches([targets[i] for i in order], [masks[i] for i in order], plain[order])
    torch.testing.assert_close(fused, fused_moved)
    assert torch.equal(mask, mask_moved)


# -- N caches into one ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, 1, B, 1), (N, L, B, 1), (N, 1, B, T), (N, L, B, T)])
@pytest.mark.parametrize("per_layer_mask", [False, True])
def test_fused_caches_are_the_loop(shape: tuple[int, ...], per_layer_mask: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand((L, B, T) if per_layer_mask else (B, T), generator=generator) < 0.5 for _ in range(N)]
    full = torch.stack([mask.expand(L, B, T) for mask in masks])
    targets = [draw(L, B, T, C, seed=n).masked_fill(~full[n][..., None], math.nan) for n in range(N)]
    weights = draw(*shape, seed=5).softmax(0)
    fused, mask = fuse_caches(targets, masks, weights)
    assert mask.shape == ((L, B, T) if per_layer_mask or shape[1] > 1 else (B, T))
    mask = mask.expand(L, B, T)
    wide = weights.expand(N, L, B, T)
    for l in range(L):
        for b in range(B):
            for t in range(T):
                here = [n for n in range(N) if full[n, l, b, t]]
                assert bool(mask[l, b, t]) == bool(here)
                total = sum(float(wide[n, l, b, t]) for n in here)
                expected = sum((targets[n][l, b, t] * wide[n, l, b, t] / total for n in here), torch.zeros(C))
                torch.testing.assert_close(fused[l, b, t], expected)


def test_fused_caches_keep_the_graph_of_targets_only() -> None:
    target, other = draw(L, B, T, C).requires_grad_(), draw(L, B, T, C, seed=1)
    weights = torch.full((2, 1, B, 1), 0.5, requires_grad=True)
    masks = [torch.ones(B, T, dtype=torch.bool)] * 2
    fused, _ = fuse_caches([target, other.bfloat16().float()], masks, weights)
    fused.sum().backward()
    torch.testing.assert_close(target.grad, torch.full_like(target, 0.5))
    assert weights.grad is None
    none, mask = fuse_caches([other, other], masks, torch.zeros(2, 1, B, 1))
    assert not mask.any() and (none == 0).all()  # present, but without weight: nothing there
    assert fuse_caches([other.bfloat16()] * 2, masks, weights)[0].dtype == torch.bfloat16
    with pytest.raises((AlignmentError, TypeError)):  # TypeError: jaxtyping's own check, where its hook is on
        fuse_caches([other, other], masks[:1], weights)


# -- the record -------------------------------------------------------------------------------


def test_routing_record_is_the_loop() -> None:
    record = RoutingRecord(NAMES, L)
    tasks = (["chain", "product", "chain", "svamp"], ["product"] * 4)
    weights, masks = [draw(N, L, B, T, seed=s).softmax(0) for s in (1, 2)], [left_and_right_padded() for _ in range(2)]
    masks[1][3] = False  # left out of everything
    examples = []  # (task, per-layer weights [L, N], mean entropy)
    for w, m, names in zip(weights, masks, tasks, strict=True):
        record.add(w, m, names)
        for b in range(B):
            if m[b].any():
                real = w[:, :, b][:, :, m[b]].double()
                bits = [entropy(real[:, l, t].numpy()) for l in range(L) for t in range(real.shape[2])]
                examples.append((names[b], real.mean(2).T.numpy(), np.mean(bits)))
    row = record.row()
    per_layer = np.mean([x[1] for x in examples], axis=0)
    np.testing.assert_allclose([[layer[n] for n in NAMES] for layer in row["by_layer"]], per_layer, atol=1e-6)
    np.testing.assert_allclose([row["mean"][n] for n in NAMES], per_layer.mean(0), atol=1e-6)
    assert row["entropy"] == pytest.approx(np.mean([x[2] for x in examples]), abs=1e-6)
    assert sorted(row["by_task"]) == ["chain", "product", "svamp"]
    for task, got in row["by_task"].items():
        expected = np.mean([x[1].mean(0) for x in examples if x[0] == task], axis=0)
        np.testing.assert_allclose([got[n] for n in NAMES], expected, atol=1e-6)
    assert json.loads(json.dumps(row)) == row
    assert record.row() == {}  # started anew


def test_routing_record_of_weights_without_layers_or_tokens() -> None:
    record = RoutingRecord(NAMES, L)
    mask_BT = left_and_right_padded()
    record.add(torch.tensor([1.0, 0.0, 0.0])[:, None, None, None].expand(N, 1, B, 1), mask_BT)
    row = record.row()
    assert row["mean"] == {"ada": 1.0, "bob": 0.0, "cyd": 0.0} and row["entropy"] == 0
    assert row["by_layer"] == [row["mean"]] * L and row["by_task"] == {}
    record.add(torch.full((N, 1, B, 1), 1 / N), mask_BT)
    assert record.row()["entropy"] == pytest.approx(math.log(N))
    record.add(torch.full((N, 1, B, 1), 1 / N), torch.zeros(B, T, dtype=torch.bool), ["chain"] * B)
    assert record.row() == {}


@settings(max_examples=20, deadline=None)
@given(extra=st.integers(1, 4), side=st.booleans(), seed=st.integers(0, 99))
def test_padding_changes_no_weight_and_no_record(extra: int, side: bool, seed: int) -> None:
    mask_BT, query = left_and_right_padded(), draw(L, B, T, C, seed=seed)
    prototypes = [draw(L, 2, C, seed=seed + n) for n in range(N)]
    junk = torch.full((L, B, extra, C), math.nan)
    nothing = torch.zeros(B, extra, dtype=torch.bool)
    wide = torch.cat([junk, query] if side else [query, junk], dim=2)
    wide_mask = torch.cat([nothing, mask_BT] if side else [mask_BT, nothing], dim=1)
    for grain in ("example", "token", "layer"):
        plain = similarity_weights([query] * N, mask_BT, prototypes, grain=grain)
        padded = similarity_weights([wide] * N, wide_mask, prototypes, grain=grain)
        records = [RoutingRecord(NAMES, L), RoutingRecord(NAMES, L)]
        records[0].add(plain, mask_BT, list("xyxy"))
        records[1].add(padded, wide_mask, list("xyxy"))
        one, two = (json.dumps(r.row(), sort_keys=True, default=float) for r in records)
        flat = [np.array([float(x) for x in _numbers(json.loads(s))]) for s in (one, two)]
        np.testing.assert_allclose(*flat, atol=1e-6)
        if grain != "token":
            torch.testing.assert_close(plain, padded)
    for kind in ("mean", "first", "max", "k-means"):
        torch.testing.assert_close(fit_prototypes([(query, mask_BT)], kind), fit_prototypes([(wide, wide_mask)], kind))


def _numbers(node: object) -> list[float]:
    if isinstance(node, dict):
        return [x for key in sorted(node) for x in _numbers(node[key])]
    if isinstance(node, list):
        return [x for item in node for x in _numbers(item)]
    return [float(node)]
