"""What lies between a layer's products, each as one kernel: q/k norm + rotary + KV write, add + RMSNorm, SiLU · mul.

Every program works on one row, with a shape that the model alone decides: rows do not depend on the batch. Inputs that
come from a split matrix product (diptych/model/kernels/matmul.py) may be its unreduced parts: `SPLITS` float32 arrays
of the same shape, `split_stride` apart, which are added in order and rounded as the product would have been. Arithmetic
is float32, and results are rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.launch import wait_for_previous

BLOCK = 1024  # columns of a program of SiLU · mul
HEADS = 8  # heads of a program of the qkv kernel


@triton.jit
def load_product(places, mask, split_stride, SPLITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product as float32, rounded to DTYPE; its parts are added in order."""
    x = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLITS):
        x += tl.load(places + part * split_stride, mask=mask, other=0.0).to(tl.float32)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _finite(x, most):  # type: ignore[no-untyped-def]
    """nan_to_num: 0 for a not-a-number, the largest numbers of the pool's type for infinities."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -most), most)


@triton.jit
def qkv_kernel(  # type: ignore[no-untyped-def]
    qkv,
    norm,
    cos,
    sin,
    positions,
    slots,
    q_out,
    layer_pages,
    row_stride,
    split_stride,
    page_stride,
    head_stride,
    eps,
    most,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (token, HEADS heads of q, k and v in a row): norm and rotate q and k, store k and v at the token's slot
    (page * PAGE + offset; below 0: nowhere), leave q in `q_out` `[tokens, Q_HEADS, 2 * HALF]`."""
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF)
    slot = tl.load(slots + token)
    is_q, is_v = heads < Q_HEADS, heads >= Q_HEADS + KV_HEADS
    real = (heads < Q_HEADS + 2 * KV_HEADS)[:, None]
    turned = (heads < Q_HEADS + KV_HEADS)[:, None]
    places = qkv + token * row_stride + heads[:, None] * (2 * HALF) + dims[None, :]
    x1 = load_product(places, real, split_stride, SPLITS, DTYPE)
    x2 = load_product(places + HALF, real, split_stride, SPLITS, DTYPE)
    a1, a2 = x1, x2
    if NORM:
        root = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)
        weights = norm + heads[:, None] * (2 * HALF) + dims[None, :]
        a1 = x1 * root[:, None] * tl.load(weights, mask=turned, other=0.0).to(tl.float32)
        a2 = x2 * root[:, None] * tl.load(weights + HALF, mask=turned, other=0.0).to(tl.float32)
    angle = tl.load(positions + token).to(tl.int64) * (2 * HALF) + dims
    cos1, sin1 = tl.load(cos + angle).to(tl.float32)[None, :], tl.load(sin + angle).to(tl.float32)[None, :]
    cos2, sin2 = (
        tl.load(cos + angle + HALF).to(tl.float32)[None, :],
        tl.load(sin + angle + HALF).to(tl.float32)[None, :],
    )
    y1 = tl.where(is_v[:, None], x1, a1 * cos1 + a2 * sin1)
    y2 = tl.where(is_v[:, None], x2, a2 * cos2 + a1 * sin2)
    q_places = q_out + (token * Q_HEADS + heads)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(q_places, y1.to(DTYPE), mask=is_q[:, None])
    tl.store(q_places + HALF, y2.to(DTYPE), mask=is_q[:, None])
    kv_head = tl.where(is_v, heads - Q_HEADS - KV_HEADS, heads - Q_HEADS)
    kv = (slot // PAGE).to(tl.int64) * page_stride + kv_head.to(tl.int64) * head_stride
    kv += (slot % PAGE) * (2 * HALF) + tl.where(is_v, PAGE * 2 * HALF, 0)
    kept = real & (heads >= Q_HEADS)[:, None] & (slot >= 0)
    kv_places = layer_pages + kv[:, None] + dims[None, :]
    stored = layer_pages.dtype.element_ty
    tl.store(kv_places, _finite(y1.to(DTYPE).to(tl.float32), most).to(stored), mask=kept)
    tl.store(kv_places + HALF, _finite(y2.to(DTYPE).to(tl.float32), most).to(stored), mask=kept)


@triton.jit
def store_kv_kernel(  # type: ignore[no-untyped-def]
    k,
    v,
    slots,
    layer_pages,
    k_stride,
    v_stride,
    page_stride,
    head_stride,
    most,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (token): its keys and values to its slot (see qkv_kernel). HEADS: KV_HEADS padded to a power of two."""
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads, dims = tl.arange(0, HEADS), tl.arange(0, DIM)
    kept = (heads < KV_HEADS)[:, None] & (slot >= 0)
    places = layer_pages + (slot // PAGE).to(tl.int64) * page_stride + (slot % PAGE) * DIM
    places += heads.to(tl.int64)[:, None] * head_stride + dims[None, :]
    within = heads[:, None] * DIM + dims[None, :]
    stored = layer_pages.dtype.element_ty
    keys = tl.load(k + token * k_stride + within, mask=kept, other=0.0).to(tl.float32)
    tl.store(places, _finite(keys, most).to(stored), mask=kept)
    values = tl.load(v + token * v_stride + within, mask=kept, other=0.0).to(tl.float32)
    tl.store(places + PAGE * DIM, _finite(values, most).to(stored), mask=kept)


@triton.jit
def add_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    delta,
    weight,
    out,
    split_stride,
    eps,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (row): x += delta in place, rounded to x's type; out = RMSNorm(x) * weight."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # no kernel writes it
    wait_for_previous(OVERLAP)
    dtype = x.dtype.element_ty
    added = load_product(delta + row + columns, inside, split_stride, SPLITS, dtype)
    total = (tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32) + added).to(dtype)
    tl.store(x + row + columns, total, mask=inside)
    value = total.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    tl.store(out + row + columns, (value * root * scale).to(dtype), mask=inside)


@triton.jit
def silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    out,
    split_stride,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (row, BLOCK columns): silu(gate) * up, of `[rows, 2 * WIDTH]`, gate first."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype = out.dtype.element_ty
    places = gate_up + row * (2 * WIDTH) + columns
    gate = load_product(places, inside, split_stride, SPLITS, dtype)
    up = load_product(places + WIDTH, inside, split_stride, SPLITS, dtype)
    tl.store(out + row * WIDTH + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(dtype), mask=inside)


# ---- on tensors --------------------------------------------------------------------------------------------------
# A product below is `[rows, columns]` contiguous, or its parts `[splits, rows, columns]` float32.

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def splits_of(product: Tensor) -> int:
    return product.shape[0] if product.ndim == 3 else 1


def norm_rotate_store(
    qkv: Tensor,
    norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    layer_pages: Tensor,
    num_heads: int,
) -> Tensor:
    """See qkv_kernel: q `[rows, num_heads, dim]`, in the model's type (that of `cos`).

    `qkv` is a product of `(num_heads + 2 * kv_heads) * dim` columns; `norm` `[num_heads + kv_heads, dim]`; `cos`, `sin`
    `[positions, dim]` (see rope_tables); `positions`, `slots` `[tokens]` int32, for the first of the rows (the others'
    q is undefined); `layer_pages` `pool.pages[:, :, layer]`.
    """
    kv_heads, _, page_size, dim = layer_pages.shape[1:]
    rows, all_heads = qkv.shape[-2], num_heads + 2 * kv_heads
    q = torch.empty(rows, num_heads, dim, dtype=cos.dtype, device=qkv.device)
    qkv_kernel[(slots.shape[0], triton.cdiv(all_heads, HEADS))](
        qkv,
        cos if norm is None else norm,
        cos,
        sin,
        positions,
        slots,
        q,
        layer_pages,
        all_heads * dim,
        rows * all_heads * dim,
        layer_pages.stride(0),
        layer_pages.stride(1),
        eps,
        torch.finfo(layer_pages.dtype).max,
        SPLITS=splits_of(qkv),
        NORM=norm is not None,
        Q_HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEADS=HEADS,
        PAGE=page_size,
        HALF=dim // 2,
        DTYPE=DTYPES[cos.dtype],
        num_warps=4,
        **launch.options(),
    )
    return q


def store_kv(k: Tensor, v: Tensor, slots: Tensor, layer_pages: Tensor) -> None:
    """See store_kv_kernel. `k`, `v` `[rows, kv_heads, dim]`, each row contiguous; `slots` `[rows]` int32."""
    kv_heads, _, page_size, dim = layer_pages.shape[1:]
    store_kv_kernel[(slots.shape[0],)](
        k,
        v,
        slots,
        layer_pages,
        k.stride(0),
        v.stride(0),
        layer_pages.stride(0),
        layer_pages.stride(1),
        torch.finfo(layer_pages.dtype).max,
        KV_HEADS=kv_heads,
        HEADS=triton.next_power_of_2(kv_heads),
        PAGE=page_size,
        DIM=dim,
        num_warps=4,
        **launch.options(),
    )


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See add_norm_kernel: `x` `[rows, width]` changes in place; `delta` is a product of this shape."""
    rows, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    add_norm_kernel[(rows,)](
        x, delta, weight, out, x.numel(), eps, SPLITS=splits_of(delta), WIDTH=width, BLOCK=block,
        num_warps=min(16, max(1, block // 512)), **launch.options(),
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """See silu_mul_kernel: `[rows, width]` from a product of `2 * width` columns."""
    rows, width = gate_up.shape[-2], gate_up.shape[-1] // 2
    out = torch.empty(rows, width, dtype=dtype, device=gate_up.device)
    silu_mul_kernel[(rows, triton.cdiv(width, BLOCK))](
        gate_up, out, rows * 2 * width, SPLITS=splits_of(gate_up), WIDTH=width, BLOCK=BLOCK, num_warps=4,
        **launch.options(),
    )  # fmt: skip
    return out
