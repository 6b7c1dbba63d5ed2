"""SVAMP, StrategyQA, Math23K, MATH, ARC-Challenge and HotpotQA: every published row, layouts, broken copies."""

from __future__ import annotations

import ast
import json
import operator
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from kvdistill.core.config import make_recipe
from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe
from kvdistill.data import sources
from kvdistill.data.answers.latex import fold_latex
from kvdistill.data.grading import check_answers
from kvdistill.data.leaks import find_leaks
from kvdistill.data.problems import Problem
from kvdistill.data.sets import TASKS, arc_challenge, hotpotqa, math, math23k, strategyqa, svamp
from kvdistill.data.sources import RawRow, read_rows
from kvdistill.data.splits import load_splits
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.stages.prepare import prepare

pytestmark = pytest.mark.slow

NEW = ("svamp", "strategyqa", "math23k", "math", "arc_challenge", "hotpotqa")
# file -> reader, rows. No row of any of them is refused.
FILES: dict[str, tuple[Callable[[RawRow, str], Problem], int]] = {
    "svamp/SVAMP.json": (svamp.read_row, 1000),
    "svamp/qwen_eval_test.jsonl": (svamp.read_row, 1000),
    "strategyqa/train.json": (strategyqa.read_row, 2061),
    "strategyqa/dev.json": (strategyqa.read_row, 229),
    "math23k/math23k_test.json": (math23k.read_row, 1000),
    "math23k/mwptoolkit_testset.json": (math23k.read_row, 2317),
    "math23k/mwptoolkit_validset.json": (math23k.read_row, 2316),
    "math/test_first1000.jsonl": (math.read_row, 1000),
    "math500/test.jsonl": (math.read_row, 500),
    "arc_challenge/train_subset.jsonl": (arc_challenge.read_row, 1056),
    "arc_challenge/test.jsonl": (arc_challenge.read_row, 1172),
    "arc_challenge/hf_validation": (arc_challenge.read_row, 299),
    "hotpotqa/dev_v1_simplified.json": (hotpotqa.read_row, 7405),
    "hotpotqa/dev_distractor_v1_first103.json": (hotpotqa.read_row, 103),
    "hotpotqa/distractor_hub_schema_first100.json": (hotpotqa.read_row, 100),
}


def _data(*tasks: dict[str, Any], **section: Any) -> DataRecipe:
    return DataRecipe.model_validate({"tasks": list(tasks), **section})


def _problems(root: Path, file: str) -> list[Problem]:
    read, _ = FILES[file]
    return [read(row, str(row.number)) for row in read_rows(root / file, place="data.root")]


def _wrong(problem: Problem) -> str:
    """An answer that nobody could take for the gold one."""
    if problem.task == "arc_challenge":
        return {"A": "B", "B": "C", "C": "D", "D": "E", "E": "A"}[problem.answer]
    if problem.task == "strategyqa":
        return {"yes": "no", "no": "yes"}[problem.answer]
    return f"{problem.answer} + 17" if problem.task == "math" else f"{problem.answer}1"


@pytest.mark.parametrize("file", FILES)
def test_every_published_row_parses_its_gold_is_right_and_another_answer_is_not(data_root: Path, file: str) -> None:
    problems = _problems(data_root, file)
    assert len(problems) == FILES[file][1]
    task, rules = problems[0].task, TASKS[problems[0].task]
    assert all(bool(problem.reasoning) == ("simplified" not in file) for problem in problems)

    def score(complete: Callable[[Problem], str]) -> int:
        checked = check_answers(task, [(complete(problem), problem.answer) for problem in problems])
        return sum(each.is_correct for each in checked)

    assert score(lambda p: rules.write(p, "cot").completion) == len(problems)
    assert score(lambda p: rules.write(p, "direct").completion) == len(problems)
    assert score(lambda p: f" #### {_wrong(p)}") == 0
    assert score(lambda p: " ####") == 0
    assert score(lambda p: f"The answer is {p.answer}.") == 0  # not marked


def test_both_svamp_publishers_have_the_same_problems(data_root: Path) -> None:
    first, second = (_problems(data_root, f"svamp/{name}") for name in ("SVAMP.json", "qwen_eval_test.jsonl"))
    assert {(p.question, p.reasoning, p.answer) for p in first} == {(p.question, p.reasoning, p.answer) for p in second}


def test_svamp_equations_give_their_answers_but_one(data_root: Path) -> None:
    wrong = [p for p in _problems(data_root, "svamp/SVAMP.json") if _arithmetic(p.reasoning) != Fraction(p.answer)]
    assert [(p.reasoning, p.answer) for p in wrong] == [("(4 - 2) + 3", "1")]  # chal-680, as published


def _arithmetic(equation: str) -> Fraction:
    """The exact value of numbers, brackets and + - * /."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        return Fraction(str(node.value))

    return value(ast.parse(equation, mode="eval").body)


def test_math23k_answers_are_those_published(data_root: Path) -> None:
    for file in (file for file in FILES if file.startswith("math23k")):
        for row, problem in zip(read_rows(data_root / file, place=""), _problems(data_root, file), strict=True):
            written = str(row.columns["ans"])
            whole, bracket, fraction = written.partition("((")
            if bracket:  # an independent reading of `5((7)/(10))`
                top, bottom = fraction.removesuffix("))").split(")/(")
                assert Fraction(problem.answer) == int(whole or 0) + Fraction(int(top), int(bottom))
            else:
                assert problem.answer.endswith("%") == written.endswith("%")
                assert Fraction(problem.answer.rstrip("%")) == Fraction(written.rstrip("%"))
            assert problem.language == "zh" and problem.reasoning.startswith("x=")


def test_math_answers_are_the_publishers_own_where_it_gives_them(data_root: Path) -> None:
    rows = read_rows(data_root / "math500/test.jsonl", place="")
    differing = [
        (row.columns["answer"], problem.answer)
        for row, problem in zip(rows, _problems(data_root, "math500/test.jsonl"), strict=True)
        if fold_latex(problem.answer).replace(" ", "") != fold_latex(row.columns["answer"]).replace(" ", "")
    ]
    assert differing == []


def test_arc_labels_become_letters(data_root: Path) -> None:
    rows = read_rows(data_root / "arc_challenge/test.jsonl", place="")
    counts = {"numbers": 0, "three": 0, "five": 0}
    for row, problem in zip(rows, _problems(data_root, "arc_challenge/test.jsonl"), strict=True):
        labels, texts = row.columns["choices"]["label"], row.columns["choices"]["text"]
        assert problem.reasoning == texts[labels.index(row.columns["answerKey"])].strip()
        assert f"\n{problem.answer}. {problem.reasoning}" in problem.question
        counts["numbers"] += labels[0] == "1"
        counts["three"] += len(labels) == 3
        counts["five"] += len(labels) == 5
    assert counts == {"numbers": 22, "three": 4, "five": 3}


def test_the_three_shapes_of_hotpotqa_agree(data_root: Path) -> None:
    plain, original, hub = (_problems(data_root, file) for file in FILES if file.startswith("hotpotqa"))
    answers = {p.question: p.answer for p in plain}
    assert all(answers[p.question] == p.answer for p in (*original, *hub))
    assert {p.question: p.reasoning for p in hub}.items() <= {p.question: p.reasoning for p in original}.items()


def test_texts_are_as_written_here() -> None:
    def first(read: Callable[[RawRow, str], Problem], **columns: Any) -> Problem:
        return read(RawRow(columns, "f:1", 1), "x")

    one = first(
        svamp.read_row, Body="Dan has $ 3", Question="How much?", Equation="( ( 4.0 - 3.0 ) * 2.5 )", Answer=2.5
    )
    assert TASKS["svamp"].write(one, "cot").text == "Question: Dan has $ 3. How much?\nAnswer: (4 - 3) * 2.5 #### 2.5"
    two = first(strategyqa.read_row, question="Is it?", answer=False, facts=["It was", "It is not."])
    assert TASKS["strategyqa"].write(two, "cot").text == "Question: Is it?\nAnswer: It was. It is not. #### no"
    three = first(math23k.read_row, original_text="多少米？", equation="x=44 *20", ans="5((7)/(10))")
    assert TASKS["math23k"].write(three, "cot").text == "问题：多少米？\n解答： x=44*20 #### 57/10"
    assert TASKS["math23k"].write(three, "direct").text == "问题：多少米？\n最终答案： #### 57/10"
    four = first(math.read_row, problem="$1+1$?", solution="It is \\boxed{1}, no, $\\boxed{\\frac{4}{2}}$.")
    row = TASKS["math"].write(four, "cot")
    assert row.answer == " #### \\frac{4}{2}" and row.reasoning.endswith("$\\boxed{\\frac{4}{2}}$.")
    choices = {"text": ["sun", "moon", "sea"], "label": ["1", "2", "3"]}
    five = first(arc_challenge.read_row, question="Which?", choices=choices, answerKey="2")
    assert TASKS["arc_challenge"].write(five, "cot").text == (
        "Question: Which?\nA. sun\nB. moon\nC. sea\nAnswer: moon #### B"
    )
    for row in (TASKS[p.task].write(p, "cot") for p in (one, two, three, four, five)):
        assert [row.text[a:b] for a, b in row.spans.values()] == [row.prompt, row.reasoning, row.answer]


GOOD: dict[str, dict[str, Any]] = {
    "svamp": {"Body": "b", "Question": "q?", "Equation": "( 1.0 + 1.0 )", "Answer": 2.0},
    "strategyqa": {"question": "q?", "answer": True, "facts": ["f"]},
    "math23k": {"original_text": "q", "equation": "x=1", "ans": "1"},
    "math": {"problem": "q", "solution": "\\boxed{1}"},
    "arc_challenge": {"question": "q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "hotpotqa": {"question": "q?", "answer": "a", "supporting_facts": [["t", 0]], "context": [["t", ["s"]]]},
}
TRAIN = {
    "svamp": "svamp/SVAMP.json",
    "strategyqa": "strategyqa/train.json",
    "math23k": "math23k/math23k_train.json",
    "math": "math/train.jsonl",
    "arc_challenge": "arc_challenge/train.jsonl",
    "hotpotqa": "hotpotqa/hotpot_train_v1.1.json",
}
BAD_ROWS = [
    ("svamp", {"Answer": "two"}, "not one number"),
    ("svamp", {"Answer": None}, "NoneType"),
    ("svamp", {"Body": ""}, "'Body' is empty"),
    ("strategyqa", {"answer": "yes"}, "not true or false"),
    ("strategyqa", {"facts": []}, "not a list with texts"),
    ("strategyqa", {"facts": ["f", 3]}, "is int"),
    ("strategyqa", {"facts": ["f #### yes"]}, "stands in a fact"),
    ("math23k", {"ans": "((1)/(0))"}, "not a number"),
    ("math23k", {"ans": "约5"}, "not a number"),
    ("math23k", {"equation": " "}, "'equation' is empty"),
    ("math", {"solution": "It is 5."}, "boxes no answer"),
    ("math", {"solution": "\\boxed{}"}, "boxes no answer"),
    ("math", {"solution": "\\boxed{5} #### 5"}, "stands in the solution"),
    ("arc_challenge", {"answerKey": "C"}, "not among A, B"),
    ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 choices"),
    ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "2 choices"),
    ("arc_challenge", {"choices": ["a", "b"]}, "'choices.text' is missing"),
    ("arc_challenge", {"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "is empty"),
    ("hotpotqa", {"answer": "a\nb"}, "one line"),
    ("hotpotqa", {"supporting_facts": [["t", 7]]}, "no supporting fact"),
    ("hotpotqa", {"supporting_facts": "t"}, "not pairs"),
    ("hotpotqa", {"context": {"title": ["t"], "sentences": []}}, "not pairs"),
    ("hotpotqa", {"context": None}, "not pairs"),
]


def _write_rows(root: Path, task: str, *rows: dict[str, Any]) -> Path:
    path = root / TRAIN[task]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("task", "change", "what"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, task: str, change: dict[str, Any], what: str) -> None:
    path = _write_rows(tmp_path, task, GOOD[task], GOOD[task] | change)
    with pytest.raises(DataError, match=what) as caught:
        load_splits(_data({"name": task, "train": 1, "val": 0, "test": 0}, root=str(tmp_path)))
    assert caught.value.place == f"{path}:2" and caught.value.fix


BAD_FILES = {
    "cut off": (b'[\n{"a": 1},\n{"a": 2', ":3", "broken JSON"),
    "array not closed": (b'[\n{"a": 1}\n', ":3", "broken JSON array"),
    "no comma": (b'[\n{"a": 1}\n{"a": 2}\n]', ":3", "broken JSON array"),
    "trailing comma": (b'[\n{"a": 1},\n]', ":2", "broken JSON array"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 2}]', ":1", "after the end"),
    "not objects": (b'[{"a": 1},\n7]', ":2", "not an object"),
    "text": (b'{"a": 1}\nhello', ":2", "broken JSON"),
    "nan": (b'[\n{"a": NaN}]', ":2", "NaN is not JSON"),
    "latin-1": (b'{"a": 1}\n{"a": "\xe9"}', ":2", "not UTF-8"),
    "bom": (b"\xef\xbb\xbf[]", "", "no rows"),  # the mark itself is welcome
    "deep": (b'[{"a": ' + b"[" * 100_000, ":1", "broken JSON"),
    "empty": (b" \n", "", "no rows"),
    "empty array": (b"[]", "", "no rows"),
    "archive": (b"PK\x03\x04\xff\xfe", "", "is a zip archive"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_json_file_is_one_error_with_place_and_fix(tmp_path: Path, case: str) -> None:
    data, where, what = BAD_FILES[case]
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, place="data.root"))
    assert caught.value.place == f"{path}{where}" and what in caught.value.what and caught.value.fix


def test_json_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, lines in (
        ('[\n {"a":\n 1.50},\n\n {"a": 2}\n]\n', [2, 5]),
        ('{\n"a": 1}\n{"a": 2}{"a": 3}', [1, 3, 3]),
        ('[{"a": "]"},{"a": 2}]', [1, 1]),
    ):
        path.write_text(text, encoding="utf-8")
        rows = list(read_rows(path, place=""))
        assert [row.place for row in rows] == [f"{path}:{line}" for line in lines]
        assert [row.number for row in rows] == list(range(1, len(lines) + 1))


def test_a_saved_folder_that_is_none(tmp_path: Path, data_root: Path) -> None:
    with pytest.raises(DataError, match=r"no state\.json") as caught:
        read_rows(tmp_path, place="data.root")
    assert caught.value.place == "data.root" and "save_to_disk" in caught.value.fix
    torn = tmp_path / "torn"
    shutil.copytree(data_root / "arc_challenge/hf_validation", torn, copy_function=shutil.copyfile)
    (arrow,) = torn.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot read"):
        read_rows(torn, place="data.root")


def test_a_missing_file_is_named_with_every_layout(tmp_path: Path, data_root: Path) -> None:
    for task in NEW:
        with pytest.raises(DataError, match="file not found") as caught:
            load_splits(_data({"name": task}, root=str(tmp_path)))
        assert caught.value.place == "data.root" and f"DIR/{task}/" in caught.value.fix
    (tmp_path / "gsm8k").mkdir()
    shutil.copyfile(data_root / "gsm8k/test.jsonl", tmp_path / "gsm8k/test.jsonl")
    with pytest.raises(DataError, match=r"gsm8k/train\.jsonl") as caught:
        load_splits(_data({"name": "gsm8k"}, root=str(tmp_path)))
    assert "DIR/gsm8k/train.jsonl" in caught.value.fix and "train: 0" in caught.value.fix


def test_the_publishers_splits_are_kept(data_root: Path) -> None:
    many = 100_000
    found = {
        task: load_splits(_data({"name": task, "train": many, "val": val, "test": many}, root=str(data_root)))
        for task, val in {"strategyqa": 10, "math23k": 10, "arc_challenge": many}.items()
    }
    sizes = {task: {split: len(found[task].problems[split]) for split in ("train", "val", "test")} for task in found}
    assert sizes == {  # one question of StrategyQA and one of ARC is published twice
        "strategyqa": {"train": 2059, "val": 1, "test": 229},
        "math23k": {"train": 2315, "val": 1, "test": 2317},
        "arc_challenge": {"train": 1055, "val": 299, "test": 1172},
    }
    leaks = [leak for splits in found.values() for leak in find_leaks(splits.problems).leaks]
    assert not [leak for leak in leaks if leak.kind == "exact"]
    assert [source.kind for source in found["arc_challenge"].sources] == ["file", "folder", "file"]


def test_a_complete_layout_goes_before_another_and_files_of_two_publishers_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "math23k"
    folder.mkdir()
    for name in ("math23k_test", "mwptoolkit_testset", "mwptoolkit_validset", "mwptoolkit_trainset"):
        (folder / f"{name}.json").write_text(json.dumps([GOOD["math23k"] | {"original_text": name}]), encoding="utf-8")

    def places(**counts: int) -> list[str]:
        task = {"name": "math23k", "train": 0, "val": 0, "test": 0, **counts}
        return [source.place.partition("/")[2] for source in load_splits(_data(task, root=str(tmp_path))).sources]

    assert places(train=1, test=1) == ["mwptoolkit_trainset.json", "mwptoolkit_testset.json"]
    (folder / "math23k_train.json").write_text(json.dumps([GOOD["math23k"]]), encoding="utf-8")
    assert places(train=1, test=1) == ["math23k_train.json", "math23k_test.json"]
    assert places(test=1) == ["math23k_test.json"]


def test_hotpotqa_without_facts_serves_style_direct_only(data_root: Path, tmp_path: Path) -> None:
    task = {"name": "hotpotqa", "train": 10_000, "val": 5, "test": 5}
    assert len(load_splits(_data(task, root=str(data_root), style="direct")).problems["train"]) > 5000  # 70 %
    assert len(load_splits(_data(task, root=str(data_root), style="both")).problems["train"]) < 103
    (tmp_path / "hotpotqa").mkdir()
    shutil.copyfile(data_root / "hotpotqa/dev_v1_simplified.json", tmp_path / "hotpotqa/dev_v1_simplified.json")
    with pytest.raises(DataError, match="no reasoning") as caught:
        load_splits(_data(task, root=str(tmp_path)))
    assert "data.style=direct" in caught.value.fix and "simplified" not in caught.value.fix
    assert caught.value.place.endswith("dev_v1_simplified.json:1")


@pytest.mark.parametrize("task", NEW)
def test_hub_rows_are_read_with_the_publishers_splits(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((path, config, split))
        name = "original_text" if task == "math23k" else "problem" if task == "math" else "question"
        name = "Question" if task == "svamp" else name
        return [GOOD[task] | {name: f"{split} {number}?"} for number in range(9)]

    monkeypatch.setattr(sources.hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = load_splits(_data({"name": task, "train": 4, "val": 2, "test": 3}))
    assert {split: len(splits.problems[split]) for split in ("train", "val", "test")} == {
        "train": 4,
        "val": 2,
        "test": 3,
    }
    assert [split for _, _, split in calls] == {
        "arc_challenge": ["train", "validation", "test"],
        "hotpotqa": ["train", "validation"],
    }.get(task, ["train", "test"])
    assert len({path for path, _, _ in calls}) == 1


@pytest.mark.parametrize("style", ["both", "direct"])
def test_a_mix_of_all_tasks_is_prepared_with_a_real_tokenizer(data_root: Path, tmp_path: Path, style: str) -> None:
    counts = {"train": 12, "val": 3, "test": 5}
    tasks = [{"name": name, **counts} for name in ("gsm8k", "chain", *NEW) if name != "math"]
    tasks.append({"name": "math", "train": 0, "val": 0, "test": 5})
    tree = {
        "name": "mixed",
        "data": {
            "tasks": tasks,
            "root": str(data_root),
            "style": style,
            "tokenizer": "root:qwen2.5",
            "trim_vocabulary": True,
            "max_length": 1024,
        },
        "student": {"scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2}},
        "arms": {"ce": {"teachers": []}},
    }
    prepare(make_recipe(tree), tmp_path)
    manifest = read_manifest(tmp_path)
    assert {name: per["test"]["problems"] for name, per in manifest["tasks"].items()} == dict.fromkeys(
        ("gsm8k", "chain", *NEW), 5
    )
    for split in ("train", "val", "test"):
        examples = read_split(tmp_path, split)
        num_styles = 2 if style == "both" else 1
        num_tasks = 8 if split == "test" else 7
        assert len(examples) == num_tasks * counts[split] * num_styles
        for example in examples:
            assert ({2} <= set(example.segments)) == (example.style == "cot")
            assert {1, 3} <= set(example.segments) and example.segments == sorted(example.segments)
    prepare(make_recipe(tree), tmp_path)  # finished: the saved folder among the sources is no obstacle
