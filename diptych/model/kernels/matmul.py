"""Products of few rows, x[M, K] @ w[N, K]^T, by a fixed number of splits over K, added in order (no atomics).

Such a product is bound by reading the weights: what counts is that all processors read at once and enough loads are
under way. A weight's tile is the tall operand of the tensor cores, the few rows the narrow one. The parts may be left
unreduced for the kernels that follow (diptych/model/kernels/fused.py), which saves a launch and a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from diptych.model.kernels import launch
from diptych.model.kernels.fused import load_product
from diptych.model.kernels.launch import prefetch, wait_for_previous

MAX_ROWS = 64
AHEAD = 64  # inputs whose weights a program asks for before it waits: a cache line of each row
LATE_BYTES = 24 << 20  # a product of more weights lets its successor start at its end only, see product_kernel


@triton.jit(do_not_specialize=["rows"])
def product_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    out,
    rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (columns, split): `out[split, :, columns]` over the split's SPLIT inputs (a multiple of BLOCK_K).

    Weights, which no kernel writes, are asked for before the wait: those of AHEAD inputs, a power of two. LATE: the
    successor starts (and asks for its weights) when this product ends; asked for at its beginning, they would be gone
    from the second-level cache before they are used."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    first = split * SPLIT + tl.arange(0, AHEAD // 64) * 64  # 64 weights of 2 bytes are a cache line
    lines = tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + tl.minimum(first, K - 1)[None, :]
    prefetch(w + lines, OVERLAP)
    if OVERLAP:
        if not LATE:
            gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    w_places = w + columns.to(tl.int64)[:, None] * K + k[None, :]
    x_places = x + m[None, :].to(tl.int64) * x_stride + k[:, None]
    for at in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, K), BLOCK_K):
        w_mask, x_mask = (columns < N)[:, None], (m < rows)[None, :]
        if K % BLOCK_K != 0:
            w_mask, x_mask = w_mask & (at + k < K)[None, :], x_mask & (at + k < K)[:, None]
        if N % BLOCK_N == 0 and K % BLOCK_K == 0:
            weights = tl.load(w_places + at, eviction_policy="evict_first")
        else:
            weights = tl.load(w_places + at, mask=w_mask, other=0.0, eviction_policy="evict_first")
        inputs = tl.load(x_places + at, mask=x_mask, other=0.0, eviction_policy="evict_last")
        acc = tl.dot(weights, inputs, acc, input_precision="ieee")
    if OVERLAP and LATE:
        gdc_launch_dependents()
    places = out + (split * rows + m).to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(places, acc.to(out.dtype.element_ty), mask=(columns < N)[:, None] & (m < rows)[None, :])


@triton.jit(do_not_specialize=["size"])
def reduce_kernel(  # type: ignore[no-untyped-def]
    parts, out, split_stride, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """The splits' sum, in order."""
    wait_for_previous(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = load_product(parts + at, at < size, split_stride, SPLITS, out.dtype.element_ty)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """How one product is cut. What `splits` is decides results' bits; the others only their speed."""

    block_n: int = 64
    block_k: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4


def _tiles(block_k: int, splits: int, num_stages: int, block_n: int = 64) -> ProductTiles:
    return ProductTiles(block_n, block_k, splits, 4, num_stages)


# By (N, K): up to how many rows, and the tiles that beat cuBLAS there. Measured on one H200 at 1, 8, 16, 32 and 64 rows
# (benchmarks/gpu/kernels.py); where nothing is listed, cuBLAS is as fast or faster.
TILES: dict[tuple[int, int], tuple[tuple[int, ProductTiles], ...]] = {
    # Qwen3-32B: qkv, o, gate_up, down, head
    (10240, 5120): ((16, _tiles(128, 2, 3)),),
    (5120, 8192): ((32, _tiles(128, 2, 4)), (64, _tiles(64, 2, 5))),
    (51200, 5120): ((8, _tiles(128, 2, 4)), (16, _tiles(128, 1, 4))),
    (5120, 25600): ((32, _tiles(128, 4, 3)), (64, _tiles(64, 4, 4, 128))),
    (151936, 5120): ((16, _tiles(128, 1, 3)), (32, _tiles(128, 1, 4))),
    # half of it, for two ranks
    (5120, 5120): ((16, _tiles(128, 2, 4)),),
    (5120, 4096): ((32, _tiles(128, 2, 4)),),
    (25600, 5120): ((8, _tiles(128, 1, 3, 128)), (64, _tiles(64, 1, 4, 128))),
    (5120, 12800): ((32, _tiles(128, 2, 4)), (64, _tiles(64, 4, 4, 128))),
    (75968, 5120): ((32, _tiles(128, 1, 3)),),
    # Qwen3-8B
    (6144, 4096): ((32, _tiles(128, 2, 4)),),
    (4096, 4096): ((64, _tiles(128, 2, 4)),),
    (24576, 4096): ((32, _tiles(128, 1, 3)),),
    (4096, 12288): ((32, _tiles(128, 4, 3)), (64, _tiles(128, 2, 4))),
    (151936, 4096): ((32, _tiles(128, 1, 3)),),
    # Qwen3-0.6B
    (4096, 1024): ((32, _tiles(128, 2, 4)), (64, _tiles(64, 2, 5))),
    (1024, 2048): ((64, _tiles(64, 8, 5)),),
    (6144, 1024): ((32, _tiles(64, 2, 5)),),
    (1024, 3072): ((8, _tiles(128, 8, 4)), (64, _tiles(64, 8, 5))),
    (151936, 1024): ((32, _tiles(128, 1, 4)), (64, _tiles(64, 1, 5))),
}
PROCESSORS = 132  # of an H200: tiles are cut so that each has about two
FEW_ROWS, SOME_ROWS = 16, 32  # where the table has nothing: cuBLAS loses with few rows; with some, where N is small


def wins(rows: int, n: int, k: int) -> ProductTiles | None:
    """The tiles with which product_parts beats cuBLAS for `x[rows, k] @ w[n, k]^T` in 16 bits, or None: cuBLAS."""
    if (n, k) in TILES:
        return next((tiles for most, tiles in TILES[n, k] if rows <= most), None)
    tiles = tiles_for(n, k)
    most = SOME_ROWS if triton.cdiv(n, tiles.block_n) < PROCESSORS else FEW_ROWS
    return tiles if rows <= most else None


def tiles_for(n: int, k: int) -> ProductTiles:
    """The table's, or: as many splits (1, 2, 4, 8) as give each processor two tiles, but four blocks to each split; and
    three stages instead of four if that makes room for all tiles at once."""
    if (n, k) in TILES:
        return TILES[n, k][0][1]
    tiles, splits = ProductTiles(), 1
    columns = triton.cdiv(n, tiles.block_n)
    while splits < 8 and splits * columns < 2 * PROCESSORS and k >= 8 * splits * tiles.block_k:
        splits *= 2
    return ProductTiles(splits=splits, num_stages=3 if 2 * PROCESSORS < splits * columns <= 3 * PROCESSORS else 4)


def product_parts(x: Tensor, weight: Tensor, tiles: ProductTiles | None = None) -> Tensor:
    """`[splits, rows, N]` float32 parts of `x @ weight.T`, to be added in order; one part only: the product `[rows, N]`
    in x's type. `x` `[rows, K]`, up to MAX_ROWS rows, each contiguous; `weight` `[N, K]` contiguous."""
    (rows, k), n = x.shape, weight.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows: these tiles are for {MAX_ROWS} rows at most")
    tiles = tiles or tiles_for(n, k)
    split = triton.cdiv(triton.cdiv(k, tiles.block_k), tiles.splits) * tiles.block_k
    splits = triton.cdiv(k, split)
    if splits == 1:
        out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(splits, rows, n, dtype=torch.float32, device=x.device)
    product_kernel[(triton.cdiv(n, tiles.block_n), splits)](
        x,
        weight,
        out,
        rows,
        x.stride(0),
        N=n,
        K=k,
        SPLIT=split,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        AHEAD=AHEAD,
        LATE=2 * n * k > LATE_BYTES,
        **launch.options(),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def product(x: Tensor, weight: Tensor, tiles: ProductTiles | None = None) -> Tensor:
    """`x @ weight.T` `[rows, N]`; see product_parts."""
    parts = product_parts(x, weight, tiles)
    if parts.ndim == 2:
        return parts
    splits, rows, n = parts.shape
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    size, grid = rows * n, (triton.cdiv(rows * n, 1024),)
    reduce_kernel[grid](parts, out, size, size, SPLITS=splits, BLOCK=1024, **launch.options())
    return out
