"""Two-shot sums over the GPUs of a host: each rank adds and norms a share of the rows, which it reads from all others,
and writes what it has to all others. One way over NVLink carries half of what a ring does for two ranks, and a norm is
done once for each row.

Programs meet their like of the other ranks twice: before they read, as parts are there when the kernel of a rank has
begun; and before they end, as all rows are there when all programs of the others have written theirs. A meeting is a
number, the call's, that each writes into a flag of each other, after what it has done (release), and waits for before
it goes on (acquire), at the system's scope. A wait ends when the other ranks have written. If one never does, the
kernel never ends: ending the process ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128  # an H200 runs so many at once (it has 132 processors), and each waits for its like


@triton.jit
def _meet(  # type: ignore[no-untyped-def]
    flags, call, MEETING: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    """`flags`: where each rank has its flags, `[2, WORLD, PROGRAMS]` by meeting, writing rank and program."""
    tl.debug_barrier()  # all threads have done what comes before
    program = tl.program_id(0)
    for step in tl.static_range(1, WORLD):
        theirs = tl.load(flags + (RANK + step) % WORLD).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + (MEETING * WORLD + RANK) * PROGRAMS + program, call, sem="release", scope="sys")
    ours = tl.load(flags + RANK).to(tl.pointer_type(tl.int32))
    for step in tl.static_range(1, WORLD):
        flag = ours + (MEETING * WORLD + (RANK + step) % WORLD) * PROGRAMS + program
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") != call:  # nobody can be further
            pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "first"])
def two_shot_kernel(  # type: ignore[no-untyped-def]
    x,
    parts,
    weight,
    outs,
    flags,
    calls,
    rows,
    first,
    eps,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """add_norm_kernel (diptych/model/kernels/fused.py) of `rows` rows `x`, the rank's share. `parts`, `outs`: where
    each rank has its product and its normed rows, all of them, of which the share begins at row `first`. The product's
    sum is in rank order, in float32, rounded to x's type. Programs take rows in turns; `calls` `[PROGRAMS]`: how often
    each has run."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = x.dtype.element_ty
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    call = tl.load(calls + tl.program_id(0)) + 1
    _meet(flags, call, 0, RANK, WORLD, PROGRAMS)
    for row in range(tl.program_id(0).to(tl.int64), rows, PROGRAMS):
        at = row * WIDTH + columns
        whole = (row + first) * WIDTH + columns
        added = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(WORLD):
            part = tl.multiple_of(tl.load(parts + source).to(tl.pointer_type(dtype)), 16)
            numbers = tl.load(part + whole, mask=inside, other=0.0).to(tl.float32)
            added = numbers if source == 0 else added + numbers
        before = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total = (before + added.to(dtype).to(tl.float32)).to(dtype)
        tl.store(x + at, total, mask=inside)
        value = total.to(tl.float32)
        root = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        normed = (value * root * scale).to(dtype)
        for target in tl.static_range(WORLD):
            out = tl.multiple_of(tl.load(outs + target).to(tl.pointer_type(dtype)), 16)
            tl.store(out + whole, normed, mask=inside)
    _meet(flags, call, 1, RANK, WORLD, PROGRAMS)
    tl.store(calls + tl.program_id(0), call)


class TwoShot:
    """Sums by rank `rank` of several. Every rank makes the same calls. `parts`, `outs`, `flags`: see the kernel;
    `flags` are zero at first and have `flag_bytes(world)`."""

    def __init__(
        self, rank: int, parts: Sequence[int], outs: Sequence[int], flags: Sequence[int], device: torch.device
    ) -> None:
        self._rank, self._world = rank, len(parts)
        self._calls = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        places = torch.tensor([parts, outs, flags], dtype=torch.int64, device=device)
        self._parts, self._outs, self._flags = places.unbind()

    @staticmethod
    def flag_bytes(world: int) -> int:
        return 2 * world * PROGRAMS * 4

    def add_norm(self, x: Tensor, first: int, weight: Tensor, eps: float) -> None:
        """See two_shot_kernel. `x` `[rows, width]`, changed in place, begins at row `first` of all."""
        (rows, width), block = x.shape, triton.next_power_of_2(x.shape[1])
        two_shot_kernel[(PROGRAMS,)](
            x, self._parts, weight, self._outs, self._flags, self._calls, rows, first, eps, RANK=self._rank,
            WORLD=self._world, PROGRAMS=PROGRAMS, WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
