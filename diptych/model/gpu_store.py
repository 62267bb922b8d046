"""What the transfer sees of a pool on a GPU: bytes that come and go on streams of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from diptych.kv.store import LentPool, PageStore
from diptych.model import gpu_ipc
from diptych.model.pool import KVPool, PoolStore


def make_store(pool: KVPool, model_layers: int) -> PageStore:
    """The store that fits the pool's device. `model_layers`: of the whole model."""
    return GpuStore(pool, model_layers) if pool.pages.is_cuda else PoolStore(pool, model_layers)


class GpuStore(PoolStore):
    """Also a way of Lending (diptych/kv/store.py): by CUDA, to other processes of this host.

    Nothing here waits for the default stream, where steps are computed, nor makes it wait; the pages that are copied
    are complete and nobody else's.
    """

    def __init__(self, pool: KVPool, model_layers: int) -> None:
        super().__init__(pool, model_layers)
        self._device = self._bytes.get_device()
        self._reading, self._writing = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)

    def read(self, pages: Sequence[int], head_start: int, head_stop: int, layers: range | None = None) -> memoryview:
        """See PageStore.read."""
        with torch.inference_mode(), torch.cuda.stream(self._reading):
            parts = [self._part(page, head_start, head_stop, layers) for page in pages]
            host = torch.empty((len(pages), *parts[0].shape), dtype=torch.uint8, pin_memory=True)
            for place, part in zip(host, parts, strict=True):
                place.copy_(part, non_blocking=True)
            _finish(self._reading)
        return host.reshape(-1).numpy().data

    def write(
        self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview, layers: range | None = None
    ) -> None:
        """See PageStore.write."""
        with torch.inference_mode(), torch.cuda.stream(self._writing):
            parts = [self._part(page, head_start, head_stop, layers) for page in pages]
            host = torch.empty((len(pages), *parts[0].shape), dtype=torch.uint8, pin_memory=True)
            host.numpy()[:] = np.frombuffer(data, np.uint8).reshape(host.shape)
            for place, part in zip(host, parts, strict=True):
                part.copy_(place, non_blocking=True)
            _finish(self._writing)

    def _part(self, page: int, head_start: int, head_stop: int, layers: range | None) -> Tensor:
        return self._bytes[page, head_start:head_stop, self._slice(layers)]

    def lend(self) -> bytes:
        """See Lending.lend."""
        return gpu_ipc.export(self._device, self.memory.address, self.memory.num_bytes)

    def borrow(self, handle: bytes, num_bytes: int) -> LentPool:
        """See Lending.borrow."""
        return gpu_ipc.MappedPool(self._device, self.memory.address, handle, num_bytes)

    serving = staticmethod(nullcontext)  # the other side needs nothing of us


def _finish(stream: torch.cuda.Stream) -> None:
    done = torch.cuda.Event()
    done.record(stream)
    done.synchronize()
