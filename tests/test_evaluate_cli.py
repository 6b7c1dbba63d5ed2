"""`kvdistill evaluate MODEL --tasks …` as a user types it: table, folder, mistakes, kills; and inside a study."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_factory import make_record
from tiny_recipe import SEED, assert_one_message, environment, invoke, no_training, rows_of
from tiny_recipe import write_recipe as write_tiny
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvdistill.cli.tables import evaluation_table
from kvdistill.core.config import make_options
from kvdistill.core.errors import RecipeError
from kvdistill.data.tokenizers import character_tokenizer
from kvdistill.stages.evaluate.command import ModelOptions
from kvdistill.stages.evaluate.stage import report_rows

KILLED = """
import os, signal
from kvdistill.cli.app import main
from kvdistill.stages.evaluate.book import AnswerBook
real, left = AnswerBook.append, [3]
def append(book, rows):
    real(book, rows)
    left[0] -= 1
    if not left[0]:
        with open(book.folder / "records.jsonl", "a") as file:
            file.write('{"evaluation": "ce')
        os.kill(os.getpid(), signal.SIGKILL)
AnswerBook.append = append
main()
"""
TEXT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ#\n()'\",.?答案："


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model in a folder, as save_pretrained leaves it."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def save_model(folder: Path, seed: int = 0) -> Path:
    letters = character_tokenizer(TEXT)
    config = Qwen2Config(
        vocab_size=len(letters), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    letters.save_pretrained(folder)
    return folder


@pytest.fixture
def no_model(monkeypatch) -> None:
    """A mistake must be found before the weights are loaded."""

    def load(*words: Any, **settings: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr("kvdistill.stages.evaluate.command.load_model", load)


def words(data_root: Path, out: Path, *more: object) -> list[object]:
    return [f"data.root={data_root}", "--out", out, "--limit", 2, "evaluate.max_new_tokens=3", *more]


def records_of(out: Path) -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(out / "records.jsonl")]
    return sorted(rows, key=lambda row: (row["evaluation"], row["task"], row["number"]))


# -- what it does -------------------------------------------------------------------------------------------


def test_a_table_records_and_results(model, data_root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    tasks = "math500,ceval,truthfulqa,strategyqa"
    answer = invoke(monkeypatch, "evaluate", model, "--tasks", tasks, *words(data_root, out))
    assert answer.code == 0, answer
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 100 and f"folder: {out}" in lines
    for name in (*tasks.split(","), "mean of 4", "truthfulqa_mc1"):
        assert any(line.split("  ")[0].strip() == name for line in lines), (name, answer.out)
    assert "truthfulqa is scored by truthfulqa_mc2" in lines
    assert any("answers of at most 3 tokens" in line for line in lines)
    rows = records_of(out)
    assert len(rows) == 2 + 2 * 8 + 4 + 2 and all(row["tokens_in"] > 0 for row in rows)
    assert {row["truncated"] for row in rows} == {True, False}  # a window of 512 characters
    assert sorted(path.name for path in out.iterdir()) == [".lock", "identity.json", "records.jsonl", "results.json"]
    assert str(model) not in (out / "identity.json").read_text() + (out / "records.jsonl").read_text()


def test_the_same_again_loads_no_model_and_json_is_one_object(model, data_root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = invoke(monkeypatch, "evaluate", model, "--tasks", "ceval", *words(data_root, out), "--json")
    assert first.err == ""
    said = json.loads(first.out)
    assert said["folder"] == str(out) and said["evaluations"] == json.loads((out / "results.json").read_text())
    assert said["evaluations"]["evaluations"]["ceval"]["questions"] == 16
    monkeypatch.setattr("kvdistill.stages.evaluate.command.load_model", None)
    again = invoke(monkeypatch, "evaluate", model, "--tasks", "ceval", *words(data_root, out), "--json")
    assert json.loads(again.out) == said


def test_multiple_choice_by_generation_and_chat(model, data_root, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    talking = tmp_path / "talking"
    save_model(talking)
    tokenizer = AutoTokenizer.from_pretrained(talking)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(talking)
    more = ("--choice", "generation", "--chat", "--num-fewshot", 1, "data.system_prompt=Brief.")
    asked = words(data_root, tmp_path / "o", *more)
    answer = invoke(monkeypatch, "evaluate", talking, "--tasks", "ceval,math500", *asked)
    assert answer.code == 0, answer
    rows = records_of(tmp_path / "o")
    assert {(row["mode"], row["style"]) for row in rows} == {("generation", "chat-1")}
    options = json.loads((tmp_path / "o" / "identity.json").read_text())["evaluations"]["ceval"]["options"]
    assert options["chat"] is True and options["system_prompt"] == "Brief."


def test_a_killed_command_goes_on(model, data_root, tmp_path, monkeypatch):
    """kill -9 in the middle of writing: half a line is left, and the same command makes the same records."""
    asked = ["--tasks", "ceval,strategyqa", f"data.root={data_root}", "--limit", "4", "evaluate.max_new_tokens=3",
             "evaluate.batch_size=5"]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert invoke(monkeypatch, "evaluate", model, *asked, "--out", whole).code == 0
    command = [sys.executable, "-c", KILLED, "evaluate", str(model), *asked, "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "results.json").exists() and 0 < len((out / "records.jsonl").read_text().splitlines()) < 36
    assert invoke(monkeypatch, "evaluate", model, *asked, "--out", out).code == 0
    assert records_of(out) == records_of(whole)


def test_the_model_of_a_run_knows_its_own_test_split(data_root, tmp_path, monkeypatch):
    """`own` and the names of the run's tasks; answers are those of the stage, and lie beside the model."""
    recipe = write_tiny(tmp_path, teachers=[], arms={"ce": {"teachers": []}})
    assert invoke(monkeypatch, "run", recipe).code == 0
    folder = tmp_path / "run" / "arms" / "ce" / f"seed-{SEED}"
    answer = invoke(monkeypatch, "evaluate", folder / "model", "--tasks", "own,chain,own:product", "--json")
    assert answer.code == 0, answer
    found = json.loads(answer.out)["evaluations"]["evaluations"]
    assert list(found) == ["own", "chain", "own:product"] and (folder / "evaluations" / "results.json").exists()
    stage = {(row["task"], row["id"]): row for row in rows_of(folder / "records.jsonl")}
    ours = [row for row in records_of(folder / "evaluations") if row["evaluation"] == "own"]
    assert len(ours) == len(stage) == 32
    for row in ours:
        theirs = stage[row["task"], row["id"]]
        assert {**row, "arm": "ce", "seed": SEED} == {k: v for k, v in theirs.items() if k != "seconds"}
    answer = invoke(monkeypatch, "evaluate", folder / "model", "--tasks", "own:chian")
    assert_one_message(answer, "no test split 'own:chian'", "own:chain, own:product")


def test_a_student_that_answers_directly_is_asked_and_scored_as_its_study_does(tmp_path, monkeypatch):
    direct = {"teachers": [], "reasoning": "none"}
    recipe = write_tiny(tmp_path, teachers=[], arms={"direct": direct, "ce": {"teachers": []}})
    assert invoke(monkeypatch, "run", recipe).code == 0
    for arm, has_reasoning in (("direct", False), ("ce", True)):
        folder = tmp_path / "run" / "arms" / arm / f"seed-{SEED}"
        assert invoke(monkeypatch, "evaluate", folder / "model", "--tasks", "own").code == 0
        stage = {(row["task"], row["id"]): row for row in rows_of(folder / "records.jsonl")}
        for row in records_of(folder / "evaluations"):
            theirs = stage[row["task"], row["id"]]
            assert (row["nll"], row["nll_reasoning"]) == (theirs["nll"], theirs["nll_reasoning"])
            assert bool(row["nll_reasoning"]) is has_reasoning


def test_the_default_folder_is_of_the_models_name(model, data_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ("--tasks", "ceval", f"data.root={data_root}", "--limit", 1)
    assert invoke(monkeypatch, "evaluate", model, *asked).code == 0
    assert (tmp_path / "runs" / "evaluations" / "tiny" / "results.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (["--tasks", "gsm8k,bhb"], ["unknown evaluation", "'bbh'", "--tasks"]),
        ([], ["no evaluation is named", "--tasks"]),
        (["--tasks", "own"], ["in no run folder"]),
        (["--tasks", "gpqa"], ["gpqa", "data.root", "hub"]),
        (["--tasks", "gsm8k", "data.root=/no/such/folder"], ["/no/such/folder", "data.root"]),
        (["--tasks", "ceval", "evalute.limit=3"], ["unknown key 'evalute'", "'evaluate'"]),
        (["--tasks", "ceval", "evaluate.batchsize=3"], ["'evaluate.batchsize'", "'batch_size'"]),
        (["--tasks", "ceval", "student.dtype=bfloat16"], ["unknown key 'student'", "dtype"]),
        (["--tasks", "ceval", "dtype=float8"], ["dtype", "float8"]),
        (["--tasks", "ceval", "--limit", 0], ["limit"]),
        (["--tasks", "ceval", "--choice", "guess"], ["choice", "guess"]),
        (["--tasks", "ceval", "--num-fewshot", 9], ["5 examples", "9 were asked for"]),
        (["--tasks", "ceval", "--chat"], ["no chat template", "--chat"]),
        (["--tasks", "ceval", "data.system_prompt=x"], ["system prompt", "--chat"]),
        (["--tasks", "ceval", "--arm", "ce"], ["--arm and --seed go with a recipe"]),
        (["--tasks", "ceval", "novalue"], ["key=value"]),
    ],
)
def test_mistakes_before_the_model_is_loaded(model, data_root, tmp_path, monkeypatch, no_model, asked, parts):
    root = [] if any(str(word).startswith("data.root") for word in asked) else [f"data.root={data_root}"]
    answer = invoke(monkeypatch, "evaluate", model, *asked, *root, "--out", tmp_path / "out")
    assert_one_message(answer, *parts)
    assert not (tmp_path / "out").exists()


def test_a_recipe_and_a_model_have_flags_of_their_own(tmp_path, monkeypatch):
    recipe = write_tiny(tmp_path)
    assert_one_message(invoke(monkeypatch, "evaluate", recipe, "--tasks", "gsm8k"), "go with a model", "evaluate.tasks")
    answer = invoke(monkeypatch, "evaluate", tmp_path / "tinny.yaml")
    assert_one_message(answer, "recipe not found", "/tiny.yaml'")


@pytest.mark.parametrize("wrong", ["missing", "empty", "pickled", "no tokenizer", "small vocabulary"])
def test_models_that_cannot_be_evaluated(model, data_root, tmp_path, monkeypatch, no_model, wrong):
    folder, parts = tmp_path / "model", ["model.path", "hub id"]
    if wrong == "empty":
        folder.mkdir()
        parts = ["no config.json"]
    elif wrong != "missing":
        save_model(folder, seed=1)
    if wrong == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        parts = ["never loaded", "safetensors"]
    elif wrong == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
        parts = ["tokenizer"]
    elif wrong == "small vocabulary":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
        parts = ["9 token embeddings"]
    asked = ["--tasks", "ceval", *words(data_root, tmp_path / "out")]
    assert_one_message(invoke(monkeypatch, "evaluate", folder, *asked), *parts)


def test_answers_of_other_weights_are_not_mixed(model, data_root, tmp_path, monkeypatch):
    asked = ["--tasks", "ceval", *words(data_root, tmp_path / "out")]
    assert invoke(monkeypatch, "evaluate", model, *asked).code == 0
    monkeypatch.setattr("kvdistill.stages.evaluate.command.load_model", None)
    other = save_model(tmp_path / "other", seed=1)
    answer = invoke(monkeypatch, "evaluate", other, *asked)
    assert_one_message(answer, "answers to something else", "model.model.sha256", "--out")


def test_options_know_the_nearest_key():
    made = make_options(ModelOptions, ["evaluate.batch_size=3", "data.root=x", "dtype=bfloat16"])
    assert (made.evaluate.batch_size, made.data.root, made.dtype) == (3, "x", "bfloat16")
    with pytest.raises(RecipeError, match="system_prompt"):
        make_options(ModelOptions, ["data.system_promt=x"])


def test_names_from_data_cannot_break_the_terminal():
    figures = {"questions": 1, "score": 1.0, "stderr": None, "mode": "generation", "style": "cot", "metric": None}
    figures |= dict.fromkeys(("tokens_in", "tokens_out", "forward_passes", "seconds", "truncated", "unspelled"))
    found = figures | {"metrics": {}, "members": {}, "notes": [], "complete": True}
    name = "\x1b[31mown\n" * 9
    table = evaluation_table({"evaluations": {name: found}, "macro_average": 1.0, "in_macro_average": [name]})
    assert all(line.isprintable() and len(line) <= 100 for line in table) and "\\x1b" in table[1]


# -- in a study -----------------------------------------------------------------------------------------------


def test_a_study_evaluates_its_students_publicly(data_root, tmp_path, monkeypatch):
    """Records of the recipe's evaluations stand beside those of the own test split; the page counts them as tasks."""
    public = {"tasks": ["truthfulqa", "ceval", "math500"], "limit": 2, "max_new_tokens": 4}
    arms = {"ce": {"teachers": []}, "single": {"teachers": []}}
    recipe = write_tiny(tmp_path, teachers=[], arms=arms, evaluate=public, data={"root": str(data_root)})
    assert invoke(monkeypatch, "run", recipe).code == 0
    run = tmp_path / "run"
    by_arm = {arm: rows_of(run / "arms" / arm / f"seed-{SEED}" / "records.jsonl") for arm in ("ce", "single")}
    for arm, rows in by_arm.items():
        tasks = [row["task"] for row in rows]
        assert {task: tasks.count(task) for task in tasks} == {
            "chain": 2, "product": 2, "truthfulqa": 2, "ceval": 16, "math500": 2}  # fmt: skip
        assert all(row["arm"] == arm and row["seed"] == SEED and row["nll"] > 0 for row in rows)
        mass = [row["score"] for row in rows if row["task"] == "truthfulqa"]
        assert all(0 < share < 1 for share in mass)
    first, second = ([row["prompt_hash"] for row in rows] for rows in by_arm.values())
    assert first == second
    summary = json.loads((run / "summary.json").read_text())
    assert "ceval" in (run / "report.html").read_text()
    own = {row["task"]: [] for row in by_arm["ce"]}
    for row in by_arm["ce"]:
        own[row["task"]].append(row.get("score", row["correct"]))
    macro = sum(sum(found) / len(found) for found in own.values()) / len(own)
    assert summary["arms"]["ce"]["mean"] == pytest.approx(macro)


@pytest.mark.parametrize("name", ["gsm8", "gpqa"])
def test_a_study_finds_mistakes_in_its_evaluations_before_training(data_root, tmp_path, monkeypatch, name):
    recipe = write_tiny(tmp_path, data={"root": str(data_root)}, evaluate={"tasks": [name]})
    answer = invoke(monkeypatch, "run", recipe, work=no_training)
    assert_one_message(answer, "'gsm8k'" if name == "gsm8" else "gpqa")


def test_names_of_training_tasks_stay_theirs_in_the_records():
    row = make_record(evaluation="gsm8k", task="gsm8k", id="3", style="fewshot-5")
    chat, many = replace(row, style="chat-5"), replace(row, evaluation="bbh", task="bbh_navigate")
    exams: Any = {"gsm8k": [None], "bbh": [None, None]}
    named = report_rows([row, chat, many], exams, {"gsm8k"})
    assert [one.task for one in named] == ["gsm8k (5-shot)", "gsm8k (5-shot, chat)", "bbh"]
    assert [one.id for one in named] == ["3", "3", "bbh_navigate/3"]
