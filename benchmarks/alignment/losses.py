"""Losses that look at attention, at the size of Qwen2.5 7B's keys: 28 layers, 4 heads of 128, 256 tokens, 4 texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.alignment import Case
from kvdistill.losses import QKV, AttentionOutputKVLoss, StructuralKVLoss, answer_attention

LAYERS, BATCH, TOKENS, HEADS, SIZE = 28, 4, 256, 4, 128
ANSWER_TOKENS = 64
# what causal attention cannot avoid: T (T + 1) / 2 products of a query and a key for each layer, text and head
PRODUCT_FLOPS = LAYERS * BATCH * HEADS * TOKENS * (TOKENS + 1) * SIZE
TENSOR_BYTES = 4 * LAYERS * BATCH * TOKENS * HEADS * SIZE
STRUCTURAL_MS, STRUCTURAL_YARDSTICK_MS = 600, 1504


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shape = (LAYERS, BATCH, TOKENS, HEADS, SIZE)
    source, target = (QKV(*(torch.randn(shape, generator=generator) for _ in range(3))) for _ in range(2))
    lengths_B1 = torch.tensor([[TOKENS], [TOKENS - 30], [TOKENS - 5], [TOKENS - 80]])
    mask_BT = torch.arange(TOKENS) < lengths_B1
    where = f"{LAYERS} layers, T {TOKENS}"

    def ours(distance: StructuralKVLoss | AttentionOutputKVLoss) -> Callable[[], list[Tensor]]:
        return lambda: _gradients(source, lambda moving: distance(moving, target, mask_BT).sum())

    def loops(layer_loss: Callable[[QKV, QKV, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def loss(moving: QKV) -> Tensor:
            layers = (QKV(*(x[i] for x in moving)) for i in range(LAYERS))
            return sum((layer_loss(s, _layer(target, i), mask_BT) for i, s in enumerate(layers)), torch.zeros(()))

        return lambda: _gradients(source, loss)

    for name, distance, layer_loss, products, most_ms, yardstick_ms in (
        # rows of both sides forward and again backward, then queries' and keys' gradient
        ("structural loss", StructuralKVLoss(), _structural_layer, 6, STRUCTURAL_MS, STRUCTURAL_YARDSTICK_MS),
        # rows and outputs of both sides; rows of the source again, gradient of rows, values, queries and keys
        ("attention_output", AttentionOutputKVLoss(), _output_layer, 9, None, None),
    ):
        case = Case(
            f"{name}, {where}, forward + backward",
            ours(distance),
            loops(layer_loss),
            bytes_moved=9 * TENSOR_BYTES,  # q, k, v of both sides in, three gradients out
            flops=products * PRODUCT_FLOPS,
            most_ms=most_ms,
            yardstick_ms=yardstick_ms,
        )
        _require_equal(case)
        yield case

    answer_BT = mask_BT & (torch.arange(TOKENS) >= lengths_B1 - ANSWER_TOKENS)
    case = Case(
        f"answer attention, {where}",
        lambda: [answer_attention(target.q, target.k, answer_BT, mask_BT)],
        lambda: [torch.stack([_answer_layer(_layer(target, i), answer_BT, mask_BT) for i in range(LAYERS)])],
        bytes_moved=2 * TENSOR_BYTES,
        flops=2 * PRODUCT_FLOPS * ANSWER_TOKENS // TOKENS,
    )
    _require_equal(case)
    yield case


def _layer(side: QKV, layer: int) -> QKV:
    return QKV(*(x[layer] for x in side))


def _gradients(source: QKV, loss: Callable[[QKV], Tensor]) -> list[Tensor]:
    moving = QKV(*(x.detach().requires_grad_() for x in source))
    total = loss(moving)
    return [total.detach(), *torch.autograd.grad(total, moving)]


def _require_equal(case: Case) -> None:
    for a, b in zip(case.ours(), case.loops(), strict=True):  # type: ignore[call-overload]
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-5):
            raise AssertionError(f"{case.name}: differs from the loop by {(a - b).abs().max()}")


# -- the plain loop: one layer with whole [B, H, T, T] tensors ------------------------------------


def _log_rows(q_BTHD: Tensor, k_BTHD: Tensor, mask_BT: Tensor) -> Tensor:
    logits = q_BTHD.transpose(1, 2) @ k_BTHD.permute(0, 2, 3, 1) * SIZE**-0.5
    allowed = mask_BT[:, None, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(-1)


def _structural_layer(source: QKV, target: QKV, mask_BT: Tensor) -> Tensor:
    log_q, log_p = (_log_rows(side.q, side.k, mask_BT) for side in (source, target))
    divergence_BT = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    cosine_k, cosine_v = (
        torch.nn.functional.cosine_similarity(s, t, dim=-1).mean(-1)
        for s, t in zip(source[1:], target[1:], strict=True)
    )
    return ((2 - cosine_k - cosine_v + divergence_BT) * mask_BT).sum()


def _output_layer(source: QKV, target: QKV, mask_BT: Tensor) -> Tensor:
    read = [_log_rows(side.q, side.k, mask_BT).exp() @ side.v.transpose(1, 2) for side in (source, target)]
    return (((read[0] - read[1]) ** 2).mean((1, 3)) * mask_BT).sum()


def _answer_layer(side: QKV, answer_BT: Tensor, mask_BT: Tensor) -> Tensor:
    paid_BT = (_log_rows(side.q, side.k, mask_BT).exp() * answer_BT[:, None, :, None]).sum((1, 2)) * mask_BT
    return paid_BT * mask_BT.sum(-1, keepdim=True) / paid_BT.sum(-1, keepdim=True)
