"""Products of few rows on tensors, by the kernels of matmul_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.matmul_kernels import gated_kernel, product_add_kernel, product_kernel, reduce_kernel
from diptych.model.kernels.tiles import PROCESSORS, ProductTiles, tiles_for

MAX_ROWS = 64
AHEAD = 64  # inputs whose weights a program asks for before it waits: a cache line of each row
LATE_BYTES = 24 << 20  # a product of more weights lets its successor start at its end only, see product_kernel


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a norm makes of x, but for the division by each row's root mean square: `values` `[rows, width]` are x times
    the norm's weight, rounded; `squares` `[tiles, rows]` float32 add up to the sum of x²."""

    values: Tensor
    squares: Tensor
    eps: float


def product_parts(x: Tensor | Scaled, weight: Tensor, tiles: ProductTiles | None = None) -> Tensor:
    """`[splits, rows, N]` float32 parts of `x @ weight.T`, to be added in order; one part only: the product `[rows, N]`
    in x's type. `x` `[rows, K]`, up to MAX_ROWS rows, each contiguous; `weight` `[N, K]` contiguous."""
    tiles = tiles or tiles_for(*weight.shape)
    values, squares, eps = (x.values, x.squares, x.eps) if isinstance(x, Scaled) else (x, None, 0.0)
    (rows, k), n = values.shape, weight.shape[0]
    split, splits = _cut(k, tiles.splits, tiles)
    if splits == 1:
        out = torch.empty(rows, n, dtype=values.dtype, device=values.device)
    else:
        out = torch.empty(splits, rows, n, dtype=torch.float32, device=values.device)
    product_kernel[(triton.cdiv(n, tiles.block_n), splits)](
        values,
        weight,
        out,
        values if squares is None else squares,
        rows,
        values.stride(0),
        eps,
        SPLIT=split,
        TILES=0 if squares is None else squares.shape[0],
        **_options(values, weight, tiles),
    )
    return out


def gated_product(x: Tensor | Scaled, weight: Tensor, arrivals: Tensor, tiles: ProductTiles | None = None) -> Tensor:
    """See gated_kernel: silu(gate) * up, `[rows, N / 2]`, of the product, whose first half of the columns is gate."""
    tiles = tiles or tiles_for(*weight.shape)
    values, squares, eps = (x.values, x.squares, x.eps) if isinstance(x, Scaled) else (x, None, 0.0)
    (rows, k), n = values.shape, weight.shape[0]
    columns = triton.cdiv(n, tiles.block_n)
    piece, pieces = _cut(k, tiles.pieces, tiles)
    whole = columns // PROCESSORS * PROCESSORS if pieces > 1 else columns
    options = _options(values, weight, tiles)
    out = torch.empty(rows, n // 2, dtype=values.dtype, device=values.device)
    size = (columns - whole) * pieces * tiles.block_n * options["BLOCK_M"]
    gated_kernel[(whole + (columns - whole) * pieces,)](
        values,
        weight,
        out,
        values if squares is None else squares,
        torch.empty(size, dtype=torch.float32, device=values.device),
        arrivals,
        rows,
        values.stride(0),
        eps,
        WHOLE=whole,
        PIECES=pieces,
        PIECE=piece,
        TILES=0 if squares is None else squares.shape[0],
        **options,
    )
    return out


def product_add(
    x: Tensor,
    inputs: Tensor,
    weight: Tensor,
    norm: Tensor,
    eps: float,
    arrivals: Tensor,
    tiles: ProductTiles | None = None,
) -> Scaled:
    """See product_add_kernel. `x` `[rows, N]` contiguous; `arrivals` int32, at least as many as there are tiles."""
    rows, n = x.shape
    tiles = tiles or tiles_for(*weight.shape)
    split, splits = _cut(weight.shape[1], tiles.splits, tiles)
    columns = triton.cdiv(n, tiles.block_n)
    scaled = Scaled(torch.empty_like(x), torch.empty(columns, rows, dtype=torch.float32, device=x.device), eps)
    parts = torch.empty(splits if splits > 1 else 0, rows, n, dtype=torch.float32, device=x.device)
    product_add_kernel[(columns, splits)](
        inputs,
        weight,
        x,
        norm,
        parts,
        arrivals,
        scaled.values,
        scaled.squares,
        rows,
        inputs.stride(0),
        SPLIT=split,
        SPLITS=splits,
        **_options(inputs, weight, tiles),
    )
    return scaled


def _cut(k: int, pieces: int, tiles: ProductTiles) -> tuple[int, int]:
    """The inputs of each of so many pieces, a multiple of the blocks, and how many pieces that makes."""
    piece = triton.cdiv(triton.cdiv(k, tiles.block_k), pieces) * tiles.block_k
    return piece, triton.cdiv(k, piece)


def _options(x: Tensor, weight: Tensor, tiles: ProductTiles) -> dict[str, Any]:
    """What all products' launches have."""
    rows, (n, k) = x.shape[0], weight.shape
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows: these tiles are for {MAX_ROWS} rows at most")
    return {
        "N": n,
        "K": k,
        "BLOCK_M": max(16, triton.next_power_of_2(rows)),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "AHEAD": AHEAD,
        "LATE": 2 * n * k > LATE_BYTES,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **launch.options(product=True),
    }


def product(x: Tensor | Scaled, weight: Tensor, tiles: ProductTiles | None = None) -> Tensor:
    """`x @ weight.T` `[rows, N]`; see product_parts."""
    parts = product_parts(x, weight, tiles)
    if parts.ndim == 2:
        return parts
    splits, rows, n = parts.shape
    values = x.values if isinstance(x, Scaled) else x
    out = torch.empty(rows, n, dtype=values.dtype, device=values.device)
    size, grid = rows * n, (triton.cdiv(rows * n, 1024),)
    reduce_kernel[grid](parts, out, size, size, SPLITS=splits, BLOCK=1024, **launch.options())
    return out
