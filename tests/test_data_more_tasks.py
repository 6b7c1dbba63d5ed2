"""SVAMP, StrategyQA, Math23K, MATH, ARC-Challenge and HotpotQA: every published row, answer rules, broken copies."""

from __future__ import annotations

import json
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
from kvdistill.data.answers import extract_answer, is_correct
from kvdistill.data.latex import fold_latex, last_boxed, same_latex
from kvdistill.data.leaks import find_leaks
from kvdistill.data.problems import Problem
from kvdistill.data.sources import RawRow, read_rows
from kvdistill.data.splits import load_splits
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.data.tasks import TASKS, arc_challenge, hotpotqa, math, math23k, strategyqa, svamp
from kvdistill.data.values import leading_ratio, normalise_ratio, same_ratio
from kvdistill.prepare import prepare

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
    for problem in problems:
        rules = TASKS[problem.task]
        assert bool(problem.reasoning) == ("simplified" not in file)
        for row in (rules.write(problem, "cot"), rules.write(problem, "direct")):
            assert is_correct(problem.task, row.completion, problem.answer), problem
        assert not is_correct(problem.task, f" #### {_wrong(problem)}", problem.answer), problem
        assert not is_correct(problem.task, " ####", problem.answer)
        assert not is_correct(problem.task, f"The answer is {problem.answer}.", problem.answer)


def test_both_svamp_publishers_have_the_same_problems(data_root: Path) -> None:
    first, second = (_problems(data_root, f"svamp/{name}") for name in ("SVAMP.json", "qwen_eval_test.jsonl"))
    assert {(p.question, p.reasoning, p.answer) for p in first} == {(p.question, p.reasoning, p.answer) for p in second}


def test_svamp_equations_give_their_answers_but_one(data_root: Path) -> None:
    def value(equation: str) -> Fraction:
        return eval(equation, {"__builtins__": {}})  # digits, brackets and + - * / of a test file

    wrong = [p for p in _problems(data_root, "svamp/SVAMP.json") if abs(value(p.reasoning) - float(p.answer)) > 1e-6]
    assert [(p.reasoning, p.answer) for p in wrong] == [("(4 - 2) + 3", "1")]  # chal-680, as published


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


# (task, gold of a published row, answers that are equal, answers that are not): checked by hand, one by one
PAIRS: list[tuple[str, str, list[str], list[str]]] = [
    (
        "svamp",
        "51",
        ["51", "51.0", "$51", "51.", "51 dollars", "５１"],
        ["51.5", "-51", "510", "51/2", "76 - 25", "5 1"],
    ),
    ("svamp", "145", ["145.00", "+145", "145 bananas"], ["144.9", "145-2", "1.45", "145kg", "one"]),
    ("svamp", "22090603", ["22,090,603", "22090603.0"], ["22,090,60", "22.090603", "22090604"]),
    ("strategyqa", "no", ["no", "No.", "NO", "no, it is not", "False", "(no)", "否"], ["yes", "not", "no one knows"]),
    ("strategyqa", "yes", ["Yes", "yes!", "true", "是", "yes: both are"], ["no", "yes and no", "maybe", "yesterday"]),
    ("math23k", "880", ["880", "880米", "880.0", "８８０", "x=880", "1760/2"], ["88", "44*20", "880%", "880千", "881"]),
    (
        "math23k",
        "14.4",
        ["14.40", "72/5", "14((2)/(5))", "1440%", "14.4元"],
        ["14", "14.41", "144", "14.4.1", "14(2/5"],
    ),
    ("math23k", "7/10", ["((7)/(10))", "(7/10)", "0.7", "70%", "14/20", "7/10小时"], ["7", "10/7", "0.71", "7/100"]),
    ("math23k", "57/10", ["5((7)/(10))", "5(7/10)", "5 7/10", "5.7", "570%"], ["5", "7/10", "57", "557/10", "5/7"]),
    ("math23k", "240%", ["240%", "2.4", "((12)/(5))", "240 %"], ["240", "24%", "2.40%"]),
    ("math23k", "9", ["9", "9.", "+9", "27/3", "9本"], ["-9", "9十", "9万", "3*3", "9+1", "九"]),
    ("math23k", "1/3", ["((1)/(3))", "2/6"], ["0.33", "0.3333333", "33%", "1/3/1", "((1)/(0))"]),
    (
        "math",
        "2",
        ["2", "$2$", "\\boxed{2}", "2.0", "2.", "\\frac{4}{2}", "\\sqrt{4}"],
        ["3", "-2", "x", "2x", "\\frac{1}{2}"],
    ),
    ("math", "\\frac{11}{2}", ["11/2", "5.5", "\\dfrac{11}2", "\\tfrac{11}{2}"], ["\\frac{2}{11}", "5", "11", "5.05"]),
    (
        "math",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        ["(3,\\pi/2)", "(3, \\frac\\pi2)"],
        ["(3,\\pi)", "(\\pi/2,3)", "3"],
    ),
    ("math", "p - q", ["p-q", "-q+p"], ["q-p", "p+q", "p", "-"]),
    ("math", "\\text{Evelyn}", ["Evelyn", "\\text{Evelyn}", "\\textbf{Evelyn}"], ["Evan", "\\text{Carla}", "E"]),
    ("math", "90^\\circ", ["90", "90^{\\circ}", "90\\degree"], ["9", "90^2", "45"]),
    ("math", "10,\\!080", ["10080", "10,080", "\\$10,080"], ["1008", "(10,80)", "10,80", "100800"]),
    ("math", "\\$16,\\!386.16", ["16386.16", "$16,386.16$"], ["16386", "16386.2", "1638616"]),
    ("math", "85\\text{ feet}", ["85 feet", "85", "85\\mathrm{feet}"], ["58", "feet", "85.5"]),
    (
        "math",
        "(-\\infty,0]\\cup[4,\\infty)",
        ["(-\\infty, 0] \\cup [4, \\infty)"],
        ["(-\\infty,0)\\cup[4,\\infty)", "[0,4]"],
    ),
    ("math", "b=4", ["b = 4", "4"], ["b=5", "5"]),
    ("math", "x^3+27", ["27+x^3", "(x+3)(x^2-3x+9)"], ["x^3-27", "x^3", "27"]),
    ("math", "52_8", ["52_{8}", "52_8"], ["52_9", "53_8", "52", "52_{16}"]),
    (
        "math",
        "2\\sqrt{5}",
        ["\\sqrt{20}", "2 \\sqrt 5", "\\sqrt{4}\\sqrt{5}"],
        ["\\sqrt{5}", "\\sqrt{10}", "4.47", "2"],
    ),
    ("math", "100\\%", ["100", "100%"], ["10", "1", "101\\%"]),
    (
        "arc_challenge",
        "C",
        ["C", "c", "(C)", "C.", "C) days", "3", "C. Planetary days"],
        ["B", "Cat", "A", "the days", "C and D"],
    ),
    ("arc_challenge", "A", ["A", "(a)", "1", "A: dry palms"], ["A planet", "2", "1.5", "E", "dry palms"]),
    ("arc_challenge", "E", ["E", "5", "e."], ["D", "6", "F", "Earth"]),
    ("hotpotqa", "Chief of Protocol", ["chief of protocol", "The Chief of Protocol."], ["Chief", "Chief of the Navy"]),
    ("hotpotqa", "3,677 seated", ["3677 seated", "3,677 Seated."], ["3,677", "3,678 seated", "seated"]),
    ("hotpotqa", "yes", ["Yes", "yes."], ["no", "yes, both"]),
    ("hotpotqa", "#364", ["364", "number 364".removeprefix("number ")], ["3640", "3.64", "365"]),
    ("hotpotqa", "821", ["821", "821.0", "$821"], ["-821", "8.21", "822"]),
]


@pytest.mark.parametrize(("task", "gold", "equal", "unequal"), PAIRS, ids=[f"{t}-{g}" for t, g, _, _ in PAIRS])
def test_hand_checked_answers(task: str, gold: str, equal: list[str], unequal: list[str]) -> None:
    right = {text: is_correct(task, f"Because. #### {text}\nQuestion: next", gold) for text in (*equal, *unequal)}
    assert [text for text in equal if not right[text]] == []
    assert [text for text in unequal if right[text]] == []


def test_there_are_enough_pairs_and_their_golds_are_published(data_root: Path) -> None:
    assert sum(len(equal) + len(unequal) for _, _, equal, unequal in PAIRS) >= 200
    published: dict[str, set[str]] = {}
    for file in FILES:
        for problem in _problems(data_root, file):
            published.setdefault(problem.task, set()).add(problem.answer)
    assert [(task, gold) for task, gold, _, _ in PAIRS if gold not in published[task]] == []


def test_the_first_mark_counts_and_math_may_box_instead() -> None:
    for task in NEW:
        assert extract_answer(task, "so 12, or #### A\n#### B") == "A"
        assert extract_answer(task, "") is None and extract_answer(task, "12") is None
    assert extract_answer("math", "so \\boxed{\\frac{1}{2}}, I mean \\boxed{3}") == "3"
    assert extract_answer("math", "\\boxed{1} #### 2") == "2"
    assert extract_answer("svamp", "\\boxed{3}") is None


def test_ratios() -> None:
    given = {"((14)/(20))": "7/10", "5((7)/(10))": "57/10", "-1/2": "-1/2", "1,080.50": "1080.5", ".5%": "0.5%"}
    assert {text: normalise_ratio(text) for text in given} == given
    for text in ("", "%", "1/0", "((1)/(2)", "1/2%", "5(7)", "1/-2", "1 2", "x", "1e5", "inf", "nan", "1_000"):
        assert normalise_ratio(text) is None and not same_ratio(text, text)
    assert leading_ratio("3千米") == "3" and leading_ratio("3千") is None and leading_ratio("3/4 of it") == "3/4"
    assert leading_ratio("1,080元") == "1080" and leading_ratio("1,08") is None
    assert normalise_ratio("9" * 200) == "9" * 200


def test_boxes_and_runaway_expressions() -> None:
    assert last_boxed("\\boxed{a{b}\\}c} and \\fbox{d}") == "d" and last_boxed("\\boxed{a{b}\\}c}") == "a{b}\\}c"
    assert last_boxed("\\boxed 5") == "5" and last_boxed("\\boxed{never closed") is None and last_boxed("none") is None
    for text in ("9^{9^{9^9}}", "9^99999999", "99999!", "(" * 4000, "\\frac{" * 50, "{" * 299, "\\", "$", "^", "\x00"):
        assert not same_latex(text, "\\frac{1}{2}")


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
    "bom": (b"\xef\xbb\xbf[]", ":1", "byte order mark"),
    "deep": (b'[{"a": ' + b"[" * 100_000, ":1", "broken JSON"),
    "empty": (b" \n", "", "no rows"),
    "empty array": (b"[]", "", "no rows"),
    "archive": (b"PK\x03\x04\xff\xfe", ":1", "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_json_file_is_one_error_with_place_and_fix(tmp_path: Path, case: str) -> None:
    data, where, what = BAD_FILES[case]
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(path, place="data.root")
    assert caught.value.place == f"{path}{where}" and what in caught.value.what and caught.value.fix


def test_json_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, lines in (
        ('[\n {"a":\n 1.50},\n\n {"a": 2}\n]\n', [2, 5]),
        ('{\n"a": 1}\n{"a": 2}{"a": 3}', [1, 3, 3]),
        ('[{"a": "]"},{"a": 2}]', [1, 1]),
    ):
        path.write_text(text, encoding="utf-8")
        rows = read_rows(path, place="")
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
    with pytest.raises(DataError, match=r"math/train\.jsonl") as caught:  # only test rows of MATH are here
        load_splits(_data({"name": "math"}, root=str(data_root)))
    assert "DIR/math/train.jsonl" in caught.value.fix and "train: 0" in caught.value.fix


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
    assert all(not find_leaks(splits.problems) for splits in found.values())
    assert [source.kind for source in found["arc_challenge"].sources] == ["file", "folder", "file"]


def test_a_complete_layout_goes_before_another_and_files_of_two_publishers_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "math23k"
    folder.mkdir()
    for name in ("math23k_test", "mwptoolkit_testset", "mwptoolkit_trainset"):
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
    assert len(load_splits(_data(task, root=str(data_root), style="direct")).problems["train"]) > 7000
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

    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
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
