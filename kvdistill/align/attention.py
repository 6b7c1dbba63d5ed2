"""A projector fitted to what attention reads: the error in softmax(qk)v rather than in k and v.

Values. With the teacher's attention A held fixed, an outgoing head's output is A v: linear in v. So the least-squares
rows are A x and A y in place of x and y, for every query head that reads the head (GQA): an exact fit of the output.

Keys. A key error e_s moves query t's logit for key s by q_t·e_s, and its attention row by a KL divergence of, to
second order, ½ Var_{s~a_t}(q_t·e_s) <= ½ sum_s a_ts (q_t·e_s)². Over all queries: sum_s e_s' (sum_t a_ts q_t q_t') e_s.
With one second moment M of the queries for all keys that is sum_s w_s e_s' M e_s, w_s = sum_t a_ts, the attention that
key s receives. So rows weigh w_s; M drops out, since regressions of several outputs on the same inputs have the same
minimum in every metric of the output (with the penalty in that metric too). Each outgoing head has its own w.

One layer's attention at a time is in memory, [B, Q, T, T] in fp32. Knows no rotary: queries and keys come as they
meet in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.heads.initial import spread_heads
from kvdistill.align.ridge import RidgeFit
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import CAUSAL, KV, AttentionRule, require_unbiased
from kvdistill.core.maps import SparseMap


def attention_rows(
    q_BQSE: Float[Tensor, "B Q S E"],
    k_BGSE: Float[Tensor, "B G S E"],
    mask_BS: Bool[Tensor, "B S"],
    *,
    rule: AttentionRule = CAUSAL,
    scale: float | None = None,
) -> Float[Tensor, "B Q S S"]:
    """softmax(scale · q k') in fp32, 0 at masked queries and keys; query head j reads key head j // (Q / G).

    rule: who sees whom, cap and sink; rows sum to less than 1 where there is a sink. scale: by default 1/sqrt(E).
    Raises AlignmentError where Q is no multiple of G, and for a rule with a bias.
    """
    (B, Q, S, E), G = q_BQSE.shape, k_BGSE.shape[1]
    if Q % G:
        raise AlignmentError(f"{Q} query heads on {G} key heads", fix="query heads are a multiple of key heads")
    require_unbiased([rule])
    place_S = torch.arange(S, device=mask_BS.device)
    allowed_BSS = mask_BS[:, None, :] & mask_BS[:, :, None] & rule.sees(place_S[:, None], place_S)
    with torch.autocast(q_BQSE.device.type, enabled=False):
        q_BGRSE = q_BQSE.float().view(B, G, Q // G, S, E) * (E**-0.5 if scale is None else scale)
        logits = torch.matmul(q_BGRSE, k_BGSE.float().transpose(2, 3)[:, :, None]).view(B, Q, S, S)
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    logits = logits.masked_fill(~allowed_BSS[:, None], -torch.inf)
    if rule.sink is not None:
        logits = torch.cat([logits, rule.sink.to(logits)[:, None, None].expand(B, Q, S, 1)], dim=-1)
    return logits.softmax(-1)[..., :S].masked_fill(~allowed_BSS[:, None], 0.0)  # a row without keys is NaN until here


def received_attention(a_BQTS: Float[Tensor, "B Q T S"]) -> Float[Tensor, "B Q S"]:
    """What each key receives from all queries; sums to the number of real queries."""
    return a_BQTS.sum(2)


def carry_attention(a_BQSS: Float[Tensor, "B Q S S"], mapping: SparseMap | None) -> Float[Tensor, "B Q T T"]:
    """Attention between source slots, brought to a time map's target slots: P A P', each row made to sum to 1 again.

    Slot t asks as its sources ask, and is asked as they are. Exact where the map takes whole tokens and keeps all
    that are read; rows whose keys were all dropped are 0.
    """
    if mapping is None:
        return a_BQSS
    p_BTS = mapping.to_dense().expand(a_BQSS.shape[0], -1, -1)[:, None]
    carried_BQTT = p_BTS @ a_BQSS @ p_BTS.transpose(2, 3)
    return carried_BQTT / carried_BQTT.sum(-1, keepdim=True).clamp_min(1e-30)


def teacher_attention(
    kv: KV,
    sources: Sequence[Sequence[tuple[int, float]]],
    mapping: SparseMap | None = None,
    rotate: Callable[[KV], KV] | None = None,
) -> Iterator[Float[Tensor, "B Q T T"]]:
    """One student layer's attention after another: the mean of its teacher layers' by their shares, time-mapped.

    sources: for each student layer (number of a teacher layer, share). rotate: to the frame in which the teacher's
    attention multiplies queries and keys; called for an unrotated `kv` only.
    Raises AlignmentError for a `kv` without queries, and for an unrotated one without `rotate`.
    """
    if not kv.queries:
        raise AlignmentError(
            "align.ridge_on: attention needs queries, the teacher's KV has none", fix="capture with queries"
        )
    if kv.rope == "unrotated":
        if rotate is None:
            raise AlignmentError(
                "align.ridge_on: attention needs keys and queries as attention multiplies them, they are unrotated",
                fix="give fit_projector the teacher's own `rotate`",
            )
        kv = rotate(kv)
    mapping = None if mapping is None else mapping.masked_source(kv.mask_BT)
    scaling = kv.scaling or [None] * kv.num_layers

    def shared(layer: int, share: float) -> Tensor:
        i = kv.layers.index(layer)
        return attention_rows(kv.queries[i], kv.keys[i], kv.mask_BT, rule=kv.rules[i], scale=scaling[i]) * share

    return (carry_attention(reduce(torch.add, (shared(*one) for one in row)), mapping) for row in sources)


@final
class AttentionRidgeFit:
    """`RidgeFit` in the metric of attention (module docstring): one fit for each layer and outgoing head.

    Memory: layers · out_heads · num_in · (num_in + out_size) numbers in fp64.
    """

    def __init__(self, kind: str, num_in: int, out_heads: int, out_size: int, num_layers: int = 1) -> None:
        """kind: `keys` (rows weighed by the attention they receive) or `values` (attention-averaged rows)."""
        assert kind in ("keys", "values")
        self.kind, self.out_heads, self.out_size, self.num_layers = kind, out_heads, out_size, num_layers
        self._fit = RidgeFit(num_in, out_size, num_layers * out_heads)

    def update_layer(
        self,
        layer: int,
        x_BTI: Float[Tensor, "B T I"],
        y_BTO: Float[Tensor, "B T O"],
        mask_BT: Bool[Tensor, "B T"],
        a_BQTT: Float[Tensor, "B Q T T"],
        shares_QJ: Float[Tensor, "Q J"],
    ) -> None:
        """Add one batch to one layer. shares_QJ: how much each query head reads each outgoing head (`head_shares`)."""
        x_BTI = x_BTI.masked_fill(~mask_BT[..., None], 0.0)
        shares_QJ, received_BQT = shares_QJ.to(a_BQTT), received_attention(a_BQTT)
        y_BTJE = y_BTO.masked_fill(~mask_BT[..., None], 0.0).unflatten(2, (self.out_heads, self.out_size))
        for j in range(self.out_heads):
            row, y_BTE = layer * self.out_heads + j, y_BTJE[:, :, j]
            if self.kind == "keys":
                weight_N = torch.einsum("bqs,q->bs", received_BQT, shares_QJ[:, j]).flatten()
                self._fit.update_layer(row, x_BTI.flatten(0, 1), y_BTE.flatten(0, 1), mask_BT.flatten(), weight_N)
                continue
            for q in shares_QJ[:, j].nonzero()[:, 0].tolist():
                a_BTT = a_BQTT[:, q]
                real_BT = mask_BT & (a_BTT.sum(-1) > 0)
                weight_N = shares_QJ[q, j].expand(real_BT.numel())
                read_x, read_y = (a_BTT @ x_BTI).flatten(0, 1), (a_BTT @ y_BTE).flatten(0, 1)
                self._fit.update_layer(row, read_x, read_y, real_BT.flatten(), weight_N)

    def solve(
        self, l2: float, reads: Bool[Tensor, "1 J I"] | None = None
    ) -> tuple[Float[Tensor, "L I O"], Float[Tensor, "L O"]]:
        """As `RidgeFit.solve`; `reads` with one part per outgoing head."""
        each = None if reads is None else reads[0].repeat(self.num_layers, 1)[:, None]
        weight, bias = self._fit.solve(l2, each)
        weight_LJIE = weight.unflatten(0, (self.num_layers, self.out_heads))
        return weight_LJIE.transpose(1, 2).flatten(2), bias.view(self.num_layers, -1)

    @property
    def mean_in(self) -> Float[Tensor, "L J I"]:
        """The mean of the input channels as each outgoing head is fitted on it, fp64."""
        return self._fit.mean_in.unflatten(0, (self.num_layers, self.out_heads))[:, :, 0]


def head_shares(num_queries: int, teacher_heads: int, out_heads: int) -> Float[Tensor, "Q J"]:
    """How much each of the teacher's query heads reads each outgoing head.

    Outgoing heads are the teacher's own, each read by its group of queries, or (another number of) the student's:
    those stand for the teacher heads that `spread_heads` gives them.
    """
    groups_QG = torch.eye(teacher_heads).repeat_interleave(num_queries // teacher_heads, dim=0)
    return groups_QG @ spread_heads(teacher_heads, out_heads)
