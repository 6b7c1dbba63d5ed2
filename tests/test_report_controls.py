"""What the page says of controls: what each rules out, and whether it did harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from run_factory import make_recipe, write_run

from kvdistill.cli.tables import as_text
from kvdistill.core.recipe import Control
from kvdistill.stages.report import report
from kvdistill.stages.report.text import CONTROLS, write_harm, write_texts

ARMS: dict[str, Any] = {
    "fixed": {},
    "ce": {"teachers": []},
    "placebo": {"control": "placebo"},
    "noise": {"control": "noise"},
    "seq-kd": {"teachers": [], "texts": "written"},
}
GOOD, PLAIN, BAD = (0.9, 0.8), (0.6, 0.5), (0.3, 0.2)


def reported(run: Path, comparisons: list[list[str]], accuracy: dict[str, Any], **changes: Any) -> tuple[Any, str]:
    tasks = [{"name": name, "teach": 5} for name in ("chain", "product")]
    report_section = {"comparisons": comparisons, **changes.pop("report", {})}
    recipe = make_recipe(ARMS, report=report_section, data={"tasks": tasks}, **changes)
    write_run(run, recipe, accuracy={"fixed": GOOD, "ce": PLAIN, "seq-kd": PLAIN, **accuracy}, questions=80)
    page = report(recipe, run).read_text()
    return json.loads((run / "summary.json").read_text()), " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_every_control_has_its_words():
    assert {*get_args(Control), "teachers", "written"} == {*CONTROLS}


@pytest.mark.parametrize("declared", [True, False])
def test_a_control_that_harms_is_called_so_beside_comparisons_with_it(tmp_path, declared):
    comparisons = [["fixed", "placebo"], ["fixed", "noise"], *([["placebo", "ce"]] if declared else [])]
    summary, page = reported(tmp_path, comparisons, {"placebo": BAD, "noise": PLAIN})
    rows = {row["arm"]: row for row in summary["controls"]}
    assert list(rows) == ["placebo", "noise", "seq-kd"] and "harm" not in rows["seq-kd"]
    assert rows["seq-kd"]["said"] == "not trained yet"
    assert rows["placebo"]["harm"] == ("significantly" if declared else "clearly") and rows["placebo"]["plain"] == "ce"
    assert rows["noise"]["harm"] == "" and "no harm that shows" in rows["noise"]["said"]
    assert rows["placebo"]["difference"] == pytest.approx(
        summary["arms"]["placebo"]["mean"] - summary["arms"]["ce"]["mean"]
    )
    how = "Holm-adjusted p" if declared else "worse in every seed"
    assert how in rows["placebo"]["said"] and "beating it proves little" in rows["placebo"]["said"]
    caution = f"placebo {rows['placebo']['said']}"
    cautions = {(one["arm"], one["baseline"]): one.get("caution") for one in summary["comparisons"]}
    assert cautions.pop(("fixed", "placebo")) == caution and {*cautions.values()} == {None} and cautions
    assert page.count("What the controls rule out") == 1 and page.count(CONTROLS["written"][1]) == 1
    assert caution in summary["headline"] and page.count(caution) >= 2
    assert caution in " ".join(as_text({"summary": summary}).split())


def test_harm_is_told_by_nll_where_that_is_primary_and_not_without_three_seeds(tmp_path):
    accuracy = {"placebo": BAD, "noise": PLAIN}
    summary, _ = reported(tmp_path / "nll", [], accuracy, report={"primary": "nll", "margin": 0.001})
    rows = {row["arm"]: row for row in summary["controls"]}
    higher = summary["arms"]["placebo"]["nll"]["mean"] > summary["arms"]["ce"]["nll"]["mean"]
    assert (rows["placebo"]["difference"] > 0) is higher and "nats" in rows["placebo"]["said"]
    summary, _ = reported(tmp_path / "two", [["fixed", "placebo"]], accuracy, seeds=[42, 43])
    row = next(row for row in summary["controls"] if row["arm"] == "placebo")
    assert row["harm"] is None and "not known" in row["said"] and "caution" not in summary["comparisons"][0]


def test_an_arm_says_what_it_read_beside_its_own_texts():
    own = {"texts": "teachers", "from": ["a"], "own": 3000, "beside": 46000}
    assert write_texts(own) == "46\u202f000 texts beside 3\u202f000 of its own"
    written = {"a": {"answers": 70, "right": 40}, "b": {"answers": 30, "right": 20}}
    assert write_texts({**own, "beside": 55, "written": written}).endswith("; 60 of 100 written solutions are right")
    assert "plain fine-tuning" in write_texts({**own, "beside": 0, "written": written})


def test_the_words_for_harm():
    known = {"plain": "ce", "difference": -0.124, "p_holm": 0.0123}
    assert write_harm({**known, "harm": "significantly"}, "accuracy") == (
        "does harm (−12.4 points beside ce, Holm-adjusted p = 0.012): beating it proves little"
    )
    assert "worse in every seed" in write_harm({**known, "harm": "clearly"}, "accuracy")
    assert write_harm({**known, "difference": 0.003, "harm": ""}, "accuracy") == (
        "+0.3 points beside ce: no harm that shows"
    )
