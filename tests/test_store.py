"""The store: resumed writers, checksums that name the shard, targets that come back as they were packed."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.core.errors import StoreError, TrainingStopped
from kvdistill.core.files import append_json_line, read_json_lines, replacing, write_json, write_text
from kvdistill.core.kv import KV
from kvdistill.core.targets import TeacherTargets
from kvdistill.store.packed import TargetReader, pack_targets
from kvdistill.store.shards import JOURNAL, MANIFEST, StoreReader, StoreWriter, find_store, store_folder

IDENTITY = {"teacher": "abc", "tokenizer": "def", "layers": [0, 2], "dtype": "float32"}
SHARDS = [{"x": torch.arange(5.0) + i, "y": torch.full((2, 3), i)} for i in range(4)]


def writer(root, **changes) -> StoreWriter:
    return StoreWriter(root, "targets", "one", {**IDENTITY, **changes})


def written(root):
    with writer(root) as made:
        for shard in SHARDS:
            made.add(shard)
        return made.finish({"layers": [0, 2]})


def assert_holds_all(folder) -> None:
    shards = StoreReader(folder).shards
    assert len(shards) == len(SHARDS)
    for got, want in zip(shards, SHARDS, strict=True):
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def bytes_of(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("killed_after", range(5))
def test_a_writer_killed_between_shards_goes_on_there(tmp_path, killed_after):
    whole = bytes_of(written(tmp_path / "whole"))
    child = os.fork()
    if child == 0:
        with writer(tmp_path / "killed") as made:
            for shard in SHARDS[:killed_after]:
                made.add(shard)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with writer(tmp_path / "killed") as again:
        assert again.num_shards == killed_after and not again.complete
        for shard in SHARDS[again.num_shards :]:
            again.add(shard)
        assert bytes_of(again.finish({"layers": [0, 2]})) == whole


@pytest.mark.parametrize(
    "damage",
    [
        "torn journal line",
        "torn character",
        "torn shard",
        "lost shard",
        "unjournalled shard",
        "flipped bit",
        "leftover part",
    ],
)
def test_a_writer_keeps_what_is_sound_and_writes_the_rest_again(tmp_path, damage):
    with writer(tmp_path) as made:
        for shard in SHARDS[:3]:
            made.add(shard)
    journal, last = made.folder / JOURNAL, made.folder / "shard-00002.safetensors"
    sound = 2
    if damage == "torn journal line":
        journal.write_bytes(journal.read_bytes()[:-7])
    elif damage == "torn character":
        journal.write_bytes(journal.read_bytes()[:-7] + "é".encode()[:1])
    elif damage == "torn shard":
        last.write_bytes(last.read_bytes()[:-3])
    elif damage == "lost shard":
        last.unlink()
    elif damage == "unjournalled shard":
        (made.folder / "shard-00003.safetensors").write_bytes(b"half")
        sound = 3
    elif damage == "flipped bit":
        flip_last_bit(last)
    else:
        (made.folder / ".shard-00003.safetensors.part-1").write_bytes(b"half")
        sound = 3
    for number in range(sound, 4):  # killed and started again after every shard
        with writer(tmp_path) as again:
            assert again.num_shards == number
            again.add(SHARDS[number])
    with writer(tmp_path) as again:
        assert_holds_all(again.finish())


def flip_last_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        (flip_last_bit, "checksum"),
        (lambda p: p.unlink(), "missing"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "truncated or altered"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, what):
    folder = written(tmp_path)
    damage(folder / "shard-00002.safetensors")
    with pytest.raises(StoreError, match=what) as caught:
        StoreReader(folder)
    assert caught.value.place.endswith("shard-00002.safetensors") and str(folder) in caught.value.fix


@pytest.mark.parametrize(
    "changes", [{"teacher": "xyz"}, {"tokenizer": "xyz"}, {"dtype": "bfloat16"}, {"layers": [0]}, {"new": 1}]
)
def test_a_store_of_something_else_is_refused_and_says_of_what(tmp_path, changes):
    folder = written(tmp_path)
    wanted = {**IDENTITY, **changes}
    (key,) = changes
    with pytest.raises(StoreError, match=key) as caught:
        find_store(tmp_path, "targets", "one", wanted, make="kvdistill capture RECIPE")
    assert str(changes[key])[:8] in caught.value.what and "kvdistill capture RECIPE" in caught.value.fix
    others = set(IDENTITY) - {key}
    assert not any(other in caught.value.what for other in others)
    os.rename(folder, store_folder(tmp_path, "targets", "one", wanted))  # put in its place by hand
    with pytest.raises(StoreError, match=key):
        find_store(tmp_path, "targets", "one", wanted, make="kvdistill capture RECIPE")


def test_an_unfinished_store_is_not_read(tmp_path):
    with writer(tmp_path) as made:
        made.add(SHARDS[0])
        with pytest.raises(StoreError, match="no store"):
            find_store(tmp_path, "targets", "one", IDENTITY, make="kvdistill capture RECIPE")
        made.finish()
    assert (find_store(tmp_path, "targets", "one", IDENTITY, make="") / MANIFEST).exists()


def forked(work) -> int:  # type: ignore[no-untyped-def]
    """A child process that does this and leaves without cleaning up; its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def test_two_kills_of_three_writers_leave_what_an_undisturbed_one_does(tmp_path):
    """A writes, B waits for its lock, A is killed; B goes on, is killed midway; C ends it."""
    whole = bytes_of(written(tmp_path / "whole"))
    root, folder = tmp_path / "killed", store_folder(tmp_path / "killed", "targets", "one", IDENTITY)
    written_by, waiting = os.pipe()

    def first() -> None:
        with writer(root) as made:
            for shard in SHARDS[:2]:
                made.add(shard)
            os.write(waiting, b"2")
            signal.pause()

    def second() -> None:
        made = writer(root)
        os.write(waiting, b"w")
        with made:
            assert made.num_shards == 2
            made.add(SHARDS[2])
            os.write(waiting, b"3")
            signal.pause()

    a = forked(first)
    assert os.read(written_by, 1) == b"2"
    b = forked(second)
    assert os.read(written_by, 1) == b"w"
    time.sleep(0.1)
    for child, said in ((a, b"3"), (b, b"")):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if said:
            assert os.read(written_by, 1) == said
    with writer(root) as made:
        assert made.num_shards == 3 and not made.complete
        made.add(SHARDS[3])
        made.finish({"layers": [0, 2]})
    assert bytes_of(folder) == whole


def manifest_of(folder) -> dict:
    found = json.loads((folder / MANIFEST).read_text())
    del found["sha256"]
    return found


@pytest.mark.parametrize("damage", ["repeated", "swapped", "one less", "foreign", "renamed", "journal repeated"])
def test_repeated_missing_and_foreign_shards_are_named(tmp_path, damage):
    folder = written(tmp_path)
    found = manifest_of(folder)  # without a checksum, as older versions wrote it
    shards, place = found["shards"], "shard-00001.safetensors"
    if damage == "repeated":  # what two kills left
        shards.insert(1, shards[0])
        place = "shard-00000.safetensors"
    elif damage == "swapped":
        shards[1], shards[2] = shards[2], shards[1]
        place = "shard-00002.safetensors"
    elif damage == "one less":
        del shards[3]
        place = "shard-00003.safetensors"
    elif damage == "foreign":
        (folder / "notes.txt").write_text("mine")
        place = "notes.txt"
    elif damage == "renamed":
        shards[1]["file"] = "../elsewhere.safetensors"
        place = "elsewhere.safetensors"
    else:
        (folder / MANIFEST).unlink()
        rows = read_json_lines(folder / JOURNAL)
        write_text(folder / JOURNAL, "".join(json.dumps(row) + "\n" for row in [*rows[:3], rows[1], *rows[2:]]))
        with writer(tmp_path) as again:  # the repeated ones are not taken for shards
            assert again.num_shards == 3
            again.add(SHARDS[3])
            assert_holds_all(again.finish())
        return
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(StoreError) as caught:
        StoreReader(folder)
    assert caught.value.place.endswith(place) and "run the stage" in caught.value.fix


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"layers": [\n      0,', '"layers": [\n      1,'),
        lambda text: text.replace('"extra"', '"extr"'),
        lambda text: text.replace('"sha256": "', '"sha25": "', 1),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "",
    ],
)
def test_a_manifest_that_was_altered_is_named(tmp_path, edit):
    folder = written(tmp_path)
    text = (folder / MANIFEST).read_text()
    assert edit(text) != text
    (folder / MANIFEST).write_text(edit(text))
    with pytest.raises(StoreError) as caught:
        StoreReader(folder)
    assert MANIFEST in caught.value.place and str(folder) in caught.value.fix
    with pytest.raises(StoreError, match=r"manifest|JSON"):
        find_store(tmp_path, "targets", "one", IDENTITY, make="kvdistill capture RECIPE")


def test_a_store_with_other_examples_than_were_captured_is_refused(tmp_path):
    targets = ragged_targets([3, 5], torch.Generator().manual_seed(1))
    with writer(tmp_path) as made:
        made.add(pack_targets([targets], torch.float32))
        folder = made.finish({"layers": list(LAYERS), "rope": "unrotated", "examples": 3})
    with pytest.raises(StoreError, match="hold 2 examples, 3 were captured"):
        TargetReader(folder)


# -- targets ------------------------------------------------------------------------------------------

LAYERS, HEADS, SIZE, TOP_K = (1, 4, 5), 2, 6, 3


def ragged_targets(lengths: list[int], generator: torch.Generator, **parts: bool) -> TeacherTargets:
    """Right-padded random targets; padding holds rubbish that must not come back."""
    B, S = len(lengths), max(lengths)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    real_BS = torch.arange(S)[None] < torch.tensor(lengths)[:, None]
    segments_BS = torch.randint(1, 4, (B, S), generator=generator) * real_BS
    kv = KV(
        keys=tuple(draw(B, HEADS, S, SIZE) for _ in LAYERS),
        values=tuple(draw(B, HEADS, S, SIZE) for _ in LAYERS),
        mask_BT=real_BS,
        positions_BT=torch.arange(S).expand(B, S),
        rope="unrotated",
        layers=LAYERS,
    )
    return TeacherTargets(
        segments_BS=segments_BS,
        kv=kv if parts.get("kv", True) else None,
        nll_B=draw(B).abs(),
        topk_index_BSK=torch.randint(0, 99, (B, S, TOP_K), generator=generator) if parts.get("logits", True) else None,
        topk_logprob_BSK=-draw(B, S, TOP_K).abs() if parts.get("logits", True) else None,
    )


def assert_example_equal(got: TeacherTargets, b: int, want: TeacherTargets, c: int, length: int, **parts: bool) -> None:
    """Example b of `got` is example c of `want`, up to `length`, and zero beyond."""
    assert torch.equal(got.segments_BS[b, :length], want.segments_BS[c, :length])
    assert not got.segments_BS[b, length:].any()
    assert torch.equal(got.nll_B[b], want.nll_B[c])
    if parts["kv"]:
        for mine, theirs in zip((*got.kv.keys, *got.kv.values), (*want.kv.keys, *want.kv.values), strict=True):
            assert torch.equal(mine[b, :, :length], theirs[c, :, :length]) and not mine[b, :, length:].any()
    if parts["logits"]:
        assert torch.equal(got.topk_index_BSK[b, :length], want.topk_index_BSK[c, :length])
        assert torch.equal(got.topk_logprob_BSK[b, :length], want.topk_logprob_BSK[c, :length])


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_targets_come_back_as_they_went_whatever_the_batch(data, tmp_path_factory):
    batches = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
    parts = {"kv": data.draw(st.booleans()), "logits": data.draw(st.booleans())}
    per_shard = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    targets = [ragged_targets(lengths, generator, **parts) for lengths in batches]
    with StoreWriter(tmp_path_factory.mktemp("store"), "targets", "t", {"n": 1}) as made:
        for start in range(0, len(targets), per_shard):
            made.add(pack_targets(targets[start : start + per_shard], torch.float32))
        reader = TargetReader(made.finish({"layers": list(LAYERS), "rope": "unrotated"}))
    where = [(t, c) for t, lengths in enumerate(batches) for c in range(len(lengths))]
    assert reader.num_examples == len(where)
    assert torch.equal(reader.nll(), torch.cat([t.nll_B for t in targets]))
    asked = data.draw(st.lists(st.integers(0, len(where) - 1), min_size=1, max_size=6))  # any order, repeats too
    got = reader.read(asked)
    assert (got.kv is not None) == parts["kv"] and (got.topk_index_BSK is not None) == parts["logits"]
    assert got.segments_BS.shape[1] == max(batches[t][c] for t, c in (where[i] for i in asked))
    for b, i in enumerate(asked):
        t, c = where[i]
        assert_example_equal(got, b, targets[t], c, batches[t][c], **parts)
    if parts["kv"]:
        assert got.kv.rope == "unrotated" and got.kv.layers == LAYERS
        assert torch.equal(got.kv.mask_BT, got.segments_BS > 0)
        assert reader.read(asked, kv=False).kv is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_to_the_nearest_and_only_keys_and_values(tmp_path, dtype):
    targets = ragged_targets([3, 5, 1], torch.Generator().manual_seed(1))
    with StoreWriter(tmp_path, "targets", "t", {}) as made:
        made.add(pack_targets([targets], dtype))
        got = TargetReader(made.finish({"layers": list(LAYERS), "rope": "unrotated"})).read([0, 1, 2])
    real = got.kv.mask_BT[:, None, :, None]
    for mine, theirs in zip((*got.kv.keys, *got.kv.values), (*targets.kv.keys, *targets.kv.values), strict=True):
        assert mine.dtype == dtype and torch.equal(mine, theirs.to(dtype) * real)
        relative = ((mine.float() - theirs) * real).abs() / theirs.abs()
        assert relative.max() <= (2**-8 if dtype == torch.bfloat16 else 2**-11) * 1.01  # half a unit in the last place
    assert torch.equal(got.nll_B, targets.nll_B)
    assert torch.equal(got.topk_logprob_BSK * (got.segments_BS > 0)[..., None], got.topk_logprob_BSK)


# -- files --------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    log = tmp_path / "log.jsonl"
    log.symlink_to("/dev/full")  # a real ENOSPC
    with pytest.raises(TrainingStopped, match="disk is full"):
        append_json_line(log, {"step": 1})


def test_torn_last_lines_are_left_out_and_broken_ones_named(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes('{"a": 1}\n{"b": "é'.encode()[:-1])
    assert read_json_lines(log) == [{"a": 1}]
    write_text(log, '{"a": 1}\n{"b\n{"c": 2}\n')
    with pytest.raises(Exception, match=r"log\.jsonl:2"):
        read_json_lines(log)
