"""A Hugging Face causal model behind lm-eval's `LM` interface, greedy and metered.

`MeteredLM` answers what lm-eval's tasks ask (log-likelihoods of continuations, greedy text until a stop) and says
for each request what it took: tokens in and out, forward passes, whether the prompt was cut. Tokenization and chat
templates are lm-eval's own (its class for Hugging Face models is the parent); batching and text are not: text comes
from `models/generate.py`, logits are computed for scored positions only, and choices that differ in their last token
share a row. Knows no task and no file.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from kvdistill.arms.latent_student import LatentStudent
from kvdistill.arms.questions import Questions
from kvdistill.arms.student import Student
from kvdistill.core.errors import ModelError
from kvdistill.data.chat import TODAY, TemplateFailed, render_messages
from kvdistill.models.generate import Rows, generate_greedy, left_padded
from kvdistill.models.latent import LatentForCausalLM
from kvdistill.stages.evaluate.exams import DEFAULT_NEW_TOKENS, Usage
from kvdistill.stages.evaluate.own import StudentLM

_MAX_LOGITS = 1 << 28  # entries of one block of scored logits: 1 GiB in float32


class MeteredLM(HFLM, StudentLM):
    """lm-eval's LM over a loaded model. `usage` is that of the last call, one entry a request in their order.

    bos_in_front: put beginning-of-text before every prompt even where the tokenizer does not do it by itself (models
    trained by kvdistill have seen it there). chat: prompts come from the chat template, so its end of a turn ends an
    answer. student: the same model, where questions of a run's own test split come among the others.
    on_answers: called with the number of requests answered so far in a call.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        bos_in_front: bool = False,
        chat: bool = False,
        student: Student | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:  # padding is known by its mask: any token of the vocabulary will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        # end-of-text, the tokens at which the model's publisher stops (chat models: end of turn), the template's
        published = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [tokenizer.eos_token_id, *(published if isinstance(published, list | tuple) else [published])]
        ends += _turn_ends(tokenizer) if chat else []
        self._end_ids = sorted({int(i) for i in ends if i is not None})
        HFLM.__init__(self, pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        StudentLM.__init__(self, student, tokenizer, batch_size)
        template = str(tokenizer.chat_template)
        if "strftime_now" in template:  # it writes today's date: tomorrow the prompts would differ
            template = f"{{%- macro strftime_now(format) -%}}{TODAY}{{%- endmacro -%}}" + template
        self._template = template if chat else None
        self._bos_id = tokenizer.bos_token_id if bos_in_front else None
        self._takes = {*inspect.signature(model.forward).parameters}
        # without a mask padding could not be told from text
        self._rows = Rows(batch_size if "attention_mask" in self._takes else 1)
        self._askers: list[Any] = []

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

    def _first_ids(self) -> list[int]:
        """What an empty prompt is: a model cannot begin with nothing."""
        return [self.prefix_token_id if self.prefix_token_id is not None else 0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages through the tokenizer's template. A system message that it does not take goes to the user's."""
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        template = self._template or str(self.tokenizer.chat_template)
        try:
            return render_messages(self.tokenizer, chat_history, template, **options)
        except TemplateFailed as error:
            if chat_history[0]["role"] != "system" or len(chat_history) < 2:
                what, fix = f"the chat template fails ({error})", "set evaluate.chat=false, or use another tokenizer"
                raise ModelError(what, place="evaluate.chat", fix=fix) from error
            system, first, *rest = chat_history
            merged = {**first, "content": f"{system['content'].strip()}\n\n{first['content']}"}
            return render_messages(self.tokenizer, [merged, *rest], template, **options)

    # -- log-likelihoods ------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether greedy decoding would write it) of each request."""
        self._askers = [(request.task_name, request.doc_id) for request in requests]
        return super().loglikelihood(list(requests), disable_tqdm=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if isinstance(self.model, LatentForCausalLM):
            return self._behind_latents(requests)
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
            lost, characters = self.unspelled(context)
            usage.append(Usage(len(row) if first else 0, 0, int(first), cut, lost, characters, len(scored)))
            if scored:
                rows.setdefault(row, []).append((i, scored))
        order = sorted(rows, key=lambda row: (-len(row), row))
        for batch in self._row_batches(order, {row: max(len(s) for _, s in rows[row]) for row in rows}):
            found = self._rows.run(lambda part: self._last_logits(part, rows), batch)
            for row, last_KV in zip(batch, found, strict=True):
                for i, scored in rows[row]:
                    logits_KV = last_KV[-len(scored) :].float()
                    ids_K = torch.tensor(scored, device=logits_KV.device)
                    log_probs_K = logits_KV.gather(1, ids_K[:, None])[:, 0] - logits_KV.logsumexp(1)
                    results[i] = float(log_probs_K.sum()), bool((logits_KV.argmax(1) == ids_K).all())
        self.usage = usage
        self.on_answers(len(requests))
        return results

    def _behind_latents(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The same of a model that thinks in latents: each continuation as the answer behind those of its context."""
        student = LatentStudent.of(self.model)
        results, usage = [(0.0, True)] * len(requests), [Usage(0, 0, 0, False, 0, 0)] * len(requests)
        texts: dict[int, tuple[list[int], list[int]]] = {}
        for i, ((context, _), context_ids, continuation) in enumerate(requests):
            scored, known = continuation[: self.max_length - 1], [*(context_ids or self._first_ids())]
            room, lost = self.max_length - len(scored), self.unspelled(context)
            cut, passes = len(known) > room or len(scored) < len(continuation), self.model.num_passes_before_answer + 1
            usage[i] = Usage(min(len(known), room), 0, passes if scored else 0, cut, *lost, len(scored))
            if scored:
                texts[i] = known[-room:], scored
        for batch in self._rows.batches(sorted(texts, key=lambda i: len(texts[i][0]))):
            contexts, continuations = ([texts[i][part] for i in batch] for part in (0, 1))
            questions = Questions.of_ids(contexts, continuations, self.tokenizer.pad_token_id)
            thinking = student.think(questions.to(self.device), [0])
            log_probs_NV = thinking.logits_NV.float().log_softmax(-1)
            given_N = log_probs_NV.gather(1, thinking.labels_N[:, None])[:, 0]
            greedy_N = log_probs_NV.argmax(1) == thinking.labels_N
            for row, i in enumerate(batch):
                mine_N = thinking.row_N == row
                results[i] = float(given_N[mine_N].sum()), bool(greedy_N[mine_N].all())
        self.usage = usage
        self.on_answers(len(requests))
        return results

    def _row_batches(
        self, order: Sequence[tuple[int, ...]], kept: dict[tuple[int, ...], int]
    ) -> Iterator[list[tuple[int, ...]]]:
        """Rows side by side: at most so many as run at once, and no more than their scored logits have room for."""
        batch: list[tuple[int, ...]] = []
        for row in order:
            widest = max(kept[other] for other in [*batch, row])
            if batch and (len(batch) >= self._rows.most or (len(batch) + 1) * widest * self.vocab_size > _MAX_LOGITS):
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
        prompts = [self.tok_encode(request.args[0]) or self._first_ids() for request in requests]
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS)
            if settings.get("do_sample"):
                raise NotImplementedError(f"{request.task_name} asks for sampling: answers here are greedy")
            # room for the prompt first: an answer may take half of the window
            new = max(1, min(settings["max_gen_toks"], self.max_length // 2))
            groups.setdefault((tuple(s for s in settings["until"] if s), new), []).append(i)
        texts, usage, done = [""] * len(requests), [Usage(0, 0, 0, False, 0, 0)] * len(requests), 0
        for (stops, new), members in groups.items():
            room = self.max_length - new

            def show(answered: float, before: int = done) -> None:
                self.on_answers(before + answered)

            answers = generate_greedy(
                self.model,
                [prompts[i][-room:] for i in members],
                self.tokenizer,
                max_new_tokens=new,
                rows=self._rows,
                end_ids=self._end_ids,
                stops=stops,
                progress=show,
            )
            for i, one in zip(members, answers, strict=True):
                texts[i] = one.text
                cut, tokens_in = len(prompts[i]) > room, min(len(prompts[i]), room)
                unspelled = self.unspelled(requests[i].args[0])
                usage[i] = Usage(tokens_in, one.forward_passes, one.forward_passes, cut, *unspelled)
            done += len(members)
        self.usage = usage
        return texts


def _turn_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes after what the assistant said, if it writes one."""
    said = "Seven."
    messages = [{"role": "user", "content": "Three and four?"}, {"role": "assistant", "content": said}]
    try:
        written = render_messages(tokenizer, messages, str(tokenizer.chat_template))
    except TemplateFailed as error:
        fix = "set evaluate.chat=false, or use another tokenizer"
        raise ModelError(f"the chat template fails ({error})", place="evaluate.chat", fix=fix) from error
    if said not in written:  # the template writes something else: what ends a turn cannot be seen
        return []
    after = tokenizer.encode(written.rpartition(said)[2], add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [i for i in after if i in special][:1]
