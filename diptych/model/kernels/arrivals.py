"""Waiting on the device for what other GPUs write to this one's memory.

A flag is a number that only grows, written by one rank, after what it stands for. A wait ends when the other ranks have
written; if one never does, it never ends: ending the process ends it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LINE = 32  # int32 numbers from one flag to the next: each has a cache line to itself


@triton.jit(do_not_specialize=["number"])
def wait_kernel(flags, number, RANK: tl.constexpr, WORLD: tl.constexpr, LINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: until the flags of all other ranks have come to `number`; they may wrap around."""
    for step in tl.static_range(1, WORLD):
        flag = flags + (RANK + step) % WORLD * LINE
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - number < 0:
            pass


def wait_for(flags: Tensor, number: int, rank: int) -> None:
    """See wait_kernel: what is enqueued next reads what the other ranks had written before. `flags` `[world, LINE]`."""
    wait_kernel[(1,)](flags, number, RANK=rank, WORLD=flags.shape[0], LINE=LINE, num_warps=1)
