"""Channels that never vary: nothing is divided by their deviation, they are in no mean, and they are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvdistill.align import MapProjectionAligner
from kvdistill.align.channels import ChannelAccumulator, KVStatistics
from kvdistill.core.kv import KV
from kvdistill.core.recipe import AlignRecipe, LossRecipe
from kvdistill.losses import KV_DISTANCES
from kvdistill.match import TeacherMatch

M, G, E, H, D, B, T = 2, 2, 5, 3, 4, 3, 6  # teacher layers (and student's), heads, sizes; batch, tokens
DEAD = {0: (1, 7), 1: (4,)}  # layer -> key channels of the teacher that never vary


def kv_of(heads: int, size: int, seed: int, dead: dict[int, tuple[int, ...]]) -> KV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = ([torch.randn(B, heads, T, size, generator=generator) for _ in range(M)] for _ in "kv")
    for layer, channels in dead.items():
        for channel in channels:
            keys[layer][:, channel // size, :, channel % size] = 3.0
    mask = torch.ones(B, T, dtype=torch.bool)
    positions = torch.arange(T).expand(B, T)
    return KV(tuple(keys), tuple(values), mask, positions, "unrotated", layers=tuple(range(M)))


def fitted(match_in: str = "teacher", dead: dict[int, tuple[int, ...]] = DEAD) -> tuple[MapProjectionAligner, KV, KV]:
    aligner = MapProjectionAligner(AlignRecipe(match_in=match_in), (M, G, E), (M, H, D), seed=3)
    teacher, student = kv_of(G, E, 1, dead), kv_of(H, D, 2, {})
    aligner.fit_statistics([(teacher, None)])
    return aligner, teacher, student


def live_channels(x_LBTC: Tensor, layer: int) -> Tensor:
    return x_LBTC[layer][..., [c for c in range(G * E) if c not in DEAD[layer]]]


def test_dead_channels_are_found_and_both_sides_are_nought_there() -> None:
    aligner, teacher, student = fitted()
    target, _ = aligner.targets(teacher)
    source = aligner.sources(student)
    for layer, channels in DEAD.items():
        assert not target.k[layer][..., channels].any() and not source.k[layer][..., channels].any()
        assert bool(live_channels(source.k, layer).abs().min() > 0)
    assert aligner.num_dead() == {"keys": 3, "values": 0, "channels": M * G * E}
    whole = aligner.own_units(target)
    for layer, channels in DEAD.items():
        assert torch.allclose(whole.k[layer][..., channels], torch.tensor(3.0)), "in its own units it is what it was"


@pytest.mark.parametrize("kind", sorted(KV_DISTANCES))
def test_a_distance_is_the_one_over_live_channels_alone(kind: str) -> None:
    aligner, teacher, student = fitted()
    target, source = aligner.targets(teacher)[0], aligner.sources(student)
    distance = KV_DISTANCES[kind].from_recipe(LossRecipe(kind=kind))
    live = aligner.live()
    assert live is not None
    share = live.k.float().mean(1)[:, None, None]
    found = distance.over_live(source.k, target.k, share)
    for layer in range(M):
        slow = distance(live_channels(source.k, layer), live_channels(target.k, layer))
        assert torch.allclose(found[layer], slow, rtol=1e-5, atol=1e-6), kind


def test_match_figures_know_nothing_of_dead_channels() -> None:
    aligner, teacher, student = fitted()
    target, source = aligner.targets(teacher)[0], aligner.sources(student)
    mask = torch.ones(B, T, dtype=torch.bool)
    whole, alone = TeacherMatch(1, seed=0), TeacherMatch(1, seed=0)
    whole.keys.add(source.k[:1], target.k[:1], mask)
    alone.keys.add(live_channels(source.k, 0)[None], live_channels(target.k, 0)[None], mask)
    for key, value in alone.keys.figures().items():
        if isinstance(value, float):
            assert whole.keys.figures()[key] == pytest.approx(value, rel=1e-6), key


def test_without_dead_channels_nothing_is_touched_and_a_saved_aligner_still_knows_them() -> None:
    aligner, teacher, _ = fitted(dead={})
    assert aligner.live() is None and aligner.num_dead()["keys"] == 0
    assert torch.equal(aligner.targets(teacher)[0].k, aligner.teacher_channels(teacher)[0].k)
    dead, other = fitted()[0], MapProjectionAligner(AlignRecipe(), (M, G, E), (M, H, D), seed=4)
    assert other.live() is None
    other.load_state_dict(dead.state_dict())
    assert other.num_dead() == dead.num_dead() and other.live() is not None
    assert fitted("student")[0].live() is None, "there the two meet in the student's channels"


def test_statistics_say_which_channels_are_dead() -> None:
    accumulator = ChannelAccumulator(M, G * E)
    keys = torch.stack([k.transpose(1, 2).flatten(2) for k in kv_of(G, E, 1, DEAD).keys])
    accumulator.update(keys, torch.ones(B, T, dtype=torch.bool))
    found = accumulator.statistics()
    assert found.dead_LC is not None and found.dead_LC.nonzero().tolist() == [[0, 1], [0, 7], [1, 4]]
    assert bool((found.std_LC[found.dead_LC] == 1).all())
    assert found.select([1]).dead_LC.tolist() == found.dead_LC[1:].tolist()
    assert KVStatistics.from_tensors(KVStatistics(found, found).tensors()).keys.dead_LC is None
