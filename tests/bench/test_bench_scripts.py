"""The parts of benchmarks/ that can be judged without running a benchmark."""

from __future__ import annotations

import argparse
import json
import queue
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import disaggregated
import results
import transformers_side
from programs import Program

from diptych.bench.sample import Sample


class FakeManager:
    """Stands in for transformers' ContinuousBatchingManager: finishes requests in the order they came."""

    def __init__(self) -> None:
        self.outputs: queue.Queue[Any] = queue.Queue()
        self.running = self.peak = 0

    def add_request(self, prompt: list[int], *, request_id: str, max_new_tokens: int, record_timestamps: bool) -> None:
        assert record_timestamps
        self.running += 1
        self.peak = max(self.peak, self.running)
        tokens = [prompt[0]] * max_new_tokens
        times = [1e9 + i for i in range(max_new_tokens)]
        done = {"request_id": request_id, "error": None, "timestamps": times, "prompt_ids": prompt}
        self.outputs.put(SimpleNamespace(**done, generated_tokens=tokens))

    def get_result(self, timeout: float) -> Any:
        self.running -= 1
        return self.outputs.get_nowait()


def test_the_other_side_keeps_its_number_and_the_order_of_the_prompts() -> None:
    manager = FakeManager()
    prompts = [[i, i] for i in range(7)]
    samples = transformers_side.closed_loop(manager, prompts, [2, 3, 2, 3, 2, 3, 2], 3)
    assert manager.peak == 3
    assert [sample["output_ids"] for sample in samples] == [[i] * n for i, n in enumerate([2, 3, 2, 3, 2, 3, 2])]
    assert samples[1]["itls_s"] == [1.0, 1.0]
    assert {sample["prompt_tokens"] for sample in samples} == {2}


def test_only_latencies_beside_a_long_prompt_count() -> None:
    stream = Sample(start_s=10.0, latency_s=5.0, ttft_s=1.0, itls_s=[1.0, 1.0, 1.0, 0.5], output_tokens=5)
    # tokens at 11, 12, 13, 14, 14.5
    assert disaggregated.itls_within([stream], [(12.5, 13.5)]) == [1.0, 1.0]
    assert disaggregated.itls_within([stream], [(0.0, 11.0)]) == []
    assert disaggregated.itls_within([stream], [(14.2, 14.3), (14.3, 99.0)]) == [0.5]


def test_results_carry_the_machine_and_no_paths(tmp_path: Path) -> None:
    args = argparse.Namespace(model="/somewhere/models/demo", output="/somewhere/out.json", rounds=3)
    path = results.write("x", {"settings": results.settings(args, threads=2)}, str(tmp_path / "x.json"))
    found = json.loads(path.read_text())
    assert found["settings"] == {"rounds": 3, "model": "demo", "threads": 2}
    assert found["machine"]["cores"] > 0
    assert "somewhere" not in path.read_text()
    assert results.path_of("x").parent == results.FOLDER
    assert results.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_program_that_does_not_start_says_why() -> None:
    program = Program("serve", "--no-such-flag")
    with pytest.raises(RuntimeError, match="unknown flag --no-such-flag"):
        _ = program.url
    program.stop()
