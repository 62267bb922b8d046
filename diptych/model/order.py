"""A total order of tokens: by value, highest first, and among equals by id, lowest first.

Sorting routines leave the order of equal values open, so it could change with the batch; this order cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ordered_top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of each row of float32 `[rows, n]` in the order above: their values and ids, `[rows, count]`.

    Value and id become one integer: float bits, made monotonic, above the complement of the id. Not for NaN.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0: a negative zero is a zero
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    keys |= torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    top = torch.topk(keys, count, dim=-1).values
    ids = values.shape[-1] - 1 - (top & 0xFFFFFFFF)
    return values.gather(-1, ids), ids
