"""Linear CKA with the unbiased HSIC estimator: how alike two sets of features are, whatever their sizes.

CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) (Kornblith et al. 2019, eq. 5) with HSIC_1 of Song et al. 2012,
eq. 5. For linear kernels K = XX', L = YY' with their diagonals a_i = |x_i|^2, b_i = |y_i|^2 set to zero (K~, L~):

    n(n-3) HSIC_1 = tr(K~L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1                                      (*)

It does not change when either side is shifted, so everything is summed around the mean of the first vectors and in
units of their spread: large means and half-precision inputs cost no digits, and no square overflows.

Two ways to the same number, for M layers of C channels against L layers of D channels:

  kernel   K~ and L~ tile by tile (each pair of vectors once): n^2 (M·C + L·D) / 2 multiply-adds; holds all vectors.
  feature  X'Y, sum a_i y_i, sum b_i x_i, sum a_i b_i, …: with s = sum_i x_i, t = sum_i y_i,
           tr(K~L~) = |X'Y|^2 - sum a_i b_i          1'K~1 = |s|^2 - sum a_i
           1'K~L~1 = s'X'Y t - s·sum b_i x_i - t·sum a_i y_i + sum a_i b_i
           n (M·C·L·D + M·C^2 + L·D^2) multiply-adds; memory does not depend on n.

`CKAAccumulator` takes vectors in batches and picks the way itself; the numbers do not depend on how they were cut.
`linear_cka` is one batch with its graph, for a loss. Knows no model, no layer map and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError
from kvdistill.core.runtime import sum_dtype

MIN_VECTORS = 4  # n(n-3) must be positive
_ROWS, _COLUMNS = 128, 1024  # a tile of the Gram matrices; rows divide columns, so that no diagonal block is cut
_FIRST = 128  # vectors that give the shift and the unit of all
_NOISE = 16  # what is below so many rounding errors of its parts is zero


@final
class CKAAccumulator:
    """CKA of every pair of layers of two models over all vectors it is given: `update` per batch, then `matrix`.

    space `auto` holds the vectors while they are fewer numbers than the sums of feature space would be (then kernel
    space is the cheaper one: at most half the multiply-adds), and from then on keeps the sums only. So memory is the
    lesser of the two, and constant in n from n = (M·C·L·D + M·C^2 + L·D^2) / (M·C + L·D) on. `kernel` and `feature`
    force one of them. Sums are fp32 (fp64 for fp64 inputs); their small ends are fp64. names: of x and y, for errors.
    """

    def __init__(
        self,
        space: Literal["auto", "kernel", "feature"] = "auto",
        names: tuple[str, str] = ("the first model", "the second model"),
    ) -> None:
        self._wanted, self._names = space, names
        self._sides: tuple[_Side, _Side] | None = None
        self._held: list[tuple[Tensor, Tensor]] = []
        self._features: _FeatureSums | None = None
        self.num_vectors = 0

    @property
    def space(self) -> str:
        """Where the sums are at present: `kernel` (vectors are held) or `feature`."""
        return "kernel" if self._features is None and self._wanted != "feature" else "feature"

    @torch.no_grad()
    def update(
        self, x_MNC: Float[Tensor, "M N C"], y_LND: Float[Tensor, "L N D"], mask_N: Bool[Tensor, " N"] | None = None
    ) -> None:
        """N more vectors of every layer, the i-th of x beside the i-th of y. mask_N: False at padding, left out.

        Any float dtype. Raises AlignmentError where numbers of layers or channels differ from the first batch's.
        """
        if mask_N is not None and not bool(mask_N.all()):
            x_MNC, y_LND = x_MNC[:, mask_N], y_LND[:, mask_N]
        if x_MNC.shape[1] == 0:
            return
        if self._sides is None:
            dtype = sum_dtype(x_MNC, y_LND)
            self._sides = _Side.of(x_MNC, dtype), _Side.of(y_LND, dtype)
        with torch.autocast(x_MNC.device.type, enabled=False):
            x, y = (side.units(z) for side, z in zip(self._sides, (x_MNC, y_LND), strict=True))
            self.num_vectors += x.shape[1]
            self._held.append((x, y))
            (M, _, C), (L, _, D) = x.shape, y.shape
            sums_are_less = self.num_vectors * (M * C + L * D) > M * C * L * D + M * C * C + L * D * D
            if self.space == "kernel" and not (self._wanted == "auto" and sums_are_less):
                return
            self._features = self._features or _FeatureSums(x, y)
            while self._held:  # each batch is freed once it is in the sums
                self._features.add(*self._held.pop(0))

    @torch.no_grad()
    def matrix(self) -> Float[Tensor, "L M"]:
        """CKA of each layer of y (rows) with each layer of x (columns), float64 on the CPU; at most 1, about 0 for
        unrelated features (below it by chance). NaN where a layer's features do not vary: HSIC(X, X) is 0 then.

        Raises AlignmentError for fewer than 4 vectors, and naming the layer where a value was not finite.
        """
        if self._sides is None or self.num_vectors < MIN_VECTORS:
            raise AlignmentError(
                f"CKA of {self.num_vectors} vectors: the unbiased estimator needs {MIN_VECTORS}",
                fix="give more or longer texts",
            )
        if self._features is not None:
            hsic = self._features.hsic(self.num_vectors)
        else:
            if len(self._held) > 1:
                x_, y_ = zip(*self._held, strict=True)
                self._held = [(torch.cat(x_, 1), torch.cat(y_, 1))]
            hsic = _kernel_hsic(*self._held[0])
        eps = torch.finfo(self._sides[0].shift_M1C.dtype).eps
        x_M, y_L = (own.defined(self.num_vectors, eps, name) for own, name in zip(hsic[1:], self._names, strict=True))
        return (hsic[0] / (y_L.sqrt()[:, None] * x_M.sqrt())).cpu()


@dataclass(frozen=True)
class _Side:
    """What one model's features are measured from and in: the mean of the first vectors, and 1 / their spread.

    Neither needs to be precise: CKA does not see them.
    """

    shift_M1C: Tensor
    inverse_M11: Tensor

    @staticmethod
    def of(x_MNC: Tensor, dtype: torch.dtype) -> _Side:
        first = x_MNC[:, :_FIRST].to(dtype)
        shift_M1C = first.mean(1, keepdim=True)
        size_M, spread_M = (z.abs().amax((1, 2)) for z in (first, first - shift_M1C))
        # one vector, or equal ones, have no spread yet: their own size will do
        spread_M = torch.where(spread_M > _NOISE * torch.finfo(dtype).eps * size_M, spread_M, size_M)
        inverse_M = torch.where(spread_M > 0, 1 / spread_M / x_MNC.shape[2] ** 0.5, 1)
        return _Side(shift_M1C, inverse_M[:, None, None])

    def units(self, x_MNC: Tensor) -> Tensor:
        if x_MNC.shape[::2] != self.shift_M1C.shape[::2]:
            raise AlignmentError(
                f"CKA: {x_MNC.shape[0]} layers of {x_MNC.shape[2]} channels after batches of "
                f"{self.shift_M1C.shape[0]} layers of {self.shift_M1C.shape[2]}",
                fix="give every batch the same layers, or use an accumulator for each model",
            )
        return (x_MNC.to(self.shift_M1C.dtype) - self.shift_M1C).mul_(self.inverse_M11)


@dataclass(frozen=True)
class _Own:
    """n(n-3) HSIC_1 of every layer with itself, and sum a_i and sum a_i^2, by which it is judged; float64."""

    hsic_M: Tensor
    a_M: Tensor
    aa_M: Tensor

    def defined(self, n: int, eps: float, name: str) -> Tensor:
        """hsic_M, NaN where it is zero but for rounding. Raises AlignmentError for a layer that is not finite."""
        if not bool(self.hsic_M.isfinite().all()):
            layer = int((~self.hsic_M.isfinite()).nonzero()[0])
            raise AlignmentError(
                f"layer {layer} of {name} has a feature that is not a finite number",
                fix="run the model in float32 or bfloat16, and leave its padding out",
            )
        # constant features; and features that are all equally far apart, whose K~ is constant
        vary_M = (self.a_M > n * (_NOISE * eps) ** 2) & (self.hsic_M > _NOISE * eps * self.aa_M)
        return torch.where(vary_M, self.hsic_M, torch.nan)


_Hsic = tuple[Tensor, _Own, _Own]  # n(n-3) HSIC_1 across [L, M], of x, of y


def _combine(n: int | Tensor, trace: Tensor, sum_k: Tensor, sum_l: Tensor, sum_kl: Tensor) -> Tensor:
    """(*) of the module's docstring from tr(K~L~), 1'K~1, 1'L~1 and 1'K~L~1."""
    return trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * sum_kl


# -- feature space ------------------------------------------------------------------------------------


class _FeatureSums:
    """The sums of feature space. `_across`: between the models; `_x`, `_y`: of each layer with itself."""

    def __init__(self, x_MNC: Tensor, y_LND: Tensor) -> None:
        (M, _, C), (L, _, D) = x_MNC.shape, y_LND.shape
        self._products_LDV = x_MNC.new_zeros(L, D, M * C)
        self._x, self._y = _OwnSums(x_MNC), _OwnSums(y_LND)
        zeros = partial(torch.zeros, dtype=torch.float64, device=x_MNC.device)
        self._ab_LM, self._bx_LV, self._ay_MW = zeros(L, M), zeros(L, M * C), zeros(M, L * D)

    def add(self, x_MNC: Tensor, y_LND: Tensor) -> None:
        a_MN, b_LN = self._x.add(x_MNC), self._y.add(y_LND)
        x_NV, y_NW = (z.transpose(0, 1).flatten(1) for z in (x_MNC, y_LND))
        self._products_LDV.baddbmm_(y_LND.transpose(1, 2), x_NV.expand(len(y_LND), *x_NV.shape))
        self._ab_LM += b_LN @ a_MN.T
        self._bx_LV += b_LN @ x_NV
        self._ay_MW += a_MN @ y_NW

    def hsic(self, n: int) -> _Hsic:
        s_MC, t_LD = self._x.sum_MC, self._y.sum_MC
        L, M = self._ab_LM.shape
        trace, bilinear = torch.empty_like(self._ab_LM), torch.empty_like(self._ab_LM)
        for layer, product_DV in enumerate(self._products_LDV):  # one at a time: a float64 copy of all is too much
            wide_DV = product_DV.double()
            trace[layer] = torch.linalg.vector_norm(wide_DV.view(-1, M, s_MC.shape[1]), dim=(0, 2)).square()
            bilinear[layer] = ((t_LD[layer] @ wide_DV).view_as(s_MC) * s_MC).sum(1)
        bilinear -= (self._bx_LV.view(L, *s_MC.shape) * s_MC).sum(-1)
        bilinear -= (self._ay_MW.view(M, *t_LD.shape) * t_LD).sum(-1).T
        across_LM = _combine(
            n, trace - self._ab_LM, self._x.total_M(), self._y.total_M()[:, None], bilinear + self._ab_LM
        )
        return across_LM, self._x.hsic(n), self._y.hsic(n)


class _OwnSums:
    """The same for each layer with itself."""

    def __init__(self, x_MNC: Tensor) -> None:
        M, _, C = x_MNC.shape
        zeros = partial(torch.zeros, dtype=torch.float64, device=x_MNC.device)
        self._products_MCC = x_MNC.new_zeros(M, C, C)
        self.sum_MC, self._ax_MC, self._a_M, self._aa_M = zeros(M, C), zeros(M, C), zeros(M), zeros(M)

    def add(self, x_MNC: Tensor) -> Tensor:
        """Returns a_MN, the squared norms."""
        a_MN = torch.linalg.vector_norm(x_MNC, dim=-1).square_()
        self._products_MCC.baddbmm_(x_MNC.transpose(1, 2), x_MNC)
        self.sum_MC += x_MNC.sum(1)
        self._ax_MC += (a_MN[:, None] @ x_MNC)[:, 0]
        self._a_M += a_MN.sum(1, dtype=torch.float64)
        self._aa_M += a_MN.double().square().sum(1)
        return a_MN

    def total_M(self) -> Tensor:
        """1'K~1"""
        return self.sum_MC.square().sum(1) - self._a_M

    def hsic(self, n: int) -> _Own:
        trace, bilinear = torch.empty_like(self._a_M), torch.empty_like(self._a_M)
        for layer, product_CC in enumerate(self._products_MCC):
            wide_CC, s_C = product_CC.double(), self.sum_MC[layer]
            trace[layer] = wide_CC.square().sum()
            bilinear[layer] = s_C @ wide_CC @ s_C
        sum_kk = bilinear - 2 * (self._ax_MC * self.sum_MC).sum(1) + self._aa_M
        hsic_M = _combine(n, trace - self._aa_M, self.total_M(), self.total_M(), sum_kk)
        return _Own(hsic_M, self._a_M, self._aa_M)


# -- kernel space -------------------------------------------------------------------------------------


def _kernel_hsic(x_MNC: Tensor, y_LND: Tensor) -> _Hsic:
    n, zeros = x_MNC.shape[1], partial(torch.zeros, dtype=torch.float64, device=x_MNC.device)
    trace_LM, trace_M, trace_L = zeros(len(y_LND), len(x_MNC)), zeros(len(x_MNC)), zeros(len(y_LND))
    # room for a tile of each side, used again: fresh memory for each would cost a tenth of the time
    rooms = [z.new_empty(len(z) * min(_ROWS, n) * min(_COLUMNS, n)) for z in (x_MNC, y_LND)]
    for top in range(0, n, _ROWS):
        end = min(top + _ROWS, n)
        for left in range(0, end, _COLUMNS):
            right = min(left + _COLUMNS, end)
            k_MP, l_LP = (_gram_tile(*pair, top, end, left, right) for pair in zip((x_MNC, y_LND), rooms, strict=True))
            trace_LM += l_LP @ k_MP.T
            trace_M += torch.linalg.vector_norm(k_MP, dim=1).double().square()
            trace_L += torch.linalg.vector_norm(l_LP, dim=1).double().square()
    a_MN, b_LN = (torch.linalg.vector_norm(z, dim=-1).square_().double() for z in (x_MNC, y_LND))
    k_MN, l_LN = _row_sums(x_MNC) - a_MN, _row_sums(y_LND) - b_LN
    across_LM = _combine(n, 2 * trace_LM, k_MN.sum(1), l_LN.sum(1)[:, None], l_LN @ k_MN.T)
    return across_LM, _own(2 * trace_M, k_MN, a_MN), _own(2 * trace_L, l_LN, b_LN)


def _own(trace_M: Tensor, k_MN: Tensor, a_MN: Tensor) -> _Own:
    hsic_M = _combine(k_MN.shape[1], trace_M, k_MN.sum(1), k_MN.sum(1), k_MN.square().sum(1))
    return _Own(hsic_M, a_MN.sum(1), a_MN.square().sum(1))


def _gram_tile(x_MNC: Tensor, room: Tensor, top: int, end: int, left: int, right: int) -> Float[Tensor, "M P"]:
    """Rows top..end of K~, columns left..right, up to the diagonal: of each pair of vectors one entry.

    The block on the diagonal holds its pairs twice, hence its factor: products of two tiles then count them once.
    """
    shape = len(x_MNC), end - top, right - left
    tile = room[: math.prod(shape)].view(shape)
    torch.bmm(x_MNC[:, top:end], x_MNC[:, left:right].transpose(1, 2), out=tile)
    if right == end:
        block = tile[:, :, top - left :]
        block.mul_(0.5**0.5).diagonal(dim1=1, dim2=2).zero_()
    return tile.flatten(1)


def _row_sums(x_MNC: Tensor) -> Float[Tensor, "M N"]:
    """K1 in float64, from sum_j x_i·x_j = x_i·s: no entry of K is needed."""
    return torch.stack([torch.mv(x_NC, x_NC.sum(0)) for x_NC in x_MNC]).double()


# -- one batch, with its graph ------------------------------------------------------------------------


def linear_cka(
    x_LNC: Float[Tensor, "L N C"], y_LND: Float[Tensor, "L N D"], mask_N: Bool[Tensor, " N"] | None = None
) -> Float[Tensor, " L"]:
    """CKA of layer l of x with layer l of y over the vectors where mask_N is True, with its graph, in at least fp32.

    The same unbiased estimator, in the cheaper space. Memory of the graph: L·N^2 in kernel space, L·(C + D)^2 in
    feature space, beside the centred inputs. A loss has to stay finite: with fewer than 4 vectors, or where features
    do not vary, CKA is undefined, and this gives 0 without a gradient. Whoever measures uses `CKAAccumulator`.
    """
    N = x_LNC.shape[1]
    mask_N = x_LNC.new_ones(N, dtype=torch.bool) if mask_N is None else mask_N
    dtype = sum_dtype(x_LNC, y_LND)
    with torch.autocast(x_LNC.device.type, enabled=False):
        x, y = (_centred(z.to(dtype), mask_N) for z in (x_LNC, y_LND))
        a_LN, b_LN = x.square().sum(2), y.square().sum(2)
        C, D = x.shape[2], y.shape[2]
        n = mask_N.sum()
        if N * (C + D) <= C * D + C * C + D * D:  # tr(K~L~), tr(K~K~), tr(L~L~) from the Gram matrices
            diagonal_NN = torch.eye(N, dtype=torch.bool, device=x.device)
            k, l = (torch.bmm(z, z.transpose(1, 2)).masked_fill(diagonal_NN, 0) for z in (x, y))
            across, of_x, of_y = (k * l).sum((1, 2)), k.square().sum((1, 2)), l.square().sum((1, 2))
        else:  # the same without a matrix of N x N
            across, of_x, of_y = (
                torch.bmm(u.transpose(1, 2), v).square().sum((1, 2)) - uv_LN.sum(1)
                for u, v, uv_LN in ((x, y, a_LN * b_LN), (x, x, a_LN * a_LN), (y, y, b_LN * b_LN))
            )

        def hsic(trace_L: Tensor, a_LN: Tensor, b_LN: Tensor) -> Tensor:
            """n(n-3) HSIC_1 where the mean is exactly zero: K~1 = -a and L~1 = -b."""
            safe_n = n.clamp_min(MIN_VECTORS).to(dtype)
            return _combine(safe_n, trace_L, a_LN.sum(1), b_LN.sum(1), (a_LN * b_LN).sum(1))

        of_x, of_y = hsic(of_x, a_LN, a_LN), hsic(of_y, b_LN, b_LN)
        least = _NOISE * torch.finfo(dtype).eps
        defined = (of_x > least * a_LN.square().sum(1)) & (of_y > least * b_LN.square().sum(1)) & (n >= MIN_VECTORS)
        scale = torch.where(defined, of_x * of_y, 1).sqrt()  # `where` before the root: no NaN on the way back
        return torch.where(defined, hsic(across, a_LN, b_LN) / scale, 0)


def _centred(x_LNC: Tensor, mask_N: Tensor) -> Tensor:
    """Zero mean over real vectors, zero at padding and where nothing varies, mean square norm 1.

    CKA does not see a factor, so the graph need not know it.
    """
    gone_N1, n = ~mask_N[:, None], mask_N.sum().clamp_min(1)
    x = x_LNC.masked_fill(gone_N1, 0)
    centred = (x - x.sum(1, keepdim=True) / n).masked_fill(gone_N1, 0)
    with torch.no_grad():
        size, spread = (torch.linalg.vector_norm(z, dim=(1, 2), dtype=torch.float64) for z in (x, centred))
        varies = spread > _NOISE * torch.finfo(x.dtype).eps * size
        inverse_L = torch.where(varies, n.sqrt() / spread, 0).to(x.dtype)
    return centred * inverse_L[:, None, None]
