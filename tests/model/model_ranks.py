"""One rank of several, as a process: `python model_ranks.py RANK TP PP STORE FOLDER`; `run_ranks` starts them all.

All ranks build the same plans; rank 0's results are passed to the others, which lets them go on. Each prints, as JSON:
logits of a prompt (rank 0), and tokens and logprobs of sequences that ran whole, in chunks, and together.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from model_devices import CPU_PROCESS
from model_driver import Driver, Sequence, prompt_of

from diptych.config import ServerConfig
from diptych.model import parallel
from diptych.model.runner import Runner
from diptych.types import LogprobSpec, Plan, Sampling, StepResult

PAGE = 8
NUM_OUTPUTS = 4
PROMPT = prompt_of(45)


@dataclass
class SharedRunner:
    """Gives every rank the results of rank 0."""

    runner: Runner

    @property
    def num_pages(self) -> int:
        return self.runner.num_pages

    def run(self, plan: Plan) -> StepResult:
        result = [self.runner.run(plan)]
        if not self.runner.parallel.leads:
            assert result[0].rows == []
        if dist.is_initialized():
            dist.broadcast_object_list(result, src=0)
        return result[0]


def sequences() -> list[Sequence]:
    spec = LogprobSpec(prompt_start=0, top=2)
    return [
        Sequence(prompt_of(20 + 9 * i, i), Sampling(temperature=0.9 * (i % 2), seed=i), logprobs=spec, rid=str(i))
        for i in range(3)
    ]


def answers(runner: Runner) -> dict[str, Any]:
    """What the comparison needs; the same on every rank."""
    shared = SharedRunner(runner)
    driver = Driver(shared, PAGE)  # type: ignore[arg-type]
    with torch.inference_mode():
        features = runner._features(driver.plan([(Sequence(PROMPT), len(PROMPT))]), range(len(PROMPT)))
        logits = None if features is None else runner._logits(features)
    whole, chunked, together = sequences(), sequences(), sequences()
    for seq in whole:
        driver.generate(seq, NUM_OUTPUTS)
    for seq in chunked:
        driver.generate(seq, NUM_OUTPUTS, chunk=13)
    while rest := [seq for seq in together if len(seq.outputs) < NUM_OUTPUTS]:
        driver.run([(seq, min(21, len(seq.tokens) - seq.num_cached)) for seq in rest])
    return {
        "logits": None if logits is None else logits.tolist(),
        "heads": runner.store.num_heads,
        "layers": runner.store.num_layers,
        "facts": [runner.num_pages, runner.info.fingerprint, runner.info.num_parameters, runner.store.layout],
        "runs": [
            [(seq.outputs, seq.output_logprobs, seq.prompt_logprobs) for seq in run]
            for run in (whole, chunked, together)
        ],
    }


def run_ranks(folder: Path, tp: int, pp: int = 1) -> list[dict[str, Any]]:
    """What each of the `tp` * `pp` ranks found of the model in `folder`."""
    store = folder / f"store-{tp}-{pp}"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (rank, tp, pp, store, folder))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=CPU_PROCESS,
        )
        for rank in range(tp * pp)
    ]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err.decode()[-2000:]
    return [msgspec.json.decode(out) for out, _ in outputs]


def main() -> None:
    rank, tp, pp, store, folder = *map(int, sys.argv[1:4]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    place = parallel.init(rank, tp, pp, f"file://{store}")
    config = ServerConfig(
        model_path=folder, device="cpu", page_size=PAGE, max_total_tokens=1024, tp_size=tp, pp_size=pp
    )
    sys.stdout.write(msgspec.json.encode(answers(Runner(config, place))).decode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
