"""One rank of a tensor-parallel group, as a process: `python model_ranks.py RANK WORLD STORE FOLDER`.

All ranks build the same plans; rank 0's results are passed to the others, which lets them go on. Rank 0 prints, as
JSON: logits of a prompt, and tokens and logprobs of sequences that ran whole, in chunks, and together.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
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
        if self.runner.rank > 0:
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


def answers(runner: Runner) -> dict[str, object]:
    """What the comparison needs; the same on every rank."""
    shared = SharedRunner(runner)
    driver = Driver(shared, PAGE)  # type: ignore[arg-type]
    with torch.inference_mode():
        logits = runner._logits(runner._features(driver.plan([(Sequence(PROMPT), len(PROMPT))]), range(len(PROMPT))))
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
        "runs": [
            [(seq.outputs, seq.output_logprobs, seq.prompt_logprobs) for seq in run]
            for run in (whole, chunked, together)
        ],
    }


def main() -> None:
    rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    group = parallel.init(rank, world, f"file://{store}")
    config = ServerConfig(model_path=folder, page_size=PAGE, max_total_tokens=1024, tp_size=world)
    found = answers(Runner(config, rank, world, group))
    if rank == 0:
        sys.stdout.write(msgspec.json.encode(found).decode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
