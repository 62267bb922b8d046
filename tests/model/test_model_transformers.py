"""`--model-impl transformers`: other architectures on our pages, against the library's own generate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_checkpoints import llama, qwen3, reference_greedy, reference_logits, write
from model_devices import BACKENDS
from model_driver import GREEDY, VOCAB, Driver, Sequence, prompt_of
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
)

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model import transformers_impl
from diptych.model.paged_attention import PagedAttention
from diptych.model.parallel import Parallel
from diptych.model.pool import KVPool
from diptych.model.runner import Runner
from diptych.model.selftest import plan_of_one
from diptych.model.triton_attention import TritonAttention
from diptych.types import LogprobSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
NUM_OUTPUTS = 10

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,  # heads of 16: the GPU's kernels take them
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 7,
}
FOREIGN: dict[str, Callable[[], PreTrainedConfig]] = {
    "GPTNeoX": lambda: GPTNeoXConfig(**SHAPE),
    "Mistral, sliding window": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=20),
    "Gemma2, soft caps and alternating windows": lambda: Gemma2Config(
        **SHAPE,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        query_pre_attn_scalar=30,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=9.0,
    ),
    "Phi, part of the head rotated": lambda: PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "GPT2, learned positions": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, bos_token_id=None
    ),
}


def start(folder: Path, **changes: Any) -> Runner:
    settings = {"device": "cpu", "page_size": PAGE, "max_total_tokens": 2048, **changes}
    return Runner(ServerConfig(model_path=str(folder), **settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_other_architectures_answer_as_the_library_does(name: str, backend: str, tmp_path: Path) -> None:
    reference = write(tmp_path, FOREIGN[name](), seed=2).to(BACKENDS[backend]["device"])
    runner = start(tmp_path, dtype="float32", **BACKENDS[backend])
    assert runner.exact or runner.device != "cpu"
    assert runner.info.context_len == 256
    assert runner.info.num_parameters == sum(p.numel() for p in reference.parameters())
    prompt = prompt_of(50, 3)
    driver = Driver(runner, PAGE)
    with torch.inference_mode():
        ours = runner._logits(runner._features(driver.plan([(Sequence(prompt), 50)]), range(50)))
    assert ours is not None
    assert (ours - reference_logits(reference, prompt)).abs().max() < 1e-4
    expected = reference_greedy(reference, prompt, NUM_OUTPUTS)

    seqs = [Sequence(prompt_of(9, 1)), Sequence(prompt), Sequence(prompt_of(30, 2))]
    for chunk in (16, 16, 18):
        driver.run([(seqs[1], chunk)])
    driver.run([(seqs[0], 9), (seqs[2], 30)])
    while len(seqs[1].outputs) < NUM_OUTPUTS:
        driver.run([(seq, 1) for seq in seqs])
    assert seqs[1].outputs == expected


def test_company_and_chunks_do_not_show_here_either(tmp_path: Path) -> None:
    write(tmp_path, FOREIGN["Gemma2, soft caps and alternating windows"]())
    runner = start(tmp_path)
    spec = LogprobSpec(prompt_start=0, top=2)
    seqs = [[Sequence(prompt_of(40 + i, i), GREEDY, logprobs=spec) for i in range(3)] for _ in range(2)]
    driver = Driver(runner, PAGE)
    for seq in seqs[0]:
        driver.generate(seq, 4)
    while rest := [seq for seq in seqs[1] if len(seq.outputs) < 4]:
        driver.run([(seq, min(13, len(seq.tokens) - seq.num_cached)) for seq in rest])
    for one, other in zip(*seqs, strict=True):
        assert one.outputs == other.outputs
        assert one.output_logprobs == other.output_logprobs
        assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.parametrize("backend", BACKENDS)
def test_our_own_architectures_run_there_too_and_agree(backend: str, tmp_path: Path) -> None:
    write(tmp_path, qwen3())
    prompt = prompt_of(40)
    there, here = (start(tmp_path, model_impl=impl, **BACKENDS[backend]) for impl in ("transformers", "diptych"))
    assert there.info.num_kv_heads == here.info.num_kv_heads
    assert there.store.layout == here.store.layout
    outputs = [Driver(runner, PAGE).generate(Sequence(prompt), NUM_OUTPUTS) for runner in (there, here)]
    assert outputs[0] == outputs[1]


def test_dummy_weights_there(tmp_path: Path) -> None:
    FOREIGN["GPTNeoX"]().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": ["GPTNeoXForCausalLM"]}))
    first, second = start(tmp_path, load_format="dummy"), start(tmp_path, load_format="dummy")
    assert first.info.fingerprint == second.info.fingerprint
    answers = [Driver(runner, PAGE).generate(Sequence(prompt_of(9)), 4) for runner in (first, second)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            lambda: MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2),
            {},
            "does not say how long|layers keep",
        ),
        (lambda: llama(), {"model_impl": "transformers", "tp_size": 2}, "--tp 1"),
        (lambda: llama(), {"model_impl": "transformers", "pp_size": 2}, "--pp-size 1"),
        (lambda: llama(), {"pp_size": 4}, "--pp-size 4 is more than the model's 2 layers"),
        (lambda: GPTNeoXConfig(**SHAPE), {"model_impl": "diptych"}, "GPTNeoXForCausalLM is not one of our own models"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            {"model_impl": "transformers", "context_length": 513},
            "--context-length 513",
        ),
    ],
)
def test_what_cannot_run_is_said(
    config: Callable[[], PreTrainedConfig], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, config())
    with pytest.raises(ConfigError, match=message):
        start_ranks(tmp_path, **settings)


def start_ranks(folder: Path, **settings: Any) -> None:
    config = ServerConfig(model_path=str(folder), device="cpu", page_size=PAGE, **settings)
    group: Any = object() if config.tp_size > 1 else None  # never used: what is refused is refused before
    Runner(config, Parallel(0, config.tp_size, group, 0, config.pp_size))


def test_checkpoint_files_other_than_safetensors_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, FOREIGN["GPTNeoX"]())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        start(tmp_path)


def test_without_the_library_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, FOREIGN["GPTNeoX"]())
    monkeypatch.delitem(sys.modules, "diptych.model.transformers_impl", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"GPTNeoXForCausalLM needs the transformers library.*pip install"):
        start(tmp_path)


def test_a_mixture_of_experts_runs(tmp_path: Path) -> None:
    reference = write(tmp_path, MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4))
    prompt = prompt_of(30)
    assert Driver(start(tmp_path), PAGE).generate(Sequence(prompt), 6) == reference_greedy(reference, prompt, 6)


@pytest.mark.parametrize("backend", [PagedAttention, TritonAttention])
def test_attention_takes_heads_whose_tokens_lie_together(backend: type) -> None:
    """As a partly rotated head comes: a copy of its parts, by head."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 8, 16, generator=generator) for heads in (4, 2, 2))
    attention = backend(KVPool(1, 8, 2, 1, 16, torch.float32, DEVICE), 4, 1.0)
    attention.begin(plan_of_one(0, 8, 1))
    token = transformers_impl._backend.set(attention)
    try:
        out, _ = transformers_impl.attend(
            SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
            *(part.to(DEVICE) for part in (q, k, v)),
            None,
        )
    finally:
        transformers_impl._backend.reset(token)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)
