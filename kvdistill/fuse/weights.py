"""Weights per teacher (`Fusion` and its strategies), and the weighted mean of N caches.

A strategy is one small frozen dataclass with `weights_NLBT`; `FUSION_STRATEGIES` (in `__init__`) names them.

Axes: N teachers, L layers, B batch, T tokens, C channels; 1 where a strategy does not tell them apart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError, DataError, RecipeError
from kvdistill.core.recipe import FuseRecipe
from kvdistill.fuse.similarity import Grain, Metric, similarity_weights

# -- the weights themselves -------------------------------------------------------------------


def fixed_weights(
    weights: Sequence[int | float] | None, num_teachers: int, batch: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "N B"]:
    """The same weights for every example, normalised to sum 1; None: equal. Raises RecipeError."""
    if num_teachers < 1:
        raise RecipeError("there is no teacher to weight", place="arms.ARM.teachers", fix="name at least one teacher")
    chosen = [1.0] * num_teachers if weights is None else list(weights)
    if len(chosen) != num_teachers:
        raise RecipeError(
            f"{len(chosen)} weights for {num_teachers} teachers",
            place="fuse.weights",
            fix=f"give {num_teachers} numbers, one per teacher in the arm's order, or leave it out for equal weights",
        )
    if any(not math.isfinite(w) or w < 0 for w in chosen) or sum(chosen) <= 0:
        raise RecipeError(
            f"weights {chosen} cannot be normalised", place="fuse.weights", fix="finite numbers >= 0, at least one > 0"
        )
    weight_N = torch.tensor(chosen, dtype=torch.float64)
    return (weight_N / weight_N.sum()).float().to(device)[:, None].expand(num_teachers, batch)


@torch.no_grad()
def competence_weights(nll_BN: Float[Tensor, "B N"], temperature: int | float = 1.0) -> Float[Tensor, "B N"]:
    """softmax over teachers of -NLL / temperature, per example: who explains the gold answer.

    nll_BN: mean gold NLL (nats per token). A teacher without a finite NLL for an example gets weight 0
    there; an example without any finite NLL raises DataError.
    """
    finite_BN = nll_BN.isfinite()
    empty_B = ~finite_BN.any(dim=1)
    if empty_B.any():
        rows = empty_B.nonzero().squeeze(1).tolist()
        raise DataError(
            f"no teacher has a finite NLL for {len(rows)} of {len(nll_BN)} examples (rows {rows[:8]} of the batch)",
            place="fuse.fusion_strategy: competence",
            fix="every example needs at least one completion token and one working teacher; look at the captured nll",
        )
    return (-nll_BN.float() / temperature).masked_fill(~finite_BN, float("-inf")).softmax(dim=1)


# -- strategies -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FusionInputs:
    """What strategies may look at; `Fusion.needs` says which of them one does."""

    batch: int
    device: torch.device | str
    nll_BN: Tensor | None = None
    query_N_LBTC: Sequence[Tensor] | None = None
    mask_BT: Tensor | None = None


class AbstractStrategy(ABC):
    """Weights of `num_teachers` teachers for one batch, summing to 1 over teachers."""

    needs: frozenset[str] = frozenset()

    @classmethod
    @abstractmethod
    def build(
        cls, recipe: FuseRecipe, num_teachers: int, num_layers: int, prototypes: Sequence[Tensor] | None, grain: Grain
    ) -> AbstractStrategy: ...

    @abstractmethod
    def weights_NLBT(self, inputs: FusionInputs) -> Tensor:
        """[N, L or 1, B, T or 1]"""


@dataclass(frozen=True)
class FixedStrategy(AbstractStrategy):
    """The recipe's weights, or equal ones."""

    share: tuple[float, ...]

    @classmethod
    def build(cls, recipe, num_teachers, num_layers, prototypes, grain) -> FixedStrategy:
        return cls(tuple(fixed_weights(recipe.weights, num_teachers, batch=1).squeeze(1).tolist()))

    def weights_NLBT(self, inputs: FusionInputs) -> Tensor:
        share_N = torch.tensor(self.share, device=inputs.device)
        return share_N[:, None, None, None].expand(len(self.share), 1, inputs.batch, 1)


@dataclass(frozen=True)
class CompetenceStrategy(AbstractStrategy):
    """softmax(-teacher NLL on gold / temperature), per example."""

    num_teachers: int
    temperature: float
    needs = frozenset({"nll_BN"})

    @classmethod
    def build(cls, recipe, num_teachers, num_layers, prototypes, grain) -> CompetenceStrategy:
        return cls(num_teachers, recipe.temperature)

    def weights_NLBT(self, inputs: FusionInputs) -> Tensor:
        assert inputs.nll_BN is not None
        if inputs.nll_BN.shape != (inputs.batch, self.num_teachers):
            raise AlignmentError(
                f"NLL {tuple(inputs.nll_BN.shape)} for {inputs.batch} examples and {self.num_teachers} teachers",
                place="fuse.fusion_strategy: competence",
                fix="stack the teachers' nll_B along the last axis",
            )
        return competence_weights(inputs.nll_BN.to(inputs.device), self.temperature).T[:, None, :, None]


@dataclass(frozen=True)
class SimilarityStrategy(AbstractStrategy):
    """softmax(sim(student query, teacher prototype) / temperature). Measured to prefer the wrong teacher."""

    prototypes_N_LPC: tuple[Tensor, ...]
    metric: Metric
    temperature: float
    grain: Grain
    needs = frozenset({"query_N_LBTC", "mask_BT"})

    @classmethod
    def build(cls, recipe, num_teachers, num_layers, prototypes, grain) -> SimilarityStrategy:
        given = () if prototypes is None else tuple(p.detach() for p in prototypes)
        if len(given) != num_teachers or any(p.ndim != 3 or p.shape[0] != num_layers for p in given):
            raise AlignmentError(
                f"prototypes {[tuple(p.shape) for p in given]} for {num_teachers} teachers and {num_layers} layers",
                place="fuse.fusion_strategy: similarity",
                fix="fit_prototypes once per teacher: one [layers, prototypes, channels] tensor each",
            )
        return cls(given, recipe.metric, recipe.temperature, grain)

    def weights_NLBT(self, inputs: FusionInputs) -> Tensor:
        assert inputs.query_N_LBTC is not None and inputs.mask_BT is not None
        prototypes = [p.to(inputs.device) for p in self.prototypes_N_LPC]
        return similarity_weights(
            inputs.query_N_LBTC, inputs.mask_BT, prototypes, self.metric, self.temperature, self.grain
        )


@dataclass(frozen=True)
class Fusion:
    """Weights of named teachers, whatever the strategy."""

    teacher_names: tuple[str, ...]
    strategy: AbstractStrategy

    @property
    def needs(self) -> frozenset[str]:
        """Which of `weights`' optional arguments this strategy looks at; the rest need not be computed."""
        return self.strategy.needs

    @torch.no_grad()
    def weights(
        self,
        batch: int,
        device: torch.device | str = "cpu",
        *,
        nll_BN: Float[Tensor, "B N"] | None = None,
        query_N_LBTC: Sequence[Tensor] | None = None,
        mask_BT: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "N #L B #T"]:
        """Weights that sum to 1 over the teachers, without gradient: [N, L or 1, B, T or 1].

        nll_BN: teachers' mean gold NLL. query_N_LBTC: the student's vectors in each teacher's space, in the
        teachers' order (the same tensor N times where they meet in student space). mask_BT: its real tokens.
        """
        inputs = FusionInputs(batch, device, nll_BN, query_N_LBTC, mask_BT)
        missing = sorted(name for name in self.needs if getattr(inputs, name) is None)
        if missing:
            raise AlignmentError(
                f"{type(self.strategy).__name__} needs {', '.join(missing)}",
                place="fuse.fusion_strategy",
                fix="pass what Fusion.needs names to Fusion.weights",
            )
        return self.strategy.weights_NLBT(inputs)


# -- N caches into one ------------------------------------------------------------------------


def fuse_caches(
    targets: Sequence[Float[Tensor, "L B T C"]],
    masks: Sequence[Bool[Tensor, "B T"]] | Sequence[Bool[Tensor, "L B T"]],
    weights: Float[Tensor, "N #L #B #T"],
) -> tuple[Float[Tensor, "L B T C"], Bool[Tensor, "B T"] | Bool[Tensor, "L B T"]]:
    """Weighted mean over the teachers that have something at a slot: fused [L, B, T, C] and its mask.

    masks: True where that teacher's target holds something. Weights are renormalised over the teachers
    present; a slot where no present teacher has weight is masked and holds 0. What absent teachers hold is
    never read into the sum (it may be NaN). The mask is [B, T] unless masks or weights tell layers apart.
    Differentiable in the targets (a trainable projector), summed in fp32, returned in the targets' dtype.
    """
    if not (len(targets) == len(masks) == weights.shape[0]) or len({tuple(t.shape) for t in targets}) != 1:
        shapes = [tuple(t.shape) for t in targets]
        raise AlignmentError(
            f"targets {shapes}, {len(masks)} masks, {weights.shape[0]} weights",
            place="fuse.fuse_at: kv",
            fix="one target of one shape (student space), one mask and one weight per teacher",
        )
    present = [mask if mask.ndim == 3 else mask[None] for mask in masks]
    share = [weight * here for weight, here in zip(weights.detach().float(), present, strict=True)]
    total = torch.stack(torch.broadcast_tensors(*share)).sum(0)
    fused: Tensor | None = None
    for target, here, part in zip(targets, present, share, strict=True):
        factor = torch.where(total > 0, part / total.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        term = target.masked_fill(~here[..., None], 0).float() * factor[..., None]
        fused = term if fused is None else fused + term
    assert fused is not None
    fused_mask = (total > 0).expand(-1, *targets[0].shape[1:3])
    per_layer = weights.shape[1] > 1 or any(mask.ndim == 3 for mask in masks)
    return fused.to(targets[0].dtype), fused_mask.expand(targets[0].shape[:3]) if per_layer else fused_mask[0]
