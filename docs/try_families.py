"""Which families of transformers can be used, and how exactly: the table of docs/models.md, made by trying each one.

    python docs/try_families.py            # writes the table into docs/models.md; a quarter of an hour on two cores
    python docs/try_families.py qwen3 t5   # prints the rows of these

Every family that transformers knows as a causal model, as one for masked words or as one for sequences to sequences
is made with its own default configuration, small (`kvdistill/models/small.py`) and with random weights, and probed
(`kvdistill/models/probe.py`), several to a child process with limits of time and memory: one that hangs, dies or eats
all memory is refused like any other, and the rest go on in a new child.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from queue import Empty
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE, BEGIN, END = HERE / "models.md", "<!-- families: begin -->\n", "<!-- families: end -->\n"
SECONDS, MEMORY_GIB = 60, 6
# what a family's default configuration does not say, and its publishers do
LEFT_OUT: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 64, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"num_hidden_layers": 4},  # 44 would take minutes
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "dots1": {"n_routed_experts": 128},
    "xmod": {"default_language": "en_XX"},
}
os.environ["HF_HUB_OFFLINE"] = "1"  # some look for kernels on the hub
sys.path[:0] = [str(HERE.parent)]


def families() -> dict[str, str]:
    """By model type what it is registered as: causal, masked words, sequences."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, list[str]] = {}
    for kind, names in (
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("masked words", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("sequences", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        for name in names:
            found.setdefault(name, []).append(kind)
    return {name: ", ".join(kinds) for name, kinds in sorted(found.items())}


def try_family(name: str) -> dict[str, Any]:
    """One row: family, what it is taken for, and three verdicts as (error, reason)."""
    from transformers import CONFIG_MAPPING

    from kvdistill.models.probe import probe_config
    from kvdistill.models.structure import model_kind

    try:
        config = CONFIG_MAPPING[name](**LEFT_OUT.get(name, {}))
        kind = model_kind(config)
    except Exception as error:  # whatever a family's own code says
        lines = str(error).strip().splitlines()
        reason = f"it has no configuration of its own ({type(error).__name__}: {lines[0] if lines else ''})"
        return {"family": name, "kind": "", "verdicts": [(0.0, reason, "")] * 3}
    probe = probe_config(config)
    each = (probe.keys, probe.unrotated, probe.attention)
    return {"family": name, "kind": kind, "verdicts": [(one.error, one.reason, one.note) for one in each]}


def _child(names: list[str], results: Any) -> None:
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    for name in names:
        results.put(try_family(name))


def try_all(names: list[str], workers: int = 1) -> list[dict[str, Any]]:
    """Rows of all these families, in their order, whatever happens to a child."""
    context = multiprocessing.get_context("spawn")
    todo = [names[start::workers] for start in range(workers)]
    lanes: list[Any] = [None] * workers
    rows: dict[str, dict[str, Any]] = {}
    while any(todo):
        for lane, waiting in enumerate(todo):
            if not waiting:
                continue
            if lanes[lane] is None:
                results = context.Queue()
                process = context.Process(target=_child, args=(list(waiting), results), daemon=True)
                process.start()
                lanes[lane] = [process, results, time.monotonic() + SECONDS]
            process, results, deadline = lanes[lane]
            try:
                row = results.get(timeout=0.2)
            except Empty:
                dead, late = not process.is_alive(), time.monotonic() > deadline
                if not dead and not late:
                    continue
                process.kill()
                process.join()
                lanes[lane] = None
                why = f"more than {SECONDS} s" if late else f"its process ended ({process.exitcode}), {MEMORY_GIB} GiB"
                row = {"family": waiting[0], "kind": "", "verdicts": [(0.0, f"it cannot be tried: {why}", "")] * 3}
            else:
                lanes[lane][2] = time.monotonic() + SECONDS
            rows[row["family"]] = row
            waiting.remove(row["family"])
            print(f"{len(rows):4d} {row['family']}: {cell(row)}", file=sys.stderr, flush=True)
            if not waiting and lanes[lane] is not None:
                process.join(timeout=5)
                process.kill()
    return [rows[name] for name in names]


def cell(row: dict[str, Any]) -> str:
    """The three verdicts as columns of a table; a refusal that holds for all that follows is said once."""
    said: list[str] = []
    cells = []
    for error, reason, note in row["verdicts"]:
        size = f"{error:.0e}" if error else "0"
        text = f"refused: {reason}" if reason else f"exact ({note or size})"
        cells.append("refused" if reason and text in said else text.replace("|", "/"))
        said.append(text)
    return " | ".join(cells)


def table(rows: list[dict[str, Any]], kinds: dict[str, str]) -> str:
    lines = ["| family | registered as | keys and values | unrotated | attention made again |", "|---|---|---|---|---|"]
    lines += [f"| {row['family']} | {kinds[row['family']]} | {cell(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    kinds = families()
    names = sys.argv[1:] or list(kinds)
    rows = try_all(names, workers=min(len(names), os.cpu_count() or 1))
    text = table(rows, kinds)
    if sys.argv[1:]:
        print(text)
        return
    page = PAGE.read_text()
    counts = [sum(not row["verdicts"][i][1] for row in rows) for i in range(3)]
    import transformers

    summary = (
        f"transformers {transformers.__version__}: {len(rows)} families; keys and values of {counts[0]} are captured, "
        f"{counts[1]} can be unrotated, attention of {counts[2]} is made again.\n\n"
    )
    PAGE.write_text(page[: page.index(BEGIN)] + BEGIN + summary + text + page[page.index(END) :])


if __name__ == "__main__":
    main()
