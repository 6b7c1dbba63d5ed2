"""Near duplicates: seconds for all pairs of GSM8K train and test, planted leaks found, and false alarms.

Recall: every question of a set is planted as each kind of `planting.py` makes it and asked for in an index of the
whole set. False alarms: sets without known leaks held against each other (and, for templates, against themselves);
whether a pair is the same problem only a reader can say, so ids are written and README.md says what was read.

Needs the real data (KVDISTILL_DATA, default ../shared/data beside the repository). One thread.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from benchmarks.planting import EXACT, NEAR, Kind, plant
from benchmarks.report import Row, print_table, save
from benchmarks.timing import interleave, paired_ratio
from kvdistill.core.provenance import package_versions
from kvdistill.data.leaks.near import NearIndex
from kvdistill.data.leaks.wording import take_apart

CPU = torch.device("cpu")
ROUNDS = 3
MOST_SECONDS = 60.0
LEAST_EXACT, LEAST_NEAR = 1.0, 0.95
MOST_FALSE = 0.001
DIFFLIB_PAIRS = 2000
RIVAL_JACCARD = 0.7
FEWEST_PLANTED = 20

Reader = Callable[[Path], list[str]]


def run() -> bool:
    """The tables; True where all bars are met."""
    root = data_root()
    if root is None:
        print("leaks: there is no real data, nothing was measured (set KVDISTILL_DATA to the folder that holds gsm8k/)")
        return False
    torch.set_num_threads(1)
    train, test = read("gsm8k train", root), read("gsm8k test", root)
    print(f"leaks: {len(train)} questions held against {len(test)}, one thread")
    timing, seconds = _time(train, test)
    recall = {name: _recall(read(name, root), KINDS[name]) for name in KINDS}
    alarms = [_alarms(asked, held, root) for asked, held in PAIRS]
    bars = _bars(seconds, recall["gsm8k test"], alarms[0])
    _print(timing, recall, alarms, bars)
    versions = package_versions(("datasketch", "scipy"))
    settings = {"threads": 1, "rounds": ROUNDS, "difflib_pairs": DIFFLIB_PAIRS, "rival_jaccard": RIVAL_JACCARD}
    by_length = {name: _by_length(read(name, root)) for name in ("strategyqa dev", "math23k testset")}
    tables = {
        "bars": bars,
        "all_pairs": {"seconds": seconds, "ratios": [row.as_dict() for row in timing]},
        "recall": recall,
        "two_words_changed_by_length": by_length,
        "rival": _rival(train, test),
        "between_sets": alarms,
    }
    save("leaks", settings | {"more_versions": versions}, tables, CPU)
    return all(bar["met"] for bar in bars.values())


# -- the data --------------------------------------------------------------------------------------------------------


def data_root() -> Path | None:
    """Folder with real rows, or None."""
    folder = Path(os.environ.get("KVDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    return folder if (folder / "gsm8k").is_dir() else None


def read(name: str, root: Path) -> list[str]:
    """Questions of a set in the publisher's order; a multiple-choice question with its choices, one a line."""
    path, reader = SETS[name]
    return [question for file in sorted(root.glob(path)) for question in reader(file)]


def _lines(column: str) -> Reader:
    return lambda file: [json.loads(line)[column] for line in file.read_text("utf-8").splitlines()]


def _array(*columns: str) -> Reader:
    return lambda file: [" ".join(str(row[c]).strip() for c in columns) for row in json.loads(file.read_text("utf-8"))]


def _table(*columns: str) -> Reader:
    def read_file(file: Path) -> list[str]:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return ["\n".join(row[column] for column in columns) for row in csv.DictReader(lines)]

    return read_file


def _arc(file: Path) -> list[str]:
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return ["\n".join([row["question"], *row["choices"]["text"]]) for row in rows]


def _bbh(file: Path) -> list[str]:
    return [example["input"] for example in json.loads(file.read_text("utf-8"))["examples"]]


_BBH = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
)
BBH = _BBH.split()
SETS: dict[str, tuple[str, Reader]] = {
    "gsm8k train": ("gsm8k/train.jsonl", _lines("question")),
    "gsm8k test": ("gsm8k/test.jsonl", _lines("question")),
    "svamp": ("svamp/SVAMP.json", _array("Body", "Question")),
    "math23k testset": ("math23k/mwptoolkit_testset.json", _array("original_text")),
    "math23k validset": ("math23k/mwptoolkit_validset.json", _array("original_text")),
    "arc train": ("arc_challenge/train_subset.jsonl", _arc),
    "arc test": ("arc_challenge/test.jsonl", _arc),
    "cmmlu dev": ("cmmlu/dev/*.csv", _table("Question", "A", "B", "C", "D")),
    "cmmlu test": ("cmmlu/test/*.csv", _table("Question", "A", "B", "C", "D")),
    "strategyqa train": ("strategyqa/train.json", _array("question")),
    "strategyqa dev": ("strategyqa/dev.json", _array("question")),
    "hotpotqa": ("hotpotqa/dev_v1_simplified.json", _array("question")),
    "math first1000": ("math/test_first1000.jsonl", _lines("problem")),
    "math500": ("math500/test.jsonl", _lines("problem")),
    "truthfulqa v1": ("truthfulqa/v1/TruthfulQA.csv", _table("Question")),
    "truthfulqa": ("truthfulqa/TruthfulQA.csv", _table("Question")),
    **{f"bbh {task}": (f"bbh/bbh/{task}.json", _bbh) for task in BBH},
}
_ALL = {**EXACT, **NEAR}
_NAMELESS = {name: kind for name, kind in _ALL.items() if not name.startswith("names")}
# In ARC, CMMLU and StrategyQA a name is what is asked about, not who happens to buy the apples.
KINDS: dict[str, dict[str, Kind]] = {
    **{name: _ALL for name in ("gsm8k test", "svamp", "math23k testset")},
    **{name: _NAMELESS for name in ("arc test", "cmmlu test", "strategyqa dev")},
}
PAIRS = [
    ("gsm8k train", "gsm8k test"),
    ("gsm8k train", "svamp"),
    ("math23k testset", "math23k validset"),
    ("arc train", "arc test"),
    ("strategyqa train", "strategyqa dev"),
    ("cmmlu dev", "cmmlu test"),
    ("math first1000", "math500"),
    ("truthfulqa v1", "truthfulqa"),
    *((name, name) for name in ("gsm8k test", "svamp", "cmmlu test", "hotpotqa", "truthfulqa")),
    *((f"bbh {task}", f"bbh {task}") for task in BBH),
]


# -- seconds ---------------------------------------------------------------------------------------------------------


def _time(train: Sequence[str], test: Sequence[str]) -> tuple[list[Row], dict[str, float]]:
    """Ours beside MinHashLSH as it is commonly used, and beside difflib on every pair, of which a sample is timed."""
    calls = {"ours": lambda: ours(train, test), "lsh": lambda: _minhash_lsh(train, test)}
    sample = [(train[i * 7919 % len(train)], test[i * 104729 % len(test)]) for i in range(DIFFLIB_PAIRS)]
    calls["difflib"] = lambda: [SequenceMatcher(None, a, b).ratio() for a, b in sample]
    taken = interleave(calls, warm_up=1, rounds=ROUNDS, device=CPU)
    cpu = {name: [moment.cpu for moment in moments] for name, moments in taken.items()}
    scale = len(train) * len(test) / DIFFLIB_PAIRS
    cpu["difflib"] = [seconds * scale for seconds in cpu["difflib"]]
    rows = [
        Row(f"datasketch MinHashLSH, Jaccard >= {RIVAL_JACCARD}", paired_ratio(cpu["ours"], cpu["lsh"])),
        Row("difflib ratio of every pair", paired_ratio(cpu["ours"], cpu["difflib"]), note="extrapolated"),
    ]
    return rows, {name: round(float(torch.tensor(seconds).median()), 3) for name, seconds in cpu.items()}


def ours(asked: Iterable[str], held: Iterable[str]) -> list[tuple[int, int, str, float]]:
    """(asked, held, kind, similarity) of every match."""
    index = index_of(held)
    return [
        (number, int(str(match.key)), match.kind, match.similarity)
        for number, question in enumerate(asked)
        for match in index.matches(question)
    ]


def index_of(questions: Iterable[str]) -> NearIndex:
    index = NearIndex()
    for number, question in enumerate(questions):
        index.add(number, question)
    return index


def _minhash_lsh(asked: Iterable[str], held: Iterable[str]) -> list[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    def sign(question: str) -> Any:
        signature = MinHash(num_perm=128, seed=1)
        signature.update_batch([word.encode() for word in set(question.lower().split())])
        return signature

    index = MinHashLSH(threshold=RIVAL_JACCARD, num_perm=128)
    for number, question in enumerate(held):
        index.insert(number, sign(question))
    return [(number, other) for number, question in enumerate(asked) for other in index.query(sign(question))]


# -- recall and false alarms -----------------------------------------------------------------------------------------


def _recall(questions: Sequence[str], kinds: dict[str, Kind]) -> dict[str, dict[str, float | int]]:
    """Kind -> planted, found, and the share."""
    index = index_of(questions)
    found: dict[str, dict[str, float | int]] = {}
    for name, kind in kinds.items():
        planted = plant(questions, kind)
        hits = sum(is_found(index, questions, number, text) for number, text in planted)
        if len(planted) >= FEWEST_PLANTED:
            found[name] = {"planted": len(planted), "found": hits, "share": round(hits / len(planted), 4)}
    return found


def is_found(index: NearIndex, questions: Sequence[str], number: int, text: str) -> bool:
    """Whether `text` is a leak of question `number` (or of another row with the same question)."""
    wanted = " ".join(questions[number].split())
    leaks = (match for match in index.matches(text) if match.kind != "variant")
    return any(" ".join(questions[int(str(match.key))].split()) == wanted for match in leaks)


def _by_length(questions: Sequence[str]) -> dict[str, str]:
    """Words of the question (a Chinese character is half a word) -> found/planted, of two words changed."""
    index, planted, hits = index_of(questions), Counter[int](), Counter[int]()
    for number, text in plant(questions, NEAR["two words changed"]):
        length = int(take_apart(questions[number]).wording.size)
        planted[length] += 1
        hits[length] += is_found(index, questions, number, text)
    return {str(length): f"{hits[length]}/{planted[length]}" for length in sorted(planted)}


def _rival(train: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    """What MinHashLSH finds of the same planted leaks, and how many pairs it calls duplicates that nobody planted."""
    found: dict[str, float] = {}
    for name, kind in _ALL.items():
        planted = plant(test, kind)
        pairs = set(_minhash_lsh([text for _, text in planted], test))
        found[name] = round(sum((at, number) in pairs for at, (number, _) in enumerate(planted)) / len(planted), 4)
    return {"share_found": found, "pairs_of_train_and_test": len(_minhash_lsh(train, test))}


def _alarms(asked: str, held: str, root: Path) -> dict[str, Any]:
    """Pairs by kind and how many held questions are in them; near pairs by number. Within one set each pair once."""
    first, second = read(asked, root), read(held, root)
    found = ours(first, second)
    if asked == held:
        found = [match for match in found if match[0] < match[1]]
    pairs = Counter(kind for *_, kind, _ in found)
    touched = {kind: len({other for _, other, one, _ in found if one == kind}) for kind in pairs}
    near = [[number, other, round(similarity, 3)] for number, other, kind, similarity in found if kind == "near"]
    return {
        "asked": asked,
        "held": held,
        "num_asked": len(first),
        "num_held": len(second),
        "pairs": dict(pairs),
        "held_questions": touched,
        "near_pairs": near[:100],
    }


# -- what is said ----------------------------------------------------------------------------------------------------


def _bars(seconds: dict[str, float], recall: dict[str, dict[str, Any]], alarms: dict[str, Any]) -> dict[str, Any]:
    worst_exact = min(recall[name]["share"] for name in EXACT)
    worst_near = min(recall[name]["share"] for name in NEAR)
    false = alarms["held_questions"].get("near", 0) / alarms["num_held"]
    return {
        "seconds for all pairs": {
            "value": seconds["ours"],
            "most": MOST_SECONDS,
            "met": seconds["ours"] <= MOST_SECONDS,
        },
        "exact leaks found": {"value": worst_exact, "least": LEAST_EXACT, "met": worst_exact >= LEAST_EXACT},
        "near leaks found, worst kind": {"value": worst_near, "least": LEAST_NEAR, "met": worst_near >= LEAST_NEAR},
        "near in GSM8K train against test": {"value": round(false, 5), "most": MOST_FALSE, "met": false <= MOST_FALSE},
    }


def _print(
    timing: Sequence[Row], recall: dict[str, Any], alarms: Sequence[dict[str, Any]], bars: dict[str, Any]
) -> None:
    print_table("CPU time of all pairs of GSM8K train and test beside", timing)
    print("\nplanted leaks found, %")
    names = list(_ALL)
    width = max(map(len, names))
    print(f"  {'':{width}}  " + "  ".join(f"{name:>15}" for name in recall))
    for name in names:
        shares = (found[name]["share"] if name in found else None for found in recall.values())
        print(f"  {name:{width}}  " + "  ".join(f"{'' if s is None else f'{100 * s:.1f}':>15}" for s in shares))
    print("\npairs found: exact, near, variant (near: how many held questions)")
    for one in alarms:
        pairs = [one["pairs"].get(kind, 0) for kind in ("exact", "near", "variant")]
        within = "within itself" if one["asked"] == one["held"] else f"against {one['held']}"
        print(f"  {one['asked']} {within}: {', '.join(map(str, pairs))} ({one['held_questions'].get('near', 0)})")
    print("\nbars")
    for name, bar in bars.items():
        limit = f"<= {bar['most']}" if "most" in bar else f">= {bar['least']}"
        print(f"  {name}: {bar['value']} {limit} {'yes' if bar['met'] else 'NO'}")
