"""Products of few rows, x[M, K] @ w[N, K]^T, by a fixed number of splits over K, added in order.

Such a product is bound by reading the weights: what counts is that all processors read at once and enough loads are
under way. A weight's tile is the tall operand of the tensor cores, the few rows the narrow one. What follows a product
is done by it, or by the kernel after it, for a launch of its own costs as much as a small product:

* The parts of the splits may be left unreduced for the next kernel (diptych/model/kernels/fused.py).
* gated_kernel applies SiLU · mul to its tile, which has the same columns of gate and up.
* In product_add_kernel the last program to arrive at a tile of columns adds its parts, in order, to the residual. The
  norm that follows is cut in two: the values are scaled here, and divided by their row's root mean square in the
  product that reads them, as it may be afterwards; see matmul.Scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from diptych.model.kernels.fused import load_product
from diptych.model.kernels.launch import prefetch, wait_for_previous


@triton.jit
def _start(OVERLAP: tl.constexpr, LATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """LATE: the successor starts (and asks for its weights) when this product ends; asked for at its beginning, they
    would be gone from the second-level cache before they are used."""
    if OVERLAP and not LATE:
        gdc_launch_dependents()


@triton.jit
def _weights(places, inside, at, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    if N % BLOCK_N == 0 and K % BLOCK_K == 0:
        weights = tl.load(places + at, eviction_policy="evict_first")
    else:
        mask = inside[:, None] & (at + tl.arange(0, BLOCK_K) < K)[None, :]
        weights = tl.load(places + at, mask=mask, other=0.0, eviction_policy="evict_first")
    return weights


@triton.jit
def _inputs(places, rows, at, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    mask = (tl.arange(0, BLOCK_M) < rows)[None, :]
    if K % BLOCK_K != 0:
        mask = mask & (at + tl.arange(0, BLOCK_K) < K)[:, None]
    return tl.load(places + at, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    x,
    w,
    columns,
    inside,
    start,
    stop,
    rows,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`[BLOCK_N, BLOCK_M]`: the rows `columns` of w times x, over the inputs [start, stop), in blocks of BLOCK_K.

    Weights, which no kernel writes, are read before the wait where there is one block of them (SINGLE); else those of
    AHEAD inputs, a power of two, are asked for."""
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    w_rows = w + columns.to(tl.int64)[:, None] * K
    x_places = x + m[None, :].to(tl.int64) * x_stride + k[:, None]
    if SINGLE:
        _start(OVERLAP, LATE)
        weights = _weights(w_rows + k[None, :], inside, start, N, K, BLOCK_N, BLOCK_K)
        if OVERLAP:
            gdc_wait()
        acc = tl.dot(weights, _inputs(x_places, rows, start, K, BLOCK_M, BLOCK_K), acc, input_precision="ieee")
    else:
        first = start + tl.arange(0, AHEAD // 64) * 64  # 64 weights of 2 bytes are a cache line
        prefetch(w_rows + tl.minimum(first, K - 1)[None, :], OVERLAP)
        _start(OVERLAP, LATE)
        if OVERLAP:
            gdc_wait()
        for at in range(start, stop, BLOCK_K):
            weights = _weights(w_rows + k[None, :], inside, at, N, K, BLOCK_N, BLOCK_K)
            inputs = _inputs(x_places, rows, at, K, BLOCK_M, BLOCK_K)
            acc = tl.dot(weights, inputs, acc, input_precision="ieee")
    if OVERLAP and LATE:
        gdc_launch_dependents()
    return acc


@triton.jit
def _root(squares, rows, eps, K: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row: what its inputs have yet to be multiplied with, `[BLOCK_M]`; see Scaled."""
    PAD: tl.constexpr = triton.next_power_of_2(TILES)
    tile, m = tl.arange(0, PAD)[:, None], tl.arange(0, BLOCK_M)[None, :]
    parts = tl.load(squares + tile * rows + m, mask=(tile < TILES) & (m < rows), other=0.0)
    return tl.rsqrt(tl.sum(parts, 0) / K + eps)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    out,
    squares,
    rows,
    x_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (columns, split): `out[split, :, columns]` over the split's SPLIT inputs. TILES: how many `squares` there
    are of each row, 0 if x is not Scaled."""
    split, m = tl.program_id(1), tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    start = split * SPLIT
    acc = _tile(
        x, w, tl.minimum(columns, N - 1), inside, start, tl.minimum(start + SPLIT, K), rows, x_stride, N, K,
        SPLIT == BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_K, AHEAD, LATE, OVERLAP,
    )  # fmt: skip
    if TILES:
        acc *= _root(squares, rows, eps, K, TILES, BLOCK_M)[None, :]
    places = out + (split * rows + m).to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(places, acc.to(out.dtype.element_ty), mask=inside[:, None] & (m < rows)[None, :])


@triton.jit(do_not_specialize=["rows"])
def gated_kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    out,
    squares,
    parts,
    arrivals,
    rows,
    x_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """silu(gate) * up in `out` `[rows, N / 2]`: a tile is BLOCK_N / 2 gates and what they are multiplied with. Program
    i below WHOLE has tile i; each tile from WHOLE on is shared by PIECES programs of PIECE inputs, the last of which to
    arrive adds their `parts` in order. `arrivals`, one for each such tile, are 0 before and after."""
    program, n, m = tl.program_id(0), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = BLOCK_N // 2
    COLUMNS: tl.constexpr = N // 2
    shared = tl.maximum(program - WHOLE, 0)
    tile = tl.where(program < WHOLE, program, WHOLE + shared // PIECES)
    start = shared % PIECES * PIECE
    stop = tl.where(program < WHOLE, K, tl.minimum(start + PIECE, K))
    columns = tile * WIDTH + n % WIDTH
    weights = tl.minimum(columns, COLUMNS - 1) + n // WIDTH * COLUMNS
    acc = _tile(
        x, w, weights, columns < COLUMNS, start, stop, rows, x_stride, N, K, PIECES == 1 and BLOCK_K == K, BLOCK_M,
        BLOCK_N, BLOCK_K, AHEAD, LATE, OVERLAP,
    )  # fmt: skip
    stored = rows
    if PIECES > 1:  # known when it is compiled  # noqa: SIM102
        if program >= WHOLE:
            SIZE: tl.constexpr = BLOCK_N * BLOCK_M
            at = parts + shared // PIECES * (PIECES * SIZE) + m[None, :] * BLOCK_N + n[:, None]
            tl.store(at + shared % PIECES * SIZE, acc)
            tl.debug_barrier()  # the increment releases what all threads have stored, see decode_kernel
            stored = rows * 0
            if tl.atomic_add(arrivals + shared // PIECES, 1, sem="acq_rel", scope="gpu") == PIECES - 1:
                tl.store(arrivals + shared // PIECES, 0)
                stored = rows
                acc = tl.load(at)
                for piece in tl.static_range(1, PIECES):
                    acc += tl.load(at + piece * SIZE)
    if TILES:
        acc *= _root(squares, rows, eps, K, TILES, BLOCK_M)[None, :]
    pairs = tl.reshape(acc.to(out.dtype.element_ty).to(tl.float32), (2, WIDTH, BLOCK_M))
    gate, up = tl.split(tl.permute(pairs, (1, 2, 0)))
    places = tile * WIDTH + tl.arange(0, WIDTH)
    mask = (places < COLUMNS)[:, None] & (m < stored)[None, :]
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + m.to(tl.int64)[None, :] * COLUMNS + places[:, None], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(product, x, at, mask, scale, scaled, squares, rows, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a tile to the residual, in place; leave what its norm needs."""
    m = tl.arange(0, BLOCK_M)
    dtype = x.dtype.element_ty
    total = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + product.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x + at, total, mask=mask)
    value = total.to(tl.float32)
    tl.store(scaled + at, (value * scale).to(dtype), mask=mask)
    tl.store(squares + tl.program_id(0) * rows + m, tl.sum(value * value, 0), mask=m < rows)


@triton.jit(do_not_specialize=["rows"])
def product_add_kernel(  # type: ignore[no-untyped-def]
    inputs,
    w,
    x,
    norm,
    parts,
    arrivals,
    scaled,
    squares,
    rows,
    inputs_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (columns, split): x += inputs @ w^T, in place, rounded as the product and then as x; `scaled` and
    `squares` for the norm of weight `norm` (see Scaled). The last program to arrive at the columns adds all their
    `parts`, in order whoever that is; `arrivals`, one for each tile of columns, are 0 before and after."""
    tile, split, m = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    start = split * SPLIT
    acc = _tile(
        inputs, w, tl.minimum(columns, N - 1), inside, start, tl.minimum(start + SPLIT, K), rows, inputs_stride, N, K,
        SPLIT == BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_K, AHEAD, LATE, OVERLAP,
    )  # fmt: skip
    at = m.to(tl.int64)[None, :] * N + columns[:, None]
    mask = inside[:, None] & (m < rows)[None, :]
    scale = tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    if SPLITS == 1:
        _add(acc, x, at, mask, scale, scaled, squares, rows, BLOCK_M)
    else:
        stride = tl.cast(rows, tl.int64) * N
        tl.store(parts + split * stride + at, acc, mask=mask)
        tl.debug_barrier()  # the increment releases what all threads have stored, see decode_kernel
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(arrivals + tile, 0)
            total = tl.load(parts + at, mask=mask, other=0.0)
            for part in tl.static_range(1, SPLITS):
                total += tl.load(parts + part * stride + at, mask=mask, other=0.0)
            _add(total, x, at, mask, scale, scaled, squares, rows, BLOCK_M)


@triton.jit(do_not_specialize=["size"])
def reduce_kernel(  # type: ignore[no-untyped-def]
    parts, out, split_stride, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """The splits' sum, in order."""
    wait_for_previous(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = load_product(parts + at, at < size, split_stride, SPLITS, out.dtype.element_ty)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)
