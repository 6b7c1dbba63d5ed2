"""What a distillation step costs, as a multiple of a plain `transformers.Trainer` fine-tuning step.

All trainers live in one process and take turns step by step (`timing.Turnstile`): plain fine-tuning, a second plain
trainer as a control (its ratio says how good the measurement is), ours with targets from the store and with online
teachers, and TRL's SFT and GKD where TRL is installed. Same student, texts, labels, optimiser, schedule and clipping.

A step is everything from one step's end to the next one's except fetching the batch, which is timed apart:
forward, backward, clipping, optimiser, callbacks, logging. The cache is read in shuffled order, each example once,
and its pages are dropped from memory first where the system permits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.report import Row, print_table, save
from benchmarks.timing import Moment, Turnstile, now, paired_ratio
from benchmarks.toy import THREADS, ToySetup, toy_model, toy_segments, toy_teacher, toy_texts
from kvdistill.align import MapProjectionAligner, layer_map, needed_teacher_layers
from kvdistill.arms.batches import Batch, BatchMaker
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.student import CausalStudent
from kvdistill.arms.teacher_pass import run_teacher
from kvdistill.core.recipe import AlignRecipe, ArmRecipe, CompressRecipe, FuseRecipe, LossRecipe, TrainRecipe
from kvdistill.core.runtime import pick_device, quiet_libraries
from kvdistill.core.segments import PROMPT
from kvdistill.data.encode import Example
from kvdistill.fuse import build_fusion
from kvdistill.models import capture_flops, describe_model, forward_flops
from kvdistill.stages.train.trainer import DistillTrainer, training_arguments
from kvdistill.store.packed import TargetReader, pack_targets
from kvdistill.store.shards import StoreWriter

WARM_UP, TIMED = 8, 32
STORE_BAR, ONLINE_BAR = 1.20, 1.15
PLAIN, CONTROL = "plain Trainer SFT", "plain Trainer SFT again (control)"
STORE, ONLINE, ONLINE_ONE = (
    "kvdistill, 2 teachers, store",
    "kvdistill, 2 teachers, online",
    "kvdistill, 1 teacher, online",
)
COMPETENCE = "kvdistill, 2 teachers, online, competence"
TRL_SFT, TRL_GKD = "TRL SFT", "TRL GKD, 1 teacher"
TEACHERS = ("first", "second")


def run() -> bool:
    """Both tables; True where every bar of the first is met (the worst case shows the same bars to be compared)."""
    quiet_libraries()
    torch.set_num_threads(THREADS)
    device = pick_device()
    print(f"step cost: {WARM_UP} warm-up and {TIMED} timed steps each, {THREADS} threads, {device.type}")
    grouped = ToySetup()
    tables = {
        "grouped_heads": _table(grouped, device, peers=True, title="grouped KV heads, as Qwen2.5 has them"),
        "full_heads": _table(grouped.full_heads(), device, peers=False, title="worst case: as many KV heads as heads"),
    }
    settings = {"warm_up": WARM_UP, "timed": TIMED, "threads": THREADS, "device": device.type}
    save("step_cost", settings, tables, device)
    return all(row.get("met", True) for row in tables["grouped_heads"]["cpu_time"])


def _table(setup: ToySetup, device: torch.device, *, peers: bool, title: str) -> dict[str, Any]:
    print(f"\n{title}\n  student {setup.student}\n  teacher {setup.teacher}")
    print(f"  batch {setup.batch} x {setup.tokens} tokens")
    with tempfile.TemporaryDirectory() as folder:
        steps, data, cold = _measure(setup, device, Path(folder), peers)
    bounds = _flop_bounds(setup, device)
    bars = {STORE: STORE_BAR} | {name: ONLINE_BAR * bounds[name] for name in (ONLINE, COMPETENCE, ONLINE_ONE)}
    notes = {name: f"FLOP bound {bound:.2f}" for name, bound in bounds.items()}
    found: dict[str, Any] = {"setup": asdict(setup), "page_cache_dropped": cold, "flop_bounds": bounds}
    for kind, clock in (("cpu", "CPU"), ("wall", "wall")):
        base = [getattr(moment, kind) for moment in steps[PLAIN]]
        rows = [
            Row(name, paired_ratio([getattr(m, kind) for m in taken], base), bars.get(name), note=notes.get(name, ""))
            for name, taken in steps.items()
            if name != PLAIN
        ]
        print_table(f"{clock} time of a step over that of plain Trainer SFT ({_median(base) * 1e3:.1f} ms)", rows)
        found[f"{kind}_time"] = [row.as_dict() for row in rows]
        found[f"{kind}_plain_ms"] = round(_median(base) * 1e3, 3)
    fetch = {name: round(_median([m.wall for m in taken]) * 1e3, 3) for name, taken in data.items()}
    print("\n  fetching a batch (wall, ms; not in the ratios)")
    print("\n".join(f"    {name:{max(map(len, fetch))}} {ms:6.2f}" for name, ms in fetch.items()))
    print(f"  cache read in shuffled order, {'pages dropped first' if cold else 'pages could not be dropped'}")
    return found | {"fetch_batch_wall_ms": fetch}


def _measure(
    setup: ToySetup, device: torch.device, folder: Path, peers: bool
) -> tuple[dict[str, list[Moment]], dict[str, list[Moment]], bool]:
    """Step and data times by trainer, and whether the cache was cold. peers: the long form, with TRL."""
    rounds = WARM_UP + TIMED
    examples = _examples(setup, rounds * setup.batch)
    models = [toy_teacher(setup.teacher, 100 + i, device) for i in range(len(TEACHERS))]
    layers = _teacher_layers(setup)
    stores = [_write_store(folder / n, m, examples, layers) for n, m in zip(TEACHERS, models, strict=True)]
    cold = all([_drop_pages(store) for store in stores])
    readers = {name: TargetReader(store, verify=False) for name, store in zip(TEACHERS, stores, strict=True)}
    make = partial(_ours, setup, device, folder, examples, models, layers)
    trainers: dict[str, Trainer] = {
        PLAIN: _plain(setup, device, folder, examples),
        CONTROL: _plain(setup, device, folder, examples),
        STORE: make(readers=readers, strategy="competence"),
        ONLINE: make(strategy="fixed"),
    }
    if peers:
        trainers[COMPETENCE] = make(strategy="competence")
        trainers[ONLINE_ONE] = make(strategy="fixed", num_teachers=1)
        trainers |= _peers(setup, device, folder, examples)
    return *_take_turns(trainers, device, rounds), cold


def _take_turns(
    trainers: Mapping[str, Trainer], device: torch.device, rounds: int
) -> tuple[dict[str, list[Moment]], dict[str, list[Moment]]]:
    """Timed rounds only: what is not fetching data, and what is."""
    fetched: dict[str, list[Moment]] = {name: [] for name in trainers}
    turnstile = Turnstile({name: trainer.train for name, trainer in trainers.items()}, device, THREADS)
    for name, trainer in trainers.items():
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_HandOver(name, turnstile))
        _watch_data(trainer, fetched[name], device)
    turns = turnstile.run(rounds)
    data = {name: taken[WARM_UP:rounds] for name, taken in fetched.items()}
    steps = {n: [turn - d for turn, d in zip(turns[n][WARM_UP:], data[n], strict=True)] for n in trainers}
    return steps, data


class _HandOver(TrainerCallback):
    def __init__(self, name: str, turnstile: Turnstile) -> None:
        self._name, self._turnstile = name, turnstile

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._turnstile.end_turn(self._name)


def _watch_data(trainer: Trainer, taken: list[Moment], device: torch.device) -> None:
    fetch = trainer.get_batch_samples

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now(device)
        batch = fetch(*args, **kwargs)
        taken.append(now(device) - start)
        return batch

    trainer.get_batch_samples = timed  # type: ignore[method-assign]


# -- texts and store ----------------------------------------------------------------------------------


def _examples(setup: ToySetup, number: int) -> list[Example]:
    segments = toy_segments(setup.tokens)
    texts = toy_texts(number, setup.tokens, setup.student.vocab)
    return [
        Example(task=f"task-{i % 2}", id=str(i), style="cot", prompt="", answer="", input_ids=ids, segments=segments,
                doc_hash=str(i), prompt_hash=str(i))
        for i, ids in enumerate(texts)
    ]  # fmt: skip


def _write_store(folder: Path, model: Any, examples: Sequence[Example], layers: list[int]) -> Path:
    with StoreWriter(folder, "targets-train", "toy", {"texts": len(examples)}) as writer:
        for start in range(0, len(examples), 64):
            ids, segments = _texts_of(examples[start : start + 64], model.device)
            targets = run_teacher(model, ids, segments, layers=layers, dtype="float32")
            writer.add(pack_targets([targets.to("cpu")], torch.float32))
        return writer.finish({"layers": layers, "rope": "unrotated", "examples": len(examples), "split": "train"})


def _drop_pages(folder: Path) -> bool:
    """Ask the system to forget the files' pages, so that the first read of each example comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return False
    try:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return True


# -- trainers -----------------------------------------------------------------------------------------


def _train_recipe(setup: ToySetup) -> TrainRecipe:
    return TrainRecipe(steps=WARM_UP + TIMED, batch_size=setup.batch, save_every=10**6)


def _arguments(setup: ToySetup, device: torch.device, folder: Path) -> TrainingArguments:
    """One set for everybody: ours, so that optimiser, schedule, clipping and logging agree."""
    return training_arguments(_train_recipe(setup), folder, seed=0, cpu=device.type == "cpu")


class _Labelled(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same texts with labels on the completion, as plain fine-tuning has them, made beforehand."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._rows = []
        for example in examples:
            ids, segments = torch.tensor(example.input_ids), torch.tensor(example.segments)
            labels = torch.where(segments == PROMPT, -100, ids)
            self._rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def _plain(setup: ToySetup, device: torch.device, folder: Path, examples: Sequence[Example]) -> Trainer:
    student = toy_model(setup.student, 0, device)
    return Trainer(student, _arguments(setup, device, folder), train_dataset=_Labelled(examples))


def _ours(
    setup: ToySetup,
    device: torch.device,
    folder: Path,
    examples: Sequence[Example],
    models: Sequence[nn.Module],
    layers: list[int],
    *,
    strategy: str,
    readers: Mapping[str, TargetReader] | None = None,
    num_teachers: int = 2,
) -> DistillTrainer:
    names = list(TEACHERS[:num_teachers])
    arm = ArmRecipe(
        teachers=names,
        align=AlignRecipe(),
        compress=CompressRecipe(),
        fuse=FuseRecipe(fusion_strategy=strategy),  # type: ignore[arg-type]
        loss=LossRecipe(),
        train=TrainRecipe(),
    )
    runs: dict[str, Callable[[Tensor, Tensor], Any]] = {
        name: partial(run_teacher, model, layers=layers, dtype="float32", want_nll=strategy == "competence")
        for name, model in zip(names, models, strict=False)
    }
    first = _texts_of(examples[: 4 * setup.batch], device)
    aligners = {}
    for name, run_now in runs.items():
        aligner = MapProjectionAligner(arm.align, setup.teacher.kv_shape, setup.student.kv_shape, seed=1)
        aligner.fit_statistics([(run_now(*first).kv, None)])
        aligners[name] = aligner.to(device)
    student_layers = range(setup.student.layers)
    fusion = build_fusion(arm.fuse, names, len(student_layers))
    distiller = Distiller(CausalStudent(toy_model(setup.student, 0, device)), arm, aligners, fusion, student_layers)

    def run_teachers(batch: Batch) -> Batch:
        return batch.with_targets({name: runs[name](*given) for name, given in batch.teacher_inputs.items()})

    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(5)).tolist()
    return DistillTrainer(
        distiller,
        _arguments(setup, device, folder),
        BatchMaker(examples, 0, arm, dict(readers or {})),
        order,
        arm=arm,
        run_teachers=None if readers else run_teachers,
        log_file=folder / f"log-{strategy}-{num_teachers}-{bool(readers)}.jsonl",
    )


def _texts_of(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, segments = (torch.tensor([getattr(e, what) for e in examples]) for what in ("input_ids", "segments"))
    return ids.to(device), segments.to(device)


def _teacher_layers(setup: ToySetup) -> list[int]:
    mapping = layer_map(AlignRecipe().layers, setup.teacher.layers, setup.student.layers, None)
    return needed_teacher_layers(mapping, range(setup.student.layers))


# -- peers --------------------------------------------------------------------------------------------


def _peers(setup: ToySetup, device: torch.device, folder: Path, examples: Sequence[Example]) -> dict[str, Trainer]:
    """TRL's trainers with the same settings; off: what they switch on by default that plain fine-tuning does not."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl import SFTConfig, SFTTrainer
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError:
        print("  TRL is not installed (pip install '.[bench]'): its rows are left out")
        return {}
    import datasets

    datasets.disable_progress_bars()
    ours = _arguments(setup, device, folder).to_dict()
    shared = {name: ours[name] for name in ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate",
              "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs",
              "logging_steps", "logging_nan_inf_filter", "report_to", "seed", "use_cpu", "disable_tqdm",
              "dataloader_pin_memory")}  # fmt: skip
    shared |= {"save_strategy": "no", "gradient_checkpointing": False, "bf16": False, "max_length": None}
    rows = datasets.Dataset.from_list(
        [{"input_ids": e.input_ids, "completion_mask": [int(s != PROMPT) for s in e.segments]} for e in examples]
    )
    labelled = _Labelled(examples)
    columns = {name: [labelled[i][name].tolist() for i in range(len(labelled))] for name in labelled[0]}
    tokenizer = _word_tokenizer(setup.student.vocab)
    sft = SFTTrainer(
        toy_model(setup.student, 0, device), SFTConfig(**shared), train_dataset=rows, processing_class=tokenizer
    )
    gkd = GKDTrainer(
        toy_model(setup.student, 0, device),
        toy_teacher(setup.teacher, 100, device),
        GKDConfig(**shared, lmbda=0.0),  # off-policy: on the given texts, nothing is generated
        data_collator=torch.utils.data.default_collate,
        train_dataset=datasets.Dataset.from_dict(columns).with_format("torch"),
        processing_class=tokenizer,
    )
    return {TRL_SFT: sft, TRL_GKD: gkd}


def _word_tokenizer(vocab: int) -> Any:
    """A tokenizer of that size, because TRL asks for one; the texts are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# -- the bound ----------------------------------------------------------------------------------------


def _flop_bounds(setup: ToySetup, device: torch.device) -> dict[str, float]:
    """FLOPs of our steps over the plain step's: student forward and backward, the teacher forwards that are needed
    (none from the store; without a router that asks for NLL, only up to the top layer's keys), and the aligners."""
    tokens, squares = setup.batch * setup.tokens, setup.batch * setup.tokens**2
    student = 3 * forward_flops(describe_model(toy_model(setup.student, 0, device)), tokens, squares)
    shape = describe_model(toy_model(setup.teacher, 0, device))
    predicted = setup.batch * sum(code != PROMPT for code in toy_segments(setup.tokens))
    capture = capture_flops(shape, tokens, squares, max(_teacher_layers(setup)))
    whole = forward_flops(shape, tokens, squares, num_head_tokens=predicted)
    projector = 6 * tokens * 2 * setup.student.layers * setup.student.kv_width * setup.teacher.kv_width  # K and V
    extra = {
        STORE: 2 * projector,
        ONLINE: 2 * (capture + projector),
        COMPETENCE: 2 * (whole + projector),
        ONLINE_ONE: capture + projector,
    }
    return {name: round((student + more) / student, 4) for name, more in extra.items()}


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())
