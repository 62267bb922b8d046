"""Decode attention for few rows: each program reads one run of blocks of keys and values, its share of the batch's,
without a pause where a sequence ends and the next begins. See attention.py and schedule.make_runs.

With NEW it begins at the product of q, k and v: norms, rotary and the write of the new token's keys and values are done
by the programs themselves. That costs more than the launch it saves, because a program that begins a sequence keeps its
blocks waiting; but where launches overlap, blocks are asked for before the product has ended, which is worth more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from diptych.model.kernels.attention import (
    as_read,
    combine,
    pages_of,
    places_of,
    scaled,
    store_out,
    store_part,
)
from diptych.model.kernels.fused import _finite, load_product
from diptych.model.kernels.schedule import RUN_FIELDS, SHARE_FIELDS

RUN, ITEM = tl.constexpr(RUN_FIELDS), tl.constexpr(SHARE_FIELDS)


@triton.jit
def _turned(  # type: ignore[no-untyped-def]
    qkv,
    norm,
    cos,
    sin,
    token,
    position,
    heads,
    real,
    turn,
    row_stride,
    split_stride,
    eps,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Heads of a token's product, those to `turn` normed and rotated (see rope.rope_tables): `[heads, DIM]` in DTYPE.
    Waits for the kernel before, once all that it does not write is asked for."""
    dims = tl.arange(0, DIM)
    swapped = (dims + DIM // 2) % DIM
    turn = (turn & real)[:, None]
    angle = position.to(tl.int64) * DIM + dims
    by_own, by_swapped = tl.load(cos + angle).to(tl.float32)[None, :], tl.load(sin + angle).to(tl.float32)[None, :]
    if NORM:
        weights = norm + heads[:, None] * DIM
        by_own *= tl.load(weights + dims[None, :], mask=turn, other=0.0).to(tl.float32)
        by_swapped *= tl.load(weights + swapped[None, :], mask=turn, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    places = qkv + token.to(tl.int64) * row_stride + heads[:, None] * DIM
    x = load_product(places + dims[None, :], real[:, None], split_stride, SPLITS, DTYPE)
    y = load_product(places + swapped[None, :], turn, split_stride, SPLITS, DTYPE)
    turned = x * by_own + y * by_swapped
    if NORM:
        turned *= tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
    return tl.where(turn, turned, x).to(DTYPE)


@triton.jit(do_not_specialize=["split_stride"])
def run_kernel(  # type: ignore[no-untyped-def]
    q,
    norm,
    cos,
    sin,
    out,
    layer_pages,
    pages,
    runs,
    items,
    parts,
    stats,
    arrivals,
    q_stride,
    split_stride,
    out_stride,
    page_stride,
    head_stride,
    eps,
    most,
    scale,
    NEW: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (run, kv head). `q` are queries `[tokens, heads, DIM]`, whose keys and values are stored; NEW: the
    product of q, k and v (see fused.norm_rotate_store for it, `norm`, `cos`, `sin`).

    NEW: no key or value is read that a kernel of this step writes, so blocks are asked for before the wait for the
    kernel before; the new token's own are taken from registers by the program that has the sequence's last block."""
    run, head = runs + tl.program_id(0) // KV_HEADS * RUN, tl.program_id(0) % KV_HEADS
    item, at, blocks, number = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
    token1, position1, limit1, left1, index1, count1, slot1 = _item(run + 8)
    if OVERLAP:
        gdc_launch_dependents()
        if not NEW or blocks == 0:
            gdc_wait()
    keys, end = layer_pages + head * head_stride, at + blocks * BLOCK_N
    if PAGE % BLOCK_N == 0:
        page, page1, page2 = tl.load(run + 4), tl.load(run + 5), tl.load(run + 6)
    else:
        page = pages_of(pages, at, end, BLOCK_N, PAGE)
        page1 = pages_of(pages, at + BLOCK_N, end, BLOCK_N, PAGE)
        page2 = pages_of(pages, at + 2 * BLOCK_N, end, BLOCK_N, PAGE)
    zero = tl.minimum(blocks, 0)  # which the compiler does not know
    rows, dims, offsets = tl.arange(0, BLOCK_M), tl.arange(0, DIM), tl.arange(0, BLOCK_N)
    # Only the run's first item and its last one can be shared with other programs.
    ends = tl.arange(0, 2)
    shared = items + (item + tl.where(ends == 0, 0, tl.maximum(number - 1, 0))) * ITEM
    tokens, indices, counts = tl.load(shared), tl.load(shared + 4), tl.load(shared + 5)
    firsts = item + tl.where(ends == 0, 0, number - 1) - indices
    partial = (counts > 1) & ((ends == 0) | (number > 1)) & (blocks > 0)
    last_item = item + number - 1
    item -= 1
    token, limit, left, index, count = zero, zero, zero, zero, zero
    queries = as_read(tl.zeros([BLOCK_M, DIM], DTYPE), layer_pages)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for block in range(at, end, BLOCK_N):
        places = places_of(keys, page, block, page_stride, BLOCK_N, PAGE, DIM)
        page, page1 = page1 + zero, page2 + zero  # operations: a loop that only renames is not pipelined
        page2 = pages_of(pages, block + 3 * BLOCK_N, end, BLOCK_N, PAGE)  # ahead, see pages_of
        k = tl.load(places[None, :] + dims[:, None])
        v = tl.load(places[:, None] + PAGE * DIM + dims[None, :])
        if left == 0:  # the next item begins
            item += 1
            token, position, limit, left = token1, position1, limit1, left1
            index, count, slot = index1, count1, slot1
            following = items + tl.minimum(item + 1, last_item) * ITEM
            token1, position1, limit1, left1, index1, count1, slot1 = _item(following)
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, DIM], tl.float32)
            heads = head * GROUP + rows
            if NEW:  # the tile's rows are the query heads, their key and their value
                last = index == count - 1
                kind = rows - GROUP  # 0: the key, 1: the value
                heads = tl.where(kind < 0, heads, (GROUP + kind) * KV_HEADS + head)
                turned = _turned(
                    q, norm, cos, sin, token, position, heads, (kind < 0) | (last & (kind < 2)), kind < 1,
                    q_stride, split_stride, eps, SPLITS, NORM, DIM, DTYPE, OVERLAP,
                )  # fmt: skip
                queries = as_read(turned, layer_pages)
                if last:
                    new = _finite(turned.to(tl.float32), most).to(layer_pages.dtype.element_ty)
                    kept = keys + (slot // PAGE).to(tl.int64) * page_stride + slot % PAGE * DIM
                    kept += kind[:, None] * (PAGE * DIM) + dims[None, :]
                    tl.store(kept, new, mask=((kind >= 0) & (kind < 2) & (slot >= 0))[:, None])
                    new = new.to(queries.dtype).to(tl.float32)
                    key = tl.sum(tl.where(kind[:, None] == 0, new, 0.0), 0)
                    value = tl.sum(tl.where(kind[:, None] == 1, new, 0.0), 0)
                    m = tl.sum(queries.to(tl.float32) * key[None, :], 1) * scale
                    l += 1.0
                    acc += value[None, :]
            else:
                places_q = q + token.to(tl.int64) * q_stride + heads[:, None] * DIM + dims[None, :]
                queries = as_read(tl.load(places_q, mask=(rows < GROUP)[:, None], other=0.0), layer_pages)
                limit += 1
        scores = tl.dot(queries, k.to(queries.dtype), input_precision="ieee")
        scores = tl.where((block + offsets < limit)[None, :], scores, float("-inf"))
        high = tl.maximum(m, tl.max(scores, 1) * scale)
        base = tl.where(high == float("-inf"), 0.0, high)
        weights = tl.exp2(scaled(scores, scale, -base))
        decay = tl.exp2(m - base)
        l = tl.fma(l, decay, tl.sum(weights, 1))
        acc = tl.dot(weights.to(queries.dtype), v.to(queries.dtype), acc * decay[:, None], input_precision="ieee")
        m = high
        left -= 1
        if left == 0:  # the item ends
            if count == 1:
                mean = (acc / l[:, None]).to(out.dtype.element_ty)
                means = out + token.to(tl.int64) * out_stride + (head * GROUP + rows)[:, None] * DIM + dims[None, :]
                tl.store(means, mean, mask=(rows < GROUP)[:, None])
            else:
                store_part(parts, stats, item, head, m, l, acc, KV_HEADS, PAD, BLOCK_M, DIM)
    tl.debug_barrier()
    arrival = arrivals + firsts * KV_HEADS + head
    mine = partial & (tl.atomic_add(arrival, 1, mask=partial, sem="acq_rel", scope="gpu") == counts - 1)
    tl.store(arrival, 0, mask=mine)
    for which in tl.static_range(2):
        if tl.sum((mine & (ends == which)).to(tl.int32), 0) > 0:
            first = tl.sum(tl.where(ends == which, firsts, 0), 0)
            mean = combine(parts, stats, first, tl.sum(tl.where(ends == which, counts, 0), 0), head, KV_HEADS, PAD, DIM)
            store_out(out, mean, tl.sum(tl.where(ends == which, tokens, 0), 0), head, out_stride, GROUP, PAD, DIM)


@triton.jit
def _item(fields):  # type: ignore[no-untyped-def]
    """See schedule.make_runs."""
    token, position, limit = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    blocks, index, count = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
    return token, position, limit, blocks, index, count, tl.load(fields + 6)
