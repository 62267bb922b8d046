"""Whether this machine's arithmetic keeps the promise that a row's result does not depend on the batch.

The promise rests on how the libraries below torch choose their kernels; so it is tried at each start, in a fraction of
a second, and the answer is shown in /server_info and the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.model.attention import AttentionBackend
from diptych.model.layers import padded_rows
from diptych.model.pool import KVPool
from diptych.types import Plan

ROWS = (1, 6, 16, 45, 130)
MAX_WIDTH = 2048  # output columns tried; more of the same kernel
ROWS_OF_LOOPS = (4, 100, 516)
TOKENS = 150  # of the attention's test: two key blocks, several tiles


Product = Callable[[Tensor], Tensor]


def products_are_exact(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: str,
    product_of: Callable[[Tensor], Product],
    rows_of: Callable[[int], int] = padded_rows,
) -> bool:
    """Whether a row of `product_of(weight)(x)` is the same among any ROWS. `shapes`: (inputs, outputs) of weights."""
    generator = torch.Generator().manual_seed(0)
    for width, outputs in set(shapes):
        weight = torch.randn(min(outputs, MAX_WIDTH), width, generator=generator).to(device, dtype)
        x = torch.randn(rows_of(max(ROWS)), width, generator=generator).to(device, dtype)
        product = product_of(weight)
        whole = product(x)
        for rows in map(rows_of, ROWS):
            first, last = product(x[:rows].clone()), product(x[-rows:].clone())
            if not (torch.equal(first, whole[:rows]) and torch.equal(last, whole[-rows:])):
                return False
    return True


def activations_are_exact(width: int, dtype: torch.dtype, device: str) -> bool:
    """Whether an element-wise function gives a row the same in any batch: threads may share a loop unevenly, and what
    is left over of a vector is computed by other code."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(ROWS_OF_LOOPS), 2 * width, generator=generator).to(device, dtype)
    whole = F.silu(x[:, :width])
    return all(torch.equal(F.silu(x[:rows].clone()[:, :width]), whole[:rows]) for rows in ROWS_OF_LOOPS)


def attention_is_exact(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    backend_of: Callable[[KVPool], AttentionBackend],
    stored: torch.dtype | None = None,
) -> bool:
    """Whether a token attends the same as one of a long prompt, and alone. `stored`: the pool's type, if another."""
    num_pages = -(-TOKENS // page_size)
    attention = backend_of(KVPool(num_pages, page_size, kv_heads, 1, head_dim, stored or dtype, device))
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(TOKENS, n, head_dim, generator=generator).to(device, dtype) for n in sizes)
    attention.begin(plan_of_one(0, TOKENS, num_pages))
    whole = attention.attend(0, q, k, v)
    attention.begin(plan_of_one(TOKENS - 1, TOKENS, num_pages))
    return torch.equal(attention.attend(0, q[-1:], k[-1:], v[-1:]), whole[-1:])


def plan_of_one(start: int, stop: int, num_pages: int) -> Plan:
    """A step of one sequence in pages 0, 1, …; tokens [start, stop) are new."""
    positions = np.arange(start, stop)
    return Plan(
        step=0,
        rows=[],
        token_ids=np.zeros(stop - start, np.int32),
        positions=positions.astype(np.int32),
        slots=positions.astype(np.int64),
        q_starts=np.array([0, stop - start], np.int32),
        kv_lens=np.array([stop], np.int32),
        pages=np.arange(num_pages, dtype=np.int32)[None],
    )
