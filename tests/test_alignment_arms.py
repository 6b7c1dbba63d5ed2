"""Every kind of arm this alignment knows, on teachers of four families with own tokenizers and own chains.

What is asserted of a kind is asserted of its loss on one batch, made as training makes it: stored and online targets
give the same, splits of a batch add up, padding changes nothing, gradients reach what learns and nothing else.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe import SEED, environment, invoke, made_ready, rows_of, tiny_recipe, tiny_tree
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import Batch, BatchMaker, token_counts
from kvdistill.arms.distiller import Distiller, DistillOutput
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.teacher_pass import run_teacher
from kvdistill.core.files import sha256_file
from kvdistill.core.layout import store_root
from kvdistill.core.recipe import Recipe
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.core.targets import ATTENTION, TeacherTargets
from kvdistill.data.tables import read_split
from kvdistill.models import describe_model
from kvdistill.stages.fit import fit
from kvdistill.stages.prepare import prepare

pytestmark = pytest.mark.slow

quiet_libraries()
set_threads(1)  # as the driver of killed trainings: same sums, same bits

KV_WEIGHT = 5.0
STEPS = {"optimiser": {"steps": 4, "batch_size": 8}}
IN_STUDENT = {"match_in": "student", "init": "ridge"}
OWN_CHAINS = {"time": "segment"}
# by name: what differs from the recipe
ARMS: dict[str, dict[str, Any]] = {
    "structural": {"teachers": ["qwen", "llama"], "loss": {"kind": "structural"}},
    "structural-in-student": {"teachers": ["gpt2", "llama"], "loss": {"kind": "structural"}, "align": IN_STUDENT},
    "output": {"teachers": ["neox"], "loss": {"kind": "attention_output"}, "align": OWN_CHAINS},
    "cka-loss": {"teachers": ["llama"], "loss": {"kind": "cka"}},
    "cka-layers": {"teachers": ["qwen"], "align": {"layers": "cka"}},
    "r-kv": {"teachers": ["qwen", "llama"], "compress": {"kv_compression": "r-kv", "keep": 4}},
    "random": {"teachers": ["llama"], "compress": {"kv_compression": "random", "keep": 4}},
    "uniform": {"teachers": ["gpt2"], "compress": {"kv_compression": "uniform", "keep": 4}},
    "steps": {"teachers": ["qwen", "llama"], "compress": {"kv_compression": "steps", "step_mark": ",", "keep": 2}},
    "steps-of-own-chains": {
        "teachers": ["neox"],
        "compress": {"kv_compression": "steps", "step_mark": ","},
        "align": OWN_CHAINS,
    },
    "none": {"teachers": ["gpt2"], "compress": {"kv_compression": "none"}},
    "attention-weighted": {"teachers": ["llama"], "loss": {"attention_weighted": True}},
    "r-kv-weighted": {  # each layer keeps tokens of its own, and weighs those
        "teachers": ["qwen", "llama"],
        "compress": {"kv_compression": "r-kv", "keep": 2},
        "loss": {"attention_weighted": True},
    },
    "elastic": {"teachers": ["llama"], "align": {"projection": "elastic"}},
    "low-rank": {"teachers": ["gpt2"], "align": {"rank": 4}},
    "residual": {"teachers": ["llama"], "align": {"residual": True, "init": "ridge"}},
    "per-head": {"teachers": ["qwen"], "align": {"projection": "structured", "per_head": True}},
    "ridge-on-attention": {"teachers": ["llama"], "align": {"init": "ridge", "ridge_on": "attention"}},
    "shared": {"teachers": ["gpt2", "llama"], "align": {"match_in": "shared"}},
    "shared-trained": {
        "teachers": ["neox"],
        "align": {"match_in": "shared", "shared_fit": "trained", **OWN_CHAINS},
        "loss": {"distill_layers": "1"},
    },
    "shared-fused": {
        "teachers": ["qwen", "llama"],
        "align": {"match_in": "shared", "shared_fit": "procrustes"},
        "fuse": {"fuse_at": "kv"},
    },
    "segment": {
        "teachers": ["neox"],
        "align": {**OWN_CHAINS, "segment_ratio": {"reasoning": 0.5}, "smoothness": {"reasoning": 2.0}},
    },
    "structural-shuffled": {"teachers": ["qwen", "llama"], "loss": {"kind": "structural"}, "control": "shuffled"},
    "segment-shuffled": {"teachers": ["neox"], "align": OWN_CHAINS, "control": "shuffled"},
    "cka-layers-untrained": {"teachers": ["qwen"], "align": {"layers": "cka"}, "control": "untrained"},
    "random-noise": {
        "teachers": ["llama"],
        "compress": {"kv_compression": "random", "keep": 4},
        "control": "noise",
    },
    "shared-fused-noise": {
        "teachers": ["qwen", "llama"],
        "align": {"match_in": "shared", "shared_fit": "procrustes"},
        "fuse": {"fuse_at": "kv"},
        "control": "noise",
    },
}
NOTED_ONLY = {"r-kv", "attention-weighted", "r-kv-weighted"}  # of scores noted when a teacher ran: not online
FROZEN = {"structural-in-student", "shared", "shared-trained", "shared-fused", "shared-fused-noise"}


def byte_level_tokenizer(folder: Path) -> Path:
    """Bytes and numbers of two digits: shorter than character by character."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([f"{number}" for number in range(10, 100)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[1])
    made.save_pretrained(folder)
    return folder


def families(folder: Path) -> list[dict[str, Any]]:
    def scratch(name: str, architecture: str, train_on: str, **sizes: Any) -> dict[str, Any]:
        return {"name": name, "train_on": [train_on], "scratch": {"architecture": architecture, **sizes}, **STEPS}

    return [
        scratch("qwen", "qwen2", "chain", hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2),
        scratch("gpt2", "gpt2", "product", hidden_size=20, num_layers=4, num_heads=2),
        scratch("llama", "llama", "chain", hidden_size=24, num_layers=3, num_heads=3, rope_theta=500_000.0)
        | {"tokenizer": str(folder / "bytes")},
        scratch("neox", "gpt_neox", "product", hidden_size=32, num_layers=3, num_heads=2)
        | {"traces": str(folder / "traces.jsonl")},
    ]


def study_changes(folder: Path) -> dict[str, Any]:
    """Changes to `tiny_recipe.TREE`: what the driver of killed trainings takes as JSON."""
    tasks = [{"name": name, "train": 40, "val": 12, "test": 4} for name in ("chain", "product")]
    return {
        "teachers": families(folder),
        "data": {"tasks": tasks},
        "student": {"scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.2}},
        "train": {"steps": 3},
        "evaluate": {"match_examples": 8, "max_new_tokens": 3},
        "arms": ARMS,
    }


def write_traces(folder: Path) -> None:
    """The teacher's own chains: longer than the data's, ending as they do."""
    tree = study_changes(folder)
    run = folder / "traces-of"
    prepare(tiny_recipe(run, data=tree["data"], arms={"ce": {"teachers": []}}), run)
    rows = [row for split in ("train", "val") for row in read_split(run, split)]
    texts = [{"question": r.question, "reasoning": f"1,2,{r.reasoning}"} for r in rows]
    (folder / "traces.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


class Study:
    """A run folder that is captured and fitted, and the loss of each of its arms on a batch."""

    def __init__(self, recipe: Recipe, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder
        recipe = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"device": "cpu"})})
        alone = {name: arm for name, arm in recipe.arms.items() if name not in NOTED_ONLY}
        source = recipe.capture.model_copy(update={"source": "online"})
        self.experiment = Experiment(recipe, run)
        self.online = Experiment(recipe.model_copy(update={"capture": source, "arms": alone}), run)
        self.distiller, self.batches = functools.cache(self.new_distiller), functools.cache(self._batches)

    def arm(self, name: str, *, online: bool = False) -> Arm:
        """Without cross-entropy: what is left is the KV term."""
        experiment = self.online if online else self.experiment
        recipe = experiment.arms[name]
        loss = recipe.loss.model_copy(update={"ce_weight": 0.0})
        return Arm(experiment, experiment.teachers, recipe.model_copy(update={"loss": loss}), SEED)

    def new_distiller(self, name: str) -> Distiller:
        return self.arm(name).distiller.eval()

    def _batches(self, name: str) -> BatchMaker:
        return self.arm(name).batches("train")

    def by_length(self) -> list[int]:
        rows = self.experiment.split("train")
        return sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))


def kv_loss(distiller: Distiller, batch: Batch, counts: torch.Tensor | None = None) -> DistillOutput:
    counts = token_counts(batch, distiller.arm) if counts is None else counts
    return distiller(batch, counts.float().clamp_min(1.0), kv_weight=KV_WEIGHT)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("arms")
    byte_level_tokenizer(folder / "bytes")
    write_traces(folder)
    run = folder / "run"
    recipe = tiny_recipe(run, **study_changes(folder))
    made_ready(recipe, run)
    return Study(recipe, run, folder)


def test_the_teachers_are_as_unlike_as_they_should_be(study):
    teachers = study.experiment.teachers
    shapes = [describe_model(teacher.load()) for teacher in teachers.values()]
    assert len({(s.num_layers, s.num_kv_heads, s.head_size) for s in shapes}) == 4
    own = {name: teacher.text("train") for name, teacher in teachers.items()}
    assert [name for name, text in own.items() if text is not None] == ["llama", "neox"]
    mine = read_split(study.run, "train")[0]
    cut, chained = (own[name].examples[0] for name in ("llama", "neox"))
    assert len(cut.input_ids) < 0.9 * len(mine.input_ids) and cut.reasoning == mine.reasoning
    assert chained.reasoning == f"1,2,{mine.reasoning}"


@pytest.mark.parametrize("name", ARMS)
def test_a_loss_is_finite_falls_and_its_gradient_reaches_what_learns(study, name):
    """Ten steps of Adam on one batch."""
    distiller = study.new_distiller(name)
    batch = study.batches(name)(study.by_length()[:6])
    out = kv_loss(distiller, batch)
    arm = study.arm(name).recipe
    ends = {term.split("/")[-1] for term in out.terms} - {"ce"}
    assert ends == ({"attention"} if arm.compares_attention else {"k", "v"})
    assert float(out.loss.detach()) > 0 and bool(out.loss.isfinite())
    out.loss.backward()
    heads = "qkv" if arm.compares_attention else "kv"
    for layer in distiller.student.model.model.layers:
        for head in heads:
            assert float(getattr(layer.self_attn, f"{head}_proj").weight.grad.abs().max()) > 0, head
    learned = [p for p in distiller.aligners.parameters() if p.requires_grad]
    assert bool(learned) == (name not in FROZEN)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learned)
    assert all(p.grad is None for p in distiller.aligners.parameters() if not p.requires_grad)
    optimiser = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=3e-3)
    losses = [float(out.loss.detach())]
    for _ in range(10):
        optimiser.step()
        optimiser.zero_grad()
        out = kv_loss(distiller, batch)
        out.loss.backward()
        losses.append(float(out.loss.detach()))
    assert torch.tensor(losses).isfinite().all() and losses[-1] < 0.97 * losses[0], losses


def test_weights_are_shared_out_among_the_tokens_that_each_layer_keeps(study):
    """By an explicit loop: mean 1 over them in every layer and text, in proportion to what the answer pays."""
    made, plain = (study.batches(name)(study.by_length()[-3:]) for name in ("r-kv-weighted", "r-kv"))
    masks = made.kv_masks["qwen"]
    assert masks.ndim == 3 and not torch.equal(masks[0], masks[1]), "or nothing is tried"
    paid_MBS = plain.targets["qwen"].scores_BSMRG[..., ATTENTION, :].mean(-1).permute(2, 0, 1)
    for layer, row in enumerate(study.batches("r-kv-weighted")._places("qwen", made.targets["qwen"])):
        for b, kept in enumerate(masks[layer]):
            paid = sum(share * paid_MBS[place, b] for place, share in row)[kept]
            found = made.token_weights["qwen"][layer, b]
            torch.testing.assert_close(found[kept], paid * len(paid) / paid.sum())
            assert not found[~kept].any()


@pytest.mark.parametrize("name", [name for name in ARMS if name not in NOTED_ONLY])
def test_online_and_stored_targets_give_the_same_loss(study, name):
    """Relative 1e-5: the same teacher, batched with other neighbours."""
    distiller, numbers = study.distiller(name), study.by_length()[3:40:9]
    stored = kv_loss(distiller, study.batches(name)(numbers))
    arm = study.arm(name, online=True)
    if arm.recipe.control == "noise":
        fit(arm)  # moments are of what teachers give that run while it is fitted
    batch = arm.batches("train")(numbers)
    assert batch.teacher_inputs.keys() == arm.teachers.keys() and not batch.targets
    online = kv_loss(distiller, arm.run_teachers(batch))
    assert online.terms.keys() == stored.terms.keys()
    for term, (raw, _, entered) in stored.terms.items():
        assert float(online.terms[term][0]) == pytest.approx(float(raw), rel=1e-5), term
        assert float(online.terms[term][2]) == pytest.approx(float(entered), rel=1e-5), term


@pytest.mark.parametrize("name", ARMS)
def test_parts_of_a_batch_add_up_to_it(study, name):
    """Divided by the tokens of the whole step, whatever the split; but `cka` is a figure of the micro-batch."""
    distiller, make = study.distiller(name), study.batches(name)
    order = study.by_length()
    numbers = [order[0], order[-1], order[20], order[1], order[-2]]  # short beside long: much padding
    whole = make(numbers)
    counts = token_counts(whole, distiller.arm)
    together = float(kv_loss(distiller, whole).loss.detach())
    parts = sum(float(kv_loss(distiller, make(part), counts).loss.detach()) for part in (numbers[:2], numbers[2:]))
    if name == "cka-loss":
        assert parts != pytest.approx(together, rel=1e-3)
    else:
        assert parts == pytest.approx(together, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ARMS)
def test_padding_changes_no_loss(study, name):
    """The shortest texts alone, and beside the longest one, whose own tokens take no part: wider on every side."""
    distiller, make = study.distiller(name), study.batches(name)
    order = study.by_length()
    alone, beside = make(order[:3]), make([*order[:3], order[-1]])
    assert beside.input_ids_BT.shape[1] > alone.input_ids_BT.shape[1] + 3
    counts = token_counts(alone, distiller.arm)
    masks = {n: mask.clone() for n, mask in beside.kv_masks.items()}
    for mask in masks.values():
        mask[..., -1, :] = False
    weights = beside.token_weights
    if weights:  # they have mean 1 over the batch: those of the three texts, and nothing for the fourth
        weights = {n: torch.zeros_like(weight) for n, weight in weights.items()}
        for n, weight in alone.token_weights.items():
            weights[n][:, :3, : weight.shape[2]] = weight
    wanted = float(kv_loss(distiller, alone, counts).loss.detach())
    padded = kv_loss(distiller, replace(beside, kv_masks=masks, token_weights=weights), counts)
    assert float(padded.loss.detach()) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


# -- what the store holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_queries_and_scores_come_back_from_the_store_as_the_teacher_gave_them(study, name):
    teacher = study.experiment.teachers[name]
    numbers = [5, 0, 17]
    stored = teacher.targets("train").read(numbers)
    model, rows, layers = teacher.load(), teacher.examples("train"), teacher.layers
    heads = describe_model(model)
    for place, number in enumerate(numbers):
        ids, segments = (torch.tensor([x]) for x in (rows[number].input_ids, rows[number].segments))
        fresh = run_teacher(model, ids, segments, layers=layers, dtype="float32", queries=True, scores=True)
        n = ids.shape[1]
        for side in ("keys", "values", "queries"):
            for kept, made in zip(getattr(stored.kv, side), getattr(fresh.kv, side), strict=True):
                torch.testing.assert_close(kept[place : place + 1, :, :n], made, atol=1e-5, rtol=1e-5)
                assert not kept[place, :, n:].any()
        torch.testing.assert_close(stored.scores_BSMRG[place : place + 1, :n], fresh.scores_BSMRG, atol=1e-5, rtol=1e-4)
        paid_M = stored.scores_BSMRG[place, :n, :, ATTENTION].mean((0, -1))
        torch.testing.assert_close(paid_M, torch.ones(len(layers)), atol=1e-4, rtol=0)  # what the answer pays: mean 1
    assert stored.kv.queries[0].shape[1] == heads.num_heads and stored.kv.layers == tuple(layers)
    (folder,) = store_root(study.run).glob(f"targets-train-{name}-*")
    written = json.loads((folder / "manifest.json").read_text())["extra"]["scaling"]
    assert written == pytest.approx([heads.head_size**-0.5] * len(layers))
    assert stored.kv.scaling == tuple(written)


def test_what_no_arm_needs_is_not_stored(study):
    stored = study.experiment.teachers["gpt2"].targets("train").read([0])
    assert stored.scores_BSMRG is None and stored.topk_index_BSK is None


# -- whole trainings ----------------------------------------------------------------------------------------


TRAINED = ["structural", "r-kv", "shared-fused"]
KILLED = ["structural", "shared-fused"]
LONGER = {"train": {"steps": 8, "save_every": 2}}
DRIVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import killed_training
killed_training.fit = lambda *_: None  # it is fitted
for arm in sys.argv[5:]:
    killed_training.main(Path(sys.argv[2]), arm, int(sys.argv[3]), 1, json.loads(Path(sys.argv[4]).read_text()))
"""


@pytest.fixture(scope="module")
def trained_by_command(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the run folder in which `kvdistill train` has trained some arms."""
    folder = tmp_path_factory.mktemp("command")
    run = folder / "run"
    shutil.copytree(study.run, run)
    changes = study_changes(study.folder) | LONGER
    (run / "recipe.json").write_text(json.dumps(tiny_recipe(run, **changes).model_dump(mode="json")))
    path = folder / "study.yaml"
    path.write_text(json.dumps(tiny_tree(run_dir=str(run), **changes)))  # JSON is YAML
    with pytest.MonkeyPatch.context() as patch:
        for name in TRAINED:
            answer = invoke(patch, "train", path, "--arm", name, "--seed", SEED)
            assert answer.code == 0, answer
    yield run


@pytest.mark.parametrize("name", TRAINED)
def test_the_command_trains_it_and_leaves_what_an_arm_leaves(trained_by_command, name):
    folder = trained_by_command / "arms" / name / f"seed-{SEED}"
    log = [row for row in rows_of(folder / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in log] == list(range(1, 9))
    terms = {term: part["raw"] for row in log for term, part in row["terms"].items()}
    assert torch.tensor(list(terms.values())).isfinite().all() and len(terms) > 1
    match = json.loads((folder / "match.json").read_text())
    assert set(match) == set(ARMS[name]["teachers"])
    assert all(abs(match[n][side]["r2"]) < 1e3 for n in match for side in "kv")
    assert json.loads((folder / "ledger.json").read_text())["flops"]


def test_killed_and_started_again_is_the_same_bits(study, trained_by_command, tmp_path):
    """SIGKILL somewhere, for a loss that compares attention and for a shared space, against undisturbed trainings."""
    changes = tmp_path / "changes.json"
    changes.write_text(json.dumps(study_changes(study.folder) | LONGER))
    run = tmp_path / "killed"
    shutil.copytree(study.run, run)
    words = [sys.executable, "-c", DRIVER, Path(__file__).parent, run, SEED, changes, *KILLED]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env=environment(), timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == len(KILLED)
    for name in KILLED:
        killed, whole = (where / "arms" / name / f"seed-{SEED}" for where in (run, trained_by_command))
        for file in ("model/model.safetensors", "adapters.safetensors", "match.json"):
            assert sha256_file(killed / file) == sha256_file(whole / file), (name, file)
        logs = [
            [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(x / "log.jsonl")]
            for x in (killed, whole)
        ]
        assert logs[0] == logs[1]


# -- encoders --------------------------------------------------------------------------------------------------


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over digits and signs, two digits at a time where it can."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    signs = list("0123456789+-*=;:?.,#") + list("abcdefghijklmnopqrstuvwxyz")
    pairs = [f"{a}{b}" for a in range(10) for b in range(10)]
    pieces = [*special, *signs, *(f"##{sign}" for sign in signs), *pairs, *(f"##{pair}" for pair in pairs)]
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **roles)


def save_encoders(folder: Path) -> None:
    tokenizer = word_piece_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    torch.manual_seed(0)
    bert = BertConfig(
        **sizes,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    t5 = T5Config(**sizes, d_model=20, d_kv=7, d_ff=24, num_layers=4, num_decoder_layers=1, num_heads=3)
    for name, model in (("bert", BertForMaskedLM(bert)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


ENCODER_ARMS: dict[str, dict[str, Any]] = {
    "fixed": {},
    # T5's own attention cannot be made again, for its bias by distance: compared in the student's space, or not at all
    "structural": {"loss": {"kind": "structural"}, "align": IN_STUDENT},
    "structural-in-teacher": {"loss": {"kind": "structural"}, "teachers": ["bert"]},
    "shared": {"align": {"match_in": "shared"}},
    "cka-layers": {"align": {"layers": "cka", "cka_on": "hidden", **IN_STUDENT}},
    "r-kv": {"compress": {"kv_compression": "r-kv", "keep": 3}, "teachers": ["bert"]},
}


def encoder_changes(folder: Path) -> dict[str, Any]:
    teachers = [{"name": name, "path": str(folder / name), "tokenizer": str(folder / name)} for name in ("bert", "t5")]
    return study_changes(folder) | {"teachers": teachers, "arms": ENCODER_ARMS}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder = tmp_path_factory.mktemp("encoders")
    save_encoders(folder)
    run = folder / "run"
    recipe = tiny_recipe(run, **encoder_changes(folder))
    made_ready(recipe, run)
    yield Study(recipe, run, folder)


@pytest.mark.parametrize("name", ENCODER_ARMS)
def test_a_decoder_learns_from_an_encoder_and_an_encoder_decoder(encoders, name):
    distiller = encoders.new_distiller(name)
    batch = encoders.batches(name)(encoders.by_length()[:6])
    optimiser = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        out = kv_loss(distiller, batch)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        losses.append(float(out.loss.detach()))
    assert torch.tensor(losses).isfinite().all() and losses[-1] < 0.99 * losses[0], losses
    assert {term.split("/")[1] for term in out.terms if term != "ce"} == set(distiller.teachers)


def test_an_encoder_has_no_nll_and_its_layers_keep_their_scaling(encoders):
    stored: dict[str, TeacherTargets] = {}
    for name in ("bert", "t5"):
        stored[name] = encoders.experiment.teachers[name].targets("train").read([0, 3])
        assert stored[name].nll_B is None and stored[name].kv.rope == "none"
    assert stored["bert"].kv.scaling == pytest.approx([6**-0.5] * len(stored["bert"].kv.layers))
    assert set(stored["t5"].kv.scaling) == {1.0}
    assert {(rule.causal, rule.biased) for rule in stored["bert"].kv.rules} == {(False, False)}
    assert {(rule.causal, rule.biased) for rule in stored["t5"].kv.rules} == {(False, True)}
    text = encoders.experiment.teachers["bert"].text("train")
    assert replace(stored["bert"], kv=None).segments_BS.shape[1] < 48 and text is not None and text.own is not None
