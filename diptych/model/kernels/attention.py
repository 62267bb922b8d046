"""Attention over the paged pool: decode (split over keys, then combined in order) and prefill (varlen, causal).

A query's keys come in blocks of BLOCK_N positions from position 0, whoever asks; within a split they go into an online
softmax (Milakov and Gimelshein, arXiv:1805.02867), and splits are combined in their order. Both cuts depend on
positions alone, and a block that a query does not see changes none of its bits; so a query gets the same in any
company. With FIXED, prefill goes through the same splits by the same operations as decode: given the same tile
(BLOCK_M, BLOCK_N, warps), one new token should get the same bits from both.

Rows of a tile are tokens × the query heads that share a kv head, GROUP padded to a power of two. `layer_pages` points
to one layer of the pool `[page, kv_head, layer, 2, slot, dim]`: page and head by their strides, values PAGE * DIM after
keys; offsets in it are 64 bits. Softmax is in base 2: `scale` and `softcap` carry log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(high, total, acc, m, l, part):  # type: ignore[no-untyped-def]
    """Two parts of a softmax into one: maxima, sums of weights, weighted sums of values. The roundings are spelled out
    (one product, one fused multiply-add), so that every caller gets the same bits."""
    new = tl.maximum(high, m)
    base = tl.where(new == float("-inf"), 0.0, new)
    old_weight, weight = tl.exp2(high - base), tl.exp2(m - base)
    total = tl.fma(l, weight, total * old_weight)
    weight, _ = tl.broadcast(weight[:, None], part)
    return new, total, tl.fma(part, weight, acc * old_weight[:, None])


@triton.jit
def pages_of(table, block, stop, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pages of a block's keys, or the one page. Read a block ahead: were it read in the iteration that needs it,
    the compiler would keep fewer loads of keys and values under way."""
    if PAGE % BLOCK_N == 0:
        at = block
    else:
        at = block + tl.arange(0, BLOCK_N)
    return tl.load(table + at // PAGE, mask=at < stop, other=0)


@triton.jit
def places_of(keys, page, block, page_stride, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a block's keys `[BLOCK_N]` start. Those past the sequence's end are somewhere in the pool, whose numbers
    are all finite: a weight of 0 is enough."""
    offsets = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        return keys + page.to(tl.int64) * page_stride + block % PAGE * DIM + offsets * DIM
    return keys + page.to(tl.int64) * page_stride + (block + offsets) % PAGE * DIM


@triton.jit
def span(  # type: ignore[no-untyped-def]
    q,
    m,
    l,
    acc,
    keys,
    table,
    page,
    page_stride,
    start,
    stop,
    positions,
    scale,
    softcap,
    window,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Online softmax over the keys [start, stop), `start` a multiple of BLOCK_N, `page` the pages_of its block. Not
    MASKED: all queries see all keys, and `stop` is a multiple too. Roundings are spelled out (fma), so that masked and
    unmasked code should give the same bits, though only FIXED, where all is masked, promises that."""
    offsets, dims = tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    for block in range(start, stop, BLOCK_N):
        places = places_of(keys, page, block, page_stride, BLOCK_N, PAGE, DIM)
        page = pages_of(table, block + BLOCK_N, stop, BLOCK_N, PAGE)  # one block ahead: see pages_of
        k = tl.load(places[None, :] + dims[:, None])
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        if SOFTCAP:  # softcap * tanh(scores / softcap)
            scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * scale * (2.8853900817779268 / softcap)))
            factor = 1.0
        else:
            factor = scale
        if MASKED:
            at = block + offsets
            seen = (at[None, :] <= positions[:, None]) & (at < stop)[None, :]
            if WINDOW:
                seen = seen & (at[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 1) * factor)
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scaled(scores, factor, -base))
        decay = tl.exp2(m - base)
        l = tl.fma(l, decay, tl.sum(weights, 1))
        v = tl.load(places[:, None] + PAGE * DIM + dims[None, :])
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        m = new
    return m, l, acc


@triton.jit
def scaled(scores, factor, base):  # type: ignore[no-untyped-def]
    """scores * factor + base (one for each row), rounded once."""
    scores, base = tl.broadcast(scores, base[:, None])
    return tl.fma(scores, tl.zeros_like(scores) + factor, base)


@triton.jit
def queries_of(  # type: ignore[no-untyped-def]
    q, token, count, head, q_stride, GROUP: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr
):
    """Where a tile's queries `[BLOCK_M, DIM]` are in `q`, which are real, and each one's token of the tile."""
    rows = tl.arange(0, BLOCK_M)
    index, within = rows // PAD, rows % PAD
    real = (index < count) & (within < GROUP)
    places = (token + index).to(tl.int64) * q_stride + (head * GROUP + within) * DIM
    return q + places[:, None] + tl.arange(0, DIM)[None, :], real, tl.where(index < count, index, 0)


@triton.jit
def as_read(q, layer_pages):  # type: ignore[no-untyped-def]
    """Queries in the type of the products: float16 over a pool of 8 bits, which converts to it in one instruction."""
    if layer_pages.dtype.element_ty.primitive_bitwidth == 8:
        q = q.to(tl.float16)
    return q


@triton.jit
def first_key(position, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first block's start that the query at `position` needs."""
    if WINDOW:
        return tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    return position * 0


@triton.jit
def store_part(  # type: ignore[no-untyped-def]
    parts,
    stats,
    item,
    head,
    m,
    l,
    acc,
    KV_HEADS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
):
    """Leave an item's weighted sums in `parts` `[item, kv_head, PAD, DIM]`, its maxima and sums of weights in `stats`
    `[item, kv_head, 2, PAD]`, float32, for the program that combines them.

    That is the last to add to the sequence's number in `arrivals` `[first item, kv_head]`, which is 0 before and after:
    the addition releases what all threads of a program have stored (they have met at a barrier) and acquires what those
    of others have (PTX memory model: causality is transitive)."""
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    kept, base = rows < PAD, (item * KV_HEADS + head) * PAD
    tl.store(parts + (base + rows).to(tl.int64)[:, None] * DIM + dims[None, :], acc, mask=kept[:, None])
    tl.store(stats + base * 2 + rows, m, mask=kept)
    tl.store(stats + base * 2 + PAD + rows, l, mask=kept)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    parts, stats, item, real, head, KV_HEADS: tl.constexpr, PAD: tl.constexpr, DIM: tl.constexpr
):
    """An item's maxima, sums of weights and weighted sums; of one that is not `real`, what changes nothing."""
    rows, dims = tl.arange(0, PAD), tl.arange(0, DIM)
    base = (item * KV_HEADS + head) * PAD
    m = tl.load(stats + base * 2 + rows, mask=real, other=float("-inf"), cache_modifier=".cg")
    l = tl.load(stats + base * 2 + PAD + rows, mask=real, other=0.0, cache_modifier=".cg")
    places = parts + (base + rows).to(tl.int64)[:, None] * DIM + dims[None, :]
    return m, l, tl.load(places, mask=real, other=0.0, cache_modifier=".cg")


@triton.jit
def combine(  # type: ignore[no-untyped-def]
    parts, stats, first, count, head, KV_HEADS: tl.constexpr, PAD: tl.constexpr, DIM: tl.constexpr
):
    """The items [first, first + count) of a kv head in their order: averages `[PAD, DIM]`. Four are read at once."""
    high = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    acc = tl.zeros([PAD, DIM], tl.float32)
    for at in range(0, count, 4):
        m0, l0, part0 = _part(parts, stats, first + at, True, head, KV_HEADS, PAD, DIM)
        m1, l1, part1 = _part(parts, stats, first + at + 1, at + 1 < count, head, KV_HEADS, PAD, DIM)
        m2, l2, part2 = _part(parts, stats, first + at + 2, at + 2 < count, head, KV_HEADS, PAD, DIM)
        m3, l3, part3 = _part(parts, stats, first + at + 3, at + 3 < count, head, KV_HEADS, PAD, DIM)
        high, total, acc = fold(high, total, acc, m0, l0, part0)
        high, total, acc = fold(high, total, acc, m1, l1, part1)
        high, total, acc = fold(high, total, acc, m2, l2, part2)
        high, total, acc = fold(high, total, acc, m3, l3, part3)
    return acc / total[:, None]


@triton.jit
def store_out(  # type: ignore[no-untyped-def]
    out, mean, token, head, out_stride, GROUP: tl.constexpr, PAD: tl.constexpr, DIM: tl.constexpr
):
    rows, dims = tl.arange(0, PAD), tl.arange(0, DIM)
    places = out + token.to(tl.int64) * out_stride + (head * GROUP + rows)[:, None] * DIM + dims[None, :]
    tl.store(places, mean.to(out.dtype.element_ty), mask=(rows < GROUP)[:, None])
