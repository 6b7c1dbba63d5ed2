"""The report stage on synthetic run folders: refusals, schema, the page's words, hostile text, figures, determinism."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from run_factory import ARMS, COMPARISONS, TASKS, make_recipe, mark_again, write_lines, write_object, write_run

from kvdistill.core.errors import RunFolderError, TrainingStopped
from kvdistill.core.files import write_bytes
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report import LearningCurveTracker, report
from kvdistill.stages.report.canvas import Picture
from kvdistill.stages.report.collect import collect_tables, read_log, write_json
from kvdistill.stages.report.compare import Runs, SeedRun, compare_family, find_refusals
from kvdistill.stages.report.curves import band, train_kv, val
from kvdistill.stages.report.figures import draw_comparison, match_table, routing_tables
from kvdistill.stages.report.page import SECTIONS, build_page, flatten
from kvdistill.stages.report.summary import budgets, compare_all, describe_arm, summarise
from kvdistill.stages.report.text import make_visible, write_headline

HOSTILE = '<script>alert("x")<b>&\x1b[31m\u202ecba\u200b'
CURVES = ("learning_curves", "dual_axis_curve", "kv_loss_curves", "task_accuracy_curves", "overfitting_analysis")
DRAWN = ("comparison_with_error_bars", "radar_over_tasks", *CURVES, "ablation_settings_heatmap",
         "ablation_alignment_stability", "routing_by_task_heatmap", "routing_by_layer_heatmap",
         "match_beside_placebo")  # fmt: skip
NOT_DRAWN = ("ablation_layers_heatmap", "kv_ablation", "cka_heatmap", "cost_curves")  # nothing of these is there
PICTURES = (*DRAWN, *NOT_DRAWN)


def summary_of(recipe: Recipe, run: Path) -> dict[str, Any]:
    tables = collect_tables(recipe, run)
    summary = summarise(recipe, tables, compare_all(recipe, tables))
    summary["headline"] = write_headline(summary)
    return summary


def page_without_pictures(recipe: Recipe, run: Path) -> str:
    """The whole page but for the drawing, which takes seconds."""
    absent = [Picture(name, name, "", reason="of the test") for name in PICTURES]
    return build_page(recipe, collect_tables(recipe, run), summary_of(recipe, run), absent)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A finished study with its report; tests that change it copy it first."""
    run = tmp_path_factory.mktemp("study")
    recipe = write_run(run, questions=40)
    report(recipe, run)
    return recipe, run


@pytest.fixture
def copy(study: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    recipe, run = study
    shutil.copytree(run, tmp_path / "run")
    return recipe, tmp_path / "run"


# ---- refusals ------------------------------------------------------------------------------------


def make_runs(accuracies: list[float], *, questions: int = 50, **changes: Any) -> dict[int, SeedRun]:
    keys = tuple(("chain", f"{i:03d}", "cot") for i in range(questions))
    hashes = tuple(f"h{i}" for i in range(questions))
    ledger = {"tokens_nonpadding": 1000.0, "optimiser_steps": 100, "data_fingerprint": "d"}
    runs = {}
    for seed, share in enumerate(accuracies, start=42):
        correct = (np.arange(questions) < round(share * questions)).astype(np.float64)
        own = {**ledger, "init_fingerprint": f"i{seed}", "order_fingerprint": f"o{seed}"}
        run = SeedRun(keys, hashes, hashes, correct, 1 - correct / 2, np.full(questions, 9.0), own)
        runs[seed] = replace(run, **changes)
    return runs


def with_ledger(runs: dict[int, SeedRun], **changes: Any) -> dict[int, SeedRun]:
    return {s: replace(run, ledger={**run.ledger, **changes}) for s, run in runs.items()}


SEEDS = [42, 43, 44]
ARM, BASE = make_runs([0.60, 0.66, 0.72]), make_runs([0.40, 0.42, 0.50])


def test_what_may_be_compared() -> None:
    assert find_refusals(ARM, BASE, SEEDS) == []
    assert find_refusals(with_ledger(ARM, tokens_nonpadding=1009.0), BASE, SEEDS) == []  # within 1 %


@pytest.mark.parametrize(
    ("arm", "base", "seeds", "words"),
    [
        ({42: ARM[42], 43: ARM[43]}, BASE, SEEDS, ["missing runs", "unpaired seeds", "at least 3"]),
        ({}, BASE, SEEDS, ["missing runs", "none against"]),
        (make_runs([0.5, 0.6]), make_runs([0.4, 0.45]), [42, 43], ["2 seed(s) in common, at least 3"]),
        ({s + 9: r for s, r in ARM.items()}, BASE, SEEDS, ["unpaired seeds"]),
        (make_runs([0.5, 0.6, 0.8], doc_hashes=("other",) * 50), BASE, SEEDS, ["differing question (document) hashes"]),
        (make_runs([0.5, 0.6, 0.8], prompt_hashes=("other",) * 50), BASE, SEEDS, ["differing prompt hashes"]),
        (ARM, make_runs([0.4, 0.42, 0.5], prompt_hashes=(*ARM[42].prompt_hashes[:7], *("x",) * 43)), SEEDS,
         ["differing prompt hashes: baseline, seed 42 was asked other", "(first: chain 007); evaluate both again"]),
        (make_runs([0.5, 0.6, 0.8], doc_hashes=(None,) * 50), BASE, SEEDS, ["hashes of the questions are missing"]),
        (make_runs([0.5, 0.6, 0.8], questions=40), BASE, SEEDS, ["differing questions"]),
        (make_runs([0.6, 0.62, 0.7]), make_runs([0.4, 0.42, 0.5]), SEEDS, ["zero variance"]),
        (with_ledger(ARM, tokens_nonpadding=1011.0), BASE, SEEDS, ["budgets apart by 1.1% (tokens"]),
        (with_ledger(ARM, optimiser_steps=90), BASE, SEEDS, ["(steps: 90 against 100"]),
        (with_ledger(ARM, data_fingerprint="e"), BASE, SEEDS, ["differing training data"]),
        (with_ledger(ARM, init_fingerprint="e"), BASE, SEEDS, ["differing initial weights"]),
        (with_ledger(ARM, order_fingerprint="e"), BASE, SEEDS, ["differing data order"]),
        (with_ledger(ARM, order_fingerprint=None), BASE, SEEDS, ["lacks order_fingerprint"]),
        (with_ledger(ARM, optimiser_steps=None), BASE, SEEDS, ["lacks optimiser_steps"]),
        (with_ledger(ARM, checkpoint_chosen_on="test"), BASE, SEEDS, ["chosen on the test set"]),
        ({s: replace(r, ledger={}) for s, r in ARM.items()}, BASE, SEEDS, ["no ledger"]),
    ],
)  # fmt: skip
def test_refusals(arm: Runs, base: Runs, seeds: list[int], words: list[str]) -> None:
    reasons = find_refusals(arm, base, seeds)
    for word in words:
        assert any(word in reason for reason in reasons), reasons
    [found] = compare_family({"a": arm, "b": base}, [("a", "b")], seeds)
    assert found.verdict.word == "refused" and found.refused == reasons and math.isnan(found.t.p)


def test_refusals_work_in_both_directions_and_for_missing_nll() -> None:
    assert any("baseline" in r for r in find_refusals(ARM, make_runs([0.4, 0.5, 0.7], doc_hashes=("x",) * 50), SEEDS))
    unknown = make_runs([0.5, 0.6, 0.8], nll_Q=np.full(50, np.nan))
    assert "nll is missing for some questions" in find_refusals(unknown, BASE, SEEDS, "nll")
    assert find_refusals(unknown, BASE, SEEDS, "accuracy") == []


def test_a_refused_comparison_still_counts_in_the_family() -> None:
    runs = {"a": ARM, "b": BASE, "late": {}}
    alone = compare_family(runs, [("a", "b")], SEEDS)[0]
    beside = compare_family(runs, [("a", "b"), ("late", "b")], SEEDS)[0]
    assert beside.p_holm == pytest.approx(min(1, 2 * alone.p_holm)) and beside.detectable > alone.detectable


def test_no_number_of_seeds_is_named_that_would_find_an_effect_of_nothing() -> None:
    runs = {"a": make_runs([0.5, 0.6, 0.7]), "b": make_runs([0.6, 0.5, 0.7])}
    found = compare_family(runs, [("a", "b")], [42, 43, 44])[0]
    assert abs(found.effect.d_z) < 1e-9 and not found.refused
    assert math.isnan(found.seeds_needed) and found.seeds_needed_reason.startswith("more than")
    assert "would find" not in str(found.verdict)


def test_macro_mean_weighs_tasks_not_questions() -> None:
    keys = tuple([("a", str(i), "") for i in range(9)] + [("b", "0", "")])
    run = SeedRun(keys, (), (), np.array([1.0] * 9 + [0.0]), np.ones(10), np.ones(10))
    assert run.macro("accuracy") == 0.5 and run.by_task("accuracy") == {"a": 1.0, "b": 0.0}


# ---- files ---------------------------------------------------------------------------------------


def test_summary_schema(study: tuple[Recipe, Path]) -> None:
    recipe, run = study
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["arms"]) == list(recipe.arms)
    for arm in summary["arms"].values():
        assert {"mean", "std", "per_seed", "by_task", "nll"} <= set(arm) and len(arm["per_seed"]) == 3
        assert set(arm["by_task"]) == set(TASKS)
        assert arm["mean"] == pytest.approx(np.mean(arm["per_seed"]))
        assert arm["std"] == pytest.approx(np.std(arm["per_seed"], ddof=1))
        assert arm["mean"] == pytest.approx(np.mean([t["mean"] for t in arm["by_task"].values()]))
        assert len(arm["nll"]["per_seed"]) == 3
    first = summary["comparisons"][0]
    assert {"arm", "baseline", "difference", "p", "p_holm", "ci", "d_z", "verdict"} <= set(first)
    assert first["verdict"] == "better" and first["p_holm"] >= first["p"]
    assert first["difference"] == pytest.approx(summary["arms"]["competence"]["mean"] - summary["arms"]["ce"]["mean"])
    assert summary["seconds"] > 0 and summary["cpu_seconds"] > 0 and summary["notes"] == []
    results = json.loads((run / "statistical_results.json").read_text())
    assert results["family"] == [*COMPARISONS, ["competence", "best-single"], ["fixed", "best-single"]]
    assert "test" in results["method"] and set(results["includes"])
    assert results["comparisons"] == summary["comparisons"]


def test_undefined_is_null_with_a_reason(tmp_path: Path) -> None:
    recipe = make_recipe(seeds=[42])
    write_run(tmp_path, recipe, questions=6)
    summary = summary_of(recipe, tmp_path)
    write_json(tmp_path / "s.json", summary)
    found = json.loads((tmp_path / "s.json").read_text())
    arm = found["arms"]["ce"]
    assert arm["std"] is None and arm["reasons"]["std"] == "one value has no standard deviation"
    assert found["comparisons"][0]["p"] is None and "at least 3" in found["comparisons"][0]["reasons"]["all"]
    assert "No verdict on competence against ce" in found["headline"]
    assert "Only 1 seed(s)" in page_without_pictures(recipe, tmp_path)


def test_report_is_deterministic_and_leaves_no_litter(copy: tuple[Recipe, Path]) -> None:
    recipe, run = copy
    names = [
        "report.html",
        "summary.json",
        "statistical_results.json",
        *(f"figures/{n}.{k}" for n in DRAWN for k in ("svg", "png")),
    ]
    before = {n: hashlib.sha256((run / n).read_bytes()).hexdigest() for n in names}
    rules, calls = dict(matplotlib.rcParams), []
    assert report(recipe, run, lambda *call: calls.append(call)) == run / "report.html"
    assert {n: hashlib.sha256((run / n).read_bytes()).hexdigest() for n in names} == before
    assert dict(matplotlib.rcParams) == rules
    assert calls[0][1:] == (0, 4) and calls[-1] == ("done", 4, 4)
    assert not [p for p in run.rglob(".*")]
    assert (run / "report.html").stat().st_size < 3_000_000


def test_a_figure_without_data_is_not_drawn_and_says_why(tmp_path: Path) -> None:
    recipe = make_recipe({"ce": {"teachers": []}}, report={"comparisons": []})
    write_run(tmp_path, recipe, questions=5)
    for log in tmp_path.glob("arms/*/*/log.jsonl"):
        log.unlink()
        mark_again(log.parent)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "kv_loss_curves.png").write_bytes(b"of an older report")
    page = report(recipe, tmp_path).read_text()
    drawn = ("ablation_alignment_stability", *PICTURES[:2])
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        f"{n}.{k}" for n in drawn for k in ("png", "svg")
    ]
    assert "not drawn, because no validation points were logged" in page
    assert "not drawn, because no arm logged a KV loss" in page and "declares no comparison" in page
    reasons = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert reasons["kv_loss_curves"] == "no arm logged a KV loss" and reasons[PICTURES[0]] is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: rows[0].pop("correct"), "`correct` (bool)"),
        (lambda rows: rows[0].update(correct=1), "`correct` (bool)"),
        (lambda rows: rows.append(dict(rows[0])), "recorded twice"),
        (lambda rows: rows[0].update(seed=7), "in the folder of"),
        (lambda rows: rows.clear(), "no records in it"),
    ],
)
def test_damaged_records_are_named(copy: tuple[Recipe, Path], spoil: Callable[[list[Any]], Any], words: str) -> None:
    recipe, run = copy
    path = run / "arms" / "ce" / "seed-43" / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(rows)
    write_lines(path, rows)
    with pytest.raises(RunFolderError, match=re.escape(words)) as caught:
        report(recipe, run)
    assert "seed-43" in caught.value.place and caught.value.fix


def test_torn_files(copy: tuple[Recipe, Path]) -> None:
    recipe, run = copy
    log = run / "arms" / "ce" / "seed-42" / "log.jsonl"
    rows = read_log(log)
    log.write_text(log.read_text()[:-20])  # a kill cuts the last line: pictures go on without it
    assert read_log(log) == rows[:-1]
    path = run / "arms" / "ce" / "seed-42" / "records.jsonl"
    path.write_text(path.read_text()[:-20])  # results do not
    mark_again(path.parent)
    with pytest.raises(RunFolderError, match="not a JSON line"):
        collect_tables(recipe, run)
    write_object(path.parent / "ledger.json", [1])
    path.unlink()
    (path.parent / "evaluated.json").unlink()
    assert ("ce", 42) in collect_tables(recipe, run).missing
    with pytest.raises(RunFolderError, match="no run has been evaluated"):
        collect_tables(recipe, run / "nowhere")


def test_resumed_logs_keep_the_later_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.jsonl", [{"step": 20, "loss": 3}, {"step": 40, "loss": 2}, {"step": 20, "val": {}},
                                         {"step": 40, "loss": 1}])  # fmt: skip
    assert [(r["step"], r.get("loss")) for r in read_log(tmp_path / "log.jsonl")] == [(20, 3), (20, None), (40, 1)]


def test_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TrainingStopped, match="disk is full"):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ---- numbers behind pictures ---------------------------------------------------------------------


def test_unfinished_study(copy: tuple[Recipe, Path]) -> None:
    recipe, run = copy
    shutil.rmtree(run / "arms" / "competence" / "seed-44")
    (run / "arms" / "stray").mkdir()
    page = page_without_pictures(recipe, run)
    assert "Not evaluated yet: competence seed 44" in page and "left out: stray" in page
    assert "missing runs: the arm has no records for seed 44" in page
    summary = summary_of(recipe, run)
    assert math.isnan(summary["arms"]["competence"]["per_seed"][2]) and summary["arms"]["competence"][
        "missing_seeds"
    ] == [44]
    assert summary["comparisons"][1]["verdict"] == "better"  # the others still have their say


def test_routing_and_match_tables(study: tuple[Recipe, Path]) -> None:
    recipe, run = study
    tables = collect_tables(recipe, run)
    teachers, by_task, by_layer = routing_tables(tables, "competence")
    late = [0.5 + 0.45 * step / 800 for step in range(620, 801, 20)]  # the last quarter of 40 logged steps
    assert teachers == ["adds", "multiplies"]
    assert by_task["chain"] == pytest.approx([np.mean(late), 1 - np.mean(late)])
    assert by_layer["1"] == pytest.approx([0.47, 0.53])
    assert routing_tables(tables, "ce") == ([], {}, {})
    rows = {(r["arm"], r["teacher"]): r for r in match_table(recipe, tables)}
    assert rows["fixed", "adds"]["k/r2"] == pytest.approx(0.71) and rows["fixed", "adds"][
        "placebo/k/r2"
    ] == pytest.approx(0.02)
    assert rows["placebo", "adds"]["is_placebo"] and math.isnan(rows["placebo", "adds"]["placebo/k/r2"])


def test_band_over_seeds() -> None:
    logs = {
        42: [{"step": 1, "val": {"ce": 1.0}}, {"step": 2, "val": {"ce": 3.0}}],
        43: [{"step": 1, "val": {"ce": 2.0}}],
        44: [],
    }
    steps, mean, std = band(logs, val("ce"))
    assert steps.tolist() == [1] and mean.tolist() == [1.5] and std[0] == pytest.approx(np.std([1, 2], ddof=1))


def test_a_step_with_a_training_and_a_validation_row_keeps_both(study: tuple[Recipe, Path]) -> None:
    logs = collect_tables(*study).logs["fixed"]
    assert band(logs, train_kv)[0].tolist() == list(range(20, 801, 20))
    assert band(logs, val("kv_loss"))[0].tolist() == list(range(100, 801, 100))


def test_budgets(study: tuple[Recipe, Path]) -> None:
    recipe, run = study
    found = budgets(recipe, collect_tables(recipe, run))
    assert found["ce"]["total_flops"] == pytest.approx(6.3e11) and found["ce"]["total_ratio"] == 1
    # adds: 5 arms x 3 seeds read its store; multiplies: 4 x 3
    whole, shared = 6.3e11 + 4e9 + 6.6e11, 6.3e11 + 4e9 + 3.3e11 / 15 + 3.3e11 / 12
    assert found["fixed"]["total_flops"] == pytest.approx(whole) and found["fixed"]["total_ratio"] == pytest.approx(
        whole / 6.3e11
    )
    assert found["fixed"]["amortised_ratio"] == pytest.approx(shared / 6.3e11) and found["fixed"]["tokens_ratio"] == 1
    online = make_recipe(capture={"source": "online"})
    assert budgets(online, collect_tables(online, run))["fixed"]["amortised_flops"] == pytest.approx(whole)


def test_descriptions() -> None:
    recipe = make_recipe()
    assert describe_arm(recipe, "competence") == "KV of 2 teachers (adds, multiplies), weighted by competence"
    assert describe_arm(recipe, "teacher-adds") == "KV of one teacher (adds)"
    assert describe_arm(recipe, "logits").startswith("logits of 2 teachers")
    assert "mismatched example" in describe_arm(recipe, "placebo") and "no teacher" in describe_arm(recipe, "ce")


# ---- the page ------------------------------------------------------------------------------------


def test_page_leads_with_the_verdict(study: tuple[Recipe, Path]) -> None:
    page = (study[1] / "report.html").read_text()
    summary = json.loads((study[1] / "summary.json").read_text())
    shape = r"competence: N % ± \d\.\d of the held-out questions right, \+N points over ce; better \(p "
    assert re.match(shape.replace("N", r"\d\d\.\d"), summary["headline"])
    assert summary["headline"] in page
    sections = [section.name for section in SECTIONS if section.name not in ("cost", "latents", "tuning")]
    order = ["<h1>", 'id="verdict"', "<figure>", *(f'id="{name}"' for name in sections)]
    places = [page.index(mark) for mark in order]
    assert places == sorted(places)
    assert page.count("data:image/") == len(DRAWN)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "<script" not in page and "@import" not in page
    for words in (
        "A high cosine is no evidence",
        "smallest",
        "Holm",
        "Leak check",
        "recipe_sha256",
        "kvdistill study run",
    ):
        assert words in page, words


def test_hostile_text_is_shown_not_run(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"ce": {"teachers": []}, HOSTILE: {}}, title=HOSTILE, report={"comparisons": [[HOSTILE, "ce"]]}
    )
    write_run(tmp_path, recipe, questions=4)
    for path in tmp_path.glob("arms/*/*/records.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        spoilt = [{**r, "id": f"{HOSTILE}{i}", "task": HOSTILE, "prediction": HOSTILE + "\ud800</pre>", "gold": HOSTILE}
                  for i, r in enumerate(rows)]  # fmt: skip
        write_lines(path, spoilt)
    write_object(tmp_path / "data" / "manifest.json", {HOSTILE: HOSTILE})
    write_object(tmp_path / "provenance.json", {"command": HOSTILE, "machine": {HOSTILE: [HOSTILE]}})
    page = report(recipe, tmp_path).read_bytes().decode("utf-8")
    assert "<script" not in page and "<b>&amp;" not in page and "&lt;script&gt;" in page
    assert not {"\x1b", "\u202e", "\u200b", "\ud800"} & set(page)
    assert "⟨U+001B⟩[31m" in page and "⟨U+202E⟩cba⟨U+200B⟩" in page and "⟨U+D800⟩" in page
    json.loads((tmp_path / "summary.json").read_text())


def test_make_visible() -> None:
    assert (
        make_visible("a\x00\x1b\x7f\x85\u2066\ufeff\n\t中文 العربية é")
        == "a⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩⟨U+0085⟩⟨U+2066⟩⟨U+FEFF⟩\n\t中文 العربية é"
    )
    assert make_visible("a\n", keep="") == "a⟨U+000A⟩"


def test_leaks_allowed_is_shouted(copy: tuple[Recipe, Path]) -> None:
    recipe, run = copy
    assert "Leaks were allowed" not in page_without_pictures(recipe, run)
    write_object(run / "data" / "manifest.json", {"section": {}, "num_leaks": 3})
    page = page_without_pictures(recipe, run)
    assert "Leaks were allowed" in page and page.index("Leaks were allowed") < page.index('id="verdict"')
    allowed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"leaks": "allow"})})
    assert summary_of(allowed, run)["leaks_allowed"]


def test_near_zero_accuracy_leads_with_nll(tmp_path: Path) -> None:
    recipe = make_recipe()
    write_run(tmp_path, recipe, questions=30, accuracy={arm: (0.001, 0.001) for arm in ARMS})
    for path in tmp_path.glob("arms/*/*/records.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        better = 0.4 if "competence" in str(path) else 0.0
        write_lines(path, [{**r, "correct": False, "score": 0.0, "nll": r["nll"] - better} for r in rows])
    summary = summary_of(recipe, tmp_path)
    assert summary["accuracy_near_zero"] and summary["headline"].startswith("Accuracy says nothing here")
    assert "NLL" in summary["headline"] and "nats over ce; better" in summary["headline"]
    assert summary["comparisons"][0]["verdict"] == "refused"  # every difference is the same zero
    assert not isinstance(draw_comparison(summary, "nll"), str)
    assert "Accuracy says nothing here" in page_without_pictures(recipe, tmp_path)


def test_primary_nll(tmp_path: Path) -> None:
    recipe = make_recipe(report={"comparisons": [["competence", "ce"]], "primary": "nll", "margin": 0.01})
    write_run(tmp_path, recipe, questions=30)
    summary = summary_of(recipe, tmp_path)
    first = summary["comparisons"][0]
    assert first["figure"] == "nll" and first["difference"] < 0 and first["verdict"] == "better"
    assert "per answer token (NLL)" in summary["headline"]
    assert "±0.01 nats" in page_without_pictures(recipe, tmp_path)


def test_no_seed_has_a_value(study: tuple[Recipe, Path]) -> None:
    summary = summary_of(*study)
    for arm in summary["arms"].values():
        arm["mean"] = math.nan
    assert draw_comparison(summary) == "no arm has a mean accuracy"


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": [], "e": [1, 2], "f": [{"x": 1}] * 5}) == [
        ("a.b", "1"),
        ("a.c", "–"),
        ("d", "–"),
        ("e", "1, 2"),
        ("f", '5: {"x": 1}; {"x": 1}; {"x": 1} …'),
    ]


# ---- LearningCurveTracker ------------------------------------------------------------------------


def test_tracker_writes_and_draws(tmp_path: Path) -> None:
    tracker = LearningCurveTracker(output_dir=tmp_path)
    for step in (10, 20, 30):
        tracker.log_train(step, {"loss": 2.0 / step, "kv_loss": 1.0 / step, "ce_loss": 3.0 / step})
        tracker.log_val(
            step, {"val_kv_loss": 1.1 / step, "val_gsm8k": 0.1, "val_svamp": 0.3, "ce": 1.0}, train={"ce": 0.9}
        )
    rows = read_log(tracker.path)
    assert rows[0]["terms"] == {"kv/all": {"raw": 0.1}, "ce": {"raw": 0.3}} and rows[0]["loss"] == 0.2
    assert rows[1]["val"]["accuracy"] == pytest.approx(0.2) and rows[1]["val"]["accuracy_by_task"]["gsm8k"] == 0.1
    with tracker.path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    LearningCurveTracker(tmp_path).log_train(40, {"kv_loss": 0.01})
    assert [r["step"] for r in read_log(tracker.path)] == [10, 10, 20, 20, 30, 30, 40]
    files = tracker.plot_all_curves()
    assert {f.stem for f in files} == set(CURVES) and all(f.stat().st_size > 1000 for f in files)
