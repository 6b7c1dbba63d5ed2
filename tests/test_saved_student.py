"""A saved student is the one that was trained: plain transformers, which knows nothing of us, gets what we record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe import SEED, assert_one_message, copy_base, invoke, made_ready, no_training, tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvdistill.arms.student
from kvdistill.arms.checks import check_models
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.student import CausalStudent
from kvdistill.core.errors import KVDistillError, ModelError
from kvdistill.core.recipe import LoraRecipe
from kvdistill.core.records import read_records
from kvdistill.data.encode import encode_rows
from kvdistill.data.problems import Problem, Row
from kvdistill.data.tokenizers import as_read, character_tokenizer, load_tokenizer

CE = {"ce": {"teachers": []}}


def answers_of_plain_transformers(folder: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """As the README tells users to ask a saved student: nothing but the folder, and the text of the prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        [ids] = model.generate(**inputs, max_new_tokens=max_new_tokens)
        answers.append(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "gpt_neox", "phi"])
def test_plain_transformers_gives_the_recorded_answers(tmp_path, family):
    run = tmp_path / "run"
    student = {"scratch": {"architecture": family, "hidden_size": 16, "num_layers": 2, "num_heads": 2}}
    recipe = tiny_recipe(run, arms=CE, student=student, train={"learning_rate": 0.02, "steps": 12})
    made_ready(recipe, run, "evaluate")
    experiment = Experiment(recipe, run)
    records = read_records(run / f"arms/ce/seed-{SEED}/records.jsonl")
    by_id = {(example.task, example.id, example.style): example for example in experiment.split("test")}
    examples = [by_id[record.task, record.id, record.style] for record in records][:6]
    folder = run / f"arms/ce/seed-{SEED}/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer(example.prompt)["input_ids"] for example in examples] == [e.prompt_ids for e in examples]
    assert examples[0].prompt_ids[0] == experiment.tokenizer.bos_token_id, "training puts it in front"
    answers = answers_of_plain_transformers(folder, [e.prompt for e in examples], recipe.evaluate.max_new_tokens)
    assert answers == [record.completion for record in records[:6]]


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "llama3", "bert-base-uncased", "t5-small"])
def test_a_real_tokenizer_reads_after_saving_as_rows_are_encoded(data_root, tmp_path, name):
    tokenizer = load_tokenizer(str(data_root / "tokenizers" / name))
    prompts = ["Question: 3 pens at $2.50?\nAnswer:", "问题：小明有 12 个苹果。", "a"]
    rows = [Row(Problem("t", str(i), p, "", "2"), "cot", p, "It is", " 2") for i, p in enumerate(prompts)]
    wanted = [example.prompt_ids for example in encode_rows(tokenizer, rows)]
    as_read(tokenizer, template="plain").save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert [saved(prompt)["input_ids"] for prompt in prompts] == wanted
    assert saved(prompts[:1], ["2"])["input_ids"][0] == [
        *wanted[0],
        *tokenizer("2", add_special_tokens=False).input_ids,
    ]
    # a chat template writes its own beginning: nothing is put around what it wrote
    chat = as_read(tokenizer, template="chat")
    assert [chat(p)["input_ids"] for p in prompts] == [chat(p, add_special_tokens=False)["input_ids"] for p in prompts]


def published_llama(folder: Path, **changes: Any) -> Path:
    """A folder as publishers write them, with the built-in tokenizer."""
    tokenizer = character_tokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'\n#,$()\"/")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_path(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "arms": CE,
        "student": {"scratch": None, "path": str(folder), **changes},
        "data": {"tokenizer": str(folder)},
    }


@pytest.mark.parametrize(
    "preferences", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "repetition_penalty": 1.5, "top_k": 5}]
)
def test_what_a_publisher_prefers_in_generation_neither_stops_saving_nor_changes_answers(tmp_path, preferences):
    folder = published_llama(tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps(preferences))
    run = tmp_path / "run"
    recipe = tiny_recipe(run, **of_path(folder))
    made_ready(recipe, run, "evaluate")
    records = read_records(run / f"arms/ce/seed-{SEED}/records.jsonl")[:4]
    prompts = {e.id: e.prompt for e in Experiment(recipe, run).split("test")}
    asked = [prompts[record.id] for record in records]
    answers = answers_of_plain_transformers(run / f"arms/ce/seed-{SEED}/model", asked, recipe.evaluate.max_new_tokens)
    assert answers == [record.completion for record in records]


def test_a_damaged_generation_config_and_logits_that_are_no_numbers_are_said_before_training(tmp_path, monkeypatch):
    folder = published_llama(tmp_path / "llama")
    (folder / "generation_config.json").write_text("[1, 2]")
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **of_path(folder)), work=no_training)
    assert_one_message(answer, "llama")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": -3, "cache_implementation": "none"}))
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **of_path(folder)), work=no_training)
    assert_one_message(answer, "generation_config.json, or delete it")
    published_llama(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.lm_head.weight, 3e38)
    model.save_pretrained(folder)
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **of_path(folder)), work=no_training)
    assert_one_message(answer, "logits are NaN or infinite", f"student.path: {folder}")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapters_on_tied_embeddings_are_refused_before_training(tmp_path, monkeypatch, module):
    folder = published_llama(tmp_path / "llama", tie_word_embeddings=True)
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj", module]}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **of_path(folder, lora=lora)), work=no_training)
    assert_one_message(answer, module, "tied", "student.lora.target_modules")


def test_adapters_on_untied_embeddings_are_saved_as_they_were_trained(tmp_path):
    folder = published_llama(tmp_path / "llama", tie_word_embeddings=False)
    tokenizer = character_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    student = CausalStudent(model, lora=LoraRecipe(r=2, alpha=4, target_modules=["v_proj", "lm_head", "embed_tokens"]))
    for name, parameter in student.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # as after training: what they start from changes nothing
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, model.config.vocab_size, (3, 7))
    with torch.no_grad():
        before = student.eval()(ids, torch.ones_like(ids)).logits
        student.save(tmp_path / "saved", tokenizer)
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


def test_a_student_that_would_come_back_as_another_one_is_refused_before_training_and_when_it_is_saved(
    tmp_path, monkeypatch
):
    def spoiled(model: Any) -> Any:
        torch.nn.init.ones_(model.get_output_embeddings().weight)
        return model

    run = copy_base(tmp_path)
    experiment = Experiment(tiny_recipe(run, arms=CE), run)
    with monkeypatch.context() as context:
        context.setattr(kvdistill.arms.student, "merge_lora", spoiled)
        (run / "check.json").unlink()
        with pytest.raises(ModelError, match="another one"):
            check_models(experiment)
        with pytest.raises(KVDistillError, match="another one"):
            CausalStudent(experiment.initial_model(SEED)).save(tmp_path / "saved", experiment.tokenizer)
    assert not list(tmp_path.glob("*saved*")) and not list(run.glob(".check-*")), "nothing is left behind"
    check_models(experiment)  # and noted, so that it is tried once
    monkeypatch.setattr(CausalStudent, "save", lambda *_: pytest.fail("tried again"))
    check_models(experiment)


@pytest.mark.parametrize(("spoiled", "words"), [("lm_head", "NLL"), ("v_proj", "keys or values")])
def test_a_teacher_that_overflows_is_named_when_it_is_captured(tmp_path, monkeypatch, spoiled, words):
    folder = published_llama(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if spoiled in name:  # finite in float32, and so are the products of some channels only
            torch.nn.init.constant_(weight, 3e38)
    model.save_pretrained(folder)
    changes = {"data": {"tokenizer": str(folder)}, "arms": {"kv": {}}, "student": {"scratch": {"vocab_size": None}}}
    teacher = {"name": "loud", "path": str(folder)}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, teachers=[teacher], **changes))
    assert_one_message(answer, f"NaN or infinity as {words} of text", "loud", "dtype")
