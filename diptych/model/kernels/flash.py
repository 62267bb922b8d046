"""Prefill attention of Hopper GPUs, over the paged pool: causal, of new tokens over cached ones and themselves.

As FlashAttention-3 (arXiv:2407.08608) does it: one warp only has the copy engine bring keys and values from their pages
into a ring of blocks, and two warpgroups multiply, 64 rows each: one's softmax overlaps the other's products. Programs
stay and take tiles in turns: the copies of a tile begin while the one before it ends.

Rows of a tile are tokens × the query heads that share a kv head, GROUP padded to PAD, a power of two; see Schedule for
tiles and `kernels/attention.py` for the kernels that other GPUs, other shapes and `--deterministic` use. Softmax is in
base 2: `scale` carries log2(e).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diptych.model.kernels.schedule import TILE_FIELDS
from diptych.model.pool import KVPool

ROWS = 128  # of a tile
STAGES = 2  # blocks of keys, and as many of values, that are there or under way
FIELDS = gl.constexpr(TILE_FIELDS)
HALF = gl.constexpr(64)  # rows of a warpgroup; keys of one copy, all of one page; numbers of a key in one copy
BLOCK = gl.constexpr(128)  # keys


@gluon.jit
def _work(turn, works):  # type: ignore[no-untyped-def]
    """What this program does in its turn. Works are sorted, so every other turn is handed out from the other end."""
    count, me = gl.num_programs(0), gl.program_id(0)
    return turn * count + gl.where(turn % 2 == 0, me, count - 1 - me)


# ---- the copying warp ------------------------------------------------------------------------------------------------


@gluon.jit
def _row(pages, at, stop, head, KV_HEADS: gl.constexpr, LAYERS: gl.constexpr, PAGE: gl.constexpr):  # type: ignore[no-untyped-def]
    """The row of the pool, of its first layer, with the key at position `at`. Past the end it is any of the sequence's:
    masked scores need finite numbers."""
    at = gl.minimum(at, (stop - 1) // HALF * HALF)
    return (gl.load(pages + at // PAGE) * KV_HEADS + head) * (LAYERS * 2 * PAGE) + at % PAGE


@gluon.jit
def _copy(pool, row0, row1, arrived, block, DIM: gl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for a block: HALF rows from each of two rows on."""
    mbarrier.expect(arrived, BLOCK * DIM * 2)
    for column in gl.static_range(0, DIM, 64):
        tma.async_copy_global_to_shared(pool, [row0, column], arrived, block.slice(0, HALF, 0).slice(column, 64, 1))
        tma.async_copy_global_to_shared(pool, [row1, column], arrived, block.slice(HALF, HALF, 0).slice(column, 64, 1))


@gluon.jit
def _producer(  # type: ignore[no-untyped-def]
    pool, table, tiles, works, table_stride, layer_row, keys, values, keys_in, keys_out, values_in, values_out,
    KV_HEADS: gl.constexpr, LAYERS: gl.constexpr, PAGE: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    done = 0
    for turn in range(gl.cdiv(works, gl.num_programs(0))):
        work = _work(turn, works)
        if work < works:
            tile, head = tiles + work // KV_HEADS * FIELDS, work % KV_HEADS
            row, count, position = gl.load(tile), gl.load(tile + 2), gl.load(tile + 3)
            stop = position + count
            blocks = gl.cdiv(stop, BLOCK)
            pages = table + row * table_stride
            last0, last1 = row, row  # where the block before begins
            for j in range(blocks + 1):  # from the last block to the first; values come one turn after their keys
                number = done + j
                row0, row1 = last0, last1
                if j < blocks:
                    at = (blocks - 1 - j) * BLOCK
                    row0 = layer_row + _row(pages, at, stop, head, KV_HEADS, LAYERS, PAGE)
                    row1 = layer_row + _row(pages, at + HALF, stop, head, KV_HEADS, LAYERS, PAGE)
                    mbarrier.wait(keys_out.index(number % STAGES), number // STAGES & 1 ^ 1)
                    _copy(pool, row0, row1, keys_in.index(number % STAGES), keys.index(number % STAGES), DIM)
                if j > 0:
                    number -= 1
                    mbarrier.wait(values_out.index(number % STAGES), number // STAGES & 1 ^ 1)
                    place = values.index(number % STAGES)
                    _copy(pool, last0 + PAGE, last1 + PAGE, values_in.index(number % STAGES), place, DIM)
                last0, last1 = row0, row1
            done += blocks


# ---- the multiplying warpgroups --------------------------------------------------------------------------------------


@gluon.jit
def _softmax(s, m, l, at, positions, scale, MASKED: gl.constexpr, LAYOUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """Weights of a block's keys, which begin at position `at`; the new maxima and sums; what the old ones fade by."""
    if MASKED:
        key = at + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
        s = gl.where(key[None, :] <= positions[:, None], s, float("-inf"))
    new = gl.maximum(m, gl.max(s, 1) * scale)
    base = new
    if MASKED:
        base = gl.where(new == float("-inf"), 0.0, new)
    weights = gl.exp2(s * scale - base[:, None])
    decay = gl.exp2(m - base)
    return weights, new, l * decay + gl.sum(weights, 1), decay


@gluon.jit
def _operand(weights, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def _step(  # type: ignore[no-untyped-def]
    q, keys, values, keys_in, keys_out, values_in, values_out, number, o, m, l, p, at, positions, scale,
    MASKED: gl.constexpr, LAYOUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of block `number`, and `p`, the weights of the block before, times its values."""
    before = number - 1
    mbarrier.wait(keys_in.index(number % STAGES), number // STAGES & 1)
    s = gl.zeros([HALF, BLOCK], gl.float32, LAYOUT)
    s = warpgroup_mma(q, keys.index(number % STAGES).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(values_in.index(before % STAGES), before // STAGES & 1)
    o = warpgroup_mma(p, values.index(before % STAGES), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(keys_out.index(number % STAGES), count=1)
    weights, m, l, decay = _softmax(s, m, l, at, positions, scale, MASKED, LAYOUT)
    following = _operand(weights, q.dtype, LAYOUT)
    o, p, following = warpgroup_mma_wait(0, deps=[o, p, following])  # p is read until then
    mbarrier.arrive(values_out.index(before % STAGES), count=1)
    return o * decay[:, None], m, l, following


@gluon.jit
def _consumer(  # type: ignore[no-untyped-def]
    q, out, tiles, works, q_stride, out_stride, scale, queries, keys, values, keys_in, keys_out, values_in, values_out,
    PART: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAD: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The rows [PART * HALF, PART * HALF + HALF) of this program's tiles."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, 128, 16]
    )  # of scores and of sums: DIM = BLOCK
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LINES))
    rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, LINES)) + PART * HALF
    index, within = rows // PAD, rows % PAD
    order = (gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT)) + PART * HALF) // PAD
    done = 0
    for turn in range(gl.cdiv(works, gl.num_programs(0))):
        work = _work(turn, works)
        if work < works:
            tile, head = tiles + work // KV_HEADS * FIELDS, work % KV_HEADS
            token, count, position = gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3)
            real = (index < count) & (within < GROUP)
            places = (token + index).to(gl.int64) * q_stride + (head * GROUP + within) * DIM
            queries.store(gl.load(q + places[:, None] + dims[None, :], mask=real[:, None], other=0.0))
            fence_async_shared()
            positions = position + gl.where(order < count, order, 0)
            blocks = gl.cdiv(position + count, BLOCK)
            whole = (position + 1) // BLOCK  # blocks that all queries of the tile see whole
            m = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
            l = gl.full([HALF], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
            o = gl.zeros([HALF, DIM], gl.float32, LAYOUT)
            mbarrier.wait(keys_in.index(done % STAGES), done // STAGES & 1)
            s = gl.zeros([HALF, BLOCK], gl.float32, LAYOUT)
            s = warpgroup_mma(queries, keys.index(done % STAGES).permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(keys_out.index(done % STAGES), count=1)
            weights, m, l, _ = _softmax(s, m, l, (blocks - 1) * BLOCK, positions, scale, True, LAYOUT)
            p = _operand(weights, queries.dtype, LAYOUT)
            unmasked = gl.minimum(gl.maximum(blocks - whole, 1), blocks)
            for j in range(1, unmasked):
                o, m, l, p = _step(
                    queries, keys, values, keys_in, keys_out, values_in, values_out, done + j,
                    o, m, l, p, (blocks - 1 - j) * BLOCK, positions, scale, True, LAYOUT, STAGES,
                )  # fmt: skip
            for j in range(unmasked, blocks):
                o, m, l, p = _step(
                    queries, keys, values, keys_in, keys_out, values_in, values_out, done + j,
                    o, m, l, p, (blocks - 1 - j) * BLOCK, positions, scale, False, LAYOUT, STAGES,
                )  # fmt: skip
            done += blocks
            last = done - 1
            mbarrier.wait(values_in.index(last % STAGES), last // STAGES & 1)
            o = warpgroup_mma(p, values.index(last % STAGES), o, is_async=True)
            o, p = warpgroup_mma_wait(0, deps=[o, p])
            mbarrier.arrive(values_out.index(last % STAGES), count=1)
            mean = gl.convert_layout((o / l[:, None]).to(out.dtype.element_ty), LINES)
            places = (token + index).to(gl.int64) * out_stride + (head * GROUP + within) * DIM
            gl.store(out + places[:, None] + dims[None, :], mean, mask=real[:, None])


@gluon.jit(do_not_specialize=["layer_row"])
def flash_kernel(  # type: ignore[no-untyped-def]
    q, out, pool, table, tiles, sizes, layer_row, q_stride, out_stride, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAD: gl.constexpr, LAYERS: gl.constexpr, PAGE: gl.constexpr,
    DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Work is (tile, kv head), whose number is read on the device, as in decode_kernel. `pool` describes all of the
    pool as rows of DIM numbers; `layer_row` is the layer's first of a page and head. Barriers: `…_in` when a block is
    there, `…_out` when both warpgroups are done with it."""
    works, table_stride = gl.load(sizes + 2) * KV_HEADS, gl.load(sizes + 1)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    queries0 = gl.allocate_shared_memory(pool.dtype, [HALF, DIM], SWIZZLED)
    queries1 = gl.allocate_shared_memory(pool.dtype, [HALF, DIM], SWIZZLED)
    keys = gl.allocate_shared_memory(pool.dtype, [STAGES, BLOCK, DIM], SWIZZLED)
    values = gl.allocate_shared_memory(pool.dtype, [STAGES, BLOCK, DIM], SWIZZLED)
    keys_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_in = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_out = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_in.index(i), count=1)
        mbarrier.init(values_in.index(i), count=1)
        mbarrier.init(keys_out.index(i), count=2)
        mbarrier.init(values_out.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (q, out, tiles, works, q_stride, out_stride, scale, queries0, keys, values, keys_in, keys_out,
                         values_in, values_out, 0, KV_HEADS, GROUP, PAD, DIM, STAGES)),
            (_consumer, (q, out, tiles, works, q_stride, out_stride, scale, queries1, keys, values, keys_in, keys_out,
                         values_in, values_out, 1, KV_HEADS, GROUP, PAD, DIM, STAGES)),
            (_producer, (pool, table, tiles, works, table_stride, layer_row, keys, values, keys_in, keys_out,
                         values_in, values_out, KV_HEADS, LAYERS, PAGE, DIM, STAGES)),
        ],
        [4, 1],  # warps of all but the first
        [240, 24],  # their registers
    )  # fmt: skip


# ---- on tensors ------------------------------------------------------------------------------------------------------


class Flash:
    """Prefill over `pool`, if `takes(pool)`; for layers without a window or a cap on scores."""

    def __init__(self, pool: KVPool, num_heads: int, padded_group: int, scale: float) -> None:
        self._pool, self._scale = pool, scale
        self._group, self._pad = num_heads // pool.num_heads, padded_group
        self._programs = torch.cuda.get_device_properties(pool.pages.device).multi_processor_count
        rows, swizzled = pool.pages.numel() // pool.head_dim, gl.NVMMASharedLayout(128, 16, rank=2)
        self._rows = TensorDescriptor(pool.pages, [rows, pool.head_dim], [pool.head_dim, 1], [64, 64], swizzled)
        nothing = pool.pages.new_empty(1, num_heads, pool.head_dim)
        numbers = torch.zeros(FIELDS.value, dtype=torch.int32, device=pool.pages.device)
        # Compiles now, not when a prompt is waiting.
        self(0, nothing, nothing.view(1, -1), numbers, numbers, numbers, 0)

    @staticmethod
    def takes(pool: KVPool) -> bool:
        """Whether this GPU has the instructions, and the pool a shape for which the kernel was made."""
        pages = pool.pages
        return (
            pages.device.type == "cuda"
            and torch.cuda.get_device_capability(pages.device)[0] == 9
            and pages.dtype in (torch.bfloat16, torch.float16)
            and pool.head_dim == 128
            and pool.page_size % 64 == 0
            and pages.numel() // pool.head_dim < 1 << 31
        )

    def __call__(
        self, layer: int, q: Tensor, out: Tensor, table: Tensor, sizes: Tensor, tiles: Tensor, most_tiles: int
    ) -> None:
        """See flash_kernel: from `q` `[tokens, num_heads, dim]` to `out` `[tokens, num_heads * dim]`, both of the
        pool's type and with contiguous rows. `sizes`: see Steps."""
        pool = self._pool
        flash_kernel[(max(1, min(most_tiles * pool.num_heads, self._programs)),)](
            q,
            out,
            self._rows,
            table,
            tiles,
            sizes,
            layer * 2 * pool.page_size,
            q.stride(0),
            out.stride(0),
            self._scale,
            KV_HEADS=pool.num_heads,
            GROUP=self._group,
            PAD=self._pad,
            LAYERS=pool.num_layers,
            PAGE=pool.page_size,
            DIM=pool.head_dim,
            STAGES=STAGES,
            num_warps=4,
        )
