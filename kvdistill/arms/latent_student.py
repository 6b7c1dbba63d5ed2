"""The student that thinks in latents: `LatentStudent`, the second implementation of the `Student` protocol.

What it does beside the protocol is `think`: a batch of questions in, the loss's two ingredients out. It holds the model
of `models/latent.py`; its written reasoning is that model's backbone run as any causal student.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from kvdistill.arms.questions import Questions
from kvdistill.arms.student import CausalStudent, StudentOutput, load_saved, refuse_other_student
from kvdistill.core.errors import ModelError
from kvdistill.core.files import replacing_folder
from kvdistill.core.kv import KV, RopeFrame
from kvdistill.core.recipe import LatentRecipe, LoraRecipe
from kvdistill.models import find_rotary, merge_lora, rotate_keys, unrotate_keys
from kvdistill.models.generate import Answer, Rows, generate_greedy
from kvdistill.models.latent import LatentConfig, LatentForCausalLM, Thoughts, with_slots

P = ParamSpec("P")

AutoConfig.register(LatentConfig.model_type, LatentConfig, exist_ok=True)
AutoModelForCausalLM.register(LatentConfig, LatentForCausalLM, exist_ok=True)


class Thinking(NamedTuple):
    """logits_NV: of the answers' tokens, row by row, and labels_N these tokens; row_N: whose they are.

    kv: of the M latent slots in the layers asked for, keys as asked, with graph. seen: by layer the keys and values
    that the answer reads, of prompt and slots, as attention takes them: the answer and `kv` depend on these tensors.
    """

    logits_NV: Tensor
    labels_N: Tensor
    row_N: Tensor
    kv: KV
    seen: tuple[list[Tensor], list[Tensor]]


def nothing_recomputed(think: Callable[P, Thinking]) -> Callable[P, Thinking]:
    """Without gradient checkpointing: layers that run again in the backward pass leave no cache to think with."""

    @functools.wraps(think)
    def thinking(*args: P.args, **options: P.kwargs) -> Thinking:
        student: Any = args[0]
        recomputes: list[Any] = [one for one in student.modules() if getattr(one, "gradient_checkpointing", False)]
        for one in recomputes:
            one.gradient_checkpointing = False
        try:
            return think(*args, **options)
        finally:
            for one in recomputes:
                one.gradient_checkpointing = True

    return thinking


class LatentStudent(nn.Module):
    """A causal model that thinks in latents, plain or with LoRA adapters on its backbone, as a student."""

    def __init__(self, thinker: LatentForCausalLM, writer: CausalStudent) -> None:
        """writer: the student that the thinker's backbone is. See `around` and `of`."""
        super().__init__()
        self.thinker = thinker
        self._writer = (writer,)  # a tuple: its weights are the thinker's, and stand in one place
        self.shape = writer.shape

    @classmethod
    def around(
        cls,
        model: nn.Module,
        recipe: LatentRecipe,
        *,
        lora: LoraRecipe | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> LatentStudent:
        """seed: of what is new (special rows, the map between slots) and of adapters."""
        writer = CausalStudent(model, lora=lora, seed=seed, gradient_checkpointing=gradient_checkpointing)
        size = recipe.projection_size
        return cls(LatentForCausalLM.around(writer.model, recipe.tokens, recipe.passes, size, seed=seed), writer)

    @classmethod
    def of(cls, thinker: LatentForCausalLM) -> LatentStudent:
        """A loaded model."""
        return cls(thinker, CausalStudent(thinker.backbone))

    @property
    def writer(self) -> CausalStudent:
        """The same backbone as a student that writes its reasoning."""
        return self._writer[0]

    @property
    def model(self) -> LatentForCausalLM:
        """What answers: thinks, then writes the answer."""
        return self.thinker

    def forward(self, input_ids_BT: Tensor, mask_BT: Tensor, **asked: Any) -> StudentOutput:
        """As `Student.__call__`: of texts as they are written, without latents."""
        return self.writer(input_ids_BT, mask_BT, **asked)

    @nothing_recomputed
    def think(self, questions: Questions, layers: Sequence[int] = (), keys: RopeFrame = "unrotated") -> Thinking:
        """Think about each question, then read its answer. layers: whose keys and values at the slots; empty: all."""
        thoughts = self.thinker.think(questions.prompt_ids_BP, questions.prompt_mask_BP)
        kv, cached = self._slots(thoughts, layers), cast(Any, thoughts.cache.layers)
        seen = [cached[n].keys for n in kv.layers], [cached[n].values for n in kv.layers]
        answer_BA, is_answer_BA = questions.answer_ids_BA, questions.answer_mask_BA.bool()
        hidden = self.thinker.answer_hidden(thoughts, answer_BA[:, :-1], questions.answer_mask_BA[:, :-1])
        logits_NV = self.thinker.get_output_embeddings()(hidden[is_answer_BA])
        row_N = is_answer_BA.nonzero()[:, 0]
        return Thinking(
            logits_NV,
            answer_BA[is_answer_BA],
            row_N,
            kv if keys == "rotated" else unrotate_keys(kv, self.thinker.backbone),
            seen,
        )

    def _slots(self, thoughts: Thoughts, layers: Sequence[int] = ()) -> KV:
        """Keys and values of the latent slots as attention takes them. layers: whose; empty: all."""
        M, cached = self.thinker.config.num_latents, cast(Any, thoughts.cache.layers)
        chosen = layers or range(len(cached))
        return KV(
            keys=tuple(cached[n].keys[:, :, -M:] for n in chosen),  # views: the answer makes new tensors
            values=tuple(cached[n].values[:, :, -M:] for n in chosen),
            mask_BT=thoughts.mask_BX[:, -M:].bool(),
            positions_BT=(thoughts.mask_BX.cumsum(1) - 1)[:, -M:],
            rope="none" if find_rotary(self.thinker.backbone) is None else "rotated",
            layers=tuple(chosen),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[float], None] | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Answer]:
        """As `Student.generate`: the answer behind the latents. Its forward passes are those of thinking, too.

        change: what becomes of the keys (unrotated, so that those of questions of unlike lengths can be mixed) and of
        the values [B, heads, M, D] at each layer's slots before the answer reads them; rows are the prompts by length.
        """

        def changed(thoughts: Thoughts) -> Thoughts:
            assert change is not None
            kv = unrotate_keys(self._slots(thoughts), self.thinker.backbone)
            kv = replace(kv, keys=tuple(map(change, kv.keys)), values=tuple(map(change, kv.values)))
            kv = rotate_keys(kv, self.thinker.backbone)
            return with_slots(thoughts, list(zip(kv.keys, kv.values, strict=True)))

        return generate_greedy(
            self.thinker,
            prompts,
            tokenizer,
            max_new_tokens=max_new_tokens,
            rows=Rows(batch_size),
            progress=progress,
            options={} if change is None else {"change": changed},
        )

    @torch.no_grad()
    def read_out(self, prompt: Sequence[int], passes: Sequence[int], most: int) -> list[list[list[tuple[int, float]]]]:
        """By pass (0: before the first) and slot the tokens that the LM head finds nearest to the slot's last hidden
        state, the likeliest first, with their probabilities; `most` of them."""
        was_training = self.training
        self.eval()
        ids_BP = torch.tensor([list(prompt)], device=self.thinker.special.device)
        found = []
        for number in passes:
            hidden_BMH = self.thinker.think(ids_BP, torch.ones_like(ids_BP), num_passes=number).hidden_BMH
            shares_MV = self.thinker.get_output_embeddings()(hidden_BMH)[0].float().softmax(-1)
            top = shares_MV.topk(min(most, shares_MV.shape[1]))
            found.append(
                [[*zip(*pair, strict=True)] for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
            )
        self.train(was_training)
        return found

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Sequence[int]],
        counted: Sequence[Sequence[int]],
        *,
        pad_id: int,
        batch_size: int,
        num_parts: int = 1,
    ) -> list[list[float]]:
        """As `Student.score`, with latents in the place of reasoning: part 1 is read behind them, right after what
        comes before the first counted token; other parts as they are written."""
        written = self.writer.score(rows, counted, pad_id=pad_id, batch_size=batch_size, num_parts=num_parts)
        was_training = self.training
        self.eval()
        device = self.thinker.special.device
        for batch in Rows(batch_size).batches([n for n, parts in enumerate(counted) if 1 in parts]):
            prompts = [rows[n][: next(place for place, part in enumerate(counted[n]) if part)] for n in batch]
            answers = [[i for i, part in zip(rows[n], counted[n], strict=True) if part == 1] for n in batch]
            thinking = self.think(Questions.of_ids(prompts, answers, pad_id).to(device), [0])
            nll_N = nn.functional.cross_entropy(thinking.logits_NV.float(), thinking.labels_N, reduction="none")
            sums_B = nll_N.new_zeros(len(batch)).index_add_(0, thinking.row_N, nll_N)
            for n, value in zip(batch, (sums_B / torch.bincount(thinking.row_N)).tolist(), strict=True):
                written[n][0] = value
        self.train(was_training)
        return written

    def save(self, folder: Path, tokenizer: Any) -> None:
        """A folder that plain transformers loads with the one file of code that lies in it (`latent.py`). Raises as
        `CausalStudent.save` does."""
        before = self._some_logits(self.thinker)
        self._refuse_changed_logits(folder)
        config = self.thinker.config
        backbone = merge_lora(self.thinker.backbone)
        merged = LatentForCausalLM(config, backbone) if backbone is not self.thinker.backbone else self.thinker
        if merged is not self.thinker:
            merged.special, merged.projection = self.thinker.special, self.thinker.projection
        ids = {role: getattr(tokenizer, role) for role in ("pad_token_id", "eos_token_id", "bos_token_id")}
        for role, number in ids.items():
            setattr(backbone.config, role, number)
            setattr(config, role, number)
        config.backbone = backbone.config.to_dict()
        config.auto_map = {"AutoConfig": "latent.LatentConfig", "AutoModelForCausalLM": "latent.LatentForCausalLM"}
        merged.generation_config = GenerationConfig(do_sample=False, **ids)
        with replacing_folder(folder) as part:
            merged.save_pretrained(part)
            tokenizer.save_pretrained(part)
            shutil.copyfile(inspect.getfile(LatentForCausalLM), part / "latent.py")
            saved, _ = load_saved(part, merged.dtype)
            refuse_other_student(before, self._some_logits(saved), merged.dtype, folder)

    @torch.no_grad()
    def _refuse_changed_logits(self, folder: Path) -> None:
        """ModelError for a backbone that changes its logits behind the head (a soft cap, a scale): answers behind
        latents are read from the head itself."""
        ids = torch.arange(8, device=self.thinker.special.device)[None] % self.shape.vocab_size
        was_training = self.training
        self.eval()
        own = self.thinker(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        hidden = self.thinker.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        heads = self.thinker.get_output_embeddings()(hidden)
        self.train(was_training)
        if not torch.allclose(own.float(), heads.float(), rtol=1e-2, atol=1e-2 * float(own.float().abs().max())):
            raise ModelError(
                f"{type(self.thinker.backbone).__name__} changes its logits behind the head (a soft cap or a scale), "
                "which thinking in latents does not know",
                place=str(folder),
                fix="use another student, or reasoning: written",
            )

    @torch.no_grad()
    def _some_logits(self, thinker: LatentForCausalLM) -> Tensor:
        """Next-token logits behind the latents of texts of no meaning, and of the written texts, on the CPU."""
        ids = torch.arange(32, device=thinker.special.device).view(4, 8) * 7919 % self.shape.vocab_size
        was_training, ones = thinker.training, torch.ones_like(ids)
        thinker.eval()
        hidden = thinker.answer_hidden(thinker.think(ids, ones), ids[:, :3], ones[:, :3])
        found = [thinker.get_output_embeddings()(hidden), thinker(input_ids=ids, attention_mask=ones).logits]
        thinker.train(was_training)
        return torch.cat([logits.float().cpu().flatten() for logits in found])

    def flops(self, num_tokens: int, sum_squared_lengths: int) -> tuple[int, int]:
        """As `Student.flops`: of written texts."""
        return self.writer.flops(num_tokens, sum_squared_lengths)


def thinking_cost(writer: CausalStudent, recipe: LatentRecipe, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Floating-point operations, forward and backward, of `LatentStudent.think` over questions of so many (prompt,
    answer) tokens; a multiply-add as two. The head runs on answers alone, and nothing is recomputed."""
    M, T = recipe.tokens, recipe.passes
    tokens = squares = heads = 0
    for prompt, answer in sizes:
        places = prompt + 1 + M
        tokens += places + M * T + answer
        squares += places**2 + T * M * places + answer * (places + answer)
        heads += answer
    size = writer.shape.hidden_size
    projected = 2 * 2 * len(sizes) * M * T * size * (recipe.projection_size or size)
    forward, backward = writer.flops(tokens, squares, num_head_tokens=heads, recomputes=False)
    return forward + projected, backward + 2 * projected


def student_of(model: Any) -> CausalStudent | LatentStudent:
    """The student that a loaded model is."""
    return LatentStudent.of(model) if isinstance(model, LatentForCausalLM) else CausalStudent(model)
