"""One rank of several, as a process: `python model_oneshot.py RANK WORLD FOLDER`; `run_ranks` starts them all, in
Triton's interpreter.

The ranks have one another's memory through files, and make the same calls, some after a pause of their own. Each prints
which of its results were not, bit for bit, the sum in rank order.
"""

from __future__ import annotations

import mmap
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from model_devices import CPU_PROCESS
from torch import Tensor

from diptych.model.kernels import allreduce
from diptych.model.kernels.allreduce import OneShot
from diptych.model.kernels.fused import add_norm

LIMIT = 1 << 15  # bytes
CALLS = 16
WIDTH, EPS = 96, 1e-6


def run_ranks(folder: Path, world: int, script: str = __file__, num_bytes: int = 0) -> list[str]:
    """What each rank printed: the calls that went wrong. `num_bytes` a rank has; 0: what OneShot needs."""
    for rank in range(world):
        (folder / str(rank)).write_bytes(bytes(num_bytes or OneShot.num_bytes(world, LIMIT)))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=CPU_PROCESS,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err[-2000:]
    return [out for out, _ in outputs]


def shared_memories(folder: Path, world: int) -> list[np.ndarray]:
    """Every rank's, as bytes."""
    files = [(folder / str(peer)).open("r+b") for peer in range(world)]
    return [np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8) for file in files]


def parts_of(call: int, world: int) -> tuple[list[Tensor], int]:
    """Every rank's part of a call, `[rows, WIDTH]` or unreduced `[splits, rows, WIDTH]`, and how it is summed."""
    generator = torch.Generator().manual_seed(call)
    rows, kind = random.Random(call).choice([1, 2, 5, 60]), call % 4
    dtype = torch.float32 if kind >= 2 else torch.float16  # the interpreter cuts bfloat16 off, it does not round
    shape = (2, rows, WIDTH) if kind == 3 else (rows, WIDTH)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(world)], kind


def wrong(one_shot: OneShot, call: int) -> bool:
    parts, kind = parts_of(call, one_shot.world)
    dtype = torch.float32 if kind == 2 else torch.float16
    whole = [(part[0] + part[1]).to(dtype) if part.ndim == 3 else part for part in parts]
    expected = whole[0].float().clone()
    for part in whole[1:]:
        expected += part.float()
    expected = expected.to(dtype)
    mine = parts[one_shot.rank].clone()
    assert one_shot.takes(expected)
    if kind != 3:
        return not torch.equal(one_shot.sum(mine), expected)
    x, weight = torch.ones(len(expected), WIDTH, dtype=dtype), torch.arange(WIDTH).to(dtype)
    residual = x.clone()
    found = one_shot.sum_add_norm(x, mine, weight, EPS)
    normed = add_norm(residual, expected, weight, EPS)
    return not (torch.equal(found, normed) and torch.equal(x, residual))


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    allreduce.PROGRAMS = 4  # so few that they take turns
    memories = shared_memories(folder, world)
    one_shot = OneShot(rank, [memory.ctypes.data for memory in memories], LIMIT, "cpu")
    pauses = random.Random(rank)
    found = []
    for call in range(CALLS):
        time.sleep(pauses.choice([0, 0, 0.01]))  # the ranks drift apart; their results must not
        if wrong(one_shot, call):
            found.append(call)
    print(found)


if __name__ == "__main__":
    main()
