"""Decoders, an encoder and an encoder-decoder meet in one space: tiny random models of each kind on the same tokens.

Keys and values come straight from the projection modules by forward hooks, so that nothing here leans on how
kvdistill captures them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, T5Config, T5Model

from kvdistill.align.shared import SharedSpace, SharedSpaceFit

VOCAB, SLOTS, Z = 37, 2, 8
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# per model: its projections by layer, and the layers (of 3, 4, 2, 5, 5) that fill the two slots
PLACES = {
    "llama": ("layers.{}.self_attn.{}_proj", (0, 2), ("k", "v")),
    "qwen2": ("layers.{}.self_attn.{}_proj", (1, 3), ("k", "v")),
    "bert": ("encoder.layer.{}.attention.self.{}", (0, 1), ("key", "value")),
    "t5": ("encoder.block.{}.layer.0.SelfAttention.{}", (2, 4), ("k", "v")),
    "t5.cross": ("decoder.block.{}.layer.1.EncDecAttention.{}", (1, 3), ("k", "v")),
}
CHANNELS = {"llama": 20, "qwen2": 24, "bert": 48, "t5": 40, "t5.cross": 40}
KINDS = ("llama", "qwen2", "bert", "t5")
NUM_TEXTS, T = 10, 17


def make_models(seed: int = 0) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shared = {"vocab_size": VOCAB, "intermediate_size": 28}
        sizes = {"hidden_size": 48, "num_attention_heads": 4}
        decoder = shared | NONE | {"head_dim": 10, "num_key_value_heads": 2}
        models = {
            "llama": LlamaModel(LlamaConfig(**decoder | sizes, num_hidden_layers=3)),
            "qwen2": Qwen2Model(
                Qwen2Config(
                    **shared | NONE, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=4
                )
            ),
            "bert": BertModel(BertConfig(**shared | sizes, num_hidden_layers=2)),
            "t5": T5Model(T5Config(vocab_size=VOCAB, d_model=44, d_kv=10, d_ff=28, num_layers=5, num_heads=4)),
        }
        for model in models.values():
            for parameter in model.parameters():  # large enough that context, not the token alone, shows in the keys
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return {name: model.eval() for name, model in (models | {"t5.cross": models["t5"]}).items()}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return make_models()


def texts(num: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(num):
        ids = torch.randint(1, VOCAB, (NUM_TEXTS, T), generator=random)
        length = torch.randint(6, T + 1, (NUM_TEXTS, 1), generator=random)
        mask = torch.arange(T) < length
        yield torch.where(mask, ids, 0), mask


def channels_of(name: str, model: nn.Module, ids: Tensor, mask: Tensor, which: int) -> Tensor:
    """Keys (which 0) or values (1) of the model's two layers at every token: [slots, B, T, C]."""
    pattern, layers, words = PLACES[name]
    modules = dict(model.named_modules())
    found: list[Tensor] = []
    hooks = [
        modules[pattern.format(layer, words[which])].register_forward_hook(lambda _, __, out: found.append(out))
        for layer in layers
    ]
    try:
        more = {"decoder_input_ids": ids[:, :3]} if name.startswith("t5") else {}
        model(input_ids=ids, attention_mask=mask.long(), **more)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


@torch.no_grad()
def paired(models, names, num: int, seed: int, which: int, mismatched: bool = False):
    for (ids, mask), (other, _) in zip(texts(num, seed), texts(num, seed + 500), strict=True):
        made = {}
        for n, name in enumerate(names):
            read = torch.where(mask, other.roll(n, 0), 0) if mismatched and n else ids
            read = torch.where(mask & (read == 0), 1, read)
            made[name] = channels_of(name, models[name], read, mask, which)
        yield made, mask


def fit(models, names, method: str, which: int, mismatched: bool = False) -> SharedSpace:
    space = SharedSpaceFit({name: CHANNELS[name] for name in names}, SLOTS, Z, method, steps=100)
    for made, mask in paired(models, names, 20, 0, which, mismatched):
        space.update(made, mask)
    return space.solve(1e-3)


@pytest.mark.parametrize("method", ["gcca", "procrustes", "trained"])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
def test_decoders_encoder_and_encoder_decoder_meet(models, method, which):
    space = fit(models, KINDS, method, which)
    assert space.num_parameters == sum(SLOTS * Z * (CHANNELS[name] + 1) for name in KINDS)
    together = [space.agreement(*batch) for batch in paired(models, KINDS, 3, 90, which)]
    apart = [space.agreement(*batch) for batch in paired(models, KINDS, 3, 90, which, mismatched=True)]
    here, there = (sum(a.mean_correlation for a in found) / 3 for found in (together, apart))
    # 8 principal axes of each of four random embeddings have little in common to be turned onto
    assert here > (0.12 if method == "procrustes" else 0.6) and abs(there) < 0.05, (here, there)
    for name in KINDS:
        known, unknown = (torch.stack([a.r2[name] for a in found]).mean() for found in (together, apart))
        assert known > unknown + 0.05, (name, known, unknown)


@pytest.mark.parametrize("method", ["gcca", "procrustes", "trained"])
def test_models_that_read_other_texts_do_not_meet(models, method):
    """The placebo: calibrated on mismatched texts too, so that whatever it found was chance."""
    space = fit(models, KINDS, method, 0, mismatched=True)
    found = [space.agreement(*batch) for batch in paired(models, KINDS, 4, 90, 0, mismatched=True)]
    assert abs(sum(a.mean_correlation for a in found) / 4) < 0.08
    assert abs(sum(a.mean_r2 for a in found) / 4) < 0.08


def test_cross_attention_keys_join_later_and_change_nothing(models):
    space = fit(models, KINDS, "gcca", 0)
    before = {name: x.clone() for name, x in space.state_dict().items()}
    space.add_model("t5.cross", paired(models, ("t5.cross", "llama"), 20, 0, 0), l2=1e-3)
    assert all(torch.equal(space.state_dict()[name], x) for name, x in before.items())
    made, mask = next(paired(models, ("t5.cross", "qwen2", "bert"), 1, 90, 0))  # it was never shown beside these
    assert space.agreement(made, mask).mean_correlation > 0.6


def test_a_decoder_learns_from_an_encoder_through_frozen_adapters():
    models = make_models(seed=3)
    names = ("llama", "bert")
    space = fit(models, names, "gcca", 0)
    student = models["llama"].train()
    optimiser = torch.optim.Adam(student.parameters(), lr=2e-3)
    frozen = [p.clone() for p in space.parameters()]

    def loss_on(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = space.project("bert", channels_of("bert", models["bert"], ids, mask, 0))
        source = space.project("llama", channels_of("llama", student, ids, mask, 0))
        return (source - target)[:, mask].square().mean(), source[:, mask].std(1)

    held_out = next(texts(1, 800))
    before = loss_on(*held_out)[0].item()
    for ids, mask in texts(60, 300):
        optimiser.zero_grad()
        loss_on(ids, mask)[0].backward()
        optimiser.step()
    after, std = loss_on(*held_out)
    assert after.item() < 0.8 * before
    assert std.min() > 0.4  # a fixed target cannot be met by collapsing
    assert all(torch.equal(a, b) for a, b in zip(frozen, space.parameters(), strict=True))
