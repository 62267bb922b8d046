"""Attention of several new tokens of a sequence, over cached and new keys: varlen, causal. See attention.py."""

from __future__ import annotations

import triton
import triton.language as tl

from diptych.model.kernels.attention import as_read, first_key, fold, pages_of, queries_of, span
from diptych.model.kernels.launch import wait_for_previous


@triton.jit(do_not_specialize=["window"])
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,
    out,
    layer_pages,
    table,
    tiles,
    sizes,
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
    """Program (kv head, tile). How many tiles there are is read on the device: one captured launch serves any plan."""
    wait_for_previous(OVERLAP)
    if tl.program_id(1) >= tl.load(sizes + 2):
        return
    head, tile = tl.program_id(0), tiles + tl.program_id(1) * 4
    row, token, count, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    places, real, index = queries_of(q, token, count, head, q_stride, GROUP, PAD, BLOCK_M, DIM)
    queries = as_read(tl.load(places, mask=real[:, None], other=0.0), layer_pages)
    positions = position + index
    keys, pages = layer_pages + head * head_stride, table + row * tl.load(sizes + 1)
    start, stop = first_key(position, window, WINDOW, BLOCK_N), position + count
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    if FIXED:
        for split in range(start // SPLIT, tl.cdiv(stop, SPLIT)):
            m, l, part = span(
                queries,
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, DIM], tl.float32),
                keys,
                pages,
                pages_of(pages, tl.maximum(start, split * SPLIT), stop, BLOCK_N, PAGE),
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
            high, total, acc = fold(high, total, acc, m, l, part)
    else:
        full = start
        if not WINDOW:  # blocks that every query of the tile sees whole
            full = (position + 1) // BLOCK_N * BLOCK_N
            page = pages_of(pages, start, full, BLOCK_N, PAGE)
            high, total, acc = span(
                queries, high, total, acc, keys, pages, page, page_stride, start, full, positions, scale, softcap,
                window, False, WINDOW, SOFTCAP, BLOCK_N, PAGE, DIM,
            )  # fmt: skip
        page = pages_of(pages, full, stop, BLOCK_N, PAGE)
        high, total, acc = span(
            queries, high, total, acc, keys, pages, page, page_stride, full, stop, positions, scale, softcap, window,
            True, WINDOW, SOFTCAP, BLOCK_N, PAGE, DIM,
        )  # fmt: skip
    out_places, _, _ = queries_of(out, token, count, head, out_stride, GROUP, PAD, BLOCK_M, DIM)
    tl.store(out_places, (acc / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
