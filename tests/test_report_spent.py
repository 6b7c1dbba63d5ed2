"""What a page says of what was spent: on what the FLOPs went, and what a search of values tried, chose and took."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_factory import make_ledger, make_recipe, mark_again, write_object, write_run, write_tuned

from kvdistill.core.tuning import rule_of
from kvdistill.stages.report import report
from kvdistill.stages.report.language import words_of

ARMS: dict[str, Any] = {"fixed": {}, "ce": {"teachers": []}, "adds": {"teachers": ["adds"]}}
SPENT = {
    "teacher_training": {"adds": 5e11, "multiplies": 7e11}, "fit": {"adds": 3e9, "multiplies": 4e9},
    "layer_maps": {"adds": 2e9}, "generation": {"adds": 8e10}, "tuning": {"fixed": 1.26e12},
}  # fmt: skip


def cells(page: str, title: str) -> list[list[str]]:
    """Head and rows of the table in the box of this name, as text; a pair of lines in a cell has a bar between."""
    [table] = re.findall(rf'aria-label="{re.escape(title)}"><table.*?>(.*?)</table>', page.replace("\n", ""))[:1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table)]
    return [[html.unescape(re.sub("<[^>]*>", "", cell.replace("<small>", "|"))) for cell in row] for row in rows]


def spent(run: Path, parts: dict[str, Any], **changes: Any) -> str:
    recipe = make_recipe(ARMS, report={"comparisons": [["fixed", "ce"]], **changes})
    write_run(run, recipe, questions=8)
    for seed in recipe.seeds:
        ledger = make_ledger(seed, {})
        write_object(run / f"arms/fixed/seed-{seed}/ledger.json", {**ledger, "flops": {**ledger["flops"], **parts}})
    return report(recipe, run).read_text()


def test_the_columns_say_on_what_the_flops_went_and_add_up(tmp_path: Path) -> None:
    head, fixed, ce, adds = cells(spent(tmp_path, SPENT), "Where the FLOPs went")
    assert [name.partition("|")[0] for name in head] == [
        "arm", "student", "aligner", "teachers", "teachers", "fits", "texts", "tuning", "all FLOP"
    ]  # fmt: skip
    assert fixed == ["fixed", "630 G", "4 G", "660 G|adds 330 G|multiplies 330 G", "1.2 T", "9 G", "80 G", "1.26 T",
                     "3.84 T|3.35 T"]  # fmt: skip
    assert ce == ["ce", "630 G", *["–"] * 6, "630 G|630 G"] and adds[3] == "330 G"
    summary = 0.63 + 0.004 + 0.66 + 1.2 + 0.009 + 0.08 + 1.26
    assert float(fixed[-1].split()[0]) == pytest.approx(summary, abs=0.005)


def test_columns_of_what_nobody_did_are_left_out(tmp_path: Path) -> None:
    head, *_ = cells(spent(tmp_path, {}), "Where the FLOPs went")
    assert [name.partition("|")[2] for name in head[1:-1]] == [
        "forward, backward", "projections", "their passes", "their training", "and layer maps"
    ]  # fmt: skip
    page = spent(tmp_path / "zh", SPENT, language="zh")
    assert [name.partition("|")[0] for name in cells(page, "FLOP 用在哪里")[0][4:]] == [
        "教师", "拟合", "文本", "调参", "全部 FLOP"
    ]  # fmt: skip


def test_of_a_published_teacher_the_page_says_that_nobody_knows_its_training(tmp_path: Path) -> None:
    given = make_recipe(ARMS).model_dump()
    given["teachers"][1] |= {"scratch": None, "path": "org/model", "train_on": []}
    recipe = make_recipe(ARMS, teachers=given["teachers"], report={"comparisons": []})
    write_run(tmp_path, recipe, questions=8)
    page = report(recipe, tmp_path).read_text()
    assert "The training of multiplies, which comes from elsewhere, is in no figure" in page


# -- tuning ---------------------------------------------------------------------------------------------

TUNE = {"grid": {"train": {"learning_rate": [1e-3, 4e-3]}, "loss": {"kv_weight": [5, 20]}}, "seeds": [5, 6]}


@pytest.fixture(scope="module", params=["en", "zh"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    run = tmp_path_factory.mktemp(f"tuned-{request.param}")
    rules = {"comparisons": [["fixed", "ce"]], "language": request.param}
    recipe = make_recipe(ARMS, report=rules, tune=TUNE)
    write_run(run, recipe, questions=8)
    write_tuned(run, recipe)
    for seed in recipe.seeds:
        path = run / f"arms/fixed/seed-{seed}/ledger.json"
        ledger = json.loads(path.read_text())
        ledger["flops"]["tuning"] = {"fixed": 1.26e12}
        path.write_text(json.dumps(ledger))
        mark_again(path.parent)
    return words_of(request.param), run, report(recipe, run).read_text()


def test_a_page_has_the_rule_the_choice_and_what_it_took(tuned: tuple[Any, Path, str]) -> None:
    words, _, page = tuned
    assert words("tuning.rule", rule=words.message(rule_of("accuracy"))) in html.unescape(page)
    head, *rows = cells(page, words("tuning.chosen_values"))
    assert [row[0] for row in rows] == [*ARMS] and head[2:4] == ["learning_rate", "kv_weight"]
    fixed, ce, _ = rows
    of, runs = words("tuning.of", trial=2, trials=4), words("tuning.runs", k="1.0")
    assert fixed[1:] == [of, "0.001", "20", "70.0", "0.4", "learning_rate" + words("page.comma") + "kv_weight",
                         f"1.26 T|{runs}"]  # fmt: skip
    assert ce[1:4] == [of, "0.00159", "–"] and ce[6] == "–" and ce[-1] == f"1.26 T|{words('tuning.runs', k='2.0')}"
    assert f'href="#tuning">{words("nav.tuning")}<' in page


def test_the_whole_grid_is_there_with_what_diverged(tuned: tuple[Any, Path, str]) -> None:
    words, run, page = tuned
    head, *rows = cells(page, words("tuning.grid", n=12))
    assert len(rows) == 12 == len(json.loads((run / "summary.json").read_text())["tuning"]["rows"])
    assert rows[0][4:6] == [words("tuning.diverged")] * 2 and rows[1][-1] == words("tuning.chosen") == head[-1]
    assert [row[-1] for row in rows].count(words("tuning.chosen")) == 3


def test_a_study_that_tunes_nothing_says_nothing_of_it(tmp_path: Path) -> None:
    assert 'id="tuning"' not in spent(tmp_path, {})
