"""What each control of a study rules out, and whether it did harm: rows for the page, and a word beside comparisons.

A control that is worse than plain fine-tuning is no neutral ground: an arm that beats it may owe that to nothing but
not being harmed. Significantly: the declared comparison with the plain arm says so. Clearly: it is worse in every one
of at least three seeds, and by more than the equivalence margin in the mean. Reads the summary only.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from kvdistill.core.arms import arm_recipe
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.compare import MIN_SEEDS
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.text import CONTROLS, is_known, write_harm, write_texts


def describe_controls(
    recipe: Recipe,
    summary: dict[str, Any],
    reference: str,
    texts: Mapping[str, Mapping[str, Any]],
    words: Words = ENGLISH,
) -> list[dict[str, Any]]:
    """A row for each arm that is a control or reads other texts, in the recipe's order, and `caution` in comparisons.

    reference: the baseline of most comparisons. texts: of arms, what their ledgers say of texts beside their own.

    {"arm", "kind", "what", "rules_out", "said"}, and of controls "plain", "difference", "p_holm" and "harm":
    "significantly", "clearly", "" or None where it cannot be told. said: harm, or what it read, in words.
    """
    arms = {name: arm_recipe(recipe, name) for name in recipe.every_arm}
    names = [reference, *recipe.arms]  # plain fine-tuning on the student's own texts: the reference if it is that
    is_plain = (
        one
        for one in names
        if not (arms[one].needs_kv or arms[one].needs_logits)
        and arms[one].texts == "own"
        and arms[one].reasoning == "written"
    )
    plain = next(is_plain, None)
    rows: list[dict[str, Any]] = []
    for name in recipe.arms:
        arm = arms[name]
        kind = arm.control or (arm.texts if arm.texts != "own" else None)
        if kind is None:
            continue
        what, rules_out = CONTROLS[kind]
        row: dict[str, Any] = {"arm": name, "kind": kind}
        row |= {"what": words.message(what), "rules_out": words.message(rules_out)}
        if arm.control is not None:
            row |= _harm(recipe, summary, name, plain)
            row["said"] = write_harm(row, summary["primary"], words)
        else:
            row["said"] = write_texts(texts.get(name) or {}, words)
        rows.append(row)
    harmful = {row["arm"]: row["said"] for row in rows if row.get("harm")}
    for one in (*summary["comparisons"], *summary["secondary_comparisons"]):
        if plain not in (one["arm"], one["baseline"]):
            said = [f"{name} {harmful[name]}" for name in (one["baseline"], one["arm"]) if name in harmful]
            if said:
                one["caution"] = said[0]
    return rows


def _harm(recipe: Recipe, summary: dict[str, Any], name: str, plain: str | None) -> dict[str, Any]:
    figure, unknown = recipe.report.primary, {"plain": plain, "difference": None, "p_holm": None, "harm": None}
    if plain is None:
        return unknown
    sides = [one if figure == "accuracy" else one["nll"] for one in (summary["arms"][name], summary["arms"][plain])]
    pairs = zip(*(side["per_seed"] for side in sides), strict=True)
    apart = [a - b for a, b in pairs if is_known(a) and is_known(b)]
    if len(apart) < MIN_SEEDS:
        return unknown
    sign = 1 if figure == "accuracy" else -1
    found = {"plain": plain, "difference": statistics.fmean(apart), "p_holm": None, "harm": ""}
    declared = [c for c in summary["comparisons"] if {c["arm"], c["baseline"]} == {name, plain} and not c["refused"]]
    for one in declared:
        if one["verdict"] == ("worse" if one["arm"] == name else "better"):
            return {**found, "harm": "significantly", "p_holm": one["p_holm"]}
    if all(sign * one < 0 for one in apart) and -sign * statistics.fmean(apart) > recipe.report.margin:
        found["harm"] = "clearly"
    return found
