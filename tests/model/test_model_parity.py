"""Our decoders against transformers, in float32 on random small models, over our pages and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import llama, qwen3, reference_greedy, reference_logits, write
from model_driver import GREEDY, Driver, Sequence, prompt_of
from transformers import PreTrainedConfig

from diptych.config import ServerConfig
from diptych.model.runner import Runner
from diptych.types import LogprobSpec, Sampling

PAGE = 8


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3 grouped untied": lambda: qwen3(),
    "qwen3 tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3 one kv head, biases": lambda: qwen3(num_key_value_heads=1, attention_bias=True),
    "qwen3 ungrouped": lambda: qwen3(num_key_value_heads=4),
    "llama grouped": lambda: llama(),
    "llama tied, all biases": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama groups of three": lambda: llama(num_attention_heads=6, num_key_value_heads=2),
    "linear": lambda: llama(**rope("linear", factor=4.0)),
    "dynamic": lambda: llama(**rope("dynamic", factor=2.0), max_position_embeddings=130),
    "llama3": lambda: llama(
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    ),
    "yarn": lambda: qwen3(**rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn, own attention factor": lambda: qwen3(
        **rope("yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=0.8, beta_fast=16.0)
    ),
    "yarn, mscale": lambda: llama(
        **rope("yarn", factor=40.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.0)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = write(tmp_path, MODELS[name](), seed=len(name))
    config = ServerConfig(model_path=str(tmp_path), page_size=PAGE, max_total_tokens=512, context_length=144 + 1)
    runner = Runner(config)
    driver = Driver(runner, PAGE)
    prompt = prompt_of(120)

    seq = Sequence(prompt)
    with torch.inference_mode():
        ours = runner._logits(runner._features(driver.plan([(seq, len(prompt))]), range(len(prompt))))
    assert ours is not None
    assert (ours - reference_logits(reference, prompt)).abs().max() < 1e-4

    # Past 130 tokens, "dynamic" changes its angles with each token.
    expected = reference_greedy(reference, prompt, 24)
    assert driver.generate(Sequence(prompt), 24) == expected
    assert driver.generate(Sequence(prompt), 24, chunk=17) == expected


def test_a_checkpoint_in_bfloat16_is_computed_in_float32(tmp_path: Path) -> None:
    reference = write(tmp_path, qwen3())
    reference.bfloat16().save_pretrained(tmp_path)
    reference.float()  # bfloat16's values, exactly
    prompt = prompt_of(50)
    runner = Runner(ServerConfig(model_path=str(tmp_path), page_size=PAGE, max_total_tokens=256))
    assert runner.info.kv_dtype == "float32"
    assert Driver(runner, PAGE).generate(Sequence(prompt), 16) == reference_greedy(reference, prompt, 16)


def test_prompt_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    reference = write(tmp_path, llama())
    runner = Runner(ServerConfig(model_path=str(tmp_path), page_size=PAGE, max_total_tokens=512))
    prompt = prompt_of(70)
    spec = LogprobSpec(prompt_start=0, top=4, token_ids=(3, 200))
    seq = Sequence(prompt, logprobs=spec)
    Driver(runner, PAGE).generate(seq, 1, chunk=32)
    table = torch.log_softmax(reference_logits(reference, prompt), -1)
    assert [entry.token for entry in seq.prompt_logprobs] == prompt[1:]
    for row, entry in zip(table, seq.prompt_logprobs, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        best = row.topk(4)
        assert [token for _, token in entry.top] == best.indices.tolist()
        assert [value for value, _ in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [token for _, token in entry.chosen] == [3, 200]
        assert [value for value, _ in entry.chosen] == pytest.approx(row[[3, 200]].tolist(), abs=1e-4)
    assert seq.output_logprobs[0].logprob == pytest.approx(table[-1].max().item(), abs=1e-4)


def test_a_last_token_may_be_sampled_with_penalties_like_transformers(tmp_path: Path) -> None:
    reference = write(tmp_path, llama())
    runner = Runner(ServerConfig(model_path=str(tmp_path), page_size=PAGE, max_total_tokens=512))
    prompt = prompt_of(40)
    sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
    inputs = torch.tensor([prompt])
    expected = reference.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=1.7,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 40:].tolist()
    ours = Driver(runner, PAGE).generate(Sequence(prompt, sampling), 20)
    assert ours == expected
    assert ours != Driver(runner, PAGE).generate(Sequence(prompt, GREEDY), 20)
