"""The attention backend of GPUs: Triton kernels over the page table. The reference is PagedAttention."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor

from diptych.errors import ConfigError
from diptych.model.attention_step import Step, Steps
from diptych.model.attention_tiles import FIXED_TILES, AttentionTiles, takes_runs
from diptych.model.kernels import fused, launch
from diptych.model.kernels.decode import decode_kernel
from diptych.model.kernels.flash import ROWS, Flash
from diptych.model.kernels.prefill import prefill_kernel
from diptych.model.kernels.runs import run_kernel
from diptych.model.pool import KVPool
from diptych.types import I32, Plan

LOG2E = math.log2(math.e)
MIN_ROWS = 16  # of a tile: what tensor cores take
FIRST_PROGRAMS = 3  # for each multiprocessor, while it is not known how many are there at once


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
        self._steps = Steps(pool, self.tiles, self.padded_group, _processors(self._device))
        self._programs: dict[tuple[bool, bool, torch.dtype], int] = {}
        self._step: Step | None = None

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
        self._step = self._steps.begin(plan)

    def reserve(self, rows: int, pages: int, tokens: int, step_tokens: int = 0) -> None:
        """Memory for steps in CUDA graphs: up to `rows` sequences of up to `pages` pages each, with `tokens` in all, of
        which the step computes up to `step_tokens` (default: one for each sequence). Graphs captured before are void.
        """
        self._steps.reserve(rows, pages, tokens, max(rows, step_tokens))

    def begin_graph(self, plan: Plan, num_tokens: int, wanted: I32 | None = None) -> bool:
        """As `begin`, but into the reserved memory and for `num_tokens` tokens, those past the plan's being padding.
        `wanted` None: a decode step, which has a token of each sequence; otherwise these numbers go along, as many as
        the graph reads. False, with nothing changed, if the plan does not fit."""
        step = self._steps.begin_graph(plan, num_tokens, wanted)
        self._step = step or self._step
        return step is not None

    def reserved_ids(self, num_tokens: int) -> Tensor:
        """The token ids that the latest `begin_graph` brought, int32 `[num_tokens]`: they travel with the rest."""
        return self._steps.reserved("ids", num_tokens)

    def reserved_wanted(self, num_rows: int) -> Tensor:
        """`wanted` of the latest `begin_graph`, int32 `[num_rows]`."""
        return self._steps.reserved("wanted", num_rows)

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

    def _begun(self) -> Step:
        if self._step is None:
            raise RuntimeError("attend comes after begin")
        return self._step

    def _attend(self, step: Step, layer: int, q: Tensor, window: int, softcap: float) -> Tensor:
        out = torch.empty(q.shape[0], self.num_heads * self.pool.head_dim, dtype=q.dtype, device=q.device)
        pages = self.pool.pages[:, :, layer]
        if step.in_runs:
            if window or softcap:
                raise RuntimeError("layers with windows or softcaps take PLAIN_TILES")
            self._run(step, pages, q, out, None)
        elif step.decode:
            self._decode(step, pages, q, out, window, softcap)
        plain = not (window or softcap) and q.dtype == pages.dtype
        if step.prefill_tiles and self._flash is not None and plain:
            table, sizes, tiles = (step.arrays[name] for name in ("pages", "sizes", "prefill_tiles"))
            self._flash(layer, q, out, table, sizes, tiles, step.prefill_tiles)
        elif step.prefill_tiles:
            self._prefill(step, pages, q, out, window, softcap)
        return out

    def _decode(self, step: Step, pages: Tensor, q: Tensor, out: Tensor, window: int, softcap: float) -> None:
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
        step: Step,
        pages: Tensor,
        q: Tensor,
        out: Tensor,
        new: tuple[Tensor | None, float, Tensor, Tensor] | None,
    ) -> None:
        """`new`: (norm, eps, cos, sin), for which `q` is the product of q, k and v; see run_kernel."""
        arrays, tiles = step.arrays, self.tiles
        norm, eps, cos, sin = new or (None, 0.0, q, q)
        run_kernel[(self._steps.num_runs * self.pool.num_heads,)](
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

    def _prefill(self, step: Step, pages: Tensor, q: Tensor, out: Tensor, window: int, softcap: float) -> None:
        tiles = self.tiles
        prefill_kernel[(self.pool.num_heads, step.prefill_tiles)](
            q,
            out,
            pages,
            step.arrays["pages"],
            step.arrays["prefill_tiles"],
            step.arrays["sizes"],
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


def _shared_bytes(device: torch.device) -> int:
    """Of shared memory, for one program."""
    if device.type != "cuda":
        return 1 << 30
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
