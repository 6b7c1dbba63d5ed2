"""Does the student's KV match the teacher's? R2, centred cosine, retrieval: a high cosine is not evidence.

Keys of one layer share a large common mean, so that two unrelated models reach a cosine of .9: what counts
is how much of the *variation* between positions is matched. `MatchMeter` takes in batches of source (the
student, projected) and target (the teacher) one by one:

* R2 = 1 - SS_res / SS_tot, SS_tot around the target's per-channel mean, both summed over channels and all
  real tokens of a layer. 1 is a match, 0 is what the constant mean reaches, below 0 is worse than that.
* cosine: mean over all real tokens, as it stands. Reported to be compared with:
* centred cosine: the same after subtracting each side's per-channel mean.
* retrieval: for a student vector, is the nearest target vector (euclidean) among the sampled positions
  its own? Beside it the chance level.

R2, cosine and the means see every token, in one pass. Centred cosine and retrieval use a uniform sample of
`pool_size` tokens a layer, seeded, the same however the texts are padded or batched.

Knows no model and no file; `evaluate.py` writes the fragments to match.json, beside those of a placebo.
Axes: L layers, B batch, T tokens, C channels, P pool.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError

FIGURES = ("r2", "centred_cosine", "retrieval_top1", "retrieval_chance", "cosine")

# Two targets closer than this share of the mean square deviation count as one in retrieval: causal models
# give every text that starts alike the same vectors, equal but for rounding.
SAME_TARGET = 1e-6


class MatchMeter:
    """Streaming figures for one teacher and one side (keys or values), per layer. Sums are in fp64."""

    def __init__(self, num_layers: int, pool_size: int = 1024, seed: int = 0) -> None:
        self.num_layers, self.pool_size = num_layers, pool_size
        self._generator = torch.Generator().manual_seed(seed)
        # tokens, cosines, SS_res and SS_tot so far
        self._count_L, self._cosine_L, self._residual_L, self._deviation_L = torch.zeros(4, num_layers).double()
        self._target_mean_LC: Tensor | None = None
        self._source_mean_LC: Tensor | None = None
        self._pool: tuple[Tensor, Tensor, Tensor] | None = None  # drawn keys [L, P], source and target [L, P, C]

    @torch.no_grad()
    def add(
        self,
        source_LBTC: Float[Tensor, "L B T C"],
        target_LBTC: Float[Tensor, "L B T C"],
        mask: Bool[Tensor, "B T"] | Bool[Tensor, "L B T"],
    ) -> None:
        """Take in one batch; only tokens where `mask` is True are read. Raises AlignmentError on shapes."""
        if source_LBTC.shape != target_LBTC.shape or source_LBTC.shape[0] != self.num_layers:
            raise AlignmentError(
                f"match: source {tuple(source_LBTC.shape)} and target {tuple(target_LBTC.shape)} "
                f"for {self.num_layers} layers",
                fix="align first: both are [layers, batch, tokens, channels]",
            )
        mask_LBT = mask.expand(source_LBTC.shape[:3])
        chosen_BT = mask_LBT.any(0)
        source_LNC = source_LBTC[:, chosen_BT].float()
        target_LNC = target_LBTC[:, chosen_BT].float()
        mask_LN = mask_LBT[:, chosen_BT]
        if source_LNC.shape[1] == 0:
            return
        if mask.ndim == 3:  # what masked slots hold must not be read: it may be NaN
            source_LNC = source_LNC.masked_fill(~mask_LN[..., None], 0)
            target_LNC = target_LNC.masked_fill(~mask_LN[..., None], 0)
        self._add_sums(source_LNC, target_LNC, mask_LN)
        self._add_to_pool(source_LNC, target_LNC, mask_LN)

    def _add_sums(self, source_LNC: Tensor, target_LNC: Tensor, mask_LN: Tensor) -> None:
        """Means and SS_tot merged as in Chan, Golub & LeVeque 1983, so that no large squares cancel."""
        device = source_LNC.device
        source, target, real_LN = source_LNC.double(), target_LNC.double(), mask_LN.double()
        old_L, new_L = self._count_L.to(device), real_LN.sum(1)
        source_mean_LC = torch.einsum("lnc,ln->lc", source, real_LN) / new_L.clamp_min(1)[:, None]
        target_mean_LC = torch.einsum("lnc,ln->lc", target, real_LN) / new_L.clamp_min(1)[:, None]
        centred_LN = (target - target_mean_LC[:, None]).square().sum(-1)
        deviation_L = (centred_LN * real_LN).sum(1)
        total_L1 = (old_L + new_L).clamp_min(1)[:, None]
        if self._target_mean_LC is None or self._source_mean_LC is None:
            self._source_mean_LC, self._target_mean_LC = source_mean_LC, target_mean_LC
        else:
            step_LC = target_mean_LC - self._target_mean_LC
            deviation_L = deviation_L + step_LC.square().sum(-1) * old_L * new_L / total_L1[:, 0]
            self._target_mean_LC = self._target_mean_LC + step_LC * new_L[:, None] / total_L1
            self._source_mean_LC = (
                self._source_mean_LC + (source_mean_LC - self._source_mean_LC) * new_L[:, None] / total_L1
            )
        cosine_LN = torch.nn.functional.cosine_similarity(source, target, dim=-1, eps=1e-30)
        self._deviation_L = self._deviation_L.to(device) + deviation_L
        self._residual_L = self._residual_L.to(device) + ((source - target).square().sum(-1) * real_LN).sum(1)
        self._cosine_L = self._cosine_L.to(device) + (cosine_LN * real_LN).sum(1)
        self._count_L = old_L + new_L

    def _add_to_pool(self, source_LNC: Tensor, target_LNC: Tensor, mask_LN: Tensor) -> None:
        """Every real token draws a key, the pool_size largest stay: a uniform sample without replacement."""
        key_N = torch.rand(mask_LN.shape[1], generator=self._generator, dtype=torch.float64)
        key_LN = key_N.to(mask_LN.device).expand(mask_LN.shape).masked_fill(~mask_LN, -1.0)
        key_LP, place_LP = key_LN.topk(min(self.pool_size, key_LN.shape[1]), dim=1)
        drawn = key_LP, _take_rows(source_LNC, place_LP), _take_rows(target_LNC, place_LP)
        if self._pool is not None:
            key_LP, source_LPC, target_LPC = (torch.cat(both, dim=1) for both in zip(self._pool, drawn, strict=True))
            key_LP, place_LP = key_LP.topk(min(self.pool_size, key_LP.shape[1]), dim=1)
            drawn = key_LP, _take_rows(source_LPC, place_LP), _take_rows(target_LPC, place_LP)
        self._pool = drawn

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """{"r2", "centred_cosine", "retrieval_top1", "retrieval_chance", "cosine", "tokens", "pool", "by_layer"}.

        The top figures are means over layers, `by_layer` has one dict of them a layer. `tokens` and `pool`
        are counts (the smallest over layers). A figure that is not defined (no tokens; a target that never
        varies) is NaN, and "reason" says why.
        """
        layers = [self._layer_figures(layer) for layer in range(self.num_layers)]
        out: dict[str, Any] = {name: math.fsum(x[name] for x in layers) / len(layers) for name in FIGURES}
        out["tokens"] = min(x["tokens"] for x in layers)
        out["pool"] = min(x["pool"] for x in layers)
        reasons = [f"layer {i}: {x['reason']}" for i, x in enumerate(layers) if "reason" in x]
        if reasons:
            out["reason"] = "; ".join(reasons)
        return out | {"by_layer": layers}

    def _layer_figures(self, layer: int) -> dict[str, Any]:
        count = float(self._count_L[layer])
        if count == 0 or self._target_mean_LC is None or self._source_mean_LC is None:
            return dict.fromkeys(FIGURES, math.nan) | {"tokens": 0, "pool": 0, "reason": "no real token"}
        assert self._pool is not None
        key_P, pooled_source_PC, pooled_target_PC = (part[layer] for part in self._pool)
        real_P = key_P >= 0
        source_PC = pooled_source_PC[real_P].double() - self._source_mean_LC[layer]
        raw_PC = pooled_source_PC[real_P].double() - self._target_mean_LC[layer]
        target_PC = pooled_target_PC[real_P].double() - self._target_mean_LC[layer]
        deviation = float(self._deviation_L[layer])
        mean_square = float(self._target_mean_LC[layer].square().sum()) + deviation / count
        out: dict[str, Any] = {
            "cosine": float(self._cosine_L[layer]) / count,
            "tokens": int(count),
            "pool": len(target_PC),
        }
        if deviation <= 1e-12 * mean_square * count:  # fp32 inputs: what is left is rounding
            why = "the target is the same at every token"
            return dict.fromkeys(FIGURES, math.nan) | out | {"reason": why}
        out["r2"] = 1 - float(self._residual_L[layer]) / deviation
        centred_P = torch.nn.functional.cosine_similarity(source_PC, target_PC, dim=-1, eps=1e-30)
        out["centred_cosine"] = float(centred_P.mean())
        out["retrieval_top1"], out["retrieval_chance"] = _retrieval(raw_PC, target_PC, SAME_TARGET * deviation / count)
        return out


def _take_rows(x_LNC: Tensor, place_LP: Tensor) -> Tensor:
    return x_LNC.gather(1, place_LP[..., None].expand(*place_LP.shape, x_LNC.shape[-1]))


def _retrieval(source_PC: Tensor, target_PC: Tensor, same_square: float) -> tuple[float, float]:
    """Share of source rows whose nearest target is their own (or equals it), and the same for a blind guess."""
    target_square_P = target_PC.square().sum(-1)
    nearest_P = (target_square_P - 2 * source_PC @ target_PC.T).argmin(1)  # |s|^2 is the same in a row
    hit_P = (target_PC[nearest_P] - target_PC).square().sum(-1) <= same_square
    square_PP = target_square_P[:, None] + target_square_P - 2 * target_PC @ target_PC.T
    same_PP = square_PP <= same_square
    same_PP.fill_diagonal_(True)
    return float(hit_P.double().mean()), float(same_PP.double().mean())


class TeacherMatch:
    """Keys and values of one teacher: two meters and the fragment of match.json they make."""

    def __init__(self, num_layers: int, pool_size: int = 1024, seed: int = 0) -> None:
        self.keys = MatchMeter(num_layers, pool_size, seed)
        self.values = MatchMeter(num_layers, pool_size, seed)

    def fragment(self) -> dict[str, Any]:
        """{"k": {figures}, "v": {figures}, "by_layer": [{"k": {figures}, "v": {figures}}, …]}"""
        sides = {"k": self.keys.figures(), "v": self.values.figures()}
        by_layer = {name: side.pop("by_layer") for name, side in sides.items()}
        return sides | {"by_layer": [{"k": k, "v": v} for k, v in zip(by_layer["k"], by_layer["v"], strict=True)]}
