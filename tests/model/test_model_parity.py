"""Our decoders against transformers on the same device, on random small models, over our pages and in chunks: in
float32, and in bfloat16 by how far both are from float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import llama, qwen3, reference_greedy, reference_logits, write
from model_devices import BACKENDS
from model_driver import GREEDY, Driver, Sequence, prompt_of
from transformers import PreTrainedConfig

from diptych.config import ServerConfig
from diptych.model.runner import Runner
from diptych.types import LogprobSpec, Sampling

PAGE = 16


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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings: a device and its attention."""
    return BACKENDS[request.param]


def start(folder: Path, backend: dict[str, Any], **changes: Any) -> Runner:
    settings = {"page_size": PAGE, "max_total_tokens": 512, "dtype": "float32", **backend, **changes}
    return Runner(ServerConfig(model_path=str(folder), **settings))


def logits_of(runner: Runner, prompt: list[int]) -> torch.Tensor:
    plan = Driver(runner, PAGE).plan([(Sequence(prompt), len(prompt))])
    with torch.inference_mode():
        features = runner._features(plan, range(len(prompt)))
        assert features is not None
        logits = runner._logits(features)
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, backend: dict[str, Any], tmp_path: Path) -> None:
    reference = write(tmp_path, MODELS[name](), seed=len(name)).to(backend["device"])
    runner = start(tmp_path, backend, context_length=144 + 1)
    driver = Driver(runner, PAGE)
    prompt = prompt_of(120)
    assert (logits_of(runner, prompt) - reference_logits(reference, prompt)).abs().max() < 1e-4

    # Past 130 tokens, "dynamic" changes its angles with each token.
    expected = reference_greedy(reference, prompt, 24)
    assert driver.generate(Sequence(prompt), 24) == expected
    assert driver.generate(Sequence(prompt), 24, chunk=17) == expected


def test_a_checkpoint_in_bfloat16_is_computed_in_float32_on_a_cpu(backend: dict[str, Any], tmp_path: Path) -> None:
    """And elsewhere, where it is asked for."""
    reference = write(tmp_path, qwen3())
    reference.bfloat16().save_pretrained(tmp_path)
    reference.float().to(backend["device"])  # bfloat16's values, exactly
    prompt = prompt_of(50)
    on_cpu = backend["device"] == "cpu"
    assert start(tmp_path, backend, dtype="auto").info.kv_dtype == ("float32" if on_cpu else "bfloat16")
    runner = start(tmp_path, backend, dtype="auto" if on_cpu else "float32")
    assert Driver(runner, PAGE).generate(Sequence(prompt), 16) == reference_greedy(reference, prompt, 16)


@pytest.mark.parametrize("config", [qwen3, llama])
def test_bfloat16_is_as_near_to_float32_as_with_transformers(
    config: Callable[[], PreTrainedConfig], backend: dict[str, Any], tmp_path: Path
) -> None:
    """Both round after every product, in other places: the root mean square of one's errors is near the other's."""
    reference = write(tmp_path, config()).bfloat16().to(backend["device"])
    reference.save_pretrained(tmp_path)
    prompt = prompt_of(120)
    theirs = reference_logits(reference, prompt).float()
    exact = reference_logits(reference.float(), prompt)
    ours = logits_of(start(tmp_path, backend, dtype="bfloat16"), prompt).float()
    error, their_error = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert 0 < error < 1.5 * their_error


def test_prompt_logprobs_are_those_of_transformers(backend: dict[str, Any], tmp_path: Path) -> None:
    reference = write(tmp_path, llama()).to(backend["device"])
    runner = start(tmp_path, backend)
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


def test_a_last_token_may_be_sampled_with_penalties_like_transformers(backend: dict[str, Any], tmp_path: Path) -> None:
    reference = write(tmp_path, llama()).to(backend["device"])
    runner = start(tmp_path, backend)
    prompt = prompt_of(40)
    sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
    expected = reference_greedy(reference, prompt, 20, repetition_penalty=1.7)
    ours = Driver(runner, PAGE).generate(Sequence(prompt, sampling), 20)
    assert ours == expected
    assert ours != Driver(runner, PAGE).generate(Sequence(prompt, GREEDY), 20)
