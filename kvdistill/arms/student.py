"""The student: the one way in which training, fitting, matching, answering, evaluating and saving run it.

`Student` is the protocol, `CausalStudent` the student that writes its reasoning: a causal model of transformers.
Another kind (one that thinks in latents) is another class with the same methods; no caller changes. Knows no arm and
no file layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from kvdistill.core.errors import ModelError, RunFolderError
from kvdistill.core.files import replacing_folder
from kvdistill.core.kv import KV, RopeFrame
from kvdistill.core.recipe import LoraRecipe, StudentRecipe
from kvdistill.models import (
    KVCapture,
    add_lora,
    auto_class,
    capture_kv,
    describe_model,
    forward_flops,
    head_at,
    merge_lora,
    positions_from_mask,
    unrotate_keys,
)
from kvdistill.models.generate import Answer, Rows, generate_greedy, segment_nll

# Logits of one micro-batch up to which the head runs on all positions where a graph is kept: that costs little, and the
# gradient of its weights, a sum over fewer rows, would be rounded otherwise in its last bits.
WHOLE_HEAD_LOGITS = 1 << 25

# how far logits may be off after saving, relative: merging adapters rounds once more
_SAVED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


class StudentOutput(NamedTuple):
    """logits: of the next token, with graph: [B, T, V], or [1, N, V] of the positions asked for; None where none was.
    kv: of the layers asked for, with graph; None where none was. seen: the same as the student's own attention takes
    them, so that logits depend on these very tensors; None where a student does not say."""

    logits: Tensor | None
    kv: KV | None
    seen: KV | None = None


@runtime_checkable
class Student(Protocol):
    """What every kind of student can do. It is a module as well: its parameters are what learns."""

    def __call__(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        layers: Sequence[int] | None = None,
        queries: bool = False,
        keys: RopeFrame = "unrotated",
        head: Tensor | bool = True,
    ) -> StudentOutput:
        """One forward pass over right-padded texts, with graph.

        layers: whose keys and values (and queries) to capture; None: none, and no `kv`. keys: frame of the keys.
        head: where next-token logits are wanted: everywhere, nowhere (then `layers`), or at the True of [B, T]; there
        they are [1, N, V], row by row, or [B, T, V] where that is as cheap.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[float], None] | None = None,
    ) -> list[Answer]:
        """The greedy answer to each prompt (token ids), up to the tokenizer's end-of-text, in the order given.

        progress: called with the number of answers so far; one that is being written counts by its length.
        """

    def score(
        self,
        rows: Sequence[Sequence[int]],
        counted: Sequence[Sequence[int]],
        *,
        pad_id: int,
        batch_size: int,
        num_parts: int = 1,
    ) -> list[list[float]]:
        """Mean NLL (nats per token) of each part of each row, teacher-forced; NaN for a part without tokens.

        counted: for every token the number of the part it belongs to, from 1; 0: to none.
        """

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write what `load_saved` reads, and what anybody can load without kvdistill; whole or not at all."""

    def flops(self, num_tokens: int, sum_squared_lengths: int) -> tuple[int, int]:
        """Floating-point operations of forward and of backward over so many tokens, a multiply-add as two."""


class CausalStudent(nn.Module):
    """A causal model of transformers, plain or with LoRA adapters, as a student."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lora: LoraRecipe | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        """lora: adapters to train in place of the weights, drawn from `seed`."""
        super().__init__()
        self.shape = describe_model(model)  # of the plain model: adapters do not count
        self._recomputes, self._num_adapted = gradient_checkpointing, 0
        if lora is not None:
            model = add_lora(model, lora, seed=seed)  # type: ignore[arg-type]
            self._num_adapted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if gradient_checkpointing:  # the non-reentrant way: the other one cuts captured gradients
            inner: Any = model
            if hasattr(inner, "activation_checkpointing_enable"):  # transformers 5.2x renamed it
                inner.activation_checkpointing_enable({"use_reentrant": False})
            else:
                inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if lora is not None:
                inner.enable_input_require_grads()
        self.model = model

    @classmethod
    def outline(cls, recipe: StudentRecipe, config: PreTrainedConfig) -> CausalStudent:
        """A student without memory for weights: what it would cost."""
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
            return cls(model, lora=recipe.lora, gradient_checkpointing=recipe.gradient_checkpointing)

    def forward(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        layers: Sequence[int] | None = None,
        queries: bool = False,
        keys: RopeFrame = "unrotated",
        head: Tensor | bool = True,
    ) -> StudentOutput:
        """As `Student.__call__`."""
        positions_BT = positions_from_mask(mask_BT)
        inputs = {
            "input_ids": input_ids_BT,
            "attention_mask": mask_BT.long(),
            "position_ids": positions_BT,
            "use_cache": False,
        }
        if isinstance(head, Tensor) and torch.is_grad_enabled():
            head = True if mask_BT.numel() * self.shape.vocab_size <= WHOLE_HEAD_LOGITS else head
        logits: Tensor | None = None
        captured: KVCapture | None = None
        # leaving a pass in its middle would leave its graph there too
        stop_early = head is False and not torch.is_grad_enabled()
        with ExitStack() as stack:
            if head is not True:
                at_BT = torch.zeros_like(mask_BT, dtype=torch.bool) if isinstance(head, bool) else head
                stack.enter_context(head_at(self.model, at_BT))
            if layers is not None:
                captured = stack.enter_context(
                    capture_kv(self.model, layers=layers, queries=queries, stop_early=stop_early)
                )
            logits = self.model(**inputs).logits
        logits = None if head is False else logits
        if captured is None:
            return StudentOutput(logits, None)
        kv = captured.kv(mask_BT, positions_BT)
        return StudentOutput(logits, kv if keys == "rotated" else unrotate_keys(kv, self.model), kv)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[float], None] | None = None,
    ) -> list[Answer]:
        """As `Student.generate`."""
        rows = Rows(batch_size)
        return generate_greedy(
            self.model, prompts, tokenizer, max_new_tokens=max_new_tokens, rows=rows, progress=progress
        )

    def score(
        self,
        rows: Sequence[Sequence[int]],
        counted: Sequence[Sequence[int]],
        *,
        pad_id: int,
        batch_size: int,
        num_parts: int = 1,
    ) -> list[list[float]]:
        """As `Student.score`."""
        return segment_nll(self.model, rows, counted, pad_id=pad_id, batch_size=batch_size, num_parts=num_parts)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """A folder that plain transformers loads: merged weights (safetensors), config, generation ids, tokenizer.

        Generation is greedy, as the student is evaluated, whatever the publisher of its weights preferred. What was
        written is loaded again and must give the logits that the student gave before its adapters were merged; else
        ModelError, and nothing is left behind.
        """
        before = self._some_logits(self.model)
        model = merge_lora(self.model)
        ids = {role: getattr(tokenizer, role) for role in ("pad_token_id", "eos_token_id", "bos_token_id")}
        for role, number in ids.items():
            setattr(model.config, role, number)
        model.generation_config = GenerationConfig(do_sample=False, **ids)
        with replacing_folder(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            saved, _ = load_saved(part, model.dtype)
            refuse_other_student(before, self._some_logits(saved), model.dtype, folder)

    @torch.no_grad()
    def _some_logits(self, model: Any) -> Tensor:
        """Next-token logits [4, 8, V] of texts of no meaning, in float32 on the CPU."""
        ids = torch.arange(32, device=model.device).view(4, 8) * 7919 % self.shape.vocab_size
        training = model.training
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        model.train(training)
        return logits.float().cpu()

    def flops(
        self,
        num_tokens: int,
        sum_squared_lengths: int,
        *,
        num_head_tokens: int | None = None,
        recomputes: bool | None = None,
    ) -> tuple[int, int]:
        """As `Student.flops`. A backward pass is two forwards, and one more where activations are recomputed. With LoRA
        the frozen weights take one forward's worth, and the adapters are counted beside them.

        num_head_tokens: that the head is run on; unset: all. recomputes: unset: as it was made."""
        frozen = forward_flops(self.shape, num_tokens, 0, num_head_tokens=num_head_tokens) if self._num_adapted else 0
        forward = forward_flops(self.shape, num_tokens, sum_squared_lengths, num_head_tokens=num_head_tokens)
        forward += 2 * num_tokens * self._num_adapted
        again = self._recomputes if recomputes is None else recomputes
        return forward, 2 * forward - frozen + (forward if again else 0)


def load_saved(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A saved student's model and its tokenizer, as plain transformers loads them. RunFolderError if it cannot."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True), tokenizer
    except (OSError, ValueError, SafetensorError) as error:
        raise RunFolderError(
            f"the trained student cannot be loaded ({str(error).strip().splitlines()[0]})",
            place=str(folder),
            fix=f"delete {folder.parent} and run `kvdistill train RECIPE` again",
        ) from None


def refuse_other_student(before: Tensor, after: Tensor, dtype: torch.dtype, folder: Path) -> None:
    """ModelError where the logits of a saved student are no numbers, or not those it gave before it was saved."""
    if not torch.isfinite(before).all():
        raise ModelError(
            "the student's logits are NaN or infinite", place=str(folder), fix="look at its weights and its dtype"
        )
    away = float((after - before).norm() / before.norm())
    if not away <= _SAVED_TOLERANCE[dtype]:
        raise ModelError(
            f"the saved student is another one: its logits are off by {away:.2g} of their size",
            place=str(folder),
            fix="train without adapters (student.lora), or on other modules (student.lora.target_modules)",
        )
