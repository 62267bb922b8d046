"""Exchanges between the GPUs of a stage, each enqueued on the current stream and fit for a CUDA graph.

Small sums are ours, in one kernel (diptych/model/kernels/allreduce.py), and so are two ranks' sums of many rows
(diptych/model/row_shares.py); NCCL carries all else. What NCCL cannot promise is the order in which it adds: for two
ranks there is but one, a + b rounded once; for more, `DeviceGroup` adds by itself what NCCL moves. So a sum has the
same bits whichever way it takes.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from diptych.model.allreduce_memory import bytes_at, share_memory
from diptych.model.kernels.allreduce import OneShot, add_parts, whole
from diptych.model.kernels.fused import add_norm
from diptych.model.peer_copies import PeerCopies
from diptych.model.row_shares import LEAST_BYTES, RowShares

log = logging.getLogger(__name__)

# Bytes of the largest sum that takes one shot. Between two H200s it still wins at 4 MiB: 31 µs with add and norm, NCCL
# and add_norm 48 (benchmarks/gpu/allreduce.py, which tries no more). More ranks send more copies; not measured.
ONE_SHOT_BYTES = {2: 4 << 20, 4: 256 << 10}
ONE_SHOT_BYTES_OF_MANY = 128 << 10


class DeviceGroup:
    """The ranks of a stage on GPUs of one host, one each. See Parallel for what the exchanges mean.

    `limit`: bytes of the largest sum that takes one shot; 0: none does. Making one is a collective itself, after which
    NCCL is set up, so that a capture can follow.
    """

    def __init__(self, group: ProcessGroup, limit: int | None = None) -> None:
        self._group, self._rank, self._world = group, group.rank(), group.size()
        limit = ONE_SHOT_BYTES.get(self._world, ONE_SHOT_BYTES_OF_MANY) if limit is None else limit
        self._one_shot: OneShot | None = None
        self.row_shares: RowShares | None = None
        if limit and (addresses := share_memory(group, OneShot.num_bytes(self._world, limit))):
            self._one_shot = OneShot(self._rank, addresses, limit, "cuda")
        elif limit:
            log.warning("the GPUs cannot reach one another's memory: small sums take NCCL, which is slower")
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def share_rows(self, most: int, width: int, dtype: torch.dtype) -> None:
        """See Parallel.share_rows."""
        if self._world != 2 or most * width * dtype.itemsize <= LEAST_BYTES:  # of more ranks nothing is measured
            return
        num_bytes = RowShares.num_bytes(self._world, most, width, dtype.itemsize)
        if addresses := share_memory(self._group, num_bytes):
            memory = bytes_at(addresses[self._rank], num_bytes)
            self.row_shares = RowShares(self._rank, addresses, memory, most, width, dtype, PeerCopies())
            self.row_shares.prepare()
        else:
            log.warning("the GPUs cannot reach one another's memory: large sums take NCCL, which is slower")

    @property
    def has_one_shot(self) -> bool:
        """Whether the ranks reach one another's memory."""
        return self._one_shot is not None

    def sum(self, x: Tensor) -> Tensor:
        """In place if it can be. Added in float32 and rounded once."""
        x = x.contiguous()
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.sum(x)
        if self._world > 2:
            return self._ordered_sum(x)
        dist.all_reduce(x, group=self._group)
        return x

    def sum_add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Parallel.sum_add_norm."""
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.sum_add_norm(x, delta, weight, eps)
        return add_norm(x, self.sum(whole(delta, x.dtype)), weight, eps)

    def join(self, x: Tensor) -> Tensor | None:
        parts = x.new_empty(self._world, *x.shape)
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self._group)
        return parts.movedim(0, -2).flatten(-2) if self._rank == 0 else None

    def share_tokens(self, tokens: Tensor) -> None:
        dist.broadcast(tokens, group=self._group, group_src=0)

    def _ordered_sum(self, x: Tensor) -> Tensor:
        """Each rank adds one share of the tensor, in rank order, and hands it to all: as many bytes as a ring moves."""
        share = -(-x.numel() // self._world)
        padded = F.pad(x.view(-1), (0, share * self._world - x.numel()))
        parts = torch.empty_like(padded)
        dist.all_to_all_single(parts, padded, group=self._group)
        dist.all_gather_into_tensor(padded, add_parts(parts.view(self._world, share), x.dtype), group=self._group)
        return padded[: x.numel()].view(x.shape)
