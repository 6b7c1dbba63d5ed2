"""Everything that can be wrong with a user's data file is one clear error: what, where (file:line), how to mend it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_recipe import Answer, assert_one_message, invoke, tiny_tree, write_recipe

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, missing, quoted, shown
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.sets import TASKS, find_task
from kvdistill.data.sources import files, read_rows
from kvdistill.data.sources.rows import RawRow

ROW = {"question": "How many?", "reasoning": "Two and two.", "answer": "4"}
GOOD = json.dumps(ROW).encode() + b"\n"
HEADER = b"question,reasoning,answer\n"
LINE = b"How many?,Two and two.,4\n"


def read_all(name: str, file: Path, **task: Any) -> None:
    recipe = TaskRecipe(name=name, file=str(file), **task)
    list(TASKS[name].load(recipe, DataRecipe(tasks=[recipe])).problems)


def error_of(name: str, file: Path, **task: Any) -> DataError:
    """The error that reading all of a file ends in: short, on two lines, harmless for a terminal."""
    with pytest.raises(DataError) as caught:
        read_all(name, file, **task)
    error = caught.value
    assert error.place and error.fix and len(error.what) < 400 + len(str(file))
    assert "\n" not in error.what + error.place + error.fix
    assert (error.what + error.place + error.fix).isprintable()
    return error


# -- JSONL and CSV ----------------------------------------------------------------------------------------

JSONL: dict[str, tuple[bytes, str, str]] = {
    "missing field": (GOOD + b'{"question": "q", "reasoning": "r"}\n', ":2", "'answer' is missing"),
    "misspelt field": (b'{"qestion": "q", "reasoning": "r", "answer": "4"}\n', ":1", "did you mean 'qestion'"),
    "list": (b'{"question": ["q"], "reasoning": "r", "answer": "4"}\n', ":1", "'question' is list, not text"),
    "object": (b'{"question": "q", "reasoning": "r", "answer": {"a": 4}}\n', ":1", "'answer' is dict"),
    "bool": (b'{"question": "q", "reasoning": "r", "answer": false}\n', ":1", "'answer' is bool"),
    "null": (b'{"question": "q", "reasoning": "r", "answer": null}\n', ":1", "'answer' is null"),
    "empty answer": (b'{"question": "q", "reasoning": "r", "answer": ""}\n', ":1", "'answer' is empty"),
    "blank answer": (b'{"question": "q", "reasoning": "r", "answer": " \\u00a0\\n"}\n', ":1", "'answer' is empty"),
    "NaN": (GOOD + b'{"question": "q", "reasoning": "r", "answer": NaN}\n', ":2", "NaN is not JSON"),
    "Infinity": (b'{"question": "q", "reasoning": "r", "answer": -Infinity}\n', ":1", "-Infinity is not JSON"),
    "NaN that nobody reads": (GOOD[:-2] + b', "score": NaN}\n', ":1", "NaN is not JSON"),
    "a name twice": (GOOD[:-2] + b', "answer": "5"}\n', ":1", "'answer' stands twice"),
    "GBK in a UTF-8 file": (GOOD + '{"question": "多少？"}\n'.encode("gbk"), ":2", "not UTF-8"),
    "Latin-1 in a UTF-8 file": (GOOD * 3 + '{"question": "café"}\n'.encode("latin-1"), ":4", "not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), ":1", "byte order mark of UTF-16"),
    "UTF-16 without its mark": (GOOD.decode().encode("utf-16-le"), ":1", "NUL byte"),
    "NUL byte": (GOOD * 50 + GOOD[:20] + b"\x00" + GOOD[20:], ":51", "NUL byte"),
    "NUL, escaped": (b'{"question": "a\\u0000b", "reasoning": "r", "answer": "4"}\n', ":1", "a NUL character"),
    "half a pair": (b'{"question": "q", "reasoning": "\\udc00", "answer": "4"}\n', ":1", "surrogate"),
    "same id": (b'{"id": "a", ' + GOOD[1:] + GOOD + b'{"id": "a", ' + GOOD[1:], ":3", "'a' was used before, at"),
    "same id, a number": (b'{"id": 1, ' + GOOD[1:] + b'{"id": "1", ' + GOOD[1:], ":2", "'1' was used before"),
    "an id like a line's": (GOOD + b'{"id": "line-1", ' + GOOD[1:], ":2", "'line-1' was used before"),
    "a line like an id": (b'{"id": "line-2", ' + GOOD[1:] + GOOD, ":2", "'line-2' was used before"),
    "no object": (GOOD + b"42\n", ":2", "JSON int, not an object"),
    "array": (b"[" + GOOD.strip() + b"]\n", ":1", "JSON list, not an object"),
    "array over lines": (b"[\n" + GOOD + b"]\n", ":1", "broken JSON"),
    "two on a line": (GOOD.strip() + GOOD, ":1", "broken JSON"),
    "cut off": (GOOD + GOOD[:30], ":2", "broken JSON"),
    "single quotes": (b"{'question': 'q'}\n", ":1", "broken JSON"),
    "CSV": (HEADER + LINE, ":1", "broken JSON"),
    "mark in the answer": (b'{"question": "q", "reasoning": "r", "answer": "#### 4"}\n', ":1", "must not stand"),
    "empty": (b"", "", "no rows"),
    "blank lines": (b"\n\n  \n", "", "no rows"),
}
CSV: dict[str, tuple[bytes, str, str]] = {
    "missing column": (b"question,reasoning\nq,r\n", ":1", "'answer' is missing"),
    "misspelt column": (b"question,reasoning,anser\nq,r,4\n", ":1", "did you mean 'anser'"),
    "no header": (LINE * 2, ":1", "'question' is missing"),
    "a column twice": (b"question,reasoning,answer,answer\nq,r,4,5\n", ":1", "names 'answer' twice"),
    "empty answer": (HEADER + LINE + b"q,r,\n", ":3", "'answer' is empty"),
    "blank question": (HEADER + b'" ",r,4\n', ":2", "'question' is empty"),
    "too many cells": (HEADER + LINE + b"q, with a comma,r,4\n", ":3", "4 cells, the header 3"),
    "too few cells": (HEADER + b"q,r\n", ":2", "2 cells, the header 3"),
    "quote never closed": (HEADER + LINE + b'"q,r,4\n' + LINE * 3, ":3", "never closed"),
    "quote inside": (HEADER + b'"say "so"",r,4\n', ":2", "broken CSV"),
    "backslash quotes": (HEADER + b'"say \\"so\\"",r,4\n', ":2", "broken CSV"),
    "carriage returns": (HEADER.strip() + b"\r" + LINE.strip() + b"\r", ":1", "new-line"),
    "GBK in a UTF-8 file": (HEADER + LINE + "多少？,r,4\n".encode("gbk"), ":3", "not UTF-8"),
    "Latin-1 inside a text of many lines": (HEADER + b'"a\nb\xe9\nc",r,4\n', ":3", "not UTF-8"),
    "UTF-16": ((HEADER + LINE).decode().encode("utf-16"), ":1", "byte order mark of UTF-16"),
    "NUL byte": (HEADER + LINE * 100 + b"q,\x00r,4\n", ":102", "NUL byte"),
    "same id": (b"id," + HEADER + b"a," + LINE + b'" a ",' + LINE, ":3", "'a' was used before, at"),
    "an id like a row's": (b"id," + HEADER + b"," + LINE + b"row-1," + LINE, ":3", "'row-1' was used before"),
    "two lines of answer": (HEADER + b'q,r,"4\n5"\n', ":2", "one line"),
    "header only": (HEADER, "", "no rows but the header"),
    "blank rows": (HEADER + b"\n,,\n ,,\n"[:5], "", "no rows but the header"),
    "blank lines": (b"\n \n", "", "no rows"),
    "empty": (b"", "", "no rows"),
    "JSON lines": (GOOD, ":1", "is JSON, not a table"),
    "JSON array": (b"[\n" + GOOD + b"]", ":1", "is JSON, not a table"),
}


@pytest.mark.parametrize("case", JSONL)
def test_a_bad_jsonl_file(tmp_path: Path, case: str) -> None:
    data, where, what = JSONL[case]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(data)
    error = error_of("jsonl", file)
    assert error.place == f"{file}{where}" and what in error.what


@pytest.mark.parametrize("case", CSV)
def test_a_bad_csv_file(tmp_path: Path, case: str) -> None:
    data, where, what = CSV[case]
    file = tmp_path / "rows.csv"
    file.write_bytes(data)
    error = error_of("csv", file)
    assert error.place == f"{file}{where}" and what in error.what


def test_the_fix_names_the_other_format(tmp_path: Path) -> None:
    for name, data, other in (("rows.txt", GOOD, "name: jsonl"), ("table.txt", HEADER + LINE, "name: csv")):
        (tmp_path / name).write_bytes(data)
        assert other in error_of("csv" if "jsonl" in other else "jsonl", tmp_path / name).fix
    pq.write_table(pa.table({"question": ["q"]}), tmp_path / "hidden.txt")
    assert "name: parquet" in error_of("jsonl", tmp_path / "hidden.txt").fix
    assert "name: jsonl" in error_of("parquet", tmp_path / "rows.txt").fix
    for name, task, right in (
        ("r.csv", "jsonl", "csv"),
        ("r.tsv", "parquet", "csv"),
        ("r.parquet", "csv", "parquet"),
        ("r.JSONL", "csv", "jsonl"),
        ("r.json", "parquet", "jsonl"),
    ):
        error = error_of(task, tmp_path / name)
        assert f"name: {right}" in error.fix and name in error.what and error.place == f"data.tasks ({task}).file"


def test_mistakes_in_the_recipe_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(GOOD)
    assert "did you mean 'question'" in error_of("jsonl", tmp_path / "r.jsonl", fields={"qestion": "q"}).fix
    error = error_of("jsonl", tmp_path / "r.jsonl", fields={"id": "idd"})
    assert "no row has the column 'idd'" in error.what and error.place == "data.tasks (r).fields"
    assert "revision" in error_of("jsonl", tmp_path / "r.jsonl", revision="main").what
    recipe = TaskRecipe(name="csv")
    with pytest.raises(DataError, match="csv needs a file"):
        TASKS["csv"].load(recipe, DataRecipe(tasks=[recipe]))
    recipe = TaskRecipe(name="gsm8k", fields={"question": "q"})
    with pytest.raises(DataError, match="`fields` does not go with gsm8k") as caught:
        TASKS["gsm8k"].load(recipe, DataRecipe(tasks=[recipe]))
    assert "jsonl, csv or parquet" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gms8k", "gsm8k"),
        ("json", "jsonl"),
        ("tsv", "csv"),
        ("parket", "parquet"),
        ("arc", "arc_challenge"),
        ("GSM8K", "gsm8k"),
    ],
)
def test_an_unknown_task_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(DataError, match="unknown task") as caught:
        find_task(name, place="data.tasks[0].name")
    assert f"did you mean '{near}'" in caught.value.fix


# -- what is no text file at all ----------------------------------------------------------------------------


def _zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", data)
    return out.getvalue()


def _tar(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _sqlite(data: bytes) -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table rows (question)")
        return connection.serialize()


KINDS: dict[str, tuple[bytes, str, str]] = {
    "zip": (_zip(GOOD), "zip archive", "unpack"),
    "gzip": (gzip.compress(GOOD), "gzip archive", "gunzip"),
    "bzip2": (bz2.compress(GOOD), "bzip2 archive", "bunzip2"),
    "xz": (lzma.compress(GOOD), "xz archive", "unxz"),
    "zstd": (pa.compress(GOOD, codec="zstd", asbytes=True), "zstd archive", "unzstd"),
    "lz4": (pa.compress(GOOD, codec="lz4", asbytes=True), "lz4 archive", "unlz4"),
    "tar": (_tar(GOOD), "tar archive", "tar -xf"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04", "7z archive", "unpack"),
    "ELF": (b"\x7fELF\x02\x01\x01\x00" + bytes(50), "executable", "data file"),
    "EXE": (b"MZ\x90\x00\x03" + bytes(50), "executable", "data file"),
    "pickle": (pickle.dumps([ROW]), "pickle", "JSONL"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\n", "PDF", "JSONL"),
    "SQLite": (_sqlite(GOOD), "SQLite", "CSV"),
    "Arrow": (b"ARROW1\x00\x00" + bytes(20), "Arrow", "Parquet"),
    "Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office", "CSV UTF-8"),
    "web page": (b"\n <!DOCTYPE html>\n<html></html>", "web page", "download"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer", "git lfs pull"),
    "random bytes": (bytes(range(256)) * 9, "NUL byte", "UTF-8"),
}


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named(tmp_path: Path, kind: str, name: str) -> None:
    data, what, fix = KINDS[kind]
    file = tmp_path / f"rows.{name}"
    file.write_bytes(data)
    error = error_of(name, file)
    assert error.place.startswith(str(file))
    if name == "parquet" and kind == "random bytes":
        assert "not a Parquet file" in error.what
    else:
        assert what in error.what and fix in error.fix


@pytest.mark.parametrize("name", ["jsonl", "csv", "parquet"])
def test_what_is_not_a_file(tmp_path: Path, name: str) -> None:
    place = f"data.tasks ({name}).file"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(GOOD)
    for path, what in (
        ("folder", "is a folder"),
        ("fifo", "not a plain file"),
        ("broken", "symbolic link to"),
        ("loop", "cannot be read"),
        ("none", "file not found"),
        ("file/inside", "file not found"),
    ):
        error = error_of(name, tmp_path / path)
        assert what in error.what and error.place == place
    for path, words in (("x" * 300, "too long for a path"), ("a\x00b", "NUL character")):  # the recipe says it
        with pytest.raises(ValidationError, match=words):
            error_of(name, tmp_path / path)


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_a_file_that_may_not_be_read_or_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / f"rows.{name}"
    many = GOOD * 20_000 if name == "jsonl" else HEADER + LINE * 20_000
    for change in (lambda: os.truncate(file, 200_005), lambda: file.write_bytes(many + GOOD), file.unlink):
        file.write_bytes(many)
        recipe = TaskRecipe(name=name, file=str(file))
        found = iter(TASKS[name].load(recipe, DataRecipe(tasks=[recipe])).problems)
        next(found)
        change()
        with pytest.raises(DataError, match=r"changed while it was read|file not found"):
            list(found)
    file.write_bytes(many)

    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not keep root out
    assert "may not be read" in error_of(name, file).what and "chmod" in error_of(name, file).fix


# -- Parquet --------------------------------------------------------------------------------------------


def _parquet(**columns: Any) -> Callable[[Path], None]:
    full = {"question": ["q", "p"], "reasoning": ["r", "s"], "answer": ["4", "5"], **columns}
    return lambda path: pq.write_table(
        pa.table({name: value for name, value in full.items() if value is not None}), path
    )


PARQUET: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing column": (_parquet(answer=None, answr=["4", "5"]), "", "did you mean 'answr'"),
    "list column": (_parquet(answer=[["4"], ["5"]]), "", "'answer' holds list<"),
    "nested column": (_parquet(question=[{"a": 1}, {"a": 2}]), "", "'question' holds struct<"),
    "numbers for a question": (_parquet(question=[1, 2]), "", "'question' holds int64, not text"),
    "bool answers": (_parquet(answer=[True, False]), "", "'answer' holds bool, not text or numbers"),
    "bytes": (_parquet(answer=[b"4", b"5"]), "", "'answer' holds binary"),
    "times": (_parquet(answer=pa.array([1, 2], pa.timestamp("s"))), "", "'answer' holds timestamp"),
    "NaN": (_parquet(answer=[4.0, float("nan")]), ":2", "'answer' is nan"),
    "infinity": (_parquet(answer=[4.0, float("inf")]), ":2", "'answer' is inf"),
    "null": (_parquet(answer=["4", None]), ":2", "'answer' is null"),
    "null everywhere": (_parquet(answer=pa.nulls(2)), ":1", "'answer' is null"),
    "empty": (_parquet(question=["q", " "]), ":2", "'question' is empty"),
    "same id": (_parquet(id=[7, 7]), ":2", "'7' was used before, at"),
    "no rows": (_parquet(question=pa.array([], pa.string()), reasoning=None, answer=None), "", "no rows"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_a_bad_parquet_file(tmp_path: Path, case: str) -> None:
    write, where, what = PARQUET[case]
    write(tmp_path / "rows.parquet")
    error = error_of("parquet", tmp_path / "rows.parquet")
    assert error.place == f"{tmp_path / 'rows.parquet'}{where}" and what in error.what


def test_a_parquet_text_that_is_no_utf8_and_two_columns_of_one_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pa.table({"reasoning": ["r", "s"], "answer": ["4", "5"]})
    pq.write_table(table.append_column("question", pa.array([b"q", b"caf\xe9"]).view(pa.string())), file)
    error = error_of("parquet", file)
    assert error.place == f"{file}:2" and "not UTF-8" in error.what
    pq.write_table(table.append_column("answer", pa.array(["4", "5"])).append_column("question", table["answer"]), file)
    assert "two columns are called 'answer'" in error_of("parquet", file).what


@given(st.integers(0, 1), st.floats(0, 1), st.binary(min_size=1, max_size=40))
def test_a_torn_parquet_file_is_an_error_or_reads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, cut: int, share: float, noise: bytes
) -> None:
    file = tmp_path_factory.mktemp("torn") / "rows.parquet"
    table = pa.table({"question": [f"q{n}" for n in range(50)], "reasoning": ["r"] * 50, "answer": list(range(50))})
    pq.write_table(table, file, write_page_checksum=True)
    whole = file.read_bytes()
    at = int(share * (len(whole) - 1))
    file.write_bytes(whole[:at] if cut else whole[:at] + noise + whole[at + len(noise) :])
    try:
        read_all("parquet", file)
    except DataError as error:
        assert error.place.startswith(str(file)) and error.fix and str(error).replace("\n", "").isprintable()


# -- messages ---------------------------------------------------------------------------------------------

NASTY = "\x1b]0;owned\x07\x1b[31m\u202e\u2028\x9b" + "A" * 10_000_000


@pytest.mark.parametrize("place", ["answer", "id", "name", "long array"])
def test_nothing_of_ten_megabytes_or_of_a_terminals_language_is_printed(tmp_path: Path, place: str) -> None:
    row: dict[str, Any] = {
        "answer": {**ROW, "answer": NASTY + "\n" + "####"},
        "id": {**ROW, "id": NASTY},
        "name": {NASTY: 1},
        "long array": {**ROW, "answer": [NASTY] * 2},
    }[place]
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    error = error_of("jsonl", tmp_path / "r.jsonl")
    assert "A" * 100 not in str(error)
    if place in ("answer", "id"):
        text = io.StringIO()
        csv.writer(text).writerows([list(row), list(row.values()), list(row.values())])
        (tmp_path / "r.csv").write_text(text.getvalue(), newline="")
        assert "A" * 100 not in str(error_of("csv", tmp_path / "r.csv"))


def test_a_strange_file_name_is_shown_harmlessly(tmp_path: Path) -> None:
    for name in ("\x1b[2Jrows.jsonl", "rows\n.jsonl", os.fsdecode(b"r\xff.jsonl")):
        file = tmp_path / name
        file.write_bytes(b"{oops\n")
        broken = error_of("jsonl", file)
        file.unlink()
        missing = error_of("jsonl", file)
        assert "broken JSON" in broken.what and "not found" in missing.what
        for error in (broken, missing):
            shown = str(error)
            assert "rows" in shown or "r\\udcff" in shown, "its name is still there"
            assert all(line.isprintable() for line in shown.splitlines()) and len(shown.splitlines()) <= 2


def test_a_text_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdistill.data.sources import csv_table, jsonl

    for module in (files, csv_table, jsonl):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 20)
    for name, data in (
        ("r.jsonl", b'{"a": "' + b"x" * (2 << 20)),
        ("r.json", b'[{"a": "' + b"x" * (8 << 20)),
        ("r.csv", b"a,b\n1,2\n" + b"x" * (2 << 20)),
        ("r.csv", b'a,b\n1,"' + b"x\n" * (1 << 20)),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="of more than 1 MiB"):
            list(read_rows(tmp_path / name, place=""))


@given(st.text(), st.integers(1, 60))
def test_shown_texts_are_short_and_printable(text: str, length: int) -> None:
    assert quoted(text).isprintable() and len(quoted(text)) <= 80
    assert shown(text, length).isprintable() and len(shown(text, length)) <= length
    assert at_line(Path(text.replace("\x00", "") or "x"), 3).isprintable()
    assert missing(text, [text * 2, "a", "b"]).isprintable()


def test_a_short_text_is_quoted_as_python_writes_it() -> None:
    assert quoted("it's\t5") == repr("it's\t5") and quoted(5) == "5" and quoted(None) == "None"
    assert shown("one\ntwo") == "one" and shown("  ") == "" and len(quoted(10**4000)) <= 80


@given(
    st.dictionaries(
        st.text(max_size=4),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text()), st.binary()),
    ),
    st.text(max_size=4),
)
def test_a_field_of_any_row_is_a_clean_text_or_a_clear_error(columns: dict[str, Any], name: str) -> None:
    try:
        text = RawRow(columns, "f:1", 1).text(name, number_too=True)
    except DataError as error:
        assert error.place == "f:1" and error.fix and str(error).replace("\n", "").isprintable()
    else:
        assert text and text == text.strip() and "\x00" not in text and text.encode()


@given(st.binary(max_size=200), st.sampled_from(["r.jsonl", "r.json", "r.csv", "r.tsv", "r.parquet"]))
def test_any_bytes_are_rows_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    file = tmp_path_factory.mktemp("any") / name
    file.write_bytes(data)
    try:
        rows = list(read_rows(file, place="x"))
    except DataError as error:
        assert error.place.startswith(str(file)) and error.fix and str(error).replace("\n", "").isprintable()
    else:
        assert rows


# -- through the command line -----------------------------------------------------------------------------


def prepare(monkeypatch: Any, folder: Path, task: dict[str, Any]) -> Answer:
    first, second = tiny_tree()["data"]["tasks"]
    one, other = tiny_tree()["teachers"]
    key = TaskRecipe(**task).key
    recipe = write_recipe(
        folder,
        data={"tasks": [{**first, **task}, second]},
        teachers=[{**one, "train_on": [key]}, other],
    )
    return invoke(monkeypatch, "prepare", recipe)


COMMANDS: dict[str, tuple[str, str, bytes, list[str]]] = {
    "late broken row": ("jsonl", "own.jsonl", GOOD * 1 + b'{"question": \n', [":2", "broken JSON"]),
    "NaN": ("jsonl", "own.jsonl", b'{"question": "q", "reasoning": "r", "answer": NaN}\n', [":1", "NaN is not JSON"]),
    "mixed encodings": ("csv", "own.csv", HEADER + LINE + b"caf\xe9,r,4\n", [":3", "not UTF-8"]),
    "quote": ("csv", "own.csv", HEADER + LINE + b'"q,r,4\n', [":3", "never closed"]),
    "archive": ("jsonl", "own.jsonl", _zip(GOOD), ["zip archive", "unpack it"]),
    "torn": ("parquet", "own.parquet", b"PAR1" + bytes(40), ["torn Parquet"]),
    "wrong task": ("jsonl", "own.csv", HEADER + LINE, ["name: csv"]),
    "empty": ("csv", "own.csv", b"", ["no rows"]),
    "escape": ("jsonl", "own.jsonl", json.dumps({NASTY[:40]: 1}).encode() + b"\n", ["'question' is missing", r"\x1b"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_prepare_says_it_once_and_leaves_no_data_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, file, data, parts = COMMANDS[case]
    (tmp_path / file).write_bytes(data)
    answer = prepare(monkeypatch, tmp_path, {"name": name, "file": str(tmp_path / file)})
    assert_one_message(answer, str(tmp_path / file) if case != "wrong task" else "own.csv", *parts)
    assert "\x1b" not in answer.err and "\u202e" not in answer.err
    assert not (tmp_path / "run/data").exists() and not (tmp_path / "run/tokenizer").exists()
    assert not list(tmp_path.glob("run/**/*.part-*"))


def test_prepare_names_the_local_alternative_to_an_unreachable_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answer = prepare(monkeypatch, tmp_path, {"name": "gsm8k"})
    assert_one_message(answer, "cannot be reached", "data.root=DIR", "DIR/gsm8k/train.jsonl")
    answer = prepare(monkeypatch, tmp_path, {"name": "gsm8"})
    assert_one_message(answer, "unknown task 'gsm8'", "did you mean 'gsm8k'")


@pytest.mark.parametrize("name", ["csv", "parquet", "jsonl"])
def test_prepare_of_an_own_file_in_each_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows = [{"question": f"{n}+1", "reasoning": f"{n} and 1", "answer": f"{n + 1}"} for n in range(80)]
    file = tmp_path / f"own.{name}"
    if name == "csv":
        file.write_text("question;reasoning;answer\r\n" + "".join(";".join(r.values()) + "\r\n" for r in rows))
    elif name == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    answer = prepare(monkeypatch, tmp_path, {"name": name, "file": str(file)})
    assert answer.code == 0, answer
    manifest = json.loads((tmp_path / "run/data/manifest.json").read_text())
    assert manifest["tasks"]["own"]["train"]["problems"] == 48
    assert {source["task"]: source["kind"] for source in manifest["sources"]}["own"] == "file"
