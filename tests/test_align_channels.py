"""Streaming channel statistics against NumPy on all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvdistill.align.channels import DEAD_CHANNEL_RATIO, ChannelAccumulator, KVStatistics, masked_rows
from kvdistill.core.errors import AlignmentError

L, C = 3, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batches(seed: int, sizes: list[tuple[int, int]], per_layer: bool):
    random = torch.Generator().manual_seed(seed)
    for B, T in sizes:
        x = torch.randn(L, B, T, C, generator=random) * torch.tensor([1e-3, 1, 10, 100, 5]) + 50
        shape = (L, B, T) if per_layer else (B, T)
        yield x, torch.rand(shape, generator=random) > 0.4


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=5),
    per_layer=st.booleans(),
)
def test_streaming_is_numpy_on_everything(seed, sizes, per_layer):
    accumulator = ChannelAccumulator(L, C)
    seen: list[list[np.ndarray]] = [[] for _ in range(L)]
    for x, mask in batches(seed, [(2, 9), *sizes], per_layer):
        mask[..., 0, :2] = True
        accumulator.update(torch.where(mask[..., None], x, torch.nan), mask)
        for layer in range(L):
            seen[layer].append(x[layer][mask[layer] if per_layer else mask].double().numpy())
    got = accumulator.statistics()
    for layer in range(L):
        rows = np.concatenate(seen[layer])
        np.testing.assert_allclose(got.mean_LC[layer].numpy(), rows.mean(0), rtol=1e-6)
        std, mean = rows.std(0), rows.mean(0)
        dead = std <= DEAD_CHANNEL_RATIO * np.maximum(np.abs(mean), np.sqrt(np.mean(std**2)))
        np.testing.assert_allclose(got.std_LC[layer].numpy(), np.where(dead, 1.0, std), rtol=1e-5)


def test_standardised_tokens_have_mean_0_and_std_1():
    stream = list(batches(1, [(3, 8), (2, 5), (4, 6)], False))
    accumulator = ChannelAccumulator(L, C)
    for x, mask in stream:
        accumulator.update(x, mask)
    statistics = accumulator.statistics()
    rows = torch.cat([statistics.standardise(x)[:, mask] for x, mask in stream], dim=1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(L, C), atol=2e-3, rtol=0)  # std 1e-3 beside mean 50 in fp32
    torch.testing.assert_close(rows.std(1, correction=0), torch.ones(L, C), atol=2e-3, rtol=0)


def test_a_large_mean_does_not_cost_the_std():
    x = torch.randn(1, 400, 1, dtype=torch.float64) * 1e-4 + 1e3
    accumulator = ChannelAccumulator(1, 1)
    for part in x.split(37, dim=1):
        accumulator.update(part, torch.ones(part.shape[1], dtype=torch.bool))
    # 1e-7 of the mean is below the floor of a dead channel: look at the sum of squares itself
    square = accumulator._square_LC.item()
    assert square == pytest.approx(x.var(correction=0).item() * 400, rel=1e-6)


def test_dead_channels_get_std_1():
    x = torch.randn(2, 50, 3)
    x[0, :, 1] = 7.25
    x[1, :, 2] = 100 + 1e-4 * torch.randn(50)
    accumulator = ChannelAccumulator(2, 3)
    accumulator.update(x, torch.ones(50, dtype=torch.bool))
    statistics = accumulator.statistics()
    assert statistics.std_LC[0, 1] == 1 and statistics.std_LC[1, 2] == 1
    assert (statistics.std_LC[0, [0, 2]] != 1).all()
    assert statistics.standardise(x)[0, :, 1].abs().max() < 1e-5
    assert statistics.standardise(x)[1, :, 2].abs().max() < 1e-2


def test_saved_and_read_back(tmp_path):
    stats = []
    for seed in (1, 2):
        accumulator = ChannelAccumulator(L, C)
        for x, mask in batches(seed, [(4, 9)], False):
            accumulator.update(x, mask)
        stats.append(accumulator.statistics())
    both = KVStatistics(*stats)
    save_file(both.tensors(), tmp_path / "s.safetensors")
    back = KVStatistics.from_tensors(load_file(tmp_path / "s.safetensors"))
    for name, tensor in both.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    assert torch.equal(both.select([2, 0]).keys.mean_LC, both.keys.mean_LC[[2, 0]])
    with pytest.raises(AlignmentError, match=r"lack values\.std"):
        KVStatistics.from_tensors({k: v for k, v in both.tensors().items() if k != "values.std"})


def test_no_tokens_and_wrong_masks_say_so():
    accumulator = ChannelAccumulator(L, C)
    accumulator.update(torch.zeros(L, 2, 4, C), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(AlignmentError, match="no tokens"):
        accumulator.statistics()
    with pytest.raises(AlignmentError, match="mask"):
        masked_rows(torch.zeros(L, 2, 4, C), torch.zeros(4, 2, dtype=torch.bool))
