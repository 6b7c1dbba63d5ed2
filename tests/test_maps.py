"""SparseMap against dense matrices, and KV's own checks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.core import maps
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV, require_frame
from kvdistill.core.maps import SparseMap, evenly_spread, members_first

EXAMPLES = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_map(seed: int, lead: tuple[int, ...], n_out: int, n_in: int, k: int, empty: bool = True) -> SparseMap:
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(n_in, (*lead, n_out, k), generator=random)
    weight = torch.rand(*lead, n_out, k, generator=random)
    if empty:
        weight = weight * (torch.rand(*lead, n_out, 1, generator=random) > 0.3)
    return SparseMap(index, weight, n_in).normalised()


def assert_rows_stochastic(mapping: SparseMap) -> None:
    total = mapping.weight.sum(-1)
    assert (mapping.weight >= 0).all()
    assert ((mapping.index >= 0) & (mapping.index < mapping.n_in)).all()
    torch.testing.assert_close(total, mapping.mask().float())


def dense_apply(mapping: SparseMap, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Leading axes of the map line up with x's from the left; written with explicit loops over those axes."""
    dense = mapping.to_dense()
    lead = dense.ndim - 2
    out = torch.empty(*x.shape[:axis], mapping.n_out, *x.shape[axis + 1 :], dtype=x.dtype)
    for chosen in itertools.product(*map(range, x.shape[:lead])):
        matrix = dense[tuple(0 if dense.shape[i] == 1 else p for i, p in enumerate(chosen))]
        part = x[chosen].movedim(axis - lead, -1)
        out[chosen] = (part.double() @ matrix.double().T).movedim(-1, axis - lead).to(x.dtype)
    return out


@EXAMPLES
@given(
    seed=st.integers(0, 10_000),
    axis=st.integers(0, 4),
    lead=st.integers(0, 4),
    broadcast=st.booleans(),
    n_out=st.integers(1, 9),
    k=st.integers(1, 3),
)
def test_apply_is_the_dense_product_on_every_axis(seed, axis, lead, broadcast, n_out, k):
    shape = (2, 3, 5, 4, 6)
    lead = min(lead, axis)
    lead_shape = tuple(1 if broadcast and i == seed % (lead or 1) else shape[i] for i in range(lead))
    mapping = random_map(seed, lead_shape, n_out, shape[axis], k)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    got = mapping.apply(x, axis)
    torch.testing.assert_close(got, dense_apply(mapping, x, axis), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mapping.apply(x, axis - 5), got, atol=0, rtol=0)


def test_apply_reads_strided_tensors_and_keeps_dtype():
    mapping = random_map(1, (2,), 7, 5, 2)
    x = torch.randn(2, 5, 3, 4).transpose(1, 2)
    torch.testing.assert_close(mapping.apply(x, 2), mapping.apply(x.contiguous(), 2), atol=0, rtol=0)
    assert mapping.apply(x.bfloat16(), 2).dtype == torch.bfloat16
    assert mapping.apply(x.double(), 2).dtype == torch.float64


def test_apply_carries_the_gradient_of_x():
    for lead in ((), (2,)):
        mapping = random_map(3, lead, 4, 5, 2)
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda y, m=mapping: m.apply(y, 2), (x,))


LAYOUTS = {
    "as it stands": lambda x: x,
    "heads after tokens": lambda x: x.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4),
    "one layer of a block": lambda x: torch.stack([x + 1, x, x - 1], dim=3)[:, :, :, 1],
    "every second token": lambda x: x.repeat_interleave(2, dim=3)[:, :, :, ::2],
    "not the first row": lambda x: torch.cat([x.mean(1, keepdim=True), x], dim=1)[:, 1:],
    "rows that do not divide": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
    "one example for all": lambda x: x[:1].expand_as(x),
    "reversed axes": lambda x: x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (2,), (2, 1), (1, 3), (2, 3, 4)])
def test_apply_reads_any_memory_where_it_lies(layout, dtype, lead):
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, 16, dtype=dtype))
    mapping = random_map(7, lead, 6, 5, 3)
    expected = dense_apply(mapping, x, 3)
    for _ in range(2):  # the second time from what the map remembers
        torch.testing.assert_close(mapping.apply(x, 3), expected, atol=1e-6, rtol=1e-6)
    graphed = mapping.apply(x.clone().requires_grad_(), 3)
    torch.testing.assert_close(graphed.detach(), expected, atol=1e-6, rtol=1e-6)
    for out in (torch.full((2, 3, 4, 6, 16), torch.nan, dtype=dtype), torch.empty(2, 4, 6, 3, 16, dtype=dtype)):
        out = out if out.shape[1] == 3 else out.permute(0, 3, 1, 2, 4)
        assert mapping.apply(x, 3, out=out) is out
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_one_map_on_tensors_of_many_layouts_in_turn():
    mapping = random_map(5, (2,), 6, 5, 2)
    for shape in ((2, 5, 16), (2, 5, 32), (2, 5, 4, 16), (2, 5, 16)):
        for make in (torch.randn, lambda *s: torch.randn(*s, dtype=torch.float64)):
            x = make(*shape)
            torch.testing.assert_close(mapping.apply(x, 1), dense_apply(mapping, x, 1), atol=1e-5, rtol=1e-5)


def test_out_is_written_in_chunks(monkeypatch):
    monkeypatch.setattr(maps, "CHUNK_BYTES", 3 * 32 * 4)
    mapping = random_map(2, (3,), 11, 5, 2)
    mapping.weight[0, 3:6] = 0  # one chunk with nothing to read
    x, out = torch.randn(3, 5, 32), torch.full((3, 11, 32), torch.nan)
    mapping.apply(x, 1, out=out)
    torch.testing.assert_close(out, dense_apply(mapping, x, 1), atol=1e-6, rtol=1e-6)


@EXAMPLES
@given(seed=st.integers(0, 10_000), width=st.sampled_from([1, 16]), lead=st.sampled_from([(), (2,)]))
def test_nan_at_slots_of_weight_zero_reaches_nothing(seed, width, lead):
    mapping = random_map(seed, lead, 6, 5, 2)
    hidden = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)) > 0.5
    mapping = mapping.masked_source(~hidden)
    x = torch.randn(2, 5, width)
    spoiled = x.masked_fill(hidden[..., None], torch.nan)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = mapping.apply(spoiled.to(dtype), 1)
        torch.testing.assert_close(got, mapping.apply(x.to(dtype), 1), atol=0, rtol=0)
        assert (got[~mapping.mask().expand(2, 6)] == 0).all()
    graphed = spoiled.clone().requires_grad_()
    out = mapping.apply(graphed, 1)
    torch.testing.assert_close(out.detach(), mapping.apply(x, 1), atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), graphed)
    assert torch.isfinite(gradient).all()
    assert (gradient[hidden] == 0).all()


def test_a_map_with_nothing_in_it_gives_zeros():
    mapping = SparseMap(torch.zeros(2, 3, 1, dtype=torch.int64), torch.zeros(2, 3, 1), 4)
    x, out = torch.full((2, 4, 16), torch.nan), torch.ones(2, 3, 16)
    assert torch.equal(mapping.apply(x, 1), torch.zeros(2, 3, 16))
    assert torch.equal(mapping.apply(x, 1, out=out), torch.zeros(2, 3, 16))
    assert torch.equal(mapping.apply(x.requires_grad_(), 1), torch.zeros(2, 3, 16))


def test_apply_carries_the_gradient_of_the_weights():
    index = torch.tensor([[[0, 1], [2, 4], [3, 3]]])
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    weight = torch.rand(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: SparseMap(index, w, 5).apply(x, 1), (weight,))


@EXAMPLES
@given(members=st.lists(st.booleans(), min_size=1, max_size=9), data=st.data())
def test_evenly_spread_takes_both_ends_and_mirrors(members, data):
    count = sum(members)
    order = members_first(torch.tensor([members]))[0].tolist()
    assert order == [i for i, m in enumerate(members) if m] + [i for i, m in enumerate(members) if not m]
    if not count:
        return
    taken = data.draw(st.integers(1, count))
    ranks = evenly_spread(torch.tensor([count]), torch.tensor([taken]), 9)[0, :taken].tolist()
    assert sorted(set(ranks)) == ranks
    assert ranks[0] == 0
    if taken > 1:
        assert ranks[-1] == count - 1
        ideal = [i * (count - 1) / (taken - 1) for i in range(taken)]
        assert max(abs(a - b) for a, b in zip(ranks, ideal, strict=True)) <= 0.5
        mirrored = [count - 1 - r for r in reversed(ranks)]
        middle = taken // 2 if taken % 2 and count % 2 == 0 else None
        assert all(a == b for i, (a, b) in enumerate(zip(ranks, mirrored, strict=True)) if i != middle)


def test_bfloat16_is_summed_in_float32():
    mapping = SparseMap(torch.tensor([[[0, 1, 2, 3]]]), torch.full((1, 1, 4), 0.25), 4)
    x = torch.tensor([[256.0, 1.0, 1.0, 2.0]]).bfloat16()  # a bfloat16 running sum would stay at 64
    assert mapping.apply(x, 1).item() == 65.0


@EXAMPLES
@given(
    seed=st.integers(0, 10_000),
    lead=st.sampled_from([((), ()), ((3,), ()), ((), (3,)), ((3,), (3,)), ((2, 1), (3,)), ((1,), (4,))]),
    n=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5)),
    k=st.tuples(st.integers(1, 3), st.integers(1, 2)),
)
def test_compose_is_the_dense_product(seed, lead, n, k):
    outer = random_map(seed, lead[0], n[0], n[1], k[0])
    first = random_map(seed + 1, lead[1], n[1], n[2], k[1])
    both = outer.compose(first)
    assert both.index.shape[-1] == k[0] * k[1]
    torch.testing.assert_close(both.to_dense(), outer.to_dense() @ first.to_dense(), atol=1e-6, rtol=1e-5)


@EXAMPLES
@given(seed=st.integers(0, 10_000), lead=st.sampled_from([(), (3,), (1,)]), mask_lead=st.sampled_from([(), (3,)]))
def test_masked_source_gives_nothing_and_renormalises(seed, lead, mask_lead):
    mapping = random_map(seed, lead, 6, 5, 2)
    mask = torch.rand(*mask_lead, 5, generator=torch.Generator().manual_seed(seed)) > 0.4
    got = mapping.masked_source(mask)
    dense = mapping.to_dense() * mask[..., None, :]
    total = dense.sum(-1, keepdim=True)
    reference = torch.where(total > 0, dense / total.clamp_min(1e-20), torch.zeros_like(dense))
    torch.testing.assert_close(got.to_dense(), reference.expand_as(got.to_dense()), atol=1e-6, rtol=1e-5)
    assert_rows_stochastic(got)


@EXAMPLES
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4))
def test_from_dense_round_trip_and_top_k(seed, k):
    mapping = random_map(seed, (2,), 5, 7, 3)
    torch.testing.assert_close(SparseMap.from_dense(mapping.to_dense()).to_dense(), mapping.to_dense())
    kept = SparseMap.from_dense(mapping.to_dense(), k)
    assert kept.index.shape[-1] == k
    assert_rows_stochastic(kept)


@EXAMPLES
@given(place=st.lists(st.floats(-3, 12, width=32), min_size=1, max_size=6), n_in=st.integers(1, 8))
def test_interpolate_is_numpy_interp(place, n_in):
    mapping = SparseMap.interpolate(torch.tensor(place), n_in)
    assert_rows_stochastic(mapping)
    x = torch.randn(n_in, generator=torch.Generator().manual_seed(n_in))
    reference = np.interp(np.array(place), np.arange(n_in), x.double().numpy())
    torch.testing.assert_close(mapping.apply(x, 0).double(), torch.from_numpy(reference), atol=1e-5, rtol=1e-4)


def test_empty_rows_give_zero_and_are_masked():
    mapping = SparseMap.take(torch.tensor([[1, 99, -4]]), 3, torch.tensor([[True, False, False]]))
    assert mapping.mask().tolist() == [[True, False, False]]
    x = torch.randn(1, 3, 2)
    out = mapping.apply(x, 1)
    assert torch.equal(out[0, 0], x[0, 1])
    assert torch.equal(out[0, 1:], torch.zeros(2, 2))
    assert not torch.isnan(mapping.normalised().weight).any()


def test_identity_is_known_and_near_misses_are_not():
    assert SparseMap.identity(4).is_identity()
    x = torch.randn(2, 4, 3)
    assert torch.equal(SparseMap.identity(4).apply(x, 1), x)
    assert not SparseMap.take(torch.tensor([0, 2, 1]), 3).is_identity()
    assert not SparseMap.take(torch.arange(3), 3, torch.tensor([True, True, False])).is_identity()
    assert not SparseMap.take(torch.arange(3), 4).is_identity()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SparseMap(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), 4),
        lambda: SparseMap.identity(3).apply(torch.zeros(2, 4), 1),
        lambda: random_map(0, (2, 3), 4, 5, 1).apply(torch.zeros(2, 5), 1),
        lambda: random_map(0, (3,), 4, 5, 1).apply(torch.zeros(2, 5), 1),
        lambda: SparseMap.identity(3).compose(SparseMap.identity(4)),
    ],
)
def test_maps_that_do_not_fit_say_so(wrong):
    with pytest.raises(AlignmentError, match="SparseMap"):
        wrong()


def make_kv(layers: int = 3, B: int = 2, H: int = 4, T: int = 5, D: int = 6, **options) -> KV:
    def tensors() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(B, H, T, D) for _ in range(layers))

    fields = {"mask_BT": torch.ones(B, T, dtype=torch.bool), "positions_BT": torch.arange(T).expand(B, T)}
    return KV(tensors(), tensors(), rope="unrotated", **(fields | options))


def test_kv_numbers_its_layers_and_selects_them():
    kv = make_kv(layers=4)
    assert kv.layers == (0, 1, 2, 3)
    chosen = kv.select_layers([3, 1])
    assert chosen.layers == (3, 1)
    assert chosen.keys[0] is kv.keys[3]
    k, v = chosen.stacked()
    assert k.shape == v.shape == (2, 2, 4, 5, 6)
    assert torch.equal(k[:, 1], kv.keys[1])


def test_kv_refuses_shapes_that_do_not_fit():
    with pytest.raises(AlignmentError, match="layer 0"):
        make_kv(mask_BT=torch.ones(2, 9, dtype=torch.bool))
    mask, positions = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(AlignmentError, match="2 key layers and 1 value"):
        KV((torch.zeros(2, 1, 5, 3),) * 2, (torch.zeros(2, 1, 5, 3),), mask, positions, "none")


def test_kv_detaches_and_keeps_its_frame():
    kv = make_kv()
    kv = kv.map_layers(lambda x: x.requires_grad_())
    assert not any(k.requires_grad for k in kv.detach().keys)
    require_frame(kv, frame="unrotated")
    with pytest.raises(AlignmentError, match="rotated keys are needed"):
        require_frame(kv, frame="rotated")
    moved = kv.to(torch.float64)
    assert moved.keys[0].dtype == torch.float64
    assert moved.mask_BT.dtype == torch.bool


def test_kv_stacked_needs_equal_layers():
    mask, positions = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int64)
    layers = (torch.zeros(2, 1, 5, 3), torch.zeros(2, 2, 5, 3))
    with pytest.raises(AlignmentError, match="differ in shape"):
        KV(layers, layers, mask, positions, "none").stacked()
