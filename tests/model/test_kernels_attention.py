"""Attention kernels against a plain softmax in float64, and against themselves in other company.

On a GPU they run compiled, else in Triton's interpreter, which has no products of bfloat16.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from test_model_attention import make_plan, naive
from torch import Tensor

from diptych.errors import ConfigError
from diptych.model.attention_tiles import AttentionTiles, takes_runs
from diptych.model.kernels import fused
from diptych.model.kernels.schedule import Cuts, blocks_of, decode_rows, make_items, make_runs, prefill_tiles
from diptych.model.paged_attention import PagedAttention
from diptych.model.pool import KVPool
from diptych.model.triton_attention import TritonAttention
from diptych.types import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = AttentionTiles(split=64, run_rows=0, decode_n=32, prefill_m=32, prefill_n=32, prefill_warps=4)
RUNS = AttentionTiles(run_programs=9, run_new=True, decode_n=32, prefill_m=32, prefill_n=32, prefill_warps=4)
ALIKE = AttentionTiles(split=64, run_rows=0, decode_m=32, decode_n=32, prefill_m=32, prefill_n=32, prefill_warps=4)


class Sequences:
    """Random queries, keys and values of some sequences, and pages for them in random order."""

    def __init__(self, seed: int, lengths: list[int], heads: int, kv_heads: int, dim: int, page_size: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.dim, self.page_size = heads, kv_heads, dim, page_size
        counts = [-(-length // page_size) for length in lengths]
        self.num_pages = sum(counts) + 2
        free = list(range(self.num_pages))
        random.Random(seed).shuffle(free)
        self.pages = [[free.pop() for _ in range(count)] for count in counts]
        self.q = [self.randn(length, heads) for length in lengths]
        self.k = [self.randn(length, kv_heads) for length in lengths]
        self.v = [self.randn(length, kv_heads) for length in lengths]

    def randn(self, length: int, heads: int) -> Tensor:
        return torch.randn(length, heads, self.dim, generator=self.generator)

    def backend(
        self, dtype: torch.dtype, tiles: AttentionTiles, fixed: bool = False, stored: torch.dtype | None = None
    ) -> TritonAttention:
        """Over a new pool, full of what others have left, of `stored` (default: the queries') type."""
        self.dtype = dtype
        pool = KVPool(self.num_pages, self.page_size, self.kv_heads, 2, self.dim, stored or dtype, DEVICE)
        pool.pages.copy_(torch.randn(pool.pages.shape, generator=self.generator))
        return TritonAttention(pool, self.heads, self.dim**-0.5, fixed=fixed, tiles=tiles)

    def spans(self, spans: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, list[int]]], list[Tensor]]:
        """(sequence, first token, number of tokens): rows for make_plan, and the tokens' q, k, v, padded."""
        rows = [(start, new, self.pages[i]) for i, start, new in spans]
        parts = []
        for t in (self.q, self.k, self.v):
            part = torch.cat([t[i][start : start + new] for i, start, new in spans])
            parts.append(torch.cat((part, part.new_zeros(-len(part) % 4, *part.shape[1:]))))
        return rows, parts

    def attend(
        self, attention: TritonAttention, spans: list[tuple[int, int, int]], window: int = 0, softcap: float = 0.0
    ) -> list[Tensor]:
        """One step: what each span's tokens get."""
        rows, parts = self.spans(spans)
        attention.begin(make_plan(rows, self.page_size))
        q, k, v = (part.to(DEVICE, self.dtype) for part in parts)
        out = attention.attend(1, q, k, v, window, softcap).view(q.shape)
        return list(out[: sum(new for _, _, new in spans)].split([new for _, _, new in spans]))


CASES = [  # page size, kv heads, group, dim, window, softcap, dtype
    (16, 2, 2, 16, 0, 0.0, torch.float32),
    (64, 1, 8, 64, 0, 0.0, HALF),
    (16, 2, 3, 16, 0, 3.0, torch.float32),
    (32, 1, 1, 128, 40, 0.0, torch.float32),
    (128, 2, 5, 16, 30, 2.0, HALF),
    (64, 3, 2, 16, 150, 0.0, torch.float32),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("tiles", [SMALL, RUNS], ids=["splits", "runs"])
def test_attention_is_a_softmax_over_the_sequence(case: int, tiles: AttentionTiles) -> None:
    page_size, kv_heads, group, dim, window, softcap, dtype = CASES[case]
    if tiles is RUNS:
        window, softcap = 0, 0.0
    rnd = random.Random(case)
    lengths = [1, rnd.choice([64, 65, 129]), rnd.choice([33, 70, 130]), 17]
    s = Sequences(case, lengths, kv_heads * group, kv_heads, dim, page_size)
    attention = s.backend(dtype, tiles, fixed=tiles is SMALL and case % 2 == 1)
    cached = [0, lengths[1] - 1, rnd.randrange(1, lengths[2] - 1), 0]
    steps = [[(i, 0, c) for i, c in enumerate(cached) if c], [(i, c, lengths[i] - c) for i, c in enumerate(cached)]]
    steps.append([(i, length - 1, 1) for i, length in enumerate(lengths)])
    for spans in steps:  # the second has decode rows and chunks, with and without cached tokens
        for (i, start, new), out in zip(spans, s.attend(attention, spans, window, softcap), strict=True):
            q, k, v = (t[i].to(dtype) for t in (s.q, s.k, s.v))
            stop = start + new
            expected = naive(q[start:stop], k[:stop], v[:stop], start, dim**-0.5, window, softcap)
            torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=ERROR[dtype])


@pytest.mark.parametrize(("tiles", "fixed"), [(SMALL, False), (SMALL, True), (RUNS, False)])
@pytest.mark.parametrize(("page_size", "dim"), [(16, 16), (64, 128)])
def test_a_pool_of_8_bits_is_read_as_it_is(page_size: int, dim: int, tiles: AttentionTiles, fixed: bool) -> None:
    lengths = [75, 65]
    s = Sequences(14, lengths, 4, 2, dim, page_size)
    attention = s.backend(HALF, tiles, fixed, stored=torch.float8_e4m3fn)
    s.attend(attention, [(0, 0, 40), (1, 0, 64)])
    outs = s.attend(attention, [(0, 40, 35), (1, 64, 1)])
    layer = attention.pool.pages[:, :, 1].float()
    for (i, start, stop), out in zip([(0, 40, 75), (1, 64, 65)], outs, strict=True):
        at = torch.arange(stop, device=DEVICE)
        page = torch.tensor(s.pages[i], device=DEVICE)[at // page_size]
        k, v = (layer[page, :, kind, at % page_size].cpu() for kind in (0, 1))
        assert (k - s.k[i][:stop]).abs().max() < 1  # coarse, but the right ones
        expected = naive(s.q[i][start:stop].to(HALF), k.to(HALF), v.to(HALF), start, dim**-0.5, 0, 0.0)
        torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=ERROR[HALF])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_row_gets_the_same_bits_in_any_company(fixed: bool) -> None:
    """Decode steps, and chunks cut alike: promised with and without `fixed`."""
    lengths = [80, 33, 66, 20]
    s = Sequences(7, lengths, 4, 1, 16, 16)
    crowd = s.backend(torch.float32, SMALL, fixed)
    s.attend(crowd, [(3, 0, 19), (0, 0, 60), (1, 0, 32), (2, 0, 65)])
    together = s.attend(crowd, [(0, 60, 20), (2, 65, 1), (3, 19, 1), (1, 32, 1)])
    alone = s.backend(torch.float32, SMALL, fixed)
    for i, whole in ((0, together[0]), (2, together[1]), (1, together[3])):
        start = lengths[i] - len(whole)
        s.attend(alone, [(i, 0, start)])
        assert torch.equal(s.attend(alone, [(i, start, len(whole))])[0], whole)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("window", [0, 50])
def test_a_chunk_gets_the_same_bits_however_it_is_cut(window: int, fixed: bool) -> None:
    """On a GPU that is promised with `fixed` only: without it, masked and unmasked blocks are compiled apart."""
    if DEVICE == "cuda" and not fixed:
        pytest.skip("promised with fixed=True only")
    s = Sequences(8, [90], 3, 1, 16, 16)
    attention = s.backend(torch.float32, SMALL, fixed)
    [whole] = s.attend(attention, [(0, 0, 90)], window)
    start = 0
    for new in (2, 31, 7, 50):
        [part] = s.attend(attention, [(0, start, new)], window)
        assert torch.equal(part, whole[start : start + new])
        start += new


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_fixed_a_token_gets_the_same_bits_as_a_decode_step(dtype: torch.dtype) -> None:
    s = Sequences(9, [140], 4, 1, 16, 64)
    attention = s.backend(dtype, ALIKE, fixed=True)
    [whole] = s.attend(attention, [(0, 0, 140)])
    for position in (0, 31, 63, 64, 100, 139):
        assert torch.equal(s.attend(attention, [(0, position, 1)])[0][0], whole[position])


@pytest.mark.parametrize("tiles", [SMALL, RUNS], ids=["splits", "runs"])
def test_arrivals_are_counted_back_to_nothing(tiles: AttentionTiles) -> None:
    s = Sequences(13, [400, 70, 30], 6, 2, 16, 16)
    attention = s.backend(torch.float32, tiles)
    first, second = (s.attend(attention, [(0, 399, 1), (1, 69, 1), (2, 29, 1)]) for _ in range(2))
    assert not attention._steps.scratch[2].any()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tiles", [SMALL, RUNS], ids=["splits", "runs"])
def test_a_graphs_step_is_an_eager_step_with_padding(tiles: AttentionTiles) -> None:
    s = Sequences(10, [100, 30, 65], 4, 2, 16, 16)
    attention = s.backend(torch.float32, tiles)
    s.attend(attention, [(0, 0, 99), (1, 0, 29), (2, 0, 64)])
    attention.reserve(rows=4, pages=8, tokens=300)
    for spans in ([(2, 64, 1), (0, 99, 1), (1, 29, 1)], [(1, 28, 1), (2, 63, 1)]):
        expected = s.attend(attention, spans)
        rows, (q, k, v) = s.spans(spans)
        before = attention.pool.pages.clone()
        assert attention.begin_graph(make_plan(rows, 16), 4)
        out = attention.attend(1, q.to(DEVICE), k.to(DEVICE) + 1, v.to(DEVICE)).view(q.shape)
        changed = (attention.pool.pages != before).sum((1, 2, 3, 5)).nonzero().tolist()
        assert sorted(changed) == sorted([pages[start // 16], start % 16] for start, _, pages in rows)
        attention.pool.pages.copy_(before)
        out = attention.attend(1, q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)).view(q.shape)
        assert torch.equal(out[: len(spans)], torch.cat(expected))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_graphs_step_of_chunks_and_decode_rows_is_an_eager_step_with_padding(fixed: bool) -> None:
    s = Sequences(16, [100, 30, 65, 7], 4, 2, 16, 16)
    attention = s.backend(torch.float32, SMALL, fixed)
    s.attend(attention, [(0, 0, 60), (1, 0, 29), (2, 0, 64)])
    attention.reserve(rows=4, pages=8, tokens=300, step_tokens=64)
    wanted = np.array([3, 9, 0], np.int32)
    for spans in ([(0, 60, 37), (1, 29, 1), (3, 0, 7)], [(2, 64, 1), (0, 97, 3)], [(0, 60, 40)], [(1, 29, 1)]):
        expected = s.attend(attention, spans)
        rows, (q, k, v) = s.spans(spans)
        q, k, v = (torch.cat((t, t.new_ones(64 - len(t), *t.shape[1:]))).to(DEVICE) for t in (q, k, v))
        pages = attention.pool.pages.clone()
        assert attention.begin_graph(make_plan(rows, 16), 64, wanted)
        out = attention.attend(1, q, k, v).view(q.shape)
        assert torch.equal(out[: sum(new for _, _, new in spans)], torch.cat(expected))
        assert torch.equal(attention.pool.pages, pages)  # padding stores nothing
        assert attention.reserved_wanted(3).tolist() == wanted.tolist()


def test_what_does_not_fit_a_graph_is_refused() -> None:
    s = Sequences(11, [200, 30, 65], 4, 2, 16, 16)
    attention = s.backend(torch.float32, SMALL)
    plans = {n: make_plan(s.spans(spans)[0], 16) for n, spans in enumerate(([(1, 29, 1)], [(1, 0, 2)], [(0, 199, 1)]))}
    with pytest.raises(RuntimeError, match="reserve"):
        attention.begin_graph(plans[0], 2)
    attention.reserve(rows=2, pages=8, tokens=130)
    assert attention.begin_graph(plans[0], 2)
    assert not attention.begin_graph(plans[1], 2)  # a chunk
    assert attention.begin_graph(plans[1], 2, np.array([1], np.int32))
    assert not attention.begin_graph(plans[1], 2, np.array([1, 0, 0], np.int32))  # three are wanted
    attention.reserve(rows=200, pages=8, tokens=500, step_tokens=300)
    for count, fits in ((128, True), (150, False)):  # tiles of 32 // 2 tokens: 300 have 18 and 128 more
        assert attention.begin_graph(make_plan([(0, 2, [0])] * count, 16), 300, np.zeros(200, np.int32)) == fits
    assert not attention.begin_graph(plans[2], 2)  # 13 pages
    assert not attention.begin_graph(make_plan(s.spans([(1, 29, 1), (2, 64, 1)])[0], 16), 1)  # two rows
    attention.reserve(rows=2, pages=16, tokens=100)  # 3 splits
    assert not attention.begin_graph(plans[2], 2)  # 4 splits


def test_runs_fit_a_graph_whatever_pages_are_shared() -> None:
    """Rows and pages are all that can be too many: two sequences in the pages of one have more tokens than the pool."""
    s = Sequences(11, [200], 4, 2, 16, 16)
    attention = s.backend(torch.float32, RUNS)
    s.attend(attention, [(0, 0, 200)])
    [alone] = s.attend(attention, [(0, 199, 1)])
    attention.reserve(rows=4, pages=13, tokens=208)
    rows, (q, k, v) = s.spans([(0, 199, 1)] * 4)
    assert attention.begin_graph(make_plan(rows, 16), 4)
    out = attention.attend(1, q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)).view(q.shape)
    torch.testing.assert_close(out, alone.expand(4, -1, -1), rtol=0, atol=ERROR[torch.float32])
    assert not attention.begin_graph(make_plan(s.spans([(0, 199, 1)] * 5)[0], 16), 4)


def test_shapes_that_the_kernels_do_not_take() -> None:
    for heads, dim, message in ((2, 24, "head_dim"), (2, 8, "head_dim"), (128, 16, "query heads")):
        with pytest.raises(ConfigError, match=f"{message}.*choose --attention-backend torch"):
            TritonAttention(KVPool(1, 16, 1, 1, dim, torch.float32, DEVICE), heads, 1.0)


@pytest.mark.parametrize(
    ("page_size", "dim", "itemsize", "shared", "taken"),
    [
        (64, 128, 2, 232448, True),  # an H100
        (16, 128, 2, 232448, True),
        (24, 128, 2, 232448, False),  # blocks of 64 keys would begin within pages
        (96, 128, 2, 232448, False),
        (64, 128, 2, 101376, False),  # compiled for an L4: 106,496
        (64, 128, 1, 101376, True),
        (64, 256, 2, 166912, False),  # an A100; 212,992
        (64, 256, 2, 232448, True),
        (64, 128, 4, 232448, True),  # 204,800
    ],
)
def test_runs_where_pages_and_memory_allow(page_size: int, dim: int, itemsize: int, shared: int, taken: bool) -> None:
    assert takes_runs(AttentionTiles(), page_size, dim, itemsize, shared) == taken


@pytest.mark.parametrize("page_size", [24, 48, 96])
def test_pages_of_any_size(page_size: int) -> None:
    """A decode step beside plain torch, of sequences that end within pages and blocks."""
    rnd, lengths, draw = random.Random(page_size), [65, 1, 130, 97], torch.Generator().manual_seed(1)
    rows = [(length - 1, 1, rnd.sample(range(40), -(-length // page_size))) for length in lengths]
    plan, pages = make_plan(rows, page_size), None
    q, k, v = (torch.randn(len(rows), heads, 16, generator=draw).to(DEVICE) for heads in (4, 1, 1))
    found = []
    for kind in (TritonAttention, PagedAttention):
        pool = KVPool(40, page_size, 1, 2, 16, torch.float32, DEVICE)
        pages = torch.randn(pool.pages.shape, generator=draw).to(DEVICE) if pages is None else pages
        pool.pages.copy_(pages)
        backend = kind(pool, 4, 0.25)
        backend.begin(plan)
        found.append(backend.attend(0, q, k, v).reshape(len(rows), -1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def random_plan(seed: int) -> Plan:
    rnd = random.Random(seed)
    rows = [(255, 1, list(range(16)))]  # the split's last key
    for _ in range(rnd.randrange(1, 20)):
        cached, new = rnd.randrange(0, 900), rnd.choice([1, 1, 2, 100])
        rows.append((cached, new, rnd.sample(range(100), -(-(cached + new) // 16))))
    return make_plan(rows, 16)


@pytest.mark.parametrize("seed", range(5))
def test_prefill_has_every_token_once(seed: int) -> None:
    plan = random_plan(seed)
    tiles = prefill_tiles(plan, 16)
    tokens = [(row, token + i, at + i) for row, token, count, at in tiles.tolist() for i in range(count)]
    owners = np.repeat(np.arange(len(plan.kv_lens)), np.diff(plan.q_starts))
    long = np.diff(plan.q_starts)[owners] > 1
    every = zip(owners[long], np.flatnonzero(long), plan.positions[long], strict=True)
    assert sorted(tokens) == list(every)
    assert (tiles[:, 2] <= 16).all()
    assert (np.diff(tiles[:, 2:].sum(1)) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_splits_have_every_key_once_the_longest_sequences_first(seed: int) -> None:
    plan = random_plan(seed)
    items = []
    for row in sorted(decode_rows(plan).tolist(), key=lambda row: -plan.kv_lens[row]):
        token, position = int(plan.q_starts[row]), int(plan.kv_lens[row]) - 1
        size = 128 if position < 512 else 256  # at most 4 splits
        count = position // size + 1
        for i in range(count):
            page = int(plan.pages[row, i * size // 16])
            items.append([row, token, position, i * size, min((i + 1) * size, position + 1), i, count, page])
    assert make_items(plan, 16, Cuts(128, 4, 32, 0)).tolist() == items


@pytest.mark.parametrize("seed", range(5))
def test_splits_by_the_batch_are_each_sequences_share(seed: int) -> None:
    rnd = random.Random(seed)
    cuts = Cuts(0, 32, 64, 50)
    assert cuts.sizes(np.array([1024])).tolist() == [64]  # not less than a block
    assert cuts.sizes(np.array([16384])).tolist() == [512]  # 32 splits at most
    assert cuts.sizes(np.array([1024] * 32)).tolist() == [512] * 32
    assert cuts.sizes(np.array([1024] * 128)).tolist() == [1024] * 128
    lengths = np.array([rnd.randrange(1, 5000) for _ in range(rnd.randrange(1, 80))])
    sizes = cuts.sizes(lengths)
    counts = -(-lengths // sizes)
    assert (sizes % 64 == 0).all()
    assert counts.max() <= 32
    assert counts.sum() <= cuts.most_items(len(lengths), int(lengths.sum()))
    share = lengths.sum() / 50
    assert (sizes < 1.5 * share + 64).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("block", "page_size"), [(32, 16), (16, 16), (8, 16)])
def test_runs_have_every_key_once_and_equal_shares(seed: int, block: int, page_size: int) -> None:
    plan, count = random_plan(seed), random.Random(seed).choice([1, 3, 20, 500])
    rows = decode_rows(plan)
    share = make_runs(plan, page_size, block, count)
    assert share.runs.shape == (count, 16)
    total = int(blocks_of(plan.kv_lens[rows].astype(np.int64), page_size, block).sum())
    used = share.runs[share.runs[:, 2] > 0]
    assert 0.8 * min(count, total / 2) <= len(used) <= count
    assert not share.runs[len(used) :].any()
    assert used[:, 2].sum() == total
    assert np.ptp(used[:, 2]) <= 1
    keys: dict[int, list[int]] = {int(plan.q_starts[row]): [] for row in rows}
    seen: dict[int, list[int]] = {token: [] for token in keys}
    for first, at, blocks, number, *pages in used[:, :7].tolist():
        for i, page in enumerate(pages[:blocks]):
            assert page == share.pages[(at + i * block) // page_size]
        assert share.items[first : first + number, 3].sum() == blocks
        for item in share.items[first : first + number].tolist():
            token, position, limit, length, index, parts, slot, _ = item
            assert slot == plan.slots[token]
            row = int(rows[list(keys).index(token)])
            assert position == plan.kv_lens[row] - 1
            seen[token].append(index)
            for place in range(at, at + length * block):
                key = place - limit + position
                if key <= position:
                    assert share.pages[place // page_size] == plan.pages[row, key // page_size]
                    assert place % page_size == key % page_size
                    keys[token].append(key)
            assert parts == sum(share.items[:, 0] == token)
            at += length * block
    assert np.array_equal(used[:, 8:], share.items[used[:, 0]])
    for row, token in zip(rows.tolist(), keys, strict=True):
        assert keys[token] == list(range(plan.kv_lens[row]))
        assert seen[token] == list(range(len(seen[token])))


@pytest.mark.parametrize("tiles", [SMALL, RUNS], ids=["splits", "runs"])
def test_a_packed_product_attends_as_its_parts(tiles: AttentionTiles) -> None:
    s = Sequences(12, [70, 33, 1], 4, 2, 16, 16)
    attention = s.backend(torch.float32, tiles)
    cos, sin = torch.ones(70, 16, device=DEVICE), torch.zeros(70, 16, device=DEVICE)
    for spans in ([(0, 0, 69), (1, 0, 32)], [(0, 69, 1), (1, 32, 1), (2, 0, 1)]):
        rows, (q, k, v) = s.spans(spans)
        attention.begin(make_plan(rows, 16))
        qkv = torch.cat((q, k, v), 1).flatten(1).to(DEVICE)
        found = attention.attend_qkv(1, qkv, None, 0.0, cos, sin)
        pages = attention.pool.pages.clone()
        expected = attention.attend(1, q.to(DEVICE), k.to(DEVICE), v.to(DEVICE))
        new = sum(count for _, _, count in spans)
        error = 0.0 if tiles is SMALL else ERROR[torch.float32]  # runs take the new keys from registers
        torch.testing.assert_close(found[:new], expected[:new], rtol=0, atol=error)
        assert torch.equal(attention.pool.pages, pages)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_norm_and_rotary_in_decode_are_those_of_the_kernel_apart(dtype: torch.dtype) -> None:
    s = Sequences(15, [66, 97], 6, 2, 16, 64)
    attention = s.backend(dtype, RUNS)
    s.attend(attention, [(0, 0, 65), (1, 0, 96)])
    cached = attention.pool.pages.clone()
    qkv, norm = s.randn(4, 10).view(2, 2, -1).to(DEVICE), s.randn(8, 1)[:, 0].to(DEVICE, dtype)
    cos, sin = (s.randn(100, 1)[:, 0].to(DEVICE, dtype) for _ in range(2))
    plan = make_plan(s.spans([(0, 65, 1), (1, 96, 1)])[0], 64)
    attention.begin(plan)
    found, pages = attention.attend_qkv(1, qkv, norm, 1e-6, cos, sin), attention.pool.pages.clone()
    attention.pool.pages.copy_(cached)
    positions, slots = (torch.from_numpy(x.astype(np.int32)).to(DEVICE) for x in (plan.positions, plan.slots))
    layer = attention.pool.pages[:, :, 1]
    q = fused.norm_rotate_store(qkv, norm, 1e-6, cos, sin, positions, slots, layer, 6)
    torch.testing.assert_close(pages, attention.pool.pages, rtol=ERROR[dtype], atol=ERROR[dtype])
    torch.testing.assert_close(found, attention.attend_stored(1, q), rtol=0, atol=2 * ERROR[dtype])
