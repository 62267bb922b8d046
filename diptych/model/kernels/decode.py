"""Decode attention in splits of sequences, combined in their order. See attention.py and schedule.make_items."""

from __future__ import annotations

import triton
import triton.language as tl

from diptych.model.kernels.attention import (
    as_read,
    combine,
    first_key,
    pages_of,
    queries_of,
    span,
    store_out,
    store_part,
)
from diptych.model.kernels.launch import wait_for_previous
from diptych.model.kernels.schedule import ITEM_FIELDS

ITEM = tl.constexpr(ITEM_FIELDS)


@triton.jit
def _item(items, work, KV_HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fields of a piece of work's item; see make_items."""
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
        pages = pages_of(table, start, stop, BLOCK_N, PAGE)
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
    OVERLAP: tl.constexpr,
):
    """The programs take the (item, kv head) pairs in turns, to and fro, longest first: their sums of keys are nearly
    alike. How many pairs there are is read on the device: one captured launch serves any lengths. The program that is
    the last to arrive at a (sequence, kv head) combines its items, in their order whoever that is: see store_part."""
    program = tl.program_id(0)
    works, table_stride = tl.load(sizes) * KV_HEADS, tl.load(sizes + 1)
    row, token, position, first, stop, split, count, page = _item(items, tl.minimum(program, works - 1), KV_HEADS)
    wait_for_previous(OVERLAP)  # what is above was copied to the device before the step's first kernel
    work, step = program, 2 * (tl.num_programs(0) - program) - 1
    while work < works:
        item, head = work // KV_HEADS, work % KV_HEADS
        work += step
        step = 2 * tl.num_programs(0) - step
        row1, token1, position1, first1, stop1, split1, count1, page1 = _item(
            items, tl.minimum(work, works - 1), KV_HEADS
        )
        places, real, index = queries_of(q, token, 1, head, q_stride, GROUP, PAD, BLOCK_M, DIM)
        start = tl.maximum(first, first_key(position, window, WINDOW, BLOCK_N))
        m, l, acc = span(
            as_read(tl.load(places, mask=real[:, None], other=0.0), layer_pages),
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
        if count == 1:
            out_places, _, _ = queries_of(out, token, 1, head, out_stride, GROUP, PAD, BLOCK_M, DIM)
            tl.store(out_places, (acc / l[:, None]).to(out.dtype.element_ty), mask=real[:, None])
        else:
            store_part(parts, stats, item, head, m, l, acc, KV_HEADS, PAD, BLOCK_M, DIM)
            tl.debug_barrier()
            arrival = arrivals + (item - split) * KV_HEADS + head
            if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == count - 1:
                tl.store(arrival, 0)
                mean = combine(parts, stats, item - split, count, head, KV_HEADS, PAD, DIM)
                store_out(out, mean, token, head, out_stride, GROUP, PAD, DIM)
        row, token, position, first = row1, token1, position1, first1
        stop, split, count, page = stop1, split1, count1, page1
