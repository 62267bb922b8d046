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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from diptych.model.kernels.launch import prefetch, wait_for_previous
from diptych.model.kernels.schedule import ITEM_FIELDS

ITEM = tl.constexpr(ITEM_FIELDS)


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
def _pages(table, block, stop, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pages of a block's keys, or the one page. Read a block ahead: were it read in the iteration that needs it,
    the compiler would keep fewer loads of keys and values under way."""
    if PAGE % BLOCK_N == 0:
        at = block
    else:
        at = block + tl.arange(0, BLOCK_N)
    return tl.load(table + at // PAGE, mask=at < stop, other=0)


@triton.jit
def _places(keys, page, block, page_stride, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a block's keys `[BLOCK_N]` start. Those past the sequence's end are somewhere in the pool, whose numbers
    are all finite: a weight of 0 is enough."""
    offsets = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        return keys + page.to(tl.int64) * page_stride + block % PAGE * DIM + offsets * DIM
    return keys + page.to(tl.int64) * page_stride + (block + offsets) % PAGE * DIM


@triton.jit
def _span(  # type: ignore[no-untyped-def]
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
    """Online softmax over the keys [start, stop), `start` a multiple of BLOCK_N, `page` the _pages of its block. Not
    MASKED: all queries see all keys, and `stop` is a multiple too. Roundings are spelled out (fma), so that masked and
    unmasked code should give the same bits, though only FIXED, where all is masked, promises that."""
    offsets, dims = tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    for block in range(start, stop, BLOCK_N):
        places = _places(keys, page, block, page_stride, BLOCK_N, PAGE, DIM)
        page = _pages(table, block + BLOCK_N, stop, BLOCK_N, PAGE)  # one block ahead: see _pages
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
        weights = tl.exp2(_scaled(scores, factor, -base))
        decay = tl.exp2(m - base)
        l = tl.fma(l, decay, tl.sum(weights, 1))
        v = tl.load(places[:, None] + PAGE * DIM + dims[None, :])
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        m = new
    return m, l, acc


@triton.jit
def _scaled(scores, factor, base):  # type: ignore[no-untyped-def]
    """scores * factor + base (one for each row), rounded once."""
    scores, base = tl.broadcast(scores, base[:, None])
    return tl.fma(scores, tl.zeros_like(scores) + factor, base)


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
def _as_read(q, layer_pages):  # type: ignore[no-untyped-def]
    """Queries in the type of the products: float16 over a pool of 8 bits, which converts to it in one instruction."""
    if layer_pages.dtype.element_ty.primitive_bitwidth == 8:
        q = q.to(tl.float16)
    return q


@triton.jit
def _first_key(position, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first block's start that the query at `position` needs."""
    if WINDOW:
        return tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    return position * 0


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
def _combine(  # type: ignore[no-untyped-def]
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
        high, total, acc = _fold(high, total, acc, m0, l0, part0)
        high, total, acc = _fold(high, total, acc, m1, l1, part1)
        high, total, acc = _fold(high, total, acc, m2, l2, part2)
        high, total, acc = _fold(high, total, acc, m3, l3, part3)
    return acc / total[:, None]


@triton.jit
def _ask(  # type: ignore[no-untyped-def]
    keys, page, block, page_stride, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr
):
    """Ask for a block's keys and values. Those that are still to be written are none the worse for it: they are written
    to the same second-level cache."""
    bits: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth
    lines: tl.constexpr = max(DIM * bits // 1024, 1)  # of 128 bytes
    line = tl.arange(0, lines) * (DIM // lines)
    places = _places(keys, page, block, page_stride, BLOCK_N, PAGE, DIM)[:, None] + line[None, :]
    prefetch(places, True)
    prefetch(places + PAGE * DIM, True)


@triton.jit
def _item(items, work, KV_HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fields of a piece of work's item; see Schedule."""
    fields = items + work // KV_HEADS * ITEM
    row, token, position, start = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    stop, split, count, page = tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6), tl.load(fields + 7)
    return row, token, position, start, stop, split, count, page


@triton.jit
def _first_pages(  # type: ignore[no-untyped-def]
    page, table, start, stop, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr
):
    """The pages of an item's first block: `page` is the item's first one."""
    if WINDOW or PAGE % BLOCK_N != 0:
        pages = _pages(table, start, stop, BLOCK_N, PAGE)
    else:
        pages = page
    return pages


@triton.jit(do_not_specialize=["window"])
def decode_kernel(  # type: ignore[no-untyped-def]
    q,
    out,
    layer_pages,
    table,
    items,
    sizes,
    parts,
    stats,
    arrivals,
    q_stride,
    out_stride,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    FUSED: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program takes every num_programs-th of the (item, kv head) pairs, whose number is read on the device: one
    captured launch serves any lengths. Leaves weighted sums in `parts` `[item, kv_head, PAD, DIM]`, maxima and sums of
    weights in `stats` `[item, kv_head, 2, PAD]`, float32.

    AHEAD: while it ends a piece of work, a program asks for the first keys and values of its next one, so that memory
    does not wait for it. FUSED: the program that is the last to arrive at a (tile, kv head) combines its items, in
    their order whoever that is. `arrivals` `[item, kv_head]` is 0 before and after. Its increment releases what all
    threads of the program have stored (they have met at a barrier) and acquires what the others' have (PTX memory
    model: causality is transitive).
    """
    program = tl.program_id(0)
    works, table_stride = tl.load(sizes + 1) * KV_HEADS, tl.load(sizes + 2)
    row, token, position, first, stop, split, count, page = _item(items, tl.minimum(program, works - 1), KV_HEADS)
    if OVERLAP:  # what is above was copied to the device before the step's first kernel
        gdc_launch_dependents()
        if AHEAD and program < works:
            start = tl.maximum(first, _first_key(position, window, WINDOW, BLOCK_N))
            asked = _first_pages(page, table + row * table_stride, start, stop, WINDOW, BLOCK_N, PAGE)
            _ask(layer_pages + program % KV_HEADS * head_stride, asked, start, page_stride, BLOCK_N, PAGE, DIM)
        gdc_wait()
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    for work in range(program, works, tl.num_programs(0)):
        item, head = work // KV_HEADS, work % KV_HEADS
        after = work + tl.num_programs(0)
        row1, token1, position1, first1, stop1, split1, count1, page1 = _item(
            items, tl.minimum(after, works - 1), KV_HEADS
        )
        places, real, index = _queries(q, token, 1, head, q_stride, GROUP, PAD, BLOCK_M, DIM)
        start = tl.maximum(first, _first_key(position, window, WINDOW, BLOCK_N))
        m, l, acc = _span(
            _as_read(tl.load(places, mask=real[:, None], other=0.0), layer_pages),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, DIM], tl.float32),
            layer_pages + head * head_stride,
            table + row * table_stride,
            _first_pages(page, table + row * table_stride, start, stop, WINDOW, BLOCK_N, PAGE),
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
        if AHEAD and after < works:
            start1 = tl.maximum(first1, _first_key(position1, window, WINDOW, BLOCK_N))
            asked = _first_pages(page1, table + row1 * table_stride, start1, stop1, WINDOW, BLOCK_N, PAGE)
            _ask(layer_pages + after % KV_HEADS * head_stride, asked, start1, page_stride, BLOCK_N, PAGE, DIM)
        if FUSED and count == 1:
            out_places, _, _ = _queries(out, token, 1, head, out_stride, GROUP, PAD, BLOCK_M, DIM)
            tl.store(out_places, (acc / l[:, None]).to(out.dtype.element_ty), mask=real[:, None])
        else:
            kept, base = rows < PAD, work * PAD
            tl.store(parts + (base + rows).to(tl.int64)[:, None] * DIM + dims[None, :], acc, mask=kept[:, None])
            tl.store(stats + base * 2 + rows, m, mask=kept)
            tl.store(stats + base * 2 + PAD + rows, l, mask=kept)
            if FUSED:
                arrival = arrivals + (item - split) * KV_HEADS + head
                tl.debug_barrier()
                if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == count - 1:
                    tl.store(arrival, 0)
                    mean = _combine(parts, stats, item - split, count, head, KV_HEADS, PAD, DIM)
                    _store_out(out, mean, token, head, out_stride, GROUP, PAD, DIM)
        row, token, position, first = row1, token1, position1, first1
        stop, split, count, page = stop1, split1, count1, page1


@triton.jit
def _store_out(  # type: ignore[no-untyped-def]
    out, mean, token, head, out_stride, GROUP: tl.constexpr, PAD: tl.constexpr, DIM: tl.constexpr
):
    rows, dims = tl.arange(0, PAD), tl.arange(0, DIM)
    places = out + token.to(tl.int64) * out_stride + (head * GROUP + rows)[:, None] * DIM + dims[None, :]
    tl.store(places, mean.to(out.dtype.element_ty), mask=(rows < GROUP)[:, None])


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
    """Program (tile, kv head): the tile's items in their order. Programs beyond the number of tiles do nothing."""
    wait_for_previous(OVERLAP)
    tile, head = tl.program_id(0), tl.program_id(1)
    if tile < tl.load(sizes):
        first = tl.load(first_items + tile)
        count = tl.load(first_items + tile + 1) - first
        mean = _combine(parts, stats, first, count, head, KV_HEADS, PAD, DIM)
        _store_out(out, mean, tl.load(tiles + tile * 4 + 1), head, out_stride, GROUP, PAD, DIM)


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
    queries = _as_read(tl.load(places, mask=real[:, None], other=0.0), layer_pages)
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
                _pages(pages, tl.maximum(start, split * SPLIT), stop, BLOCK_N, PAGE),
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
            page = _pages(pages, start, full, BLOCK_N, PAGE)
            high, total, acc = _span(
                queries, high, total, acc, keys, pages, page, page_stride, start, full, positions, scale, softcap,
                window, False, WINDOW, SOFTCAP, BLOCK_N, PAGE, DIM,
            )  # fmt: skip
        page = _pages(pages, full, stop, BLOCK_N, PAGE)
        high, total, acc = _span(
            queries, high, total, acc, keys, pages, page, page_stride, full, stop, positions, scale, softcap, window,
            True, WINDOW, SOFTCAP, BLOCK_N, PAGE, DIM,
        )  # fmt: skip
    out_places, _, _ = _queries(out, token, count, head, out_stride, GROUP, PAD, BLOCK_M, DIM)
    tl.store(out_places, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
