"""One rank of two, a process: `python model_split_ranks.py RANK WORLD FOLDER`; `run` starts both (see model_oneshot).

Both have what ranks on GPUs have, in the interpreter of Triton, and each runs the same steps three times: without large
sums by shares of rows, with them, and with hidden ones. Each prints whether that made no difference, and how many sums
were so.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from model_driver import Driver, Sequence, prompt_of
from model_oneshot import run_ranks, shared_memories
from model_ranks import SharedRunner
from model_row_shares import HostCopies
from torch import Tensor

from diptych.config import ServerConfig
from diptych.model import fused_decoder, layers, parallel, row_shares
from diptych.model.attention_tiles import AttentionTiles
from diptych.model.decoder import Decoder
from diptych.model.fused_decoder import FusedDecoder
from diptych.model.kernels.allreduce import whole
from diptych.model.kernels.fused import add_norm
from diptych.model.parallel import HostGroup, Parallel
from diptych.model.row_shares import Arriving, RowShares
from diptych.model.runner import Runner
from diptych.model.triton_attention import TritonAttention
from diptych.types import LogprobSpec

MOST, WIDTH, DTYPE = 32, 48, torch.float32
TILES = AttentionTiles(decode_n=32, run_programs=6, run_new=True, prefill_m=64, prefill_n=64, prefill_warps=4)
row_shares.TILE, row_shares.LEAST_BYTES = 4, 15 * WIDTH * DTYPE.itemsize
layers.can_pack = lambda weight: False  # kernels read plain weights


def run(folder: Path) -> list[str]:
    return run_ranks(folder, 2, __file__, RowShares.num_bytes(2, MOST, WIDTH, DTYPE.itemsize))


class Counted(RowShares):
    whole = hidden = 0

    def product_add_norm(self, x: Tensor, *rest: object) -> Tensor:
        self.whole += 1
        return super().product_add_norm(x, *rest)  # type: ignore[arg-type]

    def product_add_norm_hidden(self, x: Tensor, *rest: object) -> Arriving:
        self.hidden += 1
        return super().product_add_norm_hidden(x, *rest)  # type: ignore[arg-type]


@dataclasses.dataclass
class Group:
    """DeviceGroup, whose exchanges go over gloo."""

    host: HostGroup
    row_shares: Counted | None

    def sum(self, x: Tensor) -> Tensor:
        return self.host.sum(x)

    def sum_add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_norm(x, self.sum(whole(delta, x.dtype)), weight, eps)

    def join(self, x: Tensor) -> Tensor | None:
        return self.host.join(x)


def logprobs(place: Parallel, folder: Path) -> Tensor:
    """Of tokens of sequences, in steps with more and fewer rows than go by shares; all of rank 0's results."""
    config = ServerConfig(
        model_path=str(folder / "model"), page_size=16, max_total_tokens=320, dtype="float32", tp_size=2,
        attention_backend="torch",
    )  # fmt: skip
    runner = Runner(config, place)
    assert isinstance(runner.model, Decoder)
    runner.attention = TritonAttention(runner.pool, runner.model.num_heads, runner.model.scale, tiles=TILES)
    runner.model = FusedDecoder(runner.model, fixed=True)
    runner.pad = int
    driver = Driver(SharedRunner(runner), 16)  # type: ignore[arg-type]
    a, b = (Sequence(prompt_of(n, n), logprobs=LogprobSpec(prompt_start=0)) for n in (23, 19))
    c = Sequence(prompt_of(34), logprobs=LogprobSpec())
    driver.run([(a, 23)])  # all rows are wanted: also the last layer has many
    driver.run([(a, 1), (b, 18)])
    driver.run([(a, 1), (b, 1)])
    driver.run([(c, 17)])  # nothing is wanted of the last layer
    driver.run([(c, 17)])  # one row is
    return torch.tensor([p.logprob for s in (a, b, c) for p in s.output_logprobs + s.prompt_logprobs])


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    memories = shared_memories(folder, world)
    place = parallel.init(rank, world, 1, f"file://{folder}/store")
    assert isinstance(place.group, HostGroup)
    addresses = [memory.ctypes.data for memory in memories]
    shares = Counted(rank, addresses, torch.from_numpy(memories[rank]), MOST, WIDTH, DTYPE, HostCopies())
    found = []
    for by, fused_decoder.HIDING in ((None, 0), (shares, 1 << 60), (shares, 0)):
        found.append(logprobs(Parallel(rank, world, Group(place.group, by), 0, 1), folder))  # type: ignore[arg-type]
    print([torch.equal(found[0], other) for other in found[1:]], len(found[0]), shares.whole, shares.hidden)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
