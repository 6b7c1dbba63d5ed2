"""The page in two languages: the same keys, nothing left in English, and the same verdict as the terminal's."""

from __future__ import annotations

import json
import re
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from run_factory import ARMS, make_recipe, mark_again, write_run, write_tuned

from kvdistill.align.layers import map_notes
from kvdistill.cli.tables import as_text
from kvdistill.core.budgets import budget_path
from kvdistill.core.declared import declare
from kvdistill.core.files import write_json
from kvdistill.core.maps import SparseMap
from kvdistill.core.marks import sealed
from kvdistill.core.recipe import Recipe, TrainRecipe
from kvdistill.stages.report import canvas, report
from kvdistill.stages.report.canvas import chinese_fonts
from kvdistill.stages.report.collect import collect_tables
from kvdistill.stages.report.compare import find_refusals
from kvdistill.stages.report.figures import draw_all
from kvdistill.stages.report.language import ENGLISH, LANGUAGES, words_of
from kvdistill.stages.report.page import SECTIONS, glossary
from kvdistill.stages.report.summary import METHOD, compare_all, summarise
from kvdistill.stages.report.text import comparison_lines, list_warnings, write_headline
from kvdistill.stages.train.selection import selection_rule

CHINESE = words_of("zh")
SOURCES = Path(__file__).resolve().parent.parent / "kvdistill" / "stages" / "report"


def fields_of(text: str | list[str]) -> set[str]:
    parts = [text] if isinstance(text, str) else text
    return {name for part in parts for _, name, _, _ in string.Formatter().parse(part) if name}


def test_every_text_is_in_every_language_with_the_same_values() -> None:
    assert LANGUAGES == ("en", "zh")
    assert CHINESE.texts.keys() == ENGLISH.texts.keys()
    for key, text in ENGLISH.texts.items():
        other = CHINESE.texts[key]
        assert fields_of(text) == fields_of(other) or key.endswith(".use"), key
        assert isinstance(text, str) == isinstance(other, str), key
        assert isinstance(text, str) or len(text) == len(other) == 2, key


def test_every_text_that_is_asked_for_is_there() -> None:
    """Keys written out in code and templates; those made of names are asked for by the pages of other tests."""
    files = [path for path in SOURCES.rglob("*") if path.suffix in (".py", ".jinja")]
    form = re.compile(r"""\b(?:words|t)\(f?"([a-z_0-9]+\.[a-z_.0-9]+)"[,)]""")
    asked = {key for path in files for key in form.findall(path.read_text())}
    assert len(asked) > 150 and asked <= ENGLISH.texts.keys()


def test_texts_of_figures_and_verdicts_hold_no_html() -> None:
    plain = ("figures.", "labels.", "reasons.", "verdict.", "describe.", "verdicts.")
    for words in (ENGLISH, CHINESE):
        marked = [key for key, text in words.texts.items() if key.startswith(plain) and re.search("[<&]", str(text))]
        assert not marked


def test_one_and_several() -> None:
    assert ENGLISH("arms.questions", n=1, count="1") == "1 question per run."
    assert ENGLISH("arms.questions", n=4, count="4") == "4 questions per run."


def test_values_are_escaped_where_texts_are_html() -> None:
    assert "answers of <b>&lt;i&gt;</b>, seed 1" in ENGLISH.html("examples.intro", arm="<i>", seed=1)


# words that stay as they are in any language: names of arms, tasks, files, keys, units, methods
KEPT = re.compile(
    r"kvdistill|KV|NLL|CKA|CE|Holm|TOST|McNemar|Hedges|Cohen|FLOPs?|CPU|logits|nats?|df|tost_p_holm|p_holm|ddof|R²|"
    r"cka_monotone: true|layers: ratio"
)


def text_of(page: str) -> list[str]:
    """What stands between tags, without what is quoted: code, answers, tables of names and values, styles."""
    for tag in ("style", "pre", "code", 'table class="pairs"', "bdi", "dt"):
        page = re.sub(rf"<{tag}[ >].*?</{tag.split()[0]}>", " ", page, flags=re.DOTALL)
    attributes = re.findall(r'(?:alt|aria-label)="([^"]*)"', page)
    return [part.strip() for part in [*re.split(r"<[^>]*>", page), *attributes] if part.strip()]


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    run = tmp_path_factory.mktemp("zh")
    rules = {"comparisons": [["competence", "ce"], ["fixed", "ce"], ["placebo", "ce"]], "language": "zh"}
    recipe = make_recipe(title="两位教师，一名学生", report=rules)
    write_run(run, recipe, questions=20)
    return recipe, report(recipe, run).read_text(encoding="utf-8")


def english_in(recipe: Recipe, page: str) -> list[str]:
    """Parts of a page with two English words or more, beside names, recipe keys and what stays as it is."""
    names = {*recipe.every_arm, *(t.name for t in recipe.teachers), *(t.name for t in recipe.data.tasks), recipe.name}
    left = []
    for part in text_of(page):
        bare = KEPT.sub(" ", re.sub(r"\b[0-9a-f]{12}\b", " ", part))  # a hash may hold letters alone
        for name in sorted(names, key=len, reverse=True):
            bare = bare.replace(name, " ")
        coded = r"[\w.]*[._=][\w.]+|{.*?}|\b[0-9a-f]{12}\b|[\d-]+T[\d:]+Z"  # keys, recipes, hashes, times
        words = re.findall(r"[A-Za-z]{2,}", re.sub(coded, " ", bare))
        if len(words) > 1 and "Gamma" not in part:
            left.append(part)
    return left


def test_no_english_sentence_is_left_in_a_chinese_page(chinese: tuple[Recipe, str]) -> None:
    recipe, page = chinese
    assert '<html lang="zh-CN">' in page and english_in(recipe, page) == []


def whole_study(run: Path, *, late: bool = False, **changes: Any) -> tuple[Recipe, str]:
    """A study with all that a page can show: controls, curves, tuning, budgets apart, warnings and notes."""
    written = {"teachers": [], "texts": "written", "texts_from": ["adds"]}
    arms = {**{name: ARMS[name][0] for name in ("competence", "fixed", "teacher-adds", "logits", "placebo", "ce")},
            "noise": {"control": "noise"}, "shuffled": {"control": "shuffled"}, "untrained": {"control": "untrained"},
            "seq-kd": written, "more": {"teachers": [], "texts": "teachers"},
            "cka": {"align": {"layers": "cka"}}, "brief": {"teachers": [], "train": {"steps": 7}}}  # fmt: skip
    accuracy = {"placebo": (0.3, 0.1), "competence@x2": (0.97, 0.8), "ce@x2": (0.8, 0.5)}
    pairs = [["competence", "ce"], ["fixed", "placebo"], {"arm": "competence", "baseline": "brief", "parity": "data"}]
    rules = {
        "comparisons": pairs,
        "language": "zh",
        "curves": {"arms": ["competence", "ce", "placebo"], "budgets": [1, 2]},
    }
    tune = {"grid": {"train": {"learning_rate": [1e-3, 4e-3]}}, "seeds": [5, 6], "arms": ["ce", "competence", "logits"]}
    data = {"tasks": [{"name": name, "teach": 5} for name in ("chain", "product")]}
    tree: dict[str, Any] = {"arms": arms, "title": "两位教师，一名学生", "tune": tune, "data": data, **changes,
                            "report": {**rules, **changes.get("report", {})}}  # fmt: skip
    recipe = make_recipe(**tree)
    if late:
        then = {
            **tree["report"],
            "alpha": 0.01,
            "curves": None,
            "comparisons": [["ce", "fixed"], {**pairs[2], "parity": "steps"}],
        }
        declare(make_recipe(**{**tree, "report": then, "tune": None, "seeds": [1, 2, 3]}), run)
    write_run(run, recipe, questions=20, accuracy=accuracy)
    write_tuned(run, recipe)
    for folder in run.glob("arms/*/seed-*"):
        ledger = json.loads((folder / "ledger.json").read_text())
        if folder.parent.name == "seq-kd":
            counts = {"adds": {"answers": 70, "right": 40}}
            ledger["texts"] = {"texts": "written", "own": 3000, "beside": 40, "written": counts}
        if folder.parent.name == "more":
            ledger["texts"] = {"texts": "teachers", "own": 3000, "beside": 46000}
        if folder.parent.name == "fixed":
            rule = selection_rule(TrainRecipe(select="best", patience=3, eval_every=5))
            ledger["selection"] = {"chosen_step": 40, "select": "best", "patience": 3, "rule": rule}
        (folder / "ledger.json").write_text(json.dumps(ledger))
        mark_again(folder)
    (run / "arms" / "stray").mkdir()
    (run / "arms/cka/seed-43/trained.json").unlink()
    shutil.rmtree(run / "arms/cka/seed-44")
    plan = {"steps": 700, "data": 2000, "student_flops": 1e11, "total_flops": 2e11, "amortised_flops": 2e11}
    write_json(budget_path(run), sealed({"schema": 1, "arms": {"ce": plan}}))
    layers = run / "layers"
    layers.mkdir()
    similarity = torch.tensor([[0.1, 0.2], [0.3, 0.1], [0.1, 0.2]])
    notes = {"keys": map_notes(similarity, SparseMap(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), 2))}
    (layers / "adds.json").write_text(json.dumps({"notes": notes}))
    return recipe, report(recipe, run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [{}, {"report": {"primary": "nll", "margin": 0.01}}, {"replicate": "all"}, {"replicate": "data"},
     {"report": {"comparisons": None}}, {"replicate": "teacher", "report": {"curves": None}}],
)  # fmt: skip
def test_nor_in_one_of_a_study_with_controls_curves_tuning_and_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    from test_report import PICTURES

    absent = [canvas.Picture(name, "图", "", reason="未测") for name in PICTURES]
    monkeypatch.setattr("kvdistill.stages.report.draw_all", lambda *_: absent)  # takes longer than all else
    recipe, page = whole_study(tmp_path, late=changes == {}, **changes)
    for name in ("controls", "cost", "tuning"):
        assert f'id="{name}"' in page or (name == "cost" and recipe.report.curves is None)
    assert english_in(recipe, page) == []


def test_a_chinese_headline_says_the_english_one(chinese: tuple[Recipe, str], tmp_path: Path) -> None:
    recipe, page = chinese
    write_run(tmp_path, recipe, questions=20)
    tables = collect_tables(recipe, tmp_path)
    summary = summarise(recipe, tables, compare_all(recipe, tables))
    said, translated = write_headline(summary), write_headline(summary, CHINESE)
    assert translated in page and "无定论" in translated and "inconclusive" in said
    assert re.findall(r"\d+\.?\d*", said) == re.findall(r"\d+\.?\d*", translated)


def test_every_sentence_of_the_method_and_every_refusal_is_translated() -> None:
    from test_report import ARM, BASE, SEEDS, make_runs, with_ledger

    for sentence in METHOD.values():
        assert re.search("[\u4e00-\u9fff]", CHINESE.message(sentence)) or "Gamma" in sentence, sentence
    cases: list[tuple[Any, Any]] = [
        ({42: ARM[42], 43: ARM[43]}, BASE), ({}, BASE), (make_runs([0.5, 0.6, 0.8], questions=40), BASE),
        (make_runs([0.5, 0.6, 0.8], doc_hashes=("other",) * 50), BASE),
        (make_runs([0.5, 0.6, 0.8], prompt_hashes=(None,) * 50), BASE),
        (with_ledger(ARM, tokens_nonpadding=1011.0, init_fingerprint="e"), BASE),
        (with_ledger(ARM, order_fingerprint=None, optimiser_steps=None, checkpoint_chosen_on="test"), BASE),
        ({seed: run.__class__(**{**vars_of(run), "ledger": {}}) for seed, run in ARM.items()}, BASE),
        (make_runs([0.6, 0.62, 0.7]), make_runs([0.4, 0.42, 0.5])),
    ]  # fmt: skip
    for arm, base in cases:
        for reason in find_refusals(arm, base, SEEDS):
            said = CHINESE.message(reason)
            assert said != reason and re.search("[\u4e00-\u9fff]", said), reason
            assert not re.search(r"[a-z]{3,} [a-z]{3,}", said), said


def vars_of(run: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in run.__dataclass_fields__}


def test_a_sentence_that_nobody_knows_stays_as_it_is() -> None:
    assert CHINESE.message("something new happened") == "something new happened"
    assert CHINESE.message("seed 42: something new") == "种子 42：something new"
    assert ENGLISH.message("inconclusive") == "inconclusive"


def test_warnings_are_translated(chinese: tuple[Recipe, str]) -> None:
    summary = {"leaks_allowed": True, "leaks_found": 3, "seeds": [1],
               "notes": ["Not evaluated yet: ce seed 1.", "Layers of adds by CKA of keys: weak."]}  # fmt: skip
    for one in list_warnings(summary, CHINESE):
        assert re.search("[\u4e00-\u9fff]", one)


# -- figures --------------------------------------------------------------------------------------------


def test_without_a_chinese_font_figures_are_labelled_in_english_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"comparisons": [], "language": "zh"}
    recipe = make_recipe({"ce": {"teachers": []}}, report=rules)
    write_run(tmp_path, recipe, questions=4)
    for module in ("canvas", "figures", "page"):
        monkeypatch.setattr(f"kvdistill.stages.report.{module}.chinese_fonts", lambda: ())
    page = report(recipe, tmp_path).read_text(encoding="utf-8")
    assert CHINESE("page.english_figures") in page
    assert "未绘制，原因：没有一组记录 KV 损失" in page  # why there is none is the page's own language
    labels = CHINESE.labels()
    assert labels("labels.accuracy") == "accuracy" and labels("reasons.no_log") == CHINESE("reasons.no_log")


def test_chinese_figures_have_their_glyphs(tmp_path: Path) -> None:
    if not chinese_fonts():
        pytest.skip("no font with Chinese characters (fonts-noto-cjk)")
    import warnings

    recipe = make_recipe({"ce": {"teachers": []}}, report={"comparisons": []})
    write_run(tmp_path, recipe, questions=4)
    tables = collect_tables(recipe, tmp_path)
    summary = summarise(recipe, tables, compare_all(recipe, tables), CHINESE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = canvas.warnings.filterwarnings
        try:
            canvas.warnings.filterwarnings = lambda *a, **k: None
            pictures = {p.name: p for p in draw_all(recipe, tables, summary, CHINESE)}
        finally:
            canvas.warnings.filterwarnings = rules
    assert pictures["comparison_with_error_bars"].svg


# -- the glossary, and the list of sections ------------------------------------------------------------


def test_the_glossary_has_the_words_of_the_page_and_no_others() -> None:
    found = dict(glossary("<p>Holm over arms</p><style>placebo</style>", ENGLISH))
    assert list(found) == ["arm", "Holm"]
    assert dict(glossary("<p>安慰剂与种子</p>", CHINESE)).keys() == {"种子", "安慰剂"}


def test_every_section_has_its_template_and_its_titles() -> None:
    for section in SECTIONS:
        assert (SOURCES / "sections" / f"{section.name}.jinja").is_file()
        for words in (ENGLISH, CHINESE):
            assert words(f"titles.{section.name}") and words(f"nav.{section.name}")


# -- the terminal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("primary", ["accuracy", "nll"])
def test_the_last_lines_of_a_run_are_the_page_s_verdict(tmp_path: Path, primary: str) -> None:
    rules = {"comparisons": [["competence", "ce"], ["fixed", "ce"]], "primary": primary, "margin": 0.01}
    recipe = make_recipe(report=rules)
    write_run(tmp_path, recipe, questions=20)
    tables = collect_tables(recipe, tmp_path)
    summary = summarise(recipe, tables, compare_all(recipe, tables))
    summary |= {"told": comparison_lines(summary), "headline": write_headline(summary)}
    lines = as_text({"run": "runs/x", "page": "runs/x/report.html", "summary": summary}).splitlines()
    told = [f"{c['arm']} against {c['baseline']}: {c['sentence']}" for c in summary["comparisons"]]
    assert " ".join(" ".join(lines).split()).endswith(" ".join([*told, summary["headline"]]))
    assert ("points" if primary == "accuracy" else "nats") in summary["headline"]


def test_in_a_chinese_study_the_last_lines_are_chinese_and_have_the_same_figures(tmp_path: Path) -> None:
    pairs = [["competence", "ce"], ["fixed", "ce"], {"arm": "competence", "baseline": "fixed", "parity": "data"}]
    told = {}
    for language in ("en", "zh"):
        curves = {"arms": ["competence", "ce"], "budgets": [1, 2]}
        recipe = make_recipe(report={"comparisons": pairs, "language": language, "curves": curves})
        run = tmp_path / language
        write_run(run, recipe, questions=20)
        (run / "arms/fixed/seed-44/ledger.json").unlink()  # refused, for two reasons
        mark_again(run / "arms/fixed/seed-44")
        report(recipe, run)
        summary = json.loads((run / "summary.json").read_text())
        told[language] = summary["told"]
        assert "".join(summary["told"][0].split()) in "".join(as_text({"summary": summary}).split())
    assert len(told["en"]) == len(told["zh"]) > 3, "two that stand in every study by rule, and that nothing is declared"
    for said, translated in zip(told["en"], told["zh"], strict=True):
        bare = re.sub("|".join(sorted(ARMS, key=len, reverse=True)), " ", KEPT.sub(" ", translated))
        assert not re.search(r"[a-z]{3,} [a-z]{3,}", bare) and re.search("[\u4e00-\u9fff]", translated), translated
        assert re.findall(r"\d+\.?\d*", said) == re.findall(r"\d+\.?\d*", translated)


def test_which_steps_were_kept_is_one_short_note_and_a_range_for_each_arm(tmp_path: Path) -> None:
    rule = selection_rule(TrainRecipe(select="best", patience=3, eval_every=5))
    steps = {"competence": (320, 480, 400), "ce": (80, 80, 80)}
    for language, kept in (("en", "kept 320–480"), ("zh", "保留 320–480")):
        arms = {name: ARMS[name][0] for name in steps}
        recipe = make_recipe(arms, report={"comparisons": [["competence", "ce"]], "language": language})
        write_run(tmp_path / language, recipe, questions=8)
        for arm, chosen in steps.items():
            for seed, step in zip(recipe.seeds, chosen, strict=True):
                folder = tmp_path / language / f"arms/{arm}/seed-{seed}"
                ledger = json.loads((folder / "ledger.json").read_text())
                ledger["selection"] = {"chosen_step": step, "select": "best", "patience": 3, "rule": rule}
                (folder / "ledger.json").write_text(json.dumps(ledger))
                mark_again(folder)
        page = report(recipe, tmp_path / language).read_text()
        [note] = [n for n in json.loads((tmp_path / language / "summary.json").read_text())["notes"] if "kept:" in n]
        assert note == f"Validation chose: {rule}. Steps kept: 80–480 of 800; of each arm: see its budget."
        assert words_of(language).message(note) in page and (language == "en" or CHINESE.message(note) != note)
        assert f"800<small>{kept}</small>" in page and re.search(r"800<small>\w+ ?80</small>", page)


def test_where_only_some_arms_were_chosen_the_note_names_them() -> None:
    rule = selection_rule(TrainRecipe(select="best", patience=3, eval_every=5))
    note = f"Validation chose for ce, fixed: {rule}. Steps kept: 40 of 800; of each arm: see its budget."
    said = CHINESE.message(note)
    assert said.startswith("ce") and "fixed 由验证集选定" in said and not re.search(r"[a-z]{3,} [a-z]{3,}", said)
