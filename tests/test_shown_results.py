"""What is said of a result: the figure that verdicts are about, why one is refused, what layer maps are worth."""

from __future__ import annotations

import torch

from kvdistill.align.layers import cka_map, map_notes
from kvdistill.cli.profiles import layer_lines
from kvdistill.cli.tables import as_text


def arm(accuracy: float, nll: float, reasoning: float | None = None) -> dict[str, object]:
    found: dict[str, object] = {"mean": accuracy, "std": 0.01, "nll": {"mean": nll, "std": 0.02}}
    return found | {"nll_reasoning": {"mean": reasoning, "std": None}}


def test_a_study_about_nll_shows_nll_first_and_refusals_with_their_reason() -> None:
    told = ["kv against ce: refused: 1 seed(s) in common; other data"]
    summary = {"arms": {"ce": arm(0.0, 3.94, 1.5), "kv": arm(0.0, 3.63, 1.25)}, "told": told}
    lines = as_text({"summary": summary | {"primary": "nll"}}).splitlines()
    assert lines[0].split() == ["NLL,", "answer", "NLL,", "reasoning", "accuracy,", "%"]
    assert lines[2].split()[:5] == ["kv", "3.630", "±", "0.020", "1.250"]
    assert lines[-1] == f"  {told[0]}"
    lines = as_text({"summary": summary | {"primary": "accuracy"}}).splitlines()
    assert lines[0].split()[:2] == ["accuracy,", "%"]
    without = {"arms": {"ce": arm(0.5, 1.0)}, "comparisons": []}
    assert "reasoning" not in as_text({"summary": without})


def test_a_layer_map_that_crosses_or_is_weak_says_so() -> None:
    straight = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.0, 0.2, 0.7]])
    assert map_notes(straight, cka_map(straight, 1)) == []
    crossing = straight[[1, 0, 2]]
    [note] = map_notes(crossing, cka_map(crossing, 1))
    assert note.startswith("the map crosses: student layer 1 read") and "cka_monotone" in note
    [note] = map_notes(straight * 0.3, cka_map(straight * 0.3, 1))
    assert note.startswith("weak: student layers 0, 1, 2 and")
    found = {"compared": "keys", "num_vectors": 12, "layer_map": {"0": [[0, 1.0]]}, "similarity": [[0.2]]}
    found |= {"file": "a.json", "figures": [], "notes": [note]}
    assert any(note[:40] in line for line in layer_lines({"t": found}))
