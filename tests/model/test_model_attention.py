"""Attention over pages against a plain softmax in float64; the pool's bytes as the transfer sees them."""

from __future__ import annotations

import math
import random

import numpy as np
import psutil
import pytest
import torch

from diptych.kv.store import PageStore
from diptych.model import paged_attention
from diptych.model.block_softmax import BLOCK
from diptych.model.paged_attention import PagedAttention
from diptych.model.pool import KVPool, PoolStore
from diptych.types import Plan


def make_plan(rows: list[tuple[int, int, list[int]]], page_size: int) -> Plan:
    """Rows are (cached tokens, new tokens, pages)."""
    slots, positions, starts = [], [], [0]
    for cached, new, pages in rows:
        positions += range(cached, cached + new)
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(cached, cached + new)]
        starts.append(starts[-1] + new)
    table = np.zeros((len(rows), max(len(pages) for _, _, pages in rows)), np.int32)
    for row, (_, _, pages) in enumerate(rows):
        table[row, : len(pages)] = pages
    return Plan(
        step=0,
        rows=[],
        token_ids=np.zeros(starts[-1], np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int64),
        q_starts=np.array(starts, np.int32),
        kv_lens=np.array([cached + new for cached, new, _ in rows], np.int32),
        pages=table,
    )


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """Queries `[n, heads, dim]` at positions first…, keys and values `[length, kv_heads, dim]`; float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(first, first + len(q))[:, None]
    key = torch.arange(len(k))[None]
    hidden = (key > position) | (window > 0) & (key <= position - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("case", range(12))
def test_attention_is_a_softmax_over_the_sequence(case: int) -> None:
    rnd = random.Random(case)
    generator = torch.Generator().manual_seed(case)
    page_size = (16, 1, 5, 64, 200, 12)[case % 6]
    kv_heads, group, dim = rnd.choice([1, 2, 4]), rnd.choice([1, 2, 3, 8]), rnd.choice([8, 16, 64])
    window, softcap = (0, 30, 0, 150)[case % 4], (0.0, 0.0, 3.0)[case % 3]
    lengths = [rnd.choice([1, 3, 100, 128, 129, 200, 400]) for _ in range(5)]
    num_pages = sum(-(-length // page_size) for length in lengths)
    pool = KVPool(num_pages + 2, page_size, kv_heads, 2, dim, torch.float32, "cpu")
    pool.pages.normal_(generator=generator)  # as used pages are
    attention = PagedAttention(pool, kv_heads * group, 0.3)
    free = list(range(num_pages + 2))
    rnd.shuffle(free)
    pages = [[free.pop() for _ in range(-(-length // page_size))] for length in lengths]
    k, v = ([torch.randn(length, kv_heads, dim, generator=generator) for length in lengths] for _ in range(2))
    q = [torch.randn(length, kv_heads * group, dim, generator=generator) for length in lengths]

    cached = [0 if length == 1 else rnd.choice([0, length - 1, length // 2]) for length in lengths]
    steps = [[(0, c) for c in cached], [(c, length - c) for c, length in zip(cached, lengths, strict=True)]]
    for spans in steps:
        busy = [(i, start, new) for i, (start, new) in enumerate(spans) if new]
        if not busy:
            continue
        attention.begin(make_plan([(start, new, pages[i]) for i, start, new in busy], page_size))
        parts = [torch.cat([t[i][start : start + new] for i, start, new in busy]) for t in (q, k, v)]
        padding = -len(parts[0]) % 4
        parts = [torch.cat((part, torch.zeros(padding, *part.shape[1:]))) for part in parts]
        out = attention.attend(1, *parts, window=window, softcap=softcap).view(parts[0].shape)
        at = 0
        for i, start, new in busy:
            expected = naive(
                q[i][start : start + new], k[i][: start + new], v[i][: start + new], start, 0.3, window, softcap
            )
            torch.testing.assert_close(out[at : at + new].double(), expected, rtol=0, atol=2e-6)
            at += new


def test_how_much_is_gathered_at_once_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = KVPool(40, 16, 2, 1, 16, torch.float32, "cpu")
    pool.pages.normal_(generator=generator)
    plan = make_plan([(299, 1, list(range(19))), (150, 1, list(range(20, 30))), (16, 1, [30, 31])], 16)
    q, k, v = (torch.randn(3, heads, 16, generator=generator) for heads in (4, 2, 2))
    results, num_pieces = [], []
    for num_bytes in (1, 2 * 2 * BLOCK * 16 * 4, 1 << 20):  # a block at a time, two, all six
        monkeypatch.setattr(paged_attention, "STREAM_BYTES", num_bytes)
        attention = PagedAttention(pool, 4, 0.25)
        attention.begin(plan)
        results.append(attention.attend(0, q, k, v))
        num_pieces.append([len(job.stream) for job in attention._jobs if isinstance(job, paged_attention._Decode)])
    assert num_pieces == [[6], [3], [1]]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def filled_pool(dtype: torch.dtype = torch.float32) -> KVPool:
    pool = KVPool(7, 4, 3, 2, 8, dtype, "cpu")
    pool.pages.copy_(torch.randn(pool.pages.shape, generator=torch.Generator().manual_seed(0)))
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_store_reads_and_writes_heads_of_pages(dtype: torch.dtype) -> None:
    pool = filled_pool(dtype)
    store: PageStore = PoolStore(pool, 2)
    name = str(dtype).removeprefix("torch.")
    assert (store.num_pages, store.num_heads) == (7, 3)
    assert store.layout == f"page,head,layer,kv,slot,dim:{name}:4:2:8"
    assert store.head_bytes == 2 * 2 * 4 * 8 * dtype.itemsize
    data = store.read([5, 2], 1, 3)
    expected = pool.pages[[5, 2], 1:3].contiguous().view(torch.uint8).numpy().tobytes()
    assert bytes(data) == expected
    assert data.contiguous
    store.write([0, 6], 0, 2, data)
    assert torch.equal(pool.pages[0, :2], pool.pages[5, 1:])
    assert torch.equal(pool.pages[6, :2], pool.pages[2, 1:])
    assert not torch.equal(pool.pages[0, 2], pool.pages[5, 2])
    pool.pages[5] = 0
    assert bytes(data) == expected  # a copy
    with pytest.raises(ValueError, match="reshape"):
        store.write([0, 6], 0, 2, data[:-1])


def test_what_is_written_is_finite() -> None:
    pool = filled_pool()
    keys = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 2).expand(1, 3, 8)
    pool.write(1, torch.tensor([3]), torch.tensor([2]), keys, keys)
    assert pool.pages.isfinite().all()
    assert pool.pages[3, 0, 1, 0, 2, 3] == 1.0


def test_a_pool_costs_no_memory_before_it_is_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KVPool(1 << 12, 16, 4, 8, 64, torch.float32, "cpu")  # 1 GiB
    assert process.memory_info().rss - before < 64 << 20
    assert pool.pages[-1].count_nonzero() == 0
    assert pool.pages.data_ptr() % 64 == 0
