"""Ends of steps against reading the text of every prefix, in batches and checks of a study, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import tiny_recipe, tiny_tree
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvdistill.arms.batches import BatchMaker
from kvdistill.arms.checks import check_models
from kvdistill.arms.experiment import Experiment
from kvdistill.core.config import make_recipe, run_folder
from kvdistill.core.errors import AlignmentError, DataError, RecipeError
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.data.steps import StepMarks
from kvdistill.data.tokenizers import character_tokenizer, encode_plain, load_tokenizer
from kvdistill.models.generate import right_padded
from kvdistill.stages.prepare import prepare

MARKS = [",", ">>", "\n", "=>", "，", "ab", ", "]
texts = st.lists(st.sampled_from(["a", "b", "ab", "12", "7", " ", "\n", ",", ">", "=", "，", "é", "good"]), max_size=14)


def ends_slowly(tokenizer: PreTrainedTokenizerFast, ids: list[int], mark: str) -> set[int]:
    """Numbers of the tokens: every prefix is decoded, to see which token completes which character."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    of_mark = {m.start() + k for m in re.finditer(f"(?={re.escape(mark)})", text) for k in range(len(mark))}
    steps: list[list[int]] = [[]]
    for place, letter in enumerate(text):
        if place in of_mark:
            steps.append([])
        elif letter not in " \t\r\n\v\f":
            steps[-1].append(place)
    found = set()
    for step in filter(None, steps):
        told = text[: step[-1] + 1]
        prefixes = (tokenizer.decode(ids[: n + 1], clean_up_tokenization_spaces=False) for n in range(len(ids)))
        found.add(next(n for n, prefix in enumerate(prefixes) if prefix[: len(told)] == told))
    return found


def padded_rows(
    tokenizer: PreTrainedTokenizerFast, reasonings: list[str]
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Each between a prompt and an answer that hold all the marks, padded with a mark."""
    around = encode_plain(tokenizer, ["1,2>>a\n，3=>ab, "])[0].ids
    ids = [encoding.ids for encoding in encode_plain(tokenizer, reasonings)]
    rows = [[*around, *one, *around] for one in ids]
    segments = [[PROMPT] * len(around) + [REASONING] * len(one) + [ANSWER] * len(around) for one in ids]
    return right_padded(rows, encode_plain(tokenizer, [","])[0].ids[0]), right_padded(segments, 0), ids


def pieces_with_marks() -> PreTrainedTokenizerFast:
    """Byte-level pieces of several characters, in which marks are joined to their neighbours and to one another."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(
        ["12", "7,", ">>,", "7>", ",\n", "\n\n", " 7", "=>7", "good", "，a", "a, "] * 2, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


TOKENIZERS = {"characters": character_tokenizer("abdgo>é，\n"), "pieces": pieces_with_marks()}


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@settings(max_examples=100, deadline=None)
@given(rows=st.lists(texts.map("".join), min_size=1, max_size=4), mark=st.sampled_from(MARKS))
def test_ends_of_steps_are_those_of_reading_every_prefix(kind: str, rows: list[str], mark: str) -> None:
    compare(StepMarks(TOKENIZERS[kind], mark), TOKENIZERS[kind], rows)


def compare(marks: StepMarks, tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> int:
    """How many ends there are in the rows."""
    ids_BS, segments_BS, ids = padded_rows(tokenizer, rows)
    ends_BS, marked_B = marks.ends(ids_BS, segments_BS)
    assert not ends_BS[segments_BS != REASONING].any()
    for row, own, ends, marked, segments in zip(rows, ids, ends_BS, marked_B, segments_BS, strict=True):
        assert set(ends[segments == REASONING].nonzero().squeeze(1).tolist()) == ends_slowly(tokenizer, own, marks.mark)
        assert bool(marked) == (marks.mark in row)
    return int(ends_BS.sum())


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "llama3"])
def test_ends_of_steps_of_real_reasoning(data_root: Path, name: str) -> None:
    tokenizer = load_tokenizer(f"root:{name}", str(data_root))
    told = [json.loads(line)["answer"] for line in (data_root / "gsm8k/test.jsonl").read_text().splitlines()[:12]]
    told = [re.sub("<<.*?>>", "", one).split("####")[0] for one in told]
    assert compare(StepMarks(tokenizer, "\n"), tokenizer, told) == sum(len(one.splitlines()) for one in told)
    equations = [line.split("||")[1].split(" ####")[0] for line in
                 (data_root / "gsm8k_aug_icot/test.txt").read_text().splitlines()[:12]]  # fmt: skip
    marks = StepMarks(tokenizer, ">>")
    assert compare(marks, tokenizer, equations) == sum(one.count(">>") for one in equations)
    for row in equations:  # the end of a step is the token of its result
        ids_BS, segments_BS, ids = padded_rows(tokenizer, [row])
        ends = marks.ends(ids_BS, segments_BS).ends_BS[segments_BS == REASONING]
        written = [tokenizer.decode([number]) for number, is_end in zip(ids[0], ends.tolist(), strict=True) if is_end]
        results = re.findall(r"=([^=]*?)>>", row)
        assert all(result.endswith(piece.strip(">< ")) for result, piece in zip(results, written, strict=True))


@pytest.mark.parametrize(("name", "line_ends"), [("bert-base-uncased", False), ("t5-small", False)])
def test_what_a_tokenizer_drops_is_no_mark(data_root: Path, name: str, line_ends: bool) -> None:
    tokenizer = load_tokenizer(f"root:{name}", str(data_root))
    ids_BS, segments_BS, _ = padded_rows(tokenizer, ["3 + 4 = 7, 7 * 2 = 14", "one\ntwo"])
    ends_BS, marked_B = StepMarks(tokenizer, ",").ends(ids_BS, segments_BS)
    assert ends_BS.sum(1).tolist() == [2, 1] and marked_B.tolist() == [True, False]
    by_line = StepMarks(tokenizer, "\n").ends(ids_BS, segments_BS)
    assert by_line.marked_B.tolist() == [False, line_ends] and by_line.ends_BS.sum(1).tolist() == [1, 1]


def test_ends_by_hand() -> None:
    tokenizer = character_tokenizer(">")
    rows = ["4+3>0,0*5>0", "4+3", "", ",,4,, ,", " , "]
    ids_BS, segments_BS, _ = padded_rows(tokenizer, rows)
    ends_BS, marked_B = StepMarks(tokenizer, ",").ends(ids_BS, segments_BS)
    found = [
        ends[segments == REASONING].nonzero().squeeze(1).tolist()
        for ends, segments in zip(ends_BS, segments_BS, strict=True)
    ]
    assert found == [[4, 10], [2], [], [2], []]
    assert marked_B.tolist() == [True, False, False, True, True]
    nothing = StepMarks(tokenizer, ",").ends(ids_BS, torch.full_like(segments_BS, PROMPT))
    assert not nothing.ends_BS.any() and not nothing.marked_B.any()


def test_special_tokens_are_text_and_no_mark_goes_across_them() -> None:
    tokenizer = character_tokenizer(">")
    letter, eos = encode_plain(tokenizer, [">"])[0].ids[0], tokenizer.eos_token_id
    ids_BS, segments_BS = torch.tensor([[letter, eos, letter, eos]]), torch.full((1, 4), REASONING)
    ends_BS, marked_B = StepMarks(tokenizer, ">>").ends(ids_BS, segments_BS)
    assert ends_BS.tolist() == [[False, False, False, True]] and not marked_B.any()


def test_a_batch_keeps_the_ends_of_steps_of_what_its_teacher_reads(tmp_path: Path) -> None:
    pieces_with_marks().save_pretrained(tmp_path / "pieces")
    tree = tiny_tree(compress={"kv_compression": "steps", "step_mark": ","}, loss={"kv_on": "reasoning"})
    tree["teachers"][1]["tokenizer"] = str(tmp_path / "pieces")
    tree["teachers"][1]["scratch"]["architecture"] = "llama"
    recipe = make_recipe(tree | {"run_dir": str(tmp_path / "run")})
    prepare(recipe, run_folder(recipe))
    experiment = Experiment(recipe, run_folder(recipe))
    check_models(experiment)
    arm = experiment.arm("fixed", recipe.seeds[0])
    maker = arm.batches("train", stored=False)
    joins = [i for i, one in enumerate(maker.examples) if re.search(r"12(,|$)|7,", one.reasoning)]
    numbers = [*joins[:5], 0, 60]
    batch = maker(numbers)
    for name in ("one", "two"):
        joined = 0
        for i, mask, segments in zip(numbers, batch.kv_masks[name], batch.segments_BT, strict=True):
            taken = mask[segments == REASONING].nonzero().squeeze(1).tolist()  # tokens are characters here
            reasoning, at = maker.examples[i].reasoning, 0
            last = [at := at + len(step) + 1 for step in reasoning.split(",")]
            assert {place - 2 for place in last} <= set(taken) and int(mask.sum()) == len(taken)
            assert all(reasoning[place : place + 3].strip("0123456789")[:1] in ("", ",") for place in taken)
            joined += len(taken) - len(last)
        assert (joined == 0) == (name == "one")  # 12, and 7 with the comma behind it, are one token of the other's
    last = arm.recipe.model_copy(update={"compress": arm.recipe.compress.model_copy(update={"keep": 1})})
    one = BatchMaker(maker.examples, maker.pad_id, last, texts=maker.texts, step_marks=arm.step_marks)(numbers)
    for mask, kept in zip(one.kv_masks["one"], batch.kv_masks["one"], strict=True):
        assert mask.nonzero().flatten().tolist() == kept.nonzero().flatten().tolist()[-1:]


def test_a_teacher_without_marked_steps_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", compress={"kv_compression": "steps", "step_mark": ">>"})
    prepare(recipe, run_folder(recipe))
    with pytest.raises(AlignmentError, match="no reasoning of the training problems holds the mark '>>'") as caught:
        check_models(Experiment(recipe, run_folder(recipe)))
    assert caught.value.place == "arms.fixed with teacher 'one': compress.step_mark"
    assert "another compress.kv_compression" in str(caught.value.fix)


def test_steps_without_a_mark_are_refused_and_other_recipes_are_written_as_before() -> None:
    with pytest.raises(RecipeError, match="kv_compression steps needs `step_mark`"):
        make_recipe(tiny_tree(compress={"kv_compression": "steps"}))
    with pytest.raises(RecipeError, match="step_mark"):
        make_recipe(tiny_tree(compress={"kv_compression": "steps", "step_mark": ""}))
    with pytest.raises(DataError, match="an empty mark"):
        StepMarks(character_tokenizer(), "")
    plain, marked = make_recipe(tiny_tree()).compress, {"kv_compression": "steps", "keep": None, "step_mark": "\n"}
    assert plain.model_dump(mode="json") == {"kv_compression": "full", "keep": None, "importance_share": 0.1}
    made = make_recipe(tiny_tree(compress=marked)).compress
    assert made.model_dump(mode="json") == {**marked, "importance_share": 0.1}
    assert type(made).model_validate(made.model_dump(mode="json")) == made
