"""A causal model that thinks in latents before it answers (CODI, PCCoT, KaVa).

This file needs torch and transformers only. It is saved beside the weights of every such student, so that plain
transformers loads and runs it there:

    from latent import LatentForCausalLM
    model = LatentForCausalLM.from_pretrained(folder)
    model.generate(**tokenizer(question, return_tensors="pt"))    # the answer alone: what it thought has no words

A prompt is followed by `<bot>`, M latent slots, `<eot>` and the answer. `<bot>`, `<latent>` and `<eot>` are three rows
of `special` and no words of the vocabulary, so any tokenizer will do. With h the backbone's last hidden states (after
its final norm) and P the number of columns up to and with `<bot>`, thinking is T Jacobi passes:

    pass 0         the prompt, <bot>, and <latent> in every slot                  one forward over P + M columns
    pass 1 … T     slot 1 is fed PRJ(h at <bot>), slot i PRJ(h at slot i-1 of the pass before)    M columns each

Each pass reads the keys and values of the prompt as pass 0 left them, and the answer reads those of the last pass. What
T passes leave in the first min(T, M) slots is what feeding one slot after the other would (T >= M: in all of them).
T = 0 is M pause tokens. PRJ is Linear, GELU, Linear, LayerNorm.

Prompts are padded on the left; padding is masked, and positions count real tokens only, in every pass.

Shapes: B rows, P prompt columns with <bot>, M slots, A answer tokens, H hidden channels, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

BOT, LATENT, EOT = range(3)  # rows of `special`


class LatentConfig(PreTrainedConfig):
    """backbone: the config of the causal model that thinks, as a dict. num_latents: M. num_passes: T.

    projection_size: channels between the two linear maps of PRJ; unset: the backbone's hidden size.
    """

    model_type = "kvdistill_latent"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        num_latents: int = 1,
        num_passes: int = 1,
        projection_size: int | None = None,
        **others: Any,
    ) -> None:
        self.backbone = dict(backbone or {})
        self.num_latents, self.num_passes, self.projection_size = num_latents, num_passes, projection_size
        super().__init__(**others)

    @property
    def max_position_embeddings(self) -> int:
        """Tokens that prompt and answer may have together, where the backbone is limited (else AttributeError)."""
        limits = [self.backbone.get(name) for name in ("max_position_embeddings", "n_positions")]
        if not (known := [limit for limit in limits if limit is not None]):
            raise AttributeError("the backbone reads texts of any length")
        return known[0] - self.num_latents - 2

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's config as transformers knows it."""
        return AutoConfig.for_model(**self.backbone)

    @property
    def vocab_size(self) -> int:
        """Words of the backbone."""
        return int(self.backbone["vocab_size"])


class Thoughts(NamedTuple):
    """What thinking left for the answer.

    cache: keys and values of the prompt, `<bot>` and the slots of the last pass, at P + M places. mask_BX: of these
    places. fed_BMH: what the slots of the last pass were fed. hidden_BMH: the last hidden states at the slots.
    """

    cache: DynamicCache
    mask_BX: Tensor
    fed_BMH: Tensor
    hidden_BMH: Tensor
    hidden_bot_B1H: Tensor


class LatentProjection(nn.Sequential):
    """PRJ: from a hidden state to what the next slot is fed, [..., H] to [..., H]."""

    def __init__(self, hidden_size: int, inner_size: int | None = None) -> None:
        inner = inner_size or hidden_size
        super().__init__(
            nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size), nn.LayerNorm(hidden_size)
        )


class LatentForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal model (`backbone`), the three rows `special` [3, H] and `projection` (PRJ)."""

    config_class = LatentConfig
    config: LatentConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LatentConfig, backbone: nn.Module | None = None) -> None:
        """backbone: a model to think with, as it is; unset: one with random weights."""
        super().__init__(config)
        self._is_given = backbone is not None
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(config.backbone_config(), dtype=config.dtype)
        self.backbone: Any = backbone
        embeddings = self.get_input_embeddings().weight
        size, dtype = embeddings.shape[1], embeddings.dtype
        self.special = nn.Parameter(torch.empty(3, size, dtype=dtype, device=embeddings.device))
        self.projection = LatentProjection(size, config.projection_size).to(embeddings.device, dtype)
        self.post_init()

    @classmethod
    def around(
        cls, backbone: Any, num_latents: int, num_passes: int, projection_size: int | None = None, *, seed: int = 0
    ) -> LatentForCausalLM:
        """A model that thinks with `backbone`, which stays the very same module. seed: of what is new: the special rows
        are drawn as far from zero as the words' are, PRJ as torch does."""
        config = LatentConfig(backbone.config.to_dict(), num_latents, num_passes, projection_size)
        config.dtype = backbone.dtype
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            model = cls(config, backbone)
            words = backbone.get_input_embeddings().weight.detach()
            if not model.special.is_meta:
                with torch.no_grad():
                    drawn = torch.randn(model.special.shape) * words.float().std().cpu()
                    model.special.copy_(drawn)
        finally:
            torch.random.set_rng_state(generator_state)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers does; but a folder that lacks any tensor, or has others, is refused (OSError)."""
        wants_info = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if wrong := sorted(map(str, info.get(what) or ())):
                words = {"missing_keys": "lacks", "unexpected_keys": "has besides", "mismatched_keys": "misshapes"}
                raise OSError(f"this is no whole latent model: it {words[what]} {', '.join(wrong[:3])}")
        return (model, info) if wants_info else model

    def init_weights(self) -> None:
        """A given backbone is ready: its weights are tied, under names that are other ones inside adapters (peft)."""
        if not self._is_given:
            super().init_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """What is new is drawn by `around`; the rest is the backbone's own or loaded."""

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.backbone.get_output_embeddings()

    def get_decoder(self, *_: Any, **__: Any) -> Any:
        return self.backbone.get_decoder()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Thinking makes its own cache."""
        return False

    @property
    def num_passes_before_answer(self) -> int:
        """Forward passes before the one that reads `<eot>` and gives the answer's first token."""
        return self.config.num_passes + 1

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The backbone as it is: words after words, without latents."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)

    # -- thinking -----------------------------------------------------------------------------------------

    def think(
        self,
        input_ids_BP: Tensor,
        mask_BP: Tensor,
        *,
        num_passes: int | None = None,
        num_latents: int | None = None,
    ) -> Thoughts:
        """T passes after left-padded prompts, whose last column is real in every row. With graph where that is on."""
        T = self.config.num_passes if num_passes is None else num_passes
        M = self.config.num_latents if num_latents is None else num_latents
        B, P = input_ids_BP.shape[0], input_ids_BP.shape[1] + 1
        decoder = self.get_decoder()
        words = self.get_input_embeddings()(input_ids_BP)
        bot, slots = (self.special[row].to(words.dtype).expand(B, count, -1) for row, count in ((BOT, 1), (LATENT, M)))
        mask_BX = torch.cat([mask_BP.long(), mask_BP.new_ones(B, 1 + M, dtype=torch.long)], dim=1)
        position_BX = (mask_BX.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache()
        hidden = decoder(
            inputs_embeds=torch.cat([words, bot, slots], dim=1),
            attention_mask=mask_BX,
            position_ids=position_BX,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        bot_B1H, hidden_BMH = hidden[:, P - 1 : P], hidden[:, P:]
        fed = slots
        layers: Any = cache.layers if T else ()
        prefix = [(layer.keys[:, :, :P], layer.values[:, :, :P]) for layer in layers]
        for _ in range(T):
            fed = self.projection(torch.cat([bot_B1H, hidden_BMH[:, :-1]], dim=1))
            cache = cache_of(prefix)
            hidden_BMH = decoder(
                inputs_embeds=fed,
                attention_mask=mask_BX,
                position_ids=position_BX[:, P:],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return Thoughts(cache, mask_BX, fed, hidden_BMH, bot_B1H)

    def answer_hidden(self, thoughts: Thoughts, answer_ids_BA: Tensor, answer_mask_BA: Tensor) -> Tensor:
        """Last hidden states [B, A + 1, H] at `<eot>` and the answer's tokens (right-padded): that at place a is of
        what comes after a answer tokens. Leaves the cache longer."""
        words = self.get_input_embeddings()(answer_ids_BA)
        eot_B1H = self.special[EOT].to(words.dtype).expand(len(words), 1, -1)
        mask_BY = torch.cat(
            [thoughts.mask_BX, thoughts.mask_BX.new_ones(len(words), 1), answer_mask_BA.to(thoughts.mask_BX)], dim=1
        )
        position_BY = (mask_BY.cumsum(1) - 1).clamp_min(0)
        return self.get_decoder()(
            inputs_embeds=torch.cat([eot_B1H, words], dim=1),
            attention_mask=mask_BY,
            position_ids=position_BY[:, -(words.shape[1] + 1) :],
            past_key_values=thoughts.cache,
            use_cache=True,
        ).last_hidden_state

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        max_new_tokens: int | None = None,
        past_key_values: Any = None,
        change: Callable[[Thoughts], Thoughts] | None = None,
        **others: Any,
    ) -> Tensor:
        """Prompts and their greedy answers [B, P + A], padded on the right behind an end token.

        input_ids: left-padded prompts. past_key_values: not read, since thinking makes its own. change: what becomes of
        the thoughts before the answer reads them (`with_slots`). Of `generation_config` (else the model's own) the
        number of new tokens, the end tokens and the padding are read.
        """
        config = generation_config or self.generation_config or GenerationConfig()
        in_all = max(0, (others.get("max_length") or 0) - input_ids.shape[1])
        ends, most = config.eos_token_id, max_new_tokens or in_all or config.max_new_tokens or 64
        ends_E = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else list(ends)).to(input_ids)
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        thoughts = self.think(input_ids, mask)
        thoughts = thoughts if change is None else change(thoughts)
        none_B0 = input_ids[:, :0]
        hidden = self.answer_hidden(thoughts, none_B0, none_B0)
        mask_BY = torch.cat([thoughts.mask_BX, thoughts.mask_BX.new_ones(len(mask), 1)], dim=1)
        open_B, ids = torch.ones(len(mask), dtype=torch.bool, device=mask.device), input_ids
        for place in range(most):
            scores_BV = self.get_output_embeddings()(hidden[:, -1])
            for process in logits_processor or ():
                scores_BV = process(ids, scores_BV)
            next_B = scores_BV.argmax(-1).masked_fill(~open_B, pad)
            ids = torch.cat([ids, next_B[:, None]], dim=1)
            open_B = open_B & ~torch.isin(next_B, ends_E)
            for stop in stopping_criteria or ():
                open_B = open_B & ~stop(ids, None)
            if place + 1 == most or not bool(open_B.any()):
                break
            mask_BY = torch.cat([mask_BY, mask_BY.new_ones(len(mask), 1)], dim=1)
            hidden = self.get_decoder()(
                input_ids=next_B[:, None],
                attention_mask=mask_BY,
                position_ids=mask_BY.sum(1, keepdim=True) - 1,
                past_key_values=thoughts.cache,
                use_cache=True,
            ).last_hidden_state
        return ids


def with_slots(thoughts: Thoughts, slots: Sequence[tuple[Tensor, Tensor]]) -> Thoughts:
    """The same thoughts with other keys and values [B, heads, M, D] at each layer's slots, as attention takes them."""
    layers: Any = thoughts.cache.layers
    joined = [
        tuple(
            torch.cat([old[:, :, : -new.shape[2]], new], dim=2)
            for old, new in zip((layer.keys, layer.values), pair, strict=True)
        )
        for layer, pair in zip(layers, slots, strict=True)
    ]
    return thoughts._replace(cache=cache_of([(keys, values) for keys, values in joined]))


def cache_of(prefix: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that begins with these keys and values of each layer, themselves and no copies; they stay as they are."""
    cache = DynamicCache()
    for keys, values in prefix:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
