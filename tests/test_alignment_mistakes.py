"""What cannot be aligned is said before anything is trained: one message, its place, its fix, exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_alignment_arms import made_ready, save_encoders, word_piece_tokenizer
from tiny_models import tiny_model
from tiny_recipe import (
    SEED,
    assert_one_message,
    invoke,
    no_training,
    no_work,
    rows_of,
    tiny_recipe,
    tiny_tree,
    write_recipe,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    CTRLTokenizer,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvdistill.arms.experiment import Experiment
from kvdistill.core.cka import CKAAccumulator
from kvdistill.core.files import write_json
from kvdistill.core.recipe import LossRecipe
from kvdistill.core.runtime import quiet_libraries
from kvdistill.data.tokenizers import character_tokenizer
from kvdistill.losses import build_distance
from kvdistill.models import auto_class
from kvdistill.stages.train import train_student
from kvdistill.store.packed import TargetReader

quiet_libraries()

MAMBA: dict[str, Any] = {"hidden_size": 16, "state_size": 4}


def teachers(first: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "one", **first}, tiny_tree()["teachers"][1]]


def scratch(**sizes: Any) -> list[dict[str, Any]]:
    return teachers({**tiny_tree()["teachers"][0], "scratch": sizes})


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_encoders(folder)
    return folder


def encoder(folder: Path, name: str) -> list[dict[str, Any]]:
    return teachers({"path": str(folder / name), "tokenizer": str(folder / name)})


def assert_refused(monkeypatch: Any, folder: Path, *parts: str, work: Any = no_training, **changes: Any) -> None:
    assert_one_message(invoke(monkeypatch, "run", write_recipe(folder, **changes), work=work), *parts)


# -- tokenizers ------------------------------------------------------------------------------------------------


def test_no_common_text(tmp_path, monkeypatch):
    """A teacher whose tokenizer can write none of the text: each of its tokens is unknown."""
    pieces = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "x": 3}
    backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    roles = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(tmp_path / "tokenizer")
    one = {**tiny_tree()["teachers"][0], "tokenizer": str(tmp_path / "tokenizer")}
    one["scratch"] = {**one["scratch"], "architecture": "llama"}
    assert_refused(
        monkeypatch, tmp_path, "teachers.0 (one).tokenizer", "cannot spell the answer", teachers=teachers(one)
    )


def test_a_tokenizer_that_is_not_fast(tmp_path, monkeypatch):
    """Named by itself, and beside a model's weights."""
    letters = character_tokenizer("abc")
    words = {"vocab_size": len(letters) + 40, "tie_word_embeddings": True}
    tiny_model("llama", **words).save_pretrained(tmp_path / "model")
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1, **{str(n): n + 2 for n in range(30)}}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    slow.save_pretrained(tmp_path / "model")
    assert not AutoTokenizer.from_pretrained(tmp_path / "model").is_fast
    assert_refused(
        monkeypatch,
        tmp_path,
        "teachers.0 (one)",
        "not a fast one",
        "name a fast tokenizer",
        teachers=teachers({"path": str(tmp_path / "model")}),
    )
    named = {**tiny_tree()["teachers"][0], "tokenizer": str(tmp_path / "model")}
    assert_refused(monkeypatch, tmp_path, "teachers.0 (one).tokenizer", "tokenizer.json", teachers=teachers(named))


# -- layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "change", "parts"),
    [
        ("teacher", {"num_layers": 9}, ["a teacher of 9 layers", "this one has 3"]),
        ("student", {"num_layers": 5}, ["a student of 5 layers", "this one has 2"]),
        ("teacher", None, ["not a file of layer similarities"]),
    ],
)
def test_a_layer_map_of_other_models(tmp_path, monkeypatch, side, change, parts):
    """Sizes show before the teacher is trained."""
    found: dict[str, Any] = {
        "format": 1,
        "teacher": {"name": "another", "num_layers": 3, "identity": "x"},
        "student": {"name": "student", "num_layers": 2, "identity": "y"},
        "similarity": {"keys": [[0.5, 0.2, 0.1], [0.1, 0.2, 0.3]]},
    }
    if change is None:
        del found[side]
    else:
        found[side] |= change
    write_json(tmp_path / "layers.json", found)
    align = {"layers": "cka", "layer_map": str(tmp_path / "layers.json")}
    arms = {"mapped": {"teachers": ["one"], "align": align}}
    assert_refused(monkeypatch, tmp_path, "layers.json", "arms.mapped with teacher 'one'", *parts, arms=arms)


def test_a_layer_map_of_models_with_other_weights(tmp_path, monkeypatch):
    """The same sizes: who they are shows when both are there, before anything is captured."""
    arms = {"mapped": {"teachers": ["one"], "align": {"layers": "cka", "cka_texts": 20}}}
    run = tmp_path / "run"
    recipe = tiny_recipe(run, arms=arms, teachers=tiny_tree()["teachers"][:1])
    made_ready(recipe, run, "prepare", "teach", "map-layers")
    path = Experiment(recipe, run).teachers["one"].similarity_path
    found = json.loads(path.read_text())
    found["teacher"]["identity"] = "another's"
    write_json(tmp_path / "another.json", found)
    arms["mapped"]["align"]["layer_map"] = str(tmp_path / "another.json")
    answer = invoke(monkeypatch, "capture", write_recipe(tmp_path, arms=arms, teachers=tiny_tree()["teachers"][:1]))
    assert_one_message(answer, "another.json", "made with another teacher (one)", "align.layer_map")


@pytest.mark.parametrize(
    ("align", "parts"),
    [
        ({"layers": "cka", "cka_top_k": 9}, ["9 teacher layers", "the teacher has 3", "align.cka_top_k"]),
        ({"layers": "cka", "layer_map": {0: [0], 1: [1]}}, ["reads a file that map-layers wrote", "align.layer_map"]),
        ({"match_in": "shared", "shared_size": 17}, ["17 shared channels", "'one' has 12", "align.shared_size"]),
    ],
)
def test_what_the_models_are_too_small_for(tmp_path, monkeypatch, align, parts):
    assert_refused(monkeypatch, tmp_path, "arms.large", *parts, arms={"large": {"teachers": ["one"], "align": align}})


# -- heads -----------------------------------------------------------------------------------------------------


def test_heads_that_do_not_divide(tmp_path, monkeypatch):
    """Inside a model they cannot be; between models they may be: three heads meet two in every form of projector."""
    assert_refused(
        monkeypatch,
        tmp_path,
        "4 heads cannot share 3 key/value heads",
        "teachers.0 (one)",
        teachers=scratch(hidden_size=24, num_heads=4, num_kv_heads=3),
    )
    run = tmp_path / "other"
    student = {"scratch": {"hidden_size": 18, "num_layers": 2, "num_heads": 3}}
    flat = {"init": "ridge", "match_in": "student"}
    arms = {
        "flat": {"align": flat},
        "structured": {"align": {"projection": "structured", "init": "uniform", "per_head": True}},
    }
    one = tiny_tree()["teachers"][:1]
    recipe = tiny_recipe(run, student=student, arms=arms, train={"steps": 2}, teachers=one)
    made_ready(recipe, run)
    for name in arms:
        train_student(Experiment(recipe, run).arm(name, SEED))
        folder = run / "arms" / name / f"seed-{SEED}"
        assert all(torch.tensor(row["loss"]).isfinite() for row in rows_of(folder / "log.jsonl") if "loss" in row)
        shapes = {key: tuple(x.shape) for key, x in load_file(folder / "adapters.safetensors").items()}
        assert any(3 in shape or 18 in shape for shape in shapes.values()), shapes


# -- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (
            lambda size: MambaForCausalLM(MambaConfig(vocab_size=size, num_hidden_layers=2, **MAMBA)),
            ["no attention heads"],
        ),
        (
            lambda size: BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=16, n_layer=2, n_head=2)),
            ["bloom", "bypasses transformers' attention interface", "arms.fixed"],
        ),
    ],
    ids=["none at all", "of its own"],
)
def test_a_model_whose_keys_cannot_be_recorded(tmp_path, monkeypatch, model, parts):
    letters = character_tokenizer()
    folder = tmp_path / "model"
    model(len(letters)).save_pretrained(folder)
    letters.save_pretrained(folder)
    assert_refused(monkeypatch, tmp_path, "one", *parts, teachers=teachers({"path": str(folder)}))


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def saved(folder: Path, family: str, **own: Any) -> str:
    letters = character_tokenizer()
    roles = {"pad_token_id": letters.pad_token_id, "bos_token_id": None, "eos_token_id": letters.eos_token_id}
    config = CONFIG_MAPPING[family](vocab_size=len(letters), **SMALL | roles | own)
    torch.manual_seed(0)
    auto_class(config).from_config(config).save_pretrained(folder / family)
    letters.save_pretrained(folder / family)
    return str(folder / family)


def test_a_model_whose_keys_cannot_be_unrotated_is_named_before_capture(tmp_path, monkeypatch):
    """HunYuan has a norm after the rotation: its unrotated keys were silently wrong."""
    folder = saved(tmp_path, "hunyuan_v1_dense")
    says = ["arms.fixed: teachers.0 (one)", "hunyuan_v1_dense", "cannot be unrotated exactly", "docs/models.md"]
    assert_refused(monkeypatch, tmp_path, *says, teachers=teachers({"path": folder}))


def test_a_soft_cap_under_an_attention_that_has_none_names_the_one_that_has(tmp_path, monkeypatch):
    folder = saved(tmp_path, "gemma2", **WINDOWED)
    says = ["arms.fixed: teachers.0 (one)", "gemma2", "does not support", "attention: eager"]
    assert_refused(monkeypatch, tmp_path, *says, teachers=teachers({"path": folder}))


@pytest.mark.parametrize(
    ("arm", "key"),
    [
        ({"loss": {"kind": "structural"}}, "loss.kind"),
        ({"compress": {"kv_compression": "r-kv", "keep": 3}}, "compress.kv_compression"),
        ({"loss": {"attention_weighted": True}}, "loss.attention_weighted"),
        ({"align": {"ridge_on": "attention", "init": "ridge"}}, "align.ridge_on"),
    ],
)
def test_attention_that_cannot_be_made_again_is_refused_where_an_arm_looks_at_it(
    tmp_path, monkeypatch, encoders, arm, key
):
    """T5 adds to q.k by the distance of two tokens; its weights were made again as if it did not."""
    t5 = [{"name": "one", "path": str(encoders / "t5"), "tokenizer": str(encoders / "t5")}]
    says = [f"arms.looks: teachers.0 (one): {key}", "t5", "attention weights cannot be made again", "distance"]
    assert_refused(monkeypatch, tmp_path, *says, teachers=t5, arms={"looks": arm})


@pytest.mark.parametrize(
    ("family", "own", "arm"),
    [
        ("gemma3_text", WINDOWED, {"loss": {"kind": "structural"}}),
        ("cohere2", WINDOWED, {"align": {"keys": "rotated"}}),
        ("mistral", {"sliding_window": 6}, {"compress": {"kv_compression": "r-kv", "keep": 4}}),
    ],
)
def test_families_with_windows_and_layers_of_two_kinds_teach(tmp_path, monkeypatch, family, own, arm):
    """Gemma 3 and OLMo 3 raised KeyError: full_attention after capture; windows were not looked at."""
    folder = saved(tmp_path, family, **own)
    recipe = write_recipe(tmp_path, teachers=[{"name": "one", "path": folder}], arms={"kv": arm}, train={"steps": 2})
    result = invoke(monkeypatch, "run", recipe)
    assert result.code == 0, result
    (store,) = (tmp_path).glob("run/store/targets-train-one-*")
    rules = TargetReader(store).rules
    if arm.get("loss"):
        assert [rule.window for rule in rules] == [6, None]


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "an encoder"), ("t5", "an encoder-decoder")])
def test_a_scratch_teacher_that_is_not_causal(tmp_path, monkeypatch, architecture, kind):
    sizes = scratch(architecture=architecture, hidden_size=16, num_layers=2, num_heads=2)
    says = [f"{architecture} is {kind}", "cannot be trained on the spot", "teachers.0 (one).scratch.architecture"]
    assert_refused(monkeypatch, tmp_path, *says, "`path`", teachers=sizes)


@pytest.mark.parametrize("where", ["folder", "scratch"])
def test_an_encoder_as_student(tmp_path, monkeypatch, encoders, where):
    sizes = {"scratch": {"architecture": "bert", "hidden_size": 16, "num_layers": 2, "num_heads": 2}}
    student = {"path": str(encoders / "bert"), "scratch": None} if where == "folder" else sizes
    assert_refused(monkeypatch, tmp_path, "bert is an encoder", "student", "can be teachers", student=student)


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize(
    ("arm", "parts"),
    [
        ({"fuse": {"fusion_strategy": "competence"}}, ["it has no NLL", "fuse.fusion_strategy"]),
        ({"loss": {"kv_weight": 0, "logit_weight": 1.0}}, ["no logits to distil", "loss.logit_weight"]),
    ],
)
def test_an_encoder_predicts_nothing(tmp_path, monkeypatch, encoders, name, arm, parts):
    assert_refused(
        monkeypatch,
        tmp_path,
        "arms.wrong with teacher 'one'",
        *parts,
        teachers=encoder(encoders, name),
        arms={"wrong": arm},
    )


@pytest.mark.parametrize(
    "changes",
    [{"compress": {"kv_compression": "r-kv", "keep": 4}}, {"loss": {"attention_weighted": True}}],
)
def test_what_is_noted_while_the_teacher_runs_needs_a_store(tmp_path, monkeypatch, changes):
    assert_refused(
        monkeypatch,
        tmp_path,
        "capture.source: store",
        "arms.noted",
        work=no_work,
        capture={"source": "online"},
        arms={"noted": changes},
    )


def test_an_encoder_is_not_evaluated(tmp_path, monkeypatch, encoders, data_root):
    def load(*words: Any, **settings: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr("kvdistill.stages.evaluate.command.load_model", load)
    for name, kind in (("bert", "an encoder"), ("t5", "an encoder-decoder")):
        words = ["--tasks", "ceval", "--limit", 2, f"data.root={data_root}", "--out", tmp_path / "out"]
        answer = invoke(monkeypatch, "evaluate", encoders / name, *words)
        assert_one_message(answer, f"{name} is {kind}", str(encoders / name), "causal decoder")
    assert not (tmp_path / "out").exists()


# -- numbers ---------------------------------------------------------------------------------------------------


def test_half_precision_does_not_overflow_in_cka():
    """Features of 6e4, the most that fp16 holds nearly: their squares and sums do not exist in it. Against fp64."""
    torch.manual_seed(0)
    x = (torch.randn(1, 300, 12) * 1e4).clamp(-6e4, 6e4).half()
    y = (x.float() @ torch.randn(12, 9) / 6).clamp(-6e4, 6e4).half()
    assert not (x.square().isfinite().all() or (x[0] @ x[0].T).isfinite().all())
    exact = CKAAccumulator()
    exact.update(x.double(), y.double())
    wanted = float(exact.matrix())
    assert 0.2 < wanted < 1
    for space in ("kernel", "feature"):
        sums = CKAAccumulator(space)
        sums.update(x, y)
        assert float(sums.matrix()) == pytest.approx(wanted, abs=1e-5)
    distance = build_distance(LossRecipe(kind="cka"))
    mask = torch.ones(1, 300, dtype=torch.bool)
    x.requires_grad_()
    loss = distance(x[:, None], y[:, None], mask)
    assert float(loss.detach().mean()) == pytest.approx(1 - wanted, abs=1e-5)
    loss.mean().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_the_word_pieces_of_these_tests_are_fast():
    assert word_piece_tokenizer().is_fast
