"""Projectors: the structured form against einsum by hand and its flat weight, initial values, state."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvdistill.align.heads import (
    PROJECTORS,
    HeadwiseMapProjector,
    KVDimensionProjector,
    make_matrix,
    spread_heads,
)
from kvdistill.core.runtime import AlignmentError, RecipeError

H, D, G, E, L, B, T = 3, 4, 2, 5, 6, 7, 8
BIG = (8, 6, 7, 9)  # enough heads that the structured product is not taken through the flat weight


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


def test_uniform_init_averages_heads_and_keeps_sizes():
    x = torch.randn(1, B, 4, 6)
    for kind in PROJECTORS.values():
        out = kind(4, 6, 2, 6, 1, init="uniform")(x.flatten(2)).view(1, B, 2, 6)
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


@pytest.mark.parametrize("kind", PROJECTORS.values())
def test_seeds_freezing_and_state_on_disk(kind, tmp_path):
    one, same, other = (kind(H, D, G, E, L, init="xavier", seed=s) for s in (1, 1, 2))
    x = torch.randn(L, B, H * D)
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    save_file(one.state_dict(), tmp_path / "p.safetensors")
    other.load_state_dict(load_file(tmp_path / "p.safetensors"))
    assert torch.equal(one(x), other(x))
    frozen = kind(H, D, G, E, L, frozen=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None


def test_state_names_are_stable():
    assert set(KVDimensionProjector(H, D, G, E).state_dict()) == {"weight", "bias"}
    assert set(HeadwiseMapProjector(H, D, G, E).state_dict()) == {"mixer", "size", "bias"}


@pytest.mark.parametrize("shape", [(L, B, H * D + 1), (L + 1, B, H * D)])
@pytest.mark.parametrize("share_layers", [False, True])
def test_tensors_that_do_not_fit_say_so(shape, share_layers):
    with pytest.raises(AlignmentError, match=f"{L} layers of {H} x {D}"):
        KVDimensionProjector(H, D, G, E, L, share_layers=share_layers)(torch.zeros(shape))
    with pytest.raises(AlignmentError, match="needs a weight"):
        KVDimensionProjector(H, D, G, E, L).set_flat(torch.zeros(1, H * D, G * E), torch.zeros(1, G * E))
