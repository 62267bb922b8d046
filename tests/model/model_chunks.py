"""One of two stages, as a process: `python model_chunks.py STAGE STORE FOLDER`.

Runs two chunks of a prompt, of which the second one samples, and says when it is done with the first one, and what the
second one sampled. The second stage takes what the first hands on, but computes nothing before it is told to go on.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from model_driver import Driver, Sequence, prompt_of
from torch import Tensor

from diptych.config import ServerConfig
from diptych.model import parallel
from diptych.model.paged_attention import PagedAttention
from diptych.model.runner import Runner

PAGE = 8


class Held(PagedAttention):
    """Waits for a line on standard input before it computes for the first time."""

    told = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        if not self.told:
            self.told = bool(sys.stdin.readline())
        return super().attend(layer, q, k, v, window, softcap)


def main() -> None:
    stage = int(sys.argv[1])
    torch.set_num_threads(1)
    place = parallel.init(stage, 1, 2, f"file://{sys.argv[2]}")
    config = ServerConfig(model_path=sys.argv[3], device="cpu", page_size=PAGE, max_total_tokens=512, pp_size=2)
    runner = Runner(config, place)
    if stage == 1:
        runner.attention = Held(runner.pool, runner.model.num_heads, runner.model.scale)
    driver = Driver(runner, PAGE)
    seq = Sequence(prompt_of(40))
    runner.run(driver.plan([(seq, 24)]))
    print("done with a chunk", flush=True)
    seq.num_cached = 24
    print([row.token for row in runner.run(driver.plan([(seq, 16)])).rows], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
