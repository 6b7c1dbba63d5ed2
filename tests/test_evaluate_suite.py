"""The suite: scripted models score exactly what they know; lm-eval's own evaluator agrees; kills change nothing.

Then the Hugging Face side: padding, batches, counts, windows, ends, against lm-eval's class and plain transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scripted_lm import ScriptedLM, gpqa_root, some_questions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from kvdistill.core.errors import DataError, ModelError, RecipeError, RunFolderError
from kvdistill.core.files import read_json_lines
from kvdistill.data.sets import EVALUATIONS
from kvdistill.data.tokenizers import character_tokenizer
from kvdistill.models.generate import Rows, generate_greedy
from kvdistill.stages.evaluate.book import check_folder
from kvdistill.stages.evaluate.exams import LetteredExam, SuiteOptions
from kvdistill.stages.evaluate.harness import HarnessExam, quiet_harness
from kvdistill.stages.evaluate.lm import MeteredLM
from kvdistill.stages.evaluate.suite import Exams, evaluate_suite, plan_suite

CHOICES = ("cmmlu", "ceval", "arc_challenge", "truthfulqa")
LETTERED = ("cmmlu", "ceval", "arc_challenge")
OWN = ("strategyqa", "math23k")
NAMES = ("gsm8k", "math500", "bbh", *CHOICES, *OWN)
LIMIT = 4

quiet_harness()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models on a busy machine: threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plans(data_root: Path) -> dict[str, Exams]:
    """All evaluations with data, both ways of multiple choice; read once."""
    native = plan_suite(NAMES, SuiteOptions(root=data_root))
    lettered = plan_suite(CHOICES, SuiteOptions(root=data_root, choice="generation"))
    return {"likelihood": native, "generation": native | lettered}


def options(data_root: Path, **changes: Any) -> SuiteOptions:
    return dataclasses.replace(SuiteOptions(root=data_root, limit=LIMIT, batch_size=50), **changes)


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(folder / "records.jsonl")
    clean = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return sorted(clean, key=lambda row: (row["evaluation"], row["task"], row["number"]))


# -- scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["likelihood", "generation"])
@pytest.mark.parametrize("share", [1.0, 0.0, 0.5])
def test_a_scripted_model_scores_exactly_what_it_knows(plans, data_root, tmp_path, choice, share):
    exams = plans[choice] if choice == "likelihood" else {name: plans[choice][name] for name in CHOICES}
    right = some_questions(exams, LIMIT, share)
    asked = options(data_root, choice=choice)
    results = evaluate_suite(ScriptedLM(data_root, right), exams, asked, tmp_path / "out")
    for name, found in results["evaluations"].items():
        assert found["complete"] and found["questions"] > 0
        for member, figures in found["members"].items():
            known = sum(one == member for one, _ in right)
            assert figures["score"] == known / figures["questions"], (name, member)
            assert figures["questions"] == min(LIMIT, len(next(e for e in exams[name] if e.name == member)))
        if name not in OWN and (name in ("gsm8k", "math500", "bbh") or choice == "likelihood"):
            assert found["metrics"][found["metric"]] == pytest.approx(found["score"]), name  # lm-eval agrees
    assert results["macro_average"] == statistics.fmean(f["score"] for f in results["evaluations"].values())
    assert results["in_macro_average"] == list(exams)


@pytest.mark.parametrize("known", [True, False])
def test_every_row_that_is_cheap_to_ask(plans, data_root, tmp_path, known):
    """Own templates and letters, whole files: gold answers score 100 %, wrong ones 0 %."""
    exams = {name: plans["generation"][name] for name in (*LETTERED, *OWN)}
    model = ScriptedLM(data_root, None if known else ())
    results = evaluate_suite(model, exams, options(data_root, limit=None, choice="generation"), tmp_path / "out")
    for name, found in results["evaluations"].items():
        assert found["score"] == float(known) and found["questions"] == sum(map(len, exams[name])), name


def test_gpqa_keeps_one_order_of_its_choices(tmp_path):
    """lm-eval's definition shuffles with the global generator whenever it is looked at."""
    asked = SuiteOptions(root=gpqa_root(tmp_path))
    for choice in ("likelihood", "generation"):
        asked = dataclasses.replace(asked, choice=choice)
        first, again = (plan_suite(["gpqa"], asked) for _ in range(2))
        prompts = [[q.prompt for q in plan["gpqa"][0].questions(None, None)] for plan in (first, again)]
        assert prompts[0] == prompts[1] == [q.prompt for q in first["gpqa"][0].questions(None, None)]
        right = some_questions(first, None, 0.25)
        results = evaluate_suite(ScriptedLM(asked.root, right), first, asked, tmp_path / choice)
        assert results["evaluations"]["gpqa"]["score"] == 3 / 12


def test_standard_errors_and_what_a_score_is(plans, data_root, tmp_path):
    exams = {name: plans["likelihood"][name] for name in ("truthfulqa", "ceval")}
    right = some_questions({"ceval": exams["ceval"]}, LIMIT, 0.5)
    right |= {("truthfulqa_mc1", n) for n in range(2)} | {("truthfulqa_mc2", n) for n in range(3)}
    found = evaluate_suite(ScriptedLM(data_root, right), exams, options(data_root), tmp_path / "out")["evaluations"]
    truthful, ceval = found["truthfulqa"], found["ceval"]
    assert truthful["scored_by"] == "truthfulqa_mc2" and truthful["score"] == 3 / LIMIT
    assert truthful["members"]["truthfulqa_mc1"]["score"] == 2 / LIMIT
    n = ceval["questions"]
    p = ceval["score"]
    assert n == LIMIT * len(exams["ceval"]) and p == 0.5
    assert ceval["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_a_record_says_what_was_asked_and_answered(plans, data_root, tmp_path):
    exams = {"gsm8k": plans["likelihood"]["gsm8k"]}
    evaluate_suite(ScriptedLM(data_root), exams, options(data_root, limit=1), tmp_path / "out")
    [row] = read_json_lines(tmp_path / "out" / "records.jsonl")
    [question] = exams["gsm8k"][0].questions(1, None)
    assert row["prompt_hash"] == hashlib.sha256(question.prompt.encode()).hexdigest()[:32]
    assert (row["evaluation"], row["task"], row["id"], row["style"]) == ("gsm8k", "gsm8k", "0", "fewshot-5")
    assert row["correct"] is True and row["score"] == 1.0 and row["prediction"] == row["gold"]
    assert row["metrics"] == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
    assert row["mode"] == "generation" and row["seconds"] >= 0 and row["tokens_in"] is None
    assert not {path.name for path in (tmp_path / "out").iterdir()} - {
        "identity.json", "records.jsonl", "results.json", ".lock"}  # fmt: skip


def test_the_likeliest_choice_is_the_first_of_equals_and_nan_is_no_answer(plans, data_root, tmp_path):
    class Flat(ScriptedLM):
        value = -1.0

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(self.value, False) for _ in requests]

    exams = {name: plans["likelihood"][name][:2] for name in ("cmmlu", "truthfulqa")}
    evaluate_suite(Flat(data_root), exams, options(data_root), tmp_path / "flat")
    rows = without_seconds(tmp_path / "flat")
    assert {row["prediction"] for row in rows if row["evaluation"] == "cmmlu"} == {"A"}
    masses = [row["score"] for row in rows if row["task"] == "truthfulqa_mc2"]
    assert all(0 < mass < 1 for mass in masses)
    Flat.value = math.nan
    results = evaluate_suite(Flat(data_root), exams, options(data_root), tmp_path / "nan")
    assert results["evaluations"]["cmmlu"]["score"] == results["evaluations"]["truthfulqa"]["score"] == 0
    assert results["evaluations"]["cmmlu"]["no_answer"] == 1


# -- as lm-eval itself asks ------------------------------------------------------------------------------


class Hashing(ScriptedLM):
    """Answers that depend on the prompt's text alone."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-(int(hashlib.sha256("".join(r.args).encode()).hexdigest()[:8], 16) / 2**28), False) for r in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [f" so #### {len(r.args[0]) % 7}\nthe answer is {len(r.args[0]) % 3}." for r in requests]


@pytest.mark.parametrize(
    ("name", "member", "chat"),
    [("gsm8k", 0, False), ("gsm8k", 0, True), ("bbh", 3, False), ("cmmlu", 1, False), ("truthfulqa", 1, True)],
)
def test_prompts_and_metrics_are_those_of_lm_eval(plans, data_root, tmp_path, name, member, chat):
    """lm-eval's own evaluator over the same rows in JSON files, its YAML files found by name."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    exam = plans["likelihood"][name][member]
    assert isinstance(exam, HarnessExam)
    theirs = simple_evaluate_samples(evaluator, TaskManager, exam, data_root, tmp_path, chat)
    model = Hashing(data_root)
    asked = options(data_root, chat=chat)
    evaluate_suite(model, {name: [exam]}, asked, tmp_path / "out")
    ours = {row["number"]: row for row in without_seconds(tmp_path / "out")}
    prompts = {q.number: q for q in exam.questions(LIMIT, model.apply_chat_template if chat else None)}
    assert len(theirs) >= LIMIT
    for sample in theirs:
        number = sample["doc_id"]
        assert [r.args[0] for r in prompts[number].requests] == [arguments[0] for arguments in sample["arguments"]]
        for metric in sample["metrics"]:
            assert ours[number]["metrics"][f"{metric},{sample['filter']}"] == pytest.approx(sample[metric])


def simple_evaluate_samples(
    evaluator: Any, manager: Any, exam: HarnessExam, root: Path, folder: Path, chat: bool
) -> list[Any]:
    evaluation, member = exam._rules, exam._member
    files = {}
    for split, kind in evaluation.splits.items():
        rows = evaluation.load(member, root, kind)
        files[split] = str(folder / f"{split}.json")
        Path(files[split]).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    import lm_eval

    definition = Path(lm_eval.__file__).parent / "tasks" / member.definition
    settings = {
        "include": str(definition),
        "task": f"mine_{exam.name}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "num_fewshot": exam._num_fewshot,
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mine.yaml").write_text(yaml.safe_dump(settings))
    found = evaluator.simple_evaluate(
        model=Hashing(root),
        tasks=[f"mine_{exam.name}"],
        task_manager=manager(include_path=str(folder / "tasks"), include_defaults=False),
        limit=LIMIT,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )
    return found["samples"][f"mine_{exam.name}"]


# -- stopping and going on -------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_records(plans, data_root, tmp_path):
    exams = {name: plans["likelihood"][name] for name in ("math500", "cmmlu", "truthfulqa", "math23k")}
    asked = options(data_root, batch_size=3)
    right = some_questions(exams, LIMIT, 0.5)
    whole = evaluate_suite(ScriptedLM(data_root, right), exams, asked, tmp_path / "whole")
    out = tmp_path / "stopped"
    for calls in (1, 3, 0, 5):
        with pytest.raises(KeyboardInterrupt):
            evaluate_suite(ScriptedLM(data_root, right, dies_after=calls), exams, asked, out)
        assert not (out / "results.json").exists()
    path = out / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-17])  # the last line torn
    assert len(read_json_lines(path)) == len(path.read_text().splitlines()) - 1
    last = ScriptedLM(data_root, right)
    results = evaluate_suite(last, exams, asked, out)
    assert without_seconds(out) == without_seconds(tmp_path / "whole")
    assert scores_of(results) == scores_of(whole)
    again = ScriptedLM(data_root, right)
    evaluate_suite(again, exams, asked, out)
    assert sum(again.asked.values()) == 0 < sum(last.asked.values())


def scores_of(results: Any) -> Any:
    return {name: (found["score"], found["stderr"]) for name, found in results["evaluations"].items()}


def test_the_order_of_evaluations_changes_nothing(plans, data_root, tmp_path):
    names = ("ceval", "gsm8k", "strategyqa")
    for folder, order in (("one", names), ("two", names[::-1])):
        exams = {name: plans["likelihood"][name] for name in order}
        evaluate_suite(Hashing(data_root), exams, options(data_root), tmp_path / folder)
    assert without_seconds(tmp_path / "one") == without_seconds(tmp_path / "two")


def test_more_questions_and_more_evaluations_join_the_same_folder(plans, data_root, tmp_path):
    first, second = ({name: plans["likelihood"][name]} for name in ("gsm8k", "math23k"))
    right = some_questions(first | second, 12, 0.5)
    out, model = tmp_path / "out", ScriptedLM(data_root, right)
    evaluate_suite(model, first, options(data_root, limit=6), out)
    evaluate_suite(model, first | second, options(data_root, limit=12), out)
    assert model.asked["generate_until"] == 6 + 6 + 12
    evaluate_suite(ScriptedLM(data_root, right), first | second, options(data_root, limit=12), tmp_path / "at once")
    assert without_seconds(out) == without_seconds(tmp_path / "at once")
    smaller = evaluate_suite(model, first, options(data_root, limit=5), out)  # a part of what is there
    assert model.asked["generate_until"] == 24
    assert smaller["evaluations"]["gsm8k"]["questions"] == 5 and smaller["evaluations"]["math23k"]["questions"] == 12
    known = sum((("gsm8k", n) in right) for n in range(5))
    assert smaller["evaluations"]["gsm8k"]["score"] == known / 5


def test_an_evaluation_that_is_not_finished_is_not_in_the_average(plans, data_root, tmp_path):
    out = tmp_path / "out"
    first, second = ({name: plans["likelihood"][name]} for name in ("gsm8k", "math23k"))
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(ScriptedLM(data_root, dies_after=1), first, options(data_root, batch_size=2), out)
    results = evaluate_suite(ScriptedLM(data_root), second, options(data_root), out)
    assert not results["evaluations"]["gsm8k"]["complete"] and results["evaluations"]["gsm8k"]["questions"] == 2
    assert results["in_macro_average"] == ["math23k"] and results["macro_average"] == 1.0


@pytest.mark.parametrize(
    ("changes", "asker", "key"),
    [
        ({"num_fewshot": 3}, {}, "math500.members.math500.num_fewshot (4 there, 3 now)"),
        ({"choice": "generation"}, {}, 'math500.choice ("likelihood" there, "generation" now)'),
        ({"chat": True}, {}, "math500.chat (false there, true now)"),
        ({"max_new_tokens": 9}, {}, "math500.members.math500.max_new_tokens (null there, 9 now)"),
        ({}, {"model": {"sha256": "b"}}, 'model.model.sha256 ("a" there, "b" now)'),
        ({}, {"dtype": "bfloat16"}, 'model.dtype ("float32" there, "bfloat16" now)'),
    ],
)
def test_a_folder_with_other_answers_is_refused_by_name(data_root, tmp_path, changes, asker, key):
    me = {"model": {"sha256": "a"}, "dtype": "float32"}
    out, asked = tmp_path / "out", options(data_root, limit=2)
    evaluate_suite(ScriptedLM(data_root), plan_suite(["math500"], asked), asked, out, asker=me)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    now = dataclasses.replace(asked, **changes)
    with pytest.raises(RunFolderError) as caught:
        check_folder(plan_suite(["math500"], now), now, out, me | asker)
    assert key in caught.value.what and "--out" in caught.value.fix
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_changed_rows_and_versions_are_refused(data_root, tmp_path, monkeypatch):
    root = tmp_path / "data"
    (root / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        lines = (data_root / "gsm8k" / f"{split}.jsonl").read_text().splitlines()[:9]
        (root / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    asked, out = options(root, limit=2), tmp_path / "out"
    evaluate_suite(ScriptedLM(root), ["gsm8k"], asked, out)
    with monkeypatch.context() as patch:
        patch.setattr("kvdistill.stages.evaluate.harness.metadata.version", lambda name: "9.9")
        with pytest.raises(RunFolderError, match="lm_eval"):
            evaluate_suite(ScriptedLM(root), ["gsm8k"], asked, out)
    path = root / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text().replace("How", "Now how", 1))
    with pytest.raises(RunFolderError, match=r"gsm8k\.members\.gsm8k\.data"):
        evaluate_suite(ScriptedLM(root), ["gsm8k"], asked, out)


def test_a_folder_of_something_else_is_left_alone(data_root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"no identity\.json"):
        evaluate_suite(ScriptedLM(data_root), ["strategyqa"], options(data_root), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# -- what may be asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "changes", "error", "words"),
    [
        (["gsm8"], {}, DataError, "'gsm8k'"),
        (["strategyqa", "trutfulqa"], {}, DataError, "'truthfulqa'"),
        ([" "], {}, DataError, "no evaluation is named"),
        (["own"], {}, DataError, "in no run folder"),
        (["math500"], {"num_fewshot": 5}, RecipeError, "4 examples"),
        (["cmmlu"], {"num_fewshot": 6}, RecipeError, "5 examples"),
        (["cmmlu"], {"num_fewshot": 6, "choice": "generation"}, RecipeError, "5 examples"),
        (["gpqa"], {}, DataError, "data.root"),
    ],
)
def test_mistakes_are_found_without_a_model(data_root, names, changes, error, words):
    with pytest.raises(error) as caught:
        plan_suite(names, options(data_root, **changes))
    assert words in caught.value.message() and caught.value.fix


def test_how_many_examples(data_root, plans):
    """The usual number, what was asked for, and none where the definition has none to show."""
    shots = {name: plans["likelihood"][name][0]._num_fewshot for name in ("gsm8k", "math500", "bbh", *CHOICES)}
    assert shots == {"gsm8k": 5, "math500": 4, "bbh": 3, "cmmlu": 5, "ceval": 5, "arc_challenge": 25, "truthfulqa": 0}
    asked = plan_suite(["truthfulqa", "ceval", "math500"], options(data_root, num_fewshot=2))
    assert [asked[name][0]._num_fewshot for name in asked] == [0, 2, 2]
    none = plan_suite(["ceval"], options(data_root, num_fewshot=0))["ceval"][0]
    assert next(none.questions(1, None)).prompt.count("答案：") == 1


def test_lettered_prompts_show_examples_before_the_question(plans):
    exam = plans["generation"]["cmmlu"][0]
    assert isinstance(exam, LetteredExam)
    question = next(exam.questions(1, None))
    assert question.prompt.count("答案：") == 6 and question.prompt.endswith("答案：")
    assert question.requests[0].args[1]["until"] == ["\n\n"] and question.style == "fewshot-5"


def test_a_name_twice_counts_once_and_any_part_of_the_run_is_named(data_root, tmp_path):
    exams = plan_suite(["strategyqa", "strategyqa "], options(data_root))
    assert list(exams) == ["strategyqa"] and set(EVALUATIONS) >= set(exams)
    seen: list[tuple[str, float, float]] = []
    asked = options(data_root, batch_size=3)
    evaluate_suite(ScriptedLM(data_root), exams, asked, tmp_path / "out", lambda *step: seen.append(step))
    assert seen == [("evaluate strategyqa", done, LIMIT) for done in (0, 3, 4)]


# -- the Hugging Face side ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(data_root: Path) -> Any:
    return AutoTokenizer.from_pretrained(data_root / "tokenizers" / "qwen2.5")


def tiny_qwen(tokenizer: Any, window: int = 4096, seed: int = 0) -> Any:
    """A random model whose answers differ visibly from prompt to prompt."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=window, initializer_range=0.6,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def metered(tokenizer: Any, batch_size: int = 4, *, window: int = 4096, **settings: Any) -> MeteredLM:
    return MeteredLM(tiny_qwen(tokenizer, window), tokenizer, batch_size=batch_size, **settings)


def generation(prompt: str, number: int = 0, **settings: Any) -> Instance:
    return Instance("generate_until", {}, (prompt, {"do_sample": False, **settings}), 0, ("t", number, 1))


PROMPTS = [f"Question: {n} apples, 苹果？ {'and more ' * n}\nAnswer:" for n in (0, 9, 3, 14, 6)]
SCORED = [
    Instance("loglikelihood", {}, (prompt, choice), i, ("t", number, 1))
    for number, prompt in enumerate(PROMPTS)
    for i, choice in enumerate((" A", " B", " 12 apples", " a long answer with many words in it"))
]


def test_batches_and_padding_change_nothing(qwen):
    asked = [generation(prompt, n, until=["\n\n", "Q"], max_gen_toks=12) for n, prompt in enumerate(PROMPTS)]
    reference = HFLM(pretrained=tiny_qwen(qwen), tokenizer=qwen, batch_size=1)
    scores = reference.loglikelihood(SCORED, disable_tqdm=True)
    texts = reference.generate_until(copy.deepcopy(asked), disable_tqdm=True)
    for batch_size in (1, 2, 64):
        model = metered(qwen, batch_size)
        for (value, greedy), (wanted, wanted_greedy) in zip(model.loglikelihood(SCORED), scores, strict=True):
            assert value == pytest.approx(wanted, abs=1e-4, rel=1e-6) and greedy == wanted_greedy
        assert model.generate_until(asked) == texts
        assert all(texts)


@torch.no_grad()
def test_likelihoods_are_those_of_plain_transformers(qwen):
    model, plain = metered(qwen), tiny_qwen(qwen)
    for request, (value, _) in zip(SCORED[:20], model.loglikelihood(SCORED[:20]), strict=True):
        prompt, choice = request.args
        start, ids = len(qwen(prompt).input_ids), qwen(prompt + choice).input_ids
        log_probs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        slow = sum(float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids)))
        assert value == pytest.approx(slow, abs=1e-4, rel=1e-6)


@torch.no_grad()
def test_tokens_and_forward_passes_are_counted_as_by_hand(qwen):
    """One question at a time with plain transformers; ends at a stop text, an end token, or the limit."""
    model, plain = metered(qwen, 3), tiny_qwen(qwen)
    first_words = [slow_answer(plain, qwen, prompt, [], 8)[0] for prompt in PROMPTS]
    stops = [first_words[0].strip()[:3], first_words[1].strip()[-4:]]
    asked = [generation(prompt, n, until=stops, max_gen_toks=8) for n, prompt in enumerate(PROMPTS)]
    texts = model.generate_until(asked)
    for prompt, text, used in zip(PROMPTS, texts, model.usage, strict=True):
        wanted, passes = slow_answer(plain, qwen, prompt, stops, 8)
        assert text == wanted and used.tokens_in == len(qwen(prompt).input_ids) and not used.truncated
        assert used.tokens_out == used.forward_passes == passes
    assert len({used.tokens_out for used in model.usage}) > 1
    model.loglikelihood(SCORED)
    for number in range(len(PROMPTS)):
        used = model.usage[4 * number : 4 * number + 4]
        assert [one.forward_passes for one in used] == [1, 0, 1, 1]  # " A" and " B" are one token after one prompt
        whole = [len(qwen("".join(r.args)).input_ids) - 1 for r in SCORED[4 * number : 4 * number + 4]]
        assert sum(one.tokens_in for one in used) == whole[0] + whole[2] + whole[3]


def slow_answer(model: Any, tokenizer: Any, prompt: str, stops: list[str], limit: int) -> tuple[str, int]:
    """Greedy, without a cache: the text before the first stop, and the forward passes it took."""
    start = ids = tokenizer(prompt).input_ids
    for passes in range(1, limit + 1):  # noqa: B007
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        text = tokenizer.decode(ids[len(start) :])
        if ids[-1] == tokenizer.eos_token_id or any(stop in text for stop in stops):
            break
    text = tokenizer.decode(ids[len(start) :], skip_special_tokens=True)
    for stop in stops:
        text = text.split(stop)[0]
    return text, passes


def test_an_answer_ends_at_its_own_end_token(qwen):
    """Beside rows that go on: what comes after the end must not reach the text or the counts."""
    model = metered(qwen)
    prompt = [qwen(PROMPTS[0]).input_ids]
    [(_, written, _)] = generate_greedy(model.model, prompt, qwen, max_new_tokens=6, rows=Rows(1))
    model._end_ids = [written[2]]
    texts = model.generate_until([generation(prompt, n, max_gen_toks=6) for n, prompt in enumerate(PROMPTS)])
    assert texts[0] == qwen.decode(written[:2])
    assert [used.tokens_out for used in model.usage] == [3, 6, 6, 6, 6]


@pytest.mark.parametrize("window", [24, 40])
def test_a_prompt_that_does_not_fit_is_cut_from_the_left_and_says_so(qwen, window):
    model, roomy = metered(qwen, window=window), metered(qwen)
    asked = [generation(prompt, n, max_gen_toks=16) for n, prompt in enumerate(PROMPTS)]
    texts = model.generate_until(asked)
    new = min(16, window // 2)
    for prompt, text, used in zip(PROMPTS, texts, model.usage, strict=True):
        ids = qwen(prompt).input_ids
        assert used.truncated == (len(ids) > window - new) and used.tokens_in == min(len(ids), window - new)
        kept = [ids[-(window - new) :]]
        [alone] = generate_greedy(roomy.model, kept, qwen, max_new_tokens=new, rows=Rows(1), end_ids=roomy._end_ids)
        assert text == alone.text
    model.loglikelihood(SCORED)
    assert {used.truncated for used in model.usage} == {True, False}
    long = Instance("loglikelihood", {}, ("Q:", " word" * 60), 0, ("t", 0, 1))
    [(value, _)] = model.loglikelihood([long])
    assert math.isfinite(value) and model.usage[0].truncated and model.usage[0].scored == window


def test_a_penalty_that_the_publisher_suggests_is_not_applied(qwen):
    plain = metered(qwen).generate_until([generation(PROMPTS[0], max_gen_toks=30)])
    suggested = tiny_qwen(qwen)
    suggested.generation_config.repetition_penalty = 1.8
    suggested.generation_config.do_sample = True
    model = MeteredLM(suggested, qwen, batch_size=1)
    assert model.generate_until([generation(PROMPTS[0], max_gen_toks=30)]) == plain


def test_too_little_memory_halves_the_batch(qwen, monkeypatch):
    model = metered(qwen, 8)
    asked = [generation(prompt, n, max_gen_toks=5) for n, prompt in enumerate(PROMPTS)]
    texts, scores = model.generate_until(asked), model.loglikelihood(SCORED)
    real, sizes = model.model.forward, []

    def small(input_ids: Any, **inputs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("no memory")
        return real(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model.model, "forward", small)
    most = 2
    assert model.generate_until(asked) == texts and max(sizes) == 5
    for (value, _), (wanted, _) in zip(model.loglikelihood(SCORED), scores, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
    most = 0
    with pytest.raises(ModelError, match="enough memory for one question"):
        model.generate_until(asked)


def test_what_the_tokenizer_cannot_write_is_counted(qwen):
    model = metered(qwen, 1)
    model.generate_until([generation("Ünï 苹果 ok?", max_gen_toks=1)])
    assert (model.usage[0].unspelled, model.usage[0].characters) == (0, 8)
    letters = character_tokenizer()
    narrow = MeteredLM(tiny_qwen(letters), letters, batch_size=2)
    narrow.generate_until([generation("Is 3+4=7?", max_gen_toks=1), generation("三加四", max_gen_toks=1)])
    assert [(used.unspelled, used.characters) for used in narrow.usage] == [(2, 8), (3, 3)]
    assert narrow.loglikelihood([Instance("loglikelihood", {}, ("三", " 是"), 0, ("t", 0, 1))])[0][0] < 0  # the space


def test_text_begins_as_students_have_seen_it(data_root):
    letters = character_tokenizer("abc")
    model, without = (MeteredLM(tiny_qwen(letters), letters, batch_size=2, bos_in_front=bos) for bos in (True, False))
    assert model.tok_encode("3+4") == [letters.bos_token_id, *without.tok_encode("3+4")]
    assert model._encode_pair("3+", "4")[0] == [letters.bos_token_id, *without._encode_pair("3+", "4")[0]]
    gpt2 = AutoTokenizer.from_pretrained(data_root / "tokenizers" / "gpt2")
    assert isinstance(gpt2, PreTrainedTokenizerFast) and gpt2.pad_token is None
    padded = MeteredLM(tiny_qwen(gpt2), gpt2, batch_size=2)
    assert len(padded.generate_until([generation("a", max_gen_toks=2), generation("b c d", max_gen_toks=2)])) == 2


def test_a_chat_ends_with_its_turn_and_takes_any_system_message(qwen):
    tokenizer = copy.deepcopy(qwen)
    tokenizer.eos_token = "<|endoftext|>"
    model = MeteredLM(tiny_qwen(tokenizer), tokenizer, batch_size=1, chat=True)
    ends = [tokenizer.convert_ids_to_tokens(i) for i in model._end_ids]
    assert ends == ["<|endoftext|>", "<|im_end|>"]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert "system\nBe brief.<|im_end|>" in model.apply_chat_template(talk)
    tokenizer.chat_template = (  # refuses a system message, and writes the date
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    )
    model = MeteredLM(tiny_qwen(tokenizer), tokenizer, batch_size=1, chat=True)
    written = model.apply_chat_template(talk)
    assert written == "[user]Be brief.\n\n2+2?26 Jul 2024"  # the same tomorrow


def test_stopped_with_a_real_model_the_bits_are_the_same(data_root, qwen, tmp_path):
    exams = plan_suite(["ceval", "strategyqa"], options(data_root))
    asked = options(data_root, limit=5, batch_size=4, max_new_tokens=5, gold_nll=True)
    exams = plan_suite(["ceval", "strategyqa"], asked)
    exams["ceval"] = exams["ceval"][:2]
    evaluate_suite(metered(qwen), exams, asked, tmp_path / "whole")
    for keep in (0.2, 0.75):
        evaluate_suite(metered(qwen), exams, asked, tmp_path / f"{keep}")
        path = tmp_path / f"{keep}" / "records.jsonl"
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        (path.parent / "results.json").unlink()
        evaluate_suite(metered(qwen), exams, asked, path.parent)
        assert without_seconds(path.parent) == without_seconds(tmp_path / "whole")
    rows = without_seconds(tmp_path / "whole")
    assert all(row["nll"] > 0 and row["tokens_in"] > 0 and row["forward_passes"] > 0 for row in rows)
