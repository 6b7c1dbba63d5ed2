"""The common space itself: one linear adapter per model into it, and the way back.

Made by `SharedSpaceFit` or read from tensors; here it projects, takes in further models and measures itself. Frozen:
adapters get no gradient, their inputs do. Knows nothing of how it was fitted, of layer numbers or of losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvdistill.align.ridge import check_penalty
from kvdistill.align.shared.gcca import whiteners
from kvdistill.align.shared.moments import PairedMoments, numerical_rank, require_same_tokens
from kvdistill.core.errors import AlignmentError

DEAD_SHARE = 1e-10


@dataclass(frozen=True)
class SharedAgreement:
    """How well models meet in the shared space, on the tokens it was measured on.

    correlation_LZ: mean over pairs of models of the correlation of one Z channel; NaN where it is constant.
    r2: per model [L], the share of its channels' variance that another model's Z predicts through `back`, mean over
    the other models. 0 is no better than the channel's mean on these tokens, below 0 is worse.
    """

    correlation_LZ: Tensor
    r2: dict[str, Tensor]

    @property
    def mean_correlation(self) -> float:
        return float(self.correlation_LZ.nanmean())

    @property
    def mean_r2(self) -> float:
        return float(torch.stack(list(self.r2.values())).mean())


class LayerFit(NamedTuple):
    """One layer slot of one model in fp64: see `ModelAdapter`."""

    weight_CZ: Tensor
    shift_Z: Tensor
    back_ZC: Tensor
    back_shift_C: Tensor


@final
class ModelAdapter(nn.Module):
    """One model's affine map into the space and back, per layer slot.

    State: `weight` [L, C, Z] and `shift` [L, Z] (parameters, frozen), `back_weight` [L, Z, C] and `back_shift` [L, C].
    """

    back_weight: Tensor
    back_shift: Tensor

    def __init__(self, num_layers: int, num_channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_channels, size), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(num_layers, size), requires_grad=False)
        self.register_buffer("back_weight", torch.zeros(num_layers, size, num_channels))
        self.register_buffer("back_shift", torch.zeros(num_layers, num_channels))

    @torch.no_grad()
    def set_layer(self, layer: int, fit: LayerFit) -> None:
        for place, value in zip((self.weight, self.shift, self.back_weight, self.back_shift), fit, strict=True):
            place[layer].copy_(value)


@final
class SharedSpace(nn.Module):
    """Adapters of N models into Z channels per layer slot. N models have N adapters; pairs have none.

    State, for safetensors: `adapters.of_NAME.weight`, `.shift`, `.back_weight`, `.back_shift` (dots and percent signs
    in names as %2E and %25) and `correlation` [L, Z], the mean correlation of pairs on the calibration tokens: for
    choosing a size; it flatters, `agreement` on other texts does not.
    `reason` says what a reader of its figures should know (empty: nothing).

    What a frozen adapter can and cannot do for a student in training. Source = project(student), target =
    project(teacher): the target does not move, so the student cannot collapse, and the gradient is exact (the adapter
    is linear). But the space was chosen from the *initial* student: its first channels are what student and teacher
    already agree on and leave little to learn; the channels of low correlation carry what only the teacher knows, and
    there the student's side is a fixed direction that it has to fill. A small Z therefore keeps the student where it
    is, a large one teaches it. Whatever the teacher or the student does outside its Z directions is neither taught nor
    held. The standardisation too belongs to the initial student: as it trains, project(student) may leave mean 0 and
    std 1, which the loss against the teacher's pulls back. `agreement` on fresh batches says how far it has gone;
    fitting again with the present student gives another space, with other targets.
    """

    correlation: Tensor

    def __init__(self, num_channels: Mapping[str, int], num_layers: int, size: int) -> None:
        """num_channels: C_n by model name. The adapters are to be fitted or loaded."""
        super().__init__()
        self.num_layers, self.size, self.reason, self.is_fitted = num_layers, size, "", False
        self.num_channels: dict[str, int] = {}
        self.adapters = nn.ModuleDict()
        for name, channels in num_channels.items():
            self._add_adapter(name, channels)
        self.register_buffer("correlation", torch.full((num_layers, size), torch.nan))
        self.register_load_state_dict_post_hook(_mark_loaded)

    def _add_adapter(self, name: str, num_channels: int) -> ModelAdapter:
        adapter = ModelAdapter(self.num_layers, num_channels, self.size)
        self.adapters[_key(name)] = adapter
        self.num_channels[name] = num_channels
        return adapter

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> SharedSpace:
        """Back from `state_dict()`: models and sizes are read off it. AlignmentError where it is something else."""
        ends = {key: x for key, x in tensors.items() if key.startswith("adapters.of_") and key.endswith(".weight")}
        if not ends or "correlation" not in tensors:
            raise AlignmentError("these tensors hold no shared space", fix="save `SharedSpace.state_dict()`")
        found = {_name(key.split(".")[1]): x.shape[1] for key, x in ends.items()}
        space = SharedSpace(found, *tensors["correlation"].shape)
        space.load_state_dict(dict(tensors))
        return space

    @property
    def names(self) -> list[str]:
        return list(self.num_channels)

    @property
    def num_parameters(self) -> int:
        """Weights and shifts of all adapters: L · Z · (C_n + 1) summed over models. The ways back are not counted."""
        return sum(p.numel() for p in self.parameters())

    def adapter(self, name: str) -> ModelAdapter:
        """AlignmentError where the space has no such model."""
        if name not in self.num_channels:
            raise AlignmentError(
                f"the shared space has no model {name!r}", fix=f"one of {', '.join(self.names)}, or add_model first"
            )
        found = self.adapters[_key(name)]
        assert isinstance(found, ModelAdapter)
        return found

    def project(self, name: str, x: Float[Tensor, "L *N C"]) -> Float[Tensor, "L *N Z"]:
        """A model's channels in the shared space, fp32, mean 0 and std 1 per Z channel on the calibration tokens.

        Gradient to x. Raises AlignmentError for an unknown model, other shapes, or a space that was never fitted.
        """
        adapter = self.adapter(name)
        self._require(x, self.num_channels[name], f"model {name!r}")
        return _affine(x, adapter.weight, adapter.shift)

    def back(self, name: str, z: Float[Tensor, "L *N Z"]) -> Float[Tensor, "L *N C"]:
        """Least-squares estimate of a model's channels from Z: back("student", project("teacher", x)), say.

        The regression is that on the *other* models' Z (all of them pooled, ridge), so it is cautious where models
        disagree: of unrelated models it gives the channels' means.
        """
        adapter = self.adapter(name)
        self._require(z, self.size, "Z")
        return _affine(z, adapter.back_weight, adapter.back_shift)

    def _require(self, x: Tensor, num_channels: int, whose: str) -> None:
        if not self.is_fitted:
            raise AlignmentError("the shared space was never fitted", fix="SharedSpaceFit(...).solve, or load one")
        if x.ndim < 2 or (x.shape[0], x.shape[-1]) != (self.num_layers, num_channels):
            raise AlignmentError(
                f"{whose} as {tuple(x.shape)}, the shared space has {self.num_layers} layer slots of "
                f"{num_channels} channels",
                fix="tensors are [layer slots, ..., channels]",
            )

    @torch.no_grad()
    def add_model(self, name: str, batches: Iterable[tuple[Mapping[str, Tensor], Tensor]], *, l2: float = 1e-2) -> None:
        """Take in one more model; the others stay as they are, to the bit.

        batches: ({name: [L, B, T, C], and at least one model of the space}, mask [B, T]), all with the same models.
        Ridge from the new model's channels to the known ones' Z (their mean), then std 1 per Z channel; `back` is the
        ridge from that Z. l2 > 0 is relative to the mean variance of the new channels. Std 1 also holds for a model
        that knows little of the space: `agreement` on other texts tells (R² at or below 0).
        Raises AlignmentError where the name is taken, nothing known comes with it, tokens differ or are too few;
        RecipeError for l2 <= 0.
        """
        check_penalty(l2)
        if name in self.num_channels:
            raise AlignmentError(f"the shared space has a model {name!r} already", fix="give the new one its own name")
        if not self.is_fitted:
            raise AlignmentError(f"{name!r} cannot join a space that was never fitted", fix="fit or load it first")
        moments: PairedMoments | None = None
        sizes: dict[str, int] = {}
        for channels, mask_BT in batches:
            if moments is None:
                known = {one: self.num_channels[one] for one in channels if one in self.num_channels}
                if name not in channels or not known:
                    raise AlignmentError(
                        f"{name!r} comes with {', '.join(map(repr, channels)) or 'nothing'}",
                        fix=f"each batch needs {name!r} and one of {', '.join(self.names)} at the same tokens",
                    )
                sizes = {name: channels[name].shape[-1]} | known
                moments = PairedMoments((sizes[name], self.size), self.num_layers)
            require_same_tokens(channels, mask_BT, sizes, self.num_layers)
            known_z = torch.stack([self.project(one, channels[one]) for one in sizes if one != name]).mean(0)
            moments.update([channels[name], known_z], mask_BT)
        if moments is None:
            raise AlignmentError(f"no batches to add {name!r} with", fix="give calibration batches with a known model")
        require_enough_tokens(moments.num_tokens, {name: sizes[name]})
        fits = [_fit_onto(*moments.covariance(layer), sizes[name], l2, name) for layer in range(self.num_layers)]
        adapter = self._add_adapter(name, sizes[name]).to(self.correlation.device)
        for layer, fit in enumerate(fits):
            adapter.set_layer(layer, fit)

    @torch.no_grad()
    def agreement(self, channels: Mapping[str, Tensor], mask_BT: Bool[Tensor, "B T"]) -> SharedAgreement:
        """How two or more models of the space meet on these tokens; on held-out texts it means something.

        Raises AlignmentError for fewer than two models or real tokens, or different tokens.
        """
        sizes = {name: self.adapter(name).weight.shape[1] for name in channels}
        require_same_tokens(channels, mask_BT, sizes, self.num_layers)
        if len(sizes) < 2 or mask_BT.sum() < 2:
            raise AlignmentError(
                f"agreement of {len(sizes)} models on {int(mask_BT.sum())} real tokens", fix="give two or more of each"
            )
        rows = {name: x[:, mask_BT] for name, x in channels.items()}
        z_N_LRZ = {name: self.project(name, x) for name, x in rows.items()}
        N, z_NLRZ = len(sizes), torch.stack(list(z_N_LRZ.values())).double()
        centred = z_NLRZ - z_NLRZ.mean(2, keepdim=True)
        scaled = centred / centred.square().mean(2, keepdim=True).sqrt()
        pairs = scaled.sum(0).square().mean(1) - scaled.square().mean(2).sum(0)
        r2 = {
            name: torch.stack([_r2(x, self.back(name, z)) for other, z in z_N_LRZ.items() if other != name]).mean(0)
            for name, x in rows.items()
        }
        return SharedAgreement(pairs / (N * (N - 1)), r2)


# -- from weights in any scale to adapters ------------------------------------------------------------


def layer_fits(
    mean_C: Tensor, covariance_CC: Tensor, slices: Sequence[slice], weights: Sequence[Tensor], l2: float
) -> tuple[list[LayerFit], Tensor]:
    """Adapters of one layer slot with std 1 per Z channel, their ways back, and the mean correlation of pairs [Z]."""
    N, Z = len(slices), weights[0].shape[1]
    scaled = [_unit_variance(w, covariance_CC[part, part]) for w, part in zip(weights, slices, strict=True)]
    read = torch.block_diag(*scaled)
    zx = read.T @ covariance_CC  # [N·Z, ΣC_n]
    zz = (zx @ read).view(N, Z, N, Z)
    fits = []
    for n, (weight, part) in enumerate(zip(scaled, slices, strict=True)):
        others = [j for j in range(N) if j != n]
        zz_other = torch.stack([zz[j, :, j] for j in others]).mean(0)
        zx_other = torch.stack([zx[j * Z : (j + 1) * Z, part] for j in others]).mean(0)
        back = _ridge(zz_other, zx_other, l2)
        fits.append(LayerFit(weight, -mean_C[part] @ weight, back, mean_C[part]))
    variance = zz.diagonal(dim1=1, dim2=3).diagonal(dim1=0, dim2=1)  # [Z, N]
    pairs = (zz.sum((0, 2)).diagonal() - variance.sum(1)) / (N * (N - 1))
    return fits, torch.where((variance > 0.5).all(1), pairs, torch.nan)


def require_enough_tokens(num_tokens: int, num_channels: Mapping[str, int]) -> None:
    """More tokens than any model has channels: with fewer, everything fits everything."""
    if not num_tokens:
        raise AlignmentError("a shared space of no tokens", fix="calibrate on at least one example with real tokens")
    name, most = max(num_channels.items(), key=lambda item: item[1])
    if num_tokens <= most:
        raise AlignmentError(
            f"{num_tokens} tokens for the {most} channels of {name!r}: any two models would agree",
            place="align.calibration_examples",
            fix=f"calibrate on many more tokens, {10 * most} say",
        )


def _fit_onto(mean_C: Tensor, covariance_CC: Tensor, num_channels: int, l2: float, name: str) -> LayerFit:
    """A new model's adapter from the moments of its channels and the known Z, side by side."""
    require_finite(mean_C, covariance_CC, {name: slice(0, num_channels)})
    x, z = slice(0, num_channels), slice(num_channels, None)
    if not numerical_rank(mean_C[x], covariance_CC[x, x]):
        raise AlignmentError(f"all channels of {name!r} are constant", fix="give texts and layers where they vary")
    whiten, _ = whiteners(covariance_CC[x, x], [x], l2)
    weight = whiten[0] @ (whiten[0].T @ covariance_CC[x, z])
    weight = _unit_variance(weight, covariance_CC[x, x])
    back = _ridge(covariance_CC[z, z], covariance_CC[z, x], l2)
    return LayerFit(weight, -mean_C[x] @ weight, back, mean_C[x] - mean_C[z] @ back)


def require_finite(mean_C: Tensor, covariance_CC: Tensor, slices: Mapping[str, slice]) -> None:
    """Raises AlignmentError naming the model whose real tokens hold NaN or infinity."""
    for name, part in slices.items():
        if not bool(mean_C[part].isfinite().all() and covariance_CC[part, part].isfinite().all()):
            raise AlignmentError(
                f"channels of {name!r} are not finite at real tokens", fix="run this model in fp32 or bf16"
            )


def _unit_variance(weight_CZ: Tensor, covariance_CC: Tensor) -> Tensor:
    variance_Z = (weight_CZ * (covariance_CC @ weight_CZ)).sum(0)
    alive = variance_Z > DEAD_SHARE * variance_Z.max()
    return weight_CZ * torch.where(alive, variance_Z.clamp_min(1e-300).rsqrt(), 0.0)


def _ridge(zz_ZZ: Tensor, zx_ZC: Tensor, l2: float) -> Tensor:
    """l2 relative to the variance 1 of Z."""
    return torch.cholesky_solve(zx_ZC, torch.linalg.cholesky(zz_ZZ + l2 * torch.eye(len(zz_ZZ), dtype=zz_ZZ.dtype)))


def _affine(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(weight.dtype).flatten(1, -2) if x.ndim > 2 else x.to(weight.dtype)[:, None]
        return torch.baddbmm(shift[:, None], flat, weight).view(*x.shape[:-1], weight.shape[-1])


def _r2(x_LRC: Tensor, predicted_LRC: Tensor) -> Tensor:
    """Over all channels of a layer slot, against the mean of each channel on these rows; NaN if nothing varies."""
    x = x_LRC.double()
    spread = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    return torch.where(spread > 0, 1 - (x - predicted_LRC).square().sum((1, 2)) / spread, torch.nan)


def _key(name: str) -> str:
    """A name that nn.Module accepts: no dots, and none of its own attributes."""
    return "of_" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key.removeprefix("of_").replace("%2E", ".").replace("%25", "%")


def _mark_loaded(space: nn.Module, _: object) -> None:
    space.is_fitted = True  # type: ignore[assignment]
