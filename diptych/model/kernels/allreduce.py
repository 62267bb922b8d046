"""One-shot sums over the GPUs of a host: each writes its part straight into the memory of all others, and adds.

A part travels in lines of eight bytes: four of data, and the number of the call, by which the reader knows that the
data is there. That needs no barrier and no fence, as an aligned store of eight bytes is never seen by halves; the price
is twice the bytes. (NCCL's protocol "LL" does the same.) A call thus costs one way over NVLink.

Memory of a rank: int64 lines `[2, WORLD, LIMIT]`: by the call's number, even or odd, and by sender. A sender may
overwrite what it wrote two calls ago: it has finished the call between, for which it had to hear from every other rank,
each of which had by then finished the call before that one.

Parts are added in rank order in float32 and rounded once: the same bits on every rank, whatever the number of rows.
A wait ends when the other ranks have written. If one never does, the kernel never ends: ending the process ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.fused import DTYPES, load_product, splits_of
from diptych.model.kernels.launch import wait_for_previous
from diptych.model.kernels.matmul_kernels import reduce_kernel

PROGRAMS = 128  # at most: an H200 runs so many at once (it has 132 processors), and each waits for its like
BLOCK = 1024  # columns of a tile of a plain sum


@triton.jit
def _words(x, BLOCK: tl.constexpr, PER_WORD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of `x` [BLOCK] as int32: one number each, or two, the first in the low half."""
    if PER_WORD == 1:
        words = x.to(tl.int32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(x.to(tl.int16, bitcast=True), [BLOCK // 2, 2]))
        words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return words


@triton.jit
def _numbers(words, DTYPE: tl.constexpr, PER_WORD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of _words, as float32."""
    if PER_WORD == 1:
        numbers = words.to(tl.float32, bitcast=True)
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        numbers = tl.interleave(low, high).to(DTYPE, bitcast=True).to(tl.float32)
    return numbers


@triton.jit
def _send(  # type: ignore[no-untyped-def]
    x,
    lines,
    inside,
    memories,
    call,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """Write `x` [BLOCK] to the places `lines` of every other rank."""
    words = _words(x, BLOCK, PER_WORD)
    packed = (words.to(tl.int64) & 0xFFFFFFFF) | (call.to(tl.int64) << 32)
    start = ((call & 1) * WORLD + RANK) * LIMIT
    for step in tl.static_range(1, WORLD):
        memory = tl.load(memories + (RANK + step) % WORLD).to(tl.pointer_type(tl.int64))
        tl.store(tl.multiple_of(memory, 16) + start + lines, packed, mask=inside)


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    x,
    lines,
    inside,
    memories,
    call,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LIMIT: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """The sum of all ranks' numbers at `lines`, of which `x` are ours, in x's type. Waits until they are there."""
    memory = tl.multiple_of(tl.load(memories + RANK).to(tl.pointer_type(tl.int64)), 16)
    total = x.to(tl.float32)
    for source in tl.static_range(WORLD):
        if source == RANK:
            part = x.to(tl.float32)
        else:
            places = memory + ((call & 1) * WORLD + source) * LIMIT + lines
            packed = tl.load(places, mask=inside, other=0, volatile=True)
            while tl.sum((inside & ((packed >> 32).to(tl.int32) != call)).to(tl.int32), 0) > 0:
                packed = tl.load(places, mask=inside, other=0, volatile=True)
            part = _numbers(packed.to(tl.int32), x.dtype, PER_WORD)
        if source == 0:
            total = part
        else:
            total += part
    return total.to(x.dtype)


@triton.jit
def _count(calls, program, programs, call, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Note that the call is over, also for programs that only larger calls have: each program those it alone reads."""
    places = program + tl.arange(0, PROGRAMS) * programs
    tl.store(calls + places, tl.zeros([PROGRAMS], tl.int32) + call, mask=places < PROGRAMS)


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    x,
    memories,
    calls,
    size,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LIMIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_WORD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x, of `size` numbers, becomes the sum of all ranks' x. Programs take tiles of BLOCK in turns."""
    wait_for_previous(OVERLAP)
    program, programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program) + 1
    columns, words = tl.arange(0, BLOCK), tl.arange(0, BLOCK // PER_WORD)
    for tile in range(program, tl.cdiv(size, BLOCK), programs):
        at, lines = tile * BLOCK + columns, tile * (BLOCK // PER_WORD) + words
        mine = tl.load(x + at, mask=at < size, other=0.0)
        _send(mine, lines, lines < size // PER_WORD, memories, call, RANK, WORLD, LIMIT, BLOCK, PER_WORD)
    for tile in range(program, tl.cdiv(size, BLOCK), programs):
        at, lines = tile * BLOCK + columns, tile * (BLOCK // PER_WORD) + words
        mine = tl.load(x + at, mask=at < size, other=0.0)
        total = _sum(mine, lines, lines < size // PER_WORD, memories, call, RANK, WORLD, LIMIT, PER_WORD)
        tl.store(x + at, total, mask=at < size)
    _count(calls, program, programs, call, PROGRAMS)


@triton.jit(do_not_specialize=["rows"])
def sum_add_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    delta,
    weight,
    out,
    memories,
    calls,
    rows,
    split_stride,
    eps,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    LIMIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_WORD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """add_norm_kernel (diptych/model/kernels/fused.py) of the sum of all ranks' `delta`, which is rounded to x's type.
    Programs take rows in turns."""
    wait_for_previous(OVERLAP)
    program, programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program) + 1
    columns, words = tl.arange(0, BLOCK), tl.arange(0, BLOCK // PER_WORD)
    inside, sent = columns < WIDTH, words < WIDTH // PER_WORD
    dtype = x.dtype.element_ty
    for row in range(program, rows, programs):
        mine = load_product(delta + row * WIDTH + columns, inside, split_stride, SPLITS, dtype).to(dtype)
        _send(mine, row * (WIDTH // PER_WORD) + words, sent, memories, call, RANK, WORLD, LIMIT, BLOCK, PER_WORD)
    for row in range(program, rows, programs):
        at = row * WIDTH + columns
        residual = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        mine = load_product(delta + at, inside, split_stride, SPLITS, dtype).to(dtype)
        lines = row * (WIDTH // PER_WORD) + words
        added = _sum(mine, lines, sent, memories, call, RANK, WORLD, LIMIT, PER_WORD)
        tl.store(x + at, (residual + added.to(tl.float32)).to(dtype), mask=inside)
        # Read again, the numbers lie in the threads as add_norm_kernel has them, and are added in its order.
        tl.debug_barrier()
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        tl.store(out + at, (value * root * scale).to(dtype), mask=inside)
    _count(calls, program, programs, call, PROGRAMS)


# ---- on tensors --------------------------------------------------------------------------------------------------


class OneShot:
    """Sums of up to `limit` bytes by rank `rank` of several. Every rank makes the same calls in the same order.

    `addresses[r]`: where rank r's zeroed memory of `num_bytes(world, limit)` is in this process. The caller keeps it.
    """

    def __init__(self, rank: int, addresses: Sequence[int], limit: int, device: torch.device | str) -> None:
        self.rank, self.world, self.limit = rank, len(addresses), limit
        self._memories = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._calls = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)

    @staticmethod
    def num_bytes(world: int, limit: int) -> int:
        return 2 * world * 2 * limit

    def takes(self, x: Tensor) -> bool:
        """Whether a tensor like `x` is of a kind and size that this sums."""
        return x.dtype in DTYPES and 0 < x.nbytes <= self.limit and x.shape[-1] * x.itemsize % 4 == 0

    def sum(self, x: Tensor) -> Tensor:
        """`x`, contiguous, becomes the sum of all ranks' x."""
        size = x.numel()
        sum_kernel[(min(PROGRAMS, triton.cdiv(size, BLOCK)),)](
            x, self._memories, self._calls, size, BLOCK=BLOCK, PER_WORD=4 // x.itemsize, num_warps=4,
            **self._place(), **launch.options(),
        )  # fmt: skip
        return x

    def sum_add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See sum_add_norm_kernel. `x` `[rows, width]`, which `takes`, changes in place; `delta` is a product of this
        shape, or its unreduced parts."""
        rows, width = x.shape
        out, block = torch.empty_like(x), triton.next_power_of_2(width)
        sum_add_norm_kernel[(min(PROGRAMS, rows),)](
            x, delta, weight, out, self._memories, self._calls, rows, x.numel(), eps, SPLITS=splits_of(delta),
            WIDTH=width, BLOCK=block, PER_WORD=4 // x.itemsize, num_warps=min(16, max(1, block // 512)),
            **self._place(), **launch.options(),
        )  # fmt: skip
        return out

    def _place(self) -> dict[str, int]:
        return {"RANK": self.rank, "WORLD": self.world, "LIMIT": self.limit // 4, "PROGRAMS": PROGRAMS}


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of `[parts, …]`, in order, in float32, rounded once to `dtype`."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    size, grid = out.numel(), (triton.cdiv(out.numel(), 1024),)
    reduce_kernel[grid](parts, out, size, size, SPLITS=len(parts), BLOCK=1024, **launch.options())
    return out


def whole(product: Tensor, dtype: torch.dtype) -> Tensor:
    """A product that may have come as its unreduced parts."""
    return add_parts(product, dtype) if product.ndim == 3 else product
