"""One forward pass of a teacher: its KV, how well it explains the gold text, and its top-k predictions.

An encoder, or the encoder of an encoder-decoder, reads the whole text (prompt, reasoning and answer) at once, every
token seeing every other. It gives KV; it has no next-token predictions, so its NLL is None.

Runs only what is asked for: without NLL and top-k, layers above the highest wanted one and the LM head are skipped;
with them, the head sees only the positions that predict a completion token, so that [B, T, V] never exists.
Everything returned is detached and may enter the student's graph. Does not know alignment, fusion or the store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from kvdistill.core.errors import AlignmentError, DataError, ModelError
from kvdistill.core.kv import KV
from kvdistill.core.segments import ANSWER, REASONING
from kvdistill.core.targets import TeacherTargets
from kvdistill.models.capture import KVCapture, capture_kv
from kvdistill.models.rope import unrotate_keys
from kvdistill.models.structure import find_backbone, model_kind, model_name, positions_from_mask, unwrap_model

EMPTY_LOGPROB = -1e4  # where there is no prediction: probability 0 in every dtype, and 0 * log 0 stays finite
_CHUNK_ELEMENTS = 1 << 26  # fp32 log-probabilities in memory at once


@torch.no_grad()
def teacher_forward(
    model: nn.Module,
    input_ids_BT: Int[Tensor, "B T"],
    mask_BT: Shaped[Tensor, "B T"],
    segments_BT: Int[Tensor, "B T"],
    *,
    layers: Sequence[int] | None = None,
    want_kv: bool = True,
    want_nll: bool = False,
    want_logits_top_k: int = 0,
    want_queries: bool = False,
    scorer: Callable[[KV, Tensor], Tensor] | None = None,
) -> TeacherTargets:
    """Run `model` on a padded batch (left or right) without a graph and without dropout.

    mask_BT: nonzero at real tokens. segments_BT: codes of core/segments.py. layers: KV of these only.
    want_logits_top_k: predictions kept per position (at most V). want_queries: unrotated queries in the KV.
    scorer: is given the KV as the model's attention sees it (keys and queries rotated, `scaling` set) and the
    segments, and returns scores [B, T, M, n, G]: n numbers per token for each of M layers and G key/value heads.
    Returns kv (unrotated), nll_B (fp32, mean per completion token) and top-k: at position t the fp32
    log-probabilities of token t + 1, filled where that token is of the completion, index 0 and EMPTY_LOGPROB
    elsewhere. What was not asked for is None; so is an encoder's NLL. No inference_mode: its tensors may not enter
    the student's graph. Raises DataError for an example without a completion token when NLL is wanted, ModelError
    for an encoder's logits and AlignmentError for scores of another shape, and what capture_kv and unrotate_keys
    raise.
    """
    device = next(model.parameters()).device
    ids, mask, segments = input_ids_BT.to(device), mask_BT.to(device), segments_BT.to(device)
    causal = model_kind(unwrap_model(model).config) == "decoder"
    if want_logits_top_k and not causal:
        raise ModelError(
            "an encoder predicts no next token: it has no logits to distil",
            place=model_name(model),
            fix="loss.logit_weight: 0 for this teacher, or distil logits from a causal decoder",
        )
    want_head = causal and (want_nll or want_logits_top_k > 0)
    if not want_kv and not want_head:
        return TeacherTargets(segments)
    select = _predicting_positions(mask, segments, need_one=want_nll) if want_head else None
    positions = positions_from_mask(mask)
    capture: KVCapture | None = None
    logits: Tensor | None = None
    queries = want_queries or scorer is not None
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model, select))
        if want_kv:
            capture = stack.enter_context(capture_kv(model, layers, queries=queries, stop_early=not want_head))
        runs, inputs = run_inputs(model, causal, ids, mask, positions)
        output = runs(**inputs)
        logits = output.logits[0] if want_head else None
    kv, scores = None, None
    if capture is not None:
        rotated = capture.kv(mask, positions).detach()
        if scorer is not None:
            scores = scorer(rotated, segments).detach().float()
            B, T, M, G = *segments.shape, rotated.num_layers, rotated.keys[0].shape[1]
            if scores.ndim != 5 or (*scores.shape[:3], scores.shape[4]) != (B, T, M, G):
                raise AlignmentError(
                    f"the scorer gave {tuple(scores.shape)}",
                    fix=f"scores are [batch, tokens, layers, kinds, key/value heads] = ({B}, {T}, {M}, kinds, {G})",
                )
        kv = unrotate_keys(rotated if want_queries else replace(rotated, queries=()), model)
    targets = TeacherTargets(segments, kv, scores_BSMRG=scores)
    if logits is None or select is None:
        return targets
    nll_B, index_BTK, logprob_BTK = _read_logits(logits, ids, select, want_nll, want_logits_top_k)
    return replace(targets, nll_B=nll_B, topk_index_BSK=index_BTK, topk_logprob_BSK=logprob_BTK)


def run_inputs(
    model: nn.Module, causal: bool, ids: Tensor, mask: Tensor, positions: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    """What is run and with which arguments: a causal model as it is, of the others the encoder alone.

    An encoder that takes no positions and learns them (BART) numbers columns: it wants its padding on the right.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    runs: nn.Module = model if causal else find_backbone(model)
    if causal:
        inputs["use_cache"] = False
    takes = inspect.signature(type(unwrap_model(model) if causal else runs).forward).parameters
    # RoBERTa's positions begin after its padding token's number; it numbers tokens right when it is left to it
    counts_itself = hasattr(runs._modules.get("embeddings"), "create_position_ids_from_input_ids")
    if "position_ids" in takes and not counts_itself:
        inputs["position_ids"] = positions
    return runs, inputs


def _predicting_positions(mask_BT: Tensor, segments_BT: Tensor, *, need_one: bool) -> Tensor:
    """True at [b, t] where token t + 1 is a real completion token and token t is real."""
    real = mask_BT.bool()
    completion = real & ((segments_BT == REASONING) | (segments_BT == ANSWER))
    select = torch.zeros_like(real)
    select[:, :-1] = real[:, :-1] & completion[:, 1:]
    if need_one and not bool(select.any(dim=1).all()):
        row = int((~select.any(dim=1)).nonzero()[0])
        raise DataError(
            "an example has no reasoning or answer token after its first token: its NLL is undefined",
            place=f"row {row} of the batch",
            fix="leave out examples with an empty completion, or raise data.max_length",
        )
    return select


def _read_logits(
    logits_NV: Tensor, ids_BT: Tensor, select_BT: Tensor, want_nll: bool, top_k: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    row, column = select_BT.nonzero(as_tuple=True)
    row, column = row.to(logits_NV.device), column.to(logits_NV.device)
    gold_N = ids_BT.to(logits_NV.device)[row, column + 1]
    B, T = ids_BT.shape
    K = min(top_k, logits_NV.shape[-1])
    nll_N = torch.empty(len(row), device=logits_NV.device)
    index_BTK = torch.zeros(B, T, K, dtype=torch.long, device=logits_NV.device)
    logprob_BTK = torch.full((B, T, K), EMPTY_LOGPROB, device=logits_NV.device)
    chunk = max(1, _CHUNK_ELEMENTS // logits_NV.shape[-1])
    for start in range(0, len(row), chunk):
        part = slice(start, start + chunk)
        logprob_NV = logits_NV[part].float().log_softmax(dim=-1)
        nll_N[part] = -logprob_NV.gather(1, gold_N[part, None])[:, 0]
        if K:
            logprob_BTK[row[part], column[part]], index_BTK[row[part], column[part]] = logprob_NV.topk(K, dim=-1)
    nll_B = None
    if want_nll:
        row_N = row.cpu()  # a GPU adds in no fixed order
        total = torch.zeros(B).index_add_(0, row_N, nll_N.cpu())
        nll_B = (total / torch.bincount(row_N, minlength=B)).to(nll_N.device)
    return nll_B, (index_BTK if K else None), (logprob_BTK if K else None)


@contextmanager
def _evaluating(model: nn.Module, select_BT: Tensor | None) -> Iterator[None]:
    """No dropout while open, and every module's own mode afterwards. select_BT: as in `head_at`; unset: all."""
    with ExitStack() as undo:
        if select_BT is not None:
            undo.enter_context(head_at(model, select_BT))
        for module in model.modules() if model.training else ():
            if module.training:
                undo.callback(setattr, module, "training", True)
        model.eval()
        yield


@contextmanager
def head_at(model: nn.Module, select_BT: Tensor) -> Iterator[None]:
    """While open, the LM head sees only the True positions of select_BT [B, T]: the model's logits are [1, N, V].

    With a vocabulary of 262,000 words the logits of one text are 0.3 GB, and few of its positions are looked at. The
    model's own forward still runs around the head, so that scaled or soft-capped logits come out right. model: plain
    or wrapped (peft). Raises ModelError for a model without a head.
    """
    head = unwrap_model(model).get_output_embeddings()
    if head is None:
        raise ModelError("the model has no LM head", place=model_name(model), fix="load a causal language model")
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][select_BT.to(args[0].device)][None], *args[1:]))
    try:
        yield
    finally:
        hook.remove()
