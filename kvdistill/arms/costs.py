"""What a training run costs, by closed form, before it is done or after: the convention is `core/costs.py`'s.

A backward pass is two forwards. Frozen weights (LoRA) take one, which passes the gradient on; adapters three in all.
Recomputed activations are one more forward. A head or layer that nothing is asked of is not run, and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdistill.arms.arm import Arm, fit_options
from kvdistill.arms.latent_student import thinking_cost
from kvdistill.arms.lessons import writing_facts
from kvdistill.arms.questions import question_sizes
from kvdistill.arms.setting import Setting
from kvdistill.arms.teacher import Teacher
from kvdistill.core.costs import Sharers, count_sharers
from kvdistill.core.errors import KVDistillError
from kvdistill.core.files import sha256_of
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.models import batch_geometry, capture_flops, forward_flops


def run_flops(
    arm: Arm, order: Sequence[int], lengths: Sequence[int] | None = None, steps: int | None = None
) -> dict[str, Any]:
    """The `flops` of a ledger. order: numbers of lessons, as they are trained on.

    lengths: tokens of lessons, for a plan made before teachers have written those that an arm reads; what writing will
    cost is left out then. Unset: the arm's own. steps: of the whole training, of which `order` may be the beginning
    (latents may start at a share of it); unset: the recipe's.
    """
    planned = lengths is not None
    lengths = arm.lesson_lengths if lengths is None else lengths
    tokens, squares = batch_geometry(lengths[i] for i in order)
    forward, backward = arm.experiment.student_outline.flops(tokens, squares)
    compared = tokens, squares
    if arm.recipe.thinks:
        begun = latent_part(arm, order, steps)
        more = thinking_flops(arm, begun, planned=planned)
        forward, backward = forward + more[0], backward + more[1]
        compared = len(begun) * arm.recipe.latent.tokens, 0
    used = arm.teachers if arm.uses_teachers else {}
    return {
        "student_forward": forward,
        "student_backward": backward,
        "teachers": {name: teacher_flops(arm, teacher, order) for name, teacher in used.items()},
        "aligner": sum(aligner_flops(arm, name, *compared) for name in used if arm.recipe.needs_kv),
        "fit": {name: fit_flops(arm, name) for name in used if arm.recipe.needs_kv},
        "layer_maps": {name: layer_map_flops(arm, name) for name in used if reads_similarity(arm.recipe)},
        "teacher_training": {
            name: sum(teacher.training_flops)
            for name, teacher in (used | arm.writers).items()
            if teacher.recipe.scratch is not None and not teacher.is_untrained
        },
        # what they wrote, whether it was kept or not
        "generation": {} if planned else {name: writing_facts(arm.experiment, name)["flops"] for name in arm.writers},
        "tuning": {},  # the arm's trials know it: `predicted_tuning`, and `tuned.json` what they spent
    }


def latent_part(arm: Arm, order: Sequence[int], steps: int | None = None) -> Sequence[int]:
    """Of an arm that thinks in latents, those numbers of lessons that are read in the steps that train latents.

    steps: of the whole training; unset: the recipe's.
    """
    per_step = arm.num_batches(1) * arm.recipe.train.batch_size
    return order[arm.recipe.latent.start(arm.recipe.train.steps if steps is None else steps) * per_step :]


def thinking_flops(arm: Arm, begun: Sequence[int], *, planned: bool = False) -> tuple[int, int]:
    """Forward and backward of thinking about these lessons in latents and reading their answers.

    planned: some lessons are still to be written; none of them is asked about.
    """
    sizes = question_sizes(arm.experiment.split("train")) if planned else arm.question_sizes
    return thinking_cost(arm.experiment.student_outline, arm.recipe.latent, [sizes[i] for i in begun])


def shared_keys(arm: ArmRecipe, seed: int, recipe: Recipe, name: str = "") -> dict[str, dict[str, str]]:
    """What runs that share a part of the cost have alike: part -> teacher -> key (`core.costs.Keys`).

    name: the arm's, for what was spent on tuning it.
    """
    names = arm.teachers if arm.needs_kv or arm.needs_logits else []
    scratch = {teacher.name for teacher in recipe.teachers if teacher.scratch is not None}

    def taught(name: str) -> str:
        """A teacher, of this seed where each trains its own."""
        return f"{name}:{seed}" if recipe.varies_teachers and name in scratch else name

    def read(name: str) -> str:
        """What comes of its reading the training problems, of this seed where these or the teacher are its own."""
        return f"{name}:{seed}" if recipe.varies_data else taught(name)

    share = "" if arm.problems == 1 else f" on {arm.problems:g}"  # of the training problems, which are all it has
    by_name, writers = {name: read(name) for name in names}, {name: read(name) for name in arm.writers}
    found = {"teacher_training": {name: taught(name) for name in (*names, *arm.writers)}, "generation": writers}
    if recipe.capture.source == "store":  # with random weights under another name
        stored = dict(zip(names, arm.reads, strict=False))
        found["teachers"] = {name: stored[name] + read(name).removeprefix(name) + share for name in stored}
    if arm.needs_kv:
        together = names if arm.align.match_in == "shared" else []
        options = [together, arm.control == "untrained", fit_options(arm, recipe.student, seed)]
        found["fit"] = {name: sha256_of([read(name), options])[:16] for name in names}
    if reads_similarity(arm):
        found["layer_maps"] = by_name
    if (tuned := recipe.tuned_as(name)) is not None:
        found["tuning"] = {tuned: tuned}
    return found


def all_sharers(experiment: Setting) -> Sharers:
    """Of every run that the recipe asks for."""
    recipe = experiment.recipe
    return count_sharers(shared_keys(a, s, recipe, n) for n, a in experiment.arms.items() for s in recipe.seeds)


def trial_sharers(experiment: Setting) -> Sharers:
    """Of every trial that the recipe asks for, the study's runs left out."""
    recipe, seeds = experiment.recipe, experiment.recipe.tune.seeds if experiment.recipe.tune else []
    return count_sharers(shared_keys(t.recipe, s, recipe) for t in experiment.trials.values() for s in seeds)


def teacher_flops(arm: Arm, teacher: Teacher, order: Sequence[int]) -> int:
    """One pass over the stored texts, or the passes of every step where it runs online."""
    sizes = teacher.train_sizes
    stops = arm.runs_online and not arm.recipe.needs_logits and not arm.recipe.needs_nll
    read = [i for i in order if i < len(sizes)] if arm.runs_online else arm.own_numbers
    return pass_flops(teacher, [sizes[i] for i in read], stops=stops)


def pass_flops(teacher: Teacher, sizes: Sequence[tuple[int, int]], *, stops: bool) -> int:
    """Of a teacher over texts of so many tokens, so many of them of the prompt.

    stops: nobody asks for more than keys and values. What predicts no next token always stops at the highest layer
    needed; others run their head on completions.
    """
    tokens, squares = batch_geometry(size for size, _ in sizes)
    top = _highest_layer(teacher) if stops or teacher.shape.kind != "decoder" else None
    if top is not None:
        return capture_flops(teacher.shape, tokens, squares, top)
    predicted = tokens - sum(prompt for _, prompt in sizes)
    return forward_flops(teacher.shape, tokens, squares, num_head_tokens=predicted)


def _highest_layer(teacher: Teacher) -> int | None:
    """That any arm matches; None: none does. Where layers are still to be compared, the last one: no less is known."""
    try:
        return max(teacher.layers, default=None)
    except KVDistillError:
        return teacher.shape.num_layers - 1


def aligner_flops(arm: Arm, name: str, tokens: int, squares: int) -> int:
    """Projections to one teacher, forward and backward, and comparing attention with it, of so many student tokens."""
    aligner, recipe = arm.outline_of_aligner(name), arm.recipe
    in_teacher, trained = recipe.align.match_in == "teacher", aligner.is_trained
    sides = [(aligner.proj_k, recipe.loss.k_weight), (aligner.proj_v, recipe.loss.v_weight)]
    total = 0
    for projector, weight in sides if not recipe.compares_attention else [(x, 1.0) for x, _ in sides]:
        # of the student: its gradient passes through, and the projector's own where it learns; of the teacher only that
        passes = 1 + (1 if weight > 0 and (in_teacher or aligner.is_shared) else 0)
        learned = projector.learned_flops_per_token if weight > 0 and trained and not aligner.is_shared else 0
        total += tokens * (passes * projector.flops_per_token + learned)
    if aligner.is_shared:  # the teacher's side
        total += tokens * (aligner.adapter_k.flops_per_token + aligner.adapter_v.flops_per_token)
    if aligner.proj_q is None:
        return total
    if recipe.align.match_in == "teacher":  # for the router, whether or not it looks
        total += tokens * (aligner.proj_k.flops_per_token + aligner.proj_v.flops_per_token)
    total += tokens * aligner.proj_q.flops_per_token * (2 if in_teacher else 1)
    total += tokens * aligner.proj_q.learned_flops_per_token if trained else 0
    pairing = arm.teachers[name].shape if in_teacher else arm.experiment.student_shape
    product = 2 * squares * len(aligner.student_layers) * pairing.num_heads * pairing.head_size
    # rows of both sides, made again for the gradient, which goes to queries and keys of the student (and its values)
    return total + product * (6 if recipe.loss.kind == "structural" else 9)


def fit_flops(arm: Arm, name: str) -> int:
    """Statistics and closed forms on the calibration texts: the passes of both models, and sums of products."""
    aligner, recipe = arm.outline_of_aligner(name), arm.recipe
    numbers = arm.calibration_rows()
    lengths = arm.experiment.train_lengths
    tokens, squares = batch_geometry(lengths[i] for i in numbers)
    similarity, total = recipe.fuse.fusion_strategy == "similarity", 0
    if arm.runs_online:  # the teacher runs again each time the texts are gone through
        theirs = arm.teachers[name].train_sizes
        moments = recipe.control == "noise"
        times = int(recipe.align.standardise) + int(aligner.needs_fit) + int(similarity) + int(moments)
        total += times * pass_flops(arm.teachers[name], [theirs[i] for i in numbers], stops=True)
    if aligner.needs_fit:
        total += capture_flops(arm.experiment.student_shape, tokens, squares, max(aligner.student_layers))
        projectors = [x for x in (aligner.proj_k, aligner.proj_v, aligner.proj_q) if x is not None]
        if aligner.is_shared:
            width = sum(x.num_in for x in (aligner.proj_k, aligner.adapter_k))
            total += 2 * 2 * tokens * len(aligner.student_layers) * width * width
        else:
            total += sum(2 * tokens * x.num_layers * x.num_in * (x.num_in + x.num_out) for x in projectors)
    return total


def reads_similarity(arm: ArmRecipe) -> bool:
    """Whether its layers are mapped by what `map-layers` measures in this run folder."""
    return arm.needs_kv and arm.align.layers == "cka" and arm.align.layer_map is None


def layer_map_flops(arm: Arm, name: str) -> int:
    """Both models read the texts that layers are compared on, and every pair of layers is (a product of channels)."""
    teacher, student = arm.teachers[name].shape, arm.experiment.student_shape
    lengths = arm.experiment.train_lengths
    share = min(1.0, arm.experiment.recipe.align.cka_texts / max(1, len(lengths)))
    mine = batch_geometry(lengths)
    theirs = batch_geometry(size for size, _ in arm.teachers[name].train_sizes)
    widths = [x.num_kv_heads * x.head_size * x.num_layers for x in (student, teacher)]
    passes = forward_flops(student, *mine, with_lm_head=False) + forward_flops(teacher, *theirs, with_lm_head=False)
    return round(share * (passes + 2 * 2 * mine[0] * widths[0] * widths[1]))
