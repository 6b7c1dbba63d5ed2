"""The model that thinks in latents, and the student around it, against thinking written out the slow way: one row at a
time, without padding and without a cache, every pass over the whole text again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LAYERS, VOCAB, tiny_model
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kvdistill.arms.latent_student import LatentStudent, student_of, thinking_cost
from kvdistill.arms.questions import Questions
from kvdistill.arms.student import CausalStudent, Student, load_saved
from kvdistill.core.errors import RunFolderError
from kvdistill.core.recipe import LatentRecipe, LoraRecipe
from kvdistill.data.tokenizers import character_tokenizer
from kvdistill.models import positions_from_mask, unrotate_keys
from kvdistill.models.generate import left_padded
from kvdistill.models.latent import BOT, EOT, LATENT, LatentForCausalLM, Thoughts
from kvdistill.stages.evaluate.lm import MeteredLM

FAMILIES = ("llama", "qwen2", "gpt2")
M = 4
LENGTHS = (7, 3, 6)  # tokens of the prompts of a batch
PROMPTS = [[(5 * n + 11 * i) % (VOCAB - 1) + 1 for i in range(length)] for n, length in enumerate(LENGTHS)]
ANSWERS = [[9, 4], [8, 3, 21, 5, 2], [30]]
NEAR: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}


def thinker(family: str = "llama", num_latents: int = M, num_passes: int = 2, **options: Any) -> LatentForCausalLM:
    """A tiny random one; its rows of `special` and its map differ visibly from nothing."""
    inner = options.pop("projection_size", 29)
    model = LatentForCausalLM.around(tiny_model(family, **options), num_latents, num_passes, inner, seed=3).eval()
    with torch.no_grad():
        model.special.mul_(3.0)
        model.projection[3].weight.mul_(0.5)
        model.projection[3].bias.add_(torch.linspace(-0.2, 0.3, HIDDEN))
    return model


def projected(model: LatentForCausalLM, hidden: Tensor) -> Tensor:
    """PRJ, written out."""
    weight = dict(model.projection.state_dict())
    inner = functional.gelu(hidden @ weight["0.weight"].T + weight["0.bias"])
    out = inner @ weight["2.weight"].T + weight["2.bias"]
    centred = out - out.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * weight["3.weight"] + weight["3.bias"]


def read_whole(model: LatentForCausalLM, embedded_1XH: Tensor) -> Any:
    """The backbone's decoder over a whole text of embeddings."""
    return model.backbone.get_decoder()(inputs_embeds=embedded_1XH, use_cache=True)


def opening(model: LatentForCausalLM, prompt: list[int]) -> Tensor:
    words = model.backbone.get_input_embeddings()(torch.tensor([prompt]))
    return torch.cat([words, model.special[BOT][None, None]], dim=1)


@torch.no_grad()
def one_after_another(model: LatentForCausalLM, prompt: list[int], num_latents: int) -> tuple[Tensor, Any]:
    """Latents fed one by one, each the image of the last hidden state so far: what was fed [M, H], and the cache."""
    text = opening(model, prompt)
    for _ in range(num_latents):
        hidden = read_whole(model, text).last_hidden_state[:, -1:]
        text = torch.cat([text, projected(model, hidden)], dim=1)
    return text[0, -num_latents:], read_whole(model, text).past_key_values


@torch.no_grad()
def in_passes(model: LatentForCausalLM, prompt: list[int], num_latents: int, num_passes: int) -> tuple[Tensor, Any]:
    """Jacobi passes, each over the whole text: what the last one was fed [M, H], and what the backbone made of it."""
    start = opening(model, prompt)
    fed = model.special[LATENT].expand(1, num_latents, -1)
    for _ in range(num_passes):
        hidden = read_whole(model, torch.cat([start, fed], dim=1)).last_hidden_state
        fed = projected(model, hidden[:, len(prompt) : len(prompt) + num_latents])  # <bot> and all slots but the last
    return fed[0], read_whole(model, torch.cat([start, fed], dim=1))


@torch.no_grad()
def answer_logits(model: LatentForCausalLM, prompt: list[int], fed: Tensor, answer: list[int]) -> Tensor:
    """Of each token of the answer, [A, V], all of the text read at once."""
    words = model.backbone.get_input_embeddings()(torch.tensor([answer]))
    text = torch.cat([opening(model, prompt), fed[None], model.special[EOT][None, None], words], dim=1)
    hidden = read_whole(model, text).last_hidden_state[0, -len(answer) - 1 : -1]
    return model.backbone.get_output_embeddings()(hidden)


@torch.no_grad()
def written_answer(model: LatentForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    fed, _ = in_passes(model, prompt, model.config.num_latents, model.config.num_passes)
    found: list[int] = []
    for _ in range(num_tokens):
        found.append(int(answer_logits(model, prompt, fed, [*found, 0])[-1].argmax()))
    return found


def thought(model: LatentForCausalLM, prompts: list[list[int]] = PROMPTS, **options: Any) -> Thoughts:
    return model.think(*left_padded(prompts, 0, torch.device("cpu")), **options)


def sides(cache: Any) -> list[Tensor]:
    return [side for layer in cache.layers for side in (layer.keys, layer.values)]


# -- thinking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_passes", [0, 1, 2, 3, 4, 6])
def test_passes_are_those_over_the_whole_text_and_their_first_latents_those_of_decoding_in_turn(family, num_passes):
    """In a left-padded batch, in every layer."""
    model = thinker(family)
    with torch.no_grad():
        found = thought(model, num_passes=num_passes)
    columns = max(LENGTHS) + 1 + M
    assert len(found.cache.layers) == LAYERS and found.mask_BX.shape == (3, columns)
    for n, prompt in enumerate(PROMPTS):
        fed, whole = in_passes(model, prompt, M, num_passes)
        torch.testing.assert_close(found.fed_BMH[n], fed, **NEAR)
        torch.testing.assert_close(found.hidden_BMH[n], whole.last_hidden_state[0, -M:], **NEAR)
        torch.testing.assert_close(found.hidden_bot_B1H[n], whole.last_hidden_state[0, len(prompt)][None], **NEAR)
        for mine, theirs in zip(sides(found.cache), sides(whole.past_key_values), strict=True):
            torch.testing.assert_close(mine[n, :, columns - theirs.shape[2] :], theirs[0], **NEAR)
        equal = min(num_passes, M)
        one_by_one_fed, one_by_one = one_after_another(model, prompt, M)
        torch.testing.assert_close(found.fed_BMH[n, :equal], one_by_one_fed[:equal], **NEAR)
        for mine, theirs in zip(sides(found.cache), sides(one_by_one), strict=True):
            mine, theirs = mine[n, :, -M:], theirs[0, :, -M:]
            torch.testing.assert_close(mine[:, :equal], theirs[:, :equal], **NEAR)
            if equal < M:
                assert float((mine - theirs)[:, equal].abs().max()) > 1e-3, "and no others are"


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_passes_as_slots_are_a_fixed_point(family):
    model = thinker(family)
    with torch.no_grad():
        found = [thought(model, num_passes=T) for T in (M, M + 1, M + 5)]
    for more in found[1:]:
        for mine, theirs in zip(sides(found[0].cache), sides(more.cache), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pass_is_pause_tokens_to_the_bit(family):
    model = thinker(family, num_passes=0)
    ids, mask = left_padded(PROMPTS, 0, torch.device("cpu"))
    words = model.backbone.get_input_embeddings()(ids)
    paused = torch.cat([words, model.special[[BOT] + [LATENT] * M].expand(len(ids), -1, -1)], dim=1)
    ones = torch.cat([mask, torch.ones(len(ids), 1 + M, dtype=torch.long)], dim=1)
    with torch.no_grad():
        plain = model.backbone.get_decoder()(
            inputs_embeds=paused, attention_mask=ones, position_ids=positions_from_mask(ones), use_cache=True
        )
        found = thought(model)
        for mine, theirs in zip(sides(found.cache), sides(plain.past_key_values), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(found.hidden_BMH, plain.last_hidden_state[:, -M:])
        assert torch.equal(found.fed_BMH, model.special[LATENT].expand(len(ids), M, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_one_slot_one_pass_five_passes_and_one_step_of_codi_are_the_same(family):
    model = thinker(family, num_latents=1)
    ids, mask = left_padded(PROMPTS, 0, torch.device("cpu"))
    ones = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], dim=1)
    decoder, words = model.backbone.get_decoder(), model.backbone.get_input_embeddings()(ids)
    with torch.no_grad():
        one, five = (thought(model, num_passes=T) for T in (1, 5))
        codi = decoder(
            inputs_embeds=torch.cat([words, model.special[BOT].expand(len(ids), 1, -1)], dim=1),
            attention_mask=ones,
            position_ids=positions_from_mask(ones),
            use_cache=True,
        )
        after = torch.cat([ones, ones[:, -1:]], dim=1)
        codi = decoder(
            inputs_embeds=projected(model, codi.last_hidden_state[:, -1:]),
            attention_mask=after,
            position_ids=after.sum(1, keepdim=True) - 1,
            past_key_values=codi.past_key_values,
            use_cache=True,
        )
    real = after.bool()
    for mine, same, theirs in zip(*map(sides, (one.cache, five.cache, codi.past_key_values)), strict=True):
        assert torch.equal(mine, same)
        torch.testing.assert_close(mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **NEAR)
    torch.testing.assert_close(one.hidden_BMH, codi.last_hidden_state, **NEAR)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_passes", [0, 1, 3])
def test_the_prompt_is_read_once_and_passes_leave_its_keys_and_values_alone(family, num_passes):
    model, read = thinker(family, num_passes=num_passes), []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        found = thought(model)
        hook.remove()
        first = thought(model, num_passes=0)
    P = max(LENGTHS) + 1
    assert read == [P + M] + [M] * num_passes
    assert len(read) == num_passes + 1 == model.num_passes_before_answer
    for mine, theirs in zip(sides(found.cache), sides(first.cache), strict=True):
        assert mine.shape == theirs.shape and torch.equal(mine[:, :, :P], theirs[:, :, :P])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_passes", [0, 1, 2, 3, 5])
def test_what_slots_are_fed_first_matters_to_fewer_passes_than_slots_and_not_at_all_to_as_many(family, num_passes):
    slots = 3
    student = LatentStudent.of(thinker(family, num_latents=slots, num_passes=num_passes))
    thinking = student.think(Questions.of_ids(PROMPTS, ANSWERS, 0))
    loss = thinking.logits_NV.square().sum() + sum(x.square().sum() for x in (*thinking.kv.keys, *thinking.kv.values))
    loss.backward()
    gradient = student.thinker.special.grad
    assert gradient is not None and float(gradient[BOT].abs().max()) > 1e-4
    assert float(gradient[EOT].abs().max()) > 1e-4
    if num_passes < slots:
        assert float(gradient[LATENT].abs().max()) > 1e-4
    else:
        assert float(gradient[LATENT].abs().max()) == 0.0
    maps = [p.grad for p in student.thinker.projection.parameters()]
    assert all((g is None) if num_passes == 0 else float(g.abs().max()) > 0 for g in maps)


# -- the student -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["unrotated", "rotated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_in_training_are_those_of_answering_and_padding_changes_nothing(family, keys):
    """With graph, in a padded batch, layers in an order of their own; answer's logits against the whole text's."""
    student = LatentStudent.of(thinker(family))
    layers = [2, 0]
    thinking = student.train().think(Questions.of_ids(PROMPTS, ANSWERS, 0), layers, keys)
    assert thinking.logits_NV.requires_grad and all(k.requires_grad for k in thinking.kv.keys)
    assert thinking.kv.layers == (2, 0) and thinking.labels_N.tolist() == [
        token for answer in ANSWERS for token in answer
    ]
    assert thinking.row_N.tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    rotated: Any = {"none": "none"}.get(thinking.kv.rope, "rotated")
    assert rotated == ("none" if family == "gpt2" else "rotated")
    slots = [tuple(x[:, :, -M:] for x in side) for side in thinking.seen]  # of all that the answer reads
    seen = replace(thinking.kv, keys=slots[0], values=slots[1], rope=rotated)
    with torch.no_grad():
        answering = thought(student.eval().thinker)
    for place, layer in enumerate(layers):
        for mine, theirs in (("keys", "keys"), ("values", "values")):
            there = getattr(answering.cache.layers[layer], theirs)[:, :, -M:]
            torch.testing.assert_close(getattr(seen, mine)[place], there, **NEAR)
    plain = seen if keys == "rotated" else unrotate_keys(seen, student.thinker.backbone)
    for mine, theirs in zip(thinking.kv.keys, plain.keys, strict=True):
        torch.testing.assert_close(mine, theirs, **NEAR)
    start = 0
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        alone = student.think(Questions.of_ids([prompt], [answer], 0), layers, keys)
        fed, _ = in_passes(student.thinker, prompt, M, student.thinker.config.num_passes)
        slow = answer_logits(student.thinker, prompt, fed, answer)
        mine = thinking.logits_NV[start : start + len(answer)]
        torch.testing.assert_close(mine, slow, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine, alone.logits_NV, **NEAR)
        for side in ("keys", "values"):
            for batched, single in zip(getattr(thinking.kv, side), getattr(alone.kv, side), strict=True):
                torch.testing.assert_close(batched[n], single[0], **NEAR)
        assert thinking.kv.positions_BT[n].tolist() == list(range(len(prompt) + 1, len(prompt) + 1 + M))
        start += len(answer)


@pytest.mark.parametrize("lora", [None, LoraRecipe(r=3, alpha=5)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_thinking_is_the_same_where_written_texts_are_run_again_in_the_backward_pass(family, lora):
    recipe, questions, found = LatentRecipe(tokens=M, passes=2), Questions.of_ids(PROMPTS, ANSWERS, 0), []
    for checkpointing in (False, True):
        options: dict[str, Any] = {"lora": lora, "seed": 1, "gradient_checkpointing": checkpointing}
        student = LatentStudent.around(tiny_model(family), recipe, **options).train()
        thinking, mask = student.think(questions, [0, 2]), torch.ones(2, 5, dtype=torch.bool)
        written = student(torch.arange(10).view(2, 5), mask).logits
        (thinking.logits_NV.square().sum() + thinking.kv.keys[1].square().sum() + written.square().sum()).backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append({"logits": thinking.logits_NV.detach(), **gradients})
        runs_again = [getattr(one, "gradient_checkpointing", False) for one in student.modules()]
        assert any(runs_again) == checkpointing
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-4, rtol=1e-4)


def letters() -> Any:
    """A tokenizer whose words are all of the models' vocabulary: there is no room for more."""
    few = len(character_tokenizer())
    return character_tokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: VOCAB - few])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_of_each_alone_and_count_every_pass(family):
    tokenizer, num_passes = letters(), 3
    model = thinker(family, num_passes=num_passes)
    assert len(tokenizer) == VOCAB
    student = LatentStudent.of(model)
    assert isinstance(student, Student) and isinstance(student_of(model), LatentStudent)
    assert isinstance(student_of(model.backbone), CausalStudent)
    calls: list[int] = []
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    longest = 6
    for prompt, answer in zip(
        PROMPTS, student.generate(PROMPTS, tokenizer, max_new_tokens=longest, batch_size=3), strict=True
    ):
        calls.clear()
        [alone] = student.generate([prompt], tokenizer, max_new_tokens=longest, batch_size=1)
        assert alone == answer and answer.forward_passes == len(calls), "what was run is what is recorded"
        slow = written_answer(model, prompt, longest)
        ended = tokenizer.eos_token_id in slow
        slow = slow[: slow.index(tokenizer.eos_token_id)] if ended else slow
        assert answer.ids == slow and answer.text == tokenizer.decode(slow, skip_special_tokens=True)
        assert answer.forward_passes == num_passes + 1 + len(slow) + ended
    hook.remove()
    model.backbone.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 50  # some end at once, if any can
    answers = student.generate(PROMPTS, tokenizer, max_new_tokens=longest, batch_size=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        slow = written_answer(model, prompt, longest)
        length = slow.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in slow else longest
        assert answer.ids == slow[:length]
        assert answer.forward_passes == num_passes + 1 + min(longest, length + 1)


def test_plain_generation_reads_padding_on_either_side_and_counts_as_transformers_does():
    model = thinker("llama")
    found = [model.generate(torch.tensor([prompt]), max_new_tokens=5)[0, len(prompt) :] for prompt in PROMPTS]
    for side in ("left", "right"):
        width = max(LENGTHS)
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for b, prompt in enumerate(PROMPTS):
            where = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
            ids[b, where], mask[b, where] = torch.tensor(prompt), 1
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5)
        assert torch.equal(out[:, :width], ids) and torch.equal(out[:, width:], torch.stack(found)), side
    assert model.generate(torch.tensor([PROMPTS[0]]), max_length=LENGTHS[0] + 2).shape == (1, LENGTHS[0] + 2)


def test_what_is_new_is_drawn_from_the_seed_alone_and_draws_nothing_from_others():
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    made = [LatentForCausalLM.around(tiny_model("llama"), M, 2, seed=seed) for seed in (4, 4, 5)]
    assert torch.equal(torch.rand(3), first)
    weights = [[one.special, *one.projection.parameters()] for one in made]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0]) and not torch.equal(weights[0][1], weights[2][1])
    words = made[0].get_input_embeddings().weight
    assert float(made[0].special.detach().std()) == pytest.approx(float(words.detach().std()), rel=0.2)


def test_answers_are_scored_behind_latents_and_written_reasoning_as_it_is_written():
    student, pad = LatentStudent.of(thinker("qwen2")), 0
    reasoning = [[5, 6, 7], [12], [31, 30, 29, 28]]
    rows = [[*p, *r, *a] for p, r, a in zip(PROMPTS, reasoning, ANSWERS, strict=True)]
    counted = [[0] * len(p) + [2] * len(r) + [1] * len(a) for p, r, a in zip(PROMPTS, reasoning, ANSWERS, strict=True)]
    counted[2] = [2 if part == 2 else 0 for part in counted[2]]  # no answer is asked about
    found = student.score(rows, counted, pad_id=pad, batch_size=2, num_parts=2)
    written = student.writer.score(rows, counted, pad_id=pad, batch_size=3, num_parts=2)
    for n, (prompt, answer) in enumerate(zip(PROMPTS[:2], ANSWERS[:2], strict=True)):
        fed, _ = in_passes(student.thinker, prompt, M, 2)
        logits = answer_logits(student.thinker, prompt, fed, answer)
        assert found[n][0] == pytest.approx(float(functional.cross_entropy(logits, torch.tensor(answer))), abs=1e-4)
        assert abs(found[n][0] - written[n][0]) > 1e-4
    assert found[2][0] != found[2][0], "a part without tokens has no mean"
    assert [row[1] for row in found] == pytest.approx([row[1] for row in written], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slots_reach_a_target_that_is_known_to_be_within_reach(family):
    """The keys and values that another map and other rows leave: the loss falls a hundredfold."""
    torch.manual_seed(5)
    target_model, model = thinker(family, 3), thinker(family, 3)
    with torch.no_grad():
        for p in (*target_model.projection.parameters(), target_model.special):
            p.add_(0.1 * torch.randn_like(p))
    questions = Questions.of_ids(PROMPTS[:2], ANSWERS[:2], 0)
    with torch.no_grad():
        target = LatentStudent.of(target_model).think(questions).kv
    student = LatentStudent.of(model)
    model.backbone.requires_grad_(False)
    optimiser = torch.optim.Adam([model.special, *model.projection.parameters()], lr=3e-3)

    def loss() -> Tensor:
        kv = student.think(questions).kv
        pairs = zip((*kv.keys, *kv.values), (*target.keys, *target.values), strict=True)
        return torch.stack([functional.mse_loss(mine, theirs) for mine, theirs in pairs]).mean()

    first = float(loss().detach())
    for step in range(120):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 120)
        optimiser.zero_grad()
        now = loss()
        now.backward()
        optimiser.step()
    assert first > 1e-3 and float(loss().detach()) < first / 100, (first, float(now))


# -- saved -----------------------------------------------------------------------------------------------------


def made_to_matter(student: LatentStudent) -> LatentStudent:
    """With adapters, rows and a map that training has moved."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if p.requires_grad and ("lora_" in name or "special" in name or "projection" in name):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return student


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LoraRecipe(r=3, alpha=5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_comes_back_whole(tmp_path, family, lora, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    student = LatentStudent.around(model, LatentRecipe(tokens=M, passes=2, projection_size=13), lora=lora, seed=5)
    learns = {name.split(".")[1] for name, p in student.named_parameters() if p.requires_grad}
    assert learns == {"backbone", "special", "projection"}
    assert lora is None or all("lora_" in n for n, p in student.thinker.backbone.named_parameters() if p.requires_grad)
    student, questions = made_to_matter(student).eval(), Questions.of_ids(PROMPTS, ANSWERS, 0)
    with torch.no_grad():
        before = student.think(questions)
    special = student.thinker.special.detach().clone()
    student.save(tmp_path / "model", letters())
    assert (tmp_path / "model/latent.py").is_file()
    loaded, tokenizer = load_saved(tmp_path / "model", torch.float32)
    assert isinstance(loaded, LatentForCausalLM) and len(tokenizer) == VOCAB == loaded.config.backbone["vocab_size"]
    assert torch.equal(loaded.special, special)
    head, words = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head.data_ptr() == words.data_ptr()) == tied
    with torch.no_grad():
        after = student_of(loaded.eval()).think(questions)
        torch.testing.assert_close(after.logits_NV, before.logits_NV, atol=3e-5, rtol=1e-4)
        for mine, theirs in zip((*after.kv.keys, *after.kv.values), (*before.kv.keys, *before.kv.values), strict=True):
            torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("damage", ["special left out", "special renamed", "projection renamed", "one too many"])
def test_a_folder_that_lacks_a_tensor_is_refused_and_never_filled_up(tmp_path, damage):
    LatentStudent.of(thinker("llama")).save(tmp_path / "model", letters())
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    if damage == "special left out":
        del tensors["special"]
    elif damage == "special renamed":
        tensors["special_rows"] = tensors.pop("special")
    elif damage == "projection renamed":
        tensors["projection.1.weight"] = tensors.pop("projection.0.weight")
    else:
        tensors["backbone.more"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"no whole latent model: it (lacks|has besides) (special|projection|backbone)"):
        LatentForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(RunFolderError, match="no whole latent model"):
        load_saved(tmp_path / "model", torch.float32)


def test_the_model_file_says_how_it_thinks_and_other_sizes_are_refused(tmp_path):
    LatentStudent.of(thinker("gpt2")).save(tmp_path / "model", letters())
    path: Path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    assert (config["num_latents"], config["num_passes"], config["projection_size"]) == (M, 2, 29)
    path.write_text(json.dumps(config | {"projection_size": 31}))
    with pytest.raises((OSError, RuntimeError, ValueError)):
        LatentForCausalLM.from_pretrained(tmp_path / "model")


# -- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraRecipe(r=3, alpha=5)])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize(("num_passes", "inner"), [(0, 13), (1, None), (3, 13)])
def test_thinking_costs_what_the_counter_counts(family, num_passes, inner, lora):
    recipe = LatentRecipe(tokens=3, passes=num_passes, projection_size=inner)
    student = LatentStudent.around(tiny_model(family, attention="eager"), recipe, seed=1, lora=lora)
    questions = Questions.of_ids([[3, 4, 5, 6, 7]] * 4, [[8, 9]] * 4, 0)
    forward, backward = thinking_cost(student.writer, recipe, [(5, 2)] * 4)
    with FlopCounterMode(display=False) as counter:
        thinking = student.think(questions)
    assert counter.get_total_flops() == forward
    loss = thinking.logits_NV.square().sum() + sum(
        kv[:, :, -3:].square().sum() for side in thinking.seen for kv in side
    )
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # the prompt's last layer is no one's but its keys' and values', and nothing learned stands before the first adapter
    assert 0.7 * backward < counter.get_total_flops() <= backward


def test_a_model_with_few_positions_says_how_long_question_and_answer_may_be(tmp_path):
    model = thinker("gpt2")
    limit = model.config.max_position_embeddings
    assert limit == 64 - M - 2 and "max_position_embeddings" not in model.config.to_dict()
    question, answer = [[3] * (limit - 5)], torch.tensor([[4] * 5])
    thoughts = thought(model, question)
    assert model.answer_hidden(thoughts, answer, torch.ones_like(answer)).shape == (1, 6, HIDDEN)
    thoughts = thought(model, [[3, *question[0]]])
    with pytest.raises(IndexError):
        model.answer_hidden(thoughts, answer, torch.ones_like(answer))
    assert MeteredLM(model, letters(), batch_size=2).max_length == limit
    del model.config.backbone["n_positions"]
    assert not hasattr(model.config, "max_position_embeddings")
