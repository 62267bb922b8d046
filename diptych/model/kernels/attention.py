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

from diptych.model.kernels.launch import wait_for_previous


@triton.jit
def _fold(high, total, acc, m, l, part):  # type: ignore[no-untyped-def]
    """Two parts of a softmax into one: maxima, sums of weights, weighted sums of values. The roundings are spelled out
    (one product, one fused multiply-add), so that every caller gets the same bits."""
    new = tl.maximum(high, m)
    base = tl.where(new == float("-inf"), 0.0, new)
    old_weight, weight = tl.exp2(high - base), tl.exp2(m - base)
    total = tl.fma(l, weight, total * old_weight)
    weight, _ = tl.broadcast(weight[:, None], part)
    return new, total, tl.fma(part, weight, acc * old_weight[:, None])


@triton.jit
def _pages(table, block, offsets, stop, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pages of a block's keys, or the one page. Read a block ahead: were it read in the iteration that needs it,
    the compiler would keep fewer loads of keys and values under way."""
    if PAGE % BLOCK_N == 0:
        at = block
    else:
        at = block + offsets
    return tl.load(table + at // PAGE, mask=at < stop, other=0)


@triton.jit
def _span(  # type: ignore[no-untyped-def]
    q,
    m,
    l,
    acc,
    keys,
    table,
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
    """Online softmax over the keys [start, stop), `start` a multiple of BLOCK_N. Not MASKED: all queries see all keys,
    and `stop` is a multiple too."""
    offsets, dims = tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    page = _pages(table, start, offsets, stop, BLOCK_N, PAGE)
    for block in range(start, stop, BLOCK_N):
        at = block + offsets
        inside = at < stop
        places = page.to(tl.int64) * page_stride + at % PAGE * DIM
        page = _pages(table, block + BLOCK_N, offsets, stop, BLOCK_N, PAGE)  # one block ahead: see _pages
        if MASKED:
            k = tl.load(keys + places[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        else:
            k = tl.load(keys + places[None, :] + dims[:, None])
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:  # softcap * tanh(scores / softcap)
            scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * (2.8853900817779268 / softcap)))
        if MASKED:
            seen = (at[None, :] <= positions[:, None]) & inside[None, :]
            if WINDOW:
                seen = seen & (at[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(m - base)
        l = l * decay + tl.sum(weights, 1)
        values = keys + PAGE * DIM
        if MASKED:
            v = tl.load(values + places[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        else:
            v = tl.load(values + places[:, None] + dims[None, :])
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m = new
    return m, l, acc


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q, token, count, head, q_stride, GROUP: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr
):
    """Where a tile's queries `[BLOCK_M, DIM]` are in `q`, which are real, and each one's token of the tile."""
    rows = tl.arange(0, BLOCK_M)
    index, within = rows // PAD, rows % PAD
    real = (index < count) & (within < GROUP)
    places = (token + index).to(tl.int64) * q_stride + (head * GROUP + within) * DIM
    return q + places[:, None] + tl.arange(0, DIM)[None, :], real, tl.where(index < count, index, 0)


@triton.jit
def _first_key(position, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first block's start that the query at `position` needs."""
    if WINDOW:
        return tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    return position * 0


@triton.jit(do_not_specialize=["window", "table_stride"])
def decode_kernel(  # type: ignore[no-untyped-def]
    q,
    layer_pages,
    table,
    tiles,
    items,
    first_items,
    sizes,
    parts,
    stats,
    table_stride,
    q_stride,
    page_stride,
    head_stride,
    window,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program takes every num_programs-th of the (item, kv head) pairs, whose number is read on the device: one
    captured launch serves any lengths. Leaves weighted sums in `parts` `[item, kv_head, PAD, DIM]`, maxima and sums of
    weights in `stats` `[item, kv_head, 2, PAD]`, float32."""
    wait_for_previous(OVERLAP)
    num_tiles = tl.load(sizes)
    for work in range(tl.program_id(0), tl.load(first_items + num_tiles) * KV_HEADS, tl.num_programs(0)):
        item, head = work // KV_HEADS, work % KV_HEADS
        tile = tiles + tl.load(items + item * 2) * 4
        split = tl.load(items + item * 2 + 1)
        row, token, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3)
        places, real, index = _queries(q, token, 1, head, q_stride, GROUP, PAD, BLOCK_M, DIM)
        start = tl.maximum(split * SPLIT, _first_key(position, window, WINDOW, BLOCK_N))
        stop = tl.minimum(split * SPLIT + SPLIT, position + 1)
        m, l, acc = _span(
            tl.load(places, mask=real[:, None], other=0.0),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, DIM], tl.float32),
            layer_pages + head * head_stride,
            table + row * table_stride,
            page_stride,
            start,
            stop,
            position + index,
            scale,
            softcap,
            window,
            True,
            WINDOW,
            SOFTCAP,
            BLOCK_N,
            PAGE,
            DIM,
        )
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
        kept, base = rows < PAD, work * PAD
        tl.store(parts + (base + rows).to(tl.int64)[:, None] * DIM + dims[None, :], acc, mask=kept[:, None])
        tl.store(stats + base * 2 + rows, m, mask=kept)
        tl.store(stats + base * 2 + PAD + rows, l, mask=kept)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    out,
    tiles,
    first_items,
    sizes,
    parts,
    stats,
    out_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile, kv head): the tile's splits in their order. Programs beyond the number of tiles do nothing."""
    wait_for_previous(OVERLAP)
    tile, head = tl.program_id(0), tl.program_id(1)
    if tile < tl.load(sizes):
        rows, dims = tl.arange(0, PAD), tl.arange(0, DIM)
        high = tl.full([PAD], float("-inf"), tl.float32)
        total = tl.zeros([PAD], tl.float32)
        acc = tl.zeros([PAD, DIM], tl.float32)
        for item in range(tl.load(first_items + tile), tl.load(first_items + tile + 1)):
            base = (item * KV_HEADS + head) * PAD
            m, l = tl.load(stats + base * 2 + rows), tl.load(stats + base * 2 + PAD + rows)
            part = tl.load(parts + (base + rows).to(tl.int64)[:, None] * DIM + dims[None, :])
            high, total, acc = _fold(high, total, acc, m, l, part)
        token = tl.load(tiles + tile * 4 + 1).to(tl.int64)
        places = out + token * out_stride + (head * GROUP + rows)[:, None] * DIM + dims[None, :]
        tl.store(places, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows < GROUP)[:, None])


@triton.jit(do_not_specialize=["window", "table_stride"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,
    out,
    layer_pages,
    table,
    tiles,
    table_stride,
    q_stride,
    out_stride,
    page_stride,
    head_stride,
    window,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FIXED: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (kv head, tile)."""
    wait_for_previous(OVERLAP)
    head, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    row, token, count, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    places, real, index = _queries(q, token, count, head, q_stride, GROUP, PAD, BLOCK_M, DIM)
    queries = tl.load(places, mask=real[:, None], other=0.0)
    positions = position + index
    keys, pages = layer_pages + head * head_stride, table + row * table_stride
    start, stop = _first_key(position, window, WINDOW, BLOCK_N), position + count
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    if FIXED:
        for split in range(start // SPLIT, tl.cdiv(stop, SPLIT)):
            m, l, part = _span(
                queries,
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, DIM], tl.float32),
                keys,
                pages,
                page_stride,
                tl.maximum(start, split * SPLIT),
                tl.minimum(stop, split * SPLIT + SPLIT),
                positions,
                scale,
                softcap,
                window,
                True,
                WINDOW,
                SOFTCAP,
                BLOCK_N,
                PAGE,
                DIM,
            )
            high, total, acc = _fold(high, total, acc, m, l, part)
    else:
        full = start
        if not WINDOW:  # blocks that every query of the tile sees whole
            full = (position + 1) // BLOCK_N * BLOCK_N
            high, total, acc = _span(
                queries, high, total, acc, keys, pages, page_stride, start, full, positions, scale, softcap, window,
                False, WINDOW, SOFTCAP, BLOCK_N, PAGE, DIM,
            )  # fmt: skip
        high, total, acc = _span(
            queries, high, total, acc, keys, pages, page_stride, full, stop, positions, scale, softcap, window,
            True, WINDOW, SOFTCAP, BLOCK_N, PAGE, DIM,
        )  # fmt: skip
    out_places, _, _ = _queries(out, token, count, head, out_stride, GROUP, PAD, BLOCK_M, DIM)
    tl.store(out_places, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
