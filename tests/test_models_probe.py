"""What can be done with a family is found out by running it: exact or refused, and why; and the table that says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import failing_child
import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import tiny_encoder, tiny_model
from transformers import MixtralConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvdistill.core.errors import ModelError
from kvdistill.models import capture_kv, describe_config, describe_model, probe_config, probe_model, rope
from kvdistill.models.small import small_config, small_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS))
import try_families  # noqa: E402

FEW: dict[str, Any] = {"num_hidden_layers": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXACT: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "mistral": {},
    "starcoder2": {"sliding_window": 4096},
    "olmo3": MIXED,
    "granite_swa": MIXED,
    "cohere": {},
    "cohere2": MIXED,
    "glm4": {},
    "exaone4": {"sliding_window": 4096, **MIXED},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "gpt_neox": {},
    "gpt2": {},
    "bert": {},
    "modernbert": {},
    "bart": {},
}


IS_OLD = Version(transformers.__version__) < Version("5.17")  # T5's attention was its own, Gemma 4's sizes said less


def made(family: str, **changes: Any) -> PreTrainedConfig:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    return CONFIG_MAPPING[family](**try_families.LEFT_OUT.get(family, {}) | FEW | changes)


@pytest.mark.parametrize("family", EXACT)
def test_families_whose_keys_and_attention_are_exact(family: str) -> None:
    probe = probe_config(made(family, **EXACT[family]))
    assert [v.reason for v in (probe.keys, probe.unrotated, probe.attention)] == ["", "", ""]
    assert max(v.error for v in (probe.keys, probe.unrotated, probe.attention)) < 1e-4


REFUSED = {
    "hunyuan_v1_dense": ("", "other unrotated keys in layer 0", ""),  # a norm after the rotation
    "minicpm3": ("keys and values have different", "keys and values", "keys and values"),  # MLA
    "t5": ("", "", "by the distance of two tokens"),
    "bloom": ("bypasses",) * 3,
    "mamba": ("no attention heads",) * 3,
    "deepseek_v3": ("mixture of experts",) * 3,
    "mixtral": ("mixture of experts",) * 3,
    "bert-generation": ("see what comes after them",) * 3,
    "whisper": ("AutoModelForSeq2SeqLM does not know it",) * 3,
    "gemma4_text": ("differs from layer to layer",) * 3,
}


REFUSED_BEFORE = {"t5": ("bypasses",) * 3, "gemma4_text": ("mixed head sizes",) * 3}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused_say_why(family: str) -> None:
    config = CONFIG_MAPPING[family]() if family == "gemma4_text" else made(family)
    probe, reasons = probe_config(config), REFUSED[family]
    reasons = REFUSED_BEFORE.get(family, reasons) if IS_OLD else reasons
    for verdict, words in zip((probe.keys, probe.unrotated, probe.attention), reasons, strict=True):
        assert verdict.is_exact == (not words) and words in verdict.reason


def test_a_layer_taken_for_one_that_turns_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before: EXAONE 4's layers with full attention were unrotated though they are not rotated."""
    config = made("exaone4", sliding_window=4096, layer_types=["sliding_attention"] * 3 + ["full_attention"])
    monkeypatch.setattr(rope, "turning_layers", lambda model, layers, stack=None: [True] * len(layers))
    assert "in layer 3" in probe_config(config).unrotated.reason


def test_a_window_that_is_not_carried_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before: attention was made again as if there were no window."""
    from kvdistill.models import capture

    class NoWindow(capture.AttentionRule):
        def __init__(self, window: int | None = None, **others: Any) -> None:
            super().__init__(**others)

    monkeypatch.setattr(capture, "AttentionRule", NoWindow)
    assert "is off by" in probe_config(made("mistral")).attention.reason
    assert probe_config(made("qwen2")).attention.is_exact


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_loaded_model_can_be_probed_itself(attention: str) -> None:
    for model in (tiny_model("qwen3", attention=attention), tiny_encoder("bert", attention=attention)):
        before = {name: x.clone() for name, x in model.state_dict().items()}
        probe = probe_model(model)
        assert probe.keys.is_exact and probe.unrotated.is_exact and probe.attention.is_exact
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert model.config._attn_implementation == attention


def test_a_small_model_keeps_what_is_odd_about_its_family() -> None:
    config = CONFIG_MAPPING["gemma3_text"]()
    small = small_config(config)
    assert small.layer_types == config.layer_types and small.head_dim == config.head_dim
    assert small.rope_parameters == config.rope_parameters and small.sliding_window == 5
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) != (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
    )
    assert small.num_attention_heads % small.num_key_value_heads == 0
    assert sum(p.numel() for p in small_model(config).parameters()) < 20e6
    assert config.sliding_window != 5  # the one it was made of is left alone


def test_rotary_factors_of_every_channel_keep_their_heads_as_wide() -> None:
    """Phi-3 with longrope has no key for the head's size and one factor for each pair of its channels."""
    factors = {"long_factor": [1 + i / 10 for i in range(12)], "short_factor": [1.0] * 12}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    config = made("phi3", hidden_size=96, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                  max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope)  # fmt: skip
    probe = probe_config(config)
    assert [v.reason for v in (probe.keys, probe.unrotated, probe.attention)] == ["", "", ""]


def test_sizes_that_differ_and_layers_that_run_twice_are_refused_in_words() -> None:
    model = tiny_model("llama")
    model.config.__dict__["intermediate_size"] = [28, 28, 28]  # as Gemma 3n says it
    assert describe_model(model).intermediate_size == 28
    model.config.__dict__["intermediate_size"] = [28, 32, 28, 28, 28]
    with pytest.raises(ModelError, match=r"intermediate_size differs from layer to layer \(28, 32, 28, 28, …\)"):
        describe_model(model)
    with pytest.raises(ModelError, match="mixed head sizes" if IS_OLD else "head_dim differs from layer to layer"):
        describe_config(CONFIG_MAPPING["gemma4_text"]())
    with pytest.raises(ModelError, match="mixture of experts"):
        describe_config(MixtralConfig(num_hidden_layers=1))
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ModelError, match="layer 1 runs more than once in a forward pass"), capture_kv(model):
        model(torch.arange(1, 6)[None])
    assert "more than once" in probe_model(model).keys.reason


# -- the table ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    page = (DOCS / "models.md").read_text()
    body = page[page.index(try_families.BEGIN) : page.index(try_families.END)]
    if f"transformers {transformers.__version__}:" not in body:
        pytest.skip(f"the table is of another version than transformers {transformers.__version__}")
    rows = [line for line in body.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


@pytest.mark.parametrize("family", ["roberta", "opt", "gemma", "hunyuan_v1_dense", "mt5", "mpt", "jetmoe", "voxtral"])
def test_the_table_says_what_trying_gives(family: str, written: dict[str, str]) -> None:
    row = try_families.try_family(family)
    columns = written[family].removesuffix(" |").split(" | ")[2:]
    for (_, reason, _), column in zip(row["verdicts"], columns, strict=True):
        assert column.startswith("refused" if reason else "exact")


def test_the_table_has_every_family_and_nothing_in_between(written: dict[str, str]) -> None:
    assert set(written) == set(try_families.families())
    for line in written.values():
        cells = line.removesuffix(" |").split(" | ")[2:]
        assert len(cells) == 3 and all(cell.startswith(("exact", "refused")) for cell in cells)
        assert cells[0] != "refused", "the first refusal has a reason"


def test_a_family_that_hangs_or_dies_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_families, "SECONDS", 3)
    monkeypatch.setattr(try_families, "_child", failing_child.fail)
    rows = try_families.try_all(["llama", "hangs", "opt", "dies", "bert"])
    assert [row["family"] for row in rows] == ["llama", "hangs", "opt", "dies", "bert"]
    said = [row["verdicts"][0][1] for row in rows]
    assert "more than" in said[1] and "process ended" in said[3] and not (said[0] or said[2] or said[4])
