"""One rank of several, as a process (see model_oneshot): products of many rows, summed and normed by shares."""

from __future__ import annotations

import ctypes
import random
import sys
import time
from pathlib import Path

import torch
from model_oneshot import run_ranks, shared_memories
from torch import Tensor

from diptych.model import row_shares
from diptych.model.kernels import two_shot
from diptych.model.kernels.fused import add_norm
from diptych.model.row_shares import Arriving, RowShares

MOST, WIDTH, EPS, CALLS = 20, 96, 1e-6, 10
DTYPE = torch.float16  # the interpreter cuts bfloat16 off, it does not round
row_shares.TILE, two_shot.PROGRAMS = 2, 4


class HostCopies:
    """Copies at once; the number is written after the copy, and no processor of x86 sees them the other way round."""

    def send(self, source: Tensor, to: int, flag: int, number: int) -> None:
        assert source.is_contiguous()
        ctypes.memmove(to, source.data_ptr(), source.nbytes)
        ctypes.c_int32.from_address(flag).value = number


def run(folder: Path, world: int) -> list[str]:
    """What each rank printed: the calls that went wrong."""
    return run_ranks(folder, world, __file__, RowShares.num_bytes(world, MOST, WIDTH, DTYPE.itemsize))


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    memories = shared_memories(folder, world)
    addresses = [memory.ctypes.data for memory in memories]
    shares = RowShares(rank, addresses, torch.from_numpy(memories[rank]), MOST, WIDTH, DTYPE, HostCopies())
    shares._call = (1 << 31) - CALLS // 4  # the numbers wrap around in between
    shares._two_shot._calls.fill_((1 << 31) - 3)
    pauses = random.Random(rank)
    found = []
    for call in range(CALLS):
        if wrong(shares, call, pauses):
            found.append(call)
    print(found)


def wrong(shares: RowShares, call: int, pauses: random.Random) -> bool:
    """The ranks drift apart; their results must not."""
    generator, rows = torch.Generator().manual_seed(call), random.Random(call).randint(4 * shares.world, MOST)
    parts = [torch.randn(rows, WIDTH, generator=generator).to(DTYPE) for _ in range(shares.world)]
    x, weight = torch.randn(rows, WIDTH, generator=generator).to(DTYPE), torch.arange(WIDTH).to(DTYPE)
    total = torch.zeros(rows, WIDTH)
    for part in parts:
        total += part.float()
    residual = x.clone()
    normed = add_norm(residual, total.to(DTYPE), weight, EPS)

    def product(start: int, stop: int, out: Tensor) -> None:
        time.sleep(pauses.choice([0, 0, 0.01]))
        out.copy_(parts[shares.rank][start:stop])

    if call % 3 == 1:
        arriving = Arriving(shares.product_add_norm(x, product, weight, EPS), (0, rows), lambda: None)
    else:
        arriving = shares.product_add_norm_hidden(x, product, weight, EPS)
    found, times_read = torch.empty_like(normed), torch.zeros(rows)
    for start, stop in arriving.pieces(pauses.choice([None, 1, arriving.num_own])):
        time.sleep(pauses.choice([0, 0, 0.01]))
        found[start:stop] = arriving.rows[start:stop]
        times_read[start:stop] += 1
    start, stop = shares.share(shares.rank, rows)
    right = torch.equal(found, normed) and torch.equal(x[start:stop], residual[start:stop])
    return not (right and bool((times_read == 1).all()))


if __name__ == "__main__":
    main()
