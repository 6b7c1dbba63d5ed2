"""What the statistics promise, on studies whose truth is known: 2,000 of them at three and at five seeds.

A study: 2 tasks of 100 questions, each question with a difficulty of its own, each training run with a luck of its
own (0.3 logits: about 5 points of accuracy), each answer right by chance of both. All arms and seeds get the same
questions. Studies are drawn in one go; the tests, intervals and adjustments are the production functions, called study
by study.
Monte-Carlo error at 2,000 studies: a rate of 5 % has a standard error of 0.5 points, so +-1.2 is two and a half.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy.special import expit

from kvdistill import stats
from kvdistill.stages.report.best_single import choose_best_single

STUDIES, LUCK, DIFFICULTY, QUESTIONS = 2000, 0.3, 1.5, (100, 100)
SLACK = 0.012
ARMS = 4  # a baseline and three arms


@functools.cache
def accuracies(num_seeds: int, skills: tuple[float, ...], luck: float = LUCK) -> tuple[np.ndarray, np.ndarray]:
    """Macro accuracy [studies, arms, seeds], and the true one of each arm on the study's questions [studies, arms]."""
    rng = np.random.default_rng([num_seeds, len(skills), int(1000 * skills[-1])])
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    found = np.zeros((STUDIES, len(skills), num_seeds))
    truth = np.zeros((STUDIES, len(skills)))
    skill_NAS = np.array(skills)[:, None] + luck * rng.normal(size=(STUDIES, len(skills), num_seeds))
    for count in QUESTIONS:
        hard_NQ = DIFFICULTY * rng.normal(size=(STUDIES, count))
        for arm, skill in enumerate(skills):
            chance_NSQ = expit(skill_NAS[:, arm, :, None] - hard_NQ[:, None])
            found[:, arm] += (rng.random(chance_NSQ.shape) < chance_NSQ).mean(-1) / len(QUESTIONS)
            for node, weight in zip(nodes, weights / weights.sum(), strict=True):
                truth[:, arm] += weight * expit(skill + luck * node - hard_NQ).mean(-1) / len(QUESTIONS)
    return found, truth


def p_values(found_NAS: np.ndarray, arm: int) -> np.ndarray:
    return np.array([stats.paired_t(list(study[arm]), list(study[0])).p for study in found_NAS])


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_one_comparison_in_twenty_is_called_where_nothing_differs(num_seeds: int) -> None:
    found, _ = accuracies(num_seeds, (0.0,) * ARMS)
    p = np.stack([p_values(found, arm) for arm in range(1, ARMS)], axis=1)
    assert np.mean(p[:, 0] < 0.05) == pytest.approx(0.05, abs=SLACK)
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=SLACK)
    adjusted = np.array([stats.adjust_holm(list(row)) for row in p])
    assert np.mean((adjusted < 0.05).any(axis=1)) <= 0.05 + SLACK, "any wrong call in a family of three"
    assert np.mean((p < 0.05).any(axis=1)) > 0.08, "which is what Holm is for"


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("effect", [0.0, 0.6])
def test_the_interval_covers_the_difference_on_these_questions(num_seeds: int, effect: float) -> None:
    found, truth = accuracies(num_seeds, (0.0, effect))
    hits = 0
    for study, (base, arm) in zip(found, truth, strict=True):
        t = stats.paired_t(list(study[1]), list(study[0]))
        hits += t.low <= arm - base <= t.high
    assert hits / STUDIES == pytest.approx(0.95, abs=SLACK)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_equivalence_is_called_once_in_twenty_where_the_difference_is_the_margin(num_seeds: int) -> None:
    found, _ = accuracies(num_seeds, (0.0,) * ARMS)
    for margin, most in ((0.30, 0.05 + SLACK), (0.02, 0.05 + SLACK)):
        p = [stats.tost(list(study[1] + margin), list(study[0]), margin).p for study in found]
        called = np.mean(np.array(p) < 0.05)
        assert called <= most
        if margin == 0.30:  # far beyond the noise, TOST is exact; near it, it is careful
            assert called == pytest.approx(0.05, abs=SLACK)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_the_smallest_detectable_effect_is_found_four_times_in_five(num_seeds: int) -> None:
    found, _ = accuracies(num_seeds, (0.0,) * ARMS)
    spread = (found[:, 1] - found[:, 0]).std()  # over all studies: the true one
    size, _ = stats.smallest_detectable_d(num_seeds, 0.05 / 3)
    p = [stats.paired_t(list(study[1] + size * spread), list(study[0])).p for study in found]
    assert np.mean(np.array(p) < 0.05 / 3) == pytest.approx(0.8, abs=0.03)
    needed, _ = stats.seeds_needed(size, 0.05 / 3)
    assert needed == num_seeds


def test_choosing_the_best_single_arm_on_validation_does_not_favour_several_teachers() -> None:
    """All arms alike, two single ones. Luck in training lifts a run on validation and on test, so what is chosen is a
    little better than its like: several teachers are called better less often than in one study of forty."""
    for num_seeds in (3, 5):
        found, _ = accuracies(num_seeds, (0.0,) * ARMS)
        rng, better, worse = np.random.default_rng(num_seeds), 0, 0
        for study in found:
            # 64 validation problems: what is seen there is the run's accuracy and the noise of so few answers
            seen = study[1:3] + np.sqrt(0.2 / 64) * rng.normal(size=(2, num_seeds))
            logs = {
                name: {seed: [{"step": 1, "val": {"accuracy": value, "nll": 1.0}}] for seed, value in enumerate(row)}
                for name, row in zip("ab", seen, strict=True)
            }
            chosen = choose_best_single(["a", "b"], logs, range(num_seeds), "accuracy").arm
            t = stats.paired_t(list(study[0]), list(study[1 + "ab".index(str(chosen))]))
            better, worse = better + (t.p < 0.05 and t.t > 0), worse + (t.p < 0.05 and t.t < 0)
        assert better / STUDIES <= 0.025
        assert (better + worse) / STUDIES <= 0.05 + SLACK


@pytest.mark.parametrize(
    ("luck", "count", "called", "covers"),
    [(0.3, 500, (0.45, 0.75), (0.65, 0.85)), (0.1, 100, (0.03, 0.20), (0.95, 1.0))],
    ids=["runs differ more than questions", "questions differ more than runs"],
)
def test_question_level_tests_and_the_bootstrap_keep_no_level(
    luck: float, count: int, called: tuple[float, float], covers: tuple[float, float]
) -> None:
    """Why no verdict rests on them, nothing differing: one leaves out the noise between runs, the other estimates it
    from three of them, and counts the questions' noise, which is in every run already, once more."""
    rng, wrong, covered, studies, tasks = np.random.default_rng(4), 0, 0, 200, ["a"] * count + ["b"] * count
    for _ in range(studies):
        hard, skill = DIFFICULTY * rng.normal(size=2 * count), luck * rng.normal(size=(2, 3, 1))
        right = rng.random((2, 3, 2 * count)) < expit(skill - hard)
        delta = right[0].astype(float) - right[1]
        questions = stats.question_level(delta, tasks)
        both = stats.bootstrap_two_stage(delta, tasks, draws=250, seed=1)
        wrong += not questions.low <= 0 <= questions.high
        covered += both.low <= 0 <= both.high
    assert called[0] < wrong / studies < called[1] and covers[0] < covered / studies < covers[1]
