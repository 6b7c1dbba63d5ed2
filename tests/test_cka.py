"""CKA against the published formula written out with matrices in float64, and its invariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvdistill.core.cka import CKAAccumulator, linear_cka
from kvdistill.core.errors import AlignmentError

EXAMPLES = settings(max_examples=25, deadline=None)
SPACES = ["kernel", "feature", "auto"]
M, L, N, C, D = 3, 2, 29, 7, 5


def slow_hsic(x_NC: Tensor, y_ND: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(x_NC)
    K, G = (z @ z.T for z in (x_NC, y_ND))
    K, G = (k - torch.diag(torch.diag(k)) for k in (K, G))
    one = torch.ones(n, 1, dtype=K.dtype)
    both = (one.T @ K @ one) * (one.T @ G @ one) / ((n - 1) * (n - 2))
    return ((torch.trace(K @ G) + both - 2 / (n - 2) * (one.T @ K @ G @ one)) / (n * (n - 3))).squeeze()


def slow_cka(x_MNC: Tensor, y_LND: Tensor) -> Tensor:
    x_, y_ = [x - x.mean(0) for x in x_MNC.double()], [y - y.mean(0) for y in y_LND.double()]
    rows = [[slow_hsic(x, y) / (slow_hsic(x, x) * slow_hsic(y, y)).sqrt() for x in x_] for y in y_]
    return torch.stack([torch.stack(row) for row in rows])


def related(n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two models that share some directions, with means far from zero and sizes that differ by layer."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 4, generator=g, dtype=torch.float64)
    x, y = (
        torch.einsum("nf,lfc->lnc", common, torch.randn(layers, 4, size, generator=g, dtype=torch.float64))
        + torch.randn(layers, n, size, generator=g, dtype=torch.float64)
        for layers, size in ((M, C), (L, D))
    )
    x = 3 + x * torch.tensor([1.0, 20.0, 0.05]).view(M, 1, 1)
    return x.to(dtype), (y - 7).to(dtype)


def measured(x: Tensor, y: Tensor, space: str = "auto", cuts: tuple[int, ...] = (), mask=None) -> Tensor:
    found = CKAAccumulator(space)  # type: ignore[arg-type]
    ends = [0, *sorted(cuts), x.shape[1]]
    for start, end in itertools.pairwise(ends):
        found.update(x[:, start:end], y[:, start:end], None if mask is None else mask[start:end])
    return found.matrix()


def rotation(size: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]


@EXAMPLES
@given(space=st.sampled_from(SPACES), seed=st.integers(0, 99), n=st.integers(4, 300), data=st.data())
def test_the_published_formula_however_the_vectors_are_cut(space, seed, n, data):
    cuts = tuple(data.draw(st.lists(st.integers(0, n), max_size=4)))
    x, y = related(n, seed)
    found = measured(x, y, space, cuts)
    assert found.shape == (L, M) and found.dtype == torch.float64
    torch.testing.assert_close(found, slow_cka(x, y), atol=1e-8, rtol=0)


@pytest.mark.parametrize("n", [127, 128, 129, 1030])
def test_tiles_count_every_pair_once(n):
    x, y = related(n)
    torch.testing.assert_close(measured(x, y, "kernel"), slow_cka(x, y), atol=1e-10, rtol=0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_is_itself(space, dtype):
    x = related(500)[0].to(dtype)
    found = measured(x, x, space, (3, 200)).diagonal()
    # products of float32 are summed in an order that is the processor's: 6e-8 on one, above 1e-6 on another
    near = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, torch.ones(M, dtype=torch.float64), atol=near, rtol=0)


@pytest.mark.parametrize("space", SPACES)
@EXAMPLES
@given(seed=st.integers(0, 99), scale=st.floats(1e-6, 1e6))
def test_turning_scaling_and_moving_one_side_changes_nothing(space, seed, scale):
    x, y = related(40, seed)
    moved = (x @ rotation(C, seed)) * scale + 5 * scale
    torch.testing.assert_close(measured(moved, y, space), measured(x, y, space), atol=1e-8, rtol=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(measured(x[:, order], y[:, order], space), measured(x, y, space), atol=1e-8, rtol=0)


def test_unbiased_unrelated_features_are_zero_on_average():
    draws = [torch.randn(1, 16, 30, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    found = torch.stack([measured(x, y) for x, y in zip(draws[::2], draws[1::2], strict=True)])
    assert abs(float(found.mean())) < 0.02  # the biased estimator gives 0.65 here: 30 channels, 16 vectors
    assert float(found.min()) < 0 < float(found.max())


@pytest.mark.parametrize("space", SPACES)
def test_padding_takes_no_part_whatever_it_holds(space):
    x, y = related(60)
    mask = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:20] = False  # a whole batch of padding first
    expected = slow_cka(x[:, mask], y[:, mask])
    x[:, ~mask], y[:, ~mask] = torch.nan, torch.inf
    torch.testing.assert_close(measured(x, y, space, (20, 33), mask), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e3), (torch.bfloat16, 1e30), (torch.float32, 1e15)])
def test_large_values_neither_overflow_nor_drown(space, dtype, size):
    x, y = related(200, dtype=torch.float32)
    x, y = (x / x.abs().amax() * size).to(dtype), y.to(dtype)
    found = measured(x, y, space, (64, 128))
    torch.testing.assert_close(found, slow_cka(x, y), atol=2e-5, rtol=0)


@pytest.mark.parametrize("space", SPACES)
def test_a_mean_far_from_zero_costs_no_digits_in_fp32(space):
    x, y = related(300, dtype=torch.float32)
    x, y = x * torch.tensor([1.0, 0.05, 20.0]).view(M, 1, 1) + 4000, y - 900
    torch.testing.assert_close(measured(x, y, space, (50, 51)), slow_cka(x, y), atol=2e-5, rtol=0)


def test_a_first_batch_of_one_vector_or_of_equal_ones():
    x, y = related(80, dtype=torch.float32)
    x[:, :6], y[:, :6] = x[:, :1].clone(), y[:, :1].clone()
    for cut in (1, 5):
        for space in SPACES:
            torch.testing.assert_close(measured(x, y, space, (cut,)), slow_cka(x, y), atol=1e-5, rtol=0)


def test_vectors_are_held_until_the_sums_are_smaller():
    turn = (M * C * L * D + M * C * C + L * D * D) // (M * C + L * D)
    x, y = related(3 * turn)
    found = CKAAccumulator()
    for i in range(3 * turn):
        found.update(x[:, i : i + 1], y[:, i : i + 1])
        assert found.space == ("kernel" if i < turn else "feature")
        if i in (turn - 1, turn):  # asked for in between, it goes on from there
            torch.testing.assert_close(found.matrix(), slow_cka(x[:, : i + 1], y[:, : i + 1]), atol=1e-8, rtol=0)
    assert found.num_vectors == 3 * turn
    torch.testing.assert_close(found.matrix(), slow_cka(x, y), atol=1e-8, rtol=0)


def test_memory_does_not_grow_with_the_number_of_vectors():
    """What the accumulator holds, counted tensor by tensor, after 2,000 and after 50,000 vectors."""

    def held(found: CKAAccumulator) -> int:
        seen, todo, total = set(), [vars(found)], 0
        while todo:
            thing = todo.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, Tensor):
                total += thing.numel() * thing.element_size()
            elif isinstance(thing, dict):
                todo += thing.values()
            elif isinstance(thing, list | tuple):
                todo += thing
            elif hasattr(thing, "__dict__"):
                todo.append(vars(thing))
        return total

    g = torch.Generator().manual_seed(0)
    found, sizes = CKAAccumulator(), []
    for step in range(50):
        x = torch.randn(M, 1000, 24, generator=g)
        found.update(x, x[:L, :, :17] + torch.randn(L, 1000, 17, generator=g))
        if step in (1, 49):
            sizes.append(held(found))
    assert found.num_vectors == 50_000
    assert sizes[0] == sizes[1] < 100_000
    assert found.matrix()[0, 0] > found.matrix()[0, 1] + 0.1


def test_features_that_do_not_vary_have_no_cka():
    x, y = related(50, dtype=torch.float32)
    x[1] = 0.1
    y[0] = torch.tensor([3.3, 1e4, -2.1, 0.0, 1e-5])
    for space in SPACES:
        found = measured(x, y, space, (7,))
        assert found[0].isnan().all() and found[:, 1].isnan().all()
        torch.testing.assert_close(found[1, [0, 2]], slow_cka(x, y)[1, [0, 2]], atol=1e-5, rtol=0)
    corners = torch.eye(9).expand(1, 9, 9)  # all equally far apart: nothing to compare by
    assert measured(corners, corners, "kernel").isnan().all() and measured(corners, corners, "feature").isnan().all()


def test_too_few_vectors_other_sizes_and_broken_features_are_named():
    x, y = related(20)
    with pytest.raises(AlignmentError, match=r"CKA of 0 vectors: the unbiased estimator needs 4"):
        CKAAccumulator().matrix()
    with pytest.raises(AlignmentError, match="CKA of 3 vectors"):
        measured(x[:, :3], y[:, :3])
    found = CKAAccumulator(names=("teacher one", "the student"))
    found.update(x, y)
    with pytest.raises(AlignmentError, match="2 layers of 7 channels after batches of 3 layers of 7"):
        found.update(x[:2], y)
    for space in SPACES:
        found = CKAAccumulator(space, names=("teacher one", "the student"))  # type: ignore[arg-type]
        found.update(x, y.masked_fill(torch.tensor([False, True])[:, None, None], torch.inf))
        with pytest.raises(AlignmentError, match="layer 1 of the student has a feature that is not a finite number"):
            found.matrix()


# -- one batch, with its graph ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 9, 80])  # 80: feature space
def test_matched_layers_are_the_diagonal(n):
    x, y = related(n)
    torch.testing.assert_close(linear_cka(x[:L], y), slow_cka(x[:L], y).diagonal(), atol=1e-8, rtol=0)
    mask = torch.arange(n + 3) != 1
    mask[-2:] = False
    padded = [torch.full((L, n + 3, size), torch.nan, dtype=torch.float64) for size in (C, D)]
    for z, source in zip(padded, (x[:L], y), strict=True):
        z[:, mask] = source
    torch.testing.assert_close(linear_cka(*padded, mask), slow_cka(x[:L], y).diagonal(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("n", [6, 14])
def test_gradients_are_right(n):
    x, y = related(n)
    mask = torch.arange(n) > 0
    x, y = x[:L].requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: linear_cka(x, y, mask), (x, y))
    linear_cka(x, y, mask).sum().backward()
    assert x.grad is not None and (x.grad[:, 0] == 0).all() and (x.grad[:, 1:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32_also_under_autocast(dtype):
    x, y = (z.to(dtype).requires_grad_() for z in related(60))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cka(x[:L] * 100, y)
    assert found.dtype == torch.float32
    expected = slow_cka((x[:L] * 100).detach(), y.detach()).diagonal()
    torch.testing.assert_close(found.detach().double(), expected, atol=1e-5, rtol=0)
    found.sum().backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("n", [6, 14])
def test_a_loss_stays_finite_where_cka_is_undefined(n):
    x, y = related(n, dtype=torch.float32)
    x = x[:L]
    x[0] = 0.1
    x, y = x.requires_grad_(), y.requires_grad_()
    found = linear_cka(x, y)
    found.sum().backward()
    assert found[0] == 0 and found[1] != 0
    assert (x.grad[0] == 0).all() and x.grad.isfinite().all() and y.grad.isfinite().all()
    x.grad = None
    few = linear_cka(x, y, torch.arange(n) < 3)
    few.sum().backward()
    assert (few == 0).all() and (x.grad == 0).all()
    assert (linear_cka(x, y, torch.zeros(n, dtype=torch.bool)) == 0).all()
