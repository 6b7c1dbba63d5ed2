"""Fair tuning: every arm gets the same small search, on validation problems, with seeds of its own, in its cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_recipe import (
    assert_one_message,
    invoke,
    made_ready,
    no_work,
    rows_of,
    run_jobs_here,
    tiny_recipe,
    write_recipe,
)

from kvdistill.arms.budget import TrainingBudgetController
from kvdistill.arms.experiment import Experiment
from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import read_budgets
from kvdistill.core.config import make_recipe
from kvdistill.core.costs import OWN, apart
from kvdistill.core.declared import compare_declared
from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import read_json
from kvdistill.core.layout import evaluated_mark, trained_mark
from kvdistill.core.marks import read_mark
from kvdistill.core.recipe import ArmRecipe, TuneRecipe
from kvdistill.core.tuning import (
    RATE,
    denser,
    edges,
    read_tuned,
    search,
    searched,
    trials_of,
    tune_mistakes,
    tuned_path,
    with_values,
)
from kvdistill.stages.report.collect import collect_tables
from kvdistill.stages.report.summary import budgets
from kvdistill.stages.report.tuning import tuning_rows
from kvdistill.stages.train import train_student
from kvdistill.stages.tune import choose, choose_values
from kvdistill.study.folder import difference
from kvdistill.study.plan import plan

pytestmark = pytest.mark.slow

ARMS = {
    "ce": {"teachers": []},
    "fixed": {},
    "logit": {"loss": {"kv_weight": 0, "logit_weight": 1.0}},
}
GRID = {"train": {"learning_rate": [4e-3, 1e-3]}, "loss": {"kv_weight": [2, 5]}}
TUNE: dict[str, Any] = {"grid": GRID, "seeds": [5, 6]}
SEEDS = [7, 8, 9]
STUDY: dict[str, Any] = {"arms": {"ce": ARMS["ce"], "fixed": {}}, "seeds": SEEDS, "tune": TUNE}


def made(**arms: dict[str, Any]) -> dict[str, ArmRecipe]:
    recipe = make_recipe({**tiny_recipe(Path("x")).model_dump(mode="json"), "arms": arms})
    return {name: arm_recipe(recipe, name) for name in arms}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[Path, Path]:
    """A finished study: the recipe's file and the run folder. Never written to."""
    folder = tmp_path_factory.mktemp("tuned")
    path = write_recipe(folder, **STUDY)
    with pytest.MonkeyPatch.context() as patch:
        answer = invoke(patch, "run", path)
    assert answer.code == 0, answer
    return path, folder / "run"


# -- the search ---------------------------------------------------------------------------------------


def test_every_arm_gets_as_many_trials_whatever_keys_do_something_for_it():
    arms = made(**ARMS)
    grid = {
        "train": {"learning_rate": [1, 2, 4]},
        "loss": {"kv_weight": [1, 2, 3, 4], "logit_weight": [1, 2, 3]},
    }
    found = search(TuneRecipe(grid=grid, seeds=[1]), arms)
    assert {name: len(trials) for name, trials in found.items()} == dict.fromkeys(arms, 12)
    assert {key for one in found["ce"] for key in one} == {RATE}
    assert {key for one in found["logit"] for key in one} == {RATE, "loss.logit_weight"}
    assert [one[RATE] for one in found["fixed"][::4]] == [1, 2, 4]  # its own grid, as it is
    assert {one[RATE] for one in found["logit"]} == {1, 1.41, 2, 4}
    assert found["ce"][0][RATE] == 1 and {1, 2, 4} <= {one[RATE] for one in found["ce"]}
    assert max(one[RATE] for one in found["ce"]) == 4  # no wider than the others'


def test_a_number_that_no_arm_can_miss_is_found_where_grids_have_no_common_size():
    arms = made(fixed={}, logit=ARMS["logit"])
    grid = {"train": {"learning_rate": [1, 4]}, "loss": {"kv_weight": [1, 2, 3], "logit_weight": [1, 2]}}
    found = search(TuneRecipe(grid=grid, seeds=[1]), arms)
    assert {name: len(trials) for name, trials in found.items()} == {"fixed": 6, "logit": 6}
    grid["train"]["learning_rate"] = [1, 2, 4]
    found = search(TuneRecipe(grid=grid, seeds=[1]), arms)
    assert {name: len(trials) for name, trials in found.items()} == {"fixed": 12, "logit": 12}


def test_gaps_are_divided_evenly_the_widest_first():
    assert denser([1, 8], 4) == [1, 2, 4, 8]
    assert denser([4, 1], 3) == [1, 2, 4]
    assert denser([1e-3, 2e-3, 16e-3], 4) == [1e-3, 2e-3, 5.66e-3, 16e-3]
    assert denser([1.0, 1.0001], 4) == pytest.approx([1, 1.0000333, 1.0000667, 1.0001], abs=1e-7)  # finer than digits


@given(st.lists(st.floats(1e-5, 1e2), min_size=2, max_size=5, unique=True), st.integers(0, 9))
def test_denser_values_rise_keep_the_given_ones_and_stay_in_their_range(values, more):
    found = denser(values, len(values) + more)
    assert len(found) == len(values) + more and {*values} <= {*found}
    assert found == sorted(found) and (found[0], found[-1]) == (min(values), max(values))


def test_keys_that_do_nothing_for_an_arm_are_left_out_for_it():
    arms = made(
        **ARMS,
        competence={"fuse": {"fusion_strategy": "competence"}},
        single={"teachers": ["one"], "fuse": {"fusion_strategy": "competence"}},
        constant={"teachers": [], "train": {"schedule": "constant"}},
    )
    keys = {
        "train": {"weight_decay": [0, 0.1], "min_lr_ratio": [0.1, 0.5], "projector_lr_scale": [1, 2]},
        "loss": {"kv_warmup": [0, 0.1], "logit_temperature": [1, 2]},
        "fuse": {"temperature": [1, 2]},
    }
    found = {name: {*searched(TuneRecipe(grid=keys, seeds=[1]), arm)} for name, arm in arms.items()}
    plain = {"train.weight_decay", "train.min_lr_ratio"}
    kv = {*plain, "train.projector_lr_scale", "loss.kv_warmup"}
    assert found["ce"] == plain and found["constant"] == {"train.weight_decay"}
    assert found["logit"] == {*plain, "loss.logit_temperature"}
    assert found["fixed"] == found["single"] == kv and found["competence"] == {*kv, "fuse.temperature"}


def test_arms_whose_latents_learn_from_themselves_are_searched_as_those_with_teachers_are():
    latent = {"teachers": [], "reasoning": "latent", "compress": {"kv_compression": "r-kv"}}
    arms = made(ce=ARMS["ce"], twin=latent, own={**latent, "latent": {"self_weight": 1.0}})
    grid = {"loss": {"kv_warmup": [0, 0.1], "kv_fade": [0, 0.1]}, "latent": {"self_weight": [1, 2]}}
    grid["latent"]["answer_weight"] = [0.5, 1]
    tune = TuneRecipe(grid={**grid, "train": {"learning_rate": [1, 2]}}, seeds=[1])
    found = {name: {*searched(tune, arm)} - {RATE} for name, arm in arms.items()}
    both = {"loss.kv_warmup", "loss.kv_fade", "latent.self_weight", "latent.answer_weight"}
    assert found == {"ce": set(), "twin": {"latent.answer_weight"}, "own": both}
    assert with_values(arms["own"], {"latent.self_weight": 2.0}).latent.self_weight == 2.0
    recipe = tiny_recipe(Path("x"), arms={"own": {**latent, "latent": {"self_weight": 1.0}}})
    wrong = TuneRecipe(grid={"latent": {"self_weight": [0, 1]}, "train": {"learning_rate": [1, 2]}}, seeds=[1])
    said = [what for _, what, _ in tune_mistakes(recipe, wrong, {"own": arms["own"]}, lambda *_: "")]
    assert said == ["latent.self_weight: 0 makes another arm of it"]


def test_a_trial_is_the_arm_but_for_its_values_and_its_points(tmp_path):
    recipe = tiny_recipe(tmp_path, **STUDY, train={"eval_every": 2})
    trials = trials_of(recipe)
    assert [*trials][:4] == ["ce@tune1", "ce@tune2", "ce@tune3", "ce@tune4"] and len(trials) == 8
    arm, trial = arm_recipe(recipe, "fixed"), trials["fixed@tune3"]
    assert trial.values == {RATE: 4e-3, "loss.kv_weight": 2}
    assert (trial.recipe.train.learning_rate, trial.recipe.loss.kv_weight) == (4e-3, 2)
    assert trial.recipe.train.eval_every == 0  # judged at its end
    back = with_values(trial.recipe, {RATE: arm.train.learning_rate, "loss.kv_weight": arm.loss.kv_weight})
    assert back.model_copy(update={"train": arm.train}) == arm
    asks = trials_of(tiny_recipe(tmp_path, **STUDY, train={"eval_every": 2, "select": "best"}))
    assert asks["fixed@tune3"].recipe.train.eval_every == 2
    more = trials_of(tiny_recipe(tmp_path, **{**STUDY, "tune": {**TUNE, "examples": 11}}))
    assert more["ce@tune1"].recipe.train.eval_examples == 11


# -- the rule -----------------------------------------------------------------------------------------


def rows(*figures: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    return [{"accuracy": accuracy, "nll": nll} for accuracy, nll in figures]


def test_the_better_figure_chooses_then_the_other_then_the_first():
    assert choose(rows((0.5, 1.0), (0.7, 2.0), (0.6, 0.5)), "accuracy") == 1
    assert choose(rows((0.5, 1.0), (0.7, 2.0), (0.6, 0.5)), "nll") == 2
    assert choose(rows((0.5, 1.0), (0.5, 0.9), (0.5, 0.9)), "accuracy") == 1
    assert choose(rows((0.5, 1.0), (0.6, 1.0), (0.6, 1.0)), "nll") == 1
    assert choose(rows((None, None), (0.0, 9.0)), "accuracy") == 1  # the first diverged
    assert choose(rows((0.5, None), (0.5, 9.0)), "accuracy") == 1
    assert choose(rows((None, None), (None, None)), "accuracy") is None
    assert choose(rows((0.5, None)), "nll") is None


def test_a_choice_at_the_edge_of_the_range_is_named():
    trials = [{RATE: rate, "loss.kv_weight": weight} for rate in (1, 2, 4) for weight in (5.0, 6.0, 7.0)]
    assert edges(trials, {RATE: 2, "loss.kv_weight": 6}) == []
    assert edges(trials, {RATE: 4, "loss.kv_weight": 6}) == [RATE]


# -- a study ------------------------------------------------------------------------------------------


def test_trials_come_before_every_student_and_are_never_evaluated(tmp_path):
    jobs = {job.id: job for job in plan(tiny_recipe(tmp_path, **STUDY), tmp_path)}
    trials = [name for name in jobs if name.startswith("try:")]
    assert len(trials) == 4 * 2 * 2 and {name.rpartition(":")[2] for name in trials} == {"5", "6"}
    assert {*jobs["tune"].after} == {"check", *trials}
    assert all("tune" in jobs[f"train:{arm}:{seed}"].after for arm in ("ce", "fixed") for seed in SEEDS)
    assert jobs["try:fixed@tune2:6"].after == ("check", "fit:fixed@tune2:6")
    assert not [name for name in jobs if name.startswith("evaluate:") and "@tune" in name]
    assert not any("tune" in job.id or job.verb == "try" for job in plan(tiny_recipe(tmp_path / "x"), tmp_path / "x"))
    single = plan(tiny_recipe(tmp_path, **STUDY), tmp_path, ("train",), before=False, runs=[("ce", 7)])
    assert {job.verb for job in single} == {"check", "try", "tune", "train"}


def test_values_are_chosen_by_the_rule_from_validation_alone_and_arms_train_with_them(tuned):
    _, run = tuned
    chosen = read_tuned(run)
    assert [*chosen] == ["ce", "fixed"] and all(len(one["trials"]) == 4 for one in chosen.values())
    for name, one in chosen.items():
        assert choose(one["trials"], "accuracy") == one["chosen"] - 1
        assert one["values"] == one["trials"][one["chosen"] - 1]["values"]
        for trial in one["trials"]:
            for seed in (5, 6):
                folder = run / f"arms/{name}@tune{trial['trial']}/seed-{seed}"
                assert not evaluated_mark(folder).exists() and not (folder / "records.jsonl").exists()
                assert not (folder / "model").exists()  # nobody will ask it anything
                (point,) = [row["val"] for row in rows_of(folder / "log.jsonl") if "val" in row]
                assert trial["seeds"][str(seed)] == {"step": 6, **{key: point[key] for key in ("accuracy", "nll")}}
            assert trial["nll"] == pytest.approx(sum(x["nll"] for x in trial["seeds"].values()) / 2)
        for seed in SEEDS:
            assert read_json(run / f"arms/{name}/seed-{seed}/ledger.json")["tuned"] == one["values"]
            assert read_mark(trained_mark(run / f"arms/{name}/seed-{seed}"))["tuned"] == one["values"]
    first = min(trained_mark(path).stat().st_mtime_ns for path in run.glob("arms/*/seed-[789]"))
    assert tuned_path(run).stat().st_mtime_ns < first


def test_an_arm_that_is_tuned_is_to_the_bit_the_arm_with_those_values_in_its_recipe(tuned, tmp_path, monkeypatch):
    _, run = tuned
    values = read_tuned(run)["fixed"]["values"]
    arm = {"train": {"learning_rate": values[RATE]}, "loss": {"kv_weight": values["loss.kv_weight"]}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, arms={"fixed": arm}, seeds=[7]))
    assert answer.code == 0, answer
    ours, theirs = (folder / "arms/fixed/seed-7/model/model.safetensors" for folder in (run, tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_trial_is_in_the_cost_of_the_arm_and_divided_among_its_runs(tuned):
    _, run = tuned
    recipe = tiny_recipe(run, **STUDY)
    tables = collect_tables(recipe, run)
    for name in ("ce", "fixed"):
        ledgers = {seed: read_json(run / f"arms/{name}/seed-{seed}/ledger.json") for seed in SEEDS}
        trials = [read_json(file) for file in run.glob(f"arms/{name}@tune*/seed-*/ledger.json")]
        assert len(trials) == 8
        # teachers and their targets are paid for by the study's runs, which share them; the fit draws on no seed
        spent = sum(sum(trial["flops"][part] for part in OWN) for trial in trials)
        for ledger in ledgers.values():
            assert ledger["flops"]["tuning"] == {name: spent} and ledger["shared"]["tuning"] == {name: name}
        planned = read_budgets(run)[name]
        assert apart(planned["parts"]["tuning"][name], spent) < 1e-9
        costs = budgets(recipe, tables)[name]
        assert costs["tuning_flops"] == spent
        total, amortised = costs["total_flops"], costs["amortised_flops"]
        assert total - amortised >= spent * 2 / 3 * (1 - 1e-9)
        assert apart(planned["total_flops"], total) < 0.02


def test_the_whole_grid_and_what_was_chosen_is_a_table_of_the_report(tuned):
    _, run = tuned
    table = read_json(run / "summary.json")["tuning"]
    assert table["keys"] == [RATE, "loss.kv_weight"] and table["seeds"] == [5, 6] and "validation" in table["rule"]
    head, cells = tuning_rows(table)
    assert head == ["arm", "trial", "learning_rate", "kv_weight", "accuracy, %", "NLL", "chosen"]
    assert len(cells) == 8 and cells[0][:4] == ["ce", "1 of 4", "0.001", "–"] and cells[4][3] == "2"
    assert [row[0] for row in cells if row[-1]] == ["ce", "fixed"] == [*table["chosen"]]
    assert len(tuning_rows(table, chosen_only=True)[1]) == 2
    assert not any("left out" in note for note in read_json(run / "summary.json")["notes"])  # trials are no strays


def test_grid_and_rule_are_declared_before_the_first_trial(tuned, tmp_path):
    _, run = tuned
    said = read_json(run / "declared.json")["tuning"]
    assert said["seeds"] == [5, 6] and "highest accuracy" in said["rule"]
    assert {name: len(trials) for name, trials in said["trials"].items()} == {"ce": 4, "fixed": 4}
    assert compare_declared(tiny_recipe(run, **STUDY), run)["changed"] == []
    other = {**STUDY, "tune": {**TUNE, "seeds": [5]}}
    assert compare_declared(tiny_recipe(run, **other), run)["changed"] == ["how arms are tuned differs"]
    later = {**STUDY, "arms": {**STUDY["arms"], "single": {"teachers": ["one"]}}}
    assert "how arms are tuned differs" not in compare_declared(tiny_recipe(run, **later), run)["changed"]


def test_another_search_in_the_same_folder_is_refused_and_a_further_arm_is_welcome(tuned):
    _, run = tuned
    theirs = read_json(run / "recipe.json")

    def differs(**changes: Any) -> str | None:
        return difference(theirs, tiny_recipe(run, **{**STUDY, **changes}), run)

    assert differs() is None
    assert "tune.seeds" in str(differs(tune={**TUNE, "seeds": [5, 4]}))
    rates = {**GRID, "train": {"learning_rate": [1e-3, 2e-3]}}
    assert "tune.grid.train.learning_rate" in str(differs(tune={**TUNE, "grid": rates}))
    assert "tune" in str(differs(tune=None))
    assert "'ce' is tuned" in str(differs(tune={**TUNE, "arms": ["fixed"]}))
    single = {**STUDY["arms"], "single": {"teachers": ["one"]}}
    assert differs(arms=single) is None
    left = [job.id for job in plan(tiny_recipe(run, **{**STUDY, "arms": single}), run) if job.verb in ("try", "tune")]
    assert left == [f"try:single@tune{n}:{seed}" for seed in (5, 6) for n in (1, 2, 3, 4)] + ["tune"]
    untuned = tiny_recipe(run, **{**STUDY, "tune": None})
    assert "tune" in str(difference(untuned.model_dump(mode="json"), tiny_recipe(run, **STUDY), run))


def test_a_study_that_was_killed_goes_on_from_the_trials_that_are_there(tuned, tmp_path, monkeypatch):
    _, run = tuned
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "recipe.json").write_text(json.dumps({**read_json(run / "recipe.json"), "run_dir": str(copy)}))
    before = read_json(copy / "tuned.json")
    text = tuned_path(copy).read_text()
    tuned_path(copy).write_text(text.replace('"chosen": ', '"chosen": 1'))  # altered: no mark
    for folder in [*copy.glob("arms/*/seed-[789]"), copy / "arms/ce@tune2/seed-6"]:
        shutil.rmtree(folder)
    done: list[str] = []

    def noted(recipe: Any, jobs: Any, progress: Any, **options: Any) -> None:
        done.extend(job.id for job in jobs)
        run_jobs_here(recipe, jobs, progress)

    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **STUDY), work=noted)
    assert answer.code == 0, answer
    assert [job for job in done if job.startswith("try:")] == ["try:ce@tune2:6"] and "tune" in done
    assert read_json(copy / "tuned.json") == before
    weights = "arms/fixed/seed-8/model/model.safetensors"
    assert (copy / weights).read_bytes() == (run / weights).read_bytes()


def test_an_altered_trial_and_a_missing_one_are_refused_by_name(tuned, tmp_path):
    _, run = tuned
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tuned_path(copy).unlink()
    experiment = Experiment(tiny_recipe(copy, **STUDY), copy)
    shutil.rmtree(copy / "arms/ce/seed-7")
    with pytest.raises(RunFolderError, match="not chosen yet") as refused:
        train_student(experiment.arm("ce", 7))
    assert "kvdistill tune" in refused.value.fix
    log = copy / "arms/ce@tune1/seed-5/log.jsonl"
    log.write_text(log.read_text().replace('"accuracy": 0.0', '"accuracy": 1.0'))
    with pytest.raises(RunFolderError, match="checksum differs"):
        choose_values(experiment)
    trained_mark(log.parent).unlink()
    with pytest.raises(RunFolderError, match="not trained"):
        choose_values(experiment)


def test_the_search_by_itself_says_what_it_chose_and_trains_no_student(tuned, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, **{**STUDY, "arms": {"ce": ARMS["ce"]}, "tune": {**TUNE, "seeds": [5]}}, loss={})
    tree = yaml.safe_load(path.read_text())
    tree["tune"]["grid"] = {"train": GRID["train"]}
    path.write_text(yaml.safe_dump(tree))
    answer = invoke(monkeypatch, "tune", path)
    assert answer.code == 0 and "learning_rate 0.004 (trial 2 of 2); at the edge" in answer.out, answer
    assert {folder.name for folder in (tmp_path / "run/arms").iterdir()} == {"ce@tune1", "ce@tune2"}
    assert invoke(monkeypatch, "tune", path).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "run/tuned.json").unlink()
    answer = invoke(monkeypatch, "train", path, "--arm", "ce", "--seed", 7, work=no_work)
    assert_one_message(answer, "torchrun", "kvdistill tune RECIPE")
    monkeypatch.delenv("WORLD_SIZE")
    assert_one_message(invoke(monkeypatch, "tune", path, "tune=null", work=no_work), "tunes nothing")


def test_values_that_diverge_are_tried_and_not_chosen(tmp_path, monkeypatch):
    grid = {"train": {"learning_rate": [1e-3, 1e25]}}
    changes = {"arms": {"ce": ARMS["ce"]}, "tune": {"grid": grid, "seeds": [5]}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **changes))
    assert answer.code == 0, answer
    run = tmp_path / "run"
    found = read_tuned(run)["ce"]
    assert found["values"] == {RATE: 1e-3} and found["trials"][1]["accuracy"] is None
    assert "diverged" in found["trials"][1]["seeds"]["5"]
    assert tuning_rows(read_json(run / "summary.json")["tuning"])[1][1][3:] == ["diverged", "diverged", ""]
    ledgers = [read_json(run / f"arms/ce@tune{n}/seed-5/ledger.json") for n in (1, 2)]
    assert ledgers[0]["flops"]["student_forward"] == ledgers[1]["flops"]["student_forward"]


def test_where_everything_diverges_one_message_says_so(tmp_path, monkeypatch):
    grid = {"train": {"learning_rate": [1e24, 1e25]}}
    changes = {"arms": {"ce": ARMS["ce"]}, "tune": {"grid": grid, "seeds": [5]}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **changes))
    assert answer.code != 0 and "every trial of arm 'ce' diverged" in answer.err and "Traceback" not in answer.err


def test_a_matched_arm_is_tuned_at_its_own_steps_and_the_search_is_in_what_it_spends(tmp_path):
    arms = {"fixed": {}, "more": {"teachers": [], "match": {"arm": "fixed", "parity": "total_flops"}}}
    study: dict[str, Any] = {"arms": arms, "seeds": SEEDS, "train": {"steps": 60}}
    steps = {}
    for name, changes in (("plain", {}), ("tuned", {"tune": TUNE})):
        run = tmp_path / name
        recipe = tiny_recipe(run, **study, **changes)
        made_ready(recipe, run, "prepare", "check")
        controller = TrainingBudgetController(Experiment(recipe, run))
        steps[name], planned = controller.steps("more"), [controller.budget(arm) for arm in arms]
        assert apart(*(one["amortised_flops"] for one in planned)) < 0.01
    assert 60 < steps["tuned"] < steps["plain"]  # the search costs both almost alike, the teachers one alone
    trial = Experiment(recipe, run).arm("more@tune1", 5)
    assert trial.recipe.train.steps == steps["tuned"]


def test_tuning_may_draw_its_own_data_and_teachers_where_seeds_do(tmp_path, monkeypatch):
    grid = {"loss": GRID["loss"]}
    changes = {**STUDY, "replicate": "all", "arms": {"fixed": {}}, "tune": {"grid": grid, "seeds": [5]}}
    answer = invoke(monkeypatch, "tune", write_recipe(tmp_path, **changes))
    assert answer.code == 0, answer
    run = tmp_path / "run"
    assert {path.name for path in (run / "replicates").iterdir()} == {f"seed-{seed}" for seed in (5, *SEEDS)}
    trials = [read_json(run / f"arms/fixed@tune{n}/seed-5/ledger.json")["flops"] for n in (1, 2)]
    own = sum(sum(one[part] for part in OWN) for one in trials)
    once = sum(sum(trials[0][part].values()) for part in ("teachers", "teacher_training", "fit"))
    assert read_tuned(run)["fixed"]["flops"] == pytest.approx(own + once)  # the tuning seed's teachers serve it alone
    assert apart(read_budgets(run)["fixed"]["parts"]["tuning"]["fixed"], own + once) < 1e-9


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tune", "parts"),
    [
        ({"seeds": [5, 8]}, ["tune.seeds", "seed 8 of the study", "not among"]),
        ({"seeds": []}, ["tune.seeds"]),
        ({"seeds": [5, 5]}, ["given twice"]),
        ({"arms": ["ce", "fixd"]}, ["tune.arms", "'fixd'", "did you mean 'fixed'?"]),
        ({"grid": {"train": {"learning_rat": [1, 2]}}}, ["learning_rat", "did you mean 'learning_rate'?"]),
        ({"grid": {"train": {"steps": [10, 20]}}}, ["train.steps is nothing that can be tuned"]),
        ({"grid": {"align": {"rank": [1, 2]}}}, ["tune.grid.align"]),
        ({"grid": {}}, ["tune.grid"]),
        ({"grid": {"train": {"learning_rate": [1e-3]}}}, ["two different values"]),
        ({"grid": {"train": {"learning_rate": [1e-3, 1e-3]}}}, ["two different values"]),
        ({"grid": {"train": {"learning_rate": [1e-3, 2e-3, 1e-3]}}}, ["a value is given twice"]),
        ({"grid": {"train": {"learning_rate": [0, 1e-3]}}}, ["learning rate of 0"]),
        ({"grid": {"train": {"learning_rate": [1e-3, 1e31]}}}, ["learning_rate", "less than or equal to 1000"]),
        ({"grid": {"train": {"min_lr_ratio": [0.5, 2]}}}, ["min_lr_ratio", "less than or equal to 1"]),
        ({"grid": {"loss": {"kv_weight": [0, 5]}}, "arms": ["fixed"]}, ["0 makes another arm"]),
        ({"grid": {"loss": {"logit_weight": [1, 2]}}}, ["does nothing for any arm"]),
        ({"grid": {"loss": {"kv_weight": [1, 2]}}}, ["'ce'", "would get no search", "train.learning_rate"]),
        (
            {"grid": {"train": {"weight_decay": [0, 0.1]}, "loss": {"kv_weight": [1, 2]}}},
            ["different numbers of trials: ce 2, fixed 4", "train.learning_rate"],
        ),
        ({"grid": {"train": {"learning_rate": [*range(1, 300)]}}}, ["299 trials", "more than 200"]),
        ({"unknown": 1}, ["tune.unknown"]),
        ({"by": "loss"}, ["tune.by"]),
    ],
)  # fmt: skip
def test_a_search_that_makes_no_sense_is_refused_before_anything_runs(tmp_path, monkeypatch, tune, parts):
    path = write_recipe(tmp_path, **{**STUDY, "tune": {**TUNE, **tune}} if "grid" not in tune else STUDY)
    if "grid" in tune:  # in place of the grid, not merged into it
        tree = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**tree, "tune": {**TUNE, **tune}}))
    answer = invoke(monkeypatch, "run", path, work=no_work)
    assert_one_message(answer, *parts)
    assert not (tmp_path / "run").exists()


def test_a_search_needs_validation_problems_and_names_for_its_trials(tmp_path, monkeypatch):
    tasks = [
        {"name": "chain", "train": 48, "val": 0, "test": 16},
        {"name": "product", "train": 48, "val": 0, "test": 8},
    ]
    path = write_recipe(tmp_path, **STUDY, data={"tasks": tasks})
    assert_one_message(invoke(monkeypatch, "run", path, work=no_work), "no task has any", "val")
    arms = {**STUDY["arms"], "ce@tune2": {"teachers": []}}
    path = write_recipe(tmp_path, **{**STUDY, "arms": arms, "tune": {**TUNE, "arms": ["ce", "fixed"]}})
    assert_one_message(invoke(monkeypatch, "run", path, work=no_work), "'ce@tune2' is what a trial of 'ce' is called")
