"""More than 150 malformed inputs, each of which has to end with exit code 2 and one message, in less than 20 s.

A case makes its files in an empty folder and gives the words of a command. `tests/test_mistakes.py` runs all of them,
`docs/try_mistakes.py` writes what they say into docs/reliability.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from tiny_recipe import ARMS, SEED, base_run, copy_base, tiny_tree, write_recipe


@dataclass(frozen=True)
class Mistake:
    """group: recipe, flag, rows, model folder, run folder. name: what is wrong. words: makes the files in a folder, and
    gives the words of the command. part: what the message has to say, among other things."""

    group: str
    name: str
    words: Callable[[Path], list[object]]
    part: str = ""

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}"


# -- recipes as files ---------------------------------------------------------------------------------


def written(content: str | bytes, name: str = "bad.yaml") -> Callable[[Path], list[object]]:
    def words(folder: Path) -> list[object]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["run", folder / name]

    return words


def tree_without(*path: str) -> str:
    tree: Any = tiny_tree()
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return yaml.safe_dump(tree)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    "a number": ("42", "mapping"),
    "a word": ("hello", "mapping"),
    "a list": ("- 1\n- 2", "mapping"),
    "nothing": ("", "empty"),
    "only a comment": ("# nothing\n", "empty"),
    "3,000 nested lists": ("[" * 3000 + "]" * 3000, "nested too deep"),
    "3,000 nested lists in a key": ("name: " + "[" * 3000 + "]" * 3000, "nested too deep"),
    "aliases that multiply": (LAUGHS, "more values"),
    "a list in itself": ("a: &a [*a]", "itself"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not a readable recipe"),
    "UTF-16": ("name: x".encode("utf-16"), "not a readable recipe"),
    "a NUL character": (b"name: a\x00b", "not a readable recipe"),
    "tabs as indentation": ("data:\n\ttasks: []", "not a readable recipe"),
    "an open bracket": ("seeds: [1, 2", "not a readable recipe"),
    "a key twice": ("name: a\nname: b", "duplicate"),
    "a Python object": ("name: !!python/object/apply:os.system ['true']", "not a readable recipe"),
    "itself as a variable": ("name: ${name}", "not a readable recipe"),
    "an unknown variable": ("name: ${nope.there}", "nope"),
    "two documents": ("name: a\n---\nname: b", "not a readable recipe"),
    "a set": ("name: !!set {a, b}", "not a readable recipe"),
    "a list as a key": ("? [1, 2]\n: 3", "not a readable recipe"),
    "JSON lines": ('{"question": "a"}\n{"question": "b"}', "not a readable recipe"),
    "5 MB": ("# " + "x" * (5 << 20), "no recipe needs"),
    "no name": (tree_without("name"), "name"),
    "no data": (tree_without("data"), "data"),
    "no student": (tree_without("student"), "student"),
    "no arms": (tree_without("arms"), "arms"),
    "no tasks": (tree_without("data", "tasks"), "tasks"),
}

# -- values, on the command line ----------------------------------------------------------------------

VALUES: dict[str, str] = {
    "train.stesp=3": "did you mean 'steps'?",
    "trian.steps=3": "did you mean 'train'?",
    "nonsense=1": "nonsense",
    "train.steps=many": "train.steps",
    "train.steps=0": "train.steps",
    "train.steps=-1": "train.steps",
    "train.steps=1.5": "train.steps",
    "train.steps=1000000000000": "train.steps",
    "train.steps=100000000 train.batch_size=64": "examples",
    "train.batch_size=100000000": "train.batch_size",
    "train.accumulation=0": "train.accumulation",
    "train.learning_rate=0": "train.learning_rate",
    "train.learning_rate=nan": "train.learning_rate",
    "train.learning_rate=inf": "train.learning_rate",
    "train.learning_rate=-1": "train.learning_rate",
    "train.adam_betas=[0.9,1.5]": "train.adam_betas",
    "train.adam_betas=[0.9]": "train.adam_betas",
    "train.schedule=step": "train.schedule",
    "train.min_lr_ratio=2": "train.min_lr_ratio",
    "train.save_every=0": "train.save_every",
    "train.keep_checkpoints=0": "train.keep_checkpoints",
    "train.report_to=[email]": "train.report_to",
    "train.report_to=[wandb]": "wandb is not installed",
    "seeds=[]": "seeds",
    "seeds=7": "seeds",
    "seeds=[-1]": "seeds",
    "seeds=[4294967296]": "seeds",
    "seeds=[1,1]": "twice",
    "seeds=[a]": "seeds",
    "name=": "name",
    "name=../up": "name",
    "name=a/b": "name",
    "student.scratch.num_layers=100000000": "student.scratch.num_layers",
    "student.scratch.num_layers=0": "student.scratch.num_layers",
    "student.scratch.hidden_size=1000000000": "student.scratch.hidden_size",
    "student.scratch.hidden_size=17": "hidden_size 17",
    "student.scratch={hidden_size: 131072, num_heads: 128, num_layers: 1024}": "GiB",
    "student.scratch.num_heads=3": "num_heads 3",
    "student.scratch.num_kv_heads=3": "cannot share",
    "student.scratch.head_size=7": "head size 7 is odd",
    "student.scratch.vocab_size=3": "3 token embeddings",
    "student.scratch.vocab_size=100000000000": "student.scratch.vocab_size",
    "student.scratch.architecture=mamba": "architecture",
    "student.scratch.architecture=bert": "does not continue",
    "student.scratch.init_std=-1": "init_std",
    "student.scratch.rope_theta=0": "rope_theta",
    "student.scratch=null": "exactly one of",
    "student.path=./x": "exactly one of",
    "student.dtype=int4": "student.dtype",
    "student.attention=flash_attention_2": "flash_attn is not installed",
    "student.lora={r: 0}": "student.lora.r",
    "student.lora={target_modules: [nope_proj]}": "nope_proj",
    "teachers.0.name=../x": "teachers.0.name",
    "teachers.0.name=two": "share a name",
    "teachers.0.train_on=[chian]": "chian",
    "teachers.0.train_on=[]": "train_on",
    "teachers.0.optimiser.steps=0": "teachers.0.optimiser.steps",
    "teachers.0.scratch.architecture=t5": "num_kv_heads",
    "teachers.7.seed=1": "teachers",
    "data.tasks=[]": "data.tasks",
    "data.tasks.0.name=chian": "chian",
    "data.tasks.0.train=-1": "data.tasks.0.train",
    "data.tasks.0.train=1000000000000": "data.tasks.0.train",
    "data.tasks.0.share=0.5": "data.total",
    "data.ratios=[0.5,0.1,0.1]": "add up",
    "data.max_length=0": "data.max_length",
    "data.max_length=3": "longer than 3 tokens",
    "data.max_length=100000000": "data.max_length",
    "data.tokenizer=./nowhere/at/all": "no such folder",
    "data.tokenizer=root:gpt2": "data.root",
    "data.style=poem": "data.style",
    "data.leaks=hide": "data.leaks",
    "data.system_prompt=hi": "chat template",
    "capture.dtype=float8": "capture.dtype",
    "capture.source=cloud": "capture.source",
    "align.layers=explicit": "layer_map",
    "align.layers=nearest": "align.layers",
    "align.keys=rotated align.time=segment": "rotated keys",
    "align.rank=0": "align.rank",
    "align.cka_top_k=0": "align.cka_top_k",
    "align.segment_ratio={reasoning: 2}": "segment_ratio",
    "align.segment_ratio={thoughts: 0.5}": "segment_ratio",
    "compress.kv_compression=right": "keep",
    "compress.keep=0": "compress.keep",
    "fuse.weights=[0.5,-0.5]": "finite and >= 0",
    "fuse.weights=[0,0]": "sum to 0",
    "fuse.weights=[1,1,1]": "3 weights for 2 teachers",
    "fuse.temperature=0": "fuse.temperature",
    "fuse.fuse_at=kv": "match_in",
    "loss.kind=mse2": "loss.kind",
    "loss.kv_weight=-1": "loss.kv_weight",
    "loss.kv_weight=nan": "loss.kv_weight",
    "loss.distill_layers=0-12": "layer 12",
    "loss.distill_layers=first": "first",
    "loss.hybrid_share=2": "loss.hybrid_share",
    "evaluate.max_new_tokens=0": "evaluate.max_new_tokens",
    "evaluate.tasks=[gsm9k]": "gsm9k",
    "evaluate.limit=0": "evaluate.limit",
    "report.alpha=1": "report.alpha",
    "report.margin=0": "report.margin",
    "report.comparisons=[[fixed,cee]]": "cee",
    "report.comparisons=[[fixed]]": "report.comparisons",
    "hardware.device=nope": "hardware.device",
    "hardware.device=cuda:9": "cuda:9",
    "hardware.device=cuda:-1": "hardware.device",
    "hardware.workers=-1": "hardware.workers",
    "hardware.threads=1000000": "hardware.threads",
    "arms.bad.teachers=[three]": "three",
    "arms.bad.teachers=[one,one]": "twice",
    "arms.bad.los.kv_weight=1": "did you mean 'loss'?",
    "arms.bad=5": "arms",
    "arms.ce.control=placebo": "control: placebo",
    "run_dir=" + "x" * 300: "too long",
    "run_dir=" + "x/" * 3000: "too long",
    'run_dir="a\\0b"': "NUL",
    "run_dir=/proc/no/run": "cannot write here",
    "run_dir=/dev/null": "not a folder",
    "data.root=" + "y" * 300: "too long",
    "title=[1,2]": "title",
    "train": "key=value",
    "=3": "key=value",
    "train.steps=[": "override",
}

# -- flags and commands -------------------------------------------------------------------------------

FLAGS: dict[str, tuple[str, str]] = {
    "an unknown verb": ("rnu RECIPE", "rnu"),
    "no recipe": ("run", "RECIPE"),
    "a recipe that is not there": ("run tinny.yaml", "recipe not found"),
    "a folder in place of a recipe": ("run .", "this is a folder, not a recipe"),
    "a path of 5,000 letters": ("run " + "z" * 5000, "path"),
    "an unknown flag": ("run RECIPE --jsno", "--jsno"),
    "a seed that is a word": ("train RECIPE --seed x", "--seed"),
    "a seed that is not in the recipe": ("train RECIPE --seed 99", "99"),
    "an arm that is not there": ("train RECIPE --arm fixd", "did you mean 'fixed'?"),
    "an arm to profile that is not there": ("profile-alignment RECIPE --arm fixd", "did you mean 'fixed'?"),
    "training before preparing": ("train RECIPE", "kvdistill prepare"),
    "evaluating before training": ("evaluate RECIPE", "kvdistill prepare"),
    "a report of nothing": ("report RECIPE", "there is no run folder"),
    "a model that is not there": ("evaluate ./no-model --tasks gsm8k", ""),
    "no evaluation named": ("evaluate ./no-model", "--tasks"),
    "an evaluation that does not exist": ("evaluate ./no-model --tasks gsm9k", "gsm9k"),
    "--tasks with a recipe": ("evaluate RECIPE --tasks gsm8k", "go with a model"),
    "--arm with a model": ("evaluate ./no-model --arm ce", "go with a recipe"),
    "a device that does not exist, for a model": ("evaluate ./no-model --tasks gsm8k hardware.device=nope", "device"),
    "a form that export does not know": ("export RECIPE --format xml", "xml"),
    "an escape code as a recipe": ("run \x1b[31mred.yaml", "\\x1b[31mred.yaml"),
    "a recipe to print that is wrong": ("recipe RECIPE train.steps=0", "train.steps"),
}


def flagged(line: str) -> Callable[[Path], list[object]]:
    def words(folder: Path) -> list[object]:
        recipe = write_recipe(folder)
        return [recipe if word == "RECIPE" else folder if word == "." else word for word in line.split(" ")]

    return words


# -- rows of own data ---------------------------------------------------------------------------------

GOOD = '{"question": "a%d", "reasoning": "b", "answer": "3"}'
ROWS: dict[str, tuple[str | bytes, str]] = {
    "broken JSON": ('{"question": "a", "reasoning": "b", "answer": ', "broken JSON"),
    "a list": ("[1, 2]", "not an object"),
    "a number": ("42", "not an object"),
    "a column missing": ('{"question": "a", "reasoning": "b"}', "answer"),
    "a column misspelt": ('{"question": "a", "reasoning": "b", "asnwer": "3"}', "did you mean 'asnwer'?"),
    "a question that is a number": ('{"question": 5, "reasoning": "b", "answer": "3"}', "not text"),
    "a question that is null": ('{"question": null, "reasoning": "b", "answer": "3"}', "question"),
    "a question of spaces": ('{"question": " ", "reasoning": "b", "answer": "3"}', "is empty"),
    "an answer that is NaN": ('{"question": "a", "reasoning": "b", "answer": NaN}', "NaN is not JSON"),
    "an answer that is a list": ('{"question": "a", "reasoning": "b", "answer": [3]}', "answer"),
    "bytes that are no text": (b'{"question": "\xff\xfe", "reasoning": "b", "answer": "3"}', "own.jsonl"),
    "half a character": (b'{"question": "\xe4\xb8", "reasoning": "b", "answer": "3"}', "own.jsonl"),
    "5,000 nested lists": ("[" * 5000 + "]" * 5000, "own.jsonl:3"),
}


def with_row(row: str | bytes) -> Callable[[Path], list[object]]:
    def words(folder: Path) -> list[object]:
        lines = [(GOOD % n).encode() for n in range(1, 4)]
        lines.insert(2, row if isinstance(row, bytes) else row.encode())
        (folder / "own.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return ["run", of_file(folder, folder / "own.jsonl")]

    return words


def of_file(folder: Path, file: Path, name: str = "jsonl") -> Path:
    tree = tiny_tree()
    tasks = [{**tree["data"]["tasks"][0], "name": name, "file": str(file)}, tree["data"]["tasks"][1]]
    teachers = [{**tree["teachers"][0], "train_on": [file.stem]}, tree["teachers"][1]]
    return write_recipe(folder, data={"tasks": tasks}, teachers=teachers)


def a_file(content: bytes | None, name: str, kind: str) -> Callable[[Path], list[object]]:
    def words(folder: Path) -> list[object]:
        if content is not None:
            (folder / name).write_bytes(content)
        return ["run", of_file(folder, folder / name, kind)]

    return words


DATA_FILES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "a file that is not there": (a_file(None, "own.jsonl", "jsonl"), "not found"),
    "an empty file": (a_file(b"", "own.jsonl", "jsonl"), "no rows"),
    "a file of one row": (a_file((GOOD % 1).encode(), "own.jsonl", "jsonl"), "is empty"),
    "a Parquet file that is none": (a_file(b"PAR1nonsense", "own.parquet", "parquet"), "own.parquet"),
    "a CSV file without columns": (a_file(b"\n\n", "own.csv", "csv"), "own.csv"),
    "a CSV file of another form": (a_file(b"a,b\n1,2\n", "own.csv", "csv"), "question"),
}

# -- model folders ------------------------------------------------------------------------------------


def model_folder(change: Callable[[Path], Any], who: str = "teacher") -> Callable[[Path], list[object]]:
    def words(folder: Path) -> list[object]:
        model = folder / "model"
        shutil.copytree(base_run() / "teachers/one/model", model)
        change(model)
        if who == "student":
            return ["run", write_recipe(folder, student={"path": str(model), "scratch": None})]
        return ["run", write_recipe(folder, teachers=[{"name": "one", "path": str(model)}])]

    return words


def config_with(**changes: Any) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        tree = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**tree, **changes}))

    return change


def bad_weights(value: float) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"][1] = value
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


def fewer_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def with_text(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes(text if isinstance(text, bytes) else text.encode())


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config.json": (lambda model: (model / "config.json").unlink(), "config.json"),
    "config.json cut in two": (with_text("config.json", '{"model_type": "qw'), "model"),
    "config.json of bytes": (with_text("config.json", b"\xff\xfe\x00"), "model"),
    "config.json is a list": (with_text("config.json", "[1]"), "model"),
    "config.json is null": (with_text("config.json", "null"), "model"),
    "config.json without a type": (with_text("config.json", "{}"), "model"),
    "config.json of a type nobody knows": (config_with(model_type="qwen99"), "qwen99"),
    "layers in words": (config_with(num_hidden_layers="three"), "model"),
    "a negative number of layers": (config_with(num_hidden_layers=-1), "model"),
    "more layers than there are weights": (config_with(num_hidden_layers=9), "model"),
    "another width than the weights": (config_with(hidden_size=48), "model"),
    "a vocabulary of three": (config_with(vocab_size=3), "3 token embeddings"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no safetensors weights"),
    "weights cut in two": (with_text("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "), "model"),
    "weights that are text": (with_text("model.safetensors", "not weights"), "model"),
    "a weight missing": (fewer_weights, "lacks 1 weights"),
    "a weight that is NaN": (bad_weights(float("nan")), "model.safetensors: tensor model.norm.weight"),
    "a weight that is infinite": (bad_weights(float("inf")), "model.safetensors: tensor model.norm.weight"),
    "no tokenizer": (lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "tokenizer.json cut in two": (with_text("tokenizer.json", '{"version": "1.0", "model"'), "tokenizer"),
    "tokenizer.json is null": (with_text("tokenizer.json", "null"), "tokenizer"),
    "tokenizer_config.json is no JSON": (with_text("tokenizer_config.json", "{"), "tokenizer"),
    "tokenizer_config.json is a list": (with_text("tokenizer_config.json", "[]"), "tokenizer"),
}

# -- run folders --------------------------------------------------------------------------------------


def in_base(change: Callable[[Path], Any], *command: object) -> Callable[[Path], list[object]]:
    def words(folder: Path) -> list[object]:
        run = copy_base(folder)
        change(run)
        recipe = write_recipe(folder, arms=ARMS)
        verb, *rest = command or ("train", "--arm", "fixed", "--seed", SEED)
        return [verb, recipe, *rest]

    return words


def text_in(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda run: next(run.glob(name)).write_bytes(text if isinstance(text, bytes) else text.encode())


def linked_lock(run: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(run / "recipe.json")


def locked_out(folder: Path) -> list[object]:
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").write_text("x")
    return ["run", write_recipe(folder), f"run_dir={folder / 'mine'}"]


def escaped(folder: Path) -> list[object]:
    mine = folder / "\x1b[31mmine"
    (mine / "run").mkdir(parents=True)
    (mine / "run/thesis.tex").write_text("x")
    return ["run", write_recipe(mine)]


MANY_BYTES = b"\xff\xfe\x00\x01"
RUNS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "somebody's folder": (locked_out, "holds files but no recipe.json"),
    "escape codes in its name": (escaped, "\\x1b[31mmine"),
    "the lock is a link": (in_base(linked_lock), "the lock is a link"),
    "another recipe's": (in_base(lambda run: None, "run", "teachers.0.scratch.hidden_size=32"), "another recipe"),
    "recipe.json is a list": (in_base(text_in("recipe.json", "[]")), "recipe.json"),
    "recipe.json is null": (in_base(text_in("recipe.json", "null")), "recipe.json"),
    "recipe.json is no JSON": (in_base(text_in("recipe.json", "{")), "recipe.json"),
    "recipe.json of bytes": (in_base(text_in("recipe.json", MANY_BYTES)), "recipe.json"),
    "data/manifest.json is a list": (in_base(text_in("data/manifest.json", "[]")), "manifest.json"),
    "data/manifest.json is empty": (in_base(text_in("data/manifest.json", "{}")), "manifest.json"),
    "data/manifest.json is no JSON": (in_base(text_in("data/manifest.json", "{")), "manifest.json"),
    "data/manifest.json of bytes": (in_base(text_in("data/manifest.json", MANY_BYTES)), "manifest.json"),
    "train.parquet is text": (in_base(text_in("data/train.parquet", "text")), "train.parquet"),
    "tokenizer.json is no JSON": (in_base(text_in("tokenizer/tokenizer.json", "{")), "tokenizer"),
    "tokenizer.json is null": (in_base(text_in("tokenizer/tokenizer.json", "null")), "tokenizer"),
    "tokenizer.json is gone": (in_base(lambda run: (run / "tokenizer/tokenizer.json").unlink()), "tokenizer"),
    "a teacher's config.json is gone": (
        in_base(lambda run: (run / "teachers/one/model/config.json").unlink()),
        "teachers/one/model/config.json",
    ),
    "a teacher's mark is gone": (in_base(lambda run: (run / "teachers/one/trained.json").unlink()), "not trained yet"),
    "a store's manifest is a list": (in_base(text_in("store/targets-train-one-*/manifest.json", "[]")), "manifest"),
    "a store's manifest is empty": (in_base(text_in("store/targets-train-one-*/manifest.json", "{}")), "manifest"),
    "a store's shard is text": (in_base(text_in("store/targets-train-one-*/*.safetensors", "x")), "shard-00000"),
    "a fit's shards are text": (
        in_base(lambda run: [file.write_text("x") for file in run.glob("fit/*/*.safetensors")]),
        "shard-00000",
    ),
    "the run folder is a file": (
        lambda folder: [(folder / "run").write_text("x"), "run", write_recipe(folder)][1:],
        "a file, not a folder",
    ),
}


def mistakes() -> Iterator[Mistake]:
    for name, (content, part) in FILES.items():
        yield Mistake("recipe", name, written(content), part)
    for words, part in VALUES.items():
        shown = words if len(words) < 90 else f"{words[:20]}… ({len(words):,} letters)"
        given = [words] if " " in words and "{" in words else words.split(" ")
        yield Mistake("value", shown, lambda folder, given=given: ["run", write_recipe(folder), *given], part)
    for name, (line, part) in FLAGS.items():
        yield Mistake("flag", name, flagged(line), part)
    for name, (row, part) in ROWS.items():
        yield Mistake("rows", name, with_row(row), part)
    for name, (make, part) in DATA_FILES.items():
        yield Mistake("rows", name, make, part)
    for name, (change, part) in MODELS.items():
        for who in ("teacher", "student"):
            yield Mistake("model folder", f"{who}: {name}", model_folder(change, who), part)
    for name, (make, part) in RUNS.items():
        yield Mistake("run folder", name, make, part)
