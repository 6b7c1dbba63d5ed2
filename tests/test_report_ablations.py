"""What the page shows beside verdicts: ablations found in the recipe, radar or bars, models and worked examples."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from run_factory import make_recipe, mark_again, write_lines, write_object, write_run
from scipy import stats as distributions

from kvdistill.stages.report import report
from kvdistill.stages.report.ablations import (
    KEYS_AND_VALUES,
    LAYERS,
    draw_heatmaps,
    draw_keys_and_values,
    draw_spread,
    find_ablations,
)
from kvdistill.stages.report.canvas import figure_rules
from kvdistill.stages.report.collect import collect_tables
from kvdistill.stages.report.curves import MAX_ARMS, draw_curves, gap
from kvdistill.stages.report.figures import draw_cka, draw_radar, draw_routing, draw_task_bars
from kvdistill.stages.report.models import STUDENT, count_parameters, read_models
from kvdistill.stages.report.summary import compare_all, summarise

ABLATED: dict[str, Any] = {
    "ce": {"teachers": []},
    "both": {},
    "keys": {"loss": {"v_weight": 0.0}},
    "values": {"loss": {"k_weight": 0.0}},
    "deep": {"loss": {"distill_layers": "1"}},
    "shallow": {"loss": {"distill_layers": "0"}},
    "soft": {"align": {"time": "segment"}},
    "two-things": {"align": {"time": "segment", "layers": "terminal"}, "loss": {"kind": "l1"}},
    "placebo": {"control": "placebo"},
    "one-teacher": {"teachers": ["adds"]},
}


def found_in(recipe: Any) -> dict[tuple[str, ...], list[set[str]]]:
    groups: dict[tuple[str, ...], list[set[str]]] = {}
    for one in find_ablations(recipe):
        groups.setdefault(one.keys, []).append(set(one.arms))
    return groups


def test_arms_are_set_against_each_other_where_one_thing_differs() -> None:
    found = found_in(make_recipe(ABLATED, report={"comparisons": []}))
    assert found == {
        KEYS_AND_VALUES: [{"both", "keys", "values"}],
        LAYERS: [{"both", "deep", "shallow"}],
        ("align.time",): [{"both", "soft"}],
        ("teachers",): [{"both", "one-teacher"}],
    }  # not ce and not the placebo; and of two things at once nothing can be said


def test_the_same_change_on_two_bases_gives_two_groups() -> None:
    arms = {"a": {}, "b": {"loss": {"distill_layers": "0"}}, "c": {"align": {"layers": "terminal"}},
            "d": {"align": {"layers": "terminal"}, "loss": {"distill_layers": "0"}}}  # fmt: skip
    found = found_in(make_recipe(arms, report={"comparisons": []}))
    assert found[LAYERS] == [{"a", "b"}, {"c", "d"}] and found["align.layers",] == [{"a", "c"}, {"b", "d"}]


@given(st.lists(st.tuples(st.sampled_from("012"), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=5))
def test_in_a_group_everything_but_its_keys_is_equal(settings: list[tuple[str, float]]) -> None:
    arms = {f"arm-{i}": {"loss": {"distill_layers": l, "k_weight": k}} for i, (l, k) in enumerate(settings)}
    for one in find_ablations(make_recipe(arms, report={"comparisons": []})):
        chosen = [settings[int(arm.removeprefix("arm-"))] for arm in one.arms]
        assert len(set(one.arms.values())) > 1
        other = 1 if one.keys == LAYERS else 0
        assert len({pair[other] for pair in chosen}) == 1


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("ablated")
    recipe = make_recipe(ABLATED, report={"comparisons": [["both", "ce"]]})
    accuracy = {arm: (0.2 + 0.05 * i, 0.3 + 0.04 * i) for i, arm in enumerate(ABLATED)}
    write_run(run, recipe, questions=12, accuracy=accuracy)
    tables = collect_tables(recipe, run)
    return recipe, run, summarise(recipe, tables, compare_all(recipe, tables))


def drawn(draw: Any, *args: Any) -> Figure:
    with figure_rules():
        figure = draw(*args)
    assert isinstance(figure, Figure), figure
    return figure


def words_in(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_heatmaps_show_the_arms_own_means(ablated: tuple[Any, Path, dict[str, Any]]) -> None:
    recipe, _, summary = ablated
    layers = [one for one in find_ablations(recipe) if one.keys == LAYERS]
    figure = drawn(draw_heatmaps, summary, layers, "accuracy")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all · both", "1 · deep", "0 · shallow"]
    deep = summary["arms"]["deep"]
    assert words_in(figure)[3] == f"{100 * deep['mean']:.1f} ± {100 * deep['std']:.1f}"
    assert axes.images[0].get_array()[1].tolist() == pytest.approx(
        [deep["mean"], deep["by_task"]["chain"]["mean"], deep["by_task"]["product"]["mean"]]
    )
    assert isinstance(draw_heatmaps(summary, layers, "nll"), Figure)
    assert "distill_layers" in str(draw_heatmaps(summary, [], "accuracy", reason="no_layers"))


def test_keys_and_values_are_named(ablated: tuple[Any, Path, dict[str, Any]]) -> None:
    recipe, _, summary = ablated
    weights = [one for one in find_ablations(recipe) if one.keys == KEYS_AND_VALUES]
    figure = drawn(draw_keys_and_values, summary, weights, ["ce"], "accuracy")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["no teacher · ce", "keys and values · both", "keys only · keys", "values only · values"]


def test_the_spread_has_the_interval_of_a_standard_deviation(ablated: tuple[Any, Path, dict[str, Any]]) -> None:
    summary = ablated[2]
    figure = drawn(draw_spread, summary, "accuracy")
    std = 100 * summary["arms"]["both"]["std"]
    [low, high] = figure.axes[1].get_lines()[2].get_xdata()  # a line and a point per arm, ce first
    assert [low, high] == pytest.approx([std * np.sqrt(2 / distributions.chi2.ppf(q, 2)) for q in (0.975, 0.025)])
    assert low < std < high and high / std > 5  # three seeds say little


def test_a_page_with_ablations_draws_them(ablated: tuple[Any, Path, dict[str, Any]]) -> None:
    recipe, run, _ = ablated
    page = report(recipe, run).read_text()
    figures = json.loads((run / "summary.json").read_text())["figures"]
    assert [name for name, why in figures.items() if why] == ["cost_curves", "cka_heatmap"]
    assert "loss.distill_layers = 1" in page and "Which student layers are taught" in page


# -- tasks ----------------------------------------------------------------------------------------------


def summary_with_tasks(num: int) -> dict[str, Any]:
    rng, tasks = np.random.default_rng(num), [f"task {i}" for i in range(num)]
    arms = {}
    for arm in ("ce", "one", "two"):
        by_task = {
            t: {"mean": m, "std": 0.02, "per_seed": [m] * 3} for t, m in zip(tasks, rng.random(num), strict=True)
        }
        mean = float(np.mean([found["mean"] for found in by_task.values()]))
        arms[arm] = {"mean": mean, "std": 0.02, "per_seed": [mean] * 3, "by_task": by_task}
    return {"arms": arms, "tasks": tasks}


@pytest.mark.parametrize("num", [3, 7, 12])
def test_a_radar_is_closed_and_lies_over_the_reference(num: int) -> None:
    summary = summary_with_tasks(num)
    figure = drawn(draw_radar, summary, ["two", "one", "ce"], "ce")
    assert [axes.get_title("left") for axes in figure.axes] == ["ce", "one", "two"]
    for axes, (_, arm) in zip(figure.axes, summary["arms"].items(), strict=True):
        values = axes.get_lines()[0].get_ydata()
        assert len(values) == num + 1 and values[0] == values[-1]
        assert values[1] == arm["by_task"]["task 1"]["mean"]
    assert [len(axes.patches) for axes in figure.axes] == [0, 1, 1]  # the reference's surface, but not on itself


def test_bars_take_the_radar_s_place_where_there_are_two_tasks() -> None:
    figure = drawn(draw_task_bars, summary_with_tasks(2), "accuracy")
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert len(heights) == 6 and heights[0] == summary_with_tasks(2)["arms"]["ce"]["by_task"]["task 0"]["mean"]
    assert "one task" in str(draw_task_bars(summary_with_tasks(1), "accuracy"))


def test_a_page_shows_one_question_of_each_task_with_every_arm_s_answer(tmp_path: Path) -> None:
    recipe = make_recipe()
    write_run(tmp_path, recipe, questions=5)
    for path in tmp_path.glob("arms/*/*/records.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        arm = path.parent.parent.name
        write_lines(path, [{**row, "completion": f"thinking of {arm} about {row['id']}"} for row in rows])
    page = report(recipe, tmp_path).read_text()
    for arm in recipe.arms:
        for task in ("chain", "product"):
            assert page.count(f"thinking of {arm} about {task}-0000") >= 1
    assert "three small numbers" in page  # what the task is, in words


# -- learning -------------------------------------------------------------------------------------------


def test_arms_stand_on_one_axis_and_those_left_out_are_named(ablated: tuple[Any, Path, dict[str, Any]]) -> None:
    recipe, run, _ = ablated
    logs = collect_tables(recipe, run).logs
    pictures = {p.name: p for p in draw_curves(logs, first=["two-things", "ce"])}
    caption = pictures["learning_curves"].caption
    assert len(logs) == MAX_ARMS + 2
    left = caption.split("Not drawn: ")[1].rstrip(".").split(", ")
    assert left == ["placebo", "one-teacher"]  # what is compared comes first
    assert gap({"val": {"ce": 1.5}, "train": {"ce": 1.2}}) == pytest.approx(0.3)
    assert gap({"val": {"ce": 1.5}}) is None


def test_routing_is_of_arms_with_kv_only(tmp_path: Path) -> None:
    recipe = make_recipe()
    write_run(tmp_path, recipe, questions=4)
    tables = collect_tables(recipe, tmp_path)
    by_layer = drawn(draw_routing, recipe, tables, "layer")
    titles = [axes.get_title("left") for axes in by_layer.axes]
    assert "logits" not in titles and titles[:2] == ["competence", "fixed"]
    by_task = drawn(draw_routing, recipe, tables, "task")
    assert [axes.get_title("left") for axes in by_task.axes][:2] == ["chain", "product"]
    cells = by_task.axes[0].images[0].get_array()
    assert cells.shape == (3, 2) and cells[0, 0] > 0.8 and np.allclose(cells.sum(1), 1)


def test_layers_that_were_compared_are_shown() -> None:
    assert "map-layers" in str(draw_cka({}))
    found = {
        "similarity": [[0.9, 0.2, 0.1], [0.1, 0.3, 0.8]],
        "map": {"0": [[0, 1.0]], "1": [[2, 1.0]]},
        "kind": "keys",
    }
    figure = drawn(draw_cka, {"teacher": found})
    assert figure.axes[0].images[0].get_array().shape == (2, 3)
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].get_lines()] == [(0, 0), (2, 1)]


# -- models ---------------------------------------------------------------------------------------------


def write_model(folder: Path, shapes: dict[str, list[int]], **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (folder / "config.json").write_text(json.dumps(config))


def test_sizes_are_read_from_the_saved_models(tmp_path: Path) -> None:
    recipe = make_recipe()
    config = {"model_type": "qwen2", "num_hidden_layers": 5, "hidden_size": 48, "num_attention_heads": 6,
              "num_key_value_heads": 2, "vocab_size": 29}  # fmt: skip
    write_model(tmp_path / "arms" / "fixed" / "seed-43" / "model", {"a": [3, 7], "b": [11]}, **config)
    write_model(
        tmp_path / "teachers" / "adds" / "model", {"a": [2, 3, 5]}, model_type="gpt2", n_layer=7, n_embd=26, n_head=13
    )
    found = read_models(recipe, tmp_path)
    assert found[STUDENT] == {"family": "qwen2", "layers": 5, "width": 48, "heads": 6, "kv_heads": 2, "head_size": 8,
                              "vocabulary": 29, "parameters": 32}  # fmt: skip
    assert found["adds"]["parameters"] == 30 and found["adds"]["layers"] == 7 and found["adds"]["head_size"] == 2
    assert found["multiplies"]["parameters"] is None and found["multiplies"]["width"] == 64  # from the recipe


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 4) + b"[1]", struct.pack("<Q", 9) + b"{"])
def test_a_damaged_model_file_is_no_reason_to_fail(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{")
    assert count_parameters(tmp_path) is None


def test_the_page_says_what_the_models_are(tmp_path: Path) -> None:
    recipe = make_recipe()
    write_run(tmp_path, recipe, questions=4)
    write_model(
        tmp_path / "arms" / "ce" / "seed-42" / "model", {"a": [1000, 84]}, model_type="qwen2", num_hidden_layers=2
    )
    for folder in tmp_path.glob("arms/*/*"):
        mark_again(folder)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    write_object(tmp_path / "data" / "manifest.json", manifest)
    page = report(recipe, tmp_path).read_text()
    section = page[page.index('<section id="teachers"') : page.index('<section id="statistics"')]
    assert "84 k" in section and "characters" in section and "43 pieces" in section
    assert "random weights, trained here on chain" in section and "97.0 %" in section
