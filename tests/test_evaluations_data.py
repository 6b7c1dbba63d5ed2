"""The rows of every evaluation: all that are below the data root, in the definitions' columns, and bad ones refused."""

from __future__ import annotations

import csv
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvdistill.data.leaks import question_hash
from kvdistill.data.sets import (
    EVALUATIONS,
    Evaluation,
    Member,
    evaluation_questions,
    missing_evaluations,
)
from kvdistill.data.sets.bbh import KINDS
from kvdistill.data.sets.held_out import HeldOut

pytestmark = pytest.mark.slow

# Rows of ../shared/data by member (BBH below: 250 each but three).
COUNTS = {
    "gsm8k": {"gsm8k": 1319},
    "math500": {"math500": 500},
    "bbh": {f"bbh_{name}": 250 for name in KINDS}
    | {"bbh_causal_judgement": 187, "bbh_penguins_in_a_table": 146, "bbh_snarks": 178},
    "truthfulqa": {"truthfulqa_mc1": 790, "truthfulqa_mc2": 790},
    "cmmlu": {
        "cmmlu_agronomy": 169,
        "cmmlu_ancient_chinese": 164,
        "cmmlu_chinese_driving_rule": 131,
        "cmmlu_college_mathematics": 105,
        "cmmlu_computer_science": 204,
        "cmmlu_elementary_mathematics": 230,
        "cmmlu_high_school_physics": 110,
        "cmmlu_logical": 123,
    },
    "ceval": {
        "ceval_computer_network": 19,
        "ceval_college_physics": 19,
        "ceval_advanced_mathematics": 19,
        "ceval_high_school_chemistry": 19,
        "ceval_logic": 22,
        "ceval_law": 24,
        "ceval_chinese_language_and_literature": 23,
        "ceval_accountant": 49,
    },
    "arc_challenge": {"arc_challenge": 1172},
    "strategyqa": {"strategyqa": 229},
    "math23k": {"math23k": 2317},
}
HELD_OUT_OF = {"svamp": 1000, "math": 1000, "hotpotqa": 7405}  # a part of these, fixed by their content
FEWSHOT_COUNTS = {"gsm8k": 7473, "cmmlu_logical": 5, "ceval_accountant": 5, "arc_challenge": 1056}
INVENTED_GPQA = [
    ("Which invented particle decays first?", "the flimon", "the gronon", "the plumion", "the snarkon"),
    ("How many moons has the planet Zib?", " seven ", "eight", "nine", "ten"),
    ("Which acid is [title] green?", "brillic [title] acid", "frumic acid", "glimmic  acid", "quonic acid"),
]


@pytest.fixture(scope="module", autouse=True)
def held_out_is_drawn_once() -> Iterator[None]:
    """Near duplicates of 7,405 questions take seconds; the result does not change."""
    with pytest.MonkeyPatch.context() as patch:
        problems, kept = HeldOut.problems, {}

        def once(data: HeldOut, root: Path | None) -> Any:
            if (data.name, root) not in kept:
                kept[data.name, root] = problems(data, root)
            return kept[data.name, root]

        patch.setattr(HeldOut, "problems", once)
        yield


@pytest.fixture(scope="module")
def loaded(data_root: Path) -> dict[str, dict[Member, list[dict[str, Any]]]]:
    """Evaluation -> member -> rows, of all that are there."""
    return {
        name: {member: evaluation.load(member, data_root, "test") for member in evaluation.members(data_root)}
        for name, evaluation in EVALUATIONS.items()
        if evaluation.is_there(data_root)
    }


Loaded = dict[str, dict[Member, list[dict[str, Any]]]]


def every_row(loaded: Loaded) -> Iterator[tuple[Evaluation, Member, dict[str, Any]]]:
    for name, members in loaded.items():
        for member, its_rows in members.items():
            for row in its_rows:
                yield EVALUATIONS[name], member, row


def is_right(evaluation: Evaluation, member: Member, row: dict[str, Any], completion: str) -> bool:
    lettered = evaluation.lettered(member, row)
    answer = lettered.read(completion) if lettered else evaluation.extract(member, completion)
    return answer is not None and evaluation.same(member, answer, evaluation.gold(member, row))


# ---- every row that is there


def test_all_rows_are_read(loaded: Loaded, data_root: Path) -> None:
    counts = {name: {member.name: len(its) for member, its in members.items()} for name, members in loaded.items()}
    for name, total in HELD_OUT_OF.items():
        (number,) = counts.pop(name).values()
        assert 0.2 * total < number <= total
    assert counts == COUNTS
    assert sum(counts["bbh"].values()) == 6511
    for name, number in FEWSHOT_COUNTS.items():
        evaluation, member = next((e, m) for e in EVALUATIONS.values() for m in e.data.members if m.name == name)
        assert len(evaluation.load(member, data_root, "fewshot")) == number


def test_the_publishers_answer_is_right_on_every_row(loaded: Loaded) -> None:
    wrong = Counter(
        member.name
        for evaluation, member, row in every_row(loaded)
        if not is_right(evaluation, member, row, evaluation.published_gold(member, row))
    )
    assert not wrong


def test_another_answer_is_wrong_on_every_row(loaded: Loaded) -> None:
    right, tried = [], 0
    for evaluation, member, row in every_row(loaded):
        for completion in other_answers(evaluation, member, row):
            tried += 1
            if is_right(evaluation, member, row, completion):
                right.append((member.name, evaluation.gold(member, row), completion))
    assert not right
    assert tried > sum(len(its) for members in loaded.values() for its in members.values())


def other_answers(evaluation: Evaluation, member: Member, row: dict[str, Any]) -> list[str]:
    """Completions of the right form with another answer: all other letters, or a value that is not the gold one."""
    gold = evaluation.gold(member, row)
    if lettered := evaluation.lettered(member, row):
        return [f"The answer is ({letter})." for letter in lettered.letters if letter != gold]
    if evaluation.name == "truthfulqa":
        targets = row["mc2_targets"]
        return [choice for choice, label in zip(targets["choices"], targets["labels"], strict=True) if not label]
    if evaluation.name == "bbh":
        return [f"So the answer is {other}." for other in other_targets(KINDS[member.local].name, gold)]
    if evaluation.name == "math500":
        return [f"Final Answer: The final answer is ${other_mathematics(gold)}$. I hope it is correct."]
    if evaluation.name == "strategyqa":
        return ["#### no" if gold == "yes" else "#### yes"]
    if evaluation.name in ("gsm8k", "svamp"):
        return [f"#### {int(float(gold)) + 1}", f"#### {gold}5"]
    return [f"#### {other_mathematics(gold)}" if evaluation.name == "math" else f"#### 9{gold}"]


def other_mathematics(gold: str) -> str:
    """An integer one bigger; another word; a number with a unit with a digit more; any other expression plus one."""
    if gold.removeprefix("-").isdigit():
        return str(int(gold) + 1)
    if "text" in gold or "mbox" in gold:
        return f"9{gold}" if any(sign.isdigit() for sign in gold) else gold.replace("text{", "text{un")
    return f"{gold}+1"


def other_targets(kind: str, gold: str) -> list[str]:
    words = {"yes or no": ("yes", "no"), "true or false": ("True", "False"), "valid or invalid": ("valid", "invalid")}
    if kind in words:
        return [word for word in words[kind] if word.casefold() != gold.casefold()]
    if kind == "number":
        return [str(int(gold) + 1), f"{gold}0" if gold != "0" else "7"]
    if kind == "brackets":
        return [f"{gold} )", gold.replace(gold[0], "(", 1)]
    if kind == "words":
        first, *rest = gold.split()
        return [" ".join([*rest, first]), " ".join(rest)]
    return [f"({letter})" for letter in "ABCDEFGHIJKLMNOPQR" if f"({letter})" != gold]


def test_a_question_is_known_by_its_hash(loaded: Loaded) -> None:
    """Within a member a hash stands for one question: the same hash means the same question and the same answer."""
    for name, members in loaded.items():
        for member, its in members.items():
            seen: dict[str, str] = {}
            for row in its:
                known_by = question_hash(EVALUATIONS[name].question(row))
                gold = EVALUATIONS[name].gold(member, row)
                if member.name not in ("bbh_causal_judgement", "bbh_sports_understanding"):
                    assert seen.setdefault(known_by, gold) == gold, (member.name, row)


def test_prompts_show_every_choice_and_say_how_to_answer(loaded: Loaded) -> None:
    for evaluation, member, row in every_row(loaded):
        lettered = evaluation.lettered(member, row)
        if lettered is None:
            continue
        lines = lettered.prompt.split("\n")
        assert lettered.prompt.endswith("答案：" if evaluation.language == "zh" else "Answer:")
        for letter, text in zip(lettered.letters, lettered.texts, strict=True):
            assert f"{letter}. {text}".split("\n")[0].rstrip() in [line.rstrip() for line in lines]


def test_the_right_letter_of_truthfulqa_is_spread_out(loaded: Loaded) -> None:
    (mc1,) = (its for member, its in loaded["truthfulqa"].items() if member.name == "truthfulqa_mc1")
    evaluation = EVALUATIONS["truthfulqa"]
    golds = Counter(evaluation.gold(evaluation.data.members[0], row) for row in mc1)
    assert max(golds.values()) < 0.35 * len(mc1) and len(golds) >= 8
    assert all(row["mc1_targets"]["labels"][0] == 1 and sum(row["mc1_targets"]["labels"]) == 1 for row in mc1)
    assert all("" not in row["mc1_targets"]["choices"] for row in mc1)


def test_the_publishers_table_of_truthfulqa_says_the_same(data_root: Path, tmp_path: Path, loaded: Loaded) -> None:
    for name, number in (("TruthfulQA.csv", 790), ("v1/TruthfulQA.csv", 817)):
        root = tmp_path / str(number)
        (root / "truthfulqa").mkdir(parents=True)
        shutil.copy(data_root / "truthfulqa" / name, root / "truthfulqa" / "TruthfulQA.csv")
        evaluation = EVALUATIONS["truthfulqa"]
        from_table = evaluation.load(evaluation.data.members[0], root, "test")
        assert len(from_table) == number
        if number == 790:
            assert from_table == loaded["truthfulqa"][evaluation.data.members[0]]


def test_questions_for_the_leak_check(data_root: Path, loaded: Loaded) -> None:
    found = list(evaluation_questions(data_root))
    numbers = Counter(name for name, _, row, _ in found if not row.endswith("/stem"))
    expected = {name: sum(len(its) for its in members.values()) for name, members in loaded.items()}
    expected["truthfulqa"] = 790  # mc1 and mc2 ask the same
    assert numbers == expected
    stems = Counter(name for name, _, row, _ in found if row.endswith("/stem"))
    assert stems == {"cmmlu": 1182, "ceval": 192, "arc_challenge": 1168}
    assert len({(member, row) for _, member, row, _ in found}) == len(found)
    assert all(question.strip() for *_, question in found)
    assert ("gsm8k", "gsm8k", "1", loaded["gsm8k"][EVALUATIONS["gsm8k"].data.members[0]][0]["question"]) in found
    assert missing_evaluations(data_root) == ["gpqa", "gpqa_diamond"]


def test_questions_are_those_that_training_tasks_write(data_root: Path, loaded: Loaded) -> None:
    for name in ("gsm8k", "arc_challenge"):
        problems = HeldOut(**vars(EVALUATIONS[name].data)).problems(data_root)
        (its,) = loaded[name].values()
        assert {p.question for p in problems} == {EVALUATIONS[name].question(row).strip() for row in its}


def test_own_templates_write_the_tasks_prompts(loaded: Loaded) -> None:
    for name in ("svamp", "strategyqa", "math23k", "math", "hotpotqa"):
        evaluation, (its,) = EVALUATIONS[name], loaded[name].values()
        opening = "问题：" if name == "math23k" else "Question: "
        for row in its[:50]:
            prompts = [evaluation.prompt(row, style) for style in ("cot", "direct")]
            assert prompts[0] != prompts[1]
            assert all(prompt.startswith(opening + row["question"]) for prompt in prompts)


def test_nothing_is_there_without_a_root() -> None:
    assert list(evaluation_questions(None)) == []
    assert missing_evaluations(None) == list(EVALUATIONS)


# ---- GPQA, with invented rows: its own may not be shown


def write_gpqa(root: Path, questions: list[tuple[str, ...]], name: str = "gpqa_main") -> None:
    (root / "gpqa").mkdir(parents=True, exist_ok=True)
    header = [
        "Record ID",
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
    ]
    with (root / "gpqa" / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "Canary String"])
        writer.writerows([f"rec{i}", *question, "canary"] for i, question in enumerate(questions))


def load_gpqa(root: Path, name: str = "gpqa") -> list[dict[str, Any]]:
    evaluation = EVALUATIONS[name]
    return evaluation.load(evaluation.data.members[0], root, "test")


def choices(row: dict[str, Any]) -> list[str]:
    return [row[f"choice{i}"] for i in range(1, 5)]


def test_gpqa_keeps_one_order_for_ever(tmp_path: Path) -> None:
    write_gpqa(tmp_path / "first", INVENTED_GPQA)
    write_gpqa(tmp_path / "second", [("An added one?", "a", "b", "c", "d"), *reversed(INVENTED_GPQA)])
    before = {row["Question"]: row for row in load_gpqa(tmp_path / "first")}
    random.seed(99)
    after = {row["Question"]: row for row in load_gpqa(tmp_path / "second")}
    assert all(after[question] == row for question, row in before.items())
    # written down: whoever changes the order changes every score
    assert [choices(row).index(row_right) for row, row_right in zip(before.values(), RIGHT, strict=True)] == GPQA_PLACES


RIGHT = ["the flimon", "seven", "brillic. acid"]
GPQA_PLACES = [3, 1, 1]


def test_gpqa_rows_answer_themselves(tmp_path: Path) -> None:
    for name, file in (("gpqa", "gpqa_main"), ("gpqa_diamond", "gpqa_diamond")):
        many = [(f"Invented question {i}?", f"right {i}", f"wrong {i}", f"worse {i}", f"worst {i}") for i in range(400)]
        write_gpqa(tmp_path, many, file)
        evaluation = EVALUATIONS[name]
        (member,) = evaluation.members(tmp_path)
        golds: Counter[str] = Counter()
        for i, row in enumerate(load_gpqa(tmp_path, name)):
            gold = evaluation.gold(member, row)
            golds[gold] += 1
            assert choices(row)["ABCD".index(gold)] == f"right {i}" and row["answer"] == f"({gold})"
            assert is_right(evaluation, member, row, evaluation.published_gold(member, row))
            assert not any(is_right(evaluation, member, row, c) for c in other_answers(evaluation, member, row))
        assert all(60 < golds[letter] < 140 for letter in "ABCD")


# ---- lm-eval's definitions


def test_definitions_say_the_same_as_we_do() -> None:
    import datasets  # noqa: F401  (before lm_eval)
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks"
    split_keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    for evaluation in EVALUATIONS.values():
        for member in evaluation.data.members:
            if not member.definition:
                continue
            config = load_yaml(folder / member.definition)
            assert (config["dataset_path"], config["dataset_name"]) == (evaluation.data.hub, member.hub_config)
            likelihood = config["output_type"] == "multiple_choice"
            assert likelihood == (evaluation.native == "likelihood")
            assert config.get("num_fewshot", evaluation.num_fewshot) == evaluation.num_fewshot
            assert set(evaluation.splits) <= {config.get(key) for key in split_keys}
            assert all(key in config for key in evaluation.replaced)
            has_samples = isinstance((config.get("fewshot_config") or {}).get("samples"), list | Callable)  # type: ignore[arg-type]
            assert has_samples == (evaluation.fewshot_from == "definition")


def test_gpqa_choices_are_those_of_the_definition(tmp_path: Path) -> None:
    import datasets
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    write_gpqa(tmp_path, INVENTED_GPQA)
    with (tmp_path / "gpqa" / "gpqa_main.csv").open(encoding="utf-8") as file:
        published = datasets.Dataset.from_list(list(csv.DictReader(file)))
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / EVALUATIONS["gpqa"].data.members[0].definition)
    for theirs, ours in zip(config["process_docs"](published), load_gpqa(tmp_path), strict=True):
        assert sorted(choices(theirs)) == sorted(choices(ours))
        assert choices(theirs)["ABCD".index(theirs["answer"][1])] == choices(ours)["ABCD".index(ours["answer"][1])]
