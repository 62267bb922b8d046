"""silu(x · gateᵀ) * (x · upᵀ) of 33 to 64 rows on Hopper GPUs, with blocks that the tensor memory accelerator fetches.

Like product_kernel (matmul_kernels.py), but a block of weights, or of the rows, which every program reads
again, is one request of one thread: with so many rows the loads that each thread asks for itself are too many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.model.kernels import launch
from diptych.model.kernels.launch import wait_for_previous

# By the weight's shape: with how many rows this is faster than a product and silu_mul (one H200, as `gated` below).
ROWS: dict[tuple[int, int], range] = {
    (51200, 5120): range(33, 65),  # Qwen3-32B
    (25600, 5120): range(33, 65),  # half of it, for two ranks
}
MAX_ROWS = 64
BLOCK_N, BLOCK_K, STAGES = 64, 128, 4  # columns of gate, and as many of up; inputs; 4 * 48 KiB are there or under way


@triton.jit(do_not_specialize=["rows"])
def stream_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    out,
    rows,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (columns): `out[:, columns]`; `w` has 2 * WIDTH rows, gate first. Rounded as silu_mul_kernel does it."""
    wait_for_previous(OVERLAP)
    first = tl.program_id(0) * BLOCK_N
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(0, K, BLOCK_K):
        inputs = x.load([0, at]).T
        gate = tl.dot(w.load([first, at]), inputs, gate)
        up = tl.dot(w.load([WIDTH + first, at]), inputs, up)
    dtype = out.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    m, columns = tl.arange(0, BLOCK_M)[None, :], (first + tl.arange(0, BLOCK_N))[:, None]
    inside = (m < rows) & (columns < WIDTH)
    tl.store(out + m * WIDTH + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=inside)


def stream_wins(rows: int, n: int, k: int) -> bool:
    """Whether stream_gated is what is fastest for `rows` and a weight `[n, k]`, on a GPU that gated.takes() it."""
    return rows in ROWS.get((n, k), ())


def stream_gated(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up, `[rows, N / 2]`, of the product, whose first half of the columns is gate. `x` `[rows, K]`, up to
    MAX_ROWS, and `weight` `[N, K]`, contiguous and of 16 bits, with K a multiple of 8."""
    (rows, k), width = x.shape, weight.shape[0] // 2
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows: these tiles are for {MAX_ROWS} rows at most")
    block_m = max(16, triton.next_power_of_2(rows))
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    stream_kernel[(triton.cdiv(width, BLOCK_N),)](
        TensorDescriptor.from_tensor(x, [block_m, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
        out,
        rows,
        WIDTH=width,
        K=k,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=STAGES,
        **launch.options(),
    )
    return out
