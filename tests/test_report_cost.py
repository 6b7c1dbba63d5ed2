"""Curves of cost on the page: rows, factors, sentences and the figure, from a run folder as the stages leave it."""

from __future__ import annotations

import itertools

import pytest
from run_factory import ARMS, make_recipe, write_run

from kvdistill.cli.tables import as_text
from kvdistill.core.files import read_json
from kvdistill.stages.report import report
from kvdistill.stages.report.cost import cost_sentence, draw_cost_curves

pytestmark = pytest.mark.slow

CURVES = {"arms": ["competence", "ce"], "budgets": [1, 2, 4]}
ACCURACY = {
    "competence": (0.80, 0.60), "competence@x2": (0.86, 0.70), "competence@x4": (0.90, 0.80),
    "ce": (0.55, 0.30), "ce@x2": (0.70, 0.42), "ce@x4": (0.86, 0.66),
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    run = tmp_path_factory.mktemp("cost") / "run"
    arms = {name: ARMS[name][0] for name in ("competence", "ce", "placebo")}
    pairs = [["competence", "ce"], {"arm": "competence", "baseline": "ce@x2", "parity": "total_flops"}]
    recipe = make_recipe(arms, report={"comparisons": pairs, "curves": CURVES})
    write_run(run, recipe, questions=400, accuracy=ACCURACY)
    page = report(recipe, run).read_text()
    return run, read_json(run / "summary.json"), page


def test_every_budget_has_a_row_with_what_it_cost(shown):
    _, summary, page = shown
    rows = summary["curves"]["rows"]
    assert [row["name"] for row in rows] == list(ACCURACY)
    ce = [row for row in rows if row["arm"] == "ce"]
    assert [row["steps"] for row in ce] == [800, 1600, 3200] and [row["data"] for row in ce] == [25600, 51200, 102400]
    assert ce[1]["total_flops"] == ce[1]["amortised_flops"] == pytest.approx(2 * 6.3e11)
    taught = rows[0]
    assert taught["total_flops"] == pytest.approx(6.3e11 + 2 * 3.3e11 + 4e9)
    runs = 3 * 4  # competence at three budgets, and the placebo, with three seeds
    assert taught["amortised_flops"] == pytest.approx(6.3e11 + 2 * 3.3e11 / runs + 4e9)
    assert 'alt="' in page and "What it takes" in page


def test_the_factor_and_the_ceiling_are_said_in_words(shown):
    _, summary, page = shown
    [against] = summary["curves"]["against"]
    steps = against["factors"]["steps"]
    assert (against["arm"], against["baseline"]) == ("competence", "ce")
    assert 2 < steps["factor"] < 4 and 1 < steps["low"] < steps["factor"] < steps["high"] and steps["bound"] == ""
    assert against["factors"]["data"]["factor"] == pytest.approx(steps["factor"])
    assert against["factors"]["total_flops"]["factor"] < against["factors"]["amortised_flops"]["factor"]
    assert against["ceiling"]["budget"] in (1, 2, 4)
    sentence = against["sentence"]
    assert f"competence learns {steps['factor']:.1f} times faster than ce" in sentence
    assert "times fewer problems (repetitions counted)" in sentence and "reaches further" in sentence
    assert sentence in page.replace("&#39;", "'")
    assert "competence learns" in " ".join(as_text({"summary": summary}).split()), (
        "the last lines of `run` say the same"
    )


def test_an_arm_at_its_own_budget_is_a_point_beside_the_curve(tmp_path, shown):
    _, whole, _ = shown
    arms = {name: ARMS[name][0] for name in ("competence", "ce")}
    recipe = make_recipe(arms, report={"curves": {"arms": ["ce"], "points": ["competence"], "budgets": [1, 2, 4]}})
    assert {*recipe.every_arm} == {"competence", "ce", "ce@x2", "ce@x4"}
    write_run(tmp_path / "run", recipe, questions=400, accuracy=ACCURACY)
    report(recipe, tmp_path / "run")
    curves = read_json(tmp_path / "run/summary.json")["curves"]
    assert [row["name"] for row in curves["rows"]] == ["ce", "ce@x2", "ce@x4", "competence"]
    [point], [curve] = curves["against"], whole["curves"]["against"]
    assert point["factors"]["steps"] == curve["factors"]["steps"], "the factor is of the arm at its own budget"
    assert point["ceiling"]["budget"] == 1 and point["ceiling"]["difference"] < curve["ceiling"]["difference"]


def test_only_compared_arms_of_a_curve_stand_among_the_arms(shown):
    run, summary, _ = shown
    assert list(summary["arms"]) == ["competence", "ce", "placebo", "ce@x2"]
    assert "2 times its steps" in summary["arms"]["ce@x2"]["description"]
    second = summary["comparisons"][1]
    assert second["at_equal"] == "total FLOPs, amortised" and "budgets apart by" in second["refused"][0]
    assert (run / "figures/cost_curves.svg").is_file() and (run / "figures/cost_curves.png").is_file()


def factor(**known):
    given = {"factor": 2.0, "low": 1.5, "high": 2.7, "bound": "", "num_beyond": 0, "num_before": 0, "reason": "",
             "most": 4.0, **known}  # fmt: skip
    ahead = [0.1, 0.2] if given["factor"] > 1 else [-0.2, -0.1]
    return {"per_seed": 3 * [given["factor"]], "at_equal_cost": ahead, **given}


NAN = float("nan")
BEYOND = {"low": NAN, "high": NAN, "bound": "more than"}


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "kv learns 2.0 times faster than ce (1.5 to 2.7 times the steps)"),
        (
            {"factor": 4.0, "low": NAN, "high": NAN, "bound": "more than", "num_beyond": 3},
            "kv learns more than 4.0 times faster than ce, which does not reach it within 4.0 times the steps (not "
            "reached within the range by any seed)",
        ),
        (
            {"factor": 1.1, "low": 0.8, "high": 1.6},
            "kv is not shown to learn faster or slower than ce (0.8 to 1.6 times",
        ),
        ({"factor": 0.5, "low": 0.4, "high": 0.6}, "kv learns 2.0 times slower than ce"),
        (
            {"factor": 0.5, "low": NAN, "high": NAN, "bound": "less than", "num_before": 2},
            "kv learns slower than ce, which is there with the smallest budget already",
        ),
        (
            {**BEYOND, "factor": 2.9, "num_beyond": 1, "per_seed": [2.0, 3.0, 4.0]},
            "kv learns more than 2.0 times faster than ce (not reached within 4.0 times the steps by 1 of 3 seeds)",
        ),
        (
            {**BEYOND, "factor": 2.5, "num_beyond": 2, "per_seed": [0.9, 4.0, 4.0]},
            "kv is not shown to learn faster or slower than ce (not reached within the range by 2 of 3 seeds)",
        ),
        (
            {**BEYOND, "factor": 4.0, "num_beyond": 3, "at_equal_cost": [-0.02, 0.3]},  # a difference of chance
            "kv is not shown to learn faster or slower than ce (not reached within the range by 3 of 3 seeds)",
        ),
        (
            {**BEYOND, "bound": "less than", "factor": 0.7, "num_before": 2, "per_seed": [0.5, 0.5, 1.4]},
            "kv is not shown to learn faster or slower than ce (reached with the smallest budget by 2 of 3 seeds)",
        ),
        ({"factor": NAN, "low": NAN, "high": NAN, "reason": "1 seed(s)"}, "cannot be told apart in steps: 1 seed(s)"),
    ],
)
def test_every_answer_has_its_sentence(known, words):
    found = {"arm": "kv", "baseline": "ce", "factors": {"steps": factor(**known)}, "ceiling": None}
    assert words in cost_sentence(found, "accuracy", 3)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.02, 0.06, "kv reaches further (+4.0 points, +2.0 to +6.0; each at its best budget, at ×4 against ×2)"),
        (-0.06, -0.02, "ce reaches further"),
        (-0.02, 0.06, "which of the two reaches further is not shown"),
    ],
)
def test_which_reaches_further_is_said_only_where_it_is_shown(low, high, words):
    ceiling = {"difference": 0.04, "low": low, "high": high, "further": low > 0, "less": high < 0, "budget": 4,
               "baseline_budget": 2, "p": 0.1, "reason": ""}  # fmt: skip
    said = cost_sentence({"arm": "kv", "baseline": "ce", "factors": {}, "ceiling": ceiling}, "accuracy", 3)
    assert words in said.replace("−", "-")


def test_without_curves_nothing_is_shown(tmp_path):
    recipe = make_recipe()
    write_run(tmp_path, recipe, questions=8)
    page = report(recipe, tmp_path).read_text()
    assert read_json(tmp_path / "summary.json")["curves"] is None and "What it takes" not in page
    assert "asks for no curves" in str(draw_cost_curves({"curves": None}))


# -- the verdict begins with what the curve shows ------------------------------------------------------


def test_the_verdict_leads_with_the_curve_and_then_compares_at_the_declared_parity(shown):
    _, summary, page = shown
    [against], headline = summary["curves"]["against"], summary["headline"]
    steps, at_cost = against["factors"]["steps"], against["factors"]["amortised_flops"]
    lead, _, rest = headline.partition(" At equal steps, ")
    assert lead.endswith("(Intervals of curves: 95 %, not adjusted for the 2 comparisons.)")
    assert lead.startswith(f"competence learns {steps['factor']:.1f} times faster than ce ({steps['low']:.1f} to ")
    assert "reaches further" in lead and f"ce needs {at_cost['factor']:.1f} times" in lead
    assert rest.startswith("competence: ") and "points over ce; " in rest and "Holm-adjusted" in rest
    assert f'id="verdict">{headline}<' in page
    assert " ".join(as_text({"summary": summary}).split()).endswith(headline)


@pytest.mark.parametrize(
    ("pairs", "curves", "begins"),
    [
        ([["placebo", "ce"]], CURVES, "competence learns"),  # of an arm without a curve: the first that there is
        ([], CURVES, "ce learns slower than competence, which is there"),  # no baseline is declared: the first arm
        ([["competence", "ce"]], {"arms": ["ce"], "points": ["competence", "placebo"], "budgets": [1, 2, 4]},
         "competence learns"),
        ([["placebo", "ce"]], {"arms": ["ce"], "points": ["competence", "placebo"], "budgets": [1, 2, 4]},
         "placebo is not shown to learn faster or slower than ce"),
    ],
)  # fmt: skip
def test_which_curve_a_verdict_begins_with_is_the_recipe_s_to_say(tmp_path, pairs, curves, begins):
    arms = {name: ARMS[name][0] for name in ("competence", "ce", "placebo")}
    recipe = make_recipe(arms, report={"comparisons": pairs, "curves": curves})
    write_run(tmp_path, recipe, questions=200, accuracy={**ACCURACY, "placebo": (0.56, 0.31)})
    report(recipe, tmp_path)
    headline = read_json(tmp_path / "summary.json")["headline"]
    assert headline.startswith(begins), headline
    assert ("At equal steps, " in headline) == bool(pairs) and ("there is no verdict" in headline) == (not pairs)


def test_with_every_accuracy_near_zero_the_curve_is_one_of_nll(tmp_path):
    arms = {name: ARMS[name][0] for name in ("competence", "ce")}
    recipe = make_recipe(arms, report={"comparisons": [["competence", "ce"]], "curves": CURVES})
    write_run(tmp_path, recipe, questions=20, accuracy=dict.fromkeys(ACCURACY, (0.0, 0.0)))
    report(recipe, tmp_path)
    headline = read_json(tmp_path / "summary.json")["headline"]
    assert headline.startswith("Accuracy says nothing here") and "nats" in headline and "At equal steps, " in headline
    assert "learn" in headline and "points" not in headline


def test_fewer_problems_are_said_only_where_every_seed_shows_them():
    found = {"arm": "kv", "baseline": "ce", "ceiling": None}
    shown = {"distinct": factor(**BEYOND, factor=3.0, num_beyond=3)}
    assert cost_sentence({**found, "factors": shown}, "accuracy", 3).startswith(
        "kv needs more than 3.0 times fewer problems than ce, which does not reach it with 4.0 times as many"
    )
    open_still = {"distinct": factor(**BEYOND, factor=3.0, num_beyond=2, per_seed=[0.8, 3.0, 3.0])}
    assert cost_sentence({**found, "factors": open_still}, "accuracy", 3).startswith("kv is not shown to need fewer")


@pytest.mark.parametrize(
    "known",
    [
        {"factor": 0.1, "num_beyond": 3, "most": 0.1},  # its range ends far below what the other cost
        {"factor": 1.3, "num_beyond": 1, "per_seed": [0.9, 1.2, 4.0], "most": 4.0},  # one seed has it by chance
        {"factor": 1.3, "num_beyond": 3, "at_equal_cost": [-0.005, 0.025], "most": 1.3},
    ],
)
def test_flops_that_are_not_shown_to_be_more_are_not_said_to_be(known):
    """`needs more than 0.1 times` is true, and reads as if little were needed."""
    found = {"arm": "kv", "baseline": "ce", "ceiling": None}
    for cost in ("total_flops", "amortised_flops"):
        said = cost_sentence({**found, "factors": {cost: factor(**BEYOND, **known)}}, "accuracy", 3)
        assert f"not shown (it was trained with at most {known['most']:.1f} times as many)" in said
        assert "more than" not in said
        enough = {cost: factor(**BEYOND, factor=1.1, num_beyond=3)}
        assert "ce needs more than 1.1 times" in cost_sentence({**found, "factors": enough}, "accuracy", 3)


def test_two_seeds_give_no_ceiling(tmp_path):
    arms = {name: ARMS[name][0] for name in ("competence", "ce")}
    recipe = make_recipe(arms, report={"curves": CURVES})
    write_run(tmp_path, recipe, questions=40, accuracy=ACCURACY)
    seed = recipe.seeds[0]
    (tmp_path / f"arms/ce@x2/seed-{seed}/records.jsonl").unlink()
    (tmp_path / f"arms/ce@x2/seed-{seed}/evaluated.json").unlink()
    report(recipe, tmp_path)
    summary = read_json(tmp_path / "summary.json")
    [against] = summary["curves"]["against"]
    assert against["ceiling"] is None and "reaches further" not in against["sentence"] + summary["headline"]


def test_arms_of_a_curve_that_end_by_validation_are_compared_at_equal_problems(tmp_path):
    """And a study whose only comparison is of such arms has a page: its reference is none of the recipe's arms."""
    arms = {name: {**ARMS[name][0]} for name in ("competence", "ce", "placebo")}
    pairs = [["competence@x2", "ce@x2"]]
    train = {"select": "best", "patience": 3, "eval_every": 40}
    recipe = make_recipe(arms, train=train, report={"comparisons": pairs, "curves": CURVES})
    write_run(tmp_path, recipe, questions=40, accuracy=ACCURACY)
    report(recipe, tmp_path)
    summary = read_json(tmp_path / "summary.json")
    one = next(row for row in summary["comparisons"] if row["arm"] == "competence@x2")
    assert one["at_equal"] == "problems at hand"
    assert "competence@x2 against ce@x2: " in as_text({"summary": summary})


def test_the_figure_of_costs_has_labels_that_can_be_read_and_do_not_overlap(shown):
    _, summary, _ = shown
    figure = draw_cost_curves(summary)
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
        assert 2 <= len(labels) <= 5 and not any("$" in label.get_text() for label in labels)
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_an_arm_at_a_single_budget_has_a_bar_in_place_of_a_band(shown):
    """Its point is as wide as nothing: the deviation over seeds would not be seen."""
    _, summary, _ = shown
    rows = [row for row in summary["curves"]["rows"] if row["arm"] == "ce" or row["budget"] == 1]
    figure = draw_cost_curves({"curves": {**summary["curves"], "rows": rows}})
    for axes in figure.axes:
        [bar] = axes.containers
        [line] = bar.lines[2][0].get_segments()
        point = next(row for row in rows if row["arm"] == "competence")
        assert line[:, 1].tolist() == pytest.approx([point["mean"] - point["std"], point["mean"] + point["std"]])
        assert bar.lines[1], "with caps: it is seen without colour"
