"""Attention over pages: what a backend is, and ours for the CPU, whose results do not depend on the batch.

Softmax attention of one query is a sum over keys. Here the keys come in fixed blocks of the sequence (block j holds
positions [128 j, 128 (j + 1)), whoever asks and whatever the page size), and a query's result is

    m = max over all keys of s,   l = Σ_j Σ_{k in j} 2^(s_k - m),   o = (Σ_j Σ_{k in j} 2^(s_k - m) v_k) / l

where the inner sums are products of a fixed shape and the outer ones add blocks in order. A maximum has no order, and
masked keys and blocks past a query's position add exact zeros. So a query gets the same bits as the one new token of a
decode step, in a chunk of any size and in any company. Queries come in tiles: tokens × the query heads that share a
key-value head, padded to a multiple of 4 rows (fewer rows take other kernels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diptych.model.pool import KVPool
from diptych.types import I32, I64, Plan

BLOCK = 128  # keys of a block; a multiple of 32, so that no thread's share of an element-wise loop cuts a vector
TILE_ROWS = 64  # query rows of a prefill tile, about
LOG2E = math.log2(math.e)
GROUP_BYTES = 4 << 20  # keys that decode rows gather at once
SCORE_BYTES = 2 << 20  # scores of a prefill tile above which heads go one by one, to stay in the cache


class AttentionBackend(Protocol):
    """Writes and reads the KV pool for a model's layers. One step: `begin`, then `attend` for each layer."""

    def begin(self, plan: Plan) -> None:
        """Prepare what all layers share."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        """Store `k`, `v` `[rows, kv_heads, dim]` of the plan's tokens in their slots, then attend causally from `q`
        `[rows, heads, dim]` to each sequence's pages: `[rows, heads * dim]`. Rows past the plan's tokens are padding.

        `window` > 0: a token sees itself and the `window - 1` before it. `softcap` > 0: a score s is
        softcap * tanh(s / softcap).
        """


@dataclass(slots=True)
class _Items:
    """Pairs of (query tile, key block), ordered by block, then by tile; tiles come longest first, so that block j
    belongs to the first `counts[j]` tiles."""

    counts: list[int]
    tile: I64  # [items]
    block: I64  # [items]
    queries: I64  # [tiles, 1 or rows] position of each query
    num_masked: int  # only the last so many items have keys that causality hides
    device: torch.device
    tile_index: Tensor = field(init=False)  # tile, on the device
    _bias: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tile_index = torch.from_numpy(self.tile).to(self.device)

    def bias(self, window: int) -> Tensor:
        """0 where a query sees a key, else -inf: `[last items, 1, 1 or rows, block]`. Made once a step."""
        if window not in self._bias:
            last = slice(0 if window else len(self.tile) - self.num_masked, None)
            keys = self.block[last, None, None] * BLOCK + np.arange(BLOCK)
            queries = self.queries[self.tile[last], :, None]
            visible = keys <= queries
            if window:
                visible &= keys > queries - window
            bias = np.where(visible, np.float32(0), np.float32(-np.inf))
            self._bias[window] = torch.from_numpy(bias).unsqueeze(1).to(self.device)
        return self._bias[window]


@dataclass(slots=True)
class _Decode:
    """Rows with one new token each."""

    tokens: Tensor  # [tiles] index into the step's tokens
    index: Tensor  # where the items' keys are, by item, head, place in the block
    items: _Items


@dataclass(slots=True)
class _Prefill:
    """One row with several new tokens, cut into tiles (first token, number of tokens, items)."""

    index: Tensor
    tiles: list[tuple[int, int, _Items]]


class PagedAttention:
    """The CPU backend (plain torch; it runs on any device and is the reference for kernels).

    `num_heads` query heads of this rank share the pool's key-value heads evenly; scores are q·k * scale.
    """

    def __init__(self, pool: KVPool, num_heads: int, scale: float) -> None:
        self.pool = pool
        self.group = num_heads // pool.num_heads
        self.scale = scale * LOG2E
        self.run_tokens = math.gcd(BLOCK, pool.page_size)  # what a block and a page have whole numbers of
        self.tile_tokens = max(4, TILE_ROWS // self.group // 4 * 4)
        self._device = pool.pages.device
        self._jobs: list[_Decode | _Prefill] = []
        self._buffers = (torch.empty(0), torch.empty(0))

    # ---- once a step ---------------------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        slots = torch.tensor(plan.slots, device=self._device)
        self._page, self._slot = slots // self.pool.page_size, slots % self.pool.page_size
        new_tokens = np.diff(plan.q_starts)
        num_blocks = -(-plan.kv_lens // BLOCK)
        table = self._table(plan.pages, int(num_blocks.max()))
        decode = np.flatnonzero(new_tokens == 1)
        decode = decode[np.argsort(-num_blocks[decode], kind="stable")]
        self._jobs = []
        for rows in self._groups(decode, num_blocks):
            self._jobs.append(self._plan_decode(plan, rows, num_blocks[rows], table))
        for row in np.flatnonzero(new_tokens > 1):
            self._jobs.append(self._plan_prefill(plan, int(row), int(num_blocks[row]), table))

    def _groups(self, rows: I64, num_blocks: I32) -> list[I64]:
        """Cut rows into groups whose keys fit GROUP_BYTES (or single rows)."""
        key_bytes = self.pool.num_heads * BLOCK * self.pool.head_dim * self.pool.pages.element_size()
        limit = max(1, GROUP_BYTES // key_bytes)
        groups, start, size = [], 0, 0
        for at, row in enumerate(rows.tolist()):
            if size and size + num_blocks[row] > limit:
                groups.append(rows[start:at])
                start, size = at, 0
            size += int(num_blocks[row])
        if len(rows):
            groups.append(rows[start:])
        return groups

    def _plan_decode(self, plan: Plan, rows: I64, num_blocks: I32, table: I64) -> _Decode:
        owns = np.arange(num_blocks[0])[:, None] < num_blocks[None, :]  # [block, tile]
        block, tile = np.nonzero(owns)
        queries = plan.kv_lens[rows].astype(np.int64)[:, None] - 1
        items = _Items(owns.sum(1).tolist(), tile, block, queries, len(tile), self._device)
        index = self.pool.index(table[rows[tile], block], self.run_tokens)
        tokens = torch.from_numpy(plan.q_starts[rows].astype(np.int64)).to(self._device)
        return _Decode(tokens, index, items)

    def _plan_prefill(self, plan: Plan, row: int, num_blocks: int, table: I64) -> _Prefill:
        first, stop = int(plan.q_starts[row]), int(plan.q_starts[row + 1])
        cached = int(plan.kv_lens[row]) - (stop - first)
        tiles = []
        for start in range(first, stop, self.tile_tokens):
            count = min(self.tile_tokens, stop - start)
            position = cached + start - first
            tiles.append((start, count, self._tile_items(position, count)))
        return _Prefill(self.pool.index(table[row, :num_blocks], self.run_tokens), tiles)

    def _tile_items(self, position: int, count: int) -> _Items:
        """Items of one tile whose first of `count` tokens is at `position`; blocks that reach past it are masked."""
        num_blocks = -(-(position + count) // BLOCK)
        queries = position + np.arange(self.tile_tokens, dtype=np.int64).repeat(self.group)
        return _Items(
            counts=[1] * num_blocks,
            tile=np.zeros(num_blocks, np.int64),
            block=np.arange(num_blocks),
            queries=queries[None],
            num_masked=num_blocks - position // BLOCK,
            device=self._device,
        )

    def _table(self, pages: I32, num_blocks: int) -> I64:
        """The page table in runs, by block: `[rows, num_blocks, runs of a block]`. Page 0 stands where a row has none;
        its keys are masked."""
        per_page = self.pool.page_size // self.run_tokens
        runs = (pages[:, :, None].astype(np.int64) * per_page + np.arange(per_page)).reshape(len(pages), -1)
        table = np.zeros((len(pages), num_blocks * (BLOCK // self.run_tokens)), np.int64)
        width = min(table.shape[1], runs.shape[1])
        table[:, :width] = runs[:, :width]
        return table.reshape(len(pages), num_blocks, -1)

    # ---- once a layer --------------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        num_tokens = self._page.shape[0]
        self.pool.write(layer, self._page, self._slot, k[:num_tokens], v[:num_tokens])
        out = q.new_zeros(q.shape)
        for job in self._jobs:
            keys, values = self._gather(layer, job.index)
            if isinstance(job, _Decode):
                self._decode(q, keys, values, job, out, window, softcap)
            else:
                self._prefill(q, keys, values, job, out, window, softcap)
        return out.view(q.shape[0], -1)

    def _gather(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, `[items, kv_heads, block, dim]`; valid until the next call."""
        pool = self.pool
        size = index.shape[0] * self.run_tokens * pool.head_dim
        if self._buffers[0].numel() < size:
            self._buffers = (pool.pages.new_empty(size), pool.pages.new_empty(size))
        keys, values = (buffer[:size].view(index.shape[0], -1) for buffer in self._buffers)
        pool.gather(layer, index, self.run_tokens, keys, values)
        shape = (-1, pool.num_heads, BLOCK, pool.head_dim)
        return keys.view(shape), values.view(shape)

    def _decode(
        self, q: Tensor, keys: Tensor, values: Tensor, job: _Decode, out: Tensor, window: int, softcap: float
    ) -> None:
        heads, dim, group = self.pool.num_heads, self.pool.head_dim, self.group
        count = job.tokens.shape[0]
        tile = q.new_zeros(count, heads, -(-group // 4) * 4, dim)
        torch.mul(q.index_select(0, job.tokens).view(count, heads, group, dim), self.scale, out=tile[:, :, :group])
        result = attend_items(tile, keys, values, job.items, job.items.bias(window), softcap * LOG2E)
        out[job.tokens] = result[:, :, :group].reshape(count, heads * group, dim)

    def _prefill(
        self, q: Tensor, keys: Tensor, values: Tensor, job: _Prefill, out: Tensor, window: int, softcap: float
    ) -> None:
        heads, dim, group = self.pool.num_heads, self.pool.head_dim, self.group
        rows = self.tile_tokens * group
        for start, count, items in job.tiles:
            used = count * group
            tile = q.new_zeros(1, heads, rows, dim)
            source = q[start : start + count].view(count, heads, group, dim).transpose(0, 1)
            torch.mul(source, self.scale, out=tile.view(heads, self.tile_tokens, group, dim)[:, :count])
            num_items, bias = len(items.tile), items.bias(window)
            step = heads if num_items * heads * rows * BLOCK * 4 <= SCORE_BYTES else 1
            for head in range(0, heads, step):
                part = slice(head, head + step)
                k, v = keys[:num_items, part], values[:num_items, part]
                result = attend_items(tile[:, part], k, v, items, bias, softcap * LOG2E).view(step, rows, dim)[:, :used]
                target = out[start : start + count].view(count, heads, group, dim)[:, part]
                target.copy_(result.view(step, count, group, dim).transpose(0, 1))


def attend_items(q: Tensor, keys: Tensor, values: Tensor, items: _Items, bias: Tensor, softcap: float) -> Tensor:
    """The formula at the top. `q` `[tiles, h, rows, dim]` and `softcap` scaled for base 2; `keys`, `values` `[items, h,
    block, dim]`, where h is one or all of the heads in memory; `bias` for the last items. `[tiles, h, rows, dim]`."""
    num_items, heads, block, dim = keys.shape
    batch, rows = num_items * heads, q.shape[2]
    queries = q.index_select(0, items.tile_index).view(batch, rows, dim)
    scores = torch.bmm(queries, keys.reshape(batch, block, dim).transpose(1, 2)).float()
    scores = scores.view(num_items, heads, rows, block)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores[num_items - bias.shape[0] :] += bias
    highest = _fold(scores.amax(-1), items.counts, torch.maximum)
    scores -= highest.index_select(0, items.tile_index).unsqueeze(-1)
    scores.exp2_()
    total = _fold(scores.sum(-1), items.counts, torch.add)
    weights = scores.view(batch, rows, block).to(values.dtype)
    mixed = torch.bmm(weights, values.reshape(batch, block, dim)).float()
    result = _fold(mixed.view(num_items, heads, rows, dim), items.counts, torch.add)
    return result / total.unsqueeze(-1)


def _fold(parts: Tensor, counts: list[int], combine: Callable[..., Any]) -> Tensor:
    """Combine the items of each tile in the order of their blocks: `[items, …]` to `[tiles, …]`, in place."""
    total = parts[: counts[0]]
    at = counts[0]
    for count in counts[1:]:
        mine = total[:count]
        combine(mine, parts[at : at + count], out=mine)
        at += count
    return total
