"""A whole forward pass with the GPU's kernels, against the same with plain torch and PagedAttention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_checkpoints import llama, qwen3, write
from model_driver import Driver, Sequence, prompt_of

from diptych.config import ServerConfig
from diptych.model.attention_tiles import AttentionTiles
from diptych.model.decoder import Decoder
from diptych.model.fused_decoder import FusedDecoder
from diptych.model.runner import Runner
from diptych.model.triton_attention import TritonAttention
from diptych.types import LogprobSpec

TILES = AttentionTiles(decode_n=32, run_programs=6, run_new=True, prefill_m=64, prefill_n=64, prefill_warps=4)


GPU = torch.cuda.is_available()


def runner_of(folder: Path, *, kernels: bool) -> Runner:
    backend = "triton" if kernels and GPU else "torch"
    config = ServerConfig(
        model_path=str(folder), page_size=16, max_total_tokens=640, dtype="float32", attention_backend=backend
    )
    runner = Runner(config)
    if kernels and not GPU:  # what a GPU's runner has, in the interpreter
        runner.attention = TritonAttention(runner.pool, runner.model.num_heads, runner.model.scale, tiles=TILES)
        assert isinstance(runner.model, Decoder)
        runner.model = FusedDecoder(runner.model)
        runner.pad = int
    return runner


def logprobs(folder: Path, *, kernels: bool) -> tuple[list[list[int]], torch.Tensor]:
    """Three sequences in company: chunks and decode steps, apart and in the same pass. Tokens, and their logprobs."""
    runner = runner_of(folder, kernels=kernels)
    driver = Driver(runner, 16)
    a, b, c = (Sequence(prompt_of(n, n), logprobs=LogprobSpec(prompt_start=0)) for n in (70, 21, 34))
    driver.run([(a, 70), (b, 20)])
    driver.run([(a, 1), (b, 1), (c, 20)])
    driver.run([(b, 1), (c, 14), (a, 1)])
    driver.run([(c, 1), (a, 1), (b, 1)])
    found = [p.logprob for s in (a, b, c) for p in s.output_logprobs + s.prompt_logprobs]
    return [s.outputs for s in (a, b, c)], torch.tensor(found)


@pytest.mark.parametrize("config", [qwen3(), llama(num_attention_heads=6, num_key_value_heads=2)])
def test_the_model_says_the_same(config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, config)  # type: ignore[arg-type]
    expected_tokens, expected = logprobs(tmp_path, kernels=False)
    monkeypatch.setattr("diptych.model.layers.can_pack", lambda weight: False)  # kernels read plain weights
    tokens, found = logprobs(tmp_path, kernels=True)
    assert tokens == expected_tokens
    assert len(found) > 100
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
