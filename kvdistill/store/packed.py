"""How a teacher's targets are packed on disk, and batches of them read back.

Token-major rows without padding, so that one example is one contiguous
slice and a batch is a handful of copies: `kv` [tokens, layers, 2, heads, size], `segments` [tokens], `offsets`
[examples + 1], `nll` [examples], `topk_index`/`topk_logprob` [tokens, k]; where they were captured, `queries`
[tokens, layers, query heads, size] and `scores` [tokens, layers, kinds, heads]. Keys and queries are unrotated. The
layers' `scaling` and `rules` stand in the manifest's extra. Stores in a narrower dtype than the teacher's keep what is
left after each channel's mean, and the means in every shard (`kv_mean`, `queries_mean`, float32). Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdistill.core.errors import StoreError
from kvdistill.core.kv import KV, AttentionRule, RopeFrame
from kvdistill.core.targets import ChannelMeans, TeacherTargets
from kvdistill.store.shards import StoreReader


def pack_targets(
    targets: Sequence[TeacherTargets], dtype: torch.dtype, means: ChannelMeans | None = None
) -> dict[str, Tensor]:
    """The shard tensors of these batches' examples, padding dropped, in order. means: taken out, and stored beside."""
    packed: dict[str, list[Tensor]] = {}

    def put(name: str, value: Tensor) -> None:
        packed.setdefault(name, []).append(value)

    for batch in targets:
        real_BS = batch.segments_BS > 0
        put("lengths", real_BS.sum(1))
        put("segments", batch.segments_BS[real_BS].to(torch.int8))
        if batch.kv is not None:
            layers = [torch.stack([k, v], dim=0) for k, v in zip(batch.kv.keys, batch.kv.values, strict=True)]
            kv_BSM2GE = torch.stack(layers, dim=0).permute(2, 4, 0, 1, 3, 5)  # [M,2,B,G,S,E] -> [B,S,M,2,G,E]
            kv_NM2GE = kv_BSM2GE[real_BS]
            put("kv", kv_NM2GE.to(dtype) if means is None else (kv_NM2GE.float() - means.kv_M2GE).to(dtype))
            if batch.kv.queries:
                queries_BSMHE = torch.stack(batch.kv.queries, dim=0).permute(1, 3, 0, 2, 4)
                queries_NMHE = queries_BSMHE[real_BS]
                if means is not None and means.queries_MHE is not None:
                    queries_NMHE = queries_NMHE.float() - means.queries_MHE
                put("queries", queries_NMHE.to(dtype))
        if batch.scores_BSMRG is not None:
            put("scores", batch.scores_BSMRG[real_BS].float())
        if batch.nll_B is not None:
            put("nll", batch.nll_B.float())
        if batch.topk_index_BSK is not None and batch.topk_logprob_BSK is not None:
            put("topk_index", batch.topk_index_BSK[real_BS].to(torch.int32))
            put("topk_logprob", batch.topk_logprob_BSK[real_BS].float())
    tensors = {name: torch.cat(parts) for name, parts in packed.items()}
    lengths = tensors.pop("lengths")
    if means is not None and "kv" in tensors:
        tensors["kv_mean"] = means.kv_M2GE
        if means.queries_MHE is not None:
            tensors["queries_mean"] = means.queries_MHE
    tensors["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return tensors


class TargetReader:
    """Batches of stored targets by example number. `extra` of the manifest: layers, rope, scaling (may be missing)."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        store = StoreReader(folder, verify=verify)
        self.extra: Mapping[str, Any] = store.extra
        self.layers: tuple[int, ...] = tuple(store.extra["layers"])
        self.rope: RopeFrame = store.extra["rope"]
        scaling = store.extra.get("scaling")  # stores made before queries were kept have none
        self.scaling: tuple[float, ...] | None = None if scaling is None else tuple(map(float, scaling))
        self.rules = tuple(map(AttentionRule.from_json, store.extra.get("rules", ())))  # empty in such stores, too
        self._shards = store.shards
        self._means = {name: self._shards[0].get(f"{name}_mean") for name in ("kv", "queries")} if self._shards else {}
        self._offsets = [shard["offsets"].tolist() for shard in self._shards]
        self._place = [(s, i) for s, offsets in enumerate(self._offsets) for i in range(len(offsets) - 1)]
        self.num_examples = len(self._place)
        expected = store.extra.get("examples", self.num_examples)
        if self.num_examples != expected:
            what = f"the shards hold {self.num_examples} examples, {expected} were captured"
            raise StoreError(what, place=str(folder), fix=f"delete {folder} and run the stage that wrote it again")

    def nll(self) -> Tensor | None:
        """Mean gold NLL of every example, or None where it was not captured."""
        if not all("nll" in shard for shard in self._shards):
            return None
        return torch.cat([shard["nll"] for shard in self._shards])

    def read(
        self,
        examples: Sequence[int],
        *,
        kv: bool = True,
        logits: bool = True,
        queries: bool = True,
        scores: bool = True,
    ) -> TeacherTargets:
        """Right-padded targets of these examples [B, S, ...], 0 at padding; positions count from 0.

        Each part may be left on disk where an arm does not use it (queries are read only together with kv), and is
        None (queries: empty) where it was not captured.
        """
        rows = [self._place[i] for i in examples]
        spans = [(self._offsets[s][i], self._offsets[s][i + 1]) for s, i in rows]
        B, S = len(rows), max(b - a for a, b in spans)
        wanted = {"segments": True, "kv": kv, "queries": kv and queries, "scores": scores}
        wanted |= {"topk_index": logits, "topk_logprob": logits}
        out: dict[str, Tensor] = {}
        for name, want in wanted.items():
            if not want or name not in self._shards[0]:
                continue
            source, mean = self._shards[0][name], self._means.get(name)
            dtype = source.dtype if mean is None else torch.float32
            padded = source.new_zeros((B, S, *source.shape[1:]), dtype=dtype)
            for b, ((shard, _), (start, end)) in enumerate(zip(rows, spans, strict=True)):
                padded[b, : end - start] = self._shards[shard][name][start:end]
                if mean is not None:
                    padded[b, : end - start] += mean
            out[name] = padded
        nll = torch.stack([self._shards[s]["nll"][i] for s, i in rows]) if "nll" in self._shards[0] else None
        segments_BS = out["segments"].long()
        return TeacherTargets(
            segments_BS=segments_BS,
            kv=self._as_kv(out["kv"], out.get("queries"), segments_BS) if "kv" in out else None,
            nll_B=nll,
            topk_index_BSK=out["topk_index"].long() if "topk_index" in out else None,
            topk_logprob_BSK=out.get("topk_logprob"),
            scores_BSMRG=out.get("scores"),
        )

    def _as_kv(self, kv_BSM2GE: Tensor, queries_BSMHE: Tensor | None, segments_BS: Tensor) -> KV:
        layers = range(kv_BSM2GE.shape[2])
        positions = torch.arange(segments_BS.shape[1]).expand_as(segments_BS)
        queries = () if queries_BSMHE is None else tuple(queries_BSMHE[:, :, m].transpose(1, 2) for m in layers)
        return KV(
            keys=tuple(kv_BSM2GE[:, :, m, 0].transpose(1, 2) for m in layers),
            values=tuple(kv_BSM2GE[:, :, m, 1].transpose(1, 2) for m in layers),
            mask_BT=segments_BS > 0,
            positions_BT=positions,
            rope=self.rope,
            queries=queries,
            layers=self.layers,
            scaling=self.scaling,
            rules=self.rules,
        )
