"""A Hugging Face causal model behind lm-eval's `LM` interface, greedy and metered.

`MeteredLM` answers what lm-eval's tasks ask (log-likelihoods of continuations, greedy text until a stop) and says
for each request what it took: tokens in and out, forward passes, whether the prompt was cut. Tokenization and chat
templates are lm-eval's own (its class for Hugging Face models is the parent); batching is not: logits are computed for
scored positions only, a row ends at its own stop, and choices that differ in their last token share a row.
Knows no task and no file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from kvdistill.core.errors import ModelError
from kvdistill.data.chat import TODAY
from kvdistill.models.generate import left_padded
from kvdistill.models.roomy import roomy_cache

DEFAULT_NEW_TOKENS = 256  # lm-eval's own default where a definition sets none
_MAX_LOGITS = 1 << 28  # entries of one block of scored logits: 1 GiB in float32


@dataclass(frozen=True)
class Usage:
    """What one request took. forward_passes: of this row alone, however many rows ran beside it in the batch.

    truncated: the prompt did not fit in the model's window and was cut from the left. unspelled: characters of the
    prompt (spaces not counted) that the tokenizer cannot write, of `characters`. scored: tokens of a continuation.
    """

    tokens_in: int
    tokens_out: int
    forward_passes: int
    truncated: bool
    unspelled: int
    characters: int
    scored: int = 0


class MeteredLM(HFLM):
    """lm-eval's LM over a loaded model. `usage` is that of the last call, one entry a request in their order.

    bos_in_front: put beginning-of-text before every prompt even where the tokenizer does not do it by itself (models
    trained by kvdistill have seen it there). chat: prompts come from the chat template, so its end of a turn ends an
    answer. on_answers: called with the number of requests answered so far in a call.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, bos_in_front: bool = False, chat: bool = False
    ) -> None:
        if tokenizer.pad_token_id is None:  # padding is known by its mask: any token of the vocabulary will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        self._end_ids = sorted({*_end_ids(model, tokenizer), *(_turn_ends(tokenizer) if chat else ())})
        # greedy means greedy: a repetition penalty or a sampler that the model's publisher suggests is not applied
        model.generation_config = GenerationConfig(
            eos_token_id=self._end_ids or None, pad_token_id=tokenizer.pad_token_id
        )
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._template = _without_clock(tokenizer.chat_template) if chat else None
        self._bos_id = tokenizer.bos_token_id if bos_in_front else None
        self._spelled: dict[str, bool] = {}
        self._takes = {*inspect.signature(model.forward).parameters}
        if "attention_mask" not in self._takes:  # padding could not be told from text
            self.batch_size_per_gpu: int = 1
        self._askers: list[Any] = []
        self.usage: list[Usage] = []
        self.on_answers: Callable[[float], None] = lambda done: None

    # -- tokens ---------------------------------------------------------------------------------------

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a prompt, as lm-eval takes them, with beginning-of-text in front where asked for."""
        known = self.prefix_token_id is not None  # lm-eval's own way needs a beginning- or end-of-text to look for
        ids = super().tok_encode(string, add_special_tokens) if known else self.tokenizer.encode(string)
        if self._bos_id is not None and add_special_tokens is None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt to go on from; those it was tokenized to before, where it brings them (`EncodedPrompt`)."""
        return list(getattr(prompt, "ids", ())) or self.tok_encode(prompt) or self._first_ids()

    def _first_ids(self) -> list[int]:
        """What an empty prompt is: a model cannot begin with nothing."""
        return [self.prefix_token_id if self.prefix_token_id is not None else 0]

    def _unspelled(self, text: str) -> tuple[int, int]:
        """Characters of `text` that do not survive encoding and decoding, and all of them; spaces not counted."""
        letters = [letter for letter in text if not letter.isspace()]
        for letter in {*letters} - self._spelled.keys():
            ids = self.tokenizer.encode(letter, add_special_tokens=False)
            back = self.tokenizer.decode(ids, skip_special_tokens=True)
            self._spelled[letter] = letter.casefold() in back.casefold()
        return sum(not self._spelled[letter] for letter in letters), len(letters)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages through the tokenizer's template. A system message that it does not take goes to the user's."""
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        options |= {"tokenize": False, "chat_template": self._template}
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.TemplateError:
            if chat_history[0]["role"] != "system" or len(chat_history) < 2:
                raise
            system, first, *rest = chat_history
            merged = {**first, "content": f"{system['content'].strip()}\n\n{first['content']}"}
            return self.tokenizer.apply_chat_template([merged, *rest], **options)

    # -- log-likelihoods ------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether greedy decoding would write it) of each request."""
        self._askers = [(request.task_name, request.doc_id) for request in requests]
        return super().loglikelihood(list(requests), disable_tqdm=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        usage: list[Usage] = []
        paid: set[Any] = set()
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # nothing to score: probability 1
        for i, ((context, _), context_ids, continuation) in enumerate(requests):
            scored = continuation[: self.max_length]
            whole = [*(context_ids or self._first_ids()), *scored]
            row = tuple(whole[-(self.max_length + 1) :][:-1]) if scored else ()
            cut = len(whole) > self.max_length + 1 or len(scored) < len(continuation)
            # the choices of a question that share a row pay for it once; other questions as if asked alone
            asker = self._askers[i] if i < len(self._askers) else i
            first = bool(scored) and (asker, row) not in paid
            paid.add((asker, row))
            lost, characters = self._unspelled(context)
            usage.append(Usage(len(row) if first else 0, 0, int(first), cut, lost, characters, len(scored)))
            if scored:
                rows.setdefault(row, []).append((i, scored))
        order = sorted(rows, key=lambda row: (-len(row), row))
        for batch in self._row_batches(order, {row: max(len(s) for _, s in rows[row]) for row in rows}):
            for row, logits_KV in zip(
                batch, self._in_memory(lambda part: self._last_logits(part, rows), batch), strict=True
            ):
                for i, scored in rows[row]:
                    results[i] = _score(logits_KV[-len(scored) :], scored)
        self.usage = usage
        self.on_answers(len(requests))
        return results

    def _in_memory(self, run: Callable[[Sequence[Any]], Sequence[Any]], batch: Sequence[Any]) -> list[Any]:
        """`run(batch)`, in halves where the device has no memory for the whole, and smaller batches from then on."""
        try:
            return list(run(batch))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise ModelError(
                    "the device has not enough memory for one question",
                    place="hardware.device",
                    fix="use another device, dtype=bfloat16, or fewer examples in the prompt (--num-fewshot)",
                ) from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(batch) // 2
        self.batch_size_per_gpu = min(self.batch_size, half)
        return [*self._in_memory(run, batch[:half]), *self._in_memory(run, batch[half:])]

    def _row_batches(
        self, order: Sequence[tuple[int, ...]], kept: dict[tuple[int, ...], int]
    ) -> Iterator[list[tuple[int, ...]]]:
        """Rows side by side: at most `batch_size`, and no more than their scored logits have room for."""
        batch: list[tuple[int, ...]] = []
        for row in order:
            widest = max(kept[other] for other in [*batch, row])
            if batch and (len(batch) == self.batch_size or (len(batch) + 1) * widest * self.vocab_size > _MAX_LOGITS):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _last_logits(self, batch: Sequence[tuple[int, ...]], rows: dict[tuple[int, ...], Any]) -> list[Tensor]:
        """Logits of the last positions of each row, as many as the longest continuation of the batch needs."""
        kept = max(len(scored) for row in batch for _, scored in rows[row])
        ids_BT, mask_BT = left_padded(batch, self.tokenizer.pad_token_id, self.device)
        inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
        if not bool(mask_BT.all()):
            inputs |= {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp_min(0)}
        inputs |= {"logits_to_keep": kept}
        inputs = {key: value for key, value in inputs.items() if key in self._takes}
        return list(self.model(**inputs).logits[:, -kept:])

    # -- text -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy continuation of each prompt, up to and without its first stop text or an end token."""
        prompts = [self._prompt_ids(request.args[0]) for request in requests]
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS)
            if settings.get("do_sample"):
                raise NotImplementedError(f"{request.task_name} asks for sampling: answers here are greedy")
            # room for the prompt first: an answer may take half of the window
            new = max(1, min(settings["max_gen_toks"], self.max_length // 2))
            groups.setdefault((tuple(s for s in settings["until"] if s), new), []).append(i)
        texts, usage = [""] * len(requests), [Usage(0, 0, 0, False, 0, 0)] * len(requests)
        done = 0
        for (stops, new), members in groups.items():
            room = self.max_length - new
            members = sorted(members, key=lambda i: (-len(prompts[i]), prompts[i]))
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                given = [prompts[i][-room:] for i in batch]
                answers = self._in_memory(partial(self._continue, stops=stops, new=new, done=done), given)
                for i, (ids, num_tokens) in zip(batch, answers, strict=True):
                    cut = len(prompts[i]) > room
                    tokens_in = min(len(prompts[i]), room)
                    texts[i] = _before_stop(self.tok_decode(ids), stops)
                    unspelled = self._unspelled(requests[i].args[0])
                    usage[i] = Usage(tokens_in, num_tokens, num_tokens, cut, *unspelled)
                done += len(batch)
        self.usage = usage
        return texts

    def _continue(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[str], new: int, done: int
    ) -> list[tuple[list[int], int]]:
        """Of each prompt the new ids without the end token, and how many were generated, the end token included."""
        ids_BT, mask_BT = left_padded(prompts, self.tokenizer.pad_token_id, self.device)
        ends = _RowEnds(self.tokenizer, stops, self._end_ids, ids_BT.shape[1], len(prompts))
        ends.on_step = lambda length: self.on_answers(done + ends.share_done(length, new))
        out_BT = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            past_key_values=roomy_cache(self.model),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
        self.on_answers(done + len(prompts))
        answers = []
        for row, length in zip(out_BT[:, ids_BT.shape[1] :].tolist(), ends.lengths(), strict=True):
            row = row[: length or len(row)]
            answers.append((row[:-1] if row and row[-1] in self._end_ids else row, len(row)))
        return answers


class _RowEnds(StoppingCriteria):
    """Which rows have ended, each at its own end token or stop text; ended rows are only padded from then on."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], end_ids: Sequence[int], start: int, num_rows: int) -> None:
        self._tokenizer, self._stops, self._end_ids, self._start = tokenizer, stops, {*end_ids}, start
        self._lengths = [0] * num_rows
        # a token is at least a byte; two more for a stop that begins inside one
        self._look_back = max((len(stop.encode()) for stop in stops), default=0) + 2
        self.on_step: Callable[[int], None] = lambda length: None

    def lengths(self) -> list[int]:
        """New tokens of each row up to its end; 0 where it has not ended."""
        return self._lengths

    def share_done(self, length: int, longest: int) -> float:
        """Answers that are done, in rows; an open one counts by its share of the longest there may be."""
        return sum(1.0 if ended else length / longest for ended in self._lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self._start
        open_rows = [b for b, ended in enumerate(self._lengths) if not ended]
        recent = input_ids[:, max(self._start, input_ids.shape[1] - self._look_back) :].tolist()
        texts = self._tokenizer.batch_decode([recent[b] for b in open_rows]) if self._stops else [""] * len(open_rows)
        for b, text in zip(open_rows, texts, strict=True):
            if recent[b][-1] in self._end_ids or any(stop in text for stop in self._stops):
                self._lengths[b] = length
        self.on_step(length)
        return torch.tensor([bool(ended) for ended in self._lengths], device=input_ids.device)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """End-of-text of the tokenizer, and the tokens at which the model's publisher stops (chat models: end of turn)."""
    published = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = published if isinstance(published, list | tuple) else [published]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None})


def _without_clock(template: str) -> str:
    """A template that writes today's date would write other prompts tomorrow."""
    clock = f"{{%- macro strftime_now(format) -%}}{TODAY}{{%- endmacro -%}}"
    return clock + template if "strftime_now" in template else template


def _turn_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes after what the assistant said, if it writes one."""
    said = "Seven."
    messages = [{"role": "user", "content": "Three and four?"}, {"role": "assistant", "content": said}]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    if said not in written:  # the template writes something else: what ends a turn cannot be seen
        return []
    after = tokenizer.encode(written.rpartition(said)[2], add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [i for i in after if i in special][:1]


def _score(logits_KV: Tensor, scored: Sequence[int]) -> tuple[float, bool]:
    logits_KV = logits_KV.float()
    ids_K = torch.tensor(scored, device=logits_KV.device)
    log_probs_K = logits_KV.gather(1, ids_K[:, None])[:, 0] - logits_KV.logsumexp(1)
    return float(log_probs_K.sum()), bool((logits_KV.argmax(1) == ids_K).all())


def _before_stop(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
