"""Softmax attention over fixed blocks of keys, whose results do not depend on what else is computed beside them.

Attention of one query is a sum over keys. Here the keys come in fixed blocks of the sequence (block j holds positions
[128 j, 128 (j + 1)), whoever asks and whatever the page size), and a query's result is

    m = max over all keys of s,   l = Σ_j Σ_{k in j} 2^(s_k - m),   o = (Σ_j Σ_{k in j} 2^(s_k - m) v_k) / l

where the inner sums are products of a fixed shape and the outer ones add blocks in a fixed tree. A maximum has no
order, and masked keys and blocks past a query's position add exact zeros. So a query gets the same bits as the one new
token of a decode step, in a chunk of any size and in any company. Queries come in tiles: tokens × the query heads that
share a key-value head, padded to a multiple of 4 rows (fewer rows take other kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.types import I64

BLOCK = 128  # keys of a block; a multiple of 32, so that no thread's share of an element-wise loop cuts a vector

# Keys or values as they are needed: which (item, head) pairs, and their blocks `[pairs, BLOCK, dim]`.
Blocks = Iterable[tuple[slice, Tensor]]


@dataclass(slots=True)
class Items:
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
        """0 where a query sees a key, else -inf: `[last items, 1, 1 or rows, BLOCK]`. Made once a step."""
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


def attend_items(q: Tensor, keys: Blocks, values: Blocks, items: Items, window: int, softcap: float) -> Tensor:
    """The formula above: `[tiles, heads, rows, dim]` from `q` of this shape. `q` and `softcap` are scaled for base 2.

    `keys`, then `values`, are gone through once, in the order (item, head).
    """
    num_items, (_, heads, rows, dim) = len(items.tile), q.shape
    queries = q.index_select(0, items.tile_index).view(num_items * heads, rows, dim)
    products = q.new_empty(num_items * heads, rows, BLOCK)
    for part, k in keys:
        torch.bmm(queries[part], k.transpose(1, 2), out=products[part])
    scores = products.float().view(num_items, heads, rows, BLOCK)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    bias = items.bias(window)
    scores[num_items - bias.shape[0] :] += bias
    highest = _fold(scores.amax(-1), items.counts, torch.maximum)
    scores -= highest.index_select(0, items.tile_index).unsqueeze(-1)
    scores.exp2_()
    total = _fold(scores.sum(-1), items.counts, torch.add)
    weights = scores.view(num_items * heads, rows, BLOCK).to(q.dtype)
    mixed = q.new_empty(num_items * heads, rows, dim)
    for part, v in values:
        torch.bmm(weights[part], v, out=mixed[part])
    result = _fold(mixed.float().view(num_items, heads, rows, dim), items.counts, torch.add)
    return (result / total.unsqueeze(-1)).to(q.dtype)


def _fold(parts: Tensor, counts: list[int], combine: Callable[..., Any]) -> Tensor:
    """Combine the items of each tile: `[items, …]` to `[tiles, …]`; `parts` is lost.

    In a tree over the blocks: (0, 1), (2, 3), …, then pairs of pairs. What a tile gets depends on its own blocks alone:
    a block beyond them would only be combined with results that are complete.
    """
    if counts[0] == counts[-1]:
        return _fold_even(parts.view(len(counts), counts[0], *parts.shape[1:]), combine)
    level = list(parts.split(counts))
    while len(level) > 1:
        for left, right in zip(level[::2], level[1::2], strict=False):
            mine = left[: len(right)]
            combine(mine, right, out=mine)
        level = level[::2]
    return level[0]


def _fold_even(parts: Tensor, combine: Callable[..., Any]) -> Tensor:
    """The same tree where all tiles have all blocks: `[blocks, tiles, …]` to `[tiles, …]`, a level at a time."""
    while len(parts) > 1:
        pairs = len(parts) // 2
        left = parts[::2]
        combine(left[:pairs], parts[1::2], out=left[:pairs])
        parts = left
    return parts[0]
