"""Problems written and tokenised per second, plain and through a chat template, and the memory that takes.

GSM8K's training rows over and over, with the tokenizer of Qwen2.5, 2,000 problems a call. In the same rounds: the bare
tokenizer on texts that are finished already (no time for writing, segments, hashes; ids stay packed), and
`datasets.map` with `apply_chat_template`, the usual way to prepare a chat data set (ids only, no segments). Two
threads. Memory is that of a process of its own that goes through 10,000 or 100,000 rows and keeps none, the highest
of those seen after each chunk; `python -m benchmarks.formatting TEMPLATE ROWS` is that process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from kvdistill.core.provenance import package_versions
from kvdistill.core.runtime import quiet_libraries
from kvdistill.data.chat import chat_messages, chat_tokenizer, write_chat
from kvdistill.data.encode import encode_rows
from kvdistill.data.problems import Problem, Row, write_plain
from kvdistill.data.tokenizers import encode_plain, load_tokenizer

DATA = Path(os.environ.get("KVDISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
TOKENIZER = "qwen2.5"
TEMPLATES = ("plain", "chat")
THREADS, CHUNK = 2, 2000
WARM_UP, ROUNDS = 1, 8
SPEED_BAR = 5000.0  # problems/s
MEMORY_ROWS = (10_000, 100_000)
MEMORY_BAR = 1.05  # peak at 100,000 rows over that at 10,000


def run() -> bool:
    """Both tables; True where every bar is met, and where there is no data to measure with (which is said)."""
    if not (DATA / "gsm8k").is_dir() or not (DATA / "tokenizers" / TOKENIZER).is_dir():
        print("formatting: not measured, there is no real data (set KVDISTILL_DATA)")
        return True
    import torch

    from benchmarks.report import save

    quiet_libraries()
    _set_threads()
    print(f"formatting: GSM8K, tokenizer {TOKENIZER}, chunks of {CHUNK}, {ROUNDS} rounds, {THREADS} threads")
    speed, memory = _speed(), [_memory(template) for template in TEMPLATES]
    for row in memory:
        low, high = (row["peak_mib"][str(rows)] for rows in MEMORY_ROWS)
        print(f"  peak memory, {row['template']:5}: {low:.0f} MiB at 10,000 rows, {high:.0f} MiB at 100,000")
    settings = {"threads": THREADS, "chunk": CHUNK, "rounds": ROUNDS, "tokenizer": TOKENIZER}
    settings["versions"] = package_versions(("tokenizers", "datasets"))
    save("formatting", settings, {"speed": speed, "memory": memory}, torch.device("cpu"))
    return all(row["met"] for row in speed["problems_per_second"] if "met" in row) and all(row["met"] for row in memory)


def _set_threads() -> None:
    """Before the tokenizer's first batch: its threads are made then, as many as these say."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(THREADS)}


# -- speed ---------------------------------------------------------------------------------------------


def _speed() -> dict[str, Any]:
    import torch

    from benchmarks.report import Row as Line
    from benchmarks.report import print_table
    from benchmarks.timing import interleave, paired_ratio

    problems = list(islice(_problems(), CHUNK))
    tokenizer = chat_tokenizer(load_tokenizer(f"root:{TOKENIZER}", str(DATA)))
    calls = {f"kvdistill, {template}": _ours(tokenizer, template, problems) for template in TEMPLATES}
    calls |= {f"bare tokenizer, {template}": _bare(tokenizer, template, problems) for template in TEMPLATES}
    calls["datasets.map, chat"] = _mapped(tokenizer, problems)
    taken = interleave(calls, warm_up=WARM_UP, rounds=ROUNDS, device=torch.device("cpu"))
    wall = {name: [moment.wall for moment in moments] for name, moments in taken.items()}
    figures: list[dict[str, Any]] = []
    for name, times in wall.items():
        cpu = statistics.median(moment.cpu for moment in taken[name])
        figure: dict[str, Any] = {
            "name": name,
            "median": round(CHUNK / statistics.median(times)),
            "best": round(CHUNK / min(times)),
            "per_cpu_second": round(CHUNK / cpu),
        }
        if name.startswith("kvdistill"):
            figure |= {"bar": SPEED_BAR, "met": figure["median"] >= SPEED_BAR}
        figures.append(figure)
        said = f"best round {figure['best']}, {figure['per_cpu_second']} a CPU second"
        print(f"  {name:22} {figure['median']:6} problems/s ({said})")
    ratios = [
        Line(f"{template}: over the bare tokenizer",
             paired_ratio(wall[f"kvdistill, {template}"], wall[f"bare tokenizer, {template}"]))
        for template in TEMPLATES
    ]  # fmt: skip
    ratios.append(Line("chat: over datasets.map", paired_ratio(wall["kvdistill, chat"], wall["datasets.map, chat"])))
    print_table("wall time of kvdistill over that of another, same round", ratios)
    return {"problems_per_second": figures, "ratios": [line.as_dict() for line in ratios]}


def _ours(tokenizer: Any, template: str, problems: list[Problem]) -> Callable[[], object]:
    return lambda: encode_rows(tokenizer, list(_written(tokenizer, template, problems)))


def _bare(tokenizer: Any, template: str, problems: list[Problem]) -> Callable[[], object]:
    texts = [text for row in _written(tokenizer, template, problems) for text in (row.prompt, row.completion)]
    return lambda: [encode_plain(tokenizer, texts[start : start + 500]) for start in range(0, len(texts), 500)]


def _mapped(tokenizer: Any, problems: list[Problem]) -> Callable[[], object]:
    import datasets

    datasets.disable_progress_bars()
    conversations = [{"messages": chat_messages(write_plain(problem, "cot"))} for problem in problems]
    rows = datasets.Dataset.from_list(conversations)

    def read(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=True))

    return lambda: rows.map(read, batched=True, batch_size=1000, keep_in_memory=True, load_from_cache_file=False)


def _written(tokenizer: Any, template: str, problems: list[Problem]) -> Iterator[Row]:
    rows = (write_plain(problem, "cot") for problem in problems)
    return (write_chat(row, tokenizer) for row in rows) if template == "chat" else rows


def _problems() -> Iterator[Problem]:
    """GSM8K's training rows without end."""
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    parts = [(row["question"], *row["answer"].partition("####")) for row in map(json.loads, lines)]
    for number, (question, reasoning, _, answer) in enumerate(cycle(parts)):
        reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()
        yield Problem("gsm8k", str(number), question.strip(), reasoning, answer.strip().replace(",", ""))


# -- memory --------------------------------------------------------------------------------------------


def _memory(template: str) -> dict[str, Any]:
    """Peak resident memory (MiB) and seconds by number of rows."""
    found = {str(rows): _measure(template, rows) for rows in MEMORY_ROWS}
    low, high = (found[str(rows)]["peak_mib"] for rows in MEMORY_ROWS)
    return {
        "template": template,
        "peak_mib": {rows: figures["peak_mib"] for rows, figures in found.items()},
        "seconds": {rows: figures["seconds"] for rows, figures in found.items()},
        "bar": MEMORY_BAR,
        "met": high <= MEMORY_BAR * low,
    }


def _measure(template: str, rows: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.formatting", template, str(rows)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def _go_through(template: str, rows: int) -> dict[str, float]:
    _set_threads()
    tokenizer = chat_tokenizer(load_tokenizer(f"root:{TOKENIZER}", str(DATA)))
    problems, tokens, most, start = islice(_problems(), rows), 0, 0.0, time.perf_counter()
    while chunk := list(islice(problems, CHUNK)):
        examples = encode_rows(tokenizer, list(_written(tokenizer, template, chunk)))
        tokens += sum(len(example.input_ids) for example in examples)
        most = max(most, _resident_mib())
    seconds = time.perf_counter() - start
    return {"peak_mib": round(most, 1), "seconds": round(seconds, 2), "tokens": tokens}


def _resident_mib() -> float:
    """Now, with a chunk in hand; where the system does not say, the highest so far (loading the tokenizer included)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(_go_through(sys.argv[1], int(sys.argv[2]))))
