"""The benchmarks' own arithmetic: paired ratios, taking turns, and the loop reference against the real thing."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.parts import Case, _build, _check_equal
from benchmarks.report import Row, hardware_slug
from benchmarks.timing import Ratio, Turnstile, interleave, paired_ratio

CPU = torch.device("cpu")
CASE = Case("tiny", student=(3, 2, 6), teacher=(5, 3, 4), batch=2, tokens=40, rounds=1)


def test_a_ratio_is_paired_round_by_round():
    """Rounds of very different length: the ratio of medians would be 3 / 10, the median of ratios is 2."""
    ratio = paired_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.5])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    noisy = paired_ratio([1.0, 1.1, 1.2, 1.3, 5.0], [1.0] * 5)
    assert noisy.median == pytest.approx(1.2)
    assert 1.0 <= noisy.low < 1.2 < noisy.high <= 5.0


def test_bars_are_met_from_the_right_side():
    ratio = Ratio(1.1, 1.0, 1.2)
    assert Row("cost", ratio, 1.2).met and not Row("cost", ratio, 1.05).met
    assert Row("speed-up", ratio, 1.05, at_least=True).met and Row("none", ratio).met is None


def test_loops_take_turns_one_step_at_a_time():
    trace: list[str] = []

    def loop(name: str) -> None:
        for step in range(4):
            trace.extend([f"{name}{step} begins", f"{name}{step} ends"])
            time.sleep(0.002 if name == "a" else 0.0)
            turnstile.end_turn(name)

    turnstile = Turnstile({name: lambda name=name: loop(name) for name in "abc"}, CPU, 1)
    taken = turnstile.run(4)
    assert {name: len(turns) for name, turns in taken.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(turn.wall >= 0.002 for turn in taken["a"])
    assert all(begins[:2] == ends[:2] for begins, ends in zip(trace[::2], trace[1::2], strict=True))
    rounds = [{line[0] for line in trace[i : i + 6]} for i in range(0, len(trace), 6)]
    assert rounds == [{"a", "b", "c"}] * 4


def test_an_error_in_a_loop_is_raised():
    def breaks() -> None:
        raise ValueError("the loop broke")

    with pytest.raises(ValueError, match="the loop broke"):
        Turnstile({"a": breaks}, CPU, 1).run(2)


def test_interleaved_calls_drop_the_warm_up():
    calls = {"a": 0, "b": 0}

    def call(name: str) -> None:
        calls[name] += 1

    taken = interleave({name: lambda name=name: call(name) for name in calls}, warm_up=2, rounds=3, device=CPU)
    assert calls == {"a": 5, "b": 5}
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("stretch", [False, True])
def test_the_loop_reference_is_the_same_loss_with_the_same_gradients(stretch):
    case = replace(CASE, stretch=stretch)
    ours, loops, leaves = _build(case, CPU)
    _check_equal(case, ours, loops, leaves)
    with pytest.raises(AssertionError, match="differ"):
        _check_equal(case, lambda: ours() * 1.01, loops, leaves)


def test_result_files_are_named_after_the_hardware():
    machine = {"processor": "Intel(R) Xeon(R) CPU E5 @ 2.20GHz", "cores": 2}
    assert hardware_slug(machine) == "intel-xeon-cpu-e5-2-cores"
    assert hardware_slug(machine | {"gpu": "NVIDIA H200"}) == "nvidia-h200"
