"""Bad input: exit code 2, one message that names the place and the fix, and nothing begun that costs anything."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import (
    ARMS,
    SEED,
    Answer,
    assert_one_message,
    base_run,
    call,
    copy_base,
    invoke,
    no_training,
    no_work,
    tiny_recipe,
    tiny_tree,
    write_recipe,
)

from kvdistill.arms.checks import check_saved_tokenizer
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.order import data_order
from kvdistill.core.errors import DataError, KVDistillError, RunFolderError, TrainingStopped
from kvdistill.core.files import write_json
from kvdistill.core.layout import refuse_foreign
from kvdistill.core.marks import sealed
from kvdistill.core.recipe import ScratchRecipe
from kvdistill.stages.table import Job
from kvdistill.study.folder import claimed

pytestmark = pytest.mark.slow


def tasks(**changes: Any) -> list[dict[str, Any]]:
    first, second = tiny_tree()["data"]["tasks"]
    return [{**first, **changes}, second]


def teachers(**changes: Any) -> list[dict[str, Any]]:
    first, second = tiny_tree()["teachers"]
    return [{**first, **changes}, second]


def path_teacher(path: object) -> list[dict[str, Any]]:
    return [{"name": "one", "path": str(path)}, tiny_tree()["teachers"][1]]


# -- the recipe alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.stesp=3"], ["unknown key 'train.stesp'", "did you mean 'steps'?", "tiny.yaml"]),
        (["trian.steps=3"], ["unknown key 'trian'", "did you mean 'train'?"]),
        (["train.steps=many"], ["train.steps", "integer", "'many'"]),
        (["train.steps=-1"], ["train.steps", "greater than 0"]),
        (["train.steps"], ["cannot read 'train.steps'", "key=value"]),
        (["arms.fixed.los.kv_weight=1"], ["unknown key 'los'", "arms.fixed", "did you mean 'loss'?"]),
        (["fuse.weights=[0.5,-0.5]"], ["fuse.weights", "finite and >= 0", "-0.5"]),
        (["fuse.weights=[0,0]"], ["sum to 0", "make at least one positive"]),
        (["fuse.weights=[1,1,1]"], ["3 weights for 2 teachers (one, two)", "arms.fixed", "one weight per teacher"]),
        (["arms.bad.teachers=[three]"], ["unknown teacher 'three'", "arms.bad.teachers"]),
        (["arms.bad.fuse.fuse_at=kv"], ["fuse.fuse_at", "arms.bad", "match_in: student"]),
        (["seeds=[]"], ["seeds"]),
    ],
)
def test_mistakes_in_the_recipe(tmp_path, monkeypatch, words, parts):
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path), *words, work=no_work)
    assert_one_message(answer, *parts)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    assert_one_message(invoke(monkeypatch, "run", path.with_name("tinny.yaml"), work=no_work), f"'{path}'")


@pytest.mark.parametrize("verb", ["run", "prepare", "teach", "capture", "fit", "train", "evaluate", "report"])
def test_every_verb_says_it_alike_and_in_json(tmp_path, monkeypatch, verb):
    path = write_recipe(tmp_path)
    assert_one_message(invoke(monkeypatch, verb, path, "train.stesp=3", work=no_work), "'train.stesp'")
    answer = invoke(monkeypatch, verb, path, "train.stesp=3", "--json", work=no_work)
    assert answer.code == 2 and answer.err == ""
    error = json.loads(answer.out)  # one object and nothing else
    assert error.keys() == {"error", "place", "fix"} and all(error.values()) and "train.stesp" in error["error"]


# -- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./no/such/model", "/no/such/model"])
def test_models_that_are_not_there_are_found_before_anything_is_done(tmp_path, monkeypatch, path):
    recipe = write_recipe(tmp_path, teachers=path_teacher(path))
    answer = invoke(monkeypatch, "run", recipe, work=no_work)
    assert_one_message(answer, f"there is no folder {path}", "teachers.0 (one).path", "hub id")
    recipe = write_recipe(tmp_path, student={"path": path, "scratch": None})
    answer = invoke(monkeypatch, "run", recipe, work=no_work)
    assert_one_message(answer, f"there is no folder {path}", "student.path")
    assert not (tmp_path / "run").exists()


def test_model_folders_without_their_files_are_found_before_training(tmp_path, monkeypatch):
    whole = base_run() / "teachers/one/model"
    broken = tmp_path / "model"
    shutil.copytree(whole, broken)
    (broken / "config.json").unlink()
    recipe = write_recipe(tmp_path, teachers=path_teacher(broken))
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_work), "has no config.json", "teachers.0 (one)")
    shutil.copy(whole / "config.json", broken)
    os.rename(broken / "model.safetensors", broken / "pytorch_model.bin")
    answer = invoke(monkeypatch, "run", recipe, work=no_training)
    assert_one_message(answer, "only pickled ones, which are never loaded", "teachers.0 (one)")
    os.rename(broken / "pytorch_model.bin", broken / "model.safetensors")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), "no tokenizer", "teachers.0 (one)")


def test_a_student_with_another_tokenizer_is_found_before_training(tmp_path, monkeypatch):
    """Both have a vocabulary of their own letters: tokenizers are compared, not sizes. A teacher may have its own."""
    other = tmp_path / "model"
    shutil.copytree(base_run() / "teachers/one/model", other)
    rules = json.loads((other / "tokenizer.json").read_text())
    vocab = rules["model"]["vocab"]
    one, two = [word for word in vocab if len(word) == 1][:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    recipe = write_recipe(tmp_path, student={"path": str(other), "scratch": None})
    answer = invoke(monkeypatch, "run", recipe, work=no_training)
    assert_one_message(answer, "tokenizer differs", "student")
    recipe = write_recipe(tmp_path, teachers=path_teacher(other))
    assert invoke(monkeypatch, "prepare", recipe).code == 0
    manifest = json.loads((tmp_path / "run/data/teachers/one/manifest.json").read_text())
    assert manifest["own_text"] and manifest["one_text"] and manifest["lost"]["characters"] == 0


def test_a_tokenizer_that_would_not_survive_saving_is_found_before_training(tmp_path, monkeypatch, data_root):
    """transformers loads a GPT-2 tokenizer beside a qwen2 model as another one; beside a llama model it does not."""
    data = {"tokenizer": "root:gpt2", "root": str(data_root), "trim_vocabulary": True, "max_length": 64}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, data=data), work=no_training)
    assert_one_message(answer, "load this tokenizer differently", "student.scratch.architecture", "llama")
    experiment = Experiment(tiny_recipe(tmp_path / "run", data=data), tmp_path / "run")
    for architecture in ("llama", "qwen3", "gpt2"):
        scratch = ScratchRecipe(architecture=architecture)
        check_saved_tokenizer(experiment, scratch, "student", experiment.tokenizer)
    assert not list((tmp_path / "run").glob(".check-*"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"loss": {"distill_layers": "0-12"}}, ["0-12", "layer 12", "layers 0 to 1", "loss.distill_layers"]),
        ({"loss": {"distill_layers": "first"}}, ["'first'", "loss.distill_layers"]),
        ({"arms": {"deep": {"loss": {"distill_layers": "2"}}}}, ["layer 2", "arms.deep"]),
        ({"student": {"scratch": {"num_heads": 3}}}, ["hidden_size 16", "student"]),
        ({"student": {"scratch": {"vocab_size": 3}}}, ["3 token embeddings", "student"]),
        ({"arms": {"x": {"align": {"layers": "explicit", "layer_map": {0: [0], 1: [9]}}}}}, ["layer 9", "arms.x"]),
        ({"arms": {"x": {"align": {"layers": "explicit", "layer_map": {0: [0]}}}}}, ["layer 1 is missing", "arms.x"]),
    ],
)
def test_layers_and_sizes_outside_a_model_are_found_before_training(tmp_path, monkeypatch, changes, parts):
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **changes), work=no_training)
    assert_one_message(answer, *parts)
    assert not (tmp_path / "run/teachers").exists()
    with pytest.raises(AssertionError, match="began before"):  # mended, the same folder goes on to training
        invoke(monkeypatch, "run", write_recipe(tmp_path), work=no_training)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"0": [0], "1": [5]}', "teacher layer 5"),
        ('{"0": [0], "7": [1]}', "student layer '7'"),
        ('{"0": [0], "1": 1}', "no list of teacher layers"),
        ('{"0": [0]', "not JSON"),
        ("[1]", "not an object"),
        (None, "cannot read"),
    ],
)
def test_layer_map_files_that_do_not_fit_are_found_before_training(tmp_path, monkeypatch, content, part):
    file = tmp_path / "map.json"
    if content is not None:
        file.write_text(content)
    arms = {"x": {"align": {"layers": "explicit", "layer_map": str(file)}}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, arms=arms), work=no_training)
    assert_one_message(answer, part, str(file), "arms.x")
    assert not (tmp_path / "run/teachers").exists()


# -- data -------------------------------------------------------------------------------------------

GOOD = '{"question": "a%d", "reasoning": "b", "answer": "3"}'


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ('{"question": "a", "reasoning": "b", "answer": ', "broken JSON"),
        ("[1, 2]", "not an object"),
        ('{"question": "a", "reasoning": "b"}', "field 'answer' is missing"),
        ('{"question": "a", "reasoning": "b", "asnwer": "3"}', "did you mean 'asnwer'?"),
        ('{"question": 5, "reasoning": "b", "answer": "3"}', "'question' is int, not text"),
        ('{"question": " ", "reasoning": "b", "answer": "3"}', "'question' is empty"),
        ('{"question": "a", "reasoning": "b", "answer": NaN}', "NaN is not JSON"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, monkeypatch, row, part):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join([GOOD % 1, GOOD % 2, row, GOOD % 3]) + "\n")
    changes = {"data": {"tasks": tasks(name="jsonl", file=str(file))}, "teachers": teachers(train_on=["own"])}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **changes), work=no_training)
    assert_one_message(answer, f"{file}:3", part)
    assert not (tmp_path / "run/data").exists()


def test_empty_splits_files_and_tasks(tmp_path, monkeypatch):
    file = tmp_path / "own.jsonl"
    changes = {"data": {"tasks": tasks(name="jsonl", file=str(file))}, "teachers": teachers(train_on=["own"])}
    recipe = write_recipe(tmp_path, **changes)
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), "file not found", str(file))
    file.write_text("")
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), "no rows", str(file))
    file.write_text((GOOD % 1) + "\n")
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), "split", "is empty", "own")
    recipe = write_recipe(tmp_path, data={"max_length": 3})  # nothing was made yet: the folder takes the mended recipe
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), "longer than 3 tokens", "data.max_length")
    recipe = write_recipe(tmp_path, data={"tasks": tasks(name="chian")}, teachers=teachers(train_on=["chian"]))
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), "'chian'", "did you mean 'chain'?")
    recipe = write_recipe(tmp_path, data={"tasks": tasks(train=0)})
    answer = invoke(monkeypatch, "run", recipe)
    assert_one_message(answer, "no training examples of chain", "teachers.0 (one)", "`train`")
    (other := tmp_path / "other").mkdir()
    recipe = write_recipe(other, data={"tasks": tasks(train=0, teach=9), "disjoint_teachers": True})
    assert_one_message(invoke(monkeypatch, "run", recipe), "no training examples of product", "(two)", "`teach`")
    with pytest.raises(DataError, match="no examples to learn from"):  # and not permutations of nothing without end
        data_order(0, 4, seed=1)


# -- the store --------------------------------------------------------------------------------------


def ready_to_train(folder: Path) -> tuple[Path, Path]:
    """A captured and fitted run folder, and its recipe file."""
    return copy_base(folder), write_recipe(folder, arms=ARMS)


def train(monkeypatch: Any, recipe: Path, arm: str = "fixed") -> Answer:
    return invoke(monkeypatch, "train", recipe, "--arm", arm, "--seed", SEED)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_named(tmp_path, monkeypatch, how):
    run, recipe = ready_to_train(tmp_path)
    shard = next((run / "store").glob("targets-train-two-*")) / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    if how == "truncated":
        shard.write_bytes(content[:-1])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    answer = train(monkeypatch, recipe)
    assert_one_message(answer, str(shard), {"flipped": "checksum"}.get(how, how))
    assert f"delete {shard.parent}" in answer.err
    shutil.rmtree(shard.parent)  # what the fix says
    assert invoke(monkeypatch, "capture", recipe).code == 0
    assert train(monkeypatch, recipe).code == 0


def test_damaged_fits_data_and_models_are_named(tmp_path, monkeypatch):
    run, recipe = ready_to_train(tmp_path)
    fitted = next((run / "fit").glob("aligner-one-*/shard-00000.safetensors"))
    for file in sorted((run / "fit").glob("aligner-one-*/shard-00000.safetensors")):
        file.write_bytes(file.read_bytes()[:-1])
    assert_one_message(train(monkeypatch, recipe), str(fitted.parent.parent), "shard-00000.safetensors")
    shutil.rmtree(run)
    copy_base(tmp_path)
    parquet = run / "data/train.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-1])
    assert_one_message(train(monkeypatch, recipe), str(parquet), "torn or altered")
    shutil.rmtree(run)
    copy_base(tmp_path)
    assert train(monkeypatch, recipe, "ce").code == 0
    weights = run / "arms/ce" / f"seed-{SEED}" / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    answer = invoke(monkeypatch, "evaluate", recipe, "--arm", "ce", "--seed", SEED)
    assert_one_message(answer, str(weights), "checksum differs", "kvdistill train")


@pytest.mark.parametrize(
    ("changed", "file"),
    [("teacher", "teachers/one/fingerprint.json"), ("tokenizer", "data/manifest.json"), ("dtype", None)],
)
def test_a_store_of_another_teacher_tokenizer_or_option_is_refused(tmp_path, monkeypatch, changed, file):
    """The store's own manifest stays as it is; what the run folder says of teacher, tokenizer or options changes."""
    run, recipe = ready_to_train(tmp_path)
    if changed == "teacher":
        stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in weight_files(run)]
        (run / file).write_text(json.dumps(sealed({"stamp": stamp, "files": "0" * 64})))
    elif changed == "tokenizer":
        manifest = json.loads((run / file).read_text())
        manifest["tokenizer"]["fingerprint"] = "0" * 64
        manifest.pop("sha256")
        (run / file).write_text(json.dumps(sealed(manifest)))
    else:
        recipe = write_recipe(tmp_path, arms=ARMS, capture={"dtype": "bfloat16"})
        tree = json.loads((run / "recipe.json").read_text())
        (run / "recipe.json").write_text(json.dumps({**tree, "capture": {**tree["capture"], "dtype": "bfloat16"}}))
    answer = train(monkeypatch, recipe)
    part = "not the one that the texts were made with" if changed == "tokenizer" else f"{changed} ("
    assert_one_message(answer, part, "run `kvdistill")


def weight_files(run: Path) -> list[Path]:
    model = run / "teachers/one/model"
    return sorted([*model.glob("*.safetensors"), model / "config.json"])


@pytest.mark.parametrize("verb", ["teach", "capture", "fit", "train", "evaluate", "report"])
def test_a_stage_before_its_turn_says_which_one_is_missing(tmp_path, monkeypatch, verb):
    answer = invoke(monkeypatch, verb, write_recipe(tmp_path))
    assert_one_message(answer, "kvdistill prepare" if verb != "report" else "kvdistill", str(tmp_path / "run"))


# -- run folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=7", "train.steps (6 there, 7 now)"),
        ("teachers.0.scratch.hidden_size=32", "scratch"),
        ("student.scratch.num_layers=3", "student.scratch.num_layers (2 there, 3 now)"),
        ("capture.dtype=bfloat16", "capture.dtype"),
        ("evaluate.match_examples=9", "evaluate.match_examples"),
        ("arms.fixed.loss.kv_weight=1", "arms.fixed.loss.kv_weight (5.0 there, 1.0 now)"),
    ],
)
def test_a_run_folder_of_another_recipe_names_the_key(tmp_path, monkeypatch, override, part):
    run, recipe = ready_to_train(tmp_path)
    (run / "arms" / "fixed" / f"seed-{SEED}").mkdir(parents=True)
    before = (run / "recipe.json").read_bytes()
    answer = invoke(monkeypatch, "run", recipe, override, work=no_work)
    assert_one_message(answer, "another recipe", part, str(run), "run_dir")
    assert (run / "recipe.json").read_bytes() == before


def test_new_arms_and_seeds_are_welcome_in_a_run_folder(tmp_path, monkeypatch):
    begun: list[str] = []

    def note(recipe: Any, jobs: Any, progress: Any, **options: Any) -> None:
        begun.extend(job.id for job in jobs)
        raise TrainingStopped("enough", place="here", fix="none")

    run, recipe = ready_to_train(tmp_path)
    (run / "arms" / "fixed" / f"seed-{SEED}").mkdir(parents=True)
    invoke(monkeypatch, "run", recipe, "seeds=[7,8]", "arms.new.teachers=[two]", work=note)
    assert "train:new:8" in begun and "train:fixed:8" in begun and "teach:one" not in begun


def test_a_folder_that_is_no_run_folder_is_left_alone(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    recipe = write_recipe(tmp_path)
    for verb in ("run", "train", "report"):
        answer = invoke(monkeypatch, verb, recipe, f"run_dir={mine}", work=no_work)
        assert_one_message(answer, "holds files but no recipe.json", str(mine), "run_dir")
    assert os.listdir(mine) == ["thesis.tex"]
    answer = invoke(monkeypatch, "run", recipe, f"run_dir={mine / 'thesis.tex'}", work=no_work)
    assert_one_message(answer, "a file, not a folder", "thesis.tex")
    answer = invoke(monkeypatch, "run", recipe, "run_dir=/proc/no/run", work=no_work)
    assert_one_message(answer, "cannot write here", "/proc/no/run")


def test_a_folder_in_which_another_command_has_just_begun_is_welcome(tmp_path, monkeypatch):
    listed = Path.iterdir

    def meanwhile(folder):  # the other one's files appear between two looks at the folder
        write_json(folder / "recipe.json", {})
        (folder / "data").mkdir(exist_ok=True)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    refuse_foreign(tmp_path, "recipe.json", fix="none")  # raises nothing
    assert (tmp_path / "recipe.json").exists() and (tmp_path / "data").is_dir(), "or nothing was tried"


def test_what_a_kill_leaves_of_the_first_file_is_nobodys(tmp_path):
    for name in (".lock", ".recipe.json.part-12345"):
        (tmp_path / name).touch()
    refuse_foreign(tmp_path, "recipe.json", fix="none")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"holds files but no recipe\.json"):
        refuse_foreign(tmp_path, "recipe.json", fix="none")


def test_two_commands_at_once_in_one_run_folder(tmp_path, monkeypatch):
    """A second one that wants something else of what is being made is refused; more seeds are welcome."""
    run, recipe = ready_to_train(tmp_path)
    before = (run / "recipe.json").read_bytes()
    with claimed(tiny_recipe(run, arms=ARMS), run):
        for words in (["run"], ["train"], ["report"], ["capture"]):
            answer = invoke(monkeypatch, *words, recipe, "arms.fixed.loss.kv_weight=1", work=no_work)
            assert_one_message(answer, "another command is working", "arms.fixed.loss.kv_weight", str(run))
        assert (run / "recipe.json").read_bytes() == before  # the second one changed nothing
        with pytest.raises(AssertionError, match="work began"):
            invoke(monkeypatch, "run", recipe, "seeds=[8]", work=no_work)


def test_unknown_arms_and_seeds(tmp_path, monkeypatch):
    _, recipe = ready_to_train(tmp_path)
    assert_one_message(train(monkeypatch, recipe, "fixd"), "there is no arm 'fixd'", "did you mean 'fixed'?")
    answer = invoke(monkeypatch, "train", recipe, "--seed", 99)
    assert_one_message(answer, "seed 99 is not in the recipe", "--seed")


# -- full disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that sets its size; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, timeout=60, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small disk needs root; the faked full disk below runs everywhere")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], timeout=60, check=True)

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=60, check=True)


def test_a_disk_that_fills_up_stops_cleanly_and_the_same_command_goes_on(tmp_path, monkeypatch, small_disk):
    """The disk grows a little after each stop, so that it fills in one stage after the other."""
    disk, resize = small_disk
    recipe, words = write_recipe(tmp_path), ("run", tmp_path / "tiny.yaml", f"run_dir={disk / 'run'}")
    stops = 0
    for size in ("64k", "200k", "400k", "700k", "1100k"):
        resize(size)
        answer = invoke(monkeypatch, *words)
        if answer.code == 0:
            break
        assert_one_message(answer, "the disk is full", str(disk), "same command again")
        stops += 1
    assert stops >= 3
    resize("50m")
    assert invoke(monkeypatch, *words).code == 0
    assert recipe.exists() and not list(disk.rglob("*.part-*"))
    (tmp_path / "whole").mkdir()
    assert invoke(monkeypatch, "run", write_recipe(tmp_path / "whole")).code == 0
    for model in (tmp_path / "whole/run").rglob("model.safetensors"):
        assert (disk / "run" / model.relative_to(tmp_path / "whole/run")).read_bytes() == model.read_bytes()


@pytest.mark.parametrize("writer", ["fsync", "save_file", "foreign"])
def test_a_full_disk_faked_at_the_lowest_layer(tmp_path, monkeypatch, writer):
    """Where no disk can be mounted: the system's error from fsync, from safetensors' Rust, from a writer not ours."""
    run, recipe = ready_to_train(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device", str(run / "x"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise full if writer != "save_file" else RuntimeError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as faked:
        if writer == "fsync":
            faked.setattr(os, "fsync", fail)
        elif writer == "save_file":
            import safetensors.torch

            faked.setattr(safetensors.torch, "save_file", fail)
        else:
            faked.setattr("kvdistill.stages.train.match_on_held_out", fail)
        answer = train(faked, recipe)
    assert_one_message(answer, "the disk is full", str(run), "same command again")
    assert not (run / "arms/fixed" / f"seed-{SEED}" / "trained.json").exists()
    assert not list(run.rglob("*.part-*"))
    assert train(monkeypatch, recipe).code == 0


def test_a_full_disk_in_a_worker_is_the_same_message(tmp_path, monkeypatch):
    from kvdistill.study import local

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "perform", fail)
    monkeypatch.setattr(local, "_RECIPE", tiny_recipe(tmp_path))
    with pytest.raises(TrainingStopped, match="disk is full"):
        local._do(Job("train:fixed:7", "train", {}, (), 1.0, None))


def test_errors_survive_the_way_back_from_a_worker():
    import pickle  # what multiprocessing sends them with; nothing is read from a file

    for kind in KVDistillError.__subclasses__():
        error = kind("what", place="place", fix="fix")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and again.message() == error.message() == "place: what\n  fix: fix"


# -- through real processes -------------------------------------------------------------------------


def test_a_real_process_says_one_thing_on_stderr(tmp_path):
    path = write_recipe(tmp_path)
    assert_one_message(call("run", path, "train.stesp=3"), "did you mean 'steps'?")
    answer = call("run", path, "train.stesp=3", "--json")
    assert answer.code == 2 and answer.err == "" and json.loads(answer.out)["fix"]


def test_a_mistake_found_by_a_worker_is_one_message_too(tmp_path):
    path = write_recipe(tmp_path, loss={"distill_layers": "0-12"}, hardware={"workers": 1})
    answer = call("run", path)
    assert_one_message(answer, "layers 0 to 1", "loss.distill_layers")
    assert not (tmp_path / "run/teachers").exists()


def test_tiny_recipe_is_what_the_base_run_was_made_with():
    made = tiny_recipe(base_run(), arms=ARMS).model_dump(mode="json")
    assert json.loads((base_run() / "recipe.json").read_text()) == made
