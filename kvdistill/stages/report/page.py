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

SVG_LIMIT_BYTES = 250_000
SPLITS = ("train", "val", "test")
# of the data manifest: as a table, in the recipe, or of no use
SHOWN_ELSEWHERE = ("tasks", "section", "files", "format", "examples")
EXAMPLES_PER_KIND = 4
EXCERPT = 700


def build_page(recipe: Recipe, tables: RunTables, summary: Row, pictures: Sequence[Picture]) -> str:
    """The page as text. `summary` as `summarise` made it, with its `headline`."""

    def finalize(value: Any) -> Any:  # applied to everything printed: invisible characters go before escaping
        return text.make_visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader(here)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     finalize=finalize, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.globals.update(
        percent=text.percent, number=text.number, signed=text.signed, count=text.count, p_value=text.p_value,
        with_prefix=text.with_prefix, size=text.size, duration=text.duration, is_known=text.is_known,
        side_name=text.side_name,
        amount=text.amount, difference=text.difference,
    )  # fmt: skip
    means = {name: arm["mean"] for name, arm in summary["arms"].items() if not math.isnan(arm["mean"])}
    if summary["accuracy_near_zero"]:  # accuracy says nothing, so no arm is the best
        means = {}
    *but_last, last = map(str, summary["seeds"])
    seeds_words = f"{', '.join(but_last)} and {last}" if but_last else last
    teachers = [
        {"name": name, "by_task": found.get("accuracy_by_task") or {}, "steps": found.get("steps"),
         "seconds": found.get("seconds")}
        for name, found in tables.teachers.items()
    ]  # fmt: skip
    counts = [  # rows per task and split, and how many problems were too long
        {"task": task, "too_long": sum(split.get("too_long") or 0 for split in splits.values()),
         **{s: splits.get(s, {}).get("rows") for s in SPLITS}}
        for task, splits in (tables.manifest.get("tasks") or {}).items()
    ]  # fmt: skip
    kept = tables.path / "recipe.json"
    recipe_text = kept.read_text(encoding="utf-8") if kept.is_file() else recipe.model_dump_json(indent=1)
    return environment.get_template("page.html.jinja").render(
        css=Markup((here / "page.css").read_text(encoding="utf-8")),  # ours, and holds no `<`
        title=summary["title"], summary=summary, arms=summary["arms"], tasks=summary["tasks"], recipe=recipe,
        warnings=text.list_warnings(summary), pictures={p.name: _embed(p) for p in pictures}, method=METHOD,
        has_reasoning=any(not math.isnan(arm["nll_reasoning"]["mean"]) for arm in summary["arms"].values()),
        figure=summary["primary"], best=max(means, key=lambda name: means[name], default=""), seeds_words=seeds_words,
        match=match_table(recipe, tables), match_figures=MATCH_FIGURES,
        budgets=budgets(recipe, tables), reference=reference_arm(recipe), teachers=teachers,
        counts=counts, manifest=_flatten_without(tables.manifest, *SHOWN_ELSEWHERE),
        validation=flatten(tables.validation), examples=_pick_examples(tables, summary),
        provenance=_flatten_without(tables.provenance, "command"),
        command=tables.provenance.get("command"), recipe_text=recipe_text,
    )  # fmt: skip


def _embed(picture: Picture) -> Row:
    """A picture as a data URI: SVG where it is small enough, PNG where it is not."""
    uri = ""
    if picture.svg:
        small = len(picture.svg) <= SVG_LIMIT_BYTES
        content, kind = (picture.svg, "svg+xml") if small else (picture.png, "png")
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return {"title": picture.title, "caption": picture.caption, "reason": picture.reason, "uri": uri}


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
    wanted = [first["arm"] for first in summary["comparisons"][:1] if first["arm"] in tables.arms]
    arm = next((name for name in [*wanted, *tables.arms] if tables.runs[name]), "")
    if not arm:
        return {"arm": "", "seed": 0, "rows": []}
    seed, questions = min(tables.runs[arm]), read_questions(tables.path)
    rows: list[Record] = []
    records = run_records(tables.seed_folder(arm, seed), arm, seed)
    for correct in (True, False):
        queues = [[r for r in records if r.task == task and r.correct is correct] for task in tables.tasks]
        turns = [queue[i] for i in range(EXAMPLES_PER_KIND) for queue in queues if i < len(queue)]
        rows += turns[:EXAMPLES_PER_KIND]
    shown = [
        {"task": row.task, "id": row.id, "correct": row.correct,
         "question": _excerpt(questions.get(row.question, "")), "gold": _excerpt(row.gold or ""),
         "prediction": None if row.prediction is None else _excerpt(row.prediction)}
        for row in rows
    ]  # fmt: skip
    return {"arm": arm, "seed": seed, "rows": shown}


def _excerpt(value: str) -> str:
    return value if len(value) <= EXCERPT else value[:EXCERPT] + f" … ({len(value) - EXCERPT} more characters)"
