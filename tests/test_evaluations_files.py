"""The files of evaluations: other layouts, the hub, what is missing, and bad files and rows named with their line."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvdistill.core.errors import DataError
from kvdistill.data.sets import EVALUATIONS, Evaluation, Member, find_evaluation, missing_evaluations, published
from kvdistill.data.sources import RawRow

# ---- names, missing files, the hub


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gsm8", "gsm8k"),
        ("MATH500", "math500"),
        ("bbh_navigate", "bbh"),
        ("truthfulqa_mc1", "truthfulqa"),
        ("c-eval", "ceval"),
    ],
)
def test_an_unknown_evaluation_names_the_nearest(name: str, meant: str) -> None:
    assert find_evaluation(meant, place="here") is EVALUATIONS[meant]
    with pytest.raises(DataError, match=f"here: unknown evaluation '{name}'") as caught:
        find_evaluation(name, place="here")
    assert f"'{meant}'" in caught.value.fix


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_a_missing_file_names_the_evaluation_the_paths_and_the_hub(name: str, tmp_path: Path) -> None:
    evaluation = EVALUATIONS[name]
    assert not evaluation.is_there(tmp_path) and name in missing_evaluations(tmp_path)
    for attempt in (
        lambda: evaluation.members(tmp_path),
        lambda: evaluation.load(evaluation.data.members[0], tmp_path, "test"),
    ):
        with pytest.raises(DataError) as caught:
            attempt()
        message = caught.value.message()
        assert caught.value.place == "data.root"
        assert name in message and evaluation.data.hub in message and "unset data.root" in message
    with pytest.raises(DataError, match="no such folder"):
        evaluation.members(tmp_path / "nowhere")


def test_examples_that_are_not_there_are_a_clear_error(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    shutil.copy(data_root / "gsm8k" / "test.jsonl", tmp_path / "gsm8k")
    gsm8k, truthfulqa = EVALUATIONS["gsm8k"], EVALUATIONS["truthfulqa"]
    with pytest.raises(DataError, match="no examples for the prompt") as caught:
        gsm8k.load(gsm8k.data.members[0], tmp_path, "fewshot")
    assert "num_fewshot: 0" in caught.value.fix and "gsm8k/train.jsonl" in caught.value.what
    with pytest.raises(DataError, match=r"evaluate\.num_fewshot"):
        truthfulqa.load(truthfulqa.data.members[0], data_root, "fewshot")


def test_hub_rows_go_through_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def read_hub(path: str, config: str | None, split: str, **options: Any) -> Iterator[RawRow]:
        asked.append((path, config, split, options["revision"]))
        assert "DIR/cmmlu/test/logical.csv" in options["local_layout"]
        columns = {
            "Question": "问",
            "A": "甲",
            "B": "乙",
            "C": "丙",
            "D": "丁",
            "Answer": "E" if config == "arts" else "B",
        }
        return iter([RawRow(columns, f"{path}:{split}:1", 1)])

    cmmlu = EVALUATIONS["cmmlu"].pinned("abc")
    monkeypatch.setattr(published, "read_hub", read_hub)
    member = next(member for member in cmmlu.members(None) if member.name == "cmmlu_logical")
    (row,) = cmmlu.load(member, None, "test")
    assert asked == [("haonan-li/cmmlu", "logical", "test", "abc")] and cmmlu.data.revision == "abc"
    assert set(row) == {"Question", "A", "B", "C", "D", "Answer"} and cmmlu.gold(member, row) == "B"
    assert len(cmmlu.members(None)) == 67
    assert EVALUATIONS["cmmlu"].data.revision is None


def test_an_unreachable_hub_names_the_local_alternative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    gpqa = EVALUATIONS["gpqa"]
    with pytest.raises(DataError, match="Idavidrein/gpqa") as caught:
        gpqa.load(gpqa.data.members[0], None, "test")
    assert "gpqa/gpqa_main.csv" in caught.value.fix


# ---- other layouts


def test_other_forms_of_the_same_files_are_read(data_root: Path, tmp_path: Path) -> None:
    import datasets

    gsm8k = EVALUATIONS["gsm8k"]
    (member,) = gsm8k.data.members
    wanted = gsm8k.load(member, data_root, "test")[:20]
    table = datasets.Dataset.from_list(wanted)
    for name, write in {
        "gsm8k/test.jsonl": table.to_json,
        "gsm8k/test.parquet": table.to_parquet,
        "gsm8k/test.csv": table.to_csv,
        "gsm8k/main/test-00000-of-00001.parquet": table.to_parquet,
        "gsm8k/test": table.save_to_disk,
    }.items():
        root = tmp_path / name.replace("/", "_")
        (root / name).parent.mkdir(parents=True)
        write(str(root / name))
        assert gsm8k.load(member, root, "test") == wanted, name


def test_arc_in_its_first_form_and_with_numbered_labels(tmp_path: Path) -> None:
    offered = [
        {"text": text, "label": label} for label, text in zip("1234", ("dry", "wet", "oily", "cold"), strict=True)
    ]
    first = {"id": "x", "question": {"stem": "Which palm?", "choices": offered}, "answerKey": "3"}
    (tmp_path / "arc_challenge").mkdir()
    (tmp_path / "arc_challenge" / "ARC-Challenge-Test.jsonl").write_text(json.dumps(first))
    arc = EVALUATIONS["arc_challenge"]
    (member,) = arc.members(tmp_path)
    (row,) = arc.load(member, tmp_path, "test")
    assert row["choices"] == {"text": ["dry", "wet", "oily", "cold"], "label": ["1", "2", "3", "4"]}
    assert arc.gold(member, row) == "C" and row["answerKey"] == "3"
    assert arc.question(row) == "Which palm?\nA. dry\nB. wet\nC. oily\nD. cold"


def test_truthfulqa_in_the_hubs_shape_and_in_another_order(tmp_path: Path) -> None:
    row = {
        "question": "Who?",
        "mc1_targets": {"choices": ["him", "", "her", "it"], "labels": [0, 0, 1, 0]},
        "mc2_targets": {"choices": ["her", "she", "him"], "labels": [1, 1, 0]},
    }
    (tmp_path / "truthfulqa").mkdir()
    (tmp_path / "truthfulqa" / "validation.jsonl").write_text(json.dumps(row))
    evaluation = EVALUATIONS["truthfulqa"]
    mc1, mc2 = evaluation.members(tmp_path)
    (read,) = evaluation.load(mc1, tmp_path, "test")
    assert read["mc1_targets"] == {"choices": ["her", "him", "it"], "labels": [1, 0, 0]}
    assert read["mc2_targets"] == row["mc2_targets"]
    assert evaluation.gold(mc2, read) == "her\nshe"


# ---- bad rows


GOOD: Mapping[str, Mapping[str, Any]] = {
    "gsm8k": {"question": "How many?", "answer": "one\n#### 1"},
    "math500": {"problem": "What?", "solution": "So \\boxed{2}.", "answer": "2"},
    "bbh_navigate": {"input": "Where?\nOptions:\n- Yes\n- No", "target": "No"},
    "bbh_snarks": {"input": "Which?\nOptions:\n(A) this\n(B) that", "target": "(B)"},
    "gpqa_main": {"Question": "q", "Correct Answer": "a"} | {f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)},
    "truthfulqa_mc1": {"question": "Who?", "mc1_targets": {"her": 1, "him": 0}, "mc2_targets": {"her": 1, "him": 0}},
    "cmmlu_logical": {"Question": "问", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "B"},
    "ceval_law": {"question": "问", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "B"},
    "arc_challenge": {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
}  # fmt: skip
ABSENT = object()
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("gsm8k", {"answer": ABSENT}, "no gold answers"),
    ("gsm8k", {"answer": " "}, "no gold answers"),
    ("gsm8k", {"answer": "one"}, "does not end in"),
    ("gsm8k", {"answer": "#### one"}, "does not end in"),
    ("gsm8k", {"question": ABSENT}, "'question'"),
    ("gsm8k", {"question": ["How?"]}, "'question'"),
    ("math500", {"answer": ""}, "no gold answers"),
    ("math500", {"solution": "So 2."}, "boxes no answer"),
    ("math500", {"solution": None}, "no gold answers"),
    ("math500", {"problem": ""}, "'problem'"),
    ("bbh_navigate", {"target": ABSENT}, "no gold answers"),
    ("bbh_navigate", {"target": "Perhaps"}, "not of the kind: yes or no"),
    ("bbh_navigate", {"input": 5.5j}, "'input'"),
    ("bbh_snarks", {"target": "(C)"}, "not among the options"),
    ("gpqa_main", {"Correct Answer": ""}, "no gold answers"),
    ("gpqa_main", {"Incorrect Answer 3": ABSENT}, "'Incorrect Answer 3'"),
    ("gpqa_main", {"Question": None}, "'Question'"),
    ("truthfulqa_mc1", {"mc1_targets": {"her": 0, "him": 0}}, "no gold answers"),
    ("truthfulqa_mc1", {"mc1_targets": {"her": 1, "him": 1}}, "2 true of 2 choices"),
    ("truthfulqa_mc1", {"mc1_targets": {"": 1, "him": 0}}, "no gold answers"),
    ("truthfulqa_mc1", {"mc1_targets": ["her"]}, "'mc1_targets'"),
    ("truthfulqa_mc1", {"mc1_targets": {"choices": ["her"], "labels": [1, 0]}}, "'mc1_targets'"),
    ("truthfulqa_mc1", {"mc2_targets": {"her": 0}}, "no gold answers"),
    ("truthfulqa_mc1", {"mc2_targets": ABSENT}, "no gold answers"),
    ("cmmlu_logical", {"Answer": ""}, "no gold answers"),
    ("cmmlu_logical", {"Answer": "E"}, "not one of A, B, C, D"),
    ("cmmlu_logical", {"C": ""}, "'C'"),
    ("cmmlu_logical", {"D": ABSENT}, "'D'"),
    ("ceval_law", {"answer": ABSENT}, "no gold answers"),
    ("ceval_law", {"answer": "AB"}, "not one of A, B, C, D"),
    ("arc_challenge", {"answerKey": ""}, "no gold answers"),
    ("arc_challenge", {"answerKey": "C"}, "'C'"),
    ("arc_challenge", {"choices": "x or y"}, "choices"),
]  # fmt: skip


def member_named(name: str) -> tuple[Evaluation, Member]:
    return next((e, m) for e in EVALUATIONS.values() for m in e.data.members if m.name == name)


@pytest.mark.parametrize(("name", "changed", "message"), BAD)
def test_a_bad_row_is_named(name: str, changed: dict[str, Any], message: str) -> None:
    evaluation, member = member_named(name)
    source = evaluation.data
    assert isinstance(source, published.Published) and source.columns is not None
    source.columns(member, RawRow(GOOD[name], "file:1", 1))  # the good one passes
    columns = {key: value for key, value in {**GOOD[name], **changed}.items() if value is not ABSENT}
    with pytest.raises(DataError) as caught:
        source.columns(member, RawRow(columns, "file:7", 7))
    assert caught.value.place == "file:7" and message in caught.value.what and caught.value.fix


def test_cevals_test_split_has_no_gold_answers(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "ceval" / "val").mkdir(parents=True)
    target = tmp_path / "ceval" / "val" / "computer_network_val.csv"
    shutil.copy(data_root / "ceval" / "test" / "computer_network_test.csv", target)
    ceval = EVALUATIONS["ceval"]
    (member,) = ceval.members(tmp_path)
    with pytest.raises(DataError, match="no gold answers") as caught:
        ceval.load(member, tmp_path, "test")
    assert caught.value.place == f"{target}:2" and "val/SUBJECT_val.csv" in caught.value.fix


def test_bad_files_are_named_with_their_line(tmp_path: Path) -> None:
    gsm8k, bbh = EVALUATIONS["gsm8k"], EVALUATIONS["bbh"]
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    good = json.dumps(dict(GOOD["gsm8k"])).encode()
    for content, place, message in (
        (good + b"\n{broken", f"{file}:2", "broken JSON"),
        (good + b'\n{"question": "\xff"}', f"{file}:2", "UTF-8"),
        (good + b'\n{"question": "x", "answer": NaN}', f"{file}:2", "NaN"),
        (good + b"\n[1]", f"{file}:2", "not an object"),
        (gzip.compress(good), str(file), "gzip"),
        (b"", str(file), "no rows"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError) as caught:
            gsm8k.load(gsm8k.data.members[0], tmp_path, "test")
        assert caught.value.place.startswith(place) and message in caught.value.what
    task = tmp_path / "bbh" / "bbh" / "navigate.json"
    task.parent.mkdir(parents=True)
    member = next(member for member in bbh.data.members if member.local == "navigate")
    for examples, message in (
        ([dict(GOOD["bbh_navigate"]), {"input": "x"}], "(example 2)"),
        ([], "not a list"),
        ("x", "not a list"),
    ):
        task.write_text(json.dumps({"canary": "c", "examples": examples}))
        with pytest.raises(DataError) as caught:
            bbh.load(member, tmp_path, "test")
        assert caught.value.place.startswith(f"{task}:1") and message in caught.value.message()
