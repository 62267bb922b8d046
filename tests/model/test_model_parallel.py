"""Tensor parallelism with real processes over gloo: close to one process, and exact against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_checkpoints import llama, qwen3, write
from model_ranks import PAGE, answers, run_ranks
from transformers import PreTrainedConfig

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model.layers import vocab_part
from diptych.model.parallel import Parallel
from diptych.model.runner import Runner


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (2, lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
        (4, lambda: qwen3(num_attention_heads=8)),  # two kv heads, each on two ranks
    ],
)
def test_ranks_together_compute_the_model(world: int, config: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    write(tmp_path, config())
    one = answers(Runner(ServerConfig(model_path=str(tmp_path), device="cpu", page_size=PAGE, max_total_tokens=1024)))
    many = run_ranks(tmp_path, world)[0]
    assert (torch.tensor(many["logits"]) - torch.tensor(one["logits"])).abs().max() < 1e-4
    whole, chunked, together = many["runs"]
    assert whole == chunked == together
    assert [run[0] for run in whole] == [run[0] for run in one["runs"][0]]  # type: ignore[index]
    assert (one["heads"], many["heads"]) == (2, 1)


def place(rank: int, world: int) -> Parallel:
    """A place among ranks without the ranks: enough to ask who has what."""
    parallel = Parallel()
    parallel.rank, parallel.world = rank, world
    return parallel


def test_parts_cover_everything_once() -> None:
    assert [place(rank, 4).share(12, "heads") for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [place(rank, 4).share_heads(2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [vocab_part(10, place(rank, 4)) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_what_cannot_be_shared_is_said() -> None:
    with pytest.raises(ConfigError, match="--tp 3 does not divide the model's 8 attention heads"):
        place(0, 3).share(8, "attention heads")
    with pytest.raises(ConfigError, match="--tp 3 is no multiple of the model's 2 key-value heads"):
        place(0, 3).share_heads(2)
    with pytest.raises(ValueError, match="group"):
        Parallel(0, 2, None)
