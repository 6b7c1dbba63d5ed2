"""A damaged file of a run folder is named or made anew, never used in silence (all kinds: docs/reliability.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from damages import copy_study, damage, judge, kinds, make_study, one_more_arm, results

GOOD = ("named", "made anew", "said", "holds no result")
SAMPLE = [  # of files that nothing but this vouched for, or that gave tracebacks
    ("check.json", "swapped"),
    ("declared.json", "deleted"),
    ("declared.json", "swapped"),
    ("data/manifest.json", "flipped"),
    ("data/teachers/…/manifest.json", "flipped"),
    ("data/teachers/…/tokenizer/tokenizer.json", "flipped"),
    ("data/validation_report.json", "flipped"),
    ("layers/….json", "flipped"),
    ("provenance.json", "truncated"),
    ("study.json", "truncated"),
    ("teachers/…/fingerprint.json", "truncated"),
    ("teachers/…/model/config.json", "deleted"),
    ("teachers/…/report.json", "flipped"),
    ("tokenizer/tokenizer.json", "flipped"),
    ("tokenizer/tokenizer_config.json", "flipped"),
    ("tuned.json", "flipped"),
    ("written/…/solutions.parquet", "flipped"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A recipe, its finished run folder, and what one more arm gives in an undamaged copy of it."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        recipe = make_study(root, patch)
        run = copy_study(root / "run", tmp_path_factory.mktemp("right"))
        assert one_more_arm(patch, recipe, run) == (0, "")
    return recipe, root / "run", results(run)


@pytest.mark.parametrize(("kind", "how"), SAMPLE)
def test_a_damaged_file_is_never_used_in_silence(study, tmp_path, monkeypatch, kind, how):
    recipe, whole, right = study
    run = copy_study(whole, tmp_path)
    file: Path = run / kinds(whole)[kind][0].relative_to(whole)
    assert damage(run, file, how)
    code, said = one_more_arm(monkeypatch, recipe, run)
    assert judge(run, file, code, said, right) in GOOD, said
