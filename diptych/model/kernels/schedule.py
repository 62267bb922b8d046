"""What the attention kernels do in a step, as arrays made on the CPU from the plan alone: no device, no torch.

Sequences with one new token are for decode, whose work is cut in one of two ways: `make_items` (each sequence into
splits) or `make_runs` (all of them together into equal shares). The others are cut into prefill tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diptych.types import I32, I64, Plan

TILE_FIELDS = 4
ITEM_FIELDS = 8  # of make_items
RUN_FIELDS, SHARE_FIELDS = 16, 8  # of make_runs
LEAST_BLOCKS = 2  # of a run, where there are so many


def decode_rows(plan: Plan) -> I64:
    """The rows of the plan with one new token."""
    return np.flatnonzero(plan.q_starts[1:] - plan.q_starts[:-1] == 1)


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where sequences are cut. `split` keys to a split, whatever the batch is; doubled where a sequence would have more
    than `max_splits`. Or, `split` being 0, each has as many as its share of `items`, which should be in a step."""

    split: int
    max_splits: int
    block: int  # splits are multiples of it
    items: int

    def sizes(self, lengths: I64) -> I64:
        """The keys of a split, by sequence."""
        if not self.split:
            share = max(1.0, lengths.sum() / self.items)
            counts = np.clip(np.rint(lengths / share), 1, self.max_splits).astype(np.int64)
            return -(-lengths // (counts * self.block)) * self.block
        sizes = np.full(len(lengths), self.split, np.int64)
        while (large := lengths > sizes * self.max_splits).any():
            sizes[large] *= 2
        return sizes

    def most_items(self, rows: int, tokens: int) -> int:
        """Of a step of `rows` sequences with `tokens` tokens in all."""
        return rows + (tokens // self.split if self.split else self.items)


def make_items(plan: Plan, page_size: int, cuts: Cuts) -> I32:
    """The splits of decode, the sequences with the most keys first: `[items, 8]` of (row of the page table, token of
    the step, its position, first key, the key after the last, which of the sequence's splits, how many they are, the
    first key's page)."""
    rows = decode_rows(plan)
    rows = rows[np.argsort(-plan.kv_lens[rows], kind="stable")]
    lengths = plan.kv_lens[rows].astype(np.int64)
    sizes = cuts.sizes(lengths)
    counts = -(-lengths // sizes)
    first = np.cumsum(counts) - counts
    of = np.repeat(np.arange(len(rows)), counts)
    index = np.arange(len(of)) - first[of]
    start = index * sizes[of]
    stop = np.minimum(start + sizes[of], lengths[of])
    pages = plan.pages[rows[of], start // page_size]
    fields = (rows[of], plan.q_starts[rows[of]], lengths[of] - 1, start, stop, index, counts[of], pages)
    return np.stack(fields, 1).astype(np.int32)


@dataclass(slots=True)
class Runs:
    """The shares of decode. All keys, block by block and sequence by sequence, are one line; each sequence begins at a
    new page and block of it, and `pages` are its pages. A run is a stretch of the line; an item is what a run and a
    sequence have in common.

    `runs` `[count, 16]`: first item, place in the line, blocks, items, pages of the first three blocks, 0, and the
    first item. `items` `[items, 8]`: token of the step, its position, its place in the line, blocks, which of the
    sequence's items, how many they are, the token's slot, 0.
    """

    runs: I32
    items: I32
    pages: I32


def make_runs(plan: Plan, page_size: int, block: int, count: int) -> Runs:
    """Up to `count` runs, which differ by a block at most; the rest have none. There is a row of decode."""
    rows = decode_rows(plan)
    lengths = plan.kv_lens[rows].astype(np.int64)
    blocks = blocks_of(lengths, page_size, block)
    line = _line(tuple(blocks.tolist()), count)
    of = line.of
    items = line.items.copy()
    items[:, 0] = plan.q_starts[rows[of]]
    items[:, 1] = lengths[of] - 1
    items[:, 2] = line.firsts * block + items[:, 1]
    items[:, 6] = plan.slots[items[:, 0]]
    counts = blocks * block // page_size
    table = plan.pages[rows]
    if (missing := int(counts.max(initial=0)) - table.shape[1]) > 0:
        table = np.pad(table, ((0, 0), (0, missing)))
    pages = table[np.arange(table.shape[1]) < counts[:, None]]
    runs = line.runs.copy()
    used = len(line.first_items)
    runs[:, 1] *= block
    ahead = (runs[:used, 1:2] + np.arange(3) * block) // page_size
    runs[:used, 4:7] = pages[np.minimum(ahead, len(pages) - 1)]
    runs[:used, 8:] = items[line.first_items]
    return Runs(runs, items, pages)


@dataclass(frozen=True, slots=True)
class _Line:
    """What of the Runs follows from the sequences' blocks alone. Of each item: its sequence (`of`), and where in the
    line that begins (`firsts`, in blocks). `first_items` are those of the runs that there are."""

    of: I64
    firsts: I64
    first_items: I64
    items: I32
    runs: I32  # places in blocks


@lru_cache(maxsize=64)  # a sequence's blocks change but once in so many steps as a block has keys
def _line(blocks: tuple[int, ...], count: int) -> _Line:
    ends = np.cumsum(np.array(blocks, np.int64))
    firsts, total = ends - blocks, int(ends[-1])
    starts, bounds = _cut(firsts, total, count)
    of = np.searchsorted(ends, starts, "right")
    first_items = np.searchsorted(starts, firsts)
    items = np.zeros((len(starts), SHARE_FIELDS), np.int32)
    items[:, 3] = np.diff(starts, append=total)
    items[:, 4] = np.arange(len(starts)) - first_items[of]
    items[:, 5] = np.diff(first_items, append=len(starts))[of]
    of_run = np.searchsorted(starts, bounds)
    runs, used = np.zeros((count, RUN_FIELDS), np.int32), len(bounds) - 1
    runs[:used, 0], runs[:used, 1] = of_run[:-1], bounds[:-1]
    runs[:used, 2], runs[:used, 3] = np.diff(bounds), np.diff(of_run)
    return _Line(of, firsts[of], of_run[:-1], items, runs)


def _cut(firsts: I64, total: int, count: int) -> tuple[I64, I64]:
    """Where items and runs begin; the runs' last number is the line's end. A few runs less than there could be are
    better where fewer items come of them: an item costs about as much as a block."""
    most = max(1, min(count, -(-total // LEAST_BLOCKS)))
    used = np.arange(most, most - most // 8 - 1, -1)
    nearest = -(-firsts * used[:, None] // total)  # the run that may begin with the sequence
    met = (nearest * total // used[:, None] == firsts).sum(1)
    best = used[np.argmin(-(-total // used) + (len(firsts) + used - met) / used)]
    bounds = np.arange(best + 1) * total // best
    return np.unique(np.concatenate((firsts, bounds[:-1]))), bounds


def blocks_of(lengths: I64, page_size: int, block: int) -> I64:
    """The blocks of sequences of so many keys in a line of `make_runs`: whole pages and whole blocks."""
    unit = max(page_size, block)
    return -(-lengths // unit) * (unit // block)


def prefill_tiles(plan: Plan, tile_tokens: int) -> I32:
    """Sequences with several new tokens, cut into tiles of consecutive ones, those with the most keys first: `[tiles,
    4]` of (row of the page table, first token of the step, number of tokens, position of the first)."""
    parts = [np.zeros((0, TILE_FIELDS), np.int32)]
    for row in np.flatnonzero(plan.q_starts[1:] - plan.q_starts[:-1] > 1).tolist():
        first, stop = int(plan.q_starts[row]), int(plan.q_starts[row + 1])
        start = np.arange(first, stop, tile_tokens, dtype=np.int32)
        part = np.empty((len(start), TILE_FIELDS), np.int32)
        part[:, 0], part[:, 1] = row, start
        part[:, 2] = np.minimum(tile_tokens, stop - start)
        part[:, 3] = plan.kv_lens[row] - stop + start
        parts.append(part)
    tiles = np.concatenate(parts)
    return tiles[np.argsort(-(tiles[:, 3] + tiles[:, 2]), kind="stable")]
