"""Attention rows a block at a time: no tensor of queries x keys over all layers ever exists.

Layers and batch are one axis of N samples. A *chunk* is a few samples, as many as fit a budget of bytes; within it
queries are taken `ROWS` at a time against the keys they may see, so that causal attention costs little more than the
half it needs. What is computed from the rows (a divergence, an output, a weight per key) is the caller's.

Keys are copied head-major once a chunk and queries once a block: plain batched products then run at full speed, in
float32 at least whatever the inputs are, autocast or not. A key that is not allowed has half the most negative finite
number added to its logit: its probability is exactly 0, and a row without any allowed key is uniform on both sides
instead of NaN.

Rules (`core.kv.AttentionRule`) of a sample's layer say how far it looks, cap its logits, and give each query head a
sink: one column more, behind the keys, that belongs to no token.

Axes: N samples, T tokens, H key heads, G queries per key head (Q = H x G query heads), D size, R rows of one block,
S keys of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import AttentionRule, require_unbiased
from kvdistill.core.runtime import sum_dtype

ROWS = 64  # fewer save more of the upper triangle; below 64 the products slow down
CHUNK_BYTES = 2 << 20  # a block of logits then stays in the cache between product and softmax


@dataclass(frozen=True)
class AttentionBlocks:
    """How N samples' attention is cut up; the methods give one block's tensors.

    num_heads, head_size: of the keys, H and D. group: queries per key head G. scaling: what q.k is multiplied by.
    window_N: a query looks at keys less than so many places away. cap_N: of logits. sink_NQ: logits of sinks.
    """

    mask_NT: Tensor
    num_heads: int
    head_size: int
    group: int
    scaling: float
    causal: bool
    chunk_bytes: int
    dtype: torch.dtype
    window_N: Tensor | None = None
    cap_N: Tensor | None = None
    sink_NQ: Tensor | None = None

    def chunks(self) -> Iterator[slice]:
        """Slices of one sample or more; one block of logits and one copy of the keys stay within the budget."""
        N, T = self.mask_NT.shape
        numbers = self.num_heads * T * max(self.group * min(ROWS, T), self.head_size)
        step = max(1, self.chunk_bytes // max(1, numbers * self.dtype.itemsize))
        return (slice(start, min(start + step, N)) for start in range(0, N, step))

    def rows(self) -> Iterator[tuple[slice, int]]:
        """(the block's queries, the number of keys they may see)."""
        T = self.mask_NT.shape[1]
        for start in range(0, T, ROWS):
            end = min(start + ROWS, T)
            yield slice(start, end), end if self.causal else T

    def head_major(self, x_NTHD: Tensor) -> Tensor:
        """[N, T, H, D] -> [N * H, T, D], in the dtype sums are made in."""
        return x_NTHD.to(self.dtype).transpose(1, 2).reshape(-1, x_NTHD.shape[1], x_NTHD.shape[3])

    def put_heads(self, out_NTHD: Tensor, x: Tensor) -> None:
        """The inverse of `head_major`: x [N * H, T, D] to its place in `out_NTHD`."""
        out_NTHD.copy_(x.view(-1, self.num_heads, *x.shape[1:]).transpose(1, 2))

    def query_rows(self, q_NTQD: Tensor, rows: slice) -> Tensor:
        """One block's queries as [N * H, R * G, D]: those that share a key head are further rows of one product."""
        q_NRHGD = q_NTQD[:, rows].to(self.dtype).unflatten(2, (self.num_heads, self.group))
        return q_NRHGD.transpose(1, 2).reshape(q_NTQD.shape[0] * self.num_heads, -1, q_NTQD.shape[3])

    def put_rows(self, out_NTQD: Tensor, rows: slice, x: Tensor) -> None:
        """The inverse of `query_rows`: x [N * H, R * G, D] to its place in `out_NTQD`."""
        place_NRHGD = out_NTQD[:, rows].unflatten(2, (self.num_heads, self.group))
        place_NRHGD.copy_(self.by_row(x).transpose(1, 2))

    def bias(self, chunk: slice, rows: slice, num_keys: int) -> Tensor:
        """[N, 1, R, 1, S]: 0 where a query may see a key, half the most negative number where it may not."""
        allowed = self.mask_NT[chunk, None, :num_keys]
        keys = torch.arange(num_keys, device=allowed.device)
        ahead = keys[rows, None] - keys
        if self.causal:
            allowed = allowed & (ahead >= 0)
        if self.window_N is not None:
            allowed = allowed & (ahead.abs() < self.window_N[chunk, None, None])
        zero = torch.zeros((), dtype=self.dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(self.dtype).min / 2)[:, None, :, None]

    def by_row(self, x: Tensor) -> Tensor:
        """[N * H, R * G, ...] -> [N, H, R, G, ...], a view."""
        return x.view(-1, self.num_heads, x.shape[1] // self.group, self.group, *x.shape[2:])

    def row_weight(self, weight_NT: Tensor, chunk: slice, rows: slice) -> Tensor:
        """A number per sample and row as [N, 1, R, 1, 1], to multiply `by_row` with."""
        return weight_NT[chunk, rows].to(self.dtype)[:, None, :, None, None]


class ChunkSide:
    """One side's queries and keys of one chunk, and in a backward pass the sums of their gradients."""

    def __init__(self, blocks: AttentionBlocks, chunk: slice, q: Tensor, k: Tensor) -> None:
        """q [L, B, T, Q, D], k [L, B, T, H, D]."""
        self.blocks, self.chunk = blocks, chunk
        self.q_NTQD = q.flatten(0, 1)[chunk]
        self.keys = blocks.head_major(k.flatten(0, 1)[chunk])
        self.rows = slice(0, 0)
        self.q_rows = self.grad_keys = torch.empty(0)
        self.num_keys = 0  # of the block
        self.cap_slope: Tensor | None = None

    def logits(self, rows: slice, bias: Tensor) -> Tensor:
        """scaling x q.k + bias as [N * H, R * G, S], a tensor of its own; `rows` are the block from now on.

        S + 1 columns where there is a sink, the last one its logit.
        """
        blocks, self.num_keys = self.blocks, bias.shape[-1]
        self.rows, self.q_rows = rows, blocks.query_rows(self.q_NTQD, rows)
        logits = torch.bmm(self.q_rows, self.keys[:, : bias.shape[-1]].mT).mul_(blocks.scaling)
        by_row = blocks.by_row(logits)
        if blocks.cap_N is not None:
            cap = blocks.cap_N[self.chunk].to(logits)[:, None, None, None, None]
            by_row.div_(cap).tanh_()
            self.cap_slope = 1 - by_row.square()
            by_row.mul_(cap)
        by_row.add_(bias)
        if blocks.sink_NQ is None:
            return logits
        sink_NHG = blocks.sink_NQ[self.chunk].to(logits).unflatten(1, (blocks.num_heads, blocks.group))
        column = sink_NHG[:, :, None, :, None].expand(*by_row.shape[:-1], 1)
        return torch.cat([by_row, column], dim=-1).flatten(2, 3).flatten(0, 1)

    def add_gradient(self, slope: Tensor, grad_q: Tensor) -> None:
        """slope [N * H, R * G, S]: gradient of the block's logits. Queries' goes to its place in grad_q."""
        slope = slope[..., : self.num_keys]  # a sink has no key to learn
        if self.cap_slope is not None:
            self.blocks.by_row(slope).mul_(self.cap_slope)
        slope = slope.mul_(self.blocks.scaling)
        to_rows = torch.bmm(slope, self.keys[:, : self.num_keys])
        self.blocks.put_rows(grad_q.flatten(0, 1)[self.chunk], self.rows, to_rows)
        self.grad_keys = add_to_keys(self.grad_keys, torch.bmm(slope.mT, self.q_rows), self.keys)

    def finish(self, grad_k: Tensor) -> None:
        """The keys' gradient, complete, to its place."""
        self.blocks.put_heads(grad_k.flatten(0, 1)[self.chunk], self.grad_keys)


def add_to_keys(total: Tensor, part: Tensor, keys: Tensor) -> Tensor:
    """total + part, where part holds the first few keys only; an empty total is zeros like `keys`."""
    total = total if total.numel() else torch.zeros_like(keys, memory_format=torch.contiguous_format)
    total[:, : part.shape[1]] += part
    return total


def attention_blocks(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    scaling: float | None,
    causal: bool,
    chunk_bytes: int,
    rules: Sequence[AttentionRule] = (),
) -> AttentionBlocks:
    """How attention of q [L, B, T, Q, D] to k [L, B, T, H, D] is cut up.

    rules: of each layer; unset: `causal` says all. Raises AlignmentError where the shapes do not fit, and for rules
    by which attention cannot be made again.
    """
    fits = q.ndim == k.ndim == 5 and q.shape[:3] == k.shape[:3] and q.shape[4] == k.shape[4]
    if not fits or q.shape[3] % k.shape[3] or mask.shape not in (k.shape[1:3], k.shape[:3]):
        raise AlignmentError(
            f"attention: queries {tuple(q.shape)}, keys {tuple(k.shape)}, mask {tuple(mask.shape)}",
            fix="queries and keys are [layers, batch, tokens, heads, size], query heads a multiple of key heads, "
            "the mask [batch, tokens]",
        )
    require_unbiased(rules)
    assert not rules or len(rules) == len(k)
    B, T, far = k.shape[1], k.shape[2], 1e30  # a cap so far away changes nothing
    windows = [T if rule.window is None else rule.window for rule in rules]
    caps = [far if rule.cap is None else rule.cap for rule in rules]
    sinks = [rule.sink for rule in rules]
    none = torch.full((q.shape[3],), torch.finfo(torch.float32).min / 2, device=k.device)  # a sink that takes nothing
    per_layer: dict[str, Tensor] = {}
    if any(window < T for window in windows):
        per_layer["window_N"] = torch.tensor(windows, device=k.device)
    if any(cap < far for cap in caps):
        per_layer["cap_N"] = torch.tensor(caps, device=k.device)
    if any(sink is not None for sink in sinks):
        per_layer["sink_NQ"] = torch.stack([none if sink is None else sink.to(none) for sink in sinks])
    return AttentionBlocks(
        mask_NT=mask.expand(k.shape[:3]).flatten(0, 1),
        num_heads=k.shape[3],
        head_size=k.shape[4],
        group=q.shape[3] // k.shape[3],
        scaling=k.shape[4] ** -0.5 if scaling is None else scaling,
        causal=all(rule.causal for rule in rules) if rules else causal,
        chunk_bytes=chunk_bytes,
        dtype=sum_dtype(q, k),
        **{name: part.repeat_interleave(B, dim=0) for name, part in per_layer.items()},
    )


def full_precision(x: Tensor) -> torch.autocast:
    """Products of float32 stay float32 under a training step's autocast."""
    return torch.autocast(x.device.type, enabled=False)
