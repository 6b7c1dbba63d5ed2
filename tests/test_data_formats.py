"""Reading rows: the same rows in every format, lazily; copies of published tasks in other forms."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import DataError
from kvdistill.core.files import sha256_file
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data import sources
from kvdistill.data.problems import Problem
from kvdistill.data.sets import TASKS, Loaded, arc_challenge, gsm8k, hotpotqa, math, math23k, strategyqa, svamp
from kvdistill.data.sources import find, read_rows
from kvdistill.data.sources.rows import RawRow

Row = dict[str, str]
ROWS = [
    {"id": "007", "question": 'Say "no", twice;\nor once?', "reasoning": "a,b\tc", "answer": "1,000", "language": "en"},
    {"id": "zwei", "question": "多少？", "reasoning": "x = 1\n\ny = 2", "answer": "nan", "language": "zh"},
]


def load(name: str, file: Path, *, style: str = "cot", **task: Any) -> Loaded:
    recipe = TaskRecipe(name=name, file=str(file), **task)
    return TASKS[name].load(recipe, DataRecipe(tasks=[recipe], style=style))


def problems(name: str, file: Path, **options: Any) -> list[Problem]:
    return list(load(name, file, **options).problems)


def published(name: str, root: Path, style: str = "cot", **counts: int) -> Loaded:
    recipe = TaskRecipe(name=name, **{"train": 1, "val": 0, "test": 0, **counts})
    return TASKS[name].load(recipe, DataRecipe(tasks=[recipe], root=str(root), style=style))


# -- writers, one a format ----------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8", newline="")


def write_objects(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(row, indent=2) for row in rows), encoding="utf-8", newline="")


def write_csv(path: Path, rows: list[Row], *, delimiter: str = ",", bom: bool = False, ends: str = "\n") -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=ends)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())


def write_parquet(path: Path, rows: list[Any], **options: Any) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


FORMATS: dict[str, tuple[str, str, Callable[[Path, list[Any]], None]]] = {
    "JSONL": ("jsonl", "rows.jsonl", write_jsonl),
    "JSON array": ("jsonl", "rows.json", write_json),
    "JSON objects": ("jsonl", "rows.json", write_objects),
    "CSV": ("csv", "rows.csv", write_csv),
    "CSV, semicolons": ("csv", "rows.csv", lambda path, rows: write_csv(path, rows, delimiter=";")),
    "CSV, tabs": ("csv", "rows.txt", lambda path, rows: write_csv(path, rows, delimiter="\t")),
    "CSV from Excel": ("csv", "r.csv", lambda path, rows: write_csv(path, rows, delimiter=";", bom=True, ends="\r\n")),
    "TSV": ("csv", "rows.tsv", lambda path, rows: write_csv(path, rows, delimiter="\t")),
    "Parquet": ("parquet", "rows.parquet", write_parquet),
    "Parquet, one row a group": ("parquet", "r.pq", lambda path, rows: write_parquet(path, rows, row_group_size=1)),
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_are_the_same_problems_in_every_format(tmp_path: Path, form: str) -> None:
    name, file, write = FORMATS[form]
    write(tmp_path / file, ROWS)
    loaded = load(name, tmp_path / file)
    key = file.partition(".")[0]
    assert list(loaded.problems) == [
        Problem(key, row["id"], row["question"], row["reasoning"], row["answer"], row["language"]) for row in ROWS
    ]
    (source,) = loaded.sources
    assert (source.task, source.kind, source.place) == (key, "file", str(tmp_path / file))
    assert source.sha256 == sha256_file(tmp_path / file) and source.revision == ""
    assert not loaded.pool and loaded.test is None and loaded.val is None


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.sampled_from(list(FORMATS)))
def test_any_text_comes_back_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], form: str
) -> None:
    name, file, write = FORMATS[form]
    path = tmp_path_factory.mktemp("any") / file
    write(path, [{"question": question, "reasoning": why, "answer": "1"} for question, why in texts])
    if any("####" in why for _, why in texts):
        return
    found = problems(name, path)
    assert [(p.question, p.reasoning) for p in found] == [(q.strip(), why.strip()) for q, why in texts]
    assert len({p.id for p in found}) == len(texts)


@pytest.mark.parametrize(("name", "file"), [("jsonl", "r.jsonl"), ("csv", "r.csv"), ("parquet", "r.parquet")])
def test_other_columns_and_what_may_be_absent(tmp_path: Path, name: str, file: str) -> None:
    write = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[name]
    write(tmp_path / file, [{"task": "q1", "gold": "yes", "other": "x"}, {"task": "q2", "gold": "no", "other": "y"}])
    fields = {"question": "task", "answer": "gold"}
    unit = "line" if name == "jsonl" else "row"
    assert problems(name, tmp_path / file, fields=fields, style="direct") == [
        Problem("r", f"{unit}-1", "q1", "", "yes"),
        Problem("r", f"{unit}-2", "q2", "", "no"),
    ]
    with pytest.raises(DataError, match="'reasoning' is missing") as caught:
        problems(name, tmp_path / file, fields=fields)
    assert "data.style=direct" in caught.value.fix
    for mistake, what in (
        ({**fields, "id": "othr"}, "'othr'"),
        ({**fields, "question": "tsak"}, "did you mean 'task'"),
    ):
        with pytest.raises(DataError, match=what):
            problems(name, tmp_path / file, fields=mistake, style="direct")


def test_numbers_are_written_as_people_write_them(tmp_path: Path) -> None:
    def answers(name: str, *values: Any, kind: pa.DataType | None = None) -> list[str]:
        path = tmp_path / f"rows.{name}"
        if kind is None:
            path.write_text("".join(f'{{"question": "q{i}", "answer": {v}}}\n' for i, v in enumerate(values)))
        else:
            questions = [f"q{i}" for i in range(len(values))]
            pq.write_table(pa.table({"question": questions, "answer": pa.array(values, kind)}), path)
        return [problem.answer for problem in problems(name, path, style="direct")]

    assert answers("jsonl", "4", "1.50", "-0.0", "1e3", "1e-3") == ["4", "1.50", "-0.0", "1000", "0.001"]
    assert answers("jsonl", "1e400") == ["1E+400"]
    assert answers("parquet", 4, -7, kind=pa.int64()) == ["4", "-7"]
    assert answers("parquet", 72.0, 0.1, 1e22, kind=pa.float64()) == ["72", "0.1", "1" + "0" * 22]
    assert answers("parquet", 0.1, 72.0, kind=pa.float32()) == ["0.1", "72"]
    assert answers("parquet", Decimal("1.50"), kind=pa.decimal128(5, 2)) == ["1.50"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_texts_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"question": pa.array(["a", "b"]).cast(kind), "answer": ["1", "2"], "id": pa.nulls(2)})
    pq.write_table(table, tmp_path / "r.parquet")
    assert [p.question for p in problems("parquet", tmp_path / "r.parquet", style="direct")] == ["a", "b"]


def test_an_id_or_language_that_is_absent_somewhere(tmp_path: Path) -> None:
    columns = {"question": ["a", "b", "c"], "answer": ["1", "2", "3"], "language": [None, "", "zh"]}
    pq.write_table(pa.table({**columns, "id": [7.0, float("nan"), None]}), tmp_path / "r.parquet")
    found = problems("parquet", tmp_path / "r.parquet", style="direct")
    assert [(p.id, p.language) for p in found] == [("7", "en"), ("row-2", "en"), ("row-3", "zh")]
    write_csv(
        tmp_path / "r.csv", [{"id": " ", "question": "a", "answer": "1"}, {"id": "x", "question": "b", "answer": "2"}]
    )
    assert [p.id for p in problems("csv", tmp_path / "r.csv", style="direct")] == ["row-1", "x"]


def test_csv_rows_know_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b'question,"two\nlines"\n\n"a\r\nb\nc",x\r\n,\n  \nd,"y ""z"""\n')
    rows = list(read_rows(path, place=""))
    assert [(row.number, row.place, dict(row.columns)) for row in rows] == [
        (1, f"{path}:4", {"question": "a\nb\nc", "two\nlines": "x"}),
        (2, f"{path}:9", {"question": "d", "two\nlines": 'y "z"'}),
    ]


def test_the_delimiter_is_the_one_under_which_the_columns_are_found(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("question;answer;a,b,c,d\nq, or;1;2\n")
    assert [(p.question, p.answer) for p in problems("csv", path, style="direct")] == [("q, or", "1")]
    path.write_text('question,answer,"a;b;c;d;e"\nq;or,1,2\n')
    assert [(p.question, p.answer) for p in problems("csv", path, style="direct")] == [("q;or", "1")]


def test_json_is_read_across_the_pieces_it_is_read_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "é😀\u2028", "b": [1, {"c": 'x\\"]}'}], "d": None, "e": -10}] * 5
    monkeypatch.setattr(sources.jsonl, "_CHUNK", 7)
    texts = {
        json.dumps(rows, ensure_ascii=False, indent=1): [3, 14, 25, 36, 47],
        json.dumps(rows): [2] * 5,
        "\n\n".join(map(json.dumps, rows)): [2, 4, 6, 8, 10],
        "".join(json.dumps(row, indent=1) for row in rows): [2, 12, 22, 32, 42],
    }
    for text, lines in texts.items():
        (tmp_path / "r.json").write_text(f"\n {text} \n", encoding="utf-8", newline="")
        found = list(read_rows(tmp_path / "r.json", place=""))
        assert [row.columns for row in found] == rows
        assert [int(row.place.rpartition(":")[2]) for row in found] == lines


# -- lazily ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JSONL", "JSON array", "CSV", "Parquet"])
def test_a_late_mistake_is_found_late_and_only_once_are_rows_read(tmp_path: Path, form: str) -> None:
    name, file, write = FORMATS[form]
    rows = [{"question": f"q{n}", "reasoning": "r", "answer": str(n)} for n in range(2000)]
    write(tmp_path / file, [*rows, {"question": "last", "reasoning": "r", "answer": " "}])
    loaded = load(name, tmp_path / file)
    found = iter(loaded.problems)
    assert [next(found).answer for _ in range(2000)] == [row["answer"] for row in rows]
    with pytest.raises(DataError, match="'answer' is empty"):
        next(found)
    assert list(loaded.problems) == []


@pytest.mark.parametrize("form", ["JSONL", "JSON array", "CSV"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, form: str) -> None:
    name, file, write = FORMATS[form]

    def peak(count: int) -> int:
        path = tmp_path / f"{count}-{file}"
        write(path, [{"question": f"{n} " * 40, "reasoning": "r " * 40, "answer": str(n)} for n in range(count)])
        loaded = load(name, path)
        tracemalloc.start()
        assert sum(1 for _ in loaded.problems) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(1500), peak(9000)
    assert (tmp_path / f"9000-{file}").stat().st_size > 2_000_000
    assert many - few < 300_000


def test_a_line_of_ten_megabytes_is_a_line(tmp_path: Path) -> None:
    long = {"question": "q", "reasoning": "word " * 2_000_000, "answer": "4"}
    for form in ("JSONL", "JSON array", "CSV", "Parquet"):
        name, file, write = FORMATS[form]
        write(tmp_path / file, [long, {**long, "reasoning": "r"}])
        first, second = problems(name, tmp_path / file)
        assert len(first.reasoning) == 9_999_999 and second.reasoning == "r"


# -- published tasks in other forms -----------------------------------------------------------------------

GSM = [{"question": f"How many {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(6)]
SAME_GSM = [Problem("gsm8k", f"train-{n + 1}", f"How many {n}?", f"It is {n}.", str(n)) for n in range(6)]


def save_folder(path: Path, rows: list[Any]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))


COPIES: dict[str, dict[str, Callable[[Path], None]]] = {
    "json": {"train.json": lambda path: write_json(path, GSM)},
    "parquet": {"train.parquet": lambda path: write_parquet(path, GSM)},
    "csv": {"train.csv": lambda path: write_csv(path, GSM)},
    "saved": {"train": lambda path: save_folder(path, GSM)},
    "hub, one part": {"main/train-00000-of-00001.parquet": lambda path: write_parquet(path, GSM)},
    "hub, old name": {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": lambda path: write_parquet(path, GSM)},
    "hub, parts": {
        "data/train-00000-of-00002.parquet": lambda path: write_parquet(path, GSM[:4]),
        "data/train-00001-of-00002.parquet": lambda path: write_parquet(path, GSM[4:]),
    },
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_published_task_is_found_in_the_hubs_forms_too(tmp_path: Path, copy: str) -> None:
    for name, write in COPIES[copy].items():
        (tmp_path / "gsm8k" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "gsm8k" / name)
    loaded = published("gsm8k", tmp_path)
    assert list(loaded.problems) == SAME_GSM and not loaded.pool
    (source,) = loaded.sources
    names = list(COPIES[copy])
    assert source.place == ("gsm8k/data/train-*.parquet" if len(names) > 1 else f"gsm8k/{names[0]}")
    assert source.kind == ("folder" if len(names) > 1 or copy == "saved" else "file") and len(source.sha256) == 64


def test_the_listed_file_goes_first_and_a_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    write_jsonl(tmp_path / "gsm8k/train.jsonl", GSM[:1])
    write_parquet(tmp_path / "gsm8k/train.parquet", GSM)
    assert len(list(published("gsm8k", tmp_path).problems)) == 1
    (tmp_path / "gsm8k/train.jsonl").unlink()
    (tmp_path / "gsm8k/train.parquet").rename(tmp_path / "gsm8k/train-00001-of-00003.parquet")
    with pytest.raises(DataError, match="should be 3 files") as caught:
        published("gsm8k", tmp_path)
    assert caught.value.place == str(tmp_path / "gsm8k") and caught.value.fix


def test_math_is_found_with_a_folder_a_subject_and_as_the_publishers_archive(tmp_path: Path) -> None:
    def row(n: int) -> Row:
        return {"problem": f"p{n}", "level": "Level 1", "type": "Algebra", "solution": f"\\boxed{{{n}}}"}

    for n, subject in enumerate(("algebra", "geometry")):
        for split in ("train", "test"):
            path = tmp_path / f"hub/math/{subject}/{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(path, [row(2 * n), row(2 * n + 1)])
            for k in (9, 10):
                file = tmp_path / f"archive/math/{split}/{subject}/{k}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(row(10 * n + k), indent=4))
    for copy, answers in (("hub", ["0", "1", "2", "3"]), ("archive", ["9", "10", "19", "20"])):
        loaded = published("math", tmp_path / copy, test=1)
        assert [p.answer for p in loaded.problems] == answers and not loaded.pool
        assert [p.id for p in loaded.test or ()] == ["test-1", "test-2", "test-3", "test-4"]
        assert [source.kind for source in loaded.sources] == ["folder", "folder"]


def test_only_a_published_file_without_splits_is_a_pool(data_root: Path, tmp_path: Path) -> None:
    loaded = published("svamp", data_root, test=1)
    assert loaded.pool and loaded.test is None and len(list(loaded.problems)) == 1000
    write_jsonl(tmp_path / "mine.jsonl", ROWS)
    assert not load("jsonl", tmp_path / "mine.jsonl").pool and not TASKS["jsonl"].published


def test_rows_of_the_hubs_copies() -> None:
    def read(reader: Callable[[RawRow, str], Problem], **columns: Any) -> tuple[str, str, str]:
        problem = reader(RawRow(columns, "f:1", 1), "x")
        return problem.question, problem.reasoning, problem.answer

    body = {"ID": "chal-777", "Body": "There are 87 oranges.", "Question": "How many?", "Equation": "( 87.0 - 2.0 )"}
    concat = {"Type": "Subtraction", "question_concat": "There are 87 oranges. How many?"}
    for answer in ("85", "85.0", 85, 85.0):
        assert read(svamp.read_row, **body, **concat, Answer=answer) == (concat["question_concat"], "87 - 2", "85")
    fact = {"qid": "1", "term": "t", "description": "d", "question": "Is it?", "facts": "One. Two."}
    for answer, gold in ((True, "yes"), (False, "no"), ("True", "yes"), ("false", "no")):
        assert read(strategyqa.read_row, **fact, answer=answer) == ("Is it?", "One. Two.", gold)
    with pytest.raises(DataError, match="written as text"):
        read(strategyqa.read_row, **{**fact, "facts": "['One.', 'Two.']"}, answer=True)
    text = {"id": "1", "original_text": "多少米？", "segmented_text": "多少 米 ？"}
    assert read(math23k.read_row, **text, equation="x=44*20", ans="880") == ("多少米？", "x=44*20", "880")
    template = {"target_template": ["x", "=", "temp_a", "/", "temp_b"], "num_list": [1.0, 3.0]}
    assert read(math23k.read_row, **text, **template, answer=1 / 3) == ("多少米？", "x=1/3", "1/3")
    template["target_template"] = "x = temp_b * 0.5"  # type: ignore[assignment]
    assert read(math23k.read_row, **text, **template, answer=1.5) == ("多少米？", "x=3*0.5", "1.5")
    with pytest.raises(DataError, match="no equation"):
        read(math23k.read_row, **text, target_template="x = temp_a", answer=1.5)


PUBLISHED: dict[str, Callable[[RawRow, str], Problem]] = {
    "gsm8k/test.jsonl": gsm8k.read_row,
    "svamp/SVAMP.json": svamp.read_row,
    "strategyqa/dev.json": strategyqa.read_row,
    "math23k/math23k_test.json": math23k.read_row,
    "math/test_first1000.jsonl": math.read_row,
    "arc_challenge/test.jsonl": arc_challenge.read_row,
    "hotpotqa/distractor_hub_schema_first100.json": hotpotqa.read_row,
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_rows_survive_parquet(data_root: Path, tmp_path: Path, file: str) -> None:
    rows = list(read_rows(data_root / file, place=""))
    write_parquet(tmp_path / "r.parquet", [{k: v for k, v in row.columns.items() if k != "evidence"} for row in rows])
    read = PUBLISHED[file]
    assert [read(row, "x") for row in read_rows(tmp_path / "r.parquet", place="")] == [read(row, "x") for row in rows]


def test_find_takes_nothing_for_something_else(tmp_path: Path) -> None:
    (tmp_path / "x/train").mkdir(parents=True)
    for name in ("training.jsonl", "train.txt", "train-00000-of-00001.bin", "xtrain-00000-of-00001.parquet"):
        (tmp_path / "x" / name).write_text("{}")
    assert find(tmp_path, "x/train.jsonl") is None and find(tmp_path, "y/train.jsonl") is None
    assert find(tmp_path, "*/train.jsonl") is None
    for number in (10, 9, 1):
        (tmp_path / f"x/train/{number}.json").write_text("{}")
    found = find(tmp_path, "*/train/*.json")
    assert found is not None and [path.name for path in found.paths] == ["1.json", "9.json", "10.json"]
