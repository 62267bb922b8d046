"""A KV pool without a model: bytes in an array, for tests of the transfer and for simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
