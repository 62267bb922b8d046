"""A KV pool without a model: bytes in an array, for tests of the transfer and for simulation."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from diptych.errors import TransferError
from diptych.kv.extents import Extent
from diptych.kv.store import Memory


class ArrayStore:
    """A PageStore (diptych/kv/store.py) over `data[page, head, byte]`: bytes of `num_layers` layers, one after another.

    `model_layers`: of the whole model (default: this rank has them all).
    """

    def __init__(
        self,
        num_pages: int,
        num_heads: int,
        head_bytes: int,
        *,
        num_layers: int = 1,
        model_layers: int = 0,
        page_size: int = 16,
    ) -> None:
        self.data = np.zeros((num_pages, num_heads, head_bytes), np.uint8)
        self.num_pages = num_pages
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.head_bytes = head_bytes
        layer_bytes = head_bytes // num_layers
        self.layout = f"page,head,layer,kv,slot,dim:bytes:{page_size}:{model_layers or num_layers}:{layer_bytes}"

    @property
    def memory(self) -> Memory:
        return Memory(self.data.ctypes.data, self.data.nbytes, None)

    def fill(self, seed: int) -> None:
        self.data[:] = np.random.default_rng(seed).integers(0, 256, self.data.shape, np.uint8)

    def read(self, pages: Sequence[int], head_start: int, head_stop: int, layers: range | None = None) -> memoryview:
        return np.ascontiguousarray(self.data[list(pages), head_start:head_stop, self._bytes_of(layers)]).data

    def write(
        self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview, layers: range | None = None
    ) -> None:
        shape = (len(pages), head_stop - head_start, -1)
        values = np.frombuffer(data, np.uint8).reshape(shape)
        self.data[list(pages), head_start:head_stop, self._bytes_of(layers)] = values

    def _bytes_of(self, layers: range | None) -> slice:
        layer_bytes = self.head_bytes // self.num_layers
        return slice(None) if layers is None else slice(layers.start * layer_bytes, layers.stop * layer_bytes)


class SharedStore(ArrayStore):
    """An ArrayStore in shared memory, which other processes of this user can map: a way of Lending without a GPU.

    Pages are copied as a GPU's are, extent by extent. `before_copy` is called with the extents before each copy, in
    the thread that copies, and may raise.
    """

    def __init__(self, *shape: int, **options: int) -> None:
        super().__init__(*shape, **options)
        self._fd = os.memfd_create("diptych-pool")
        os.ftruncate(self._fd, max(1, self.data.nbytes))
        self._memory = mmap.mmap(self._fd, max(1, self.data.nbytes))
        self.data = np.frombuffer(self._memory, np.uint8, self.data.size).reshape(self.data.shape)
        self.before_copy: Callable[[Sequence[Extent]], None] = lambda extents: None
        self.refuses = ""  # why nothing can be lent or borrowed
        self.num_mapped = 0  # pools of others, now

    def lend(self) -> bytes:
        if self.refuses:
            raise TransferError(self.refuses)
        return f"/proc/{os.getpid()}/fd/{self._fd}".encode()

    def borrow(self, handle: bytes, num_bytes: int) -> MappedArray:
        if self.refuses:
            raise TransferError(self.refuses)
        try:
            with Path(handle.decode()).open("rb") as file:
                memory = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            raise TransferError("no such memory, or less of it") from None
        self.num_mapped += 1
        return MappedArray(self, memory)

    serving = staticmethod(nullcontext)

    def close(self) -> None:
        """Lend no more. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MappedArray:
    """A LentPool of a SharedStore's."""

    def __init__(self, store: SharedStore, memory: mmap.mmap) -> None:
        self._store = store
        self._memory = memory
        self._turn = threading.Lock()

    def copy(self, extents: Sequence[Extent]) -> None:
        with self._turn:
            if self._memory.closed:
                raise TransferError("the other side's memory is not mapped any more")
            self._store.before_copy(extents)
            to, source = self._store.data.reshape(-1), np.frombuffer(self._memory, np.uint8)
            for extent in extents:
                for row in range(extent.rows):
                    here, there = extent.to + row * extent.to_pitch, extent.source + row * extent.source_pitch
                    to[here : here + extent.width] = source[there : there + extent.width]
            del source

    def close(self) -> None:
        with self._turn:
            if not self._memory.closed:
                self._memory.close()
                self._store.num_mapped -= 1
