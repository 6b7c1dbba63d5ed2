"""Projectors: each against loops by hand, gradients against autograd's own, conversions, initial values, state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvdistill.align.heads import (
    PROJECTORS,
    ElasticProjector,
    HeadwiseMapProjector,
    KVDimensionProjector,
    LowRankProjector,
    ResidualProjector,
    convert,
    make_matrix,
    make_projector,
    spread_heads,
    structured,
)
from kvdistill.core.errors import AlignmentError, RecipeError

H, D, G, E, L, B, T = 3, 4, 2, 5, 6, 7, 8
BIG = (8, 6, 7, 9)  # enough heads that the structured product is not taken through the flat weight
UNEVEN = [(3, 4, 2, 5), (2, 5, 3, 4), (7, 3, 4, 5), (1, 6, 5, 4)]  # head counts that do not divide one another
KINDS = {  # every kind there is, by the recipe's words
    "flat": {"projection": "flat"},
    "low rank": {"projection": "flat", "rank": 3},
    "structured": {"projection": "structured"},
    "per head": {"projection": "structured", "per_head": True},
    "elastic": {"projection": "elastic", "hidden": 11},
}
KINDS |= {f"residual {name}": options | {"residual": True} for name, options in KINDS.items()}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(projector):
    with torch.no_grad():
        for p in projector.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return projector


@pytest.mark.parametrize("heads", [(H, D, G, E), (G, E, H, D), BIG])
@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_structured_is_the_loop_and_its_flat_weight(heads, share_layers, per_head):
    h, d, g, e = heads
    projector = randomised(HeadwiseMapProjector(*heads, L, share_layers=share_layers, per_head=per_head))
    assert projector._direct_pays == (heads == BIG)
    x = torch.randn(L, B, T, h * d)
    got = projector(x)
    slow = torch.zeros(L, B, T, g, e)
    for layer in range(L):
        row = 0 if share_layers else layer
        for out in range(g):
            mixed = sum(projector.mixer[row, i, out] * x[layer].view(B, T, h, d)[:, :, i] for i in range(h))
            slow[layer, :, :, out] = mixed @ projector.size[row, out if per_head else 0]
        slow[layer] += projector.bias[row].view(g, e)
    torch.testing.assert_close(got, slow.flatten(3), atol=2e-4, rtol=1e-4)
    weight, bias = projector.to_flat()
    flat = KVDimensionProjector(*heads, L, share_layers=share_layers)
    flat.set_flat(weight, bias)
    torch.testing.assert_close(flat(x), got, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("share_layers", [False, True])
def test_flat_is_one_linear_per_layer(share_layers):
    projector = randomised(KVDimensionProjector(H, D, G, E, L, share_layers=share_layers))
    x = torch.randn(L, B, T, H * D, requires_grad=True)
    got = projector(x)
    for layer in range(L):
        row = 0 if share_layers else layer
        slow = x[layer] @ projector.weight[row] + projector.bias[row]
        torch.testing.assert_close(got[layer], slow, atol=1e-5, rtol=1e-5)
    rows = 1 if share_layers else L
    assert projector.num_parameters == rows * (H * D * G * E + G * E)
    got.sum().backward()
    assert x.grad is not None and projector.weight.grad is not None


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("share_layers", [False, True])
def test_structured_takes_back_its_own_flat_weight_and_the_nearest_of_any_other(per_head, share_layers):
    options = {"per_head": per_head, "share_layers": share_layers}
    projector = randomised(HeadwiseMapProjector(H, D, G, E, L, **options))
    weight, bias = (x.detach() for x in projector.to_flat())
    other = HeadwiseMapProjector(H, D, G, E, L, **options)
    other.set_flat(weight, bias)
    torch.testing.assert_close(other.to_flat()[0], weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.bias, bias)
    rows, sizes = (1 if share_layers else L), (G if per_head else 1)
    assert projector.num_parameters == rows * (H * G + sizes * D * E + G * E)

    noisy = weight + torch.randn(weight.shape)
    other.set_flat(noisy, bias)
    best = (other.to_flat()[0] - noisy).norm()
    assert best < (weight - noisy).norm(), "no nearer than the weight the noise was added to"
    for step in (1e-2, -1e-2):  # no small step is nearer
        for part in (other.mixer, other.size):
            direction = torch.randn(part.shape)
            with torch.no_grad():
                part += step * direction
                assert (other.to_flat()[0] - noisy).norm() >= best - 1e-4
                part -= step * direction


def test_spread_heads_is_even_both_ways():
    assert torch.equal(spread_heads(4, 2), torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]))
    assert torch.equal(spread_heads(2, 4), torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
    for pair in ((3, 2), (2, 3), (5, 5), (8, 3), (1, 4), (4, 1)):
        mixer = spread_heads(*pair)
        torch.testing.assert_close(mixer.sum(0), torch.ones(pair[1]))
        torch.testing.assert_close(mixer.sum(1), torch.full((pair[0],), pair[1] / pair[0]))
    assert torch.equal(spread_heads(5, 5), torch.eye(5))


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_init_averages_heads_and_keeps_sizes(kind):
    x = torch.randn(1, B, 4, 6)
    options = KINDS[kind] | ({"rank": 12} if "rank" in kind else {"hidden": 24} if "elastic" in kind else {})
    out = make_projector(ends=(4, 6, 2, 6), init="uniform", **options)(x.flatten(2)).view(1, B, 2, 6)
    if kind == "elastic":  # the same of the normalised token
        x = x / x.square().mean((2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(out[:, :, 0], x[:, :, :2].mean(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, :, 1], x[:, :, 2:].mean(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_in", "num_out"), [(6, 6), (9, 4), (4, 9), (8, 4)])
def test_inits_are_what_they_say(num_in, num_out):
    def make(init, seed=3):
        return make_matrix(init, num_in, num_out, torch.Generator().manual_seed(seed))

    xavier = make("xavier")
    bound = (6 / (num_in + num_out)) ** 0.5
    assert xavier.abs().max() <= bound and xavier.std() > bound / 3
    orthogonal = make("orthogonal")
    gram = orthogonal @ orthogonal.T if num_in <= num_out else orthogonal.T @ orthogonal
    torch.testing.assert_close(gram, torch.eye(min(num_in, num_out)), atol=1e-5, rtol=0)
    identity = make("identity")
    torch.testing.assert_close(identity.square().sum(0), torch.ones(num_out))  # unit variance in, unit variance out
    if num_in == num_out:
        assert torch.equal(identity, torch.eye(num_in))
        assert torch.equal(make("uniform"), torch.eye(num_in))
    assert torch.equal(make("xavier"), xavier) and not torch.equal(make("xavier", 4), xavier)
    with pytest.raises(RecipeError, match="unknown init 'zeros'"):
        make("zeros")


@pytest.mark.parametrize("init", ["xavier", "orthogonal", "identity", "uniform", "ridge"])
@pytest.mark.parametrize("kind", KINDS)
def test_seeds_freezing_and_state_on_disk(kind, init, tmp_path):
    def make(**options):
        return make_projector(ends=(H, D, G, E), num_layers=L, init=init, **KINDS[kind], **options)

    one, same, other = (make(seed=s) for s in (1, 1, 2))
    x = torch.randn(L, B, H * D)
    assert torch.isfinite(one(x)).all() and torch.equal(one(x), same(x))
    if init in ("xavier", "ridge"):
        assert not torch.equal(one(x), other(x))
    other = randomised(make(seed=2))
    save_file(other.state_dict(), tmp_path / "p.safetensors")
    one.load_state_dict(load_file(tmp_path / "p.safetensors"))
    assert torch.equal(one(x), other(x)) and not torch.equal(one(x), same(x))
    frozen = make(frozen=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None


def test_state_names_and_counts():
    def of(kind, **options):
        made = make_projector(ends=(H, D, G, E), num_layers=L, **KINDS[kind], **options)
        assert made.num_parameters == sum(p.numel() for p in made.parameters())
        return set(made.state_dict()), made.num_parameters, made.num_fixed

    I, O = H * D, G * E
    assert of("flat") == ({"weight", "bias"}, L * (I * O + O), 0)
    assert of("flat", share_layers=True)[1] == I * O + O
    assert of("low rank") == ({"down", "up", "bias"}, L * (3 * (I + O) + O), 0)
    assert of("structured") == ({"mixer", "size", "bias"}, L * (H * G + D * E + O), 0)
    assert of("per head")[1] == L * (H * G + G * D * E + O)
    names = {"gain", "down", "down_bias", "up", "bias"}
    assert of("elastic") == (names, L * (I + 11 * (I + O) + 11 + O), 0)
    corrected = {"gate", "guess_weight", "guess_bias", *(f"correction.{name}" for name in names)}
    assert of("residual elastic") == (corrected, L + of("elastic")[1], L * (I * O + O))
    assert ElasticProjector(H, D, G, E).hidden == max(I, O)


@pytest.mark.parametrize("ends", [*UNEVEN, BIG])
@pytest.mark.parametrize("kind", KINDS)
def test_any_head_counts_and_layers_apart(kind, ends):
    projector = randomised(make_projector(ends=ends, num_layers=L, **KINDS[kind]))
    x = torch.randn(L, B, T, ends[0] * ends[1])
    out = projector(x)
    assert out.shape == (L, B, T, ends[2] * ends[3])
    changed = x.clone()
    changed[2, 3, 4] += 1
    moved = (projector(changed) - out).abs().amax(-1) > 1e-4
    assert moved.nonzero().tolist() == [[2, 3, 4]]  # one layer, one sample, one token
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(projector(x[:, :, order]), out[:, :, order], atol=1e-4, rtol=1e-4)


@given(data=st.data(), in_heads=st.integers(1, 9), out_heads=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_spread_heads_is_row_stochastic_and_monotone(data, in_heads, out_heads):
    mixer = spread_heads(in_heads, out_heads)
    torch.testing.assert_close(mixer.sum(0), torch.ones(out_heads))
    torch.testing.assert_close(mixer.sum(1), torch.full((in_heads,), out_heads / in_heads))
    first = (mixer > 0).float().argmax(0)
    assert (first.diff() >= 0).all()  # later heads read later heads


# -- the structured product, in blocks ----------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 21])  # a token, a few, all of a layer at a time
@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_blocked_product_and_its_gradients_are_those_of_einsum(block_bytes, share_layers, per_head, monkeypatch):
    monkeypatch.setattr(structured, "_BLOCK_BYTES", block_bytes)
    h, d, g, e = BIG
    projector = randomised(HeadwiseMapProjector(*BIG, L, share_layers=share_layers, per_head=per_head)).double()
    assert projector._direct_pays
    x = torch.randn(L, 2, 3, h * d, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(L, 2, 3, g * e, dtype=torch.float64)
    parameters = [x, projector.mixer, projector.size, projector.bias]
    got = torch.autograd.grad((projector(x) * weights).sum(), parameters)
    weight_PIO, bias_PO = projector.to_flat()
    slow = torch.einsum("lbti,lio->lbto", x, weight_PIO.expand(L, -1, -1)) + bias_PO.expand(L, -1)[:, None, None]
    torch.testing.assert_close(projector(x), slow, atol=1e-12, rtol=1e-10)
    for one, other in zip(got, torch.autograd.grad((slow * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)
    projector.freeze()
    torch.testing.assert_close(torch.autograd.grad((projector(x) * weights).sum(), x)[0], got[0], atol=0, rtol=0)
    projector.requires_grad_(True)
    (alone,) = torch.autograd.grad((projector(x.detach()) * weights).sum(), projector.size)
    torch.testing.assert_close(alone, got[2], atol=0, rtol=0)


def test_blocked_product_under_autocast_and_of_strided_input():
    projector = randomised(HeadwiseMapProjector(*BIG, L))
    x = torch.randn(B, L, T, BIG[0] * BIG[1]).transpose(0, 1).requires_grad_()
    plain = projector(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = projector(x)
        assert out.dtype == torch.float32 and torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, projector.to_flat()[0].sum(2)[:, None, None].expand_as(grad), atol=1e-4, rtol=1e-4)


# -- low rank, elastic, residual ----------------------------------------------------------------------


def test_low_rank_takes_the_nearest_weight_of_its_rank():
    weight, bias = torch.randn(L, H * D, G * E), torch.randn(L, G * E)
    for rank in (1, 3, 10):
        projector = LowRankProjector(H, D, G, E, L, rank=rank)
        projector.set_flat(weight, bias)
        got = projector.to_flat()[0]
        left, scale, right = torch.linalg.svd(weight.double(), full_matrices=False)
        nearest = (left[..., :rank] * scale[:, None, :rank]) @ right[:, :rank]
        torch.testing.assert_close(got.double(), nearest, atol=1e-5, rtol=1e-5)
        x = torch.randn(L, B, H * D)
        slow = torch.stack([x[i] @ got[i] + bias[i] for i in range(L)])
        torch.testing.assert_close(projector(x), slow, atol=1e-4, rtol=1e-4)
        again = LowRankProjector(H, D, G, E, L, rank=rank)
        again.set_flat(got.detach(), bias)
        torch.testing.assert_close(again.to_flat()[0], got, atol=1e-5, rtol=1e-5)
    for rank in (0, 11):
        with pytest.raises(RecipeError, match=f"rank {rank} of a map from 12 to 10 channels"):
            LowRankProjector(H, D, G, E, L, rank=rank)


@pytest.mark.parametrize("share_layers", [False, True])
def test_elastic_is_norm_and_mlp(share_layers):
    projector = randomised(ElasticProjector(H, D, G, E, L, hidden=7, share_layers=share_layers))
    x = torch.randn(L, B, T, H * D)
    got = projector(x)
    for layer in range(L):
        row = 0 if share_layers else layer
        normed = x[layer] / (x[layer].square().mean(-1, keepdim=True) + 1e-6).sqrt() * projector.gain[row]
        inner = normed @ projector.down[row] + projector.down_bias[row]
        bent = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        torch.testing.assert_close(got[layer], bent @ projector.up[row] + projector.bias[row], atol=1e-3, rtol=1e-4)
    with pytest.raises(AlignmentError, match="not linear"):
        projector.to_flat()
    assert torch.isfinite(projector(torch.zeros(L, B, H * D))).all()


@pytest.mark.parametrize("hidden", [1, 9, 20, 33])
def test_elastic_takes_over_a_linear_map_of_normalised_tokens(hidden):
    weight, bias = torch.randn(L, H * D, G * E), torch.randn(L, G * E)
    projector = randomised(ElasticProjector(H, D, G, E, L, hidden=hidden))
    projector.set_flat(weight, bias)
    nearest = torch.zeros_like(weight)
    if hidden > 1:
        low_rank = LowRankProjector(H, D, G, E, L, rank=min(hidden // 2, G * E))
        low_rank.set_flat(weight, bias)
        nearest = low_rank.to_flat()[0]
    x = torch.randn(L, B, H * D) * 30
    slow = projector.regressors(x) @ nearest + bias[:, None]
    torch.testing.assert_close(projector(x), slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(projector.regressors(x).square().mean(-1), torch.ones(L, B), atol=1e-4, rtol=0)
    before = [p.clone() for p in projector.parameters()]
    optimiser = torch.optim.SGD(projector.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        (projector(x) - torch.randn(L, B, G * E)).square().sum().backward()
        optimiser.step()
    assert all((p != b).any() for p, b in zip(projector.parameters(), before, strict=True))
    assert (projector.up.grad.abs().sum(2) > 0).any(), "no hidden unit learns"


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("residual")])
def test_residual_starts_as_its_first_guess_and_learns_a_correction(kind, share_layers):
    projector = make_projector(
        ends=(H, D, G, E), num_layers=L, init="uniform", share_layers=share_layers, **KINDS[kind]
    )
    guess = KVDimensionProjector(H, D, G, E, L, share_layers=share_layers)
    weight, bias = torch.randn_like(guess.weight), torch.randn_like(guess.bias)
    x = torch.randn(L, B, T, H * D)
    guess.set_flat(projector.guess_weight, projector.guess_bias)
    assert torch.equal(projector(x), guess(x))
    projector.set_flat(weight, bias)
    guess.set_flat(weight, bias)
    assert torch.equal(projector(x), guess(x))
    projector(x).square().mean().backward()
    assert projector.gate.grad.abs().min() > 0  # the gate opens first, then the correction learns
    with torch.no_grad():
        projector.gate.copy_(torch.randn(projector.num_rows))
    opened = guess(x) + projector.gate.expand(L)[:, None, None, None] * projector.correction(x)
    torch.testing.assert_close(projector(x), opened, atol=1e-4, rtol=1e-4)
    if "elastic" in kind:
        with pytest.raises(AlignmentError, match="not linear"):
            projector.to_flat()
    else:
        flat = KVDimensionProjector(H, D, G, E, L, share_layers=share_layers)
        flat.set_flat(*projector.to_flat())
        torch.testing.assert_close(flat(x), opened, atol=1e-4, rtol=1e-4)
    projector.set_flat(weight, bias)
    assert torch.equal(projector(x), guess(x))


# -- conversions --------------------------------------------------------------------------------------


EXACT = [
    ("structured", {"to": "flat"}),
    ("per head", {"to": "flat"}),
    ("low rank", {"to": "flat"}),
    ("residual structured", {"to": "flat"}),
    ("structured", {"to": "structured", "per_head": True}),
    ("low rank", {"to": "flat", "rank": 5}),
    ("flat", {"to": "flat", "rank": 10}),
    ("flat", {"to": "elastic", "residual": True}),
    ("per head", {"to": "structured", "residual": True}),
]


@pytest.mark.parametrize("layers", [{}, {"share_layers": True}, {"share_layers": False}])
@pytest.mark.parametrize(("kind", "wanted"), EXACT)
def test_exact_conversions_are_the_same_function(kind, wanted, layers):
    projector = randomised(make_projector(ends=(H, D, G, E), num_layers=L, share_layers=True, **KINDS[kind]))
    made = convert(projector, **wanted, **layers)
    x = torch.randn(L, B, T, H * D)
    torch.testing.assert_close(made(x), projector(x), atol=1e-4, rtol=1e-4)
    assert made.share_layers == layers.get("share_layers", True)
    assert isinstance(made, ResidualProjector) == wanted.get("residual", False)
    back = convert(made, "flat") if wanted["to"] != "elastic" else projector
    torch.testing.assert_close(back(x), projector(x), atol=1e-4, rtol=1e-4)
    if not made.share_layers and wanted["to"] != "elastic":
        torch.testing.assert_close(convert(made, **wanted, share_layers=True)(x), projector(x), atol=1e-4, rtol=1e-4)


def test_conversions_that_are_not_exact_say_why():
    flat = randomised(KVDimensionProjector(H, D, G, E, L))
    per_head = randomised(HeadwiseMapProjector(H, D, G, E, L, per_head=True))
    with pytest.raises(AlignmentError, match=r"no structured projector .* nearest is 0\.\d+ of the weights away"):
        convert(flat, "structured")
    with pytest.raises(AlignmentError, match="no structured projector"):
        convert(per_head, "structured")
    with pytest.raises(AlignmentError, match="no flat projector"):
        convert(flat, "flat", rank=4)
    with pytest.raises(AlignmentError, match="layers differ by"):
        convert(flat, "flat", share_layers=True)
    with pytest.raises(AlignmentError, match="an elastic projector is not linear"):
        convert(ElasticProjector(H, D, G, E, L), "flat")
    with pytest.raises(AlignmentError, match="an elastic projector normalises"):
        convert(flat, "elastic")


def test_options_that_do_not_go_together_say_so():
    ends = (H, D, G, E)
    with pytest.raises(RecipeError, match="unknown projection 'round'"):
        make_projector("round", ends)
    with pytest.raises(RecipeError, match=r"align\.rank: rank 2 with projection structured"):
        make_projector("structured", ends, rank=2)
    with pytest.raises(RecipeError, match=r"align\.elastic_hidden: elastic_hidden 8 with projection flat"):
        make_projector("flat", ends, hidden=8)
    with pytest.raises(RecipeError, match="unknown init 'zeros'"):
        make_projector("elastic", ends, init="zeros")
    assert set(PROJECTORS) == {"flat", "structured", "elastic"}


@pytest.mark.parametrize("shape", [(L, B, H * D + 1), (L + 1, B, H * D)])
@pytest.mark.parametrize("share_layers", [False, True])
def test_tensors_that_do_not_fit_say_so(shape, share_layers):
    with pytest.raises(AlignmentError, match=f"{L} layers of {H} x {D}"):
        KVDimensionProjector(H, D, G, E, L, share_layers=share_layers)(torch.zeros(shape))
    with pytest.raises(AlignmentError, match="needs a weight"):
        KVDimensionProjector(H, D, G, E, L).set_flat(torch.zeros(1, H * D, G * E), torch.zeros(1, G * E))
