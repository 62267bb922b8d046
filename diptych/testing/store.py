"""A KV pool without a model: bytes in an array, for tests of the transfer and for simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ArrayStore:
    """A PageStore (diptych/kv/store.py) over `data[page, head, byte]`."""

    def __init__(self, num_pages: int, num_heads: int, head_bytes: int, *, page_size: int = 16) -> None:
        self.data = np.zeros((num_pages, num_heads, head_bytes), np.uint8)
        self.num_pages = num_pages
        self.num_heads = num_heads
        self.head_bytes = head_bytes
        self.layout = f"page,head,layer,kv,slot,dim:bytes:{page_size}:1:{head_bytes}"

    def fill(self, seed: int) -> None:
        self.data[:] = np.random.default_rng(seed).integers(0, 256, self.data.shape, np.uint8)

    def read(self, pages: Sequence[int], head_start: int, head_stop: int) -> memoryview:
        return np.ascontiguousarray(self.data[list(pages), head_start:head_stop]).data

    def write(self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview) -> None:
        shape = (len(pages), head_stop - head_start, self.head_bytes)
        self.data[list(pages), head_start:head_stop] = np.frombuffer(data, np.uint8).reshape(shape)
