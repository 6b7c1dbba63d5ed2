"""The family of comparisons: what is in it by rule, what `best-single` stands for, and what is refused before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_factory import make_recipe, mark_again, write_run
from tiny_recipe import assert_one_message, invoke, no_work, tiny_recipe, tiny_tree, write_recipe

from kvdistill.cli.tables import as_text
from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import budget_path
from kvdistill.core.config import make_recipe as checked_recipe
from kvdistill.core.declared import compare_declared, declare, family_of, parities_of
from kvdistill.core.errors import RecipeError
from kvdistill.core.family import best_single_rule, plain_arm, several_arms, single_arms
from kvdistill.core.files import write_json
from kvdistill.core.marks import sealed
from kvdistill.core.recipe import ParityRecipe
from kvdistill.stages.report import report
from kvdistill.stages.report.best_single import choose_best_single
from kvdistill.stages.report.collect import collect_tables
from kvdistill.stages.report.summary import best_single, compare_all, reference_arm, summarise
from kvdistill.stages.report.text import write_headline

CE, ONE, TWO = {"teachers": []}, {"teachers": ["one"]}, {"teachers": ["two"]}
LOGITS = {"loss": {"kv_weight": 0, "logit_weight": 1.0}}
THREE = [7, 8, 9]


def family(arms: dict[str, Any], comparisons: Any = None, seeds: list[int] = THREE) -> Any:
    report = {} if comparisons is None else {"report": {"comparisons": comparisons}}
    return family_of(tiny_recipe(Path("unused"), arms=arms, seeds=seeds, **report))


# -- what is in it ----------------------------------------------------------------------------------


def test_unset_the_family_is_several_teachers_against_the_best_single_one_and_plain_training() -> None:
    found = family({"a": ONE, "both": {}, "plain": CE, "b": TWO, "logit": LOGITS, "placebo": {"control": "placebo"}})
    assert found.pairs == [("both", "best-single"), ("both", "plain")] == found.by_rule and found.notes == []


def test_unset_without_several_teachers_every_taught_arm_meets_plain_training() -> None:
    found = family({"ce": CE, "a": ONE, "logit": {**ONE, **LOGITS}, "placebo": {**ONE, "control": "placebo"}})
    assert found.pairs == [("a", "ce"), ("logit", "ce"), ("placebo", "ce")]
    assert family({"ce": CE}).pairs == [] and family({"a": ONE}).pairs == []


def test_unset_with_two_seeds_or_declared_empty_nothing_is_compared() -> None:
    assert family({"ce": CE, "both": {}, "a": ONE}, seeds=[7, 8]).pairs == []
    assert family({"ce": CE, "both": {}, "a": ONE}, comparisons=[]).pairs == []


@pytest.mark.parametrize(
    ("listed", "added"),
    [
        ([["both", "ce"]], [("both", "best-single")]),
        ([["both", "best-single"], ["placebo", "ce"]], [("both", "ce")]),
        ([["both", "best-single"], ["both", "ce"]], []),
        ([["both", "more"]], [("both", "best-single"), ("both", "ce")]),
        ([["ce", "more"]], [("more", "best-single")]),
        ([["placebo", "ce"]], [(n, b) for n in ("both", "more") for b in ("best-single", "ce")]),
    ],
)
def test_what_a_recipe_leaves_out_is_added(listed: list[list[str]], added: list[tuple[str, str]]) -> None:
    arms = {"ce": CE, "both": {}, "more": {"align": {"layers": "terminal"}}, "a": ONE}
    arms["placebo"] = {"control": "placebo"}
    found = family(arms, listed)
    assert found.by_rule == added and found.pairs == [*map(tuple, listed), *added]


def test_what_the_arms_cannot_give_is_said() -> None:
    found = family({"both": {}}, [])
    assert found.notes == []
    found = family({"both": {}, "more": {"align": {"layers": "terminal"}}}, [["both", "more"]])
    assert found.pairs == [("both", "more")]
    assert "no arm has one teacher" in found.notes[0] and "no arm is plain fine-tuning" in found.notes[1]


def test_which_arms_are_which() -> None:
    recipe = tiny_recipe(
        Path("unused"),
        arms={"none": {"loss": {"kv_weight": 0}}, "raw": CE, "a": ONE, "logit": LOGITS,
              "single-logit": {**TWO, **LOGITS}, "fake": {**ONE, "control": "placebo"}, "both": {}},
    )  # fmt: skip
    arms = {name: arm_recipe(recipe, name) for name in recipe.arms}
    assert single_arms(arms) == ["a", "single-logit"] and several_arms(arms) == ["both"]
    assert plain_arm(arms) == "raw", "an arm without teachers before one that does not listen to them"
    assert plain_arm({"other": arms["raw"], "ce": arms["raw"]}) == "ce"
    assert plain_arm({"both": arms["both"]}) is None


def test_an_arm_that_answers_directly_or_thinks_in_latents_is_no_plain_fine_tuning() -> None:
    latent = {"teachers": [], "reasoning": "latent"}
    arms = {"direct": {**CE, "reasoning": "none"}, "twin": latent, "own": {**latent, "latent": {"self_weight": 1.0}}}
    latent_study: dict[str, Any] = {"compress": {"kv_compression": "r-kv"}, "seeds": THREE}
    recipe = tiny_recipe(Path("unused"), arms={**arms, "a": {**ONE, "reasoning": "latent"}, "cot": CE}, **latent_study)
    made = {name: arm_recipe(recipe, name) for name in recipe.arms}
    assert plain_arm(made) == "cot" and plain_arm({name: made[name] for name in arms}) is None
    assert single_arms(made) == ["a"], "its own reasoning is no teacher"
    assert family_of(recipe).pairs == [("own", "cot"), ("a", "cot")]


# -- refused before anything runs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comparisons", "parts"),
    [
        ([["fixd", "ce"]], ["not there: 'fixd'", "did you mean 'fixed'?"]),
        ([["fixed", "best-singl"]], ["not there: 'best-singl'", "did you mean 'best-single'?"]),
        ([["fixed", "fixed"]], ["'fixed' is compared with itself", "write another baseline", "[fixed, ce]"]),
        ([["best-single", "best-single"]], ["compared with itself"]),
        ([["fixed", "ce"], ["fixed", "ce"]], ["compared twice", "once"]),
        ([["fixed", "ce"], ["ce", "fixed"]], ["compared twice", "once"]),
        ([["fixed", "best-single"]], ["no arm is taught by exactly one teacher", "arms.NAME: {teachers: [TEACHER]}"]),
    ],
)
def test_comparisons_that_cannot_be(tmp_path, monkeypatch, comparisons, parts) -> None:
    path = write_recipe(tmp_path, seeds=THREE, report={"comparisons": comparisons})
    assert_one_message(invoke(monkeypatch, "run", path, work=no_work), "report.comparisons", *parts)
    assert not (tmp_path / "run").exists()


def test_a_single_arm_is_not_compared_with_what_may_be_itself() -> None:
    with pytest.raises(RecipeError, match="'a' has one teacher itself"):
        family({"ce": CE, "a": ONE, "b": TWO}, [["a", "best-single"]])
    with pytest.raises(RecipeError, match="cannot be an arm's name"):
        family({"ce": CE, "best-single": ONE}, [["best-single", "ce"]])
    assert family({"ce": CE, "a": ONE}, [["best-single", "ce"]]).pairs == [("best-single", "ce")]


@pytest.mark.parametrize("verb", ["run", "prepare", "train"])
def test_comparisons_of_fewer_than_three_seeds_are_refused_before_anything_runs(tmp_path, monkeypatch, verb) -> None:
    path = write_recipe(tmp_path, report={"comparisons": [["fixed", "ce"]]})
    answer = invoke(monkeypatch, verb, path, "seeds=[1,2]", work=no_work)
    assert_one_message(answer, "seeds: 1 comparison is declared for 2 seeds", "at least 3", "report.comparisons=[]")
    assert not (tmp_path / "run").exists()
    with pytest.raises(AssertionError, match="work began"):  # nothing in the way
        invoke(monkeypatch, "run", path, "report.comparisons=[]", work=no_work)


def test_mistakes_in_arms_do_not_hide_behind_their_comparisons() -> None:
    tree = tiny_tree(seeds=THREE, report={"comparisons": [["fixed", "best-single"]]})
    tree["arms"]["single"] = {"teachers": ["one"], "loss": {"kv_wieght": 1}}
    with pytest.raises(RecipeError) as caught:
        checked_recipe(tree)
    assert "kv_wieght" in caught.value.what and "exactly one teacher" not in caught.value.what


# -- which arm it is --------------------------------------------------------------------------------


def rows(accuracy: float | None, nll: float | None) -> list[dict[str, Any]]:
    early = {"step": 100, "val": {"accuracy": 1.0, "nll": 0.0}}  # what counts is the last point
    return [early, {"step": 200, "loss": 1.0}, {"step": 200, "val": {"accuracy": accuracy, "nll": nll}}]


LOGS = {
    "a": {1: rows(0.5, 0.9), 2: rows(0.7, 0.9)},
    "b": {1: rows(0.9, 1.1), 2: rows(0.3, 1.1)},
    "c": {1: rows(0.2, 0.5), 2: rows(0.2, 0.5)},
}


def test_the_best_single_arm_is_chosen_by_the_mean_of_the_last_validation_points() -> None:
    assert choose_best_single(["a", "b", "c"], LOGS, [1, 2], "nll").arm == "c"
    found = choose_best_single(["b", "a", "c"], LOGS, [1, 2], "accuracy")
    assert found.arm == "a", "equal accuracy: lower NLL"
    assert found.validation["a"] == pytest.approx({"accuracy": 0.6, "nll": 0.9})
    same = {name: LOGS["c"] for name in "xyz"}
    assert choose_best_single(["y", "x", "z"], same, [1, 2], "accuracy").arm == "y", "equal: the first"
    assert "lowest NLL on validation" in best_single_rule("nll")


def test_without_all_validation_figures_no_best_single_arm_is_chosen() -> None:
    found = choose_best_single(["a", "b"], {"a": LOGS["a"], "b": {1: rows(0.9, 1.1)}}, [1, 2, 3], "accuracy")
    assert found.arm is None and found.reason.endswith("no validation accuracy of a seed 3; b seed 2, 3")
    assert choose_best_single(["a"], {}, [1], "nll").arm == "a", "the only one needs no figures"
    assert "no arm has one teacher" in choose_best_single([], {}, [1], "nll").reason
    broken = {"a": LOGS["a"], "b": {1: rows(0.9, 1.1), 2: rows(None, 1.0)}}
    assert "b seed 2" in choose_best_single(["a", "b"], broken, [1, 2], "accuracy").reason
    assert choose_best_single(["a", "b"], broken, [1, 2], "nll").arm == "a"


def study(run: Path) -> Any:
    arms = {"competence": {"fuse": {"fusion_strategy": "competence"}}, "ce": {"teachers": []},
            "teacher-adds": {"teachers": ["adds"]}, "teacher-multiplies": {"teachers": ["multiplies"]}}  # fmt: skip
    return write_run(run, make_recipe(arms, report={"comparisons": [["competence", "best-single"]]}), questions=30)


def test_a_report_holds_several_teachers_against_the_one_that_validation_chose(tmp_path: Path) -> None:
    """On test questions the other single arm is better: the choice is not made there."""
    recipe = study(tmp_path)
    for seed in recipe.seeds:
        log = tmp_path / "arms" / "teacher-adds" / f"seed-{seed}" / "log.jsonl"
        kept = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text(
            "".join(json.dumps(row) + "\n" for row in [*kept, {"step": 900, "val": {"accuracy": 0.99, "nll": 0.1}}])
        )
        mark_again(log.parent)
    tables = collect_tables(recipe, tmp_path)
    for seed, run in tables.runs["teacher-adds"].items():
        assert run.macro("accuracy") < 1.0 and seed in recipe.seeds
    chosen = best_single(recipe, tables)
    assert chosen is not None and chosen.arm == "teacher-adds"
    first, second = compare_all(recipe, tables)["primary"]
    assert (first.arm, first.baseline, first.declared) == ("competence", "teacher-adds", ("competence", "best-single"))
    assert (second.arm, second.baseline) == ("competence", "ce") and not first.refused
    summary = summarise(recipe, tables, compare_all(recipe, tables))
    assert "over teacher-adds (best single teacher on validation)" in write_headline(summary)
    assert [one["by_rule"] for one in summary["comparisons"]] == [False, True]
    assert summary["best_single"]["arm"] == "teacher-adds" and reference_arm(recipe) == "ce"


def test_a_report_without_validation_figures_refuses_the_comparison_with_the_reason(tmp_path: Path) -> None:
    recipe = study(tmp_path)
    log = tmp_path / "arms" / "teacher-adds" / "seed-43" / "log.jsonl"
    log.unlink()
    mark_again(log.parent)
    first, second = compare_all(recipe, collect_tables(recipe, tmp_path))["primary"]
    assert first.verdict.word == "refused" and first.refused == [
        "best-single cannot be chosen: no validation accuracy of teacher-adds seed 43"
    ]
    assert not second.refused and second.p_holm == pytest.approx(min(1.0, 2 * second.t.p)), "still counted in Holm"


# -- comparisons that are there by rule, between arms that are trained with unlike budgets -------------


def write_plan(run: Path, **arms: dict[str, float]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_json(budget_path(run), sealed({"schema": 1, "arms": arms}))


def budget(steps: float, **changes: float) -> dict[str, float]:
    return {"steps": steps, "data": 8 * steps, "tokens": 300 * steps, "student_flops": 7e6 * steps,
            "total_flops": 9e6 * steps, "amortised_flops": 8e6 * steps, **changes}  # fmt: skip


UNLIKE: dict[str, Any] = {"ce": {**CE, "train": {"steps": 11}}, "both": {}, "a": ONE}
PAIRS = [("both", "best-single"), ("both", "ce")]


@pytest.mark.parametrize(
    ("ce", "words"),
    [
        (budget(100), "steps"),
        (budget(100.9), "steps"),
        (budget(150, data=800), "problems seen"),
        (budget(150, student_flops=7e8), "student FLOPs"),
        (budget(150, amortised_flops=8e8), "total FLOPs, amortised"),
        (budget(100, tokens=99_000), "problems seen"),
    ],
)
def test_what_is_compared_by_rule_is_compared_at_the_first_parity_that_holds(
    tmp_path: Path, ce: dict[str, float], words: str
) -> None:
    write_plan(tmp_path, both=budget(100), ce=ce, a=budget(100))
    found = parities_of(tiny_recipe(tmp_path, arms=UNLIKE, seeds=THREE), tmp_path)
    assert [str(found[pair]) for pair in PAIRS] == ["steps", words]


def test_where_nothing_holds_one_reason_says_what_to_declare(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, arms=UNLIKE, seeds=THREE)
    write_plan(tmp_path, both=budget(100), ce=budget(150, tokens=1.0), a=budget(100))
    reason = parities_of(recipe, tmp_path)["both", "ce"]
    assert isinstance(reason, str) and reason.startswith("not comparable: both and ce are trained with unlike budgets")
    assert "steps 100 against 150" in reason and "match: {arm: both, parity: total_flops}" in reason
    (tmp_path / "bare").mkdir()
    assert "steps 6 against 11, problems seen 48 against 88" in str(
        parities_of(recipe, tmp_path / "bare")["both", "ce"]
    )
    other = {**UNLIKE, "ce": {**CE, "train": {"select": "best", "eval_every": 2}}}
    reason = parities_of(tiny_recipe(tmp_path, arms=other, seeds=THREE), tmp_path)["both", "ce"]
    assert "train.select and train.patience" in str(reason)


def test_the_best_single_arm_has_a_parity_that_holds_whichever_is_chosen(tmp_path: Path) -> None:
    arms = {**UNLIKE, "b": TWO}
    recipe = tiny_recipe(tmp_path, arms=arms, seeds=THREE)
    write_plan(tmp_path, both=budget(100), ce=budget(100), a=budget(100), b=budget(140, data=800))
    assert str(parities_of(recipe, tmp_path)[PAIRS[0]]) == "problems seen"
    write_plan(tmp_path, both=budget(100), ce=budget(100), a=budget(100), b=budget(140))
    assert "both and b are" in str(parities_of(recipe, tmp_path)[PAIRS[0]])


def test_an_arm_at_a_matched_budget_is_no_candidate_and_leaves_the_rule_its_parity(tmp_path: Path) -> None:
    matched = {**ONE, "match": {"arm": "both", "parity": "total_flops"}}
    recipe = tiny_recipe(tmp_path, arms={**UNLIKE, "a-matched": matched}, seeds=THREE)
    write_plan(tmp_path, both=budget(100), ce=budget(100), a=budget(100), **{"a-matched": budget(140)})
    assert str(parities_of(recipe, tmp_path)[PAIRS[0]]) == "steps"
    arms = {name: arm_recipe(recipe, name) for name in recipe.arms}
    assert single_arms(arms) == ["a"]
    assert single_arms({name: arm for name, arm in arms.items() if name != "a"}) == ["a-matched"], "the only one"


def test_candidates_that_hold_at_unlike_parities_are_named_with_them(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, arms={**UNLIKE, "b": TWO}, seeds=THREE)
    plan = {"both": budget(100), "ce": budget(100), "a": budget(100, data=1, student_flops=1, amortised_flops=1)}
    write_plan(tmp_path, **plan, b=budget(140, data=800))
    reason = str(parities_of(recipe, tmp_path)[PAIRS[0]])
    assert "a at equal steps, b at equal problems seen" in reason and "unlike budgets" not in reason


def test_what_one_is_matched_to_the_other_in_is_a_parity_without_a_plan(tmp_path: Path) -> None:
    match = {"arm": "both", "parity": "total_flops", "amortised": False}
    recipe = tiny_recipe(tmp_path, arms={**UNLIKE, "ce": {**CE, "match": match}}, seeds=THREE)
    assert parities_of(recipe, tmp_path)["both", "ce"] == ParityRecipe(parity="total_flops", amortised=False)


def test_the_parity_is_frozen_with_the_family_and_a_later_plan_changes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, arms=UNLIKE, seeds=THREE)
    write_plan(tmp_path, both=budget(100), ce=budget(150), a=budget(120, data=800))
    declare(recipe, tmp_path)
    frozen, then = json.loads((tmp_path / "declared.json").read_text()), parities_of(recipe, tmp_path)
    assert frozen["parities"] == {"both against best-single": "problems seen"}
    assert list(frozen["not_comparable"]) == ["both against ce"]
    write_plan(tmp_path, both=budget(100), ce=budget(100), a=budget(100))
    assert parities_of(recipe, tmp_path) == then and compare_declared(recipe, tmp_path)["late"] == []
    listed = [{"arm": "both", "baseline": "ce", "parity": "student_flops"}]
    later = tiny_recipe(tmp_path, arms=UNLIKE, seeds=THREE, report={"comparisons": listed})
    assert compare_declared(later, tmp_path)["late"] == [["both", "ce"]], "chosen after the results"
    at_steps = tiny_recipe(tmp_path, arms=UNLIKE, seeds=THREE, report={"comparisons": [["both", "ce"]]})
    said = compare_declared(at_steps, tmp_path)
    assert said["late"] == [["both", "ce"]]
    assert "both against ce was not comparable, is at equal steps" in said["changed"]


def test_a_page_compares_unlike_budgets_at_what_they_have_in_common_or_says_why_not(tmp_path: Path) -> None:
    arms: dict[str, Any] = {"competence": {"fuse": {"fusion_strategy": "competence"}},
                            "teacher-adds": {"teachers": ["adds"]}, "ce": {"teachers": [], "times": 2}}  # fmt: skip
    recipe = write_run(tmp_path, make_recipe(arms, report={}), questions=30)
    for path in tmp_path.glob("arms/*/seed-*/ledger.json"):
        ledger = json.loads(path.read_text())
        order = {"problems_seen": 25_600, "order_prefixes": {"25600": "same"}}
        path.write_text(json.dumps({**ledger, **order}))
        mark_again(path.parent)
    plan = {name: budget(800) for name in arms}
    write_plan(tmp_path, **{**plan, "ce": budget(1600, data=6400)})
    page = report(recipe, tmp_path).read_text()
    first, second = json.loads((tmp_path / "summary.json").read_text())["comparisons"]
    assert (first["at_equal"], second["at_equal"]) == ("steps", "problems seen") and not second["refused"]
    assert "at equal problems seen" in page and page.count("at equal steps") >= 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"competence against ce: {second['sentence']} (at equal problems seen)" in " ".join(
        as_text({"summary": summary}).split()
    )
    write_plan(tmp_path, **{**plan, "ce": budget(1600)})
    page = report(recipe, tmp_path).read_text()
    [reason] = json.loads((tmp_path / "summary.json").read_text())["comparisons"][1]["refused"]
    assert reason.startswith("not comparable: competence and ce") and reason in page


def test_a_declared_parity_against_the_best_single_arm_is_kept_when_it_is_chosen(tmp_path: Path) -> None:
    arms: dict[str, Any] = {"competence": {"fuse": {"fusion_strategy": "competence"}},
                            "teacher-adds": {"teachers": ["adds"]}, "ce": {"teachers": []}}  # fmt: skip
    listed = [{"arm": "competence", "baseline": "best-single", "parity": "data"}]
    recipe = write_run(tmp_path, make_recipe(arms, report={"comparisons": listed}), questions=8)
    first = compare_all(recipe, collect_tables(recipe, tmp_path))["primary"][0]
    assert first.baseline == "teacher-adds" and str(first.parity) == "problems seen"
