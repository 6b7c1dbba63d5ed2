"""The shared space against classical references written out in NumPy, and what it must never do."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvdistill.align.shared import SharedLossWeights, SharedSpace, SharedSpaceFit, fit_trained, shared_loss
from kvdistill.align.shared.moments import PairedMoments, numerical_rank
from kvdistill.align.shared.procrustes import procrustes_weights
from kvdistill.align.shared.trained import trained_weights
from kvdistill.core.errors import AlignmentError, RecipeError

L, B, Z = 2, 3, 4
SIZES = {"student": 6, "t.1": 9, "t2": 7}
METHODS = ("gcca", "procrustes", "trained")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batches(kind: str, num: int, T: int = 90, seed: int = 0, sizes: dict[str, int] = SIZES, mean: float = 2.0):
    """Paired fp64 batches of 6 common variables. linear / orthogonal images, with noise, or unrelated models."""
    fixed, random = torch.Generator().manual_seed(77), torch.Generator().manual_seed(seed)
    maps = {}
    for n, (name, c) in enumerate(sizes.items()):
        left = torch.linalg.qr(torch.randn(L, 6, 6, generator=fixed, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(L, c, c, generator=fixed, dtype=torch.float64))[0][:, :6]
        stretch = torch.ones(6, dtype=torch.float64) if kind == "orthogonal" else torch.linspace(0.5, 2, 6).double()
        maps[name] = (left * stretch) @ right * (n + 1)
    for _ in range(num):
        common = torch.randn(L, B, T, 6, generator=random, dtype=torch.float64)
        made = {}
        for name, c in sizes.items():
            own = torch.randn(L, B, T, 6, generator=random, dtype=torch.float64)
            x = (own if kind == "unrelated" else common) @ maps[name][:, None] + mean
            if kind in ("noisy", "unrelated"):
                x = x + torch.randn(L, B, T, c, generator=random, dtype=torch.float64)
            made[name] = x
        yield made, torch.rand(B, T, generator=random) > 0.2


def fitted(method: str, kind: str, size: int = Z, l2: float = 1e-4, num: int = 6, **options) -> SharedSpace:
    sizes = options.pop("sizes", SIZES)
    fit = SharedSpaceFit(sizes, L, size, method, **{"steps": 150} | options)
    for made, mask in batches(kind, num, sizes=sizes):
        fit.update({name: torch.where(mask[..., None], x, torch.nan) for name, x in made.items()}, mask)
    return fit.solve(l2)


def all_rows(kind: str, num: int, layer: int, sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    for made, mask in batches(kind, num, sizes=sizes):
        for name, x in made.items():
            found[name].append(x[layer][mask].numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


# -- moments -------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    seed=st.integers(0, 999),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7)), min_size=1, max_size=4),
    double=st.booleans(),
)
def test_streamed_moments_are_numpy_on_everything(seed, sizes, double):
    random = torch.Generator().manual_seed(seed)
    moments, seen = PairedMoments([3, 5], L), [[] for _ in range(L)]
    for b, t in [(2, 4), *sizes]:
        x, y = (torch.randn(L, b, t, c, generator=random).double() * 3 + 40 for c in (3, 5))
        x, y = (part if double else part.float() for part in (x, y))
        mask = torch.rand(b, t, generator=random) > 0.3
        mask[0, 0] = True
        moments.update([torch.where(mask[..., None], part, torch.nan) for part in (x, y)], mask)
        for layer in range(L):
            seen[layer].append(torch.cat([x, y], -1)[layer][mask].double().numpy())
    for layer in range(L):
        rows = np.concatenate(seen[layer])
        mean, covariance = moments.covariance(layer)
        np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-6 if not double else 1e-10)
        expected = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
        np.testing.assert_allclose(covariance.numpy(), expected, atol=2e-5 if not double else 1e-9)
    assert moments.num_tokens == len(rows)


def test_half_precision_channels_are_summed_in_fp32():
    x = torch.randn(1, 4, 3000, 3).bfloat16() * 8 + 100
    mask = torch.ones(4, 3000, dtype=torch.bool)
    moments = PairedMoments([3, 3], 1)
    moments.update([x, x], mask)
    rows = x[0].flatten(0, 1).double()
    expected = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    torch.testing.assert_close(moments.covariance(0)[1][:3, 3:], expected, atol=0, rtol=1e-4)


def test_numerical_rank_ignores_units_and_dead_channels():
    x = torch.randn(500, 3).double() @ torch.randn(3, 5).double() * torch.tensor([1e-3, 1, 1e4, 1, 1]).double()
    x = torch.cat([x, torch.full((500, 1), 3.0).double()], 1)
    assert numerical_rank(x.mean(0), x.T.cov(correction=0)) == 3
    assert numerical_rank(torch.ones(2).double(), torch.zeros(2, 2).double()) == 0


# -- generalised CCA -----------------------------------------------------------------------------------


def classical_cca(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hotelling's canonical correlations and variates: SVD of the cross-product of orthonormal bases."""
    qx, qy = (np.linalg.qr(part - part.mean(0))[0] for part in (x, y))
    left, correlation, right = np.linalg.svd(qx.T @ qy)
    count = min(qx.shape[1], qy.shape[1])
    return correlation, qx @ left[:, :count], qy @ right.T[:, :count]


def test_two_models_give_classical_cca():
    sizes = {"student": 6, "t.1": 9}
    space = fitted("gcca", "noisy", l2=1e-10, sizes=sizes)
    for layer in range(L):
        rows = all_rows("noisy", 6, layer, sizes)
        correlation, u, v = classical_cca(rows["student"], rows["t.1"])
        np.testing.assert_allclose(space.correlation[layer].numpy(), correlation[:Z], atol=1e-6)
        for name, expected in (("student", u), ("t.1", v)):
            x = torch.from_numpy(rows[name]).expand(L, -1, -1)
            got = space.project(name, x)[layer].double().numpy()
            np.testing.assert_allclose(got.std(0), 1, atol=1e-4)
            same = np.abs((got * expected[:, :Z]).mean(0) * math.sqrt(len(got)))
            np.testing.assert_allclose(same, 1, atol=1e-4)


def test_three_models_give_carrolls_variates():
    """The leading eigenvectors of the sum of projections, on all tokens at once (a tokens x tokens matrix)."""
    space = fitted("gcca", "noisy", l2=1e-9, num=2)
    for layer in range(L):
        rows = all_rows("noisy", 2, layer)
        bases = [np.linalg.qr(x - x.mean(0))[0] for x in rows.values()]
        g = np.linalg.eigh(sum(q @ q.T for q in bases))[1][:, ::-1][:, :Z]
        for (name, x), basis in zip(rows.items(), bases, strict=True):
            z = space.project(name, torch.from_numpy(x).expand(L, -1, -1))[layer].double().numpy()
            expected = basis @ (basis.T @ g)
            expected /= expected.std(0)
            signs = np.sign((z * expected).sum(0))
            np.testing.assert_allclose(z, expected * signs, atol=3e-4)


def test_the_penalty_does_not_depend_on_scale_or_amount():
    made = list(batches("noisy", 3))
    found = []
    for scale, repeats in ((1.0, 1), (1000.0, 1), (1.0, 3)):
        fit = SharedSpaceFit(SIZES, L, Z)
        for channels, mask in made * repeats:
            fit.update(channels | {"t2": channels["t2"] * scale}, mask)
        found.append(fit.solve(0.1).adapter("t2").weight * scale)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-4)


def test_the_order_of_models_does_not_matter():
    other = SharedSpaceFit(dict(reversed(SIZES.items())), L, Z)
    for made, mask in batches("noisy", 6):
        other.update(made, mask)
    one, two = fitted("gcca", "noisy"), other.solve(1e-4)
    torch.testing.assert_close(one.correlation, two.correlation, atol=1e-6, rtol=0)
    for name in SIZES:
        a, b = one.adapter(name).weight, two.adapter(name).weight
        torch.testing.assert_close(a * (a * b).sum(1, keepdim=True).sign(), b, atol=1e-4, rtol=1e-4)


# -- Procrustes ----------------------------------------------------------------------------------------


def outside_mean(parts: list[np.ndarray]) -> float:
    """Gower's figure on tokens: squared distance to the mean of the models, over all squared lengths."""
    mean = np.mean(parts, axis=0)
    return float(sum(((p - mean) ** 2).sum() for p in parts) / sum((p**2).sum() for p in parts))


@pytest.mark.parametrize("scaling", [True, False])
def test_two_models_give_the_classical_rotation(scaling):
    rows = all_rows("noisy", 4, 0, {"student": 6, "t.1": 6})
    x, y = (part - part.mean(0) for part in rows.values())
    S = torch.from_numpy(np.concatenate([x, y], 1).T @ np.concatenate([x, y], 1) / len(x))
    (wx, wy), history = procrustes_weights(S, [slice(0, 6), slice(6, 12)], 6, scaling=scaling)
    left, _, right = np.linalg.svd(y.T @ x)  # Schönemann 1966: y turned onto x
    turn = (wy / wy.norm(dim=0) @ (wx / wx.norm(dim=0)).T).numpy()
    np.testing.assert_allclose(turn, left @ right, atol=1e-6)
    assert history[-1] == pytest.approx(outside_mean([x @ wx.numpy(), y @ wy.numpy()]), abs=1e-9)
    if scaling:
        assert wx.square().sum().item() * S[:6, :6].trace().item() / 6 == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("kind", ["noisy", "unrelated", "linear"])
def test_procrustes_only_gets_better_and_ends(kind):
    rows = all_rows(kind, 3, 1)
    x = np.concatenate([part - part.mean(0) for part in rows.values()], 1)
    slices = [slice(0, 6), slice(6, 15), slice(15, 22)]
    weights, history = procrustes_weights(torch.from_numpy(x.T @ x / len(x)), slices, Z)
    assert all(b <= a + 1e-12 for a, b in pairwise(history))
    assert len(history) < 100
    parts = [x[:, part] @ w.numpy() for part, w in zip(slices, weights, strict=True)]
    assert history[-1] == pytest.approx(outside_mean(parts), abs=1e-9)
    mean = np.mean(parts, axis=0)
    spread = mean.T @ mean
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-6 * spread.max()  # principal axes, largest first
    assert (np.diff(np.diag(spread)) <= 1e-9).all()


# -- trained -------------------------------------------------------------------------------------------


def slow_shared_loss(z: np.ndarray, terms: SharedLossWeights) -> float:
    """z [N, L, R, Z]: loops, one model, layer and channel at a time."""
    N, layers, _, size = z.shape
    found = []
    for layer in range(layers):
        for n in range(N):
            others = np.mean([z[j, layer] for j in range(N) if j != n], axis=0)
            distance = ((z[n, layer] - others) ** 2).mean()
            hinge = np.mean([max(0, 1 - np.sqrt(z[n, layer, :, c].var() + 1e-6)) for c in range(size)])
            cov = np.cov(z[n, layer].T, bias=True)
            off = sum(cov[a, b] ** 2 for a in range(size) for b in range(size) if a != b) / size
            found.append(terms.distance * distance + terms.variance * hinge + terms.covariance * off)
    return float(np.mean(found))


@pytest.mark.parametrize("terms", [SharedLossWeights(), SharedLossWeights(0.3, 2.0, 0.7)])
def test_shared_loss_is_the_loops(terms):
    z = torch.randn(3, L, B, 11, Z) * 0.8 + torch.randn(3, L, 1, 1, Z)
    mask = torch.rand(B, 11) > 0.3
    got = shared_loss(torch.where(mask[..., None], z, torch.nan), mask, terms)
    assert got.item() == pytest.approx(slow_shared_loss(z[:, :, mask].numpy(), terms), rel=1e-5)
    with pytest.raises(AlignmentError, match="1 models"):
        shared_loss(z[:1], mask)


def test_the_descent_on_moments_is_a_descent_on_tokens():
    rows = all_rows("noisy", 3, 0)
    x = np.concatenate([part - part.mean(0) for part in rows.values()], 1)
    slices = [slice(0, 6), slice(6, 15), slice(15, 22)]
    found = trained_weights(torch.from_numpy(x.T @ x / len(x)), slices, Z, 1e-3, steps=60, seed=3)
    z = np.stack([x[:, part] @ w.numpy() for part, w in zip(slices, found.weights_N_CZ, strict=True)])[:, None]
    np.testing.assert_allclose(z.std(2)[:, 0], found.std_NZ.numpy(), rtol=1e-3)
    assert slow_shared_loss(z, SharedLossWeights()) == pytest.approx(found.history[-1], rel=1e-2)
    assert found.history[-1] < found.history[0]


@pytest.mark.parametrize("kind", ["noisy", "unrelated"])
def test_distance_alone_collapses_and_the_constraint_prevents_it(kind):
    rows = all_rows(kind, 3, 0)
    x = np.concatenate([part - part.mean(0) for part in rows.values()], 1)
    S, slices = torch.from_numpy(x.T @ x / len(x)), [slice(0, 6), slice(6, 15), slice(15, 22)]
    kept = trained_weights(S, slices, Z, 1e-3, steps=200)
    assert kept.std_NZ.min() > 0.9 and kept.std_NZ.max() < 1.1
    with pytest.raises(AlignmentError, match=r"collapsed: std 0\.0|collapsed: std \d\.?\d*e-"):
        trained_weights(S, slices, Z, 1e-3, steps=200, terms=SharedLossWeights(1.0, 0.0, 0.0))
    with pytest.raises(AlignmentError, match="collapsed"):
        fit_trained(batches(kind, 3), Z, steps=200, terms=SharedLossWeights(1.0, 0.0, 0.0))


def test_adapters_can_be_thawed_and_trained_on_batches():
    space = fitted("gcca", "noisy")
    space.requires_grad_(True)
    optimiser = torch.optim.SGD(space.parameters(), lr=0.02)
    made, mask = next(batches("noisy", 1, seed=5))
    losses = []
    for _ in range(5):
        loss = shared_loss(torch.stack([space.project(name, x) for name, x in made.items()]), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_seed_decides_and_is_all_that_does():
    one, same, other = (fit_trained(batches("noisy", 2), Z, steps=30, seed=s) for s in (1, 1, 2))
    for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.adapter("t2").weight, other.adapter("t2").weight)


# -- every method --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"),
    [("gcca", "linear"), ("gcca", "orthogonal"), ("procrustes", "orthogonal"), ("trained", "linear")],
)
def test_images_of_one_another_meet_exactly(method, kind):
    space = fitted(method, kind, size=6)
    held_out, mask = next(batches(kind, 1, seed=9))
    found = space.agreement(held_out, mask)
    assert (found.correlation_LZ > 0.999).all()
    assert all((r2 >= 0.999).all() for r2 in found.r2.values())
    assert found.mean_r2 >= 0.999 and found.mean_correlation > 0.999
    x = space.back("student", space.project("t.1", held_out["t.1"].float()))  # a teacher in student channels
    error = (x - held_out["student"])[:, mask].square().mean() / held_out["student"][:, mask].var()
    assert error < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_unrelated_models_do_not_agree_on_fresh_texts(method):
    space = fitted(method, "unrelated", l2=1e-2)
    held_out, mask = next(batches("unrelated", 1, T=3000, seed=9))
    found = space.agreement(held_out, mask)
    assert abs(found.mean_correlation) < 0.02
    assert abs(found.mean_r2) < 0.02
    assert space.correlation.mean() > found.mean_correlation  # what it was fitted on flatters


@pytest.mark.parametrize("method", METHODS)
def test_noise_lies_between(method):
    space = fitted(method, "noisy", l2=1e-2)
    found = space.agreement(*next(batches("noisy", 1, T=900, seed=9)))
    assert 0.5 < found.mean_correlation < 0.99 and 0.2 < found.mean_r2 < 0.99


@pytest.mark.parametrize("method", METHODS)
def test_z_is_standardised_and_nothing_depends_on_padding_or_batches(method):
    made = list(batches("noisy", 4))
    whole, again = SharedSpaceFit(SIZES, L, Z, method, steps=50), SharedSpaceFit(SIZES, L, Z, method, steps=50)
    for channels, mask in made:
        whole.update(channels, mask)
    for channels, mask in made[:1] + made[:0:-1]:  # another order, other widths of padding, one example at a time
        for b in range(B):
            x = {
                n: torch.nn.functional.pad(c[:, b : b + 1], (0, 0, 3, 8), value=torch.nan) for n, c in channels.items()
            }
            again.update(x, torch.nn.functional.pad(mask[b : b + 1], (3, 8)))
    a, b = whole.solve(1e-2), again.solve(1e-2)
    for name in SIZES:
        torch.testing.assert_close(a.adapter(name).weight, b.adapter(name).weight, atol=2e-4, rtol=2e-4)
        z = torch.cat([a.project(name, c[name])[:, m] for c, m in made], 1)
        torch.testing.assert_close(z.mean(1), torch.zeros(L, Z), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std(1, correction=0), torch.ones(L, Z), atol=1e-4, rtol=0)
    assert whole.num_tokens == again.num_tokens


def test_layers_are_apart():
    fit = SharedSpaceFit(SIZES, 1, Z)
    for made, mask in batches("noisy", 6):
        fit.update({name: x[1:] for name, x in made.items()}, mask)
    both = fitted("gcca", "noisy")
    torch.testing.assert_close(fit.solve(1e-4).adapter("t2").weight[0], both.adapter("t2").weight[1])


def test_back_is_the_pooled_regression_on_the_others():
    space = fitted("gcca", "noisy", l2=1e-9)
    rows = {n: torch.from_numpy(x).expand(L, -1, -1) for n, x in all_rows("noisy", 6, 1).items()}
    z = np.concatenate([space.project(n, rows[n])[1].numpy() for n in ("t.1", "t2")])
    x = np.concatenate([rows["student"][1].numpy()] * 2)
    expected = np.linalg.lstsq(np.c_[z, np.ones(len(z))], x, rcond=None)[0]
    np.testing.assert_allclose(space.adapter("student").back_weight[1].numpy(), expected[:-1], atol=1e-4)
    np.testing.assert_allclose(space.adapter("student").back_shift[1].numpy(), expected[-1], atol=1e-4)


def test_agreement_is_numpy():
    space = fitted("gcca", "noisy")
    made, mask = next(batches("noisy", 1, seed=4))
    found = space.agreement({n: torch.where(mask[..., None], x, torch.nan) for n, x in made.items()}, mask)
    z = {n: space.project(n, x)[:, mask].double().numpy() for n, x in made.items()}
    for layer in range(L):
        for c in range(Z):
            matrix = np.corrcoef([part[layer, :, c] for part in z.values()])
            assert found.correlation_LZ[layer, c].item() == pytest.approx(
                matrix[np.triu_indices(3, 1)].mean(), abs=1e-6
            )
        x = made["student"][layer][mask].numpy()
        each = []
        for other in ("t.1", "t2"):
            p = space.back("student", space.project(other, made[other]))[layer][mask].double().numpy()
            each.append(1 - ((x - p) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
        assert found.r2["student"][layer].item() == pytest.approx(np.mean(each), abs=1e-6)


def test_gradient_reaches_the_student_and_nothing_else():
    space = fitted("gcca", "noisy")
    made, mask = next(batches("noisy", 1))
    student = made["student"].float().requires_grad_()
    loss = (space.project("student", student) - space.project("t.1", made["t.1"])).square()[:, mask].mean()
    loss.backward()
    assert student.grad is not None and student.grad[:, mask].abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in space.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = space.project("student", student)
    assert torch.equal(under, space.project("student", student)) and under.dtype == torch.float32


def test_n_models_cost_n_adapters_and_travel_by_safetensors(tmp_path):
    space = fitted("gcca", "noisy")
    assert space.num_parameters == sum(L * Z * (c + 1) for c in SIZES.values())
    save_file(space.state_dict(), tmp_path / "space.safetensors")
    tensors = load_file(tmp_path / "space.safetensors")
    assert "adapters.of_t%2E1.weight" in tensors
    back = SharedSpace.from_tensors(tensors)
    assert back.names == sorted(SIZES) and back.num_channels == SIZES
    made, _ = next(batches("noisy", 1))
    known = SharedSpace(SIZES, L, Z)
    known.load_state_dict(tensors)
    for name, x in made.items():
        assert torch.equal(back.project(name, x), space.project(name, x))
        assert torch.equal(known.project(name, x), space.project(name, x))
    with pytest.raises(AlignmentError, match="no shared space"):
        SharedSpace.from_tensors({"weight": torch.zeros(1)})


# -- one more model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_new_model_leaves_the_others_as_they_are(method):
    sizes = SIZES | {"values": 8}  # a name that modules have an attribute of
    space = fitted(method, "orthogonal", size=6)
    before = {name: x.clone() for name, x in space.state_dict().items()}
    with_known = [
        ({n: made[n] for n in ("values", "t2")}, mask) for made, mask in batches("orthogonal", 6, sizes=sizes)
    ]
    space.add_model("values", with_known, l2=1e-4)
    assert all(torch.equal(space.state_dict()[name], x) for name, x in before.items())
    assert space.names == [*SIZES, "values"]
    assert space.num_parameters == sum(L * 6 * (c + 1) for c in sizes.values())
    made, mask = next(batches("orthogonal", 1, seed=8, sizes=sizes))
    found = space.agreement(made, mask)
    assert all((r2 >= 0.999).all() for r2 in found.r2.values())  # also with models it was never shown with
    z = torch.cat([space.project("values", made["values"])[:, mask] for made, mask in with_known], 1)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(L, 6), atol=1e-4, rtol=0)


def test_a_new_unrelated_model_is_seen_to_be_unrelated():
    space = fitted("gcca", "noisy")
    sizes = SIZES | {"new": 8}
    with_known = ([{n: made[n] for n in ("t2", "new")}, mask] for made, mask in batches("unrelated", 9, sizes=sizes))
    space.add_model("new", map(tuple, with_known))
    made, mask = next(batches("unrelated", 1, T=3000, seed=3, sizes=sizes))
    found = space.agreement({n: made[n] for n in ("t2", "new")}, mask)
    assert abs(found.mean_correlation) < 0.05
    assert (found.r2["new"].abs() < 0.02).all() and (found.r2["t2"] < 0).all()


def test_a_new_model_may_come_with_several_known_ones():
    space = fitted("gcca", "noisy")
    sizes = SIZES | {"new": 8}
    space.add_model("new", batches("noisy", 6, sizes=sizes))
    assert space.agreement(*next(batches("noisy", 1, seed=2, sizes=sizes))).mean_correlation > 0.5


# -- bad input -----------------------------------------------------------------------------------------


def test_wrong_set_ups_say_so():
    with pytest.raises(AlignmentError, match="1 model"):
        SharedSpaceFit({"student": 6}, L, Z)
    with pytest.raises(AlignmentError, match=r"(?s)shared_size.*7 shared channels.*'student' has 6.*1 to 6"):
        SharedSpaceFit(SIZES, L, 7)
    with pytest.raises(RecipeError, match=r"(?s)shared_fit.*cca2.*gcca, procrustes, trained"):
        SharedSpaceFit(SIZES, L, Z, "cca2")
    with pytest.raises(AlignmentError, match="never fitted"):
        SharedSpace(SIZES, L, Z).project("t2", torch.zeros(L, 3, 7))


def test_wrong_batches_say_so():
    fit = SharedSpaceFit(SIZES, L, Z)
    made, mask = next(batches("noisy", 1))
    with pytest.raises(AlignmentError, match=r"no channels of model 't\.1'"):
        fit.update({n: x for n, x in made.items() if n != "t.1"}, mask)
    with pytest.raises(AlignmentError, match="unknown model 'other'"):
        fit.update(made | {"other": made["t2"]}, mask)
    with pytest.raises(AlignmentError, match=r"'t2' has \(2, 3, 89, 7\).*\(2, 3, 90, 7\)"):
        fit.update(made | {"t2": made["t2"][:, :, 1:]}, mask)
    with pytest.raises(AlignmentError, match="one bool mask"):
        fit.update(made, mask[None].expand(L, *mask.shape))
    with pytest.raises(AlignmentError, match="'student' has"):
        fit.update(made, mask[:, 1:])
    fit.update(made, torch.zeros_like(mask))
    with pytest.raises(AlignmentError, match="no tokens"):
        fit.solve(1e-2)
    with pytest.raises(RecipeError, match=r"l2 = 0\.0"):
        fit.solve(0.0)


def test_too_few_tokens_say_so():
    fit = SharedSpaceFit(SIZES, L, Z)
    made, mask = next(batches("noisy", 1))
    few = torch.zeros_like(mask)
    few[0, :9] = True
    fit.update(made, few)
    with pytest.raises(AlignmentError, match=r"(?s)calibration_examples.*9 tokens for the 9 channels of 't\.1'"):
        fit.solve(1e-2)
    few[1, :30] = True
    fit.update(made, few)
    assert "48 tokens, fewer than 10 per channel" in fit.solve(1e-2).reason
    assert not fitted("gcca", "noisy", num=3).reason


@pytest.mark.parametrize("method", METHODS)
def test_too_few_independent_channels_say_so_or_are_left_out(method):
    fit = SharedSpaceFit(SIZES, L, Z, method, steps=50)
    for made, mask in batches("noisy", 3):
        x = made["student"].clone()
        x[1, ..., 2:] = x[1, ..., :1]  # two independent channels in the second slot
        fit.update(made | {"student": x}, mask)
    with pytest.raises(AlignmentError, match=r"(?s)4 shared channels.*'student' has 2.*slot 1.*at most 2"):
        fit.solve(1e-2)
    space = fit.solve(1e-2, drop_spare=True)
    assert "slot 1 has 2" in space.reason
    z = space.project("t2", made["t2"])
    assert torch.count_nonzero(z[1, ..., 2:]) == 0 and z[0].isfinite().all()
    found = space.agreement(made, mask)
    assert found.correlation_LZ[1, 2:].isnan().all() and not math.isnan(found.mean_correlation)


def test_constant_and_infinite_channels_say_so():
    made, mask = next(batches("noisy", 1))
    fit = SharedSpaceFit(SIZES, L, Z)
    fit.update(made | {"t2": torch.full_like(made["t2"], 5.0)}, mask)
    with pytest.raises(AlignmentError, match=r"(?s)'t2' has 0.*never vary"):
        fit.solve(1e-2, drop_spare=True)
    fit = SharedSpaceFit(SIZES, L, Z)
    fit.update(made | {"t2": made["t2"] / 0}, mask)
    with pytest.raises(AlignmentError, match="'t2' are not finite"):
        fit.solve(1e-2)


def test_wrong_use_of_a_space_says_so():
    space = fitted("gcca", "noisy")
    made, mask = next(batches("noisy", 1))
    with pytest.raises(AlignmentError, match=r"(?s)no model 'bert'.*student, t\.1, t2"):
        space.project("bert", made["t2"])
    with pytest.raises(AlignmentError, match="2 layer slots of 7 channels"):
        space.project("t2", made["student"])
    with pytest.raises(AlignmentError, match="2 layer slots of 4 channels"):
        space.back("t2", torch.zeros(L, 3, 5))
    with pytest.raises(AlignmentError, match="agreement of 1 models"):
        space.agreement({"t2": made["t2"]}, mask)
    with pytest.raises(AlignmentError, match="0 real tokens"):
        space.agreement(made, torch.zeros_like(mask))
    with pytest.raises(AlignmentError, match="'t2' already"):
        space.add_model("t2", [(made, mask)])
    with pytest.raises(AlignmentError, match=r"(?s)'new' comes with 'new'.*one of student"):
        space.add_model("new", [({"new": made["t2"]}, mask)])
    with pytest.raises(AlignmentError, match="no batches to add 'new'"):
        space.add_model("new", [])
    with pytest.raises(AlignmentError, match="no batches to fit"):
        fit_trained([], Z)
    constant = {"new": torch.ones_like(made["t2"]), "t2": made["t2"]}
    with pytest.raises(AlignmentError, match="all channels of 'new' are constant"):
        space.add_model("new", [(constant, mask)])
    assert space.names == list(SIZES)
