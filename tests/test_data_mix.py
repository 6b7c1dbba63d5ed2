"""How many problems of which task go where: shares, caps, what a task cannot deliver, ratios."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import RecipeError
from kvdistill.core.recipe import DataRecipe
from kvdistill.data.mix import Available, fill, mix, share_out, task_shares


def _data(*tasks: dict[str, Any], **section: Any) -> DataRecipe:
    return DataRecipe.model_validate({"tasks": list(tasks), **section})


def test_a_fifth_is_chinese_and_the_others_are_equal_unless_said() -> None:
    names = ["gsm8k", "svamp", "math23k", "math", "hotpotqa"]
    assert task_shares(_data(*({"name": n} for n in names)).tasks) == pytest.approx(dict.fromkeys(names, 0.2))
    two = task_shares(_data({"name": "gsm8k"}, {"name": "math23k"}).tasks)
    assert two == pytest.approx({"gsm8k": 0.8, "math23k": 0.2})
    assert task_shares(_data({"name": "math23k"}).tasks) == {"math23k": 1.0}
    given = task_shares(_data({"name": "gsm8k", "share": 0.5}, {"name": "svamp"}, {"name": "math23k"}).tasks)
    assert given == pytest.approx({"gsm8k": 0.5, "math23k": 0.2, "svamp": 0.3})


def test_shares_of_every_task_are_ratios_and_too_much_is_refused() -> None:
    shares = task_shares(_data({"name": "gsm8k", "share": 2}, {"name": "svamp", "share": 1}).tasks)
    assert shares == pytest.approx({"gsm8k": 2 / 3, "svamp": 1 / 3})
    with pytest.raises(RecipeError, match="leave nothing for svamp"):
        task_shares(_data({"name": "gsm8k", "share": 1}, {"name": "svamp"}).tasks)
    with pytest.raises(RecipeError, match="all shares are 0"):
        task_shares(_data({"name": "gsm8k", "share": 0}).tasks)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.01, 5), st.integers(0, 50)), min_size=1),
    st.integers(0, 200),
)
def test_filling_keeps_to_limits_and_reaches_the_total_where_it_can(tasks: dict[str, tuple[float, int]], total: int):
    shares, limits = {k: s for k, (s, _) in tasks.items()}, {k: n for k, (_, n) in tasks.items()}
    numbers = fill(shares, limits, total)
    assert all(0 <= numbers[name] <= limits[name] for name in tasks)
    assert sum(numbers.values()) == min(total, sum(limits.values()))
    assert fill(dict(reversed(shares.items())), limits, total).keys() == numbers.keys()
    free = [name for name in tasks if numbers[name] < limits[name]]
    for one in free:  # whoever is not at its limit is in proportion with the others that are not
        for other in free:
            assert (
                abs(numbers[one] / shares[one] - numbers[other] / shares[other]) <= 1 / shares[one] + 1 / shares[other]
            )


def test_what_one_task_lacks_the_others_make_up_in_proportion() -> None:
    data = _data({"name": "gsm8k", "share": 1}, {"name": "svamp", "share": 1}, {"name": "math", "share": 2}, total=400)
    plenty = Available({("train", "val"): 7000, ("test",): 1300})
    scarce = Available({("train", "val", "test"): 40})
    counts = mix(data, {"gsm8k": plenty, "svamp": scarce, "math": plenty})
    totals = {task: sum(splits.values()) for task, splits in counts.items()}
    assert totals == {"gsm8k": 120, "svamp": 40, "math": 240}
    assert counts["gsm8k"] == {"train": 84, "val": 18, "test": 18, "teach": 0}
    capped = data.model_copy(update={"tasks": [data.tasks[0].model_copy(update={"cap": 10}), *data.tasks[1:]]})
    assert sum(mix(capped, {"gsm8k": plenty, "svamp": scarce, "math": plenty})["gsm8k"].values()) == 10


def test_the_smallest_source_bounds_a_task_and_teachers_get_half_of_train_on_request() -> None:
    has = Available({("train",): 1000, ("val",): 100, ("test",): 15})
    assert has.most((0.7, 0.15, 0.15)) == 100 and has.most((1.0, 0.0, 0.0)) == 1000
    data = _data({"name": "gsm8k"}, total=100, disjoint_teachers=True)
    assert mix(data, {"gsm8k": has})["gsm8k"] == {"train": 35, "val": 15, "test": 15, "teach": 35}
    assert sum(mix(data, {"gsm8k": None})["gsm8k"].values()) == 100


@given(st.dictionaries(st.sampled_from(["train", "val", "test", "teach"]), st.integers(0, 30)), st.integers(0, 60))
def test_sharing_out_never_gives_more_than_asked(asked: dict[str, int], available: int) -> None:
    shares = share_out(asked, available)
    assert all(shares[name] <= asked[name] for name in asked)
    assert sum(shares.values()) == min(sum(asked.values()), available)
