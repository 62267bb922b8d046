"""The KV pool of one rank: one tensor that attention writes and reads by page, and the transfer by head of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diptych.kv.store import Memory
from diptych.types import I64

MEMORY_PAGE = 4096
KEYS, VALUES = 0, 1  # fourth dimension of the pool


class KVPool:
    """`pages` is `[page, kv_head, layer, 2, slot, dim]`, zeroed at first; index 0 of the fourth dimension are keys.

    What is written is always finite (`nan_to_num`): attention multiplies the slots that a row does not own by zero, so
    a not-a-number of one sequence must not get here, or it would reach others that share or later own a page.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        num_layers: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.page_size, self.num_heads, self.num_layers, self.head_dim = page_size, num_heads, num_layers, head_dim
        shape = (num_pages, num_heads, num_layers, 2, page_size, head_dim)
        self.pages = _zeros(shape, dtype) if device == "cpu" else torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, page: Tensor, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the KV of tokens, `[tokens, kv_head, dim]` each, at `page[i]`, `slot[i]`."""
        both = torch.stack((keys, values), 2).nan_to_num_()
        self.pages[:, :, layer][page, :, :, slot] = both

    def index(self, runs: I64, run_tokens: int) -> Tensor:
        """Where runs of tokens are in a `source`. A run is `run_tokens` slots of a page (a divisor of its size); run r
        is the (r % runs a page)-th of page r // runs a page. `[n, k]` runs give `[n * heads * k]`, in this order."""
        per_page = self.page_size // run_tokens
        page, part = np.divmod(runs[:, None, :], per_page)
        head = page * self.num_heads + np.arange(self.num_heads)[None, :, None]
        index = head * (self.num_layers * 2 * per_page) + part
        return torch.from_numpy(index.reshape(-1)).to(self.pages.device)

    def source(self, layer: int, kind: int, run_tokens: int) -> Tensor:
        """A view to select runs from by `index`: one layer's keys (`kind` KEYS) or VALUES, `[…, run_tokens * dim]`."""
        first = (2 * layer + kind) * self.page_size * self.head_dim
        return self.pages.view(-1)[first:].view(-1, run_tokens * self.head_dim)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that cost memory and time only where they are touched (torch writes them all), aligned to a memory page."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + MEMORY_PAGE, np.uint8)
    start = -memory.ctypes.data % MEMORY_PAGE
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


class PoolStore:
    """The bytes of a pool on the CPU; see diptych.kv.store.PageStore. Both calls copy once.

    `model_layers`: how many layers the whole model has; the pool may hold those of one stage.
    """

    def __init__(self, pool: KVPool, model_layers: int) -> None:
        num_pages, num_heads, num_layers, _, page_size, head_dim = pool.pages.shape
        dtype = str(pool.pages.dtype).removeprefix("torch.")
        self.num_pages, self.num_heads, self.num_layers = num_pages, num_heads, num_layers
        self.head_bytes = num_layers * 2 * page_size * head_dim * pool.pages.element_size()
        self.layout = f"page,head,layer,kv,slot,dim:{dtype}:{page_size}:{model_layers}:{head_dim}"
        self._bytes = pool.pages.view(num_pages, num_heads, num_layers, -1).view(torch.uint8)
        gpu = self._bytes.get_device() if self._bytes.is_cuda else None
        self.memory = Memory(self._bytes.data_ptr(), self._bytes.nbytes, gpu)

    def read(self, pages: Sequence[int], head_start: int, head_stop: int, layers: range | None = None) -> memoryview:
        """See PageStore.read."""
        heads, some = slice(head_start, head_stop), self._slice(layers)
        return self._bytes.numpy()[np.asarray(pages), heads, some].reshape(-1).data

    def write(
        self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview, layers: range | None = None
    ) -> None:
        """See PageStore.write."""
        heads, some = slice(head_start, head_stop), self._slice(layers)
        shape = (len(pages), head_stop - head_start, some.stop - some.start, self.head_bytes // self.num_layers)
        self._bytes.numpy()[np.asarray(pages), heads, some] = np.frombuffer(data, np.uint8).reshape(shape)

    def _slice(self, layers: range | None) -> slice:
        return slice(0, self.num_layers) if layers is None else slice(layers.start, layers.stop)
