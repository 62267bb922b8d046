"""silu(x · gateᵀ) * (x · upᵀ) of 33 to 64 rows on Hopper GPUs, with blocks that the tensor memory accelerator fetches.

Like gated_kernel (matmul_kernels.py), but a block of weights, or of the rows, which every program reads again, is one
request of one thread: with so many rows the loads that each thread asks for itself are too many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.model.kernels import launch
from diptych.model.kernels.launch import wait_for_previous
from diptych.model.kernels.tiles import PROCESSORS

# With so many rows this is faster than a product and silu_mul for weights of these shapes (one H200, as `gated` below);
# in how many pieces those tiles are cut that are too few for all processors.
ROWS = range(33, 65)
PIECES = {
    (51200, 5120): 4,  # Qwen3-32B: 3 tiles a processor, and 4
    (25600, 5120): 1,  # half of it, for two ranks
}
BLOCK_N, BLOCK_K, STAGES = 64, 128, 4  # columns of gate, and as many of up; inputs; 4 * 48 KiB are there or under way


@triton.jit(do_not_specialize=["rows"])
def stream_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    out,
    parts,
    arrivals,
    rows,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`out[:, columns]`; `w` has 2 * WIDTH rows, gate first. Rounded as silu_mul_kernel does it. Program i below WHOLE
    has tile i; the others share tiles, as in gated_kernel."""
    wait_for_previous(OVERLAP)
    program, n, m = tl.program_id(0), tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_M)[None, :]
    shared = tl.maximum(program - WHOLE, 0)
    first = tl.where(program < WHOLE, program, WHOLE + shared // PIECES) * BLOCK_N
    start = shared % PIECES * PIECE
    stop = tl.where(program < WHOLE, K, tl.minimum(start + PIECE, K))
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for at in range(start, stop, BLOCK_K):
        inputs = x.load([0, at]).T
        gate = tl.dot(w.load([first, at]), inputs, gate)
        up = tl.dot(w.load([WIDTH + first, at]), inputs, up)
    stored = rows
    if PIECES > 1:  # known when it is compiled  # noqa: SIM102
        if program >= WHOLE:
            SIZE: tl.constexpr = BLOCK_N * BLOCK_M
            every = parts + shared // PIECES * (2 * PIECES * SIZE) + m * BLOCK_N + n
            mine = every + shared % PIECES * (2 * SIZE)
            tl.store(mine, gate)
            tl.store(mine + SIZE, up)
            tl.debug_barrier()  # the increment releases what all threads have stored, see decode_kernel
            stored = rows * 0
            if tl.atomic_add(arrivals + shared // PIECES, 1, sem="acq_rel", scope="gpu") == PIECES - 1:
                tl.store(arrivals + shared // PIECES, 0)
                stored = rows
                gate, up = tl.load(every), tl.load(every + SIZE)
                for piece in tl.static_range(1, PIECES):
                    gate += tl.load(every + 2 * piece * SIZE)
                    up += tl.load(every + (2 * piece + 1) * SIZE)
    dtype = out.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    columns = first + n
    inside = (m < stored) & (columns < WIDTH)
    tl.store(out + m * WIDTH + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=inside)


def stream_wins(rows: int, n: int, k: int) -> bool:
    """Whether stream_gated is what is fastest for `rows` and a weight `[n, k]`, on a GPU that gated.takes() it."""
    return rows in ROWS and (n, k) in PIECES


def stream_gated(x: Tensor, weight: Tensor, arrivals: Tensor, pieces: int | None = None) -> Tensor:
    """silu(gate) * up, `[rows, N / 2]`, of the product, whose first half of the columns is gate. `x` `[rows, K]`, up to
    64 rows, and `weight` `[N, K]`, contiguous and of 16 bits, with K a multiple of 8. `arrivals`: see gated_kernel.
    `pieces`: see PIECES, whose they are unless given."""
    (rows, k), width = x.shape, weight.shape[0] // 2
    if rows >= ROWS.stop:
        raise ValueError(f"{rows} rows: these tiles are for {ROWS.stop - 1} rows at most")
    block_m, blocks = max(16, triton.next_power_of_2(rows)), triton.cdiv(k, BLOCK_K)
    tiles = triton.cdiv(width, BLOCK_N)
    piece = triton.cdiv(blocks, pieces or PIECES.get((2 * width, k), 1))
    pieces = triton.cdiv(blocks, piece)
    whole = tiles // PROCESSORS * PROCESSORS if pieces > 1 else tiles
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    size = (tiles - whole) * pieces * 2 * BLOCK_N * block_m
    stream_kernel[(whole + (tiles - whole) * pieces,)](
        TensorDescriptor.from_tensor(x, [block_m, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
        out,
        torch.empty(size, dtype=torch.float32, device=x.device),
        arrivals,
        rows,
        WIDTH=width,
        K=k,
        WHOLE=whole,
        PIECES=pieces,
        PIECE=piece * BLOCK_K,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=STAGES,
        **launch.options(),
    )
    return out
