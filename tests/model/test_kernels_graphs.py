"""What a CUDA graph would hold, run in Triton's interpreter, against steps that are no graph's. What only a GPU can
show, capture and replay, is in test_gpu_runner.py."""

from __future__ import annotations

from collections.abc import Sequence as Places
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from model_checkpoints import llama, qwen3, write
from model_driver import Driver, Sequence, prompt_of
from model_mixes import run_mixes, run_overlapped

from diptych.config import ServerConfig
from diptych.model.attention_tiles import FIXED_TILES, AttentionTiles
from diptych.model.decoder import Decoder
from diptych.model.fused_decoder import FusedDecoder
from diptych.model.graphs import LAYER_OPERATIONS, MIXED_TOKENS, Captured, Shape, StepGraphs, batch_sizes, shapes_of
from diptych.model.runner import Runner
from diptych.model.triton_attention import TritonAttention
from diptych.types import LogprobSpec, Plan

TILES = AttentionTiles(decode_n=32, run_programs=6, prefill_m=32, prefill_n=32, prefill_warps=4)
LENGTHS = (20, 6, 11)
STEPS = 8

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # what padding holds is any number
]


class Uncaptured(StepGraphs):
    """Computes what a graph would hold, at its sizes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken: list[Shape | None] = []

    def launch(self, plan: Plan, wanted: Places[int]) -> Captured | None:
        shape = self.begin(plan, wanted)
        self.taken.append(shape)
        if shape is None:
            return None
        logits, greedy = self.step(shape)
        assert logits is not None
        assert greedy is not None
        return Captured(cast(Any, None), logits[: len(wanted)], greedy[: len(wanted)])


def runner_of(folder: Path, *, fixed: bool = False, graphs: bool = True) -> Runner:
    """With the kernels of a GPU's runner."""
    runner = Runner(ServerConfig(model_path=str(folder), page_size=16, max_total_tokens=640, dtype="float32"))
    assert isinstance(runner.model, Decoder)
    tiles = FIXED_TILES if fixed else TILES
    runner.attention = TritonAttention(
        runner.pool, runner.model.num_heads, runner.model.scale, fixed=fixed, tiles=tiles
    )
    runner.model = FusedDecoder(runner.model, fixed=fixed)
    runner.pad = int
    if graphs:
        runner._graphs = Uncaptured(runner.model, runner.attention, runner._last, 8, 10, 640)
    return runner


@pytest.mark.parametrize(
    ("config", "fixed", "overlapped"), [(qwen3(), False, True), (qwen3(), True, True), (llama(), False, False)]
)
def test_a_captured_step_is_an_eager_one(
    config: Any, fixed: bool, overlapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of prompts that sample or do not, beside rows that decode; the same bits where they are promised."""
    monkeypatch.setattr("diptych.model.layers.can_pack", lambda weight: False)  # kernels read plain weights
    write(tmp_path, config)
    runner = runner_of(tmp_path, fixed=fixed)
    plain, ours = ([Sequence(prompt_of(n, n), logprobs=LogprobSpec(top=2)) for n in LENGTHS] for _ in range(2))
    run_mixes(runner_of(tmp_path, fixed=fixed, graphs=False), plain, 3, STEPS, chunk=12)
    (run_overlapped if overlapped else run_mixes)(runner, ours, 3, STEPS, chunk=12)
    assert [seq.outputs for seq in ours] == [seq.outputs for seq in plain]
    found, expected = (
        torch.tensor([item.logprob for seq in seqs for item in seq.output_logprobs]) for seqs in (ours, plain)
    )
    assert len(found) > STEPS
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if fixed else 2e-5)
    taken = cast(Uncaptured, runner._graphs).taken
    assert None not in taken
    assert len({shape.tokens for shape in taken if not shape.decode}) > 1


def test_what_no_graph_holds_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.model.layers.can_pack", lambda weight: False)
    write(tmp_path, qwen3())
    runner = runner_of(tmp_path)
    taken = cast(Uncaptured, runner._graphs)
    asks = Sequence(prompt_of(20), logprobs=LogprobSpec(prompt_start=0))
    driver = Driver(runner, 16)
    driver.run([(asks, 20)])  # logprobs of a prompt's tokens
    assert not taken.taken
    assert len(asks.prompt_logprobs) == 19
    driver.run([(Sequence(prompt_of(5)), 2) for _ in range(9)])
    assert taken.taken == [None]  # more than 8 rows
    driver.run([(Sequence(prompt_of(180)), 180)])
    assert taken.taken == [None, None]  # more pages than there is memory for


def test_sizes_of_decode_steps() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(200) == [1, 2, 4, *range(8, 65, 8), 96, 112, 128, 160, 192, 200]


def test_shapes() -> None:
    small = shapes_of(64, 1 << 20)
    assert [shape.rows for shape in small if shape.decode] == batch_sizes(64)
    assert [shape for shape in small if not shape.decode] == [Shape(n, min(n, 64), False) for n in MIXED_TOKENS]
    of_32b = [shape.tokens for shape in shapes_of(64, 974_000_000) if not shape.decode]
    assert of_32b == [16, 32, 64, 128, 192]
    assert LAYER_OPERATIONS > 193 * 974_000_000
