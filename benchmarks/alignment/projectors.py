"""Headwise projection, forward and backward: 28 layers, 8 heads of 128 to 4 heads of 64, 4 x 512 tokens.

The size is the one at which the plain form below costs about what the yardstick does: 8 -> 4 heads and T=512 are
given, the rest is not. The gradient reaches the input too, as in training in the teacher's space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.alignment import Case
from kvdistill.align.heads import HeadwiseMapProjector

LAYERS, BATCH, TOKENS = 28, 4, 512
IN_HEADS, IN_SIZE, OUT_HEADS, OUT_SIZE = 8, 128, 4, 64


class PlainHeadwise(nn.Module):
    """As usually published: heads as an axis of their own, einsum over them, then a Linear of the head size."""

    def __init__(self, mixer_HG: Tensor, size_DE: Tensor, bias_GE: Tensor) -> None:
        super().__init__()
        self.mixer, self.bias = nn.Parameter(mixer_HG.clone()), nn.Parameter(bias_GE.clone())
        self.size = nn.Linear(size_DE.shape[0], size_DE.shape[1], bias=False)
        self.size.weight.data.copy_(size_DE.T)

    def forward(self, x_BHTD: Tensor) -> Tensor:
        return self.size(torch.einsum("bhtd,hg->bgtd", x_BHTD, self.mixer)) + self.bias[:, None]


def cases() -> Iterator[Case]:
    random = torch.Generator().manual_seed(0)
    ours = HeadwiseMapProjector(IN_HEADS, IN_SIZE, OUT_HEADS, OUT_SIZE, LAYERS, init="orthogonal")
    x = torch.randn(LAYERS, BATCH, TOKENS, IN_HEADS * IN_SIZE, generator=random).requires_grad_()
    grad = torch.randn(LAYERS, BATCH, TOKENS, OUT_HEADS * OUT_SIZE, generator=random)
    loops = [
        PlainHeadwise(mixer, size[0], bias.view(OUT_HEADS, OUT_SIZE))
        for mixer, size, bias in zip(ours.mixer.detach(), ours.size.detach(), ours.bias.detach(), strict=True)
    ]

    def run_ours() -> list[Tensor]:
        out = ours(x)
        return [out, *torch.autograd.grad(out, [x, ours.mixer, ours.size], grad)]

    def run_loops() -> list[Tensor]:
        heads_ = [x[i].unflatten(2, (IN_HEADS, IN_SIZE)).transpose(1, 2) for i in range(LAYERS)]
        out = torch.stack([one(k_BHTD).transpose(1, 2).flatten(2) for one, k_BHTD in zip(loops, heads_, strict=True)])
        wanted = [x, *(one.mixer for one in loops), *(one.size.weight for one in loops)]
        x_grad, *rest = torch.autograd.grad(out, wanted, grad)
        return [out, x_grad, torch.stack(rest[:LAYERS]), torch.stack(rest[LAYERS:]).transpose(1, 2)[:, None]]

    for one, other in zip(run_ours(), run_loops(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-3)  # sums of 2,048 tokens of either sign
    tokens = LAYERS * BATCH * TOKENS
    forward = 2 * tokens * (IN_HEADS * OUT_HEADS * IN_SIZE + OUT_HEADS * IN_SIZE * OUT_SIZE)
    yield Case(
        name="headwise projection 8 -> 4 heads, 28 layers, 4 x 512 tokens, forward + backward",
        ours=run_ours,
        loops=run_loops,
        bytes_moved=4
        * tokens
        * (3 * IN_HEADS * IN_SIZE + 2 * OUT_HEADS * OUT_SIZE),  # x twice, its gradient; out, grad
        flops=3 * forward,
        most_ms=300,
        yardstick_ms=583,
    )
