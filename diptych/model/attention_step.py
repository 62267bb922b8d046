"""What the attention kernels read in a step: made from the plan, and brought to the device in one copy.

For CUDA graphs it stays in one place (`reserve`): a graph captured after `begin_graph` reads, whenever it is replayed,
what the latest `begin_graph` has put there. How many pieces of work there are is read on the device, so one graph
serves any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diptych.model.attention_tiles import AttentionTiles
from diptych.model.kernels.metadata import DeviceArrays, Uploader
from diptych.model.kernels.schedule import (
    ITEM_FIELDS,
    RUN_FIELDS,
    TILE_FIELDS,
    Cuts,
    blocks_of,
    decode_rows,
    make_items,
    make_runs,
    prefill_tiles,
)
from diptych.model.pool import KVPool
from diptych.types import I32, Plan

WANTED = 3  # pieces of a decode step's work, for each multiprocessor
PROMPTS = 128  # with so many or less, a captured step has room for the tiles of all


@dataclass(slots=True)
class Step:
    """What the kernels read, and how many programs to start."""

    arrays: DeviceArrays
    num_tokens: int  # that have slots; padding among them has slot -1
    decode: bool  # whether there may be rows of decode
    prefill_tiles: int  # at most
    in_runs: bool
    num_items: int  # at most
    parts: Tensor  # see store_part
    stats: Tensor
    arrivals: Tensor


class Steps:
    """Makes them. `num_runs`: see make_runs; `padded_group`: rows of a tile that one token takes."""

    def __init__(self, pool: KVPool, tiles: AttentionTiles, padded_group: int, processors: int) -> None:
        self.num_runs = max(1, tiles.run_programs * processors // pool.num_heads)
        self._pool, self._tiles, self._padded_group = pool, tiles, padded_group
        self._device = pool.pages.device
        self._uploader = Uploader(self._device)
        items = -(-WANTED * processors // pool.num_heads)
        self._cuts = Cuts(tiles.split, tiles.max_splits, tiles.decode_n, items)
        self.scratch = self._new_scratch(0)  # of steps that are no graph's
        self._reserved: Step | None = None
        self._most_pages = 0

    def begin(self, plan: Plan) -> Step:
        arrays = self._arrays(plan, len(plan.slots), None)
        target = DeviceArrays({name: len(array) for name, array in arrays.items()}, self._device)
        self._uploader.upload(arrays, target)
        items = len(arrays["items"]) // ITEM_FIELDS
        if self.scratch[1].shape[0] < items:
            self.scratch = self._new_scratch(2 * items)
        tiles, in_runs = len(arrays["prefill_tiles"]) // TILE_FIELDS, len(arrays["runs"]) > 0
        return Step(target, len(plan.slots), len(decode_rows(plan)) > 0, tiles, in_runs, items, *self.scratch)

    def reserve(self, rows: int, pages: int, tokens: int, step_tokens: int) -> None:
        """See TritonAttention.reserve."""
        runs = self.num_runs if self._tiles.run_rows else 0
        items = max(self._cuts.most_items(rows, tokens), rows + runs)
        block, size = self._tiles.decode_n, self._pool.page_size
        unit = int(blocks_of(np.array([1]), size, block)[0]) * block
        sizes = {"sizes": 3, "ids": step_tokens, "slots": step_tokens, "positions": step_tokens, "wanted": rows}
        sizes |= {"prefill_tiles": self._most_tiles(step_tokens) * TILE_FIELDS}
        sizes |= {"runs": runs * RUN_FIELDS, "items": items * ITEM_FIELDS, "pages": rows * (pages + unit // size - 1)}
        target = DeviceArrays(sizes, self._device)
        self._reserved = Step(target, 0, True, 0, False, items, *self._new_scratch(items))
        self._most_pages = pages

    def begin_graph(self, plan: Plan, num_tokens: int, wanted: I32 | None) -> Step | None:
        """See TritonAttention.begin_graph; None if the plan does not fit."""
        if self._reserved is None:
            raise RuntimeError("begin_graph comes after reserve")
        most = 0 if wanted is None else self._most_tiles(num_tokens)
        if len(plan.slots) > num_tokens or plan.pages.shape[1] > self._most_pages:
            return None
        arrays = self._arrays(plan, num_tokens, wanted)
        if len(arrays["prefill_tiles"]) > most * TILE_FIELDS or not self._reserved.arrays.holds(arrays):
            return None
        self._uploader.upload(arrays, self._reserved.arrays)
        return replace(self._reserved, num_tokens=num_tokens, prefill_tiles=most, in_runs=len(arrays["runs"]) > 0)

    def reserved(self, name: str, count: int) -> Tensor:
        """The first numbers, int32, of what the latest `begin_graph` has brought by that name."""
        assert self._reserved is not None
        return self._reserved.arrays[name][:count]

    def _most_tiles(self, num_tokens: int) -> int:
        return num_tokens // self._tile_tokens + min(PROMPTS, num_tokens // 2)

    @property
    def _tile_tokens(self) -> int:
        return self._tiles.prefill_m // self._padded_group

    def _arrays(self, plan: Plan, num_tokens: int, wanted: I32 | None) -> dict[str, I32]:
        """What a step's kernels read; slots are -1 from the plan's tokens to `num_tokens`."""
        tiles, size = self._tiles, self._pool.page_size
        prefill = prefill_tiles(plan, self._tile_tokens)
        if wanted is None and num_tokens <= tiles.run_rows and len(plan.kv_lens) and not len(prefill):
            share = make_runs(plan, size, tiles.decode_n, self.num_runs)
            runs, items, pages = share.runs, share.items, share.pages
        else:
            items, pages = make_items(plan, size, self._cuts), plan.pages
            runs = np.zeros(0, np.int32)
        return {
            "sizes": np.array((len(items), plan.pages.shape[1], len(prefill)), np.int32),
            "ids": padded(plan.token_ids, num_tokens, 0),
            "slots": padded(plan.slots, num_tokens, -1),
            "positions": padded(plan.positions, num_tokens, 0),
            "wanted": np.zeros(0, np.int32) if wanted is None else wanted,
            "prefill_tiles": prefill.reshape(-1),
            "runs": runs.reshape(-1),
            "items": items.reshape(-1),
            "pages": pages.reshape(-1),
        }

    def _new_scratch(self, items: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, rows = self._pool.num_heads, self._padded_group
        parts = torch.empty(items, heads, rows, self._pool.head_dim, dtype=torch.float32, device=self._device)
        stats = torch.empty(items, heads, 2, rows, dtype=torch.float32, device=self._device)
        return parts, stats, torch.zeros(items, heads, dtype=torch.int32, device=self._device)


def padded(values: np.ndarray, size: int, padding: int) -> I32:
    array = np.full(size, padding, np.int32)
    array[: len(values)] = values
    return array
