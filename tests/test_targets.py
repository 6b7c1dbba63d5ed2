"""Teacher targets on disk: queries, scores and scalings come back as they went; old stores still read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.core.kv import KV
from kvdistill.core.targets import TeacherTargets
from kvdistill.store.packed import TargetReader, pack_targets
from kvdistill.store.shards import StoreWriter

LAYERS, KV_HEADS, HEADS, SIZE, TOP_K = (1, 4, 5), 2, 6, 7, 4
SCALING = (0.5, 1.0, 0.125)


def made_targets(lengths, seed=0, *, left=False, queries=True, scores=True, nll=True, kv=True, logits=True):
    """Random targets with rubbish at padding, which stands on the right or on the left."""
    g = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    place = torch.arange(S)[None].expand(B, S)
    count = torch.tensor(lengths)[:, None]
    real_BS = place >= S - count if left else place < count
    cache = KV(
        keys=tuple(draw(B, KV_HEADS, S, SIZE) for _ in LAYERS),
        values=tuple(draw(B, KV_HEADS, S, SIZE) for _ in LAYERS),
        mask_BT=real_BS,
        positions_BT=(real_BS.long().cumsum(1) - 1).clamp_min(0),
        rope="unrotated",
        queries=tuple(draw(B, HEADS, S, SIZE) for _ in LAYERS) if queries else (),
        layers=LAYERS,
        scaling=SCALING,
    )
    return TeacherTargets(
        segments_BS=torch.randint(1, 4, (B, S), generator=g) * real_BS,
        kv=cache if kv else None,
        nll_B=draw(B).abs() if nll else None,
        topk_index_BSK=torch.randint(0, 99, (B, S, TOP_K), generator=g) if logits else None,
        topk_logprob_BSK=-draw(B, S, TOP_K).abs() if logits else None,
        scores_BSMRG=draw(B, S, len(LAYERS), 2, KV_HEADS) if scores else None,
    )


def stored(folder, batches, dtype=torch.float32, per_shard=1, **extra):
    with StoreWriter(folder, "targets", "t", {"n": 1}) as writer:
        for start in range(0, len(batches), per_shard):
            writer.add(pack_targets(batches[start : start + per_shard], dtype))
        return TargetReader(writer.finish({"layers": list(LAYERS), "rope": "unrotated", **extra}))


def real_part(x_BS, batch, b):
    return x_BS[b][batch.segments_BS[b] > 0]


@settings(max_examples=20)
@given(data=st.data())
def test_queries_and_scores_come_back_as_they_went(data, tmp_path_factory):
    sizes = data.draw(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=3))
    parts = {name: data.draw(st.booleans()) for name in ("queries", "scores", "nll", "kv", "logits")}
    left = data.draw(st.booleans())
    batches = [made_targets(lengths, seed, left=left, **parts) for seed, lengths in enumerate(sizes)]
    reader = stored(tmp_path_factory.mktemp("s"), batches, per_shard=data.draw(st.integers(1, 2)), scaling=SCALING)
    where = [(t, b) for t, lengths in enumerate(sizes) for b in range(len(lengths))]
    asked = data.draw(st.lists(st.integers(0, len(where) - 1), min_size=1, max_size=5))
    got = reader.read(asked)
    assert (got.kv is not None, got.scores_BSMRG is not None) == (parts["kv"], parts["scores"])
    assert (got.nll_B is not None, reader.nll() is not None) == (parts["nll"], parts["nll"])
    if parts["kv"]:
        assert got.kv.scaling == SCALING and len(got.kv.queries) == (len(LAYERS) if parts["queries"] else 0)
    for row, i in enumerate(asked):
        batch, b = batches[where[i][0]], where[i][1]
        length = int((batch.segments_BS[b] > 0).sum())
        if parts["nll"]:
            assert got.nll_B[row] == batch.nll_B[b]
        if parts["scores"]:
            assert got.scores_BSMRG[row, :length].equal(real_part(batch.scores_BSMRG, batch, b))
            assert not got.scores_BSMRG[row, length:].any()
        if parts["kv"]:
            mine = (*got.kv.keys, *got.kv.values, *got.kv.queries)
            theirs = (*batch.kv.keys, *batch.kv.values, *batch.kv.queries)
            for x, y in zip(mine, theirs, strict=True):
                assert x[row, :, :length].transpose(0, 1).equal(real_part(y.transpose(1, 2), batch, b))
                assert not x[row, :, length:].any()


def test_each_part_is_read_only_where_it_is_asked_for(tmp_path):
    reader = stored(tmp_path, [made_targets([3, 5, 2])], scaling=list(SCALING))
    shapes = {n: tuple(x.shape) for n, x in pack_targets([made_targets([3, 5, 2])], torch.float32).items()}
    assert shapes["queries"] == (10, 3, HEADS, SIZE) and shapes["scores"] == (10, 3, 2, KV_HEADS)
    everything = reader.read([2, 0])
    assert everything.scores_BSMRG.shape == (2, 3, 3, 2, KV_HEADS) and everything.scores_BSMRG.dtype == torch.float32
    assert everything.kv.queries[0].shape == (2, HEADS, 3, SIZE)
    assert (
        everything.kv.queries[0].untyped_storage().data_ptr() == everything.kv.queries[2].untyped_storage().data_ptr()
    )
    assert reader.read([0], queries=False).kv.queries == ()
    assert reader.read([0], scores=False).scores_BSMRG is None
    none = reader.read([0], kv=False, logits=False, scores=False)
    assert none.kv is None and none.topk_index_BSK is None and none.nll_B is not None
    moved = everything.to("cpu")
    assert moved.scores_BSMRG.equal(everything.scores_BSMRG) and moved.kv.scaling == SCALING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_stay_float32_and_queries_are_rounded_like_keys(tmp_path, dtype):
    targets = made_targets([4, 6])
    got = stored(tmp_path, [targets], dtype).read([1])
    assert got.kv.queries[1].dtype == dtype and got.kv.queries[1].equal(targets.kv.queries[1][1:].to(dtype))
    assert got.scores_BSMRG.dtype == torch.float32 and got.scores_BSMRG.equal(targets.scores_BSMRG[1:])


def test_a_store_from_before_queries_were_kept_still_reads(tmp_path):
    targets = made_targets([4, 6], queries=False, scores=False)
    got = stored(tmp_path, [targets]).read([0, 1])  # no `scaling` in its manifest either
    assert got.kv.scaling is None and got.kv.queries == () and got.scores_BSMRG is None
    assert got.kv.keys[2][1].equal(targets.kv.keys[2][1])


def test_encoders_targets_have_no_nll(tmp_path):
    reader = stored(tmp_path, [made_targets([4, 6], nll=False), made_targets([1], nll=False)])
    assert reader.nll() is None and reader.read([2, 0]).nll_B is None
    assert made_targets([4], nll=False).to("cpu").nll_B is None
