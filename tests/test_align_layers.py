"""Layer maps against their formulas written as loops."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align.layers import (
    CKALayerMapper,
    cka_map,
    layer_map,
    layer_sources,
    needed_teacher_layers,
    parse_layer_range,
    read_layer_similarity,
)
from kvdistill.core.errors import AlignmentError, RecipeError

EXAMPLES = settings(max_examples=80, deadline=None)
sizes = st.integers(1, 40)


def slow_rows(mode: str, M: int, L: int) -> list[dict[int, float]]:
    rows = []
    for layer in range(L):
        if mode == "ratio":
            rows.append({math.ceil((layer + 1) * M / L - 1e-9) - 1: 1.0})
        elif mode == "terminal":
            rows.append({max(0, M - (L - layer)): 1.0})
        else:
            place = M - 1 if L == 1 else layer * (M - 1) / (L - 1)
            low = min(math.floor(place + 1e-9), M - 1)
            rows.append({low: 1 - (place - low)} | ({low + 1: place - low} if place - low > 1e-6 else {}))
    return rows


@EXAMPLES
@given(mode=st.sampled_from(["ratio", "interpolate", "terminal"]), M=sizes, L=sizes)
def test_layer_maps_are_the_formula_stochastic_and_monotone(mode, M, L):
    mapping = layer_map(mode, M, L)
    assert (mapping.n_out, mapping.n_in) == (L, M)
    dense = torch.zeros(L, M)
    for layer, row in enumerate(slow_rows(mode, M, L)):
        for source, weight in row.items():
            dense[layer, source] += weight
    torch.testing.assert_close(mapping.to_dense(), dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(mapping.weight.sum(-1), torch.ones(L))
    depth = mapping.to_dense() @ torch.arange(M, dtype=torch.float32)
    assert (depth.diff() >= -1e-4).all()
    assert depth[-1] == M - 1, "the top student layer reads the top teacher layer"


@EXAMPLES
@given(mode=st.sampled_from(["ratio", "interpolate", "terminal"]), M=sizes)
def test_equal_depth_is_the_identity(mode, M):
    torch.testing.assert_close(layer_map(mode, M, M).to_dense(), torch.eye(M), atol=0, rtol=0)


def test_ratio_by_hand():
    assert layer_map("ratio", 28, 4).index.flatten().tolist() == [6, 13, 20, 27]
    assert layer_map("ratio", 3, 5).index.flatten().tolist() == [0, 1, 1, 2, 2]


def test_explicit_from_dict_and_file(tmp_path):
    written = {0: [1], 2: [4, 0, 3], 1: [2, 3]}
    mapping = layer_map("explicit", 5, 3, written)
    expected = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [1 / 3, 0, 0, 1 / 3, 1 / 3]])
    torch.testing.assert_close(mapping.to_dense(), expected)
    file = tmp_path / "map.json"
    file.write_text(json.dumps(written))
    torch.testing.assert_close(layer_map("explicit", 5, 3, str(file)).to_dense(), expected)
    assert needed_teacher_layers(mapping, [0, 1]) == [1, 2, 3]
    assert needed_teacher_layers(mapping, [2]) == [0, 3, 4]
    assert layer_sources(mapping, [1]) == [[(2, 0.5), (3, 0.5)]]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"0": [0]}, "student layer 1 is missing"),
        ({"0": [0], "1": [7]}, "student layer 1 reads teacher layer 7"),
        ({"0": [0], "1": [True]}, "student layer 1 reads teacher layer True"),
        ({"0": [0], "1": []}, "student layer 1 has no list"),
        ({"0": [0], "1": [0], "2": [0]}, "student layer '2' does not exist"),
        ([[0], [1]], "not an object"),
    ],
)
def test_a_wrong_file_is_named_with_its_layer(tmp_path, written, words):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(written))
    with pytest.raises(RecipeError, match=words) as caught:
        layer_map("explicit", 3, 2, str(file))
    assert caught.value.place == str(file)
    assert caught.value.fix


def test_missing_or_torn_files_and_missing_maps(tmp_path):
    (tmp_path / "torn.json").write_text("{")
    for file, words in (("none.json", "cannot read"), ("torn.json", "not JSON")):
        with pytest.raises(RecipeError, match=words):
            layer_map("explicit", 3, 2, str(tmp_path / file))
    with pytest.raises(RecipeError, match="without a map"):
        layer_map("explicit", 3, 2)
    with pytest.raises(RecipeError, match="unknown layer mode 'middle'") as caught:
        layer_map("middle", 3, 2)
    assert "cka" in caught.value.fix


def test_layer_ranges():
    assert parse_layer_range("all", 4) == [0, 1, 2, 3]
    assert parse_layer_range("0-2", 4) == [0, 1, 2]
    assert parse_layer_range("3, 1", 4) == [1, 3]
    assert parse_layer_range("0-1,3,1", 4) == [0, 1, 3]


@pytest.mark.parametrize("words", ["0-12", "4", "2-1", "-1", "a", "", "1-", "1,,2"])
def test_wrong_layer_ranges(words):
    with pytest.raises(RecipeError) as caught:
        parse_layer_range(words, 4, place="arms.x.loss.distill_layers")
    assert caught.value.place == "arms.x.loss.distill_layers"


# -- cka ----------------------------------------------------------------------------------------------


@st.composite
def similarities(draw, most_M: int = 7, most_L: int = 5):
    M, L = draw(st.integers(1, most_M)), draw(st.integers(1, most_L))
    whole = st.integers(-3, 10)  # tenths: ties and negative ones happen
    rows = draw(st.lists(st.lists(whole, min_size=M, max_size=M), min_size=L, max_size=L))
    return torch.tensor(rows, dtype=torch.float64) / 10, draw(st.integers(1, M))


def slow_weights(similarity: list[float], chosen: list[int]) -> list[float]:
    row, positive = [0.0] * len(similarity), {m: max(similarity[m], 0.0) for m in chosen}
    if not any(positive.values()):
        best = max(chosen, key=lambda m: (similarity[m], -m))
        positive[best] = 1.0
    for m, share in positive.items():
        row[m] = share / sum(positive.values())
    return row


@EXAMPLES
@given(given_k=similarities(), monotone=st.booleans())
def test_cka_maps_are_stochastic_and_weighted_by_similarity(given_k, monotone):
    similarity, k = given_k
    mapping = cka_map(similarity, k, monotone)
    assert mapping.index.shape == (*similarity.shape[:1], k) and mapping.n_in == similarity.shape[1]
    assert mapping.weight.dtype == torch.float32
    expected = [
        slow_weights(row, chosen) for row, chosen in zip(similarity.tolist(), mapping.index.tolist(), strict=True)
    ]
    torch.testing.assert_close(mapping.to_dense(), torch.tensor(expected))
    assert all(len(set(row)) == k for row in mapping.index.tolist())


@EXAMPLES
@given(given_k=similarities())
def test_without_the_constraint_no_other_layers_are_more_similar(given_k):
    similarity, k = given_k
    for row, chosen in zip(similarity.tolist(), cka_map(similarity, k).index.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda m: (-row[m], m))
        assert chosen == ranked[:k]


@EXAMPLES
@given(given_k=similarities(most_M=5, most_L=4))
def test_the_monotone_path_is_the_best_of_all(given_k):
    similarity, k = given_k
    rows, places = similarity.tolist(), range(similarity.shape[1] - k + 1)

    def total(path: tuple[int, ...]) -> float:
        return sum(sum(row[start : start + k]) for row, start in zip(rows, path, strict=True))

    best = max(map(total, itertools.combinations_with_replacement(places, len(rows))))
    chosen = [sorted(row) for row in cka_map(similarity, k, monotone=True).index.tolist()]
    assert all(row == list(range(row[0], row[0] + k)) for row in chosen), "windows"
    path = tuple(row[0] for row in chosen)
    assert list(path) == sorted(path), "never shallower"
    assert total(path) == pytest.approx(best)


def test_cka_by_hand():
    similarity = torch.tensor([[0.1, 0.9, 0.3, 0.6], [0.8, 0.2, 0.1, 0.7], [0.0, -0.2, -0.1, -0.3]])
    free = layer_map("cka", 4, 3, similarity_LM=similarity)
    assert free.index.tolist() == [[1, 3], [0, 3], [0, 2]]
    torch.testing.assert_close(free.weight, torch.tensor([[0.6, 0.4], [8 / 15, 7 / 15], [1.0, 0.0]]))
    one = layer_map("cka", 4, 3, similarity_LM=similarity, top_k=1, monotone=True)
    assert one.index.flatten().tolist() == [1, 3, 3]  # 0.9 + 0.7 - 0.3 beats 0.1 + 0.8 + 0.0
    assert needed_teacher_layers(free, [2]) == [0]


def test_cka_bad_input():
    similarity = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RecipeError, match="4 teacher layers for each student layer, the teacher has 3") as caught:
        layer_map("cka", 3, 2, similarity_LM=similarity, top_k=4)
    assert caught.value.place == "align.cka_top_k"
    with pytest.raises(RecipeError, match="cka without similarities") as caught:
        layer_map("cka", 3, 2)
    assert "kvdistill map-layers" in caught.value.fix
    for place, words in (((slice(None), 2), "teacher layer 2 "), (1, "student layer 1 "), ((0, 1), "student layer 0 ")):
        torn = similarity.clone()
        torn[place] = torch.nan
        with pytest.raises(AlignmentError, match=words + "has no similarity"):
            cka_map(torn)


def written(**changes: object) -> dict[str, object]:
    return {
        "format": 1,
        "teacher": {"name": "big", "num_layers": 3, "identity": "aa"},
        "student": {"name": "small", "num_layers": 2, "identity": "bb"},
        "similarity": {"keys": [[0.25, 0.75, 0.5], [0.5, None, 1]], "hidden": [[1, 0, 0], [0, 0, 1]]},
    } | changes


def test_similarities_from_their_file(tmp_path):
    file = tmp_path / "big.json"
    file.write_text(json.dumps(written()))
    found = read_layer_similarity(file, 3, 2, teacher="aa", student="bb")
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75, 0.5], [0.5, torch.nan, 1]]).double(), equal_nan=True)
    mapping = layer_map("cka", 3, 2, str(file), top_k=1, on="hidden", teacher="aa")
    assert mapping.index.flatten().tolist() == [0, 2]


SHORT = {"name": "big", "num_layers": 4, "identity": "aa"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": SHORT}, r"made with a teacher of 4 layers \(big\), this one has 3"),
        ({"student": SHORT}, r"made with a student of 4 layers \(big\), this one has 2"),
        ({"teacher": SHORT | {"num_layers": 3, "identity": "cc"}}, r"another teacher \(big\)"),
        ({"student": SHORT | {"num_layers": 2, "identity": "cc"}}, r"another student \(big\)"),
        ({"similarity": {"values": []}}, "measured on values, keys are wanted"),
        ({"similarity": {"keys": [[1, 2, 3]]}}, "not 2 rows of 3 numbers"),
        ({"similarity": {"keys": [[1, 2, 3], [1, 2]]}}, "not 2 rows of 3 numbers"),
        ({"similarity": {"keys": [[1, 2, 3], [1, 2, "3"]]}}, "not 2 rows of 3 numbers"),
        ({"similarity": [[1]]}, "not a file of layer similarities"),
        ({"format": 7}, "written in format 7"),
    ],
)
def test_a_file_of_other_models_or_of_another_kind_is_named(tmp_path, changes, words):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(written(**changes)))
    with pytest.raises(RecipeError, match=words) as caught:
        layer_map("cka", 3, 2, str(file), teacher="aa", student="bb")
    assert caught.value.place == str(file)
    assert "kvdistill map-layers" in caught.value.fix


def test_a_missing_torn_or_foreign_file_of_similarities(tmp_path):
    for text, words in ((None, "cannot read"), ('{"format": 1,', "not JSON"), ('{"0": [1]}', "not a file of layer")):
        file = tmp_path / "x.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(RecipeError, match=words) as caught:
            layer_map("cka", 3, 2, str(file))
        assert caught.value.place == str(file) and "kvdistill map-layers" in caught.value.fix


def test_the_mapper_finds_permuted_turned_layers():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(3, 70, 5, generator=g)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=g))[0]
    teacher = torch.stack([4 * torch.nn.functional.pad(student[i], (0, 2)) @ turn + 1 for i in (2, 0, 1, 0)])
    teacher[3] += torch.randn(70, 7, generator=g)
    mapper = CKALayerMapper(top_k=1)
    mask = torch.arange(70) % 9 > 0
    for part in torch.arange(70).split(30):
        mapper.update(teacher[:, part], student[:, part], mask[part])
    assert mapper.map().index.flatten().tolist() == [1, 2, 0]
    torch.testing.assert_close(mapper.similarity()[[0, 1, 2], [1, 2, 0]], torch.ones(3).double(), atol=1e-6, rtol=0)
