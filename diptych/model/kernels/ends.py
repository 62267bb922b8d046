"""What comes before the layers of a decode step and after them, each as one kernel: tokens to first norm; argmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.launch import wait_for_previous

BLOCK = 4096  # logits of a program


@triton.jit
def embed_norm_kernel(  # type: ignore[no-untyped-def]
    ids, last, table, weight, x, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Program (row): x = the token's row of `table`; out = RMSNorm(x) * weight. Negative ids: see embed_norm."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # no kernel writes it
    wait_for_previous(OVERLAP)
    token = tl.load(ids + tl.program_id(0)).to(tl.int64)
    if token < 0:
        token = tl.load(last - 1 - token)
    row = tl.program_id(0).to(tl.int64) * WIDTH
    found = tl.load(table + token * WIDTH + columns, mask=inside, other=0.0)
    tl.store(x + row + columns, found, mask=inside)
    value = found.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    tl.store(out + row + columns, (value * root * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def argmax_kernel(  # type: ignore[no-untyped-def]
    logits,
    keys,
    arrivals,
    out,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (row, block). A logit's key is its bits, made monotonic, above the complement of its id, so the highest
    key is that of the lowest id among equals. The last program to arrive at a row compares its blocks' `keys`
    `[rows, BLOCKS]`; `arrivals` `[rows]` are 0 before and after."""
    wait_for_previous(OVERLAP)
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < WIDTH, other=0.0).to(tl.float32)
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # a negative zero is a zero
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(ids < WIDTH, order, -0x80000000).to(tl.int64)
    tl.store(keys + row * BLOCKS + block, tl.max((order << 32) + (0x7FFFFFFF - ids), 0))
    tl.debug_barrier()  # the increment releases what this program has stored, see decode_kernel
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") == BLOCKS - 1:
        tl.store(arrivals + row, 0)
        places = tl.arange(0, PAD)
        found = tl.load(keys + row * BLOCKS + places, mask=places < BLOCKS, other=-0x7FFFFFFFFFFFFFFF)
        tl.store(out + row, 0x7FFFFFFF - (tl.max(found, 0) & 0xFFFFFFFF))


def embed_norm(ids: Tensor, last: Tensor, table: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The embeddings of tokens `ids` `[rows]`, and their RMSNorm. An id of -1 - r stands for the token `last[r]`."""
    rows, width = len(ids), table.shape[1]
    x = torch.empty(rows, width, dtype=table.dtype, device=table.device)
    out, block = torch.empty_like(x), triton.next_power_of_2(width)
    embed_norm_kernel[(rows,)](
        ids, last, table, weight, x, out, eps, WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        **launch.options(),
    )  # fmt: skip
    return x, out


def argmax(logits: Tensor, arrivals: Tensor) -> Tensor:
    """`logits.argmax(-1)`, int64, and of equals the first. `logits` `[rows, width]`, each row contiguous; see
    argmax_kernel. A row of which nothing is a number gives one of its ids."""
    rows, width = logits.shape
    blocks = triton.cdiv(width, BLOCK)
    keys = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    argmax_kernel[(rows, blocks)](
        logits, keys, arrivals, out, logits.stride(0), WIDTH=width, BLOCK=BLOCK, BLOCKS=blocks,
        PAD=triton.next_power_of_2(blocks), num_warps=4, **launch.options(),
    )  # fmt: skip
    return out
