"""Recipes: overrides, nearest keys, former words, merging of arms, floats as people write them, hashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_recipe import tiny_tree, write_recipe

from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import load_recipe, make_recipe, recipe_hash, recipes_folder, run_folder
from kvdistill.core.errors import RecipeError
from kvdistill.core.mistakes import FORMER_KEYS


def refusal(tree: dict) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        make_recipe(tree, place="my.yaml")
    assert caught.value.fix and caught.value.place.startswith("my.yaml"), caught.value
    return caught.value


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.steps=200", lambda r: r.train.steps, 200),
        ("train.learning_rate=3e-4", lambda r: r.train.learning_rate, 3e-4),
        ("train.learning_rate=1E-3", lambda r: r.train.learning_rate, 1e-3),
        ("loss.kv_weight=5", lambda r: r.loss.kv_weight, 5.0),
        ("seeds=[1,2,3]", lambda r: r.seeds, [1, 2, 3]),
        ("teachers.1.optimiser.steps=9", lambda r: r.teachers[1].optimiser.steps, 9),
        ("teachers.1.seed=5", lambda r: r.teachers[1].seed, 5),
        ("data.tasks.0.train=7", lambda r: r.data.tasks[0].train, 7),
        ("arms.ce.loss.ce_weight=0.5", lambda r: arm_recipe(r, "ce").loss.ce_weight, 0.5),
        ("arms.more.teachers=[one]", lambda r: arm_recipe(r, "more").teachers, ["one"]),
        ("fuse.weights=[0.25,0.75]", lambda r: arm_recipe(r, "fixed").fuse.weights, [0.25, 0.75]),
        ("student.lora.r=4", lambda r: r.student.lora.r, 4),
        ("evaluate.limit=null", lambda r: r.evaluate.limit, None),
        ("run_dir=/x y/z", lambda r: str(run_folder(r)), "/x y/z"),
    ],
)
def test_overrides_are_laid_over_the_yaml(tmp_path, override, read, value):
    if override.startswith("student.lora"):
        path = write_recipe(tmp_path, student={"lora": {"alpha": 8}})
    else:
        path = write_recipe(tmp_path)
    assert read(load_recipe(path, [override])) == value


def test_an_override_leaves_everything_else_as_it_was(tmp_path):
    path = write_recipe(tmp_path)
    before = load_recipe(path).model_dump(mode="json")
    after = load_recipe(path, ["teachers.0.optimiser.steps=99"]).model_dump(mode="json")
    before["teachers"][0]["optimiser"]["steps"] = 99
    assert after == before


def test_floats_in_yaml_as_people_write_them(tmp_path):
    path = tmp_path / "r.yaml"
    text = write_recipe(tmp_path).read_text()
    path.write_text(
        text.replace("steps: 6\n  batch_size: 8\n  log_every", "steps: 6\n  learning_rate: 3e-4\n  log_every")
    )
    assert "learning_rate: 3e-4" in path.read_text()
    assert load_recipe(path).train.learning_rate == 3e-4


@pytest.mark.parametrize("override", ["train.steps", "=3", "", "train.steps.more=3", "data.tasks.9.train=1"])
def test_overrides_that_cannot_be_laid(tmp_path, override):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path), [override])
    assert caught.value.fix and caught.value.place


@pytest.mark.parametrize(
    ("changes", "key", "near"),
    [
        ({"trian": {"steps": 3}}, "trian", "train"),
        ({"train": {"step": 3}}, "train.step", "steps"),
        ({"loss": {"kv_wieght": 3}}, "loss.kv_wieght", "kv_weight"),
        ({"data": {"max_lenght": 3}}, "data.max_lenght", "max_length"),
        ({"total_steps": 5}, "total_steps", "train.steps"),
        ({"router": "mlp"}, "router", "fuse.fusion_strategy"),
        ({"alignment_strategy": "soft"}, "alignment_strategy", "align.time"),
        ({"fixed_weights": [1]}, "fixed_weights", "fuse.weights"),
        ({"learning_rate": 1}, "learning_rate", "learning_rate"),
        ({"arms": {"x": {"los": {}}}}, "los", "loss"),
        ({"arms": {"x": {"loss": {"kv_wight": 1}}}}, "loss.kv_wight", "kv_weight"),
        ({"arms": {"x": {"teacher": ["one"]}}}, "teacher", "teachers"),
    ],
)
def test_unknown_keys_name_the_nearest(changes, key, near):
    error = refusal(tiny_tree(**changes))
    assert f"unknown key {key!r}" in error.what and near in error.fix, error


def test_every_former_word_points_at_a_key_that_exists():
    tree = make_recipe(tiny_tree()).model_dump()
    for place in FORMER_KEYS.values():
        section, key = place.split(".")
        assert key in tree[section], place


@pytest.mark.parametrize(("word", "mode"), [("truncate", "index"), ("soft", "segment"), ("pad", "pad")])
def test_the_original_words_for_time(word, mode):
    assert arm_recipe(make_recipe(tiny_tree(align={"time": word})), "fixed").align.time == mode
    inside = make_recipe(tiny_tree(arms={"x": {"align": {"time": word}}}))
    assert arm_recipe(inside, "x").align.time == mode


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate"),
        ({"loss": {"kv_weight": float("nan")}}, "loss.kv_weight"),
        ({"loss": {"kind": "mes"}}, "loss.kind"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 2, 1]}, "a seed is given twice"),
        ({"arms": {}}, "arms"),
        ({"arms": {"../../outside": {}}}, "cannot be an arm's name"),
        ({"arms": {"a/b": {}}}, "cannot be an arm's name"),
        ({"name": "../x"}, "name"),
        ({"student": {"path": "somewhere"}}, "exactly one of"),
        ({"fuse": {"weights": [0.5, -0.5]}}, "finite and >= 0"),
        ({"fuse": {"weights": [0.0, 0.0]}}, "sum to 0 and cannot be normalised"),
        ({"fuse": {"weights": [0.5, 0.3, 0.2]}}, "3 weights for 2 teachers"),
        ({"arms": {"x": {"fuse": {"weights": [1.0, -1.0]}}}}, "finite and >= 0"),
        ({"arms": {"x": {"teachers": ["one", "one"]}}}, "named twice"),
        ({"arms": {"x": {"teachers": ["on"]}}}, "unknown teacher 'on'"),
        ({"arms": {"x": {"loss": {"k_weight": 0, "v_weight": 0}}}}, "both 0"),
        ({"arms": {"x": {"control": "placebo", "teachers": []}}}, "placebo"),
        ({"capture": {"logits_top_k": 0}, "arms": {"x": {"loss": {"logit_weight": 1}}}}, "logits_top_k is 0, and this"),
        ({"arms": {"x": {"align": {"layers": "explicit"}}}}, "layer_map"),
        ({"arms": {"x": {"compress": {"kv_compression": "crop"}}}}, "keep"),
        ({"arms": {"x": {"fuse": {"fuse_at": "kv"}}}}, "fuse_at: kv"),
        ({"arms": {"x": {"loss": 3}}}, "loss is a section"),
        ({"report": {"comparisons": [["fixed", "cee"]]}}, "'cee'"),
        ({"align": None}, "align"),
    ],
)
def test_values_that_cannot_be(changes, words):
    assert words in refusal(tiny_tree(**changes)).message()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_a_teacher_cannot_leave_the_run_folder_by_its_name(name):
    tree = tiny_tree()
    tree["teachers"][0]["name"] = name
    assert "teachers.0.name" in refusal(tree).what


def test_teachers_of_unknown_tasks_and_with_one_name():
    tree = tiny_tree()
    tree["teachers"][0]["train_on"] = ["chian"]
    assert "did you mean 'chain'?" in refusal(tree).fix
    tree = tiny_tree()
    tree["teachers"][1]["name"] = "one"
    assert "share a name" in refusal(tree).what


def test_arms_are_the_sections_with_their_own_changes_over_them():
    recipe = make_recipe(
        tiny_tree(
            loss={"kv_weight": 3.0, "kind": "l1"},
            fuse={"weights": [0.9, 0.1]},
            arms={
                "x": {"loss": {"kind": "mse"}, "teachers": ["two"], "fuse": {"weights": [1.0]}},
                "ce": {"teachers": []},
            },
        )
    )
    x = arm_recipe(recipe, "x")
    assert (x.loss.kv_weight, x.loss.kind, x.teachers, x.fuse.weights) == (3.0, "mse", ["two"], [1.0])
    ce = arm_recipe(recipe, "ce")  # the study's weights do not bind an arm without teachers
    assert ce.teachers == [] and not ce.needs_kv and not ce.needs_logits


def test_the_demo_recipe_is_sound():
    from kvdistill.core.config import builtin_recipes

    assert builtin_recipes()
    for path in builtin_recipes():
        load_recipe(path)


def test_files_that_are_no_recipes(tmp_path):
    for name, content in {
        "list.yaml": b"- 1\n- 2\n",
        "broken.yaml": b"a: [1\n",
        "binary.yaml": b"\xff\xfe\x00",
        "empty.yaml": b"",
        "interpolated.yaml": b"name: ${nothing.there}\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        assert name in caught.value.place and caught.value.fix
    (tmp_path / "demo.yaml").write_text("name: x")
    with pytest.raises(RecipeError, match=f"did you mean '{tmp_path}/demo.yaml'"):
        load_recipe(tmp_path / "dmeo.yaml")
    with pytest.raises(RecipeError, match="a folder, not a recipe"):
        load_recipe(tmp_path)


def test_a_recipe_of_ours_is_named_by_its_path_where_there_is_none_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing in ("demo.yaml", "demo", "sub/demo.yaml", "dmeo.yml"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(missing)
        assert str(recipes_folder() / "demo.yaml") in caught.value.fix and "kvdistill" in caught.value.fix
    monkeypatch.chdir(recipes_folder().parent)  # what stands below where one is, as one would write it
    with pytest.raises(RecipeError, match=f"did you mean '{recipes_folder().name}/demo.yaml'"):
        load_recipe("demo.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "nothing-like-it.yaml")
    assert str(recipes_folder()) in caught.value.fix


def mistakes_of(tree: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(tree, place="my.yaml")
    assert caught.value.place.startswith("my.yaml") and caught.value.fix
    return caught.value.what


def test_all_mistakes_of_a_recipe_are_said_at_once(tmp_path):
    tree = tiny_tree(
        train={"stesp": 3, "batch_size": -1},
        data={"max_length": "long"},
        losss={"kv_weight": 2},
        seeds=[1, 1],
        report={"comparisons": [["fixd", "ce"]]},
    )
    tree["teachers"][0]["scratch"]["hidden_size"] = 0
    tree["arms"]["fixed"] = {"los": {"kv_weight": 1}, "loss": {"kind": "msee"}, "control": "perhaps"}
    what = mistakes_of(tree)
    wanted = (
        "unknown key 'train.stesp'\n     (did you mean 'steps'?)",
        "train.batch_size: ",
        "data.max_length: ",
        "unknown key 'losss'\n     (did you mean 'loss'?)",
        "teachers.0.scratch.hidden_size: ",
        "a seed is given twice: [1, 1]",
        "arms.fixed: unknown key 'los'",
        "arms.fixed: loss.kind: ",
        "arms.fixed: control: ",
        "report.comparisons: comparison names an arm that is not there: 'fixd'\n     (did you mean 'fixed'?)",
    )
    for words in wanted:
        assert what.count(words) == 1, (words, what)
    assert what.startswith(f"{len(wanted)} mistakes\n  1. ")
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["nonsense", "train.stesp=3", "seeds.9=1"])
    assert "3 mistakes" in caught.value.what and "'nonsense'" in caught.value.what and "'seeds.9'" in caught.value.what


def test_what_follows_from_a_mistake_is_not_a_second_one():
    tree = tiny_tree(data={"total": "many"})
    tree["data"]["tasks"][0]["share"] = 0.5  # goes with data.total, which cannot be read
    assert "mistakes" not in mistakes_of(tree)
    wide = tiny_tree(fuse={"weights": [1, 1, 1]}, arms={name: {} for name in ("a", "b", "c")})
    assert mistakes_of(wide) == "3 weights for 2 teachers (one, two) (and in 2 more arms)"
    assert "mistakes" not in mistakes_of(tiny_tree(align={"layer_map": 3.5}))  # neither a mapping nor a file: one
    del (tree := tiny_tree())["student"]
    assert mistakes_of(tree).startswith("student: ")


def test_hash_is_that_of_what_changes_results():
    base = recipe_hash(make_recipe(tiny_tree()))
    assert base == recipe_hash(make_recipe(tiny_tree(run_dir="elsewhere", title="t", hardware={"workers": 3})))
    reordered = dict(reversed(list(tiny_tree().items())))
    assert base == recipe_hash(make_recipe(reordered))
    spelled_out = make_recipe(tiny_tree()).model_dump(mode="json")
    assert base == recipe_hash(make_recipe(spelled_out))
    for changes in ({"seeds": [8]}, {"train": {"steps": 7}}, {"arms": {"ce": {"teachers": []}}}, {"name": "other"}):
        assert base != recipe_hash(make_recipe(tiny_tree(**changes)))


def test_a_layer_map_survives_the_way_through_json():
    explicit = {"layers": "explicit", "layer_map": {0: [0], 1: [1]}}
    made = make_recipe(tiny_tree(arms={"x": {"align": explicit}}, align=explicit))
    again = make_recipe(made.model_dump(mode="json"))
    assert again.align == made.align and arm_recipe(again, "x") == arm_recipe(made, "x")
    assert again.model_dump(mode="json") == made.model_dump(mode="json")


@given(
    st.dictionaries(
        st.sampled_from(["steps", "batch_size", "bf16", "zzz"]),
        st.one_of(st.none(), st.text(), st.lists(st.integers())),
    )
)
def test_whatever_stands_in_a_section_is_a_recipe_or_a_recipe_error(section):
    try:
        make_recipe(tiny_tree(train=section))
    except RecipeError as error:
        assert error.place and error.fix


def test_run_folder_is_named_after_the_recipe():
    assert run_folder(make_recipe(tiny_tree())) == Path("runs/tiny")
