"""One self-contained HTML page: words, tables and pictures of a study, with nothing fetched from anywhere.

Turns summary, tables and pictures into what `page.html.jinja` shows. Every string passes `make_visible` and jinja's
autoescape, so ids, predictions and names written by models or strangers stay text. Computes no statistics.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kvdistill.core.recipe import Recipe
from kvdistill.core.records import Record
from kvdistill.stages.report import text
from kvdistill.stages.report.canvas import Picture
from kvdistill.stages.report.collect import Row, RunTables, read_questions, run_records
from kvdistill.stages.report.figures import MATCH_FIGURES, match_table
from kvdistill.stages.report.summary import METHOD, budgets, reference_arm
from kvdistill.stages.report.verdict import amount, difference, list_warnings

SVG_LIMIT_BYTES = 250_000
SPLITS = ("train", "val", "test")
SHOWN_ELSEWHERE = (
    "tasks",
    "section",
    "files",
    "format",
)  # of the data manifest: as a table, in the recipe, or of no use
EXAMPLES_PER_KIND = 4
EXCERPT = 700


def build_page(recipe: Recipe, tables: RunTables, summary: Row, pictures: Sequence[Picture]) -> str:
    """The page as text. `summary` as `summarise` made it, with its `headline`."""
    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader(here)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     finalize=_finalize, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.globals.update(
        percent=text.percent, number=text.number, signed=text.signed, count=text.count, p_value=text.p_value,
        with_prefix=text.with_prefix, size=text.size, duration=text.duration, is_known=text.is_known,
        amount=amount, difference=difference,
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        css=Markup((here / "page.css").read_text(encoding="utf-8")),  # ours, and holds no `<`
        title=summary["title"], summary=summary, arms=summary["arms"], tasks=summary["tasks"], recipe=recipe,
        warnings=list_warnings(summary), pictures={p.name: _embed(p) for p in pictures}, method=METHOD,
        figure=summary["primary"], best=_best_arm(summary), seeds_words=_join(summary["seeds"]),
        match=match_table(recipe, tables), match_figures=MATCH_FIGURES,
        budgets=budgets(recipe, tables), reference=reference_arm(recipe), teachers=_teacher_rows(tables),
        counts=_count_rows(tables.manifest), manifest=_flatten_without(tables.manifest, *SHOWN_ELSEWHERE),
        validation=flatten(tables.validation), examples=_pick_examples(tables, summary),
        provenance=_flatten_without(tables.provenance, "command"),
        command=tables.provenance.get("command"), recipe_text=_recipe_text(recipe, tables),
    )  # fmt: skip


def _finalize(value: Any) -> Any:
    """Applied to everything the template prints: strangers' text loses its invisible characters before escaping."""
    if isinstance(value, Markup):
        return value
    return text.make_visible(value) if isinstance(value, str) else value


def _embed(picture: Picture) -> Row:
    """A picture as a data URI: SVG where it is small enough, PNG where it is not."""
    uri = ""
    if picture.svg:
        small = len(picture.svg) <= SVG_LIMIT_BYTES
        content, kind = (picture.svg, "svg+xml") if small else (picture.png, "png")
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return {"title": picture.title, "caption": picture.caption, "reason": picture.reason, "uri": uri}


def _join(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _best_arm(summary: Row) -> str:
    """The arm with the highest accuracy; none where accuracy says nothing."""
    if summary["accuracy_near_zero"]:
        return ""
    known = {name: arm["mean"] for name, arm in summary["arms"].items() if not math.isnan(arm["mean"])}
    return max(known, key=lambda name: known[name]) if known else ""


def _teacher_rows(tables: RunTables) -> list[Row]:
    return [
        {"name": name, "by_task": found.get("accuracy_by_task") or {}, "steps": found.get("steps"),
         "seconds": found.get("seconds")}
        for name, found in tables.teachers.items()
    ]  # fmt: skip


def _count_rows(manifest: Mapping[str, Any]) -> list[Row]:
    """Rows per task and split, and how many problems were too long, from the manifest's `tasks`."""
    rows = []
    for task, splits in (manifest.get("tasks") or {}).items():
        too_long = sum(split.get("too_long") or 0 for split in splits.values())
        rows.append({"task": task, "too_long": too_long, **{s: splits.get(s, {}).get("rows") for s in SPLITS}})
    return rows


def flatten(value: Any, name: str = "", *, depth: int = 4) -> list[tuple[str, str]]:
    """A JSON value as (dotted name, text) pairs; long lists as their length and first entries."""
    if isinstance(value, dict) and depth > 0:
        return [pair for key, part in value.items()
                for pair in flatten(part, f"{name}.{key}" if name else str(key), depth=depth - 1)]  # fmt: skip
    if isinstance(value, list) and (len(value) > 4 or any(isinstance(v, dict | list) for v in value)):
        head = "; ".join(json.dumps(v, ensure_ascii=False) for v in value[:3])
        return [(name, f"{len(value)}" + (f": {head}" + (" …" if len(value) > 3 else "") if value else ""))]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)) or "none")]
    return [(name, "–" if value is None else str(value))] if name else []


def _flatten_without(value: Mapping[str, Any], *shown_elsewhere: str) -> list[tuple[str, str]]:
    return flatten({key: part for key, part in value.items() if key not in shown_elsewhere})


def _pick_examples(tables: RunTables, summary: Row) -> Row:
    """A few right and a few wrong answers of one run, the first ones by task in turn: not chosen by how they look."""
    listed = summary["comparisons"]
    wanted = [listed[0]["arm"]] if listed and listed[0]["arm"] in tables.arms else []
    for arm in [*wanted, *tables.arms]:
        if tables.runs[arm]:
            seed = min(tables.runs[arm])
            break
    else:
        return {"arm": "", "seed": 0, "rows": []}
    questions, rows = read_questions(tables.path), []
    records = run_records(tables.seed_folder(arm, seed), arm, seed)
    for correct in (True, False):
        queues = [[r for r in records if r.task == task and r.correct is correct] for task in tables.tasks]
        turns = [queue[i] for i in range(EXAMPLES_PER_KIND) for queue in queues if i < len(queue)]
        rows += turns[:EXAMPLES_PER_KIND]
    return {"arm": arm, "seed": seed, "rows": [_example(r, questions) for r in rows]}


def _example(record: Record, questions: Mapping[tuple[str, str, str], str]) -> Row:
    return {
        "task": record.task, "id": record.id, "correct": record.correct,
        "question": _excerpt(questions.get(record.question, "")), "gold": _excerpt(record.gold or ""),
        "prediction": None if record.prediction is None else _excerpt(record.prediction),
    }  # fmt: skip


def _excerpt(value: str) -> str:
    return value if len(value) <= EXCERPT else value[:EXCERPT] + f" … ({len(value) - EXCERPT} more characters)"


def _recipe_text(recipe: Recipe, tables: RunTables) -> str:
    path = tables.path / "recipe.json"
    return path.read_text(encoding="utf-8") if path.is_file() else recipe.model_dump_json(indent=1)
