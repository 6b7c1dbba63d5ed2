"""Greedy generation: what the model itself finds likeliest, whatever its publisher suggests for sampling."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model

from kvdistill.models.generate import Rows, generate_greedy

EOS, PAD = 36, 0


class Letters:
    """A tokenizer whose tokens are numbers."""

    eos_token_id, pad_token_id = EOS, PAD

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(ids, skip_special_tokens=False) for ids in rows]


def slow_greedy(model, prompt: list[int], most: int) -> list[int]:
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == EOS:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_publishers_penalty_is_not_applied_and_stays_the_models_own(wrapped: bool) -> None:
    model = tiny_model("qwen2")
    suggested = model.generation_config
    suggested.repetition_penalty, suggested.do_sample, suggested.temperature = 5.0, True, 0.1
    prompts = [[3, 5, 8], [1, 2, 3, 4, 5, 6, 7], [VOCAB - 2]]
    expected = [slow_greedy(model, prompt, 9) for prompt in prompts]
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if wrapped else model
    answers = generate_greedy(asked, prompts, Letters(), max_new_tokens=9, rows=Rows(2))
    assert [one.ids for one in answers] == expected
    assert [one.forward_passes for one in answers] == [min(9, len(ids) + 1) for ids in expected]
    assert model.generation_config is suggested and asked.generation_config.repetition_penalty == 5.0
