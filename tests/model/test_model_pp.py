"""Stages with real processes over gloo: to the last bit what one stage of as many ranks computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from model_checkpoints import llama, qwen3, write
from model_devices import CPU_PROCESS
from model_driver import Driver, Sequence, prompt_of
from model_ranks import PAGE, answers, run_ranks
from transformers import PreTrainedConfig

from diptych.config import ServerConfig
from diptych.model import memory
from diptych.model.parallel import Parallel
from diptych.model.runner import Runner


@pytest.mark.parametrize(
    ("pp", "config"),
    [
        (2, lambda: qwen3(num_hidden_layers=3, tie_word_embeddings=True)),
        (3, lambda: llama(num_hidden_layers=3, attention_bias=True, mlp_bias=True)),
    ],
)
def test_stages_compute_what_one_process_does(pp: int, config: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    write(tmp_path, config())
    one = answers(Runner(ServerConfig(model_path=str(tmp_path), device="cpu", page_size=PAGE, max_total_tokens=1024)))
    check(run_ranks(tmp_path, 1, pp), msgspec.json.decode(msgspec.json.encode(one)), [2, 1] if pp == 2 else [1, 1, 1])


def test_stages_of_two_ranks_compute_what_one_stage_of_two_does(tmp_path: Path) -> None:
    write(tmp_path, qwen3(num_hidden_layers=3))
    one, _ = run_ranks(tmp_path, 2)
    check(run_ranks(tmp_path, 2, 2), one, [2, 2, 1, 1])


def check(ranks: list[dict[str, Any]], expected: dict[str, Any], layers: list[int]) -> None:
    """Rank 0 finds the same logits, tokens and logprobs; all agree on what is to be agreed on."""
    assert ranks[0]["logits"] == expected["logits"]
    assert ranks[0]["runs"] == expected["runs"]
    assert [rank["layers"] for rank in ranks] == layers
    assert all(rank["facts"] == expected["facts"] for rank in ranks)
    assert all(rank["logits"] is None for rank in ranks[1:])


def test_a_stage_is_done_with_a_chunk_when_it_has_handed_it_on(tmp_path: Path) -> None:
    """The second stage has not begun to compute when the first one returns: it may begin the next chunk."""
    write(tmp_path, qwen3())
    one = Runner(ServerConfig(model_path=str(tmp_path), device="cpu", page_size=PAGE, max_total_tokens=512))
    expected = Driver(one, PAGE).generate(Sequence(prompt_of(40)), 1)
    command = [sys.executable, str(Path(__file__).with_name("model_chunks.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": CPU_PROCESS}
    first, second = (
        subprocess.Popen([*command, str(stage), str(tmp_path / "store"), str(tmp_path)], **pipes) for stage in range(2)
    )
    with first, second:
        try:
            assert first.stdout.readline() == "done with a chunk\n"
            assert second.poll() is None
            second.stdin.write("go on\n")
            second.stdin.flush()
            assert second.stdout.readline() == "done with a chunk\n"
            assert first.stdout.readline() == f"{expected}\n"
            assert second.stdout.readline() == "[]\n"
            assert (first.wait(60), second.wait(60)) == (0, 0)
        finally:
            first.kill()
            second.kill()


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_stages_agree_on_the_model(load_format: str, tmp_path: Path) -> None:
    """Each reads its own tensors and has looked at the names and shapes of all."""
    write(tmp_path, qwen3(num_hidden_layers=3))
    config = ServerConfig(
        model_path=str(tmp_path), device="cpu", page_size=PAGE, load_format=load_format, max_total_tokens=64
    )
    one, first, second = (Runner(config, Parallel(0, 1, None, *place)).info for place in ((0, 1), (0, 2), (1, 2)))
    assert one == first == second


def test_all_stages_have_as_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page numbers are rank 0's; the first stage has the most layers, so the others have memory to spare."""
    write(tmp_path, qwen3(num_hidden_layers=3))
    page_bytes = memory.kv_page_bytes(2, 2, 16, PAGE, 4)
    monkeypatch.setattr(memory, "DEFAULT_POOL_BYTES", 100 * page_bytes)
    config = ServerConfig(model_path=str(tmp_path), device="cpu", page_size=PAGE, pp_size=2)
    stages = [Runner(config, Parallel(stage=stage, stages=2)) for stage in range(2)]
    assert [(runner.num_pages, runner.store.num_layers) for runner in stages] == [(100, 2), (100, 1)]
