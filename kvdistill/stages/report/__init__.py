"""The stage after evaluation: a run folder in, JSON results, figures and one page out. Needs no model and no torch.

Reads (never writes) `arms/*/seed-*/`, `data/`, `teachers/`, `recipe.json`, `provenance.json`; writes
`statistical_results.json`, `summary.json`, `figures/*.svg|png` and `report.html`. Everything is computed anew from
the records each time; the same folder gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from kvdistill.core.files import write_text
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.collect import collect_tables, write_json
from kvdistill.stages.report.curves import LearningCurveTracker
from kvdistill.stages.report.figures import draw_all
from kvdistill.stages.report.language import words_of
from kvdistill.stages.report.page import build_page
from kvdistill.stages.report.summary import compare_all, statistics_document, summarise
from kvdistill.stages.report.text import comparison_lines, write_headline
from kvdistill.stages.report.tuning import tuning_table

__all__ = ["LearningCurveTracker", "report"]


def report(recipe: Recipe, run: Path, progress: Progress | None = None) -> Path:
    """Compute, draw and write the report of a run folder; returns the path of `report.html`.

    progress: called with (what, done, total). Raises RunFolderError if nothing was evaluated or a file is damaged.
    """
    run, tell, total = Path(run), progress or silent, 4
    tell("reading records", 0, total)
    tables = collect_tables(recipe, run)
    tell("statistics", 1, total)
    family = compare_all(recipe, tables)
    words = words_of(recipe.report.language)
    summary = summarise(recipe, tables, family, words)
    if (tuning := tuning_table(recipe, run)) is not None:
        summary["tuning"] = tuning
    summary |= {"told": comparison_lines(summary, words), "headline": write_headline(summary, words)}
    write_json(run / "statistical_results.json", statistics_document(recipe, summary))
    tell("figures", 2, total)
    pictures = draw_all(recipe, tables, summary, words)
    for picture in pictures:
        picture.save(run / "figures")
    tell("page", 3, total)
    page = run / "report.html"
    write_text(page, build_page(recipe, tables, summary, pictures, words))
    summary["figures"] = {p.name: None if p.svg else p.reason for p in pictures}
    write_json(run / "summary.json", summary)  # last: whoever finds it finds the rest
    tell("done", total, total)
    return page
