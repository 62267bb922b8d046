"""Products whose rows do not depend on one another, whatever their number: x[M, K] @ w[N, K]^T for --deterministic.

cuBLAS, and our split products, choose by the number of rows how the sum over K is cut. Here every element is one sum
over K in steps of BLOCK_K, in order, and only the tile around it depends on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.launch import wait_for_previous

BLOCK_K = 64  # the same for all: it orders the sums
GROUP = 8  # tiles of rows that share a column's weights while the cache has them


@triton.jit(do_not_specialize=["rows"])
def fixed_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    out,
    rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program a tile of `out` `[rows, N]`. The weights are the tall operand of the tensor cores."""
    wait_for_previous(OVERLAP)
    columns_tiles = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * columns_tiles)
    within = tl.program_id(0) % (GROUP * columns_tiles)
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - group * GROUP, GROUP)
    m = (group * GROUP + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // size * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w_places = w + n.to(tl.int64)[:, None] * K + k[None, :]
    x_places = x + m.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(0, K, BLOCK_K):
        if N % BLOCK_N == 0 and K % BLOCK_K == 0:
            weights = tl.load(w_places + at)
            inputs = tl.load(x_places + at, mask=(m < rows)[None, :], other=0.0)
        else:
            weights = tl.load(w_places + at, mask=(n < N)[:, None] & (at + k < K)[None, :], other=0.0)
            inputs = tl.load(x_places + at, mask=(m < rows)[None, :] & (at + k < K)[:, None], other=0.0)
        acc = tl.dot(weights, inputs, acc, input_precision="ieee")
    places = out + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(places, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < rows)[None, :])


def fixed_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T` `[rows, N]`: a row has the same bits among any others. `x` `[rows, K]`, each row contiguous;
    `weight` `[N, K]` contiguous; `out`: where to, contiguous.

    Tiles have at least 64 columns, so that all use the same instruction (wgmma). That its sums do not depend on the
    width of a tile is not documented: the self-test tries it at each start."""
    (rows, k), n = x.shape, weight.shape[0]
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device) if out is None else out
    if rows <= 64:  # bound by reading the weights: narrow tiles, so that all processors read
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(rows)), 64, 4, 6
    else:
        block_m, block_n, warps, stages = 128, 128, 8, 4
    fixed_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(n, block_n),)](
        x, weight, out, rows, x.stride(0), N=n, K=k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK_K, GROUP=GROUP,
        num_warps=warps, num_stages=stages, **launch.options(),
    )  # fmt: skip
    return out
