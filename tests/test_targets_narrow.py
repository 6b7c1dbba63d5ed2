"""A store in bfloat16 or float16 keeps what channels say, however far their mean is from 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_targets import LAYERS, made_targets, real_part
from tiny_recipe import ARMS, SEED, copy_base, tiny_recipe

from kvdistill.arms.arm import Arm
from kvdistill.arms.experiment import Experiment
from kvdistill.core.progress import silent
from kvdistill.core.targets import ChannelMeans
from kvdistill.stages.capture import _capture_split, capture
from kvdistill.store import shards
from kvdistill.store.packed import TargetReader, pack_targets
from kvdistill.store.shards import StoreWriter


def biased(targets: Any, by: float) -> Any:
    """Keys whose channel 3 has a mean of `by` times its deviation."""
    kv = targets.kv
    shift = torch.zeros(kv.keys[0].shape[-1])
    shift[3] = by
    moved = {"keys": tuple(k + shift for k in kv.keys), "queries": tuple(q + shift for q in kv.queries)}
    return replace(targets, kv=replace(kv, **moved))


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-5)])
def test_what_a_channel_says_is_kept_however_large_its_mean_is(tmp_path: Path, dtype: torch.dtype, kept: float) -> None:
    batches = [biased(made_targets([40, 33], seed), 500.0) for seed in (1, 2)]
    means = ChannelMeans.of(batches[0])
    lost = {}
    for name, given in (("centred", means), ("plain", None)):
        with StoreWriter(tmp_path / name, "targets", "t", {"n": 1}) as writer:
            for batch in batches:
                writer.add(pack_targets([batch], dtype, given))
            reader = TargetReader(writer.finish({"layers": list(LAYERS), "rope": "unrotated"}))
        got = reader.read([0, 1, 2, 3])
        assert got.kv is not None and got.kv.keys[0].dtype == (torch.float32 if given else dtype)
        assert not got.kv.keys[0][1, :, 33:].any(), "padding is 0, not the mean"
        lost[name] = []
        for b in range(4):
            batch, row = batches[b // 2], b % 2
            for mine, theirs in zip((*got.kv.keys, *got.kv.queries), (*batch.kv.keys, *batch.kv.queries), strict=True):
                true = real_part(theirs.transpose(1, 2), batch, row)[..., 3]
                off = mine.transpose(1, 2)[b][: len(true), :, 3].float() - true
                lost[name].append(float(off.square().mean() / true.var()))
            again = means.rounded(batch.kv, dtype)
            length = int((batch.segments_BS[row] > 0).sum())
            if given:
                assert torch.equal(again.keys[1][row, :, :length], got.kv.keys[1][b, :, :length]), "as if it ran now"
    assert max(lost["centred"]) < kept
    assert max(lost["plain"]) > 100 * kept


def test_means_know_no_padding_and_no_value_that_is_not_finite() -> None:
    batch = made_targets([5, 2, 7], 3)
    assert batch.kv is not None
    batch.kv.keys[1][2, 1, 4, 6] = torch.nan
    means = ChannelMeans.of(batch)
    rows = [batch.kv.keys[1][b, 1, :n, 6] for b, n in enumerate((5, 2, 7))]
    known = torch.cat(rows)
    assert float(means.kv_M2GE[1, 0, 1, 6]) == pytest.approx(float(known[known.isfinite()].mean()), rel=1e-6)
    assert bool(means.kv_M2GE.isfinite().all()) and means.queries_MHE is not None


def arm_in(run: Path, **changes: Any) -> Arm:
    return Experiment(tiny_recipe(run, arms=ARMS, **changes), run).arm("fixed", SEED)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_and_online_targets_are_rounded_alike_around_the_same_means(tmp_path: Path, dtype: str) -> None:
    run = copy_base(tmp_path)
    arm = arm_in(run, capture={"dtype": dtype})
    for teacher in arm.teachers.values():
        assert teacher.target_identity("train")["centred"] is True
        capture(teacher)
    online = arm_in(run, capture={"dtype": dtype, "source": "online"})
    numbers = [3, 1, 7]
    stored, fresh = (one.load(one.batches("train"), numbers) for one in (arm, online))
    for name in arm.recipe.teachers:
        mine, theirs = stored.targets[name].kv, fresh.targets[name].kv
        for x, y, real in ((x, y, mine.mask_BT) for x, y in zip(mine.keys, theirs.keys, strict=True)):
            difference = (x - y).transpose(1, 2)[real].abs()
            assert x.dtype == y.dtype == torch.float32 and float(difference.max()) < 1e-2
            assert float((difference > 1e-6).float().mean()) < 0.01, "one at the edge may go to its neighbour"


def test_a_float32_store_and_one_in_the_teachers_own_dtype_stay_as_they_are(tmp_path: Path) -> None:
    run = copy_base(tmp_path)
    assert "centred" not in arm_in(run).teachers["one"].target_identity("train")
    arm = arm_in(run, capture={"dtype": "bfloat16"})
    teacher = arm.teachers["one"]
    teacher.recipe = teacher.recipe.model_copy(update={"dtype": "bfloat16"})
    assert not teacher.is_centred and "centred" not in teacher.target_identity("train")


def test_a_killed_capture_goes_on_with_the_means_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_base(tmp_path)
    teacher = arm_in(run, capture={"dtype": "bfloat16"}).teachers["one"]
    monkeypatch.setattr("kvdistill.stages.capture.SHARD_BYTES", 30_000)
    real, written = shards.StoreWriter.add, []

    def dies(writer: StoreWriter, tensors: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        real(writer, tensors)
        written.append(tensors["kv_mean"])

    monkeypatch.setattr(shards.StoreWriter, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        capture(teacher)
    monkeypatch.setattr(shards.StoreWriter, "add", real)
    monkeypatch.setattr(type(teacher), "channel_means", lambda *_: pytest.fail("there are means already"))
    with StoreWriter(run / "store", "targets-train", "one", teacher.target_identity("train")) as writer:
        _capture_split(teacher, "train", writer, teacher.load(), silent)  # the other split has none yet
    reader = TargetReader(teacher.target_folder("train"))
    means = [shard["kv_mean"] for shard in reader._shards]
    assert len(means) > 2 and all(torch.equal(one, written[0]) for one in means)
