"""A user's own rows as people have them: texts in two columns, conversations, numbers with words, marks of Windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import characters

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe
from kvdistill.data.chat import chat_tokenizer, write_chat
from kvdistill.data.encode import encode_row
from kvdistill.data.grading import extract_answer, is_correct
from kvdistill.data.problems import Problem, read_thought, write_plain, write_thought
from kvdistill.data.splits import Splits, load_splits
from kvdistill.stages.prepare.export import FORMATS, export_row

ASDIV = [
    {"body": "Seven red apples and two green apples are in the basket.", "question": "How many apples are there?",
     "formula": "7+2=9", "answer": "9 (apples)", "grade": "1"},
    {"body": "Ellen has six more balls than Marin. Marin has nine.", "question": "How many balls does Ellen have?",
     "formula": "6+9=15", "answer": "15 (balls)", "grade": "1"},
    {"body": "Janet has 21 pens and gives away 3.0 of them.", "question": "How many pens are left?",
     "formula": "21-3=18", "answer": "18.0", "grade": "2"},
]  # fmt: skip
FIELDS = {"question": "{body} {question}", "reasoning": "formula"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, *, style: str = "cot", **task: Any) -> tuple[list[Problem], Splits]:
    kind = {".csv": "csv", ".parquet": "parquet"}.get(path.suffix, "jsonl")
    section = {"tasks": [{"name": kind, "file": str(path), "train": 100, "val": 0, "test": 0, **task}], "style": style}
    splits = load_splits(DataRecipe.model_validate(section))
    return sorted(splits.problems["train"], key=lambda problem: (len(problem.id), problem.id)), splits


@pytest.mark.parametrize("name", ["asdiv.jsonl", "asdiv.csv", "asdiv.parquet"])
def test_a_question_in_two_columns_is_joined_and_unused_columns_are_told(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, ASDIV)
    found, splits = read(file, fields=FIELDS, answer="number")
    assert [p.question for p in found] == [f"{row['body']} {row['question']}" for row in ASDIV]
    assert [p.answer for p in found] == ["9", "15", "18"] and [p.reasoning for p in found] == [
        "7+2=9",
        "6+9=15",
        "21-3=18",
    ]
    assert splits.noticed["asdiv"].as_dict() == {"unused_columns": ["grade"]}
    _, splits = read(file, fields={"reasoning": "formula"})  # half a question: not an error, but it is said
    noticed = splits.noticed["asdiv"].as_dict()
    assert noticed["unused_columns"] == ["body", "grade"]
    assert noticed["numbers_with_words"] == 2 and noticed["one_of_them"] == "9 (apples)"


def test_a_template_passes_over_empty_cells_and_refuses_columns_that_are_not_there(tmp_path: Path) -> None:
    rows = [{"instruction": "Say it.", "input": "", "reasoning": "r", "answer": "a"},
            {"instruction": "Add.", "input": "3 and 4", "reasoning": "r", "answer": 7}]  # fmt: skip
    file = write(tmp_path / "alpaca.jsonl", rows)
    found, _ = read(file, fields={"question": "{instruction}\n{input}"})
    assert [p.question for p in found] == ["Say it.", "Add.\n3 and 4"]
    with pytest.raises(DataError, match="'inptu' is missing; did you mean 'input'") as caught:
        read(file, fields={"question": "{instruction} {inptu}"})
    assert caught.value.place.endswith("alpaca.jsonl:1") and "fields" in caught.value.fix
    for spec in ("{instruction} {input", "instruction} {input}", "{{instruction} {input}"):
        with pytest.raises(DataError, match="open or closed too often") as caught:
            read(file, fields={"question": spec})
        assert caught.value.place.endswith(".fields") and "question: '{one} {two}'" in caught.value.fix
    thinking, _ = read(file, fields={"question": "instruction", "reasoning": "<think>{reasoning}</think>"})
    assert thinking[0].reasoning == "<think>r</think>"


@pytest.mark.parametrize(
    ("rule", "given", "gold", "right", "wrong"),
    [
        ("number", "68 (pictures)", "68", "68 pictures", "69"),
        ("number", 43.0, "43", "43", "43.5"),
        ("fraction", "7/10 of it", "7/10", "0.7", "0.71"),
        ("latex", "\\frac{1}{2}", "\\frac{1}{2}", "0.5", "2"),
        ("yes-no", "True", "yes", "Yes, because it is", "no"),
        ("letter", "(b)", "B", "B.", "C"),
        ("exact-match", "The Beatles", "The Beatles", "beatles", "Stones"),
        ("value", "68 (pictures)", "68 (pictures)", "68 (Pictures)", "68"),
    ],
)
def test_the_answer_rule_of_a_task_reads_the_gold_answer_and_judges(
    tmp_path: Path, rule: str, given: Any, gold: str, right: str, wrong: str
) -> None:
    file = write(tmp_path / "mine.jsonl", [{"question": "q?", "reasoning": "r", "answer": given}])
    [problem], splits = read(file, answer=rule)
    assert problem.answer == gold
    row = splits.rules["mine"].write(problem, "cot")
    assert is_correct("mine", row.completion, problem.answer, problem.rule)
    assert is_correct("mine", f"#### {right}", problem.answer, problem.rule)
    assert not is_correct("mine", f"#### {wrong}", problem.answer, problem.rule)
    assert extract_answer("mine", row.completion, problem.rule) is not None


def test_an_answer_that_is_none_by_its_rule_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", [{"question": "q?", "reasoning": "r", "answer": "many"}])
    for rule in ("number", "fraction", "yes-no", "letter"):
        with pytest.raises(DataError, match=f"the answer 'many' is none by the rule `answer: {rule}`") as caught:
            read(file, answer=rule)
        assert caught.value.place.endswith("mine.jsonl:1")


def test_keys_of_own_files_do_not_go_with_built_in_tasks() -> None:
    for key, value in (("answer", "number"), ("language", "zh"), ("fields", {"question": "q"}), ("file", "x")):
        with pytest.raises(DataError, match=f"`{key}` does not go with"):
            load_splits(DataRecipe.model_validate({"tasks": [{"name": "chain", key: value}]}))


def test_the_language_of_a_task_is_that_of_rows_that_have_none(tmp_path: Path) -> None:
    rows = [{"question": "三加四？", "reasoning": "3+4", "answer": 7}]
    rows += [{"question": "And 4 and 5?", "reasoning": "4+5", "answer": 9, "language": "en"}]
    found, _ = read(write(tmp_path / "zh.jsonl", rows), language="zh")
    assert [p.language for p in found] == ["zh", "en"]


# -- conversations -----------------------------------------------------------------------------------------------------

TALKS = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4?"},
                 {"role": "assistant", "content": "Three and four. #### 7"}],
    "sharegpt": [{"from": "human", "value": "3+4?"}, {"from": "gpt", "value": "Three and four.\n#### 7\n"}],
    "boxed": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "It is \\boxed{7}."}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "3+4?"}]},
              {"role": "assistant", "content": [{"type": "text", "text": "Three and four. #### 7"}]}],
    "apart": [{"role": "user", "content": "3+4?"},
              {"role": "assistant", "reasoning_content": "Count on.", "content": "#### 7"}],
    "thinks": [{"role": "user", "content": "3+4?"},
               {"role": "assistant", "content": "<think>\nCount on.\n</think>\n\nSo: #### 7"}],
}  # fmt: skip
REASONING = {"boxed": "It is \\boxed{7}.", "apart": "<think>\nCount on.\n</think>",
             "thinks": "<think>\nCount on.\n</think>\n\nSo:"}  # fmt: skip


@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_conversations_are_read(tmp_path: Path, kind: str, ending: str) -> None:
    column = "conversations" if kind == "sharegpt" else "messages"
    file = tmp_path / f"talk.{ending}"
    rows = [{column: TALKS[kind], "source": "x"}]
    if ending == "json":
        file.write_text(json.dumps(rows))
    else:
        write(file, rows)
    [problem], splits = read(file)
    assert (problem.question, problem.answer) == ("3+4?", "7")
    assert problem.reasoning == REASONING.get(kind, "Three and four.")
    assert splits.noticed["talk"].as_dict() == {"unused_columns": ["source"]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "a"}], "the conversation is user"),
        ([*TALKS["boxed"], *TALKS["boxed"]], "user, assistant, user, assistant"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is 7."}], "no answer is marked"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "x #### 7\nand so on"}], "goes on after"),
        ([{"role": "robot", "content": "a"}], "nobody known speaks in 'messages': 'robot'"),
        ("hello", "is no list of messages"),
        ([{"role": "user", "content": 7}, {"role": "assistant", "content": "x #### 7"}], "'content' is int"),
    ],
)
def test_conversations_that_cannot_be_read_are_named(tmp_path: Path, messages: Any, words: str) -> None:
    file = write(tmp_path / "talk.jsonl", [{"messages": messages}])
    with pytest.raises(DataError) as caught:
        read(file)
    assert words in caught.value.what and caught.value.place.endswith("talk.jsonl:1") and caught.value.fix


def test_a_text_with_reasoning_and_answer_is_taken_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm.jsonl", [{"question": "3+4?", "answer": "Three and four.\n#### 7"}])
    [problem], _ = read(file, fields={"completion": "answer"})
    assert (problem.question, problem.reasoning, problem.answer) == ("3+4?", "Three and four.", "7")
    with pytest.raises(DataError, match="must be one line") as caught:
        read(file, style="direct")
    assert "completion: COLUMN" in caught.value.fix
    file = write(tmp_path / "pairs.jsonl", [{"prompt": "3+4?", "completion": "Count. #### 7"}])
    assert read(file)[0][0].reasoning == "Count."


@pytest.mark.parametrize("form", FORMATS)
def test_what_export_writes_can_be_read_back(tmp_path: Path, form: str) -> None:
    problems = [Problem("svamp", "1", "3+4?", "Count on.", "7"), Problem("math23k", "1", "三乘四？", "3*4", "12", "zh")]
    rows = [export_row(write_plain(p, style), form) for p in problems for style in ("cot", "direct")]  # type: ignore[arg-type]
    found, _ = read(write(tmp_path / "back.jsonl", rows))
    said = [(p.id, p.question, p.reasoning, p.answer, p.language) for p in found]
    assert said == [(f"{p.task}/1", p.question, p.reasoning, p.answer, p.language) for p in problems]
    if form == "messages":  # also without the columns beside them
        bare, _ = read(write(tmp_path / "bare.jsonl", [{"messages": rows[0]["messages"]}]))
        assert (bare[0].question, bare[0].reasoning, bare[0].answer) == ("3+4?", "Count on.", "7")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, ending: str) -> None:
    row = {"question": "3+4?", "reasoning": "r", "answer": "7"}
    file = tmp_path / f"windows.{ending}"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([row] if ending == "json" else row).encode() + b"\r\n")
    assert read(file)[0][0].question == "3+4?"


THINKS = (  # as Qwen3 and others write what is thought
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' -%}{%- set thought = m.reasoning_content | default('') -%}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.mark.parametrize("said", ["", "So it is seven."])
@pytest.mark.parametrize("loose", [(), ("<think>", "</think>")])
def test_thoughts_go_where_the_chat_template_writes_them(said: str, loose: tuple[str, ...]) -> None:
    tokenizer = chat_tokenizer(characters(THINKS, loose=loose))
    thought = Problem("mine", "1", "3+4?", write_thought("Count on.\n\nFour, five …", said), "7")
    row = write_chat(write_plain(thought, "cot"), tokenizer)
    content = f"{said} #### 7".strip()
    answered = {"role": "assistant", "reasoning_content": "Count on.\n\nFour, five …", "content": content}
    messages = [{"role": "user", "content": row.user}, answered]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row.text == whole.removesuffix("\n") and row.answer.strip() == "#### 7"
    assert row.prompt == tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    example = encode_row(tokenizer, row)
    assert example.input_ids == tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(example.prompt_ids) == row.prompt
    plain = write_chat(write_plain(Problem("mine", "2", "3+4?", "Count on.", "7"), "cot"), tokenizer)
    assert plain.prompt.endswith("<think>\n\n</think>\n\n")  # as before: no thought, an empty block
    assert read_thought(row.completion.lstrip()) is not None


def test_thoughts_are_written_and_read_alike() -> None:
    assert read_thought(write_thought("Count on.", "So:")) == ("Count on.", "So:")
    assert read_thought(" <think>a</think>b ") == ("a", "b") and read_thought("a <think>b</think>") is None
    assert read_thought("<think>a") is None
