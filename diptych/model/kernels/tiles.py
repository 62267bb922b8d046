"""How the products of few rows (diptych/model/kernels/matmul.py) are cut, and up to how many rows they beat cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """How one product is cut. What `splits` is decides results' bits; the others only their speed. A split that is one
    block is read before the kernels that came before have ended: for launches that overlap, of small products.
    `joins`: the product also does what follows, SiLU · mul or add and norm (matmul.py). `pieces`: of those tiles that
    are too few for all processors, when there is SiLU to be done."""

    block_n: int = 64
    block_k: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    joins: bool = True
    pieces: int = 1


def _tiles(block_k: int, splits: int, num_stages: int, block_n: int = 64) -> ProductTiles:
    return ProductTiles(block_n, block_k, splits, 4, num_stages)


def _alone(block_k: int, splits: int, num_stages: int, block_n: int = 64) -> ProductTiles:
    return ProductTiles(block_n, block_k, splits, 4, num_stages, joins=False)


# By (N, K): up to how many rows, and the tiles that beat cuBLAS there. Measured on one H200 at 1, 8, 16, 32 and 64 rows
# (benchmarks/gpu/kernels.py); where nothing is listed, cuBLAS is as fast or faster. What joins was measured for
# Qwen3-32B and 0.6B, in a layer.
TILES: dict[tuple[int, int], tuple[tuple[int, ProductTiles], ...]] = {
    # Qwen3-32B: qkv, o, gate_up, down, head
    (10240, 5120): ((32, _tiles(128, 2, 3)),),
    (5120, 8192): ((32, _tiles(128, 2, 4)),),
    (51200, 5120): ((32, ProductTiles(splits=1, pieces=4)),),
    (5120, 25600): ((32, _tiles(128, 4, 3)),),
    (151936, 5120): ((16, _tiles(128, 1, 3)), (32, _tiles(128, 1, 4))),
    # half of it, for two ranks
    (5120, 5120): ((16, _tiles(128, 2, 4)),),
    (5120, 4096): ((32, _tiles(128, 2, 4)),),
    (25600, 5120): ((8, _tiles(128, 1, 3, 128)), (32, _tiles(64, 1, 4, 128))),
    (5120, 12800): ((32, _tiles(128, 2, 4)),),
    (75968, 5120): ((32, _tiles(128, 1, 3)),),
    # Qwen3-8B
    (6144, 4096): ((32, _tiles(128, 2, 4)),),
    (4096, 4096): ((32, _tiles(128, 2, 4)), (64, _alone(128, 2, 4))),
    (24576, 4096): ((32, _tiles(128, 1, 3)),),
    (4096, 12288): ((32, _tiles(128, 4, 3)),),
    (151936, 4096): ((32, _tiles(128, 1, 3)),),
    # Qwen3-0.6B
    (4096, 1024): ((32, _tiles(512, 2, 3)), (64, _tiles(64, 2, 5))),
    (1024, 2048): ((16, _tiles(256, 8, 3)), (32, _alone(256, 8, 3)), (64, _alone(64, 8, 5))),
    (6144, 1024): ((16, _tiles(1024, 1, 3, 32)), (32, _tiles(128, 1, 4))),
    (1024, 3072): ((16, _tiles(512, 6, 3)), (32, _alone(512, 6, 3)), (64, _alone(64, 8, 5))),
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
