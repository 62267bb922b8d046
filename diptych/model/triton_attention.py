"""The attention backend of GPUs: Triton kernels over the page table. The reference is PagedAttention.

For CUDA graphs the step's metadata stays in one place (`reserve`): a graph captured after `begin_graph` reads, whenever
it is replayed, what the latest `begin_graph` has put there. The numbers of tiles and items are read on the device, so
one graph serves any lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
from torch import Tensor

from diptych.errors import ConfigError
from diptych.model.attention_tiles import FIXED_TILES, AttentionTiles, takes_runs
from diptych.model.kernels import fused, launch
from diptych.model.kernels.decode import decode_kernel
from diptych.model.kernels.flash import ROWS, Flash
from diptych.model.kernels.metadata import DeviceArrays, Uploader
from diptych.model.kernels.prefill import prefill_kernel
from diptych.model.kernels.runs import run_kernel
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

LOG2E = math.log2(math.e)
MIN_ROWS = 16  # of a tile: what tensor cores take
WANTED = 3  # pieces of a decode step's work, for each multiprocessor
FIRST_PROGRAMS = 3  # for each multiprocessor, while it is not known how many are there at once


@dataclass(slots=True)
class _Step:
    """What the kernels read, and how many programs to start."""

    arrays: DeviceArrays
    num_tokens: int  # that have slots; padding among them has slot -1
    decode_rows: int
    prefill_tiles: int
    table_stride: int
    in_runs: bool
    num_items: int  # at most
    parts: Tensor  # see store_part
    stats: Tensor
    arrivals: Tensor


class TritonAttention:
    """See AttentionBackend; rows of padding come out undefined. `num_heads` query heads of this rank share the pool's
    key-value heads evenly; scores are q·k * scale. `fixed`: one new token is computed by the same operations alone, as
    a decode step and in a chunk, and whatever the other rows are (for --deterministic). Otherwise the number of keys
    of the whole step decides how they are split.

    Raises ConfigError for shapes that the kernels do not take. One object is for one thread and one stream.
    """

    def __init__(
        self, pool: KVPool, num_heads: int, scale: float, *, fixed: bool = False, tiles: AttentionTiles | None = None
    ) -> None:
        self.pool, self.num_heads, self.scale, self.fixed = pool, num_heads, scale * LOG2E, fixed
        self.tiles = tiles or (FIXED_TILES if fixed else AttentionTiles())
        self.group = num_heads // pool.num_heads
        self.padded_group = triton.next_power_of_2(self.group)
        self._check()
        self._device = pool.pages.device
        itemsize = pool.pages.element_size()
        if not takes_runs(self.tiles, pool.page_size, pool.head_dim, itemsize, _shared_bytes(self._device)):
            self.tiles = replace(self.tiles, run_rows=0)
        self._flash: Flash | None = None
        if self.tiles.flash and Flash.takes(pool):
            self._flash = Flash(pool, num_heads, self.padded_group, self.scale)
            self.tiles = replace(self.tiles, prefill_m=ROWS, prefill_warps=8)  # the schedule's tiles are for both
        self._uploader = Uploader(self._device)
        items = -(-WANTED * _processors(self._device) // pool.num_heads)
        of = self.tiles
        self._cuts = Cuts(of.split, of.max_splits, of.decode_n, items)
        self._runs = max(1, of.run_programs * _processors(self._device) // pool.num_heads)
        self._programs: dict[tuple[bool, bool, torch.dtype], int] = {}
        self._scratch = self._new_scratch(0)
        self._reserved: _Step | None = None
        self._step: _Step | None = None

    def _check(self) -> None:
        dim = self.pool.head_dim
        if dim & (dim - 1) or dim < MIN_ROWS:
            raise ConfigError(
                f"--attention-backend triton takes a head_dim that is a power of two from 16 on, not {dim}: "
                "choose --attention-backend torch"
            )
        if self.padded_group > min(self.tiles.prefill_m, 64):
            raise ConfigError(
                f"--attention-backend triton takes up to 64 query heads for a key-value head, not {self.group}: "
                "choose --attention-backend torch"
            )

    # ---- once a step ---------------------------------------------------------------------------------------------

    def begin(self, plan: Plan) -> None:
        arrays = self._arrays(plan, len(plan.slots))
        target = DeviceArrays({name: len(array) for name, array in arrays.items()}, self._device)
        self._uploader.upload(arrays, target)
        items = len(arrays["items"]) // ITEM_FIELDS
        if self._scratch[1].shape[0] < items:
            self._scratch = self._new_scratch(2 * items)
        prefill, decode = len(arrays["prefill_tiles"]) // TILE_FIELDS, len(decode_rows(plan))
        in_runs = len(arrays["runs"]) > 0
        stride = plan.pages.shape[1]
        self._step = _Step(target, len(plan.slots), decode, prefill, stride, in_runs, items, *self._scratch)

    def reserve(self, rows: int, pages: int, tokens: int) -> None:
        """Memory for decode steps in CUDA graphs: up to `rows` sequences of up to `pages` pages each, with `tokens` in
        all. Graphs captured before are void."""
        runs = self._runs if self.tiles.run_rows else 0
        items = max(self._cuts.most_items(rows, tokens), rows + runs)
        unit = int(blocks_of(np.array([1]), self.pool.page_size, self.tiles.decode_n)[0]) * self.tiles.decode_n
        sizes = {"sizes": 2, "ids": rows, "slots": rows, "positions": rows, "prefill_tiles": 0}
        sizes |= {"runs": runs * RUN_FIELDS, "items": items * ITEM_FIELDS}
        sizes |= {"pages": rows * (pages + unit // self.pool.page_size - 1)}
        target = DeviceArrays(sizes, self._device)
        self._reserved = _Step(target, rows, rows, 0, pages, False, items, *self._new_scratch(items))

    def begin_graph(self, plan: Plan, num_rows: int) -> bool:
        """As `begin`, but into the reserved memory and for `num_rows` rows, those past the plan's being padding. False,
        with nothing changed, if the plan does not fit, or has rows of several tokens."""
        if self._reserved is None:
            raise RuntimeError("begin_graph comes after reserve")
        reserved = self._reserved
        if len(plan.slots) > num_rows or plan.pages.shape[1] > reserved.table_stride:
            return False
        arrays = self._arrays(plan, num_rows)
        if not reserved.arrays.holds(arrays):
            return False
        self._uploader.upload(arrays, reserved.arrays)
        in_runs = len(arrays["runs"]) > 0
        self._step = replace(reserved, num_tokens=num_rows, decode_rows=num_rows, in_runs=in_runs)
        return True

    def reserved_ids(self, num_rows: int) -> Tensor:
        """The token ids that the latest `begin_graph` brought, int32 `[num_rows]`: they travel with the rest."""
        assert self._reserved is not None
        return self._reserved.arrays["ids"][:num_rows]

    def _arrays(self, plan: Plan, num_rows: int) -> dict[str, I32]:
        """What a step's kernels read; slots are -1 from the plan's tokens to `num_rows`."""
        tiles, size = self.tiles, self.pool.page_size
        prefill = prefill_tiles(plan, tiles.prefill_m // self.padded_group)
        if num_rows <= tiles.run_rows and len(plan.kv_lens) and not len(prefill):
            share = make_runs(plan, size, tiles.decode_n, self._runs)
            runs, items, pages = share.runs, share.items, share.pages
        else:
            items, pages = make_items(plan, size, self._cuts), plan.pages
            runs = np.zeros(0, np.int32)
        return {
            "sizes": np.array((len(items), plan.pages.shape[1]), np.int32),
            "ids": _padded(plan.token_ids, num_rows, 0),
            "slots": _padded(plan.slots, num_rows, -1),
            "positions": _padded(plan.positions, num_rows, 0),
            "prefill_tiles": prefill.reshape(-1),
            "runs": runs.reshape(-1),
            "items": items.reshape(-1),
            "pages": pages.reshape(-1),
        }

    def _new_scratch(self, items: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, rows = self.pool.num_heads, self.padded_group
        parts = torch.empty(items, heads, rows, self.pool.head_dim, dtype=torch.float32, device=self._device)
        stats = torch.empty(items, heads, 2, rows, dtype=torch.float32, device=self._device)
        return parts, stats, torch.zeros(items, heads, dtype=torch.int32, device=self._device)

    # ---- once a layer --------------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        step = self._begun()
        slots = step.arrays["slots"][: step.num_tokens]
        fused.store_kv(k, v, slots, self.pool.pages[:, :, layer])
        return self.attend_stored(layer, q, window, softcap)

    def attend_qkv(
        self,
        layer: int,
        qkv: Tensor,
        norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """`attend` from the product of the packed q, k and v: norms and rotary in the kernel that writes the KV. See
        fused.norm_rotate_store."""
        step = self._begun()
        pages = self.pool.pages[:, :, layer]
        if step.in_runs and (launch.options()["OVERLAP"] if self.tiles.run_new is None else self.tiles.run_new):
            out = torch.empty(qkv.shape[-2], self.num_heads * self.pool.head_dim, dtype=cos.dtype, device=qkv.device)
            self._run(step, pages, qkv, out, (norm, eps, cos, sin))
            return out
        slots, positions = (step.arrays[name][: step.num_tokens] for name in ("slots", "positions"))
        q = fused.norm_rotate_store(qkv, norm, eps, cos, sin, positions, slots, pages, self.num_heads)
        return self.attend_stored(layer, q, window, softcap)

    def attend_stored(self, layer: int, q: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        """`attend` over keys and values that are in the pool already."""
        return self._attend(self._begun(), layer, q, window, softcap)

    def _begun(self) -> _Step:
        if self._step is None:
            raise RuntimeError("attend comes after begin")
        return self._step

    def _attend(self, step: _Step, layer: int, q: Tensor, window: int, softcap: float) -> Tensor:
        out = torch.empty(q.shape[0], self.num_heads * self.pool.head_dim, dtype=q.dtype, device=q.device)
        pages = self.pool.pages[:, :, layer]
        if step.in_runs:
            if window or softcap:
                raise RuntimeError("layers with windows or softcaps take PLAIN_TILES")
            self._run(step, pages, q, out, None)
        elif step.decode_rows:
            self._decode(step, pages, q, out, window, softcap)
        plain = not (window or softcap) and q.dtype == pages.dtype
        if step.prefill_tiles and self._flash is not None and plain:
            table, tiles = step.arrays["pages"], step.arrays["prefill_tiles"]
            self._flash(layer, q, out, table, step.table_stride, tiles, step.prefill_tiles)
        elif step.prefill_tiles:
            self._prefill(step, pages, q, out, window, softcap)
        return out

    def _decode(self, step: _Step, pages: Tensor, q: Tensor, out: Tensor, window: int, softcap: float) -> None:
        arrays, tiles = step.arrays, self.tiles
        kind = (window > 0, softcap > 0, q.dtype)
        programs = self._programs.get(kind, _processors(self._device) * FIRST_PROGRAMS)
        compiled = decode_kernel[(max(1, min(programs, step.num_items * self.pool.num_heads)),)](
            q,
            out,
            pages,
            arrays["pages"],
            arrays["items"],
            arrays["sizes"],
            step.parts,
            step.stats,
            step.arrivals,
            q.stride(0),
            out.stride(0),
            pages.stride(0),
            pages.stride(1),
            window,
            self.scale,
            softcap * LOG2E,
            WINDOW=window > 0,
            SOFTCAP=softcap > 0,
            KV_HEADS=self.pool.num_heads,
            GROUP=self.group,
            PAD=self.padded_group,
            BLOCK_M=max(tiles.decode_m, self.padded_group),
            BLOCK_N=tiles.decode_n,
            PAGE=self.pool.page_size,
            DIM=self.pool.head_dim,
            **launch.options(),
            num_warps=tiles.decode_warps,
            num_stages=tiles.decode_stages,
        )
        if kind not in self._programs and compiled is not None:  # None: interpreted
            self._programs[kind] = _processors(self._device) * launch.resident(compiled)

    def _run(
        self,
        step: _Step,
        pages: Tensor,
        q: Tensor,
        out: Tensor,
        new: tuple[Tensor | None, float, Tensor, Tensor] | None,
    ) -> None:
        """`new`: (norm, eps, cos, sin), for which `q` is the product of q, k and v; see run_kernel."""
        arrays, tiles = step.arrays, self.tiles
        norm, eps, cos, sin = new or (None, 0.0, q, q)
        run_kernel[(self._runs * self.pool.num_heads,)](
            q,
            cos if norm is None else norm,
            cos,
            sin,
            out,
            pages,
            arrays["pages"],
            arrays["runs"],
            arrays["items"],
            step.parts,
            step.stats,
            step.arrivals,
            q.stride(-2) if new else q.stride(0),
            q.stride(0),
            out.stride(0),
            pages.stride(0),
            pages.stride(1),
            eps,
            torch.finfo(pages.dtype).max,
            self.scale,
            NEW=new is not None,
            SPLITS=fused.splits_of(q) if new else 1,
            NORM=norm is not None,
            DTYPE=fused.DTYPES[out.dtype],
            KV_HEADS=self.pool.num_heads,
            GROUP=self.group,
            PAD=self.padded_group,
            BLOCK_M=max(tiles.decode_m, triton.next_power_of_2(self.group + 2)),
            BLOCK_N=tiles.decode_n,
            PAGE=self.pool.page_size,
            DIM=self.pool.head_dim,
            **launch.options(),
            num_warps=tiles.decode_warps,
            num_stages=tiles.run_stages,
        )

    def _prefill(self, step: _Step, pages: Tensor, q: Tensor, out: Tensor, window: int, softcap: float) -> None:
        tiles = self.tiles
        prefill_kernel[(self.pool.num_heads, step.prefill_tiles)](
            q,
            out,
            pages,
            step.arrays["pages"],
            step.arrays["prefill_tiles"],
            step.table_stride,
            q.stride(0),
            out.stride(0),
            pages.stride(0),
            pages.stride(1),
            window,
            self.scale,
            softcap * LOG2E,
            WINDOW=window > 0,
            SOFTCAP=softcap > 0,
            FIXED=self.fixed,
            GROUP=self.group,
            PAD=self.padded_group,
            SPLIT=tiles.split,
            BLOCK_M=tiles.prefill_m,
            BLOCK_N=tiles.prefill_n,
            PAGE=self.pool.page_size,
            DIM=self.pool.head_dim,
            **launch.options(),
            num_warps=tiles.prefill_warps,
            num_stages=tiles.prefill_stages,
        )


def _padded(values: np.ndarray, size: int, padding: int) -> I32:
    padded = np.full(size, padding, np.int32)
    padded[: len(values)] = values
    return padded


def _shared_bytes(device: torch.device) -> int:
    """Of shared memory, for one program."""
    if device.type != "cuda":
        return 1 << 30
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
