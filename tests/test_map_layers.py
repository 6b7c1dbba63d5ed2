"""The map-layers stage on a tiny run: its numbers against plain model calls, its files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cka import slow_cka
from tiny_recipe import made_ready, tiny_recipe, tiny_tree
from transformers import AutoModelForCausalLM

from kvdistill.align.layers import layer_map
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.texts import load_tokenizer_of
from kvdistill.core.config import make_recipe
from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.runtime import derive_seed
from kvdistill.models import load_model
from kvdistill.stages.layers import _Measuring, map_layers
from kvdistill.study.folder import layer_maps

CHANGES = {
    "align": {"cka_texts": 11, "cka_top_k": 2, "cka_monotone": True},
    "arms": {"ce": {"teachers": []}, "by-hidden": {"align": {"layers": "cka", "cka_on": "hidden"}}},
}


def experiment_of(run: Path, **align: object) -> Experiment:
    tree = tiny_tree(run_dir=str(run), **CHANGES)
    tree["align"] = tree["align"] | align
    return Experiment(make_recipe(tree), run)


def similarity_path(run: Path, name: str) -> Path:
    return experiment_of(run).teachers[name].similarity_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Data and taught teachers: all that this stage reads."""
    run = tmp_path_factory.mktemp("layers") / "run"
    recipe = tiny_recipe(run, arms={"ce": {"teachers": []}, "fixed": {}})
    made_ready(recipe, run, "teach")
    return run


@pytest.fixture
def run(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def slow_hidden(model, texts: list[list[int]]) -> torch.Tensor:
    """Outputs of all layers but the last (that one transformers norms), one text at a time, without padding."""
    parts = []
    for ids in texts:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        parts.append(torch.stack(states[1:-1])[:, 0])
    return torch.cat(parts, dim=1)


def test_numbers_files_and_map(run):
    experiment, seen = experiment_of(run), []
    map_layers(experiment, lambda what, share, total: seen.append((what, share, total)))
    done = layer_maps(experiment.recipe, run)
    assert list(done) == ["one", "two"] and seen[-1] == ("map-layers", 2, 2)
    assert sorted(file.name for file in (run / "layers").iterdir() if file.suffix) == [
        f"{name}.{ending}" for name in ("one", "two") for ending in ("json", "png", "svg")
    ]
    found = json.loads(similarity_path(run, "one").read_text())
    examples = experiment.examples("train")
    texts = [examples[i].input_ids for i in _Measuring(experiment.teachers["one"]).numbers]
    assert len(texts) == 11 and found["num_vectors"] == sum(map(len, texts)) == done["one"]["num_vectors"]
    assert sorted(found["similarity"]) == ["hidden", "keys"], "the recipe's and the arm's"
    teacher = AutoModelForCausalLM.from_pretrained(run / "teachers" / "one" / "model").eval()
    recipe = experiment.recipe
    seed = derive_seed(recipe.seeds[0], "student")
    student = load_model(recipe.student, vocab_size=len(load_tokenizer_of(run)), seed=seed, place="student")
    expected = slow_cka(slow_hidden(teacher, texts), slow_hidden(student, texts))
    torch.testing.assert_close(
        torch.tensor(found["similarity"]["hidden"]).double()[:-1, :-1], expected, atol=1e-4, rtol=0
    )
    keys = torch.tensor(found["similarity"]["keys"])
    assert keys.shape == (2, 3) and (keys.abs() <= 1 + 1e-6).all()
    who = experiment.teachers["one"].identities
    for kind in ("keys", "hidden"):
        mapping = layer_map(
            "cka", 3, 2, str(similarity_path(run, "one")), top_k=2, monotone=True, on=kind,
            teacher=who["teacher"], student=who["student"],
        )  # fmt: skip
        written = {int(layer): dict(pairs) for layer, pairs in found["layer_map"][kind].items()}
        dense = torch.tensor([[written[layer].get(m, 0) for m in range(3)] for layer in range(2)])
        torch.testing.assert_close(mapping.to_dense(), dense, atol=1e-5, rtol=0)


def test_figures_are_pictures_and_the_same_every_time(run):
    map_layers(experiment_of(run))
    first = {file.name: file.read_bytes() for file in (run / "layers").glob("*.[ps][nv]g")}
    assert len(first) == 4
    assert first["one.png"].startswith(b"\x89PNG") and b"<svg" in first["one.svg"]
    map_layers(experiment_of(run))
    assert first == {file.name: file.read_bytes() for file in (run / "layers").glob("*.[ps][nv]g")}


def test_what_is_known_is_not_measured_again(run, monkeypatch):
    map_layers(experiment_of(run))
    before = json.loads(similarity_path(run, "two").read_text())

    def measured(*_: object) -> None:
        raise InterruptedError("measured")

    monkeypatch.setattr("kvdistill.stages.layers._Measuring.measure", measured)
    map_layers(experiment_of(run, cka_top_k=1))  # another map from the same similarities
    after = json.loads(similarity_path(run, "two").read_text())
    assert after["similarity"] == before["similarity"] and after["settings"] == {"top_k": 1, "monotone": True}
    assert all(len(pairs) == 1 for pairs in after["layer_map"]["keys"].values())
    for changed in (experiment_of(run, cka_texts=5), experiment_of(run, cka_on="values")):
        with pytest.raises(InterruptedError):
            map_layers(changed)
    similarity_path(run, "one").write_text('{"format": 1, "teacher"')
    with pytest.raises(InterruptedError):
        map_layers(experiment_of(run))


def test_a_file_of_another_student_is_refused(run):
    map_layers(experiment_of(run))
    other = Experiment(experiment_of(run).recipe.model_copy(update={"seeds": [8]}), run)
    who = other.teachers["one"].identities
    with pytest.raises(RecipeError, match=r"made with another student") as caught:
        layer_map("cka", 3, 2, str(similarity_path(run, "one")), student=who["student"])
    assert caught.value.place == str(similarity_path(run, "one"))


def test_more_layers_than_a_teacher_has_and_layers_that_do_not_vary(run, monkeypatch):
    with pytest.raises(RecipeError, match="3 teacher layers for each student layer, the teacher has 2"):
        map_layers(experiment_of(run, cka_top_k=3))

    def dead_layer(model, *arguments):
        found = states(model, *arguments)
        for x in found.values():
            if len(x) == 3:  # teacher one
                x[1] = 0.25
        return found

    import kvdistill.stages.layers as stage

    states = stage._states
    monkeypatch.setattr(stage, "_states", dead_layer)
    shutil.rmtree(run / "layers")
    with pytest.raises(AlignmentError, match="teacher layer 1 has no similarity") as caught:
        map_layers(experiment_of(run))
    assert caught.value.place == "teacher one and the student"
    assert not similarity_path(run, "one").exists()
