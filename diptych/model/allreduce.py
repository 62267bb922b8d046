"""Exchanges between the GPUs of a stage, each enqueued on the current stream and fit for a CUDA graph.

NCCL carries them. What it cannot promise is the order in which it adds: for two ranks there is but one, a + b rounded
once; for more, `DeviceGroup` adds by itself what NCCL moves.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from diptych.model.kernels.allreduce import add_parts


class DeviceGroup:
    """The ranks of a stage on GPUs of one host, one each. See Parallel for what the exchanges mean."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._rank, self._world = group, group.rank(), group.size()

    def sum(self, x: Tensor) -> Tensor:
        """In place if it can be. Added in float32 and rounded once."""
        x = x.contiguous()
        if self._world > 2:
            return self._ordered_sum(x)
        dist.all_reduce(x, group=self._group)
        return x

    def join(self, x: Tensor) -> Tensor | None:
        parts = x.new_empty(self._world, *x.shape)
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self._group)
        return parts.movedim(0, -2).flatten(-2) if self._rank == 0 else None

    def share_tokens(self, tokens: Tensor) -> None:
        dist.broadcast(tokens, group=self._group, group_src=0)

    def _ordered_sum(self, x: Tensor) -> Tensor:
        """Each rank adds one share of the tensor, in rank order, and hands it to all: as many bytes as a ring moves."""
        share = -(-x.numel() // self._world)
        whole = F.pad(x.view(-1), (0, share * self._world - x.numel()))
        parts = torch.empty_like(whole)
        dist.all_to_all_single(parts, whole, group=self._group)
        dist.all_gather_into_tensor(whole, add_parts(parts.view(self._world, share), x.dtype), group=self._group)
        return whole[: x.numel()].view(x.shape)
