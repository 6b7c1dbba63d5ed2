"""One self-contained HTML page: words, tables and pictures of a study, with nothing fetched from anywhere.

A page is a frame (`sections/page.jinja`: head, verdict, contents) and the list `SECTIONS`. A section is one line
there, a template `sections/NAME.jinja`, its title in `language/*.toml` (`titles.NAME`, `nav.NAME`), and where it
shows more than the study itself, a function that makes its values. Every string passes `make_visible` and jinja's
autoescape, so ids, predictions and names written by models or strangers stay text. Computes no statistics.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from kvdistill.core.recipe import Recipe, TeacherRecipe
from kvdistill.core.records import Record
from kvdistill.stages.report import text
from kvdistill.stages.report.canvas import Picture, chinese_fonts, small_png
from kvdistill.stages.report.collect import Row, RunTables, read_questions, run_records
from kvdistill.stages.report.figures import MATCH_FIGURES, match_table
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.latents import causal_verdicts, read_outs
from kvdistill.stages.report.models import STUDENT
from kvdistill.stages.report.summary import METHOD, budgets, mean_ledger, reference_arm
from kvdistill.stages.report.tuning import tuning_rows

SVG_LIMIT_BYTES = 250_000
SPLITS = ("train", "val", "test", "teach")
# of the data manifest: as a table, in the recipe, or of no use
SHOWN_ELSEWHERE = ("tasks", "section", "files", "format", "examples", "table")
EXAMPLES_PER_KIND = 4
EXCERPT = 700
MAX_ANSWERS = 12  # of different arms to one question
MAX_TASKS = 20  # that an example is shown of
MAX_READ = 8  # arms whose latents are read out


@dataclass(frozen=True)
class Study:
    """All that a section may show. `summary` as `summarise` made it, with its `headline`."""

    recipe: Recipe
    tables: RunTables
    summary: Row
    pictures: Mapping[str, Picture]
    words: Words


class Section(NamedTuple):
    """`name`: of its template and its texts. `values`: what the template needs beside the study itself."""

    name: str
    values: Callable[[Study], Row] = lambda study: {}


def build_page(
    recipe: Recipe, tables: RunTables, summary: Row, pictures: Sequence[Picture], words: Words = ENGLISH
) -> str:
    """The page as text: its sections in order, then the frame around them."""
    study = Study(recipe, tables, summary, {p.name: p for p in pictures}, words)
    environment = _environment(study)
    means = {name: arm["mean"] for name, arm in summary["arms"].items() if not math.isnan(arm["mean"])}
    if summary["accuracy_near_zero"]:  # accuracy says nothing, so no arm is the best
        means = {}
    shared = {
        "title": summary["title"], "summary": summary, "arms": summary["arms"], "tasks": summary["tasks"],
        "recipe": recipe, "figure": summary["primary"], "reference": reference_arm(recipe),
        "best": max(means, key=lambda name: means[name], default=""),
        "ci_percent": f"{100 * (1 - recipe.report.alpha):.4g}",
    }  # fmt: skip
    *but_last, last = map(str, summary["seeds"])
    seeds = words("page.seeds_and", before=words("page.comma").join(but_last), last=last) if but_last else last

    def frame(sections: dict[str, Markup]) -> str:
        css = Markup((Path(__file__).parent / "sections" / "page.css").read_text(encoding="utf-8"))  # holds no `<`
        return environment.get_template("page.jinja").render(
            shared, css=css, sections=sections, seeds_words=seeds, warnings=text.list_warnings(summary, words),
            english_figures=words.language != "en" and not chinese_fonts(),
        )  # fmt: skip

    made: dict[str, Markup] = {}
    for name, values in SECTIONS:
        if name == "glossary":  # the words that the rest of the page uses
            shared["entries"] = glossary(frame(made), words)
            if not shared["entries"]:
                continue
        body = environment.get_template(f"{name}.jinja").render(shared, **values(study))
        if body.strip():  # a section may have nothing to say of this study
            made[name] = Markup(body)
    return frame(made)


def _environment(study: Study) -> jinja2.Environment:
    words = study.words

    def finalize(value: Any) -> Any:  # applied to everything printed: invisible characters go before escaping
        return text.make_visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def say(key: str, **values: Any) -> Markup:
        return words.html(key, **{name: finalize(value) for name, value in values.items()})

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "sections")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     finalize=finalize, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.globals.update(
        t=say, message=words.message, language="zh-CN" if words.language == "zh" else words.language,
        percent=text.percent, number=text.number, signed=text.signed, count=text.count, p_value=text.p_value,
        with_prefix=text.with_prefix, size=text.size, is_known=text.is_known,
        duration=lambda seconds: text.duration(seconds, words),
        amount=lambda found, figure: text.amount(found, figure, words),
        difference=lambda found, figure: text.difference(found, figure, words),
        sentence=lambda comparison: text.sentence(comparison, words),
        at_equal=lambda comparison: text.at_equal(comparison, words),
        side_name=lambda comparison, side: text.side_name(comparison, side, words),
        pictures={name: _embed(p) for name, p in study.pictures.items()},
    )  # fmt: skip
    return environment


def _embed(picture: Picture) -> Row:
    """A picture as a data URI: SVG where it is small enough, PNG in few colours where it is not."""
    uri = ""
    if picture.svg:
        small = len(picture.svg) <= SVG_LIMIT_BYTES
        content, kind = (picture.svg, "svg+xml") if small else (small_png(picture.png), "png")
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return {"title": picture.title, "caption": picture.caption, "reason": picture.reason, "uri": uri,
            "alt": picture.alt or picture.caption}  # fmt: skip


def glossary(page: str, words: Words) -> list[tuple[str, str]]:
    """(word, what it means) of the words that the page uses, in the table's order."""
    shown = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    names = dict.fromkeys(key.split(".")[1] for key in words.texts if key.startswith("glossary."))
    return [
        (words(f"glossary.{name}.term"), words(f"glossary.{name}.text"))
        for name in names
        if re.search(words.get(f"glossary.{name}.use"), shown)
    ]


def flatten(value: Any, name: str = "", *, depth: int = 4) -> list[tuple[str, str]]:
    """A JSON value as (dotted name, text) pairs; long lists as their length and first entries."""
    if isinstance(value, dict) and depth > 0:
        return [pair for key, part in value.items()
                for pair in flatten(part, f"{name}.{key}" if name else str(key), depth=depth - 1)]  # fmt: skip
    if isinstance(value, list) and (len(value) > 4 or any(isinstance(v, dict | list) for v in value)):
        head = "; ".join(json.dumps(v, ensure_ascii=False) for v in value[:3])
        return [(name, f"{len(value)}" + (f": {head}" + (" …" if len(value) > 3 else "") if value else ""))]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)) or "–")]
    return [(name, "–" if value is None else str(value))] if name else []


def _flatten_without(value: Mapping[str, Any], *shown_elsewhere: str) -> list[tuple[str, str]]:
    return flatten({key: part for key, part in value.items() if key not in shown_elsewhere})


# -- what sections show ---------------------------------------------------------------------------------


def _arms(study: Study) -> Row:
    arms = study.summary["arms"].values()
    return {
        "has_reasoning": any(not math.isnan(arm["nll_reasoning"]["mean"]) for arm in arms),
        "questions": max(arm["questions"] for arm in arms),
    }


def _tasks(study: Study) -> Row:
    """Each task: what it is, how many problems, one question, and what every arm answered."""
    tables, words = study.tables, study.words
    manifest, questions = tables.manifest, read_questions(tables.path)
    sources = {one.get("task"): one for one in manifest.get("sources") or []}
    counts = manifest.get("tasks") or {}
    told = []
    for task in list(dict.fromkeys([*counts, *study.summary["tasks"]])):
        splits = counts.get(task) or {}
        rows = {split: (splits.get(split) or {}).get("rows") for split in SPLITS}
        too_long = sum(split.get("too_long") or 0 for split in splits.values())
        told.append({"name": task, "about": _about(task, sources.get(task) or {}, words), "rows": rows,
                     "too_long": too_long, "example": None})  # fmt: skip
    for one in [one for one in told if one["name"] in study.summary["tasks"]][:MAX_TASKS]:
        one["example"] = _worked_example(study, one["name"], questions)
    return {"told": told, "splits": SPLITS, "has_counts": bool(counts)}


def _about(task: str, source: Row, words: Words) -> str:
    """In words what a task is; of a stranger's, where it comes from."""
    if known := words.get(f"tasks.about.{task}"):
        return known
    kind, place = source.get("kind"), str(source.get("place") or source.get("file") or "")
    if kind == "generated":
        return words("tasks.generated")
    if source.get("file") or kind in ("file", "files", "local"):
        return words("tasks.file", file=place.rsplit("/", 1)[-1])
    return words("tasks.hub", place=place) if place else ""


def _worked_example(study: Study, task: str, questions: Mapping[tuple[str, str, str], Row]) -> Row | None:
    """The task's first question as arms were asked it, and what each answered in its first seed."""
    first = {arm: found[task] for arm, found in study.tables.samples.items() if task in found}
    if not first:
        return None
    asked = next(iter(first.values())).question
    same = {arm: record for arm, record in first.items() if record.question == asked}
    compared = [one[side] for one in study.summary["comparisons"] for side in ("arm", "baseline")]
    chosen = sorted(same, key=lambda arm: arm not in compared)[:MAX_ANSWERS]
    known = questions.get(asked) or {}
    answers = [
        {"arm": arm, "correct": record.correct, "text": _excerpt(_answer_of(record), study.words)}
        for arm, record in same.items()
        if arm in chosen
    ]
    parts = {part: _excerpt(known.get(part, "").strip(), study.words) for part in ("prompt", "reasoning", "answer")}
    record = next(iter(same.values()))
    return {**parts, "answer": parts["answer"] or record.gold or "", "id": record.id, "answers": answers,
            "left_out": len(same) - len(answers)}  # fmt: skip


def _answer_of(record: Record) -> str:
    """What was written, with its reasoning; where only the answer that was read from it is kept, that."""
    return (record.completion or record.prediction or "").strip()


def _models(study: Study) -> Row:
    """The student and every teacher: sizes, tokenizer, where from, and how good the teachers are themselves."""
    recipe, tables, words = study.recipe, study.tables, study.words
    own = {name: found.get("tokenizer") for name, found in tables.tokenizers.items()}
    shared = tables.manifest.get("tokenizer") or {}
    shown = [{"name": words("teachers.student"), "is_student": True, **tables.models.get(STUDENT, {}),
              "tokenizer": shared.get("name"), "pieces": shared.get("size"), "origin": _origin(study, None),
              "by_task": {}, "seconds": None}]  # fmt: skip
    for teacher in recipe.teachers:
        report, reads = _mean_report(tables, teacher.name), own.get(teacher.name) or {}
        shown.append({"name": teacher.name, "is_student": False, **tables.models.get(teacher.name, {}),
                      "tokenizer": reads.get("name") or (teacher.tokenizer if reads else None),
                      "pieces": reads.get("size"), "origin": _origin(study, teacher),
                      "by_task": report.get("accuracy_by_task") or {}, "seconds": report.get("seconds")})  # fmt: skip
    return {
        "models": shown,
        "has_accuracy": any(one["by_task"] for one in shown),
        "unmeasured": any(not one["by_task"] and not one["is_student"] for one in shown),
    }


def _mean_report(tables: RunTables, teacher: str) -> Row:
    """A teacher's own report; where each seed trained one, the means of theirs."""
    of_seeds = f"{teacher}, seed "
    reports = [found for name, found in tables.teachers.items() if name == teacher or name.startswith(of_seeds)]
    if not reports:
        return {}
    tasks = dict.fromkeys(task for one in reports for task in one.get("accuracy_by_task") or {})
    known = {key: [one[key] for one in reports if one.get(key) is not None] for key in ("steps", "seconds")}
    by_task = {task: [one["accuracy_by_task"].get(task, math.nan) for one in reports] for task in tasks}
    means = {key: sum(values) / len(values) for key, values in (*known.items(), *by_task.items()) if values}
    return {"accuracy_by_task": {task: means[task] for task in tasks}, **{key: means.get(key) for key in known}}


def _origin(study: Study, teacher: TeacherRecipe | None) -> str:
    """Where a model's weights come from, in words. None: the student."""
    words, model = study.words, teacher or study.recipe.student
    if model.path:
        kept = words("teachers.kept", n=model.keep_layers, path=model.path) if model.keep_layers else model.path
    elif teacher is None:
        kept = words("teachers.student_scratch")
    else:
        counts = study.tables.manifest.get("tasks") or {}
        splits = ["teach"] if study.recipe.data.disjoint_teachers else ["teach", "train"]
        rows = [((counts.get(task) or {}).get(s) or {}).get("rows") or 0 for task in teacher.train_on for s in splits]
        steps = _mean_report(study.tables, teacher.name).get("steps") or teacher.optimiser.steps
        tasks = words("page.comma").join(teacher.train_on)
        key = "teachers.scratch" if sum(rows) else "teachers.scratch_short"
        kept = words(key, tasks=tasks, count=text.count(sum(rows)), steps=text.count(steps))
    lora = study.recipe.student.lora if teacher is None else None
    return kept + (words("teachers.lora", r=lora.r) if lora else "")


def _match(study: Study) -> Row:
    return {"match": match_table(study.recipe, study.tables), "match_figures": MATCH_FIGURES}


# the columns of where FLOPs went; fits and layer maps are one
FLOP_PARTS = ("student", "aligner", "teachers", "teacher_training", "fit", "generation", "tuning")
ALWAYS_SHOWN = ("student", "teachers", "aligner", "teacher_training", "fit")


def _budget(study: Study) -> Row:
    """Per arm what it spent, and on what: the columns add up to all FLOPs."""
    found = budgets(study.recipe, study.tables)
    for ledger in found.values():
        if ledger:
            ledger |= {part: ledger.get(f"{part}_flops") for part in FLOP_PARTS}
            ledger["teachers"] = sum(ledger["teacher_flops"].values())
            ledger["fit"] += ledger["layer_maps_flops"]
    spent = [part for part in FLOP_PARTS if any(ledger.get(part) for ledger in found.values())]
    shown = [part for part in FLOP_PARTS if part in ALWAYS_SHOWN or part in spent]
    unpriced = [teacher.name for teacher in study.recipe.teachers if teacher.scratch is None]
    return {"budgets": found, "flop_parts": shown, "unpriced": unpriced}


def _tuning(study: Study) -> Row:
    """What the search of each arm tried and chose; `runs`: what one run of the arm took beside it."""
    table = study.summary.get("tuning")
    if table is None:
        return {"tuning": None}
    columns, trials = tuning_rows(table, words=study.words)
    ledgers = {arm: mean_ledger(study.tables, arm) for arm in table["chosen"]}
    runs = {arm: found["total_flops"] - found["tuning_flops"] for arm, found in ledgers.items() if found}
    best = [row for row in trials if row[-1]]
    keys = columns[2 : 2 + len(table["keys"])]
    return {"tuning": table, "columns": columns, "keys": keys, "trials": trials, "best": best,
            "runs": {arm: runs.get(arm) for arm in table["chosen"]}}  # fmt: skip


def _latents(study: Study) -> Row:
    """What arms that think in latents thought about one question of each task, beside its reasoning as written."""
    if "latents" not in study.summary:
        return {"latents": None}
    compared = [one[side] for one in study.summary["comparisons"] for side in ("arm", "baseline")]
    questions, shown = read_questions(study.tables.path), read_outs(study.tables, compared)
    for arm in shown:
        arm["questions"] = [
            {**one, "task": one["question"][0], "id": one["question"][1],
             "asked": {part: _excerpt(questions.get(tuple(one["question"]), {}).get(part, "").strip(), study.words)
                       for part in ("prompt", "reasoning", "answer")},
             "completion": _excerpt((one["completion"] or "").strip(), study.words)}
            for one in sorted(arm["questions"], key=lambda one: one["question"])[:MAX_TASKS]
        ]  # fmt: skip
    latents = study.summary["latents"]
    verdicts = causal_verdicts(latents["causal"])
    return {"latents": latents, "verdicts": verdicts, "shown": shown[:MAX_READ], "left": shown[MAX_READ:]}


def _data(study: Study) -> Row:
    tables = study.tables
    return {"manifest": _flatten_without(tables.manifest, *SHOWN_ELSEWHERE), "validation": flatten(tables.validation)}


def _examples(study: Study) -> Row:
    """A few right and a few wrong answers of one run, the first ones by task in turn: not chosen by how they look."""
    tables, summary = study.tables, study.summary
    wanted = [first["arm"] for first in summary["comparisons"][:1] if first["arm"] in tables.arms]
    arm = next((name for name in [*wanted, *tables.arms] if tables.runs[name]), "")
    if not arm:
        return {"examples": {"arm": "", "seed": 0, "rows": []}}
    seed, questions = min(tables.runs[arm]), read_questions(tables.path)
    rows: list[Record] = []
    records = run_records(tables.seed_folder(arm, seed), arm, seed)
    for correct in (True, False):
        queues = [[r for r in records if r.task == task and r.correct is correct] for task in tables.tasks]
        turns = [queue[i] for i in range(EXAMPLES_PER_KIND) for queue in queues if i < len(queue)]
        rows += turns[:EXAMPLES_PER_KIND]
    shown = [
        {"task": row.task, "id": row.id, "correct": row.correct,
         "question": _excerpt((questions.get(row.question) or {}).get("prompt", ""), study.words),
         "gold": _excerpt(row.gold or "", study.words),
         "prediction": None if row.prediction is None else _excerpt(_answer_of(row), study.words)}
        for row in rows
    ]  # fmt: skip
    return {"examples": {"arm": arm, "seed": seed, "rows": shown}}


def _excerpt(value: str, words: Words) -> str:
    return value if len(value) <= EXCERPT else value[:EXCERPT] + words("page.left_out", n=len(value) - EXCERPT)


def _provenance(study: Study) -> Row:
    asked = study.recipe.model_dump(mode="json", exclude_defaults=True)
    return {
        "provenance": _flatten_without(study.tables.provenance, "command"),
        "command": study.tables.provenance.get("command"),
        "recipe_text": yaml.safe_dump(asked, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100),
        "method": METHOD,
    }


SECTIONS = (  # in the page's order
    Section("arms", _arms),
    Section("tasks", _tasks),
    Section("teachers", _models),
    Section("statistics"),
    Section("curves"),
    Section("cost"),
    Section("latents", _latents),
    Section("tuning", _tuning),
    Section("ablations"),
    Section("routing"),
    Section("match", _match),
    Section("budget", _budget),
    Section("data", _data),
    Section("examples", _examples),
    Section("glossary"),
    Section("provenance", _provenance),
)
