"""The attention backend of the CPU: block softmax over pages, in plain torch; the reference for other backends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.model.block_softmax import BLOCK, Blocks, Items, attend_items
from diptych.model.pool import KEYS, VALUES, KVPool
from diptych.types import I32, I64, Plan

LOG2E = math.log2(math.e)
TILE_ROWS = 128  # query rows of a prefill tile, about
STREAM_BYTES = 2 << 20  # keys that decode rows gather before they use them: few calls, and they stay in a cache
DECODE_SCORE_BYTES = 16 << 20  # scores of decode rows held at once
TILE_SCORE_BYTES = 2 << 20  # scores of a prefill tile above which heads go one by one, to stay in the cache


@dataclass(slots=True)
class _Decode:
    """Rows with one new token each."""

    tokens: Tensor  # [tiles] index into the step's tokens
    stream: list[tuple[slice, Tensor]]  # pieces of the items: (item, head) pairs, and where their keys are in the pool
    items: Items


@dataclass(slots=True)
class _Prefill:
    """One row with several new tokens, cut into tiles (first token, number of tokens, items)."""

    index: Tensor  # where the row's keys are in the pool, by block, head, place
    tiles: list[tuple[int, int, Items]]


class PagedAttention:
    """See AttentionBackend. `num_heads` query heads of this rank share the pool's key-value heads evenly; scores are
    q·k * scale. Holds buffers for the keys and values at hand: one object is for one thread."""

    def __init__(self, pool: KVPool, num_heads: int, scale: float) -> None:
        self.pool = pool
        self.group = num_heads // pool.num_heads
        self.scale = scale * LOG2E
        self.run_tokens = math.gcd(BLOCK, pool.page_size)  # what a block and a page have whole numbers of
        self.tile_tokens = max(4, TILE_ROWS // self.group // 4 * 4)
        self._block_values = pool.num_heads * BLOCK * pool.head_dim  # numbers in a block of keys
        self._device = pool.pages.device
        self._jobs: list[_Decode | _Prefill] = []
        self._buffers = [torch.empty(0), torch.empty(0)]

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

    def _table(self, pages: I32, num_blocks: int) -> I64:
        """The page table in runs, by block: `[rows, num_blocks, runs of a block]`. Page 0 stands where a row has none;
        its keys are masked."""
        per_page = self.pool.page_size // self.run_tokens
        runs = (pages[:, :, None].astype(np.int64) * per_page + np.arange(per_page)).reshape(len(pages), -1)
        table = np.zeros((len(pages), num_blocks * (BLOCK // self.run_tokens)), np.int64)
        width = min(table.shape[1], runs.shape[1])
        table[:, :width] = runs[:, :width]
        return table.reshape(len(pages), num_blocks, -1)

    def _groups(self, rows: I64, num_blocks: I32) -> list[I64]:
        """Cut rows into groups whose scores fit DECODE_SCORE_BYTES (or single rows)."""
        limit = max(1, DECODE_SCORE_BYTES // (self.pool.num_heads * _padded(self.group) * BLOCK * 4))
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
        items = Items(owns.sum(1).tolist(), tile, block, queries, len(tile), self._device)
        index = self.pool.index(table[rows[tile], block], self.run_tokens)
        tokens = torch.from_numpy(plan.q_starts[rows].astype(np.int64)).to(self._device)
        return _Decode(tokens, self._pieces(index), items)

    def _pieces(self, index: Tensor) -> list[tuple[slice, Tensor]]:
        blocks = max(1, STREAM_BYTES // (self._block_values * self.pool.pages.element_size()))
        pairs = blocks * self.pool.num_heads
        pieces = index.split(pairs * (BLOCK // self.run_tokens))
        return [(slice(i * pairs, (i + 1) * pairs), piece) for i, piece in enumerate(pieces)]

    def _plan_prefill(self, plan: Plan, row: int, num_blocks: int, table: I64) -> _Prefill:
        first, stop = int(plan.q_starts[row]), int(plan.q_starts[row + 1])
        cached = int(plan.kv_lens[row]) - (stop - first)
        tiles = []
        for start in range(first, stop, self.tile_tokens):
            count = min(self.tile_tokens, stop - start)
            tiles.append((start, count, self._tile_items(cached + start - first, count)))
        return _Prefill(self.pool.index(table[row, :num_blocks], self.run_tokens), tiles)

    def _tile_items(self, position: int, count: int) -> Items:
        """Items of one tile whose first of `count` tokens is at `position`; blocks that reach past it are masked."""
        num_blocks = -(-(position + count) // BLOCK)
        queries = position + np.arange(_padded(count * self.group), dtype=np.int64) // self.group
        return Items(
            counts=[1] * num_blocks,
            tile=np.zeros(num_blocks, np.int64),
            block=np.arange(num_blocks),
            queries=queries[None],
            num_masked=num_blocks - position // BLOCK,
            device=self._device,
        )

    # ---- once a layer --------------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        num_tokens = self._page.shape[0]
        self.pool.write(layer, self._page, self._slot, k[:num_tokens], v[:num_tokens])
        out = q.new_zeros(q.shape)
        for job in self._jobs:
            if isinstance(job, _Decode):
                self._decode(layer, q, job, out, window, softcap * LOG2E)
            else:
                self._prefill(layer, q, job, out, window, softcap * LOG2E)
        return out.view(q.shape[0], -1)

    def _decode(self, layer: int, q: Tensor, job: _Decode, out: Tensor, window: int, softcap: float) -> None:
        heads, dim, group = self.pool.num_heads, self.pool.head_dim, self.group
        count = job.tokens.shape[0]
        tile = q.new_zeros(count, heads, _padded(self.group), dim)
        torch.mul(q.index_select(0, job.tokens).view(count, heads, group, dim), self.scale, out=tile[:, :, :group])
        keys, values = self._stream(layer, KEYS, job), self._stream(layer, VALUES, job)
        result = attend_items(tile, keys, values, job.items, window, softcap)
        out[job.tokens] = result[:, :, :group].reshape(count, heads * group, dim)

    def _stream(self, layer: int, kind: int, job: _Decode) -> Iterator[tuple[slice, Tensor]]:
        """The job's blocks, piece by piece, all in one buffer."""
        for part, index in job.stream:
            yield part, self._gather(layer, kind, index, 0)

    def _prefill(self, layer: int, q: Tensor, job: _Prefill, out: Tensor, window: int, softcap: float) -> None:
        heads, dim, group = self.pool.num_heads, self.pool.head_dim, self.group
        keys, values = (
            self._gather(layer, kind, job.index, kind).view(-1, heads, BLOCK, dim) for kind in (KEYS, VALUES)
        )
        for start, count, items in job.tiles:
            used, rows = count * group, _padded(count * group)
            tile = q.new_zeros(1, heads, rows, dim)
            source = q[start : start + count].view(count, heads, group, dim).transpose(0, 1)
            torch.mul(source, self.scale, out=tile[0, :, :used].view(heads, count, group, dim))
            target = out[start : start + count].view(count, heads, group, dim)
            blocks = len(items.tile)
            step = heads if blocks * heads * rows * BLOCK * 4 <= TILE_SCORE_BYTES else 1
            for head in range(0, heads, step):
                part = slice(head, head + step)
                k, v = _whole(keys[:blocks, part]), _whole(values[:blocks, part])
                result = attend_items(tile[:, part], k, v, items, window, softcap)[0, :, :used]
                target[:, part].copy_(result.view(step, count, group, dim).transpose(0, 1))

    def _gather(self, layer: int, kind: int, index: Tensor, buffer: int) -> Tensor:
        """Blocks of keys or values, `[(item, head) pairs, BLOCK, dim]`; valid until the buffer's next use."""
        width = self.run_tokens * self.pool.head_dim
        size = index.shape[0] * width
        if self._buffers[buffer].numel() < size:
            self._buffers[buffer] = self.pool.pages.new_empty(size)
        target = self._buffers[buffer][:size].view(-1, width)
        torch.index_select(self.pool.source(layer, kind, self.run_tokens), 0, index, out=target)
        return target.view(-1, BLOCK, self.pool.head_dim)


def _padded(rows: int) -> int:
    return -(-rows // 4) * 4


def _whole(blocks: Tensor) -> Blocks:
    """`[items, heads, BLOCK, dim]` as Blocks in one piece, for one or all of the heads in memory."""
    return [(slice(None), blocks.reshape(-1, *blocks.shape[2:]))]
