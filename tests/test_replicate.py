"""What varies with the seed: students alone, data, teachers, or all; the questions are the same for every seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import Stopped
from tiny_recipe import (
    assert_one_message,
    invoke,
    no_training,
    no_work,
    run_jobs_here,
    tiny_recipe,
    write_recipe,
)

from kvdistill.arms.experiment import Experiment
from kvdistill.core.config import replicate_recipe
from kvdistill.core.errors import DataError, RunFolderError
from kvdistill.core.files import sha256_file
from kvdistill.core.layout import replicate_folder
from kvdistill.core.progress import silent
from kvdistill.core.recipe import DataRecipe, Recipe
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.data.sets.generated import ChainFamily, ProductFamily
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.stages.prepare import prepare
from kvdistill.stages.prepare.lengths import fitted_splits
from kvdistill.stages.report.collect import collect_tables
from kvdistill.stages.report.summary import variance
from kvdistill.study.folder import claimed
from kvdistill.study.plan import plan
from kvdistill.study.run import run_study

pytestmark = pytest.mark.slow

quiet_libraries()
set_threads(1)

SEEDS = [7, 8, 11]
STUDY: dict[str, Any] = {"seeds": SEEDS, "report": {"comparisons": [["fixed", "ce"]]}}
MODES = ("data", "teacher", "all")


def weights(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): sha256_file(f) for f in sorted(run.rglob("model.safetensors"))}


def train_of(run: Path) -> list[str]:
    return [row.doc_hash for row in read_split(run, "train")]


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict[str, Path]:
    """A whole tiny study of every mode, and of the student alone."""
    runs = {}
    for mode in ("student", *MODES):
        runs[mode] = tmp_path_factory.mktemp(mode) / "run"
        run_study(tiny_recipe(runs[mode], replicate=mode, **STUDY), silent, here=True)
    return runs


# -- the graph ----------------------------------------------------------------------------------------


def test_each_seed_has_jobs_for_what_it_has_of_its_own(tmp_path):
    def graph(mode: str) -> dict[str, tuple[str, ...]]:
        recipe = tiny_recipe(tmp_path, replicate=mode, seeds=[1, 2])
        return {
            job.id: job.after
            for job in plan(recipe, tmp_path)
            if job.verb in ("prepare", "check", "teach", "capture", "fit")
        }

    data, teacher, both = (graph(mode) for mode in MODES)
    prepared = ("prepare", "prepare:1", "prepare:2")
    assert [*data][:5] == [*prepared, "check:1", "check:2"] and data["prepare:2"] == ("prepare",)
    assert data["check:1"] == prepared  # the data of every seed is good before anything is trained
    assert data["teach:one"] == ("check:1", "check:2") and data["capture:two:2"] == ("check:2", "teach:two")
    assert data["fit:fixed:2"] == ("check:2", "capture:one:2", "capture:two:2")
    assert [*teacher][:4] == ["prepare", "check", "teach:one:1", "teach:two:1"]
    assert teacher["capture:one:2"] == ("check", "teach:one:2")
    assert both["teach:one:2"] == ("check:2",) and both["capture:one:1"] == ("check:1", "teach:one:1")
    arms = {"alike": {"align": {"layers": "cka"}}}
    jobs = {job.id: job for job in plan(tiny_recipe(tmp_path, replicate="all", seeds=[1, 2], arms=arms), tmp_path)}
    assert jobs["map-layers:2"].after == ("check:2", "teach:one:2", "teach:two:2")
    assert "map-layers:2" in jobs["capture:one:2"].after and "map-layers:1" not in jobs["capture:one:2"].after
    assert jobs["teach:two:1"].mark == "replicates/seed-1/teachers/two/trained.json"
    one = plan(tiny_recipe(tmp_path, replicate="all", seeds=[1, 2]), tmp_path, ("train",), runs=[("fixed", 2)])
    assert [job.id for job in one][:3] == ["prepare", "prepare:2", "check:2"] and not any(":1" in job.id for job in one)


# -- the numbers --------------------------------------------------------------------------------------


def test_a_seed_of_a_study_that_varies_all_is_the_study_with_that_data_and_those_teachers(studies, tmp_path):
    """To the bit: the same students, teachers and answers as a study of one seed that is told to draw and teach so."""
    seed, run = SEEDS[1], studies["all"]
    alone = tiny_recipe(tmp_path / "run", seeds=[seed], data={"train_seed": seed})
    alone = alone.model_copy(update={"teachers": [t.model_copy(update={"seed": seed}) for t in alone.teachers]})
    run_study(alone, silent, here=True)
    found, whole = weights(tmp_path / "run"), weights(run)
    assert len(found) == 4
    for name, digest in found.items():
        place = f"replicates/seed-{seed}/{name}" if name.startswith("teachers") else name
        assert whole[place] == digest, name
    records = f"arms/fixed/seed-{seed}/records.jsonl"
    rows = [
        [{**json.loads(line), "seconds": 0} for line in (r / records).read_text().splitlines()]
        for r in (run, tmp_path / "run")
    ]
    assert rows[0] == rows[1]


def test_only_what_is_said_to_vary_does(studies):
    base = studies["student"]
    for mode, run in studies.items():
        seeds = [replicate_folder(run, seed) for seed in SEEDS]
        if mode in ("data", "all"):
            drawn = [train_of(folder) for folder in seeds]
            assert len({tuple(one) for one in drawn}) == len(SEEDS) and all(len(one) == 96 for one in drawn)
            for folder in seeds:
                for split in ("val", "test"):
                    assert [*read_split(folder, split)] == [*read_split(base, split)]
                held_out = {row.doc_hash for split in ("val", "test") for row in read_split(folder, split)}
                assert not held_out & {*train_of(folder)}
        else:
            assert not list(run.glob("replicates/*/data"))
        taught = [sha256_file(f) for f in sorted(run.glob("replicates/*/teachers/one/model/model.safetensors"))]
        assert len({*taught}) == len(taught) == (len(SEEDS) if mode in ("teacher", "all") else 0)
        if mode == "data":
            of_teachers = {name: digest for name, digest in weights(run).items() if name.startswith("teachers")}
            assert of_teachers.items() <= weights(base).items() and len(of_teachers) == 2
        assert read_manifest(run)["fingerprint"] == read_manifest(base)["fingerprint"]
    plain = {mode: {n: d for n, d in weights(run).items() if n.startswith("arms/ce")} for mode, run in studies.items()}
    assert plain["student"] == plain["teacher"] and plain["data"] == plain["all"]  # it has no teacher
    assert not {*plain["student"].values()} & {*plain["data"].values()}


def test_the_student_alone_is_where_it_was(studies):
    """A recipe that says nothing says `student`, and nothing of such a study stands in folders of seeds."""
    run = studies["student"]
    assert tiny_recipe(run, **STUDY) == tiny_recipe(run, replicate="student", **STUDY)
    assert not (run / "replicates").exists() and replicate_folder(run, SEEDS[0]) != run
    assert {*weights(run)} == {
        *(f"teachers/{name}/model/model.safetensors" for name in ("one", "two")),
        *(f"arms/{arm}/seed-{seed}/model/model.safetensors" for arm in ("ce", "fixed") for seed in SEEDS),
    }


def test_comparisons_are_made_and_the_page_says_what_its_deviation_includes(studies):
    for mode, run in studies.items():
        summary = json.loads((run / "summary.json").read_text())
        (nll,) = summary["secondary_comparisons"]
        assert nll["refused"] == [] and len(nll["differences"]) == len(SEEDS)
        page = (run / "report.html").read_text()
        words = {"student": "on the same training problems", "all": "over students, data and teachers"}.get(mode, mode)
        assert words in summary["variance"] and f"{summary['variance']}; p-values include the same" in page
        drew = any("Each seed drew its own training problems" in note for note in summary["notes"])
        assert drew is (mode in ("data", "all"))
        assert json.loads((run / "statistical_results.json").read_text())["variance"] == summary["variance"]
        ledger = json.loads((run / "arms/fixed/seed-7/ledger.json").read_text())["flops"]
        shared = 1 if mode != "student" else len(SEEDS)  # runs that read one teacher's targets: one arm
        assert ledger["teachers_amortised"]["one"] == pytest.approx(ledger["teachers"]["one"] / shared)
    names = [*collect_tables(tiny_recipe(studies["all"], replicate="all", **STUDY), studies["all"]).teachers]
    assert names[:2] == ["one, seed 7", "one, seed 8"] and len(names) == 6


def test_published_teachers_are_named_where_teachers_vary():
    tree = tiny_recipe(Path("run"), replicate="all").model_dump()
    tree["teachers"][1] = {"name": "fixed-one", "path": "gpt2"}
    assert variance(Recipe.model_validate({**tree, "arms": {"ce": {"teachers": []}}})) == (
        "over students, data and teachers (but for published ones: fixed-one)"
    )
    made = replicate_recipe(Recipe.model_validate(tree), 5)
    assert [teacher.seed for teacher in made.teachers] == [5, 0] and made.data.train_seed == 5


# -- what is drawn ------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 5), st.sampled_from([ChainFamily(), ProductFamily()]))
def test_generated_problems_that_are_held_out_do_not_depend_on_what_is_learned(held_out, more, seed, family):
    plain, drawn = family.draw(held_out, more, seed), family.draw(held_out, more, seed, more_seed=3)
    assert plain[:held_out] == drawn[:held_out] and len(drawn) == held_out + more == len({p.id for p in drawn})
    kin = {family.kin(int(problem.id)) for problem in drawn[:held_out]}
    assert not kin & {family.kin(int(problem.id)) for problem in drawn[held_out:]}
    assert drawn == family.draw(held_out, more, seed, more_seed=3)


def own_file(path: Path, count: int, long: int = 0) -> str:
    """long: the first so many rows have long questions."""
    words = ["apple", "brook", "cedar", "dune", "ember", "fjord", "grove", "heath"]
    rows = [
        {
            "question": f"{words[n % 8]} {words[n // 8 % 8]} {n} {'very ' * 40 * (n < long)}?",
            "reasoning": f"{n} it is.",
            "answer": str(n),
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 5)),
    extra=st.integers(1, 12),
    long=st.integers(0, 9),
    seed=st.integers(0, 3),
)
def test_rows_of_a_file_are_drawn_anew_and_the_held_out_ones_stay(tmp_path_factory, counts, extra, long, seed):
    """Also where long problems gave way to others: nothing that is learned from is ever held out."""
    train, val, test, teach = counts
    folder = tmp_path_factory.mktemp("file")
    task = {"name": "jsonl", "file": own_file(folder / "rows.jsonl", sum(counts) + extra + long, long)}
    task |= {"train": train, "val": val, "test": test, "teach": teach}
    section = {"tasks": [task], "seed": seed, "max_length": 100}
    ids: dict[Any, dict[str, list[str]]] = {}
    for train_seed in (None, 1, 2):
        splits = fitted_splits(DataRecipe.model_validate({**section, "train_seed": train_seed}), silent, beside=folder)
        ids[train_seed] = {split: [p.id for p in problems] for split, problems in splits.problems.items()}
        found = [one for rows in ids[train_seed].values() for one in rows]
        assert len(found) == len({*found}) == sum(counts)  # disjoint, and as many as were asked for
    for train_seed in (1, 2):
        for split in ("val", "test"):
            assert ids[train_seed][split] == ids[None][split]
        for split in ("train", "teach"):
            assert len(ids[train_seed][split]) == len(ids[None][split])


def test_where_every_row_is_learned_from_there_is_nothing_to_draw(tmp_path):
    task = {"name": "jsonl", "file": own_file(tmp_path / "rows.jsonl", 12), "train": 8, "val": 2, "test": 2}
    changes: dict[str, Any] = {
        "replicate": "data",
        "data": {"tasks": [task], "max_length": 200},
        "arms": {"ce": {"teachers": []}},
        "teachers": [],
    }
    recipe = tiny_recipe(tmp_path / "run", **changes)
    with pytest.raises(DataError, match=r"same problems.*8 of rows"):
        for seed in (None, 7):
            prepare(recipe, tmp_path / "run", seed=seed)
    task["train"] = 7
    fewer = tiny_recipe(tmp_path / "fewer", **changes)
    for seed in (None, 7):
        prepare(fewer, tmp_path / "fewer", seed=seed)


def leaking_file(path: Path) -> str:
    """Every question stands there twice, nearly the same."""
    words = ["apple", "brook", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "jetty"]
    rows = []
    for n in range(30):
        text = " ".join(words[(n * k + k) % 10] for k in range(3, 21)) + f" number {n}"
        for ending in ("?", " now?"):
            rows.append({"question": text + ending, "reasoning": f"{n} it is.", "answer": str(n)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_leak_in_one_seeds_problems_stops_all_before_anything_is_trained(tmp_path, monkeypatch):
    task = {"name": "jsonl", "file": leaking_file(tmp_path / "rows.jsonl"), "train": 2, "val": 2, "test": 2}
    changes = {"replicate": "data", "seeds": [*range(20, 40)], "data": {"tasks": [task], "max_length": 300, "seed": 1}}
    path = write_recipe(tmp_path, **changes, arms={"ce": {"teachers": []}}, teachers=[])
    answer = invoke(monkeypatch, "run", path, work=no_training)
    assert answer.code == 2 and "the problems of seed" in answer.err and "held out" in answer.err, answer
    assert not (tmp_path / "run/arms").exists()
    looked = invoke(monkeypatch, "validate", path, "data.leaks=drop")
    assert looked.code == 0 and "problems of seed 20:" in looked.out and "leaks left: 0" in looked.out, looked
    allowed = invoke(monkeypatch, "validate", path, "data.leaks=allow", f"run_dir={tmp_path / 'other'}")
    assert allowed.code == 2 and "leaks left 0" in allowed.out, allowed
    mended = invoke(monkeypatch, "validate", path, "--fix")
    assert mended.code == 0 and "leaks left: 0" in mended.out, mended
    invoke(monkeypatch, "prepare", path)
    for folder in (tmp_path / "run").glob("replicates/*"):
        held_out = {row.question.split(" number")[1][:3] for row in read_split(folder, "test")}
        assert not held_out & {row.question.split(" number")[1][:3] for row in read_split(folder, "train")}


# -- interrupted, and changed -------------------------------------------------------------------------


def test_interrupted_anywhere_it_ends_in_the_same_bits(studies, tmp_path):
    """After every third job, and in the middle of a teacher of one seed."""
    run = tmp_path / "run"
    recipe = tiny_recipe(run, replicate="all", **STUDY)
    with pytest.raises(Stopped), claimed(recipe, run):
        from kvdistill.stages.train import train_teacher

        run_jobs_here(recipe, [job for job in plan(recipe, run) if job.verb in ("prepare", "check")], silent)

        def stop(what: str, done: float, total: float) -> None:
            if done == 3:
                raise Stopped

        train_teacher(Experiment(recipe, run).of(8).teachers["two"], progress=stop)
    while left := plan(recipe, run):
        if left[0].verb == "report":
            break
        with claimed(recipe, run):
            todo = [job for job in left if job.verb not in ("prepare", "check", "capture", "fit")][:3]
            before: set[str] = {job.id for job in todo}
            for job in reversed(left):
                before |= {*job.after} if job.id in before else set()
            run_jobs_here(recipe, [job for job in left if job.id in before], silent)
    assert weights(run) == weights(studies["all"])


def test_seeds_may_be_added_and_the_way_of_varying_may_not_be_changed(tmp_path):
    run = tmp_path / "run"
    run_study(tiny_recipe(run, replicate="data", seeds=[1]), silent, verb="prepare", here=True)
    run_study(tiny_recipe(run, replicate="data", seeds=[1, 2]), silent, verb="prepare", here=True)
    assert (replicate_folder(run, 2) / "data/manifest.json").exists()
    with pytest.raises(RunFolderError, match="replicate"):
        run_study(tiny_recipe(run, replicate="all", seeds=[1, 2]), silent, verb="prepare", here=True)


def test_a_folder_from_before_there_were_these_keys_goes_on(tmp_path):
    run = tmp_path / "run"
    run_study(tiny_recipe(run, seeds=[1]), silent, verb="prepare", here=True)
    kept = json.loads((run / "recipe.json").read_text())
    del kept["replicate"], kept["data"]["train_seed"], kept["train"]["select"], kept["train"]["patience"]
    (run / "recipe.json").write_text(json.dumps(kept))
    manifest = (run / "data/manifest.json").read_bytes()
    run_study(tiny_recipe(run, seeds=[1]), silent, verb="teach", here=True)
    assert (run / "data/manifest.json").read_bytes() == manifest
    assert "train_seed" not in json.loads(manifest)["section"]


def test_a_seed_whose_texts_the_tokenizer_was_not_made_of_is_named(tmp_path):
    rows = [{"question": f"q{n} {chr(0x4E00 + n)}?", "reasoning": f"{n} it is.", "answer": str(n)} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "jsonl", "file": str(path), "train": 4, "val": 2, "test": 2}
    changes: dict[str, Any] = {
        "replicate": "data",
        "data": {"tasks": [task], "max_length": 200},
        "arms": {"ce": {"teachers": []}},
        "teachers": [],
    }
    run_study(tiny_recipe(tmp_path / "run", seeds=[1, 2], **changes), silent, verb="prepare", here=True)
    assert read_manifest(replicate_folder(tmp_path / "run", 2))["tokenizer"]["unknown_tokens"]["train"] == 0
    with pytest.raises(DataError, match=r"other seeds' texts.*seed 3"):
        run_study(tiny_recipe(tmp_path / "run", seeds=[1, 2, 3], **changes), silent, verb="prepare", here=True)


# -- commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_command_works_with_it(mode, tmp_path, monkeypatch):
    arms = {
        "ce": {"teachers": []},
        "alike": {"align": {"layers": "cka"}},
        "seq-kd": {"teachers": [], "texts": "written"},
        "untrained": {"control": "untrained"},
    }
    every = [
        ["map-layers"],
        ["profile-alignment"],
        ["validate"],
        ["export"],
        ["train", "--arm", "alike", "--seed", "4"],
    ]
    if mode != "all":  # where data and teachers vary, each command meets both; else what depends on which of them does
        arms, every = {name: arms[name] for name in ("alike", "seq-kd")}, [["validate"], ["export"]]
    chosen = {"select": "best", "eval_every": 2, "patience": 2}
    changes = {"arms": arms, "train": chosen, "write": {"questions": "train"}}
    path = write_recipe(tmp_path, replicate=mode, seeds=[3, 4], **changes)
    run = tmp_path / "run"
    rehearsed = invoke(monkeypatch, "run", path, "--dry-run")
    assert rehearsed.code == 0 and not (run / "replicates").exists(), rehearsed
    assert ("teach one 3" in rehearsed.out) is (mode != "data")
    for words in every:
        before = ["prepare", "teach", "write", "capture", "fit"] if words[0] == "train" else []
        for verb in before:
            assert invoke(monkeypatch, verb, path).code == 0, verb
        answer = invoke(monkeypatch, words[0], path, *words[1:])
        assert answer.code == 0, answer
    exported = {str(f.relative_to(run)) for f in run.rglob("train.*.jsonl")}
    assert len(exported) == (1 if mode == "teacher" else 3)
    finished = invoke(monkeypatch, "run", path)
    assert finished.code == 0, finished
    assert len([*run.glob("replicates/*/written/*/written.json")]) == 4 and not (run / "written").exists()
    ledger = json.loads((run / "arms/alike/seed-4/ledger.json").read_text())
    assert ledger["selection"]["chosen_step"] in (2, 4, 6)
    if mode == "all":
        for model in ("arms/alike/seed-4/model", "replicates/seed-4/teachers/one/model"):
            again = invoke(monkeypatch, "evaluate", run / model, "--tasks", "own")
            assert again.code == 0, again
        assert invoke(monkeypatch, "report", path).code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replicate": "everything"}, "replicate"),
        (
            {"replicate": "teacher", "teachers": [{"name": "one", "path": "gpt2"}], "arms": {"a": {}}},
            "published teachers (one)",
        ),
        ({"replicate": "all", "teachers": [{"name": "one", "path": "gpt2"}], "arms": {"a": {}}}, "set replicate: data"),
        ({"replicate": "teacher", "teachers": [], "arms": {"ce": {}}}, "there is no teacher"),
        ({"replicate": "data", "data": {"train_seed": 3}}, "data.train_seed"),
        (
            {"replicate": "all", "arms": {"a": {"align": {"layers": "cka", "layer_map": "layers/one.json"}}}},
            "arms.a.align.layer_map",
        ),
        (
            {"data": {"tasks": [{"name": "chain", "val": 0}]}, "teachers": [], "arms": {"ce": {}},
             "train": {"select": "best", "eval_every": 2}},
            "no task has any",
        ),
    ],
)  # fmt: skip
def test_what_cannot_vary_is_refused_with_the_reason(tmp_path, monkeypatch, changes, words):
    assert_one_message(invoke(monkeypatch, "run", write_recipe(tmp_path, **changes), work=no_work), words)
    assert not (tmp_path / "run").exists()
