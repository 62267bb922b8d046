"""How attention is cut on a GPU: the tiles of its kernels, measured on an H200 (docs/decisions/gpu-kernels.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How attention is cut. Splits and blocks decide the bits of results, the rest only their speed."""

    split: int = 0  # keys of a split, a multiple of the blocks, see Cuts; 0: by the batch
    max_splits: int = 32
    decode_m: int = 16  # least rows of a decode tile
    decode_n: int = 64  # keys of a block
    decode_warps: int = 4
    decode_stages: int = 2
    run_rows: int = 32  # a step of up to so many rows, all of decode, is cut in runs
    run_new: bool | None = None  # runs begin at the product of q, k and v (NEW); None: where launches overlap
    run_programs: int = 2  # for each multiprocessor
    run_stages: int = 4
    flash: bool = True  # prefill by the kernel of Hopper GPUs where it can; what follows is of the other one
    prefill_m: int = 64
    prefill_n: int = 64
    prefill_warps: int = 4
    prefill_stages: int = 3


def takes_runs(tiles: AttentionTiles, page_size: int, head_dim: int, itemsize: int, shared_bytes: int) -> bool:
    """Whether pages and blocks of keys are multiples of one another, and what the stages of a run hold, keys and
    values of a block each but for one, fits into the `shared_bytes` that a program may have (compiled: Triton 3.7)."""
    large, small = max(page_size, tiles.decode_n), min(page_size, tiles.decode_n)
    stages = (tiles.run_stages - 1) * 2 * tiles.decode_n * head_dim * itemsize
    return large % small == 0 and stages + 64 * head_dim <= shared_bytes


# Decode and prefill alike, and splits of one size.
FIXED_TILES = AttentionTiles(split=256, max_splits=1 << 30, decode_m=64, decode_stages=3, run_rows=0, flash=False)
PLAIN_TILES = AttentionTiles(run_rows=0)  # for layers with windows or softcaps, which runs do not have
