"""Tensor parallelism: the processes that share each layer, and the few collectives they need.

Sums run in rank order on every rank, so that a token's numbers do not depend on where in a batch it stands (a ring
all-reduce adds each part of a tensor in another order).
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from diptych.errors import ConfigError

COLLECTIVE_TIMEOUT_S = 300.0  # a rank that is later than this is lost; a dead one is noticed at once


def init(rank: int, world: int, init_method: str, device: str = "cpu") -> ProcessGroup:
    """Join the group of `world` ranks that meet at `init_method` (file://… or tcp://…). Blocks until all are there.

    Raises torch's DistError after COLLECTIVE_TIMEOUT_S. All ranks are on one host, so gloo stays on the loopback.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    group = dist.group.WORLD
    assert group is not None
    return group


class Parallel:
    """This process's place among the ranks. With a world of 1 there is no group and the collectives do nothing."""

    def __init__(self, rank: int = 0, world: int = 1, group: ProcessGroup | None = None) -> None:
        if (world > 1) != (group is not None):
            raise ValueError("a group is needed exactly when there is more than one rank")
        self.rank, self.world, self.group = rank, world, group

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, added in rank order; the same bits on each rank. May reuse `x`."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def join(self, x: Tensor) -> Tensor | None:
        """Every rank's `x` side by side along the last dimension: on rank 0, elsewhere None."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, dst=0, group=self.group)
        return torch.cat(parts, -1) if parts is not None else None

    def share(self, total: int, what: str) -> tuple[int, int]:
        """This rank's equal part [start, stop) of `total` things. Raises ConfigError if they do not divide evenly."""
        if total % self.world:
            raise ConfigError(f"--tp {self.world} does not divide the model's {total} {what}; choose another --tp")
        size = total // self.world
        return self.rank * size, (self.rank + 1) * size

    def share_heads(self, num_kv_heads: int) -> tuple[int, int]:
        """This rank's key-value heads. Fewer heads than ranks are replicated, each on neighbouring ranks."""
        if self.world <= num_kv_heads:
            return self.share(num_kv_heads, "key-value heads")
        if self.world % num_kv_heads:
            raise ConfigError(
                f"--tp {self.world} is no multiple of the model's {num_kv_heads} key-value heads; choose another --tp"
            )
        head = self.rank * num_kv_heads // self.world
        return head, head + 1
