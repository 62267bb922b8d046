"""What the attention kernels do in a step, as arrays made on the CPU from the plan alone: no device, no torch.

A tile is some consecutive new tokens of one sequence: (row of the page table, first token of the step, number of
tokens, position of the first). Sequences with one new token are decode tiles, whose keys are cut into splits. An item
is a split of a tile: (row, token, position, first key, the key after the last, which of the tile's items, how many they
are, the first key's page). The other sequences are cut into prefill tiles, those with the most keys first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diptych.types import I32, I64, Plan

TILE_FIELDS = 4
ITEM_FIELDS = 8


@dataclass(slots=True)
class Schedule:
    """See above; `first_items[i]` is the first item of decode tile i, and the last entry the number of items."""

    decode_tiles: I32  # [decode tiles, 4]
    items: I32  # [items, 8]
    first_items: I32  # [decode tiles + 1]
    prefill_tiles: I32  # [prefill tiles, 4]


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where sequences are cut. `split` keys to a split, whatever the batch is; doubled where a sequence would have more
    than `max_splits`. Or, `split` being 0, each has as many as its share of `items`, which should be in a step."""

    split: int
    max_splits: int
    block: int  # splits are multiples of it
    items: int
    tile_tokens: int  # at most in a prefill tile

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


def make_schedule(plan: Plan, page_size: int, cuts: Cuts) -> Schedule:
    new = np.diff(plan.q_starts)
    decode = np.flatnonzero(new == 1)
    lengths = plan.kv_lens[decode].astype(np.int64)
    ones = np.ones(len(decode), np.int32)
    tiles = np.stack((decode, plan.q_starts[decode], ones, lengths - 1), 1).astype(np.int32)
    sizes = cuts.sizes(lengths)
    splits = -(-lengths // sizes)
    first = np.zeros(len(decode) + 1, np.int32)
    np.cumsum(splits, out=first[1:])
    tile = np.repeat(np.arange(len(decode)), splits)
    index = np.arange(len(tile)) - first[tile]
    start = index * sizes[tile]
    stop = np.minimum(start + sizes[tile], lengths[tile])
    rows = decode[tile]
    pages = plan.pages[rows, start // page_size]
    fields = (rows, tiles[tile, 1], tiles[tile, 3], start, stop, index, splits[tile], pages)
    items = np.stack(fields, 1).astype(np.int32)
    prefill = _prefill_tiles(plan, np.flatnonzero(new > 1), cuts.tile_tokens)
    return Schedule(tiles, items, first, prefill)


def _prefill_tiles(plan: Plan, rows: np.ndarray, tile_tokens: int) -> I32:
    parts = [np.zeros((0, TILE_FIELDS), np.int32)]
    for row in rows.tolist():
        first, stop = int(plan.q_starts[row]), int(plan.q_starts[row + 1])
        start = np.arange(first, stop, tile_tokens, dtype=np.int32)
        part = np.empty((len(start), TILE_FIELDS), np.int32)
        part[:, 0], part[:, 1] = row, start
        part[:, 2] = np.minimum(tile_tokens, stop - start)
        part[:, 3] = plan.kv_lens[row] - stop + start
        parts.append(part)
    tiles = np.concatenate(parts)
    return tiles[np.argsort(-(tiles[:, 3] + tiles[:, 2]), kind="stable")]
