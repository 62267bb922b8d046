"""The processes that share a model, and the few exchanges they need.

Stages one after the other hold a run of layers each (pipeline parallelism); the ranks of a stage share each of its
layers (tensor parallelism). Sums run in rank order on every rank, so that a token's numbers do not depend on where in a
batch it stands (a ring all-reduce adds each part of a tensor in another order).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from diptych.kv.share import layer_range
from diptych.model.fit import kv_part, part

if TYPE_CHECKING:
    from diptych.model.allreduce import DeviceGroup
    from diptych.model.row_shares import RowShares

EXCHANGE_TIMEOUT_S = 300.0  # a rank that is later than this is lost; a dead one is noticed at once


def init(rank: int, tp: int, pp: int, init_method: str, device: str = "cpu") -> Parallel:
    """Join the `pp` stages of `tp` ranks that meet at `init_method` (file://… or tcp://…). Blocks until all are there.

    On a GPU each process has one device, the current one. Raises torch's DistError after EXCHANGE_TIMEOUT_S. All ranks
    are on one host, so gloo stays on the loopback.
    """
    timeout, world = timedelta(seconds=EXCHANGE_TIMEOUT_S), tp * pp
    if device == "cuda":
        # A program that fails while it uses NVLink multicast (NVLS) can put all GPUs of the host out of service.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        gpu = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group(
            "nccl", init_method=init_method, rank=rank, world_size=world, timeout=timeout, device_id=gpu
        )
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world, timeout=timeout)
    if tp == 1:
        return Parallel(stage=rank, stages=pp)
    # Every rank takes part in making every group.
    groups = [dist.new_group(list(range(stage * tp, (stage + 1) * tp)), timeout) for stage in range(pp)]
    group = groups[rank // tp]
    return Parallel(rank % tp, tp, _on_device(group) if device == "cuda" else HostGroup(group), rank // tp, pp)


def _on_device(group: ProcessGroup) -> DeviceGroup:
    from diptych.model.allreduce import DeviceGroup  # has kernels: nothing that a CPU could import

    return DeviceGroup(group)


class HostGroup:
    """The ranks of a stage on CPUs: exchanges over gloo, each of which blocks."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self._rank, self._world = group, group.rank(), group.size()

    def sum(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self._world)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        total = parts[0]
        for other in parts[1:]:
            total += other
        return total

    def join(self, x: Tensor) -> Tensor | None:
        parts = [torch.empty_like(x) for _ in range(self._world)] if self._rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self._group, group_dst=0)
        return torch.cat(parts, -1) if parts is not None else None


class Parallel:
    """This process's place: `rank` of the `world` of one stage, and `stage` of `stages`.

    With a world of 1 there is no group and the collectives do nothing. On a GPU they are enqueued on the current stream
    and can be captured in a CUDA graph; all ranks enqueue, capture and replay them in the same order.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        group: HostGroup | DeviceGroup | None = None,
        stage: int = 0,
        stages: int = 1,
    ) -> None:
        if (world > 1) != (group is not None):
            raise ValueError("a group is needed exactly when there is more than one rank")
        self.rank, self.world, self.group = rank, world, group
        self.stage, self.stages = stage, stages

    @property
    def leads(self) -> bool:
        """Whether this is the rank that samples."""
        return self.rank == self.stage == 0

    def share_rows(self, most: int, width: int, dtype: torch.dtype) -> None:
        """Let products of up to `most` rows of `width` numbers be summed by shares (see RowShares), where the ranks are
        GPUs that can. A collective, which takes memory of the device until the process ends."""
        if self.group is not None and not isinstance(self.group, HostGroup):
            self.group.share_rows(most, width, dtype)

    @property
    def row_shares(self) -> RowShares | None:
        """What sums products of many rows, if the ranks have memory for it."""
        return None if self.group is None or isinstance(self.group, HostGroup) else self.group.row_shares

    def send(self, x: Tensor, stage: int) -> None:
        """Hand `x` to the same rank of another stage. On a CPU, blocks until it takes it."""
        dist.send(x.contiguous(), stage * self.world + self.rank)

    def receive(self, x: Tensor, stage: int) -> Tensor:
        """Fill `x` with what the same rank of another stage sends; the shapes must be the same."""
        dist.recv(x, stage * self.world + self.rank)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, added in rank order; the same bits on each rank. May reuse `x`."""
        return x if self.group is None else self.group.sum(x)

    def sum_add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x += the sum of every rank's `delta`, in place; returns RMSNorm(x) * weight. By kernels: not on several CPUs.

        `x` `[rows, width]`; `delta` is a product of this shape or its unreduced parts (model/kernels/matmul.py). A row
        gets the same bits whatever the number of rows: those of `add_norm(x, self.sum(delta), weight, eps)`.
        """
        if self.group is not None:
            assert not isinstance(self.group, HostGroup)
            return self.group.sum_add_norm(x, delta, weight, eps)
        from diptych.model.kernels.fused import add_norm  # not to be had without Triton

        return add_norm(x, delta, weight, eps)

    def join(self, x: Tensor) -> Tensor | None:
        """Every rank's `x` side by side along the last dimension: on rank 0 of the stage, elsewhere None."""
        return x if self.group is None else self.group.join(x)

    def share_tokens(self, tokens: Tensor) -> Tensor:
        """What rank 0 of the stage sampled, int64 `[rows]`, on each of its ranks: fills `tokens` of the others. On CPUs
        nobody needs them."""
        if self.group is not None:
            assert not isinstance(self.group, HostGroup)
            self.group.share_tokens(tokens)
        return tokens

    def share(self, total: int, what: str) -> tuple[int, int]:
        """This rank's equal part [start, stop) of `total` things. Raises ConfigError if they do not divide evenly."""
        return part(total, self.world, self.rank, what)

    def share_layers(self, num_layers: int) -> range:
        """This stage's layers. Raises ConfigError if there are fewer than stages."""
        return layer_range(num_layers, self.stages, self.stage)

    def share_heads(self, num_kv_heads: int) -> tuple[int, int]:
        """This rank's key-value heads. Fewer heads than ranks are replicated, each on neighbouring ranks."""
        return kv_part(num_kv_heads, self.world, self.rank)
