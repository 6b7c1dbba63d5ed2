"""An arm's complete recipe: the study's sections with its changes over them, and what does not go together in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from kvdistill.core.errors import RecipeError
from kvdistill.core.mistakes import mistakes_of, nearest, refuse
from kvdistill.core.recipe import (
    AlignRecipe,
    ArmRecipe,
    CompressRecipe,
    FuseRecipe,
    LatentRecipe,
    LossRecipe,
    Recipe,
    TrainRecipe,
)

ARM_SECTIONS: dict[str, type[BaseModel]] = {
    "align": AlignRecipe,
    "compress": CompressRecipe,
    "fuse": FuseRecipe,
    "loss": LossRecipe,
    "latent": LatentRecipe,
    "train": TrainRecipe,
}


def arm_recipe(recipe: Recipe, arm: str, place: str = "recipe") -> ArmRecipe:
    """The complete recipe of one arm: the study's sections with the arm's own changes over them.

    Of an arm that is matched, `train.steps` are not known yet: `arms.budget` computes them. Of one that is tuned, the
    values are the recipe's: `Experiment.arm` fills in what was chosen.
    """
    if arm not in recipe.every_arm:
        raise RecipeError(f"there is no arm {arm!r}", place=f"{place}: arms", fix=nearest(arm, list(recipe.every_arm)))
    made, mistakes = read_arm(recipe, arm, place)
    refuse(mistakes, place)
    assert made is not None
    return made


def read_arm(
    recipe: Recipe, arm: str, place: str, *, alone: bool = False
) -> tuple[ArmRecipe | None, list[RecipeError]]:
    """The arm (None where its keys are wrong) and its mistakes. alone: the sections that it changes are not to be
    relied on, so only its own keys and values are judged."""
    where = f"{place}: arms.{arm}"
    changes = dict(recipe.every_arm[arm])
    mistakes: list[RecipeError] = []
    teachers = changes.pop("teachers", [teacher.name for teacher in recipe.teachers])
    tree: dict[str, Any] = {"teachers": teachers, "control": changes.pop("control", None)}
    tree |= {key: changes.pop(key) for key in ("match", "times", "problems", "reasoning") if key in changes}
    if "placebo" in changes:
        fix = "write control: placebo" if changes.pop("placebo") else "leave it out"
        mistakes.append(RecipeError("`placebo` is one of several controls now", place=where, fix=fix))
    for section in ARM_SECTIONS:
        over = changes.pop(section, None) or {}
        if not isinstance(over, dict):
            mistakes.append(RecipeError(f"{section} is a section", place=where, fix=f"write {section}: {{key: value}}"))
            over = {}
        tree[section] = {**getattr(recipe, section).model_dump(), **over}
    tree["texts"] = changes.pop("texts", "own")
    if (named := changes.pop("texts_from", None)) is not None or tree["texts"] != "own":
        whose = [one.name for one in recipe.teachers if tree["texts"] == "written" or one.scratch is not None]
        tree["texts_from"] = whose if named is None else named
    steps, times = tree["train"].get("steps"), tree.get("times", 1)
    if isinstance(steps, int) and isinstance(times, int | float) and 0 < times < float("inf") and times != 1:
        tree["train"]["steps"] = max(1, round(times * steps))
    words = ["teachers", "control", "reasoning", "texts", "texts_from", "match", "times", "problems", *ARM_SECTIONS]
    mistakes += (
        RecipeError(f"unknown key {unknown!r}", place=where, fix=nearest(unknown, words, ArmRecipe))
        for unknown in changes
    )
    try:
        made = ArmRecipe.model_validate(tree)
    except ValidationError as error:
        return None, [*mistakes, *mistakes_of(error, ArmRecipe, where)]
    if not alone:
        mistakes += _arm_mistakes(made, [teacher.name for teacher in recipe.teachers], where)
        mistakes += _latent_mistakes(made, recipe, arm, where)
        mistakes += _text_mistakes(made, recipe, where)
        if made.control == "untrained" and made.needs_nll and recipe.capture.source == "online":
            mistakes.append(
                RecipeError(
                    "competence is the trained teachers', which would have to run in every step beside the untrained "
                    "ones: twice the cost of the arm",
                    place=f"{where}: control",
                    fix="set capture.source: store, or fuse.fusion_strategy: fixed for this arm",
                )
            )
        if made.problems < 1 and made.needs_kv and made.align.layers == "cka" and made.align.layer_map is None:
            what = "layers are compared on all training problems, and this arm has a share of them"
            mistakes.append(RecipeError(what, place=f"{where}: problems", fix="give align.layer_map, or other layers"))
        if made.needs_logits and recipe.capture.logits_top_k == 0:
            what = "capture.logits_top_k is 0, and this arm distils logits"
            mistakes.append(RecipeError(what, place=f"{where}: loss.logit_weight", fix="set capture.logits_top_k: 32"))
        if made.needs_scores and recipe.capture.source == "online":
            mistakes.append(
                RecipeError(
                    "r-kv and attention_weighted read what was noted when the teacher ran over the texts",
                    place=f"{where}: compress, loss",
                    fix="set capture.source: store",
                )
            )
    return made, mistakes


def _arm_mistakes(arm: ArmRecipe, teachers: list[str], where: str) -> Iterator[RecipeError]:
    for name in arm.teachers:
        if name not in teachers:
            yield RecipeError(f"unknown teacher {name!r}", place=f"{where}.teachers", fix=nearest(name, teachers))
    if len(set(arm.teachers)) < len(arm.teachers):
        yield RecipeError(f"a teacher is named twice: {arm.teachers}", place=f"{where}.teachers", fix="name each once")
    weights = arm.fuse.weights if arm.teachers else None
    if weights is not None and arm.fuse.fusion_strategy == "fixed" and len(weights) != len(arm.teachers):
        yield RecipeError(
            f"{len(weights)} weights for {len(arm.teachers)} teachers ({', '.join(arm.teachers)})",
            place=f"{where}: fuse.weights",
            fix="give one weight per teacher of the arm, or leave weights out for equal ones",
        )
    if arm.control is not None and not (arm.needs_kv or arm.needs_logits):
        what = f"control: {arm.control} changes what teachers give, and this arm learns nothing from any"
        yield RecipeError(what, place=where, fix="give it teachers, and loss.kv_weight (or loss.logit_weight) > 0")
    if arm.loss.k_weight + arm.loss.v_weight <= 0 and arm.needs_kv:
        yield RecipeError(
            "loss.k_weight and loss.v_weight are both 0",
            place=where,
            fix="make one positive, or set loss.kv_weight: 0 for an arm without KV",
        )
    compress = arm.compress
    chooses = compress.kv_compression not in ("full", "none", "steps")
    if chooses and compress.keep is None and arm.needs_kv and not arm.thinks:
        yield RecipeError(
            f"kv_compression {compress.kv_compression} needs `keep`",
            place=f"{where}: compress.keep",
            fix="say how many reasoning tokens to keep",
        )
    if arm.fuse.fuse_at == "kv" and arm.align.match_in == "teacher" and arm.needs_kv:
        yield RecipeError(
            "fuse.fuse_at: kv averages teachers in the student's space",
            place=f"{where}: align.match_in",
            fix="set align.match_in: student (and align.init: ridge) or shared, or fuse.fuse_at: loss",
        )
    for is_wrong, key, what, fix in _combinations(arm):
        if is_wrong and arm.needs_kv:
            yield RecipeError(what, place=f"{where}: {key}", fix=fix)
    if arm.align.layers == "explicit" and arm.align.layer_map is None:
        yield RecipeError(
            "layers: explicit needs align.layer_map",
            place=f"{where}: align.layers",
            fix="give a mapping or a JSON file",
        )


def _latent_mistakes(arm: ArmRecipe, recipe: Recipe, name: str, where: str) -> Iterator[RecipeError]:
    """What cannot be of an arm that does not write its reasoning."""
    place, compress = f"{where}.reasoning", arm.compress
    if arm.reasoning == "none" and (arm.needs_kv or arm.needs_logits):
        what = "reasoning: none learns from question and answer alone, and teachers give keys and values of whole texts"
        yield RecipeError(what, place=place, fix="set teachers: [] for this arm")
    if not arm.thinks:
        if "latent" in (recipe.every_arm.get(name) or {}):
            what = "`latent` says how a student thinks in latents, and this arm's does not"
            yield RecipeError(what, place=f"{where}.latent", fix="set reasoning: latent for this arm, or leave it out")
        return
    if (start := arm.latent.start(arm.train.steps)) >= arm.train.steps:
        yield RecipeError(
            f"latents would be trained from step {start} on, and there are {arm.train.steps}",
            place=f"{where}: latent.start_after",
            fix="lower it (below 1 it is a share of the steps), or raise train.steps",
        )
    if arm.needs_logits:
        what = "logits of teachers are of written words, and this student thinks in latents"
        yield RecipeError(what, place=f"{where}: loss.logit_weight", fix="set loss.logit_weight: 0 for this arm")
    if recipe.data.style == "direct":
        what = "texts of style direct hold no reasoning, which latents are to stand for"
        yield RecipeError(what, place="data.style", fix="set data.style: cot")
    if not (arm.needs_kv or arm.learns_from_itself):
        if arm.latent.answer_weight == 0:
            what = "latent.answer_weight is 0, and no keys and values teach the latents: they would learn nothing"
            yield RecipeError(what, place=f"{where}: latent.answer_weight", fix="make it positive")
        return
    if arm.loss.k_weight + arm.loss.v_weight <= 0 and not arm.needs_kv:
        what = "loss.k_weight and loss.v_weight are both 0"
        yield RecipeError(what, place=where, fix="make one positive, or set latent.self_weight: 0")
    if compress.kv_compression in ("full", "none"):
        yield RecipeError(
            f"{arm.latent.tokens} latent slots cannot stand for {'all' if compress.kv_compression == 'full' else 'no'} "
            "tokens of the reasoning",
            place=f"{where}: compress.kv_compression",
            fix="say which ones they stand for: steps, r-kv, right, crop, uniform or random",
        )
    elif (compress.keep or 0) > arm.latent.tokens:
        yield RecipeError(
            f"{compress.keep} tokens are kept for {arm.latent.tokens} latent slots",
            place=f"{where}: compress.keep",
            fix=f"set compress.keep: {arm.latent.tokens} (or leave it out), or latent.tokens: {compress.keep}",
        )
    wrong = {
        "loss.kind": (arm.compares_attention or arm.loss.kind == "cka", "mse"),
        "loss.attention_weighted": (arm.loss.attention_weighted, "false"),
        "align.init": (arm.needs_kv and arm.align.init == "ridge", "xavier"),
        "align.match_in": (arm.needs_kv and arm.align.match_in != "teacher", "teacher"),
        "align.train_projector": (arm.needs_kv and arm.align.train_projector is False, "true"),
        "loss.kv_on": (arm.loss.kv_on != "all", "all"),
    }
    for key, (is_wrong, value) in wrong.items():
        if is_wrong:
            what = "this student's keys and values are those of latent slots, which are no tokens of its text"
            yield RecipeError(what, place=f"{where}: {key}", fix=f"set {key}: {value} for this arm")


def _text_mistakes(arm: ArmRecipe, recipe: Recipe, where: str) -> Iterator[RecipeError]:
    """What cannot be of an arm that reads other texts than its own."""
    place, teachers = f"{where}.texts", {teacher.name: teacher for teacher in recipe.teachers}
    if arm.texts == "own":
        if arm.texts_from:
            yield RecipeError(
                "texts_from says whose texts are read beside its own, and texts is own",
                place=place,
                fix="set texts: teachers or texts: written, or leave texts_from out",
            )
        return
    if arm.needs_kv or arm.needs_logits:
        yield RecipeError(
            f"texts: {arm.texts} is cross-entropy on more texts, and what teachers give is captured on the training "
            "problems alone",
            place=place,
            fix="set teachers: [] for this arm (texts_from names whose texts it reads)",
        )
    known = [name for name in arm.texts_from if name in teachers]
    for name in arm.texts_from:
        if name not in teachers:
            fix = nearest(name, list(teachers))
            yield RecipeError(f"unknown teacher {name!r}", place=f"{where}.texts_from", fix=fix)
    published = [name for name in known if teachers[name].scratch is None]
    if arm.texts == "teachers" and (published or not known):
        who = f"{', '.join(published)}, which is published" if published else "published teachers, which all are"
        yield RecipeError(
            f"texts: teachers reads what teachers were trained on, and that is not at hand of {who}",
            place=place,
            fix="name scratch teachers in texts_from, or set texts: written",
        )
        return
    if not known:
        yield RecipeError("there is no teacher to write anything", place=place, fix="name at least one teacher")
        return
    if arm.texts == "written" and recipe.write.questions == "train":
        return
    data = recipe.data
    tasks = {task for name in known for task in teachers[name].train_on or [task.key for task in data.tasks]}
    has_any = any(task.teach for task in data.tasks if task.key in tasks)
    if not (has_any if data.total is None else data.disjoint_teachers):
        fix = "give these tasks a `teach` count" if data.total is None else "set data.disjoint_teachers: true"
        yield RecipeError(
            f"there are no `teach` problems of {', '.join(sorted(tasks))}: this arm would read nothing beside its own",
            place=place,
            fix=fix + (", or write.questions: train" if arm.texts == "written" else ""),
        )


def _combinations(arm: ArmRecipe) -> list[tuple[bool, str, str, str]]:
    """What does not go together: (is so, key, what is wrong, how to mend it)."""
    align, loss, fuse = arm.align, arm.loss, arm.fuse
    joint = arm.compares_attention
    return [
        *((True, *mistake) for mistake in align.time_mistakes()),
        (
            joint and align.match_in == "shared",
            "loss.kind",
            f"{loss.kind} compares attention heads, and a shared space has none",
            "set align.match_in: teacher, or another loss.kind",
        ),
        (
            joint and fuse.fuse_at == "kv",
            "fuse.fuse_at",
            f"{loss.kind} compares the student with one teacher at a time",
            "set fuse.fuse_at: loss",
        ),
        (
            joint and align.keys == "rotated",
            "align.keys",
            f"{loss.kind} rotates keys and queries itself",
            "set align.keys: unrotated",
        ),
        (
            arm.needs_scores and fuse.fuse_at == "kv",
            "fuse.fuse_at",
            "r-kv and attention_weighted differ from layer to layer, and one fused cache has one mask",
            "set fuse.fuse_at: loss",
        ),
        (
            arm.compress.kv_compression == "r-kv" and loss.kind in ("cka", "structural", "attention_output"),
            "loss.kind",
            f"r-kv keeps other tokens in each layer, and {loss.kind} compares tokens with one another",
            "set compress.kv_compression to another mode, or loss.kind: mse",
        ),
        (
            align.rank is not None and align.projection != "flat",
            "align.rank",
            f"rank is of flat projectors, this one is {align.projection}",
            "set align.projection: flat, or leave rank out",
        ),
        (
            align.elastic_hidden is not None and align.projection != "elastic",
            "align.elastic_hidden",
            f"elastic_hidden is of elastic projectors, this one is {align.projection}",
            "set align.projection: elastic, or leave it out",
        ),
        (
            align.match_in == "shared" and align.train_projector is True,
            "align.train_projector",
            "adapters into a shared space are frozen: trained together with the student they collapse",
            "leave train_projector out",
        ),
        (
            align.match_in == "student"
            and align.projection == "elastic"
            and not align.train_projector
            and not align.residual,
            "align.projection",
            "an elastic projector has no closed form, and in the student's space projectors are frozen",
            "set align.projection: flat or structured, or align.residual: true with align.train_projector: true",
        ),
    ]
