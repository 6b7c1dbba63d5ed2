"""What teachers with their own tokenizer or their own chains read: row by row beside the student's, span by span."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvdistill.arms.batches import BatchMaker
from kvdistill.arms.checks import check_models
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.texts import load_tokenizer_of
from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import make_recipe
from kvdistill.core.errors import AlignmentError, DataError, KVDistillError, RecipeError
from kvdistill.core.recipe import Recipe
from kvdistill.core.segments import ANSWER, END, REASONING, START, TEXT, TURN
from kvdistill.data import load_multi_task_dataset
from kvdistill.data.encode import Example
from kvdistill.data.tables import read_split
from kvdistill.stages.prepare import prepare

pytestmark = pytest.mark.slow

SIZES = {"architecture": "llama", "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def study(folder: Path, *teachers: dict[str, Any], arm: dict[str, Any] | None = None, **data: Any) -> Recipe:
    tasks = data.pop("tasks", [{"name": "chain", "train": 12, "val": 4, "test": 2, "teach": 3}])
    key = Path(tasks[0]["file"]).stem if "file" in tasks[0] else tasks[0]["name"]
    named = [{"train_on": [key], "scratch": SIZES, "name": f"t{i}", **t} for i, t in enumerate(teachers)]
    return make_recipe(
        {
            "name": "texts",
            "run_dir": str(folder / "run"),
            "data": {"tasks": tasks, **data},
            "teachers": named,
            "student": {"scratch": SIZES},
            "evaluate": {"match_examples": 4},
            "train": {"eval_examples": 4},
            "arms": {"fixed": arm or {}},
        }
    )


def prepared(recipe: Recipe) -> Path:
    run = Path(recipe.run_dir or "")
    prepare(recipe, run)
    return run


@pytest.fixture(scope="module")
def real_rows(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The first real rows of two data sets as files of one's own: nothing is read but them."""
    folder = tmp_path_factory.mktemp("rows")
    found = {}
    for name in ("gsm8k", "math23k"):
        rows = load_multi_task_dataset([name], split="test", num_problems=18, root=data_root)
        problems = [row.problem for row in rows]
        texts = [{"question": p.question, "reasoning": p.reasoning, "answer": p.answer} for p in problems]
        file = folder / f"{name}_rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts), encoding="utf-8")
        found[name] = [{"name": "jsonl", "file": str(file), "train": 12, "val": 4, "test": 2}]
    return found


@pytest.fixture(scope="module")
def tokenizers(data_root: Path) -> Callable[[str], str]:
    return lambda name: str(data_root / "tokenizers" / name)


class Studies:
    """Prepared once each: real tokenizers take seconds to load, trimmed ones do not."""

    def __init__(self, folder: Path, rows: dict[str, list[dict[str, Any]]], tokenizers: Callable[[str], str]) -> None:
        self._folder, self._rows, self._tokenizers = folder, rows, tokenizers
        self._made: dict[tuple[str, ...], Recipe] = {}

    def __call__(self, task: str, mine: str, *theirs: str, **data: Any) -> tuple[Recipe, Path]:
        key = (task, mine, *theirs, *sorted(data))
        if key not in self._made:
            teachers = [{"tokenizer": self._tokenizers(name)} for name in theirs]
            settings = {"tokenizer": self._tokenizers(mine), "tasks": self._rows[task], **data}
            recipe = study(self._folder / str(len(self._made)), *teachers, **settings)
            prepared(recipe)
            self._made[key] = recipe
        recipe = self._made[key]
        return recipe, Path(recipe.run_dir or "")


@pytest.fixture(scope="module")
def studies(
    real_rows: dict[str, list[dict[str, Any]]],
    tokenizers: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Studies:
    return Studies(tmp_path_factory.mktemp("studies"), real_rows, tokenizers)


TRIMMED = {"trim_vocabulary": True}
CASES = [
    ("gsm8k", ("gpt2", "qwen2.5", "llama3"), TRIMMED),
    ("math23k", ("qwen2.5", "llama3"), TRIMMED),
    ("gsm8k", ("gpt2", "bert-base-uncased"), {}),
]


@pytest.mark.parametrize(("task", "names", "data"), CASES, ids=["two-bpe", "chinese", "wordpiece"])
def test_spans_name_the_characters_of_the_text(
    studies: Studies, task: str, names: tuple[str, ...], data: dict[str, Any]
) -> None:
    recipe, run = studies(task, *names, **data)
    mine = load_tokenizer_of(run)
    for teacher in Experiment(recipe, run).teachers.values():
        theirs = teacher.tokenizer
        for split in ("train", "val"):
            text = teacher.text(split)
            assert text is not None and text.own is not None
            examples = read_split(run, split)
            assert len(text.examples) == len(examples)
            for number in range(len(examples)):
                rows = text.examples[number], examples[number]
                assert (rows[0].doc_hash, rows[0].style) == (rows[1].doc_hash, rows[1].style)
                ends = []
                for row, tokenizer, (spans, roles) in zip(
                    rows, (theirs, mine), (text.spans(number), text.student_spans(number)), strict=True
                ):
                    check_spans(row, tokenizer, spans, roles)
                    ends.append(float(spans.max()))
                assert ends[0] == pytest.approx(ends[1])  # both sides end at the same character


def check_spans(row: Example, tokenizer: Any, spans: torch.Tensor, roles: torch.Tensor) -> None:
    assert len(row.input_ids) == len(row.segments) == len(spans) == len(roles)
    assert (roles == END).sum() == 1 and roles[-1] == END
    assert (roles == START).sum() == (tokenizer.bos_token_id is not None)
    is_text = roles == TEXT
    assert bool((spans[is_text][1:, 0] >= spans[is_text][:-1, 1] - 1e-4).all())
    whole = f"{row.prompt} {row.reasoning} #### {row.answer}"  # near enough: the reasoning begins one space later
    for token, (start, end), role in zip(row.input_ids, spans.tolist(), roles.tolist(), strict=True):
        piece = tokenizer.decode([token]).strip()
        if role == TEXT and piece.isascii() and piece.isalnum():
            assert end - start == pytest.approx(len(piece), abs=1.01)  # with the space before it
            if end <= len(row.prompt):
                assert piece.lower() in whole[int(start) : int(end)].lower()


def test_a_teacher_with_the_students_tokenizer_has_no_texts_of_its_own(
    real_rows: Any, tokenizers: Any, tmp_path: Path
) -> None:
    same = tokenizers("gpt2")
    recipe = study(tmp_path, {"tokenizer": same}, {}, tokenizer=same, tasks=real_rows["gsm8k"])
    run = prepared(recipe)
    teachers = Experiment(recipe, run).teachers
    assert [teacher.text("train") for teacher in teachers.values()] == [None, None]
    assert teachers["t0"].lessons("train") == read_split(run, "train")


def test_another_cut_gives_rows_that_sum_to_one(studies: Studies) -> None:
    recipe, run = studies("gsm8k", "gpt2", "qwen2.5", "llama3", **TRIMMED)
    arm = arm_recipe(recipe, "fixed")
    texts = {name: teacher.text("train") for name, teacher in Experiment(recipe, run).teachers.items()}
    examples = read_split(run, "train")
    batch = BatchMaker(examples, 0, arm, texts=texts)([3, 1, 7])
    for name in ("t0", "t1"):
        ids, segments = batch.teacher_inputs[name]
        mapping = batch.maps[name]
        assert mapping.n_in == ids.shape[1] == segments.shape[1]
        assert mapping.n_out == batch.input_ids_BT.shape[1]
        real = batch.segments_BT > 0
        sums = mapping.weight.sum(-1)
        assert torch.allclose(sums[real & mapping.mask()], torch.ones(()))
        assert not mapping.mask()[~real].any()
        assert mapping.mask()[real].float().mean() > 0.98  # all of the text is common text
        assert torch.equal(batch.kv_masks[name], real & mapping.mask())
        for b in range(3):
            dense = mapping.to_dense()[b]
            read = dense > 0
            assert not read[:, segments[b] == 0].any()
            for t in torch.nonzero(mapping.mask()[b]).flatten().tolist():  # neighbours only, and of its own segment
                places = torch.nonzero(read[t]).flatten()
                assert int(places.max() - places.min()) < 8
                assert batch.segments_BT[b, t] in segments[b][places]


def test_nll_is_counted_per_token_of_the_student(studies: Studies) -> None:
    recipe, run = studies("gsm8k", "gpt2", "qwen2.5", "llama3", **TRIMMED)
    texts = {name: teacher.text("train") for name, teacher in Experiment(recipe, run).teachers.items()}
    examples = read_split(run, "train")
    arm = arm_recipe(recipe, "fixed")
    assert not BatchMaker(examples, 0, arm, texts=texts)([0, 5]).nll_scale  # nobody asks for it
    arm = arm.model_copy(update={"fuse": arm.fuse.model_copy(update={"fusion_strategy": "competence"})})
    batch = BatchMaker(examples, 0, arm, texts=texts)([0, 5])
    for name, text in texts.items():
        assert text is not None
        for i, scale in zip((0, 5), batch.nll_scale[name].tolist(), strict=True):
            both = text.examples[i], examples[i]
            theirs, mine = (sum(code in (REASONING, ANSWER) for code in e.segments) for e in both)
            assert scale == pytest.approx(theirs / mine)
    assert batch.nll_scale["t0"].max() > 1  # Qwen cuts numbers into digits


def test_chat_templates_of_two_families_meet_in_the_words_of_the_user(studies: Studies) -> None:
    recipe, run = studies("gsm8k", "qwen2.5", "llama3", template="chat", **TRIMMED)
    text = Experiment(recipe, run).teachers["t0"].text("train")
    assert text is not None
    own, students = text.spans(2), text.student_spans(2)
    for spans, roles in (own, students):
        assert {START, TURN, TEXT, END} <= set(roles.tolist())
        assert bool((spans[(roles != TEXT)] == 0).all())
    example = read_split(run, "train")[2]
    assert float(own[0].max()) == pytest.approx(float(students[0].max()))
    assert float(own[0].max()) > len(example.question) + len(example.reasoning)
    assert {e.prompt.count("<|im_start|>") for e in text.examples} == {
        0
    }  # the teacher's own template, not the student's


def test_trimming_trims_the_teachers_tokenizer_too(studies: Studies) -> None:
    recipe, run = studies("gsm8k", "gpt2", "qwen2.5", "llama3", **TRIMMED)
    experiment = Experiment(recipe, run)
    for teacher in experiment.teachers.values():
        manifest = teacher.texts
        assert manifest is not None and manifest["tokenizer"]["size"] < 5000
        assert max(max(e.input_ids) for e in teacher.lessons("train")) < manifest["tokenizer"]["size"]
    check_models(experiment)


# -- traces --------------------------------------------------------------------------------------------


def write_traces(
    path: Path, run: Path, *, splits: tuple[str, ...] = ("train", "val"), chain: str = "first {} then"
) -> None:
    rows = [
        {"question": e.question, "reasoning": chain.format(e.reasoning)}
        for split in splits
        for e in read_split(run, split)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_traces_are_what_the_teacher_reads(tmp_path: Path) -> None:
    run = prepared(study(tmp_path, {}))
    write_traces(tmp_path / "traces.jsonl", run, chain="1+{}+1")
    recipe = study(tmp_path, {"traces": str(tmp_path / "traces.jsonl")}, arm={"align": {"time": "segment"}})
    prepared(recipe)
    text = Experiment(recipe, run).teachers["t0"].text("train")
    assert text is not None and text.own is None
    for theirs, mine in zip(text.examples, read_split(run, "train"), strict=True):
        assert theirs.reasoning == f"1+{mine.reasoning}+1"
        assert theirs.segments.count(REASONING) == mine.segments.count(REASONING) + 4
        assert (theirs.answer, theirs.doc_hash) == (mine.answer, mine.doc_hash)
    batch = BatchMaker(read_split(run, "train"), 0, arm_recipe(recipe, "fixed"), texts={"t0": text})([0, 2])
    assert batch.maps["t0"].n_in == batch.teacher_inputs["t0"][0].shape[1]
    assert bool(batch.kv_masks["t0"].sum() > 0)
    check_models(Experiment(recipe, run))


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"align": {"time": "pad"}}, "align.time: pad is for one text"),
        ({"align": {"time": "segment"}, "fuse": {"fusion_strategy": "competence"}}, "competence compares"),
        ({"align": {"time": "segment"}, "loss": {"logit_weight": 1.0}}, "its own chains"),
    ],
)
def test_what_cannot_be_done_with_traces_is_said_before_training(
    tmp_path: Path, arm: dict[str, Any], words: str
) -> None:
    run = prepared(study(tmp_path, {}))
    write_traces(tmp_path / "traces.jsonl", run)
    recipe = study(tmp_path, {"traces": str(tmp_path / "traces.jsonl")}, arm=arm)
    prepared(recipe)
    with pytest.raises(AlignmentError, match=words):
        check_models(Experiment(recipe, run))


def test_traces_that_lack_a_question_name_it(tmp_path: Path) -> None:
    run = prepared(study(tmp_path, {}))
    write_traces(tmp_path / "traces.jsonl", run, splits=("train",))
    recipe = study(tmp_path, {"traces": str(tmp_path / "traces.jsonl")})
    with pytest.raises(DataError, match=r"there is no trace for chain/.* of val"):
        prepared(recipe)
    assert not (run / "data" / "teachers" / "t0").exists()


def test_traces_that_hold_the_answer_mark_are_refused(tmp_path: Path) -> None:
    run = prepared(study(tmp_path, {}))
    write_traces(tmp_path / "traces.jsonl", run, chain="{}=99999,")
    with pytest.raises(DataError, match="reads back as"):
        prepared(study(tmp_path, {"traces": str(tmp_path / "traces.jsonl")}))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "1"}', "a trace needs"),
        ('{"question": "1", "reasoning": " "}', "a trace needs"),
        ("[1]", "object"),
    ],
)
def test_broken_traces_name_their_line(tmp_path: Path, line: str, words: str) -> None:
    prepared(study(tmp_path, {}))
    (tmp_path / "traces.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words) as raised:
        prepared(study(tmp_path, {"traces": str(tmp_path / "traces.jsonl")}))
    assert "traces.jsonl" in str(raised.value.place)


def test_a_missing_file_of_traces(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: nowhere\.jsonl"):
        prepared(study(tmp_path, {"traces": "nowhere.jsonl"}))


# -- mistakes --------------------------------------------------------------------------------------------


def test_logits_of_other_tokenizers_are_matched_unless_the_recipe_says_same(studies: Studies) -> None:
    recipe, run = studies("gsm8k", "gpt2", "qwen2.5", "llama3", **TRIMMED)
    logits: dict[str, Any] = {"loss": {"logit_weight": 1.0, "kv_weight": 0, "logit_match": "same"}}
    with pytest.raises(AlignmentError, match="logit_match: same, and this teacher has other tokens") as raised:
        check_models(Experiment(recipe.model_copy(update={"arms": {"logits": logits}}), run))
    assert "arms.logits with teacher 't0'" in str(raised.value.place)
    logits["loss"]["logit_match"] = "auto"
    check_models(Experiment(recipe.model_copy(update={"arms": {"logits": logits}}), run))


@pytest.mark.parametrize("rows", ["gsm8k", "math23k"])
def test_chunks_of_real_text_write_the_same_on_both_sides(studies: Studies, rows: str) -> None:
    """Completions in GPT-2's tokens and in Qwen's and Llama-3's: English arithmetic, and Chinese cut inside letters."""
    recipe, run = studies(rows, "gpt2", "qwen2.5", "llama3", **TRIMMED)
    made = recipe.model_copy(update={"arms": {"logits": {"loss": {"logit_weight": 1.0, "kv_weight": 0}}}})
    arm = Experiment(made, run).arm("logits", recipe.seeds[0])
    batch = arm.batches("train", stored=False)([0, 3, 5, 7])
    mine = arm.experiment.tokenizer
    for name, teacher in arm.teachers.items():
        chunks, covered, single = batch.chunks[name], 0, 0
        places = zip(*(x.tolist() for x in (chunks.row_C, chunks.theirs_C2, chunks.mine_C2)), strict=True)
        for row, (i0, i1), (j0, j1) in places:
            theirs, own = chunks.ids_BS[row, i0 : i1 + 1], batch.input_ids_BT[row, j0 : j1 + 1]
            if theirs[0] == teacher.tokenizer.eos_token_id:
                assert own.tolist() == [mine.eos_token_id]
            else:
                texts = teacher.tokenizer.decode(theirs), mine.decode(own)
                assert texts[0] == texts[1] or "\ufffd" in "".join(texts)  # a part of a letter
            covered, single = covered + len(own), single + (i0 == i1)
            if i0 == i1 and j0 == j1:  # one token of the same text is the same piece
                assert chunks.written_VL[theirs[0], 0] == own[0]
        learned = (batch.segments_BT == REASONING) | (batch.segments_BT == ANSWER)
        assert covered == int(learned.sum()) and single > 0.3 * len(chunks.row_C)


def test_rotated_keys_are_not_averaged_over_tokens(studies: Studies) -> None:
    recipe, run = studies("gsm8k", "gpt2", "qwen2.5", "llama3", **TRIMMED)
    rotated = recipe.model_copy(update={"arms": {"rotated": {"align": {"keys": "rotated"}}}})
    with pytest.raises(AlignmentError, match="rotated keys cannot be averaged"):
        check_models(Experiment(rotated, run))


def test_an_unknown_tokenizer_of_a_teacher_names_the_teacher(real_rows: Any, tokenizers: Any, tmp_path: Path) -> None:
    tasks = real_rows["gsm8k"]
    recipe = study(tmp_path, {"tokenizer": "./gpt3"}, tokenizer=tokenizers("bert-base-uncased"), tasks=tasks)
    with pytest.raises(DataError, match="no such folder") as raised:
        prepared(recipe)
    assert raised.value.place == "teachers.0 (t0).tokenizer"


def test_a_teacher_that_only_reads_need_not_spell_answers_but_something(tmp_path: Path) -> None:
    """A pretrained teacher's tokenizer that knows digits reads what it can; one that knows nothing is refused."""
    for known in ("0123456789", "x"):
        pieces = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"{prefix}{c}": 0 for c in known for prefix in ("", "##")}
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        roles = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[SEP]"}
        folder = tmp_path / known
        PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(folder)
        reader = {"path": str(folder), "scratch": None, "train_on": [], "tokenizer": str(folder)}
        recipe = study(tmp_path / f"of-{known}", reader)
        if known == "x":
            with pytest.raises(AlignmentError, match="have a character in common") as raised:
                prepared(recipe)
            assert raised.value.place == "teachers.0 (t0).tokenizer"
            continue
        manifest = Experiment(recipe, prepared(recipe)).teachers["t0"].texts
        assert manifest is not None and 0.1 < manifest["lost"]["characters"] < 0.9
        assert manifest["tokenizer"]["unknown"]["train"] > 0


def test_alternatives_take_the_first_that_is_there(real_rows: Any, tokenizers: Any, tmp_path: Path) -> None:
    choice = f"./nowhere or {tokenizers('bert-base-uncased')} or some/hub-id"
    run = prepared(study(tmp_path, {}, tokenizer=choice, tasks=real_rows["gsm8k"]))
    assert len(load_tokenizer_of(run)) == 30522


def test_texts_are_kept_for_the_same_tokenizer_made_anew_for_another_and_checked(
    real_rows: Any, tokenizers: Any, tmp_path: Path
) -> None:
    settings = {"tokenizer": tokenizers("t5-small"), "tasks": real_rows["gsm8k"]}
    run = prepared(recipe := study(tmp_path, {"tokenizer": tokenizers("bert-base-uncased")}, **settings))
    manifest = run / "data" / "teachers" / "t0" / "manifest.json"
    first = manifest.stat().st_mtime_ns
    prepared(recipe)
    assert manifest.stat().st_mtime_ns == first
    prepared(recipe := study(tmp_path, {"tokenizer": tokenizers("gpt2")}, **settings))
    assert json.loads(manifest.read_text())["section"]["tokenizer"] == tokenizers("gpt2")
    path = manifest.with_name("spans-train.safetensors")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(KVDistillError, match="torn or altered"):
        Experiment(recipe, run).teachers["t0"].text("train")


@pytest.mark.parametrize(
    ("align", "words"),
    [
        ({"segment_ratio": {"reasoning": 0.5}}, "does not resample"),
        ({"rank": 4, "projection": "structured"}, "rank is of flat projectors"),
        ({"match_in": "shared", "train_projector": True}, "adapters into a shared space are frozen"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, align: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        study(tmp_path, {}, arm={"align": align})
