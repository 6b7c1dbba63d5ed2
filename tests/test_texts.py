"""Arms that read more texts: what teachers studied, and what they write (or what is put into their mouths)."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_recipe import (
    SEED,
    assert_one_message,
    copy_base,
    invoke,
    made_ready,
    run_jobs_here,
    tiny_recipe,
    tiny_tree,
    write_recipe,
)

from kvdistill.arms.costs import all_sharers
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.lessons import SOLUTIONS, RowsBehind, written_beside
from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import make_recipe
from kvdistill.core.costs import amortised
from kvdistill.core.errors import DataError, RecipeError, RunFolderError
from kvdistill.core.files import read_json_lines, sha256_file
from kvdistill.core.layout import written_folder, written_mark
from kvdistill.core.marks import check_marked, read_mark
from kvdistill.core.progress import silent
from kvdistill.core.recipe import ParityRecipe
from kvdistill.data.encode import Example
from kvdistill.data.grading import is_correct
from kvdistill.data.tables import read_table
from kvdistill.models import batch_geometry, forward_flops
from kvdistill.models.generate import Answer, Rows, Sampled, generate_greedy
from kvdistill.stages import write as stage
from kvdistill.stages.report.compare import SeedRun, _ledger_refusals
from kvdistill.stages.train import train_student
from kvdistill.stages.write import ANSWERS, asked_numbers, solution_row, write
from kvdistill.study.folder import claimed, difference
from kvdistill.study.plan import plan
from kvdistill.study.rehearse import dry_run

TASKS = [
    {"name": "chain", "train": 24, "val": 9, "test": 10, "teach": 20},
    {"name": "product", "train": 24, "val": 9, "test": 10, "teach": 14},
]
ARMS: dict[str, dict[str, Any]] = {
    "ce": {"teachers": []},
    "fixed": {},
    "data": {"teachers": [], "texts": "teachers"},
    "data-of-one": {"teachers": [], "texts": "teachers", "texts_from": ["one"]},
    "seq-kd": {"teachers": [], "texts": "written"},
    "seq-kd-one": {"teachers": [], "texts": "written", "texts_from": ["one"]},
}
CHANGES: dict[str, Any] = {"arms": ARMS, "data": {"tasks": TASKS}, "write": {"batch_size": 5}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and teachers; nothing is written yet."""
    run = tmp_path_factory.mktemp("texts") / "run"
    made_ready(tiny_recipe(run, **CHANGES), run, "teach")
    return run


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "run")
    path = tmp_path / "run" / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_dir": str(tmp_path / "run")}))
    return tmp_path / "run"


def experiment(run: Path, **changes: Any) -> Experiment:
    return Experiment(tiny_recipe(run, **{**CHANGES, **changes}), run)


class Speaker:
    """In the place of a teacher's generation: says what `says` makes of a question and the number of its try."""

    def __init__(self, questions: Sequence[Example], says: Any) -> None:
        self._by_prompt = {tuple(one.prompt_ids): one for one in questions}
        self._says, self._tries = says, Counter[tuple[int, ...]]()

    def __call__(self, model: Any, prompts: Any, tokenizer: Any, **options: Any) -> list[Answer]:
        made = []
        for prompt in map(tuple, prompts):
            text = self._says(self._by_prompt[prompt], self._tries[prompt])
            self._tries[prompt] += 1
            ids = tokenizer.encode(text, add_special_tokens=False)
            made.append(Answer(text, ids, len(ids) + 1))
        return made


def spoken(monkeypatch: pytest.MonkeyPatch, setting: Experiment, says: Any) -> None:
    questions = setting.split(setting.recipe.write.questions)
    monkeypatch.setattr(stage, "generate_greedy", Speaker(questions, says))


def gold(question: Example, attempt: int) -> str:
    return f"{question.reasoning}={question.answer}"


# -- the teachers' own data as plain text ---------------------------------------------------------------


def test_the_teachers_data_stand_behind_the_training_problems(run):
    setting = experiment(run)
    own, teach = setting.split("train"), setting.split("teach")
    lessons = setting.arm("data", SEED).lessons
    assert list(lessons[: len(own)]) == list(own) and [*lessons[len(own) :]] == [*teach]
    of_one = setting.arm("data-of-one", SEED).lessons
    assert [*of_one[len(own) :]] == [row for row in teach if row.task == "chain"] and len(of_one) == 48 + 20
    assert setting.arm("ce", SEED).lessons is own and of_one[-1] == of_one[len(of_one) - 1]
    with pytest.raises(IndexError):
        _ = of_one[len(of_one)]
    assert not set(map(question, own)) & set(map(question, teach))


def question(row: Example) -> str:
    return row.doc_hash


def test_the_order_is_a_function_of_seed_examples_and_steps_and_the_batch_is_the_arms(run):
    setting = experiment(run)
    arms = {name: setting.arm(name, SEED) for name in ("ce", "data", "data-of-one")}
    orders = {name: arm.training_order() for name, arm in arms.items()}
    assert {len(order) for order in orders.values()} == {6 * 8}
    assert (
        orders["data"] == setting.arm("data", SEED).training_order() != setting.arm("data", SEED + 1).training_order()
    )
    assert sorted(arms["data"].training_order(11)[: 48 + 34]) == list(range(48 + 34)), "each once before any twice"
    batch = arms["data"].batches("train")([3, 47, 48, 81])
    expected = [arms["data"].lessons[i].input_ids for i in (3, 47, 48, 81)]
    assert [row[: len(ids)] for row, ids in zip(batch.input_ids_BT.tolist(), expected, strict=True)] == expected


def test_such_an_arm_costs_as_many_steps_and_may_be_compared_with_plain_training(run):
    ledgers = {}
    for name in ("ce", "data"):
        arm = experiment(run).arm(name, SEED)
        train_student(arm)
        ledgers[name] = json.loads((arm.folder / "ledger.json").read_text())
    assert ledgers["data"]["texts"] == {"texts": "teachers", "from": ["one", "two"], "own": 48, "beside": 34}
    assert "texts" not in ledgers["ce"] and ledgers["data"]["flops"]["teachers"] == {}
    assert ledgers["ce"]["optimiser_steps"] == ledgers["data"]["optimiser_steps"]
    assert ledgers["ce"]["order_fingerprint"] != ledgers["data"]["order_fingerprint"]
    far = {**ledgers["data"], "tokens_nonpadding": 2 * ledgers["ce"]["tokens_nonpadding"]}

    def reasons(other):
        runs = [SeedRun((), (), (), *(np.zeros(0) for _ in range(3)), ledger=one) for one in (ledgers["ce"], other)]
        return _ledger_refusals(*runs, ParityRecipe())

    assert reasons(far) == []
    assert any("data order" in why for why in reasons({**far, "texts": None}))
    assert any("steps" in why for why in reasons({**far, "optimiser_steps": 12}))


# -- what teachers write ----------------------------------------------------------------------------------


def test_teachers_are_asked_what_they_were_trained_on_and_only_what_is_asked_for(run):
    setting = experiment(run)
    teach = setting.split("teach")
    for name, task, number in (("one", "chain", 20), ("two", "product", 14)):
        numbers = asked_numbers(setting.teachers[name])
        assert len(numbers) == number and {teach[i].task for i in numbers} == {task}
    few = experiment(run, write={"limit": 3})
    assert [len(asked_numbers(few.teachers[name])) for name in ("one", "two")] == [3, 3]
    own = experiment(run, write={"questions": "train"}).teachers["two"]
    assert [own.experiment.split("train")[i].task for i in asked_numbers(own)] == ["product"] * 24


def test_only_right_answers_are_kept_each_in_the_form_of_its_task(run, monkeypatch):
    setting = experiment(run, write={"per_question": 3, "temperature": 1.0, "batch_size": 5})
    teach = [*setting.split("teach")]

    def says(asked: Example, attempt: int) -> str:
        number = teach.index(asked)
        if attempt == 0:
            return gold(asked, 0)
        if attempt == 1:  # right by the rule, in other words
            return f" {asked.reasoning},{asked.answer} = {int(asked.answer)}.0" if number % 2 else gold(asked, 0)
        return (f"={asked.answer}", f"{asked.reasoning}={int(asked.answer) + 1}", asked.answer)[number % 3]

    spoken(monkeypatch, setting, says)
    write(setting.teachers["one"])
    folder = written_folder(run, "one")
    said = read_mark(written_mark(folder))
    assert said is not None
    check_marked(written_mark(folder), fix="none")
    chain = [row for row in teach if row.task == "chain"]
    odd = sum(teach.index(row) % 2 for row in chain)
    bare = sum(teach.index(row) % 3 == 0 for row in chain)
    assert {key: said[key] for key in ("questions", "answers", "right", "repeated", "without_reasoning", "kept")} == {
        "questions": 20,
        "answers": 60,
        "right": 40 + bare,
        "repeated": 20 - odd,
        "without_reasoning": bare,
        "kept": 20 + odd,
    }
    kept = read_table(folder / SOLUTIONS, said["files"][SOLUTIONS]["sha256"])
    by_hash = {row.doc_hash: row for row in chain}
    for row in kept:
        asked = by_hash[row.doc_hash]
        text = setting.tokenizer.decode(row.input_ids, skip_special_tokens=True)
        assert text.startswith(asked.prompt) and is_correct("chain", text.removeprefix(asked.prompt), asked.answer)
        assert text == f"{asked.prompt}{row.reasoning}={asked.answer}" and row.prompt_ids == asked.prompt_ids
        assert row.reasoning in (asked.reasoning, f"{asked.reasoning},{asked.answer}")
    assert Counter(row.reasoning == by_hash[row.doc_hash].reasoning for row in kept) == {True: 20, False: odd}
    lines = read_json_lines(folder / ANSWERS)[1:]
    lengths = [teach[one["row"]].num_prompt_tokens + one["tokens"] - 1 for one in lines]
    assert said["tokens"] == sum(one["tokens"] for one in lines)
    assert said["flops"] == forward_flops(setting.teachers["one"].shape, *batch_geometry(lengths))


def test_a_solution_is_cut_at_the_mark_of_its_task_and_its_answer_is_the_gold_one():
    def asked(task: str, answer: str, style: str = "cot") -> Example:
        return Example(task, "7", style, "", answer, [], [], "", "", "", "en", "How many?")

    row = solution_row(asked("gsm8k", "1200"), " He has 12 * 100 = <<12*100=1200>>1200.\n#### 1,200 coins")
    assert row is not None and row.completion == " He has 12 * 100 = <<12*100=1200>>1200. #### 1200"
    row = solution_row(asked("math", "\\frac{1}{2}"), "So it is $\\boxed{\\frac12}$.")
    assert row is not None and row.completion == " So it is $\\boxed{\\frac12}$. #### \\frac{1}{2}"
    assert solution_row(asked("gsm8k", "12"), "#### 12") is None
    row = solution_row(asked("gsm8k", "12", "direct"), "#### 12")
    assert row is not None and row.completion == " #### 12"


def test_what_several_write_alike_is_read_once_and_the_arm_counts_what_it_cost(run, monkeypatch):
    setting = experiment(run)
    spoken(monkeypatch, setting, gold)
    for name in ("one", "two"):
        write(setting.teachers[name])
    rows = written_beside(setting, ["one", "two"], range(48))
    assert [*rows] == [*setting.split("teach")], "right to the letter: what the data says"
    assert len(written_beside(setting, ["one", "one"], range(48))) == 20
    arm = setting.arm("seq-kd", SEED)
    train_student(arm)
    ledger = json.loads((arm.folder / "ledger.json").read_text())
    facts = {name: read_mark(written_mark(written_folder(run, name))) for name in ("one", "two")}
    assert ledger["texts"]["beside"] == 34 and ledger["texts"]["written"]["two"]["kept"] == 14
    assert ledger["flops"]["generation"] == {name: said["flops"] for name, said in facts.items() if said}
    sharers = all_sharers(setting)
    shared = amortised("generation", ledger["flops"], ledger["shared"], sharers)
    assert shared == {"one": facts["one"]["flops"] / 2, "two": facts["two"]["flops"]}
    other = experiment(run, write={"questions": "train"})
    spoken(monkeypatch, other, gold)
    shutil.rmtree(run / "written")
    write(other.teachers["one"])
    assert len(written_beside(other, ["one"], range(48))) == 0, "it stands in the training problems already"


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_killed_writing_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, temperature):
    per_question = 2 if temperature else 1
    changes = {"write": {"batch_size": 7, "temperature": temperature, "per_question": per_question}}
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    write(experiment(whole, **changes).teachers["one"])
    folder = written_folder(run, "one")
    calls = Counter[str]()

    def killed(*args: Any, **options: Any) -> Any:
        calls["made"] += 1
        if calls["made"] == 3:
            raise KeyboardInterrupt
        return generate_greedy(*args, **options)

    monkeypatch.setattr(stage, "generate_greedy", killed)
    with pytest.raises(KeyboardInterrupt):
        write(experiment(run, **changes).teachers["one"])
    lines = (folder / ANSWERS).read_bytes().splitlines(keepends=True)
    assert len(lines) == 15 and not written_mark(folder).exists()
    (folder / ANSWERS).write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])  # torn, in the second batch
    write(experiment(run, **changes).teachers["one"])
    assert calls["made"] == 3 + -(-(20 * per_question - 7) // 7)
    for name in (ANSWERS, SOLUTIONS, "written.json"):
        assert sha256_file(folder / name) == sha256_file(written_folder(whole, "one") / name), name
    write(experiment(run, **changes).teachers["one"])
    assert calls["made"] == 3 + -(-(20 * per_question - 7) // 7), "what is done is not done again"
    if temperature:
        texts = Counter(one["row"] for one in read_json_lines(folder / ANSWERS)[1:])
        assert set(texts.values()) == {2}
        pairs = read_json_lines(folder / ANSWERS)[1:]
        assert any(a["text"] != b["text"] for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_answers_of_another_writing_are_not_taken(run):
    write(experiment(run).teachers["one"])
    folder = written_folder(run, "one")
    before = (folder / ANSWERS).read_bytes()
    written_mark(folder).unlink()
    write(experiment(run, write={"batch_size": 5, "temperature": 2.0}).teachers["one"])
    assert (folder / ANSWERS).read_bytes() != before


def test_sampled_rows_are_drawn_from_the_models_distribution_each_from_its_own_seed():
    model, temperature = tiny_model("llama"), 0.7
    prompt = [5, 9, 2]

    class Tokenizer:
        eos_token_id, pad_token_id = 36, 0

        def decode(self, ids: Any, **options: Any) -> str:
            return " ".join(map(str, ids))

    def drawn(seeds: list[int], **options: Any) -> list[Answer]:
        return generate_greedy(
            model,
            [prompt] * len(seeds),
            Tokenizer(),
            max_new_tokens=2,
            rows=Rows(256),
            draw=lambda chosen: Sampled(temperature, [seeds[i] for i in chosen]),
            **options,
        )

    answers = drawn([*range(4000)])
    with torch.no_grad():
        shares = (model(torch.tensor([prompt])).logits[0, -1].float() / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([(one.ids or [36])[0] for one in answers]), minlength=37)
    spread = (4000 * shares * (1 - shares)).sqrt()
    assert bool(((counts - 4000 * shares).abs() <= 4.5 * spread + 1).all())
    assert [one.ids for one in drawn([17, 4, 2011])] == [answers[i].ids for i in (17, 4, 2011)]
    for seed in range(5):  # by hand, a token at a time
        generator, ids = torch.Generator().manual_seed(seed), list(prompt)
        for _ in range(2):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            gumbel = -torch.empty(37).exponential_(generator=generator).log()
            ids.append(int((logits / temperature + gumbel).argmax()))
        new = ids[3:]
        assert answers[seed].ids == (new[: new.index(36)] if 36 in new else new)


# -- a study --------------------------------------------------------------------------------------------


def test_a_study_writes_before_it_trains_and_nothing_waits_that_need_not(run):
    recipe = tiny_recipe(run, **CHANGES)
    jobs = {job.id: job for job in plan(recipe, run)}
    assert {"write:one", "write:two"} <= {*jobs["train:seq-kd:7"].after}
    assert {"write:one"} == {*jobs["train:seq-kd-one:7"].after} & {"write:one", "write:two"}
    for arm in ("ce", "fixed", "data"):
        assert not any(other.startswith("write") for other in jobs[f"train:{arm}:7"].after)
    assert not any(job.verb == "write" for job in plan(tiny_recipe(run, **{**CHANGES, "arms": {"ce": {}}}), run))
    only = [job.id for job in plan(recipe, run, ("write",), before=False) if job.verb != "check"]
    assert only == ["write:one", "write:two"]


def test_a_whole_study_ends_with_a_page_though_the_teachers_write_nothing_right(run):
    arms = {name: ARMS[name] for name in ("ce", "seq-kd", "data")}
    recipe = tiny_recipe(run, **{**CHANGES, "arms": arms, "report": {"comparisons": [["seq-kd", "ce"]]}})
    with claimed(recipe, run):
        run_jobs_here(recipe, plan(recipe, run), None)
    ledger = json.loads((run / "arms" / "seq-kd" / "seed-7" / "ledger.json").read_text())
    said = {name: one["kept"] for name, one in ledger["texts"]["written"].items()}
    assert ledger["texts"]["beside"] <= sum(said.values()) and (run / "report.html").exists()
    other = tiny_recipe(run, **{**CHANGES, "arms": arms, "write": {"limit": 2}})
    theirs = json.loads((run / "recipe.json").read_text())
    assert difference(theirs, recipe, run) is None
    assert difference(theirs, other, run) is not None
    without = tiny_recipe(run, **{**CHANGES, "arms": {"ce": ARMS["ce"]}, "write": {"limit": 2}})
    assert difference(theirs, without, run) is None


def test_the_command_says_what_was_written_and_a_rehearsal_writes_too(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, **CHANGES)
    for verb in ("prepare", "teach"):
        assert invoke(monkeypatch, verb, path).code == 0
    answer = invoke(monkeypatch, "write", path)
    assert answer.code == 0 and re.search(r"one: 20 solutions of 20 questions, \d+ right", answer.out), answer
    assert_one_message(invoke(monkeypatch, "write", write_recipe(tmp_path)), "no arm reads what teachers write")
    arms = {name: ARMS[name] for name in ("seq-kd", "data")} | {"untrained": {"control": "untrained"}}
    found = dry_run(tiny_recipe(tmp_path / "rehearsed", **{**CHANGES, "arms": arms}), silent)
    assert {"write one", "capture two~untrained", "train seq-kd 7", "evaluate data 7"} <= {*found["rehearsed"]}


# -- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"x": {"texts": "written"}}}, "captured on the training problems alone"),
        ({"arms": {"x": {"texts": "teachers"}}}, "captured on the training problems alone"),
        ({"arms": {"x": {"teachers": [], "texts": "theirs"}}}, "texts: Input should be 'own'"),
        ({"arms": {"x": {"teachers": [], "texts_from": ["one"]}}}, "texts is own"),
        ({"arms": {"x": {"teachers": [], "texts": "written", "texts_from": ["onne"]}}}, "did you mean 'one'?"),
        ({"arms": {"x": {"teachers": [], "texts": "written", "texts_from": []}}}, "no teacher to write anything"),
        ({"arms": {"x": {"teachers": [], "texts": "written", "control": "noise"}}}, "learns nothing from any"),
        ({"arms": {"x": {"teachers": [], "texts": "teachers"}}, "data": {}}, "no `teach` problems of chain, product"),
        ({"arms": {"x": {"teachers": [], "texts": "written"}}, "data": {}}, "or write.questions: train"),
        ({"write": {"per_question": 2}}, "set temperature, or per_question: 1"),
        ({"write": {"temperature": -1}}, "write.temperature"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(changes, words):
    tree = tiny_tree(**{"data": {"tasks": TASKS}, **changes})
    with pytest.raises(RecipeError) as caught:
        make_recipe(tree)
    assert words in str(caught.value), caught.value


def test_published_teachers_may_write_but_what_they_studied_is_not_at_hand(tmp_path):
    tree = tiny_tree(data={"tasks": TASKS}, arms={"x": {"teachers": [], "texts": "teachers"}})
    tree["teachers"][0] = {"name": "one", "path": "Qwen/Qwen2.5-0.5B"}
    recipe = make_recipe(tree)
    assert arm_recipe(recipe, "x").texts_from == ["two"], "by default all whose data is at hand"
    tree["arms"]["x"]["texts_from"] = ["one", "two"]
    with pytest.raises(RecipeError, match="not at hand of one, which is published"):
        make_recipe(tree)
    tree["arms"]["x"] = {"teachers": [], "texts": "written"}
    assert arm_recipe(make_recipe(tree), "x").texts_from == ["one", "two"]
    tree["arms"]["x"] = {"teachers": [], "texts": "teachers"}
    tree["teachers"] = tree["teachers"][:1]
    with pytest.raises(RecipeError, match="published teachers, which all are"):
        make_recipe(tree)


def test_what_was_not_written_or_is_not_there_is_named(run):
    setting = experiment(run)
    with pytest.raises(RunFolderError, match="kvdistill write"):
        _ = setting.arm("seq-kd", SEED).lessons
    plain = copy_base(run.parent / "plain")
    bare = Experiment(tiny_recipe(plain, arms={"ce": {"teachers": []}}), plain)
    with pytest.raises(DataError, match="no `teach` problems of chain"):
        from kvdistill.arms.lessons import studied_beside

        studied_beside(bare, ["one"])
    assert len(RowsBehind([], [])) == 0
