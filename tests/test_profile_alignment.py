"""`profile-alignment` and `map-layers`: figures against modules and slow references, planted faults, what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_recipe import SEED, assert_one_message, invoke, no_work, write_recipe

from kvdistill.arms.arm import Arm
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.experiment import Experiment
from kvdistill.cli.profiles import layer_lines, profile_lines
from kvdistill.cli.tables import as_text
from kvdistill.core.config import load_recipe
from kvdistill.core.files import write_json
from kvdistill.stages.train import match_on_held_out
from kvdistill.store.packed import TargetReader
from kvdistill.study.profile import profile_alignment
from kvdistill.study.profile.numbers import FP16_MAX, StageMeter, number_figures
from kvdistill.study.profile.shapes import _lost
from kvdistill.study.profile.timing import PARTS, LiveTensors, PartClock

ARMS: dict[str, Any] = {
    "ce": {"teachers": []},
    "logit": {"loss": {"kv_weight": 0, "logit_weight": 1.0}},
    "fixed": {},
    "structural": {"loss": {"kind": "structural"}, "align": {"projection": "elastic"}},
    "shared": {"align": {"match_in": "shared"}, "control": "placebo"},
    "right": {"align": {"init": "ridge", "match_in": "student"}, "compress": {"kv_compression": "right", "keep": 2}},
}
SPEED: dict[str, Any] = {"train": {"batch_size": 4}}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder with a recipe and its run, and what the command printed as JSON."""
    folder = tmp_path_factory.mktemp("profiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvdistill.study.profile.STEPS", 1)
        answer = invoke(patch, "profile-alignment", write_recipe(folder, arms=ARMS, **SPEED), "--json")
    assert answer.code == 0, answer
    return folder, json.loads(answer.out)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    monkeypatch.setattr("kvdistill.study.profile.STEPS", 1)


@pytest.fixture
def experiment(profiled) -> Experiment:
    recipe = load_recipe(str(profiled[0] / "tiny.yaml"))
    return Experiment(recipe, Path(str(recipe.run_dir)))


def arm_of(experiment: Experiment, name: str = "fixed") -> Arm:
    arm = experiment.arm(name, SEED)
    arm.distiller.eval()
    return arm


def taught_run(folder: Path, here: Path, arms: dict[str, Any], **changes: Any) -> Path:
    """A recipe whose run folder has the data and the taught teachers of another, and nothing made of them."""
    left_out = shutil.ignore_patterns("store", "fit", "profile", "layers")
    shutil.copytree(folder / "run", here / "run", ignore=left_out)
    path = write_recipe(here, arms=arms, **SPEED, **changes)
    write_json(here / "run" / "recipe.json", load_recipe(str(path)).model_dump(mode="json"))
    return path


def files_of(run: Path) -> dict[str, int]:
    kept = [f for f in run.rglob("*") if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(run)): f.stat().st_mtime_ns for f in kept}


def test_arms_that_think_in_latents_are_left_out_and_the_reason_is_printed(tmp_path, monkeypatch) -> None:
    arms = {"kv": {"reasoning": "latent"}, "twin": {"reasoning": "latent", "teachers": []}}
    path = write_recipe(tmp_path, arms=arms, compress={"kv_compression": "r-kv"})
    answer = invoke(monkeypatch, "profile-alignment", path, work=no_work)
    assert answer.code == 0 and "kv: it thinks in latents" in answer.out and "twin: it has no teachers" in answer.out


# -- the command --------------------------------------------------------------------------------------


def test_every_arm_with_kv_is_profiled_and_the_others_are_said(profiled):
    folder, said = profiled
    assert list(said["profiles"]) == ["fixed", "structural", "shared", "right"]
    assert said["skipped"] == {"ce": "it has no teachers", "logit": "loss.kv_weight is 0: nothing is aligned"}
    assert said["files"] == [str(folder / "run/profile" / f"{arm}.json") for arm in said["profiles"]]
    for path, profile in zip(said["files"], said["profiles"].values(), strict=True):
        assert json.loads(Path(path).read_text()) == profile
        assert {"shapes", "parameters", "numbers", "match", "step"} <= profile.keys()
        assert profile["numbers"]["first_non_finite"] is None
        assert profile["numbers"]["says"].startswith("no NaN found; the nearest to overflow: ")


def test_again_it_changes_its_own_file_only_and_trains_nothing(profiled, monkeypatch):
    folder, _ = profiled
    before = files_of(folder / "run")
    assert not (folder / "run/arms").exists()
    answer = invoke(monkeypatch, "profile-alignment", folder / "tiny.yaml", "--arm", "fixed")
    assert answer.code == 0, answer
    changed = {name for name, when in files_of(folder / "run").items() if before.get(name) != when}
    assert changed == {"profile/fixed.json"}
    assert "profile-alignment: 0%" in answer.err and "Traceback" not in answer.err


def test_unknown_arm_names_the_nearest(profiled, monkeypatch):
    answer = invoke(monkeypatch, "profile-alignment", profiled[0] / "tiny.yaml", "--arm", "fixd", work=no_work)
    assert_one_message(answer, "there is no arm 'fixd'", "fixed")


def test_an_arm_without_kv_alone_is_said_and_nothing_runs(profiled, monkeypatch):
    answer = invoke(monkeypatch, "profile-alignment", profiled[0] / "tiny.yaml", "--arm", "ce", work=no_work)
    assert answer.code == 0 and "ce: it has no teachers" in answer.out


def test_help_says_what_is_learned(monkeypatch):
    for verb, words in (("profile-alignment", "trains nothing"), ("map-layers", "align.cka_top_k")):
        answer = invoke(monkeypatch, verb, "--help")
        assert answer.code == 0 and "--json" in answer.out and words in " ".join(answer.out.split())


# -- figures against what they are of -----------------------------------------------------------------


def test_parameters_are_the_modules(profiled, experiment):
    student = sum(p.numel() for p in experiment.initial_model(SEED).parameters())
    for name, profile in profiled[1]["profiles"].items():
        found = profile["parameters"]
        assert found["student"] == {"parameters": student, "trained": student}
        for teacher in ("one", "two"):
            aligner = experiment.arm(name, SEED).new_aligner(teacher)
            assert found["teachers"][teacher]["parameters"] == aligner.num_parameters
            assert found["teachers"][teacher]["parameters"] == sum(p.numel() for p in aligner.parameters())
            trained = sum(p.numel() for p in aligner.parameters() if p.requires_grad)
            assert found["teachers"][teacher]["trained"] == trained


def test_shapes_are_the_recipes(profiled):
    shapes = profiled[1]["profiles"]["right"]["shapes"]
    one, student = shapes["teachers"]["one"], shapes["student"]
    assert (student["num_layers"], student["num_kv_heads"], student["head_size"]) == (2, 2, 8)
    assert (one["num_layers"], one["num_kv_heads"], one["head_size"], one["num_heads"]) == (3, 2, 6, 4)
    assert one["layer_map"] == {"0": [[1, 1.0]], "1": [[2, 1.0]]} and one["channels"] == 16, "the student's"
    assert one["tokens"] == student["tokens"] and not one["own_tokens"] and one["segments"] == {}
    taught = one["taught"]
    assert taught["prompt"] == 1 and taught["answer"] == 1 and 0 < taught["reasoning"] < 1, "two tokens are kept"
    captured = one["captured"]
    assert captured["queries"] and captured["layers"] == [1, 2] and captured["logits_top_k"] == 32
    least = 2 * (2 * 2 * 6 + 4 * 6) * 4 + 24 * 8 + 1  # as many logits as there are pieces
    assert least <= captured["bytes_per_token"] < 1.1 * least
    empty = profiled[1]["profiles"]["right"]["numbers"]["empty"]["one"]
    assert empty["empty"] == pytest.approx((1 - taught["all"]) * empty["tokens"], abs=0.5)
    channels = {arm: p["shapes"]["teachers"]["two"]["channels"] for arm, p in profiled[1]["profiles"].items()}
    assert channels == {"fixed": 16, "structural": 16, "shared": 12, "right": 16}


def test_match_at_the_start_is_what_training_would_measure(profiled, experiment):
    arm = arm_of(experiment)
    expected = match_on_held_out(arm, arm.distiller)
    match = profiled[1]["profiles"]["fixed"]["match"]
    assert match["texts"] == 8 and match["fit_texts"] == 96
    for teacher in ("one", "two"):
        for side in ("k", "v"):
            start, linear = (match["teachers"][teacher]["matched"][when][side] for when in ("start", "linear"))
            assert start["tokens"] == expected[teacher][side]["tokens"]
            for figure in ("r2", "cosine"):
                assert start[figure] == pytest.approx(expected[teacher][side][figure], abs=1e-5)
            other = match["teachers"][teacher]["mismatched"]["linear"][side]
            assert linear["r2"] > start["r2"] and linear["r2"] > other["r2"] + 0.1
        assert "own KVDimensionProjector" in match["teachers"][teacher]["linear"]


def test_linear_map_by_kind_of_arm(profiled):
    profiles = profiled[1]["profiles"]
    assert "own ElasticProjector" in profiles["structural"]["match"]["teachers"]["one"]["linear"]
    assert "one full matrix a layer" in profiles["shared"]["match"]["teachers"]["one"]["linear"]
    assert "meets in space 'student'" in profiles["right"]["match"]["teachers"]["one"]["linear"]


def test_a_step_has_all_its_parts(profiled):
    for profile in profiled[1]["profiles"].values():
        step = profile["step"]
        assert set(step["parts_ms"]) == set(PARTS) and all(ms >= 0 for ms in step["parts_ms"].values())
        zero = {"teacher_forward"}
        assert all(ms > 0 for name, ms in step["parts_ms"].items() if name not in zero)
        assert step["ratio"] == pytest.approx(step["whole_ms"] / step["cross_entropy_ms"])
        assert step["peak_bytes"] > step["cross_entropy_peak_bytes"] > 0


def test_teachers_that_run_in_every_step(profiled, tmp_path, monkeypatch):
    path = taught_run(profiled[0], tmp_path, {"fixed": {}}, capture={"source": "online"})
    answer = invoke(monkeypatch, "profile-alignment", path, "--json")
    profile = json.loads(answer.out)["profiles"]["fixed"]
    assert profile["step"]["parts_ms"]["teacher_forward"] > 0
    captured = profile["shapes"]["teachers"]["one"]["captured"]
    assert captured["source"] == "online" and "bytes_per_token" not in captured
    stages, stored = (p["numbers"]["stages"] for p in (profile, profiled[1]["profiles"]["fixed"]))
    assert [row["largest"] for row in stages] == pytest.approx([row["largest"] for row in stored], rel=1e-3)


# -- where a NaN comes from ---------------------------------------------------------------------------


def test_a_broken_stored_target_is_named_and_the_rest_still_told(profiled, experiment, monkeypatch):
    whole, written = TargetReader.read, []

    def broken(self, *args, **kwargs):
        out = whole(self, *args, **kwargs)
        if out.kv is not None and len(out.kv.keys) == 2 and out.kv.values[1].shape[-1] == 6:  # teacher one's
            out.kv.values[1][0, 1, 2, 3] = float("inf")
        return out

    monkeypatch.setattr(TargetReader, "read", broken)
    monkeypatch.setattr("kvdistill.study.profile.write_json", lambda path, value: written.append(value))
    monkeypatch.setattr("kvdistill.study.profile.read_json", lambda path: written[-1])
    found = profile_alignment(experiment, ["fixed"])["fixed"]
    first = found["numbers"]["first_non_finite"]
    assert (first["stage"], first["teacher"], first["what"]) == ("teacher, as captured", "one", "v")
    says = "non-finite values begin in the values of teacher 'one', as captured: 2 of them in layer 2"
    assert first["says"] == found["numbers"]["says"] == says
    assert found["match"] == {"skipped": "there are non-finite values: see numbers"} and found["step"]["whole_ms"] > 0
    text = "\n".join(profile_lines({"fixed": json.loads(json.dumps(found))}))
    assert "left out: there are non-finite values" in text and "→ non-finite values begin" in text


def planted_in(distiller: Distiller, where: str) -> None:
    aligner = distiller.aligner("two")
    with torch.no_grad():
        if where == "fit":
            aligner.k_scale[1, 3] = float("nan")
        elif where in ("student", "student and fit"):
            aligner.proj_k.bias[0, 0] = float("nan") if where != "student" else 0.0
            distiller.student.model.model.layers[1].self_attn.v_proj.weight[2, 1] = float("nan")
        elif where == "source":
            aligner.proj_v.weight[0, :, 2], aligner.proj_v.bias[0, 2] = 3e38, -3.4e38  # finite, and too much
    if where == "gradient":
        distiller.student.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g * float("nan"))
    if where == "loss":

        class Broken:
            needs_mask = False

            def __call__(self, source, target):
                return (source - target).square().mean(-1) + float("inf")

        distiller._distance = Broken()


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("fit", "the aligner of teacher 'two': k_scale"),
        ("student", "the student's values: "),
        ("student and fit", "the student's values: "),
        ("source", "the student's values projected for the space of teacher 'two'"),
        ("loss", "all that goes into the loss is finite; its term 'kv/one/k' is not"),
        ("gradient", "the student's gradient is not: 768 values, the first in model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_planted_fault_is_named_at_its_stage(profiled, experiment, where, says):
    arm = arm_of(experiment)
    planted_in(arm.distiller, where)
    found = number_figures(arm, 1)
    assert found["first_non_finite"]["stage"] == where.split(" and ")[0] and says in found["says"], found["says"]


def test_a_broken_text_that_only_the_fit_read_is_found(profiled, experiment, monkeypatch):
    arm, whole = arm_of(experiment), TargetReader.read
    planted_in(arm.distiller, "fit")
    assert number_figures(arm, 1)["says"] == "non-finite values begin in the aligner of teacher 'two': k_scale"

    def broken(self, examples, **kwargs):
        out = whole(self, examples, **kwargs)
        if list(examples) == [91] and out.kv is not None and out.kv.keys[0].shape[-1] == 8:
            out.kv.keys[1][0, 1, 2, 3:5] = float("nan")
        return out

    monkeypatch.setattr(TargetReader, "read", broken)
    found = number_figures(arm, 1)
    assert found["first_non_finite"]["stage"] == "teacher, as captured" and found["first_non_finite"]["what"] == "k"
    assert "the keys of teacher 'two', as captured: 2 of them in layer 1 of example 91" in found["says"]


def test_a_nan_that_only_padding_holds_is_named_too():
    meter = StageMeter([4])
    x_LBTC = torch.randn(1, 2, 3, 5)
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    x_LBTC[0, 1, 2, 0] = float("nan")
    meter.add_layers(x_LBTC, mask_BT)
    found = meter.figures()
    assert (found["non_finite"], found["non_finite_masked"], found["non_finite_layers"]) == (0, 1, [4])


def test_a_fit_that_fails_of_nan_names_the_teacher(profiled, tmp_path, monkeypatch):
    import kvdistill.stages.capture as stage

    real = stage.run_teacher

    def broken(model, *args, **kwargs):
        out = real(model, *args, **kwargs)
        out.kv.keys[0][0, 0, 1] = float("nan")
        return out

    monkeypatch.setattr(stage, "run_teacher", broken)
    path = taught_run(profiled[0], tmp_path, {"right": ARMS["right"]})
    answer = invoke(monkeypatch, "profile-alignment", path)
    assert_one_message(
        answer, "teachers.0 (one)", "NaN or infinity as keys or values of text 0 of train", "its weights and its dtype"
    )


# -- the meters against slow references ---------------------------------------------------------------


def test_stage_meter_against_everything_at_once():
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(2, 3, n, 7, generator=generator) * torch.arange(1.0, 8) + 100 for n in (4, 6)]
    masks = [torch.rand(3, n, generator=generator) > 0.3 for n in (4, 6)]
    meter = StageMeter([0, 5])
    for x, mask in zip(parts, masks, strict=True):
        x[0, ..., 2] = 9.0  # a dead channel
        x[1, 0, 0] = 0.0
        x[1, 1, 1, 4] = -2 * FP16_MAX
        mask[:2, :2] = True
        meter.add_layers(x, mask)
    rows = [torch.cat([x[layer][mask] for x, mask in zip(parts, masks, strict=True)]).double() for layer in (0, 1)]
    std = torch.stack([r.std(0, correction=0) for r in rows])
    std[0, 2] = torch.inf
    found = meter.figures()
    assert found["rows"] == sum(map(len, rows)) and found["zero_vectors"] == 2
    assert found["largest"] == 2 * FP16_MAX and found["largest_layer"] == 5 and found["of_fp16"] == 2
    assert found["layers_over_fp16"] == [5]
    assert found["channels"] == 14 and found["dead_channels"] == 1
    assert found["smallest_std"] == pytest.approx(float(std.min()), rel=1e-9)


def test_live_tensors_count_what_is_made_and_forget_what_is_gone():
    x = torch.ones(1000)
    with LiveTensors() as live:
        view = x.view(10, 100)
        assert (live.now, live.peak) == (0, 0), "what was there before, and views of it, are free"
        a = view + 1
        b = a.t()
        assert live.now == 4000
        c = a * 2
        assert live.now == live.peak == 8000
        del a, b
        assert live.now == 4000
        c.add_(1)
        assert (live.now, live.peak) == (4000, 8000)
    del c
    assert live.now == 0 and view.numel() == 1000


def test_part_clock_counts_the_outermost_and_leaves_no_trace(profiled, experiment):
    clock = PartClock(torch.device("cpu"))
    with clock.part("loss"), clock.part("backward"):
        pass
    assert clock.seconds["loss"] > 0 == clock.seconds["backward"]
    distiller = arm_of(experiment).distiller
    modules = [distiller, *distiller.modules()]
    before = [set(vars(module)) for module in modules]
    with clock.watching(distiller):
        assert "_run_student" in vars(distiller)
    assert [set(vars(module)) for module in modules] == before


def test_lost_text_by_hand():
    """Ten characters: the teacher tells 0-6 in two tokens; the student has 0-4, 4-8, 8-10: 4 are lost, one token."""
    text_roles = torch.ones(3, dtype=torch.int8)
    text = SimpleNamespace(
        spans=lambda i: (torch.tensor([[0.0, 3.0], [3.0, 6.0]]), text_roles[:2]),
        student_spans=lambda i: (torch.tensor([[0.0, 4.0], [4.0, 8.0], [8.0, 10.0]]), text_roles),
    )
    found = _lost(text, [[0], [1, 2]])
    assert found == {
        "characters_lost": pytest.approx(0.4),
        "characters_unread": 0.0,
        "tokens_empty": pytest.approx(1 / 3),
    }


# -- words --------------------------------------------------------------------------------------------


def test_text_is_narrow_and_says_what_counts(profiled):
    lines = profile_lines(profiled[1]["profiles"])
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    text = "\n".join(lines)
    for part in (
        "one: layers by ratio, student←teacher: 0←1, 1←2",
        "meet in a space shared by all; channels: 12",
        "taught by one, two, on mismatched texts; seed 7, on cpu",
        "on cross-entropy alone",
        "→ no NaN found",
        "student tokens have nothing behind them",
    ):
        assert part in text, part
    assert "skipped:\n  ce: it has no teachers" in as_text(profiled[1])


def test_names_from_a_recipe_cannot_write_to_the_terminal(profiled):
    profile = json.loads(json.dumps(profiled[1]["profiles"]["fixed"]).replace('"two"', '"t\\u001b[31m"'))
    assert "\x1b" not in "\n".join(profile_lines({"fi\x1bxed": profile}))


# -- map-layers ---------------------------------------------------------------------------------------


def test_map_layers_measures_prints_and_leaves_its_files(profiled, monkeypatch):
    run = profiled[0] / "run"
    answer = invoke(monkeypatch, "map-layers", profiled[0] / "tiny.yaml", "align.cka_texts=9", "--json")
    assert answer.code == 0, answer
    said = json.loads(answer.out)
    assert said["run"] == str(run) and list(said["layers"]) == ["one", "two"]
    for name, found in said["layers"].items():
        assert [Path(f).name for f in (found["file"], *found["figures"])] == [
            f"{name}.{e}" for e in ("json", "png", "svg")
        ]
        assert all(Path(f).stat().st_size > 500 for f in (found["file"], *found["figures"]))
        measured = json.loads(Path(found["file"]).read_text())
        assert found["layer_map"] == measured["layer_map"]["keys"] and found["num_vectors"] == measured["num_vectors"]
        lines = layer_lines({name: found})
        for layer, sources in found["layer_map"].items():
            row = next(line for line in lines if line.startswith(f"  layer {layer} "))
            assert all(f"{m} ({share:.0%}, " in row for m, share in sources)
    shown = invoke(monkeypatch, "map-layers", profiled[0] / "tiny.yaml", "align.cka_texts=9")
    assert shown.code == 0 and "teacher one: keys of" in shown.out and "one.svg" in shown.out


def test_map_layers_without_teachers_is_refused(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, arms={"ce": {"teachers": []}})
    answer = invoke(monkeypatch, "map-layers", path, "teachers=[]", work=no_work)
    assert_one_message(answer, "there is no teacher whose layers could be mapped", "name at least one")
