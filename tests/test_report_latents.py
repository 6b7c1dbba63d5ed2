"""What the page shows of arms that think in latents, on synthetic run folders; and what a mean hides."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_factory
from run_factory import CHANGES, make_record, write_latents, write_run

from kvdistill.core.arms import arm_recipe
from kvdistill.core.errors import RunFolderError
from kvdistill.core.layout import LATENTS
from kvdistill.core.marks import write_mark
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report import ablations, report
from kvdistill.stages.report.ablations import find_ablations
from kvdistill.stages.report.compare import SeedRun
from kvdistill.stages.report.language import ENGLISH
from kvdistill.stages.report.latents import find_passes, find_twins
from kvdistill.stages.report.tail import degenerate_kind, tail_of

LATENT = {"reasoning": "latent"}
ARMS: dict[str, Any] = {
    "cot": {"teachers": []},
    "direct": {"teachers": [], "reasoning": "none"},
    "kv": LATENT,
    "kv-t1": {**LATENT, "latent": {"passes": 1}},
    "kv-t0": {**LATENT, "latent": {"passes": 0}},
    "own": {**LATENT, "teachers": [], "latent": {"self_weight": 1.0}},
    "twin": {**LATENT, "teachers": []},
    "twin-long": {**LATENT, "teachers": [], "times": 3},
    "placebo": {**LATENT, "control": "placebo"},
}
ACCURACY = {"cot": (0.98, 0.95), "direct": (0.2, 0.15), "kv": (0.95, 0.9), "kv-t1": (0.6, 0.5), "twin": (0.3, 0.2)}


def make_recipe(arms: dict[str, Any], **report_section: Any) -> Recipe:
    section = {"comparisons": [], **report_section}
    return run_factory.make_recipe(arms, report=section, compress={"kv_compression": "r-kv"})


def latent_recipe() -> Recipe:
    return make_recipe(ARMS, comparisons=[["kv", "twin"], ["kv", "cot"]])


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Summary and page of a study: `kv` reasons, `kv-t1` needs its latents but not whose, the others need none."""
    run, recipe = tmp_path_factory.mktemp("run"), latent_recipe()
    write_run(run, recipe, accuracy=ACCURACY, questions=60)
    gone = dict.fromkeys(CHANGES, 0.1)
    write_latents(run, recipe, {"kv": gone, "kv-t1": {"zero": 0.1, "mean": 0.3}})
    page = report(recipe, run).read_text()
    return json.loads((run / "summary.json").read_text()), page, run


def section(page: str) -> str:
    [found] = re.findall(r'<section id="latents".*?</section>', page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", found).split())


# -- the rows -------------------------------------------------------------------------------------------


def test_every_arm_has_its_cost_and_its_share_of_the_passes_of_written_reasoning(reported: Any) -> None:
    rows = {row["arm"]: row for row in reported[0]["latents"]["rows"]}
    assert [*rows] == [*ARMS] and reported[0]["latents"]["written"] == "cot"
    assert rows["kv"]["forward_passes"]["mean"] == 6 and rows["kv"]["share"] == pytest.approx(6 / 23)
    assert rows["cot"]["share"] == 1 and rows["kv-t0"]["passes"] == 0 and rows["direct"]["latents"] is None
    said = section(reported[1])
    assert "4 latents, 3 passes over them" in said and "26 %" in said and "64 side by side" in said


def test_what_does_not_need_its_latents_is_called_regularisation(reported: Any) -> None:
    causal = {one["arm"]: one for one in reported[0]["latents"]["causal"]}
    verdicts = {name: one["verdict"] for name, one in causal.items()}
    assert verdicts.pop("kv") == "reasoning" and verdicts.pop("kv-t1") == "partly"
    assert {*verdicts.values()} == {"regularisation"} and "cot" not in causal
    said = section(reported[1])
    assert "kv : accuracy falls with latents zeroed, replaced by the batch’s mean, exchanged between questions" in said
    assert "kv-t1 : accuracy falls with latents zeroed, replaced by the batch’s mean, and is not shown to" in said
    assert "twin, twin-long, placebo : accuracy stays within 2.0 points" in said
    assert "regularisation, not reasoning in latents" in said


def test_a_fall_that_is_neither_shown_nor_excluded_is_called_neither(tmp_path: Path) -> None:
    recipe = make_recipe({"cot": {"teachers": []}, "kv": LATENT})
    write_run(tmp_path, recipe, accuracy={"kv": (1.0, 1.0)}, questions=20)
    write_latents(tmp_path, recipe)
    path = tmp_path / f"arms/kv/seed-{recipe.seeds[0]}" / LATENTS
    found = json.loads(path.read_text())
    found["causal"]["correct"]["zero"][:2] = [False, False]  # of one seed of three: an interval about zero, and wide
    path.write_text(json.dumps(found))
    write_mark(path.parent / "evaluated.json", {}, ["records.jsonl", LATENTS])
    said = section(report(recipe, tmp_path).read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())["latents"]
    [kv], margin = summary["causal"], summary["margin"]
    assert kv["changes"][0]["low"] < -margin < 0 < kv["changes"][0]["high"] and kv["verdict"] == "untold"
    assert "nor to stay within 2.0 points" in said and "Whatever it gains" not in said


def test_causal_differences_are_paired_by_question_with_the_page_s_statistics(reported: Any) -> None:
    summary, _, run = reported
    [kv] = [one for one in summary["latents"]["causal"] if one["arm"] == "kv"]
    zero = kv["changes"][0]
    means = {"none": [], "zero": []}  # type: dict[str, list[float]]
    for number, seed in enumerate(summary["seeds"]):
        causal = json.loads((run / f"arms/kv/seed-{seed}" / LATENTS).read_text())["causal"]
        tasks = np.array([task for task, *_ in causal["questions"]])
        for kind, found in means.items():
            right = np.array(causal["correct"][kind], dtype=float)
            found.append(float(np.mean([right[tasks == task].mean() for task in ("chain", "product")])))
        lost = sum(a and not b for a, b in zip(*(causal["correct"][k] for k in ("none", "zero")), strict=True))
        assert (zero["mcnemar"][number]["only_as_is"], zero["mcnemar"][number]["only_changed"]) == (lost, 0)
    apart = np.subtract(means["zero"], means["none"])
    assert zero["difference"] == pytest.approx(apart.mean()) and zero["over"] == "runs"
    half = 4.302652729911275 * apart.std(ddof=1) / 3**0.5
    assert (zero["low"], zero["high"]) == pytest.approx((apart.mean() - half, apart.mean() + half))


def test_a_difference_that_is_the_same_in_all_seeds_gets_its_interval_over_questions(reported: Any) -> None:
    [twin] = [one for one in reported[0]["latents"]["causal"] if one["arm"] == "twin"]
    assert all((one["over"], one["difference"], one["low"], one["high"]) == ("questions", 0, 0, 0)
               for one in twin["changes"])  # fmt: skip


def test_an_arm_that_is_hardly_ever_right_is_told_apart_from_one_that_needs_no_latents(tmp_path: Path) -> None:
    recipe = make_recipe({"cot": {"teachers": []}, "kv": LATENT})
    write_run(tmp_path, recipe, accuracy={"kv": (0.0, 0.0)}, questions=20)
    write_latents(tmp_path, recipe)
    said = section(report(recipe, tmp_path).read_text())
    assert "kv : almost nothing is answered right" in said and "Whatever it gains" not in said


def test_arms_without_teachers_are_described_by_what_they_learn_from(reported: Any) -> None:
    said = {name: arm["description"] for name, arm in reported[0]["arms"].items()}
    assert said["cot"] == "plain fine-tuning on the same texts, no teacher"
    assert said["direct"] == "fine-tuning on questions and answers alone, without reasoning; no teacher"
    assert said["twin"] == "thinks in 4 latents (3 passes), which learn from the answer alone; no teacher"
    assert said["twin-long"] == said["twin"] + ", 3 times its steps"
    assert "learn from its own written reasoning; no teacher" in said["own"]
    assert said["kv"].endswith("; thinks in 4 latents (3 passes)") and "plain" not in said["kv"]


# -- arms that belong together --------------------------------------------------------------------------


def test_twins_are_found_by_what_their_recipes_say_beside_kv() -> None:
    recipe = latent_recipe()
    arms = {name: arm_recipe(recipe, name) for name in recipe.arms}
    assert find_twins(arms) == [("kv", "twin"), ("kv", "twin-long"), ("own", "twin"), ("own", "twin-long")]
    later = make_recipe({"kv": LATENT, "twin": {**LATENT, "teachers": [], "latent": {"start_after": 0.5}}})
    assert find_twins({name: arm_recipe(later, name) for name in later.arms}) == []


def test_an_arm_that_is_matched_to_another_budget_is_a_twin_still() -> None:
    matched = {**LATENT, "teachers": [], "match": {"arm": "kv", "parity": "total_flops"}}
    recipe = make_recipe({"kv": LATENT, "twin": matched})
    assert find_twins({name: arm_recipe(recipe, name) for name in recipe.arms}) == [("kv", "twin")]


def test_selectors_that_drop_nothing_are_said_to_coincide(tmp_path: Path) -> None:
    arms = {name: {**LATENT, "compress": {"kv_compression": name}} for name in ("right", "crop", "uniform")}
    recipe = make_recipe({"cot": {"teachers": []}, **arms})
    write_run(tmp_path, recipe, questions=12)
    write_latents(tmp_path, recipe)
    assert "all selectors coincide" not in section(report(recipe, tmp_path).read_text()), "nobody counted"
    for arm, share in (("right", 0.0), ("crop", 0.0), ("uniform", 0.25)):
        for seed in recipe.seeds:
            path = tmp_path / f"arms/{arm}/seed-{seed}" / "ledger.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "drops": {"adds": share}}))
            write_mark(path.parent / "trained.json", {}, ["log.jsonl", "ledger.json", "match.json"])
    said = section(report(recipe, tmp_path).read_text())
    assert "right, crop differ in the selector alone" in said and "uniform differ" not in said


def test_arms_that_learn_from_themselves_are_set_against_each_other() -> None:
    own = {**LATENT, "teachers": []}
    arms = {f"own-{w:g}": {**own, "latent": {"self_weight": w}} for w in (1.0, 2.0)} | {"twin": own}
    [found] = find_ablations(make_recipe(arms))
    assert found.keys == ("latent.self_weight",) and dict(found.arms) == {"own-1": (1.0,), "own-2": (2.0,)}


def test_keys_and_values_of_latents_stand_beside_latents_that_nobody_teaches(reported: Any, monkeypatch: Any) -> None:
    beside: list[list[str]] = []
    monkeypatch.setattr(ablations, "draw_keys_and_values", lambda s, w, plain, *_: beside.append(plain) or "not drawn")
    one = {**LATENT, "loss": {"k_weight": 0.0}}
    arms = {"cot": {"teachers": []}, "own": ARMS["own"], "twin": ARMS["twin"], "kv": LATENT, "values": one}
    ablations.draw_ablations(make_recipe(arms), reported[0], "accuracy", ENGLISH, ENGLISH)
    assert beside == [["twin"]]


def test_the_twin_is_named_with_the_difference_and_how_much_longer_it_is_trained(reported: Any) -> None:
    summary, page, _ = reported
    pairs = {(one["arm"], one["twin"]): one for one in summary["latents"]["twins"]}
    assert pairs["kv", "twin"]["difference"] == pytest.approx(
        summary["arms"]["kv"]["mean"] - summary["arms"]["twin"]["mean"]
    )
    assert pairs["kv", "twin"]["low"] > 0 and pairs["kv", "twin"]["longer"] == 1
    assert pairs["kv", "twin-long"]["longer"] == pytest.approx(3)
    assert "trained 3.0 times as long" in section(page)


def test_arms_that_differ_in_passes_alone_make_a_curve(reported: Any) -> None:
    recipe = latent_recipe()
    assert find_passes({name: arm_recipe(recipe, name) for name in recipe.arms}) == [{"kv-t0": 0, "kv-t1": 1, "kv": 3}]
    summary, page, run = reported
    for name in ("latent_costs", "latent_passes"):
        assert summary["figures"][name] is None and (run / "figures" / f"{name}.png").stat().st_size > 5000
    assert (
        page.count('alt="How many passes it needs') == 1 and page.count('alt="Accuracy and what an answer takes') == 1
    )


# -- the tail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read", "kind"),
    [
        ("", None, 1),
        ("  \n", None, 1),
        ("what is it", None, 2),
        ("=========", None, 3),
        ("======", "======", 3),
        ("so 3 + 4 + 4 + 4 + 4 + 4 + 4", "4", 3),
        ("1111111111111", "1111111111111", 3),
        ("1 + 2 = 3, #### 17", "17", 0),
        ("#### 1111", "1111", 0),
        ("a long way of thinking about what was asked, and then ++++++++", "17", 0),
    ],
)
def test_degenerate_answers_are_told_apart(written: str, read: str | None, kind: int) -> None:
    one = {"task": "chain", "id": "1", "doc_hash": "d", "prompt_hash": "p", "completion": written, "prediction": read}
    assert degenerate_kind(make_record(**one, correct=False, gold="5")) == kind
    assert degenerate_kind(make_record(**one, correct=True, gold=read)) == 0


def test_the_worst_tenth_is_of_each_task_and_shares_add_up() -> None:
    keys = tuple((task, str(n), "cot") for task, count in (("a", 20), ("b", 3)) for n in range(count))
    nll = np.array([*range(20), 1.0, 7.0, 2.0])
    kinds = np.array([1, 1, 2, 0, 3, *[0] * 15, 2, 0, 0])
    nothing = (None,) * 23
    run = SeedRun(keys, nothing, nothing, np.zeros(23), nll, np.zeros(23), degenerate_Q=kinds)
    found = tail_of(run)
    assert found["worst"] == pytest.approx((18.5 + 7) / 2) and found["nll"] == pytest.approx((9.5 + 10 / 3) / 2)
    assert found["empty"] == pytest.approx(0.05) and found["unread"] == pytest.approx((0.05 + 1 / 3) / 2)
    assert found["degenerate"] == pytest.approx(found["empty"] + found["unread"] + found["repeated"])


# -- the page -------------------------------------------------------------------------------------------


def test_latents_are_read_out_slot_by_slot_and_pass_by_pass_and_stay_text(reported: Any) -> None:
    page = reported[1]
    [found] = re.findall(r'<section id="latents".*?</section>', page, flags=re.DOTALL)
    assert "<script>" not in found and "&lt;script&gt;" in found and '<code dir="auto">\\n</code>' in found
    head = re.search(r'<table class="tight readout">\s*<thead>(.*?)</thead>', found, flags=re.DOTALL)
    assert head is not None and head[1].count('<th scope="col"') == 5  # the slot, and passes 0 to 3 of `kv`
    assert found.index("<b>kv</b>, seed 42:") < found.index("<details>")


def test_a_study_without_latents_has_no_such_section(tmp_path: Path) -> None:
    recipe = write_run(tmp_path, questions=12)
    page = report(recipe, tmp_path).read_text()
    assert 'id="latents"' not in page and "#latents" not in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "latents" not in summary and "latent_costs" not in summary["figures"]


def test_runs_that_were_evaluated_before_this_was_measured_leave_dashes(tmp_path: Path) -> None:
    recipe = latent_recipe()
    write_run(tmp_path, recipe, accuracy=ACCURACY, questions=12)
    page = report(recipe, tmp_path).read_text()
    assert "not measured" in section(page)
    reasons = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert "measured" in reasons["latent_costs"] and reasons["latent_passes"] is None


def test_an_altered_measurement_is_refused_and_one_that_nobody_vouches_for_is_not_read(tmp_path: Path) -> None:
    recipe = latent_recipe()
    write_run(tmp_path, recipe, accuracy=ACCURACY, questions=12)
    write_latents(tmp_path, recipe)
    path = tmp_path / "arms/kv/seed-42" / LATENTS
    path.write_text(path.read_text().replace("true", "false"))
    with pytest.raises(RunFolderError, match="checksum"):
        report(recipe, tmp_path)
    write_mark(path.parent / "evaluated.json", {}, ["records.jsonl"])
    report(recipe, tmp_path)
    rows = json.loads((tmp_path / "summary.json").read_text())["latents"]["causal"]
    assert {one["arm"]: one["seeds"] for one in rows}["kv"] == 2


def test_the_section_is_told_in_chinese(tmp_path: Path) -> None:
    recipe = make_recipe(ARMS, language="zh")
    write_run(tmp_path, recipe, accuracy=ACCURACY, questions=12)
    write_latents(tmp_path, recipe)
    said = section(report(recipe, tmp_path).read_text())
    assert "潜在槽" in said and "正则化" in said and "latents" not in said.replace("latents-title", "")
