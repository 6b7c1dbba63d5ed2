"""Layer maps against their formulas written as loops."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align.layers import layer_map, layer_sources, needed_teacher_layers, parse_layer_range
from kvdistill.core.runtime import RecipeError

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
    with pytest.raises(RecipeError, match="unknown layer mode 'cka'"):
        layer_map("cka", 3, 2)


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
