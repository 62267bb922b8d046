"""What the transfer sees of a rank's KV pool: pages as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from diptych.kv.extents import Extent


class Memory(NamedTuple):
    """Where a pool lies, contiguous."""

    address: int
    num_bytes: int
    gpu: int | None  # this process's number of it; None: the host's memory


class PageStore(Protocol):
    """One rank's pool, `[page, kv_head, layer, 2, slot, dim]`: a run of heads of a page is one piece of bytes, as is a
    run of layers of one head.

    Heads and layers are counted within the rank, from 0. Both methods block for the time of the copy and may be called
    from any thread; that nobody else uses the pages meanwhile is the business of whoever holds them.
    """

    @property
    def num_pages(self) -> int: ...

    @property
    def num_heads(self) -> int:
        """KV heads of this rank."""

    @property
    def num_layers(self) -> int:
        """Layers of this rank."""

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head of one page: all layers of this rank, keys and values; each layer has as many."""

    @property
    def layout(self) -> str:
        """`page,head,layer,kv,slot,dim:<dtype>:<page_size>:<layers>:<head_dim>`, with the layers of the whole model;
        equal on both sides of a transfer."""

    def read(self, pages: Sequence[int], head_start: int, head_stop: int, layers: range | None = None) -> memoryview:
        """A copy of heads [head_start, head_stop) of `pages`, of `layers` or all: `[page, head, layer, …]`, contiguous
        bytes."""

    def write(
        self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview, layers: range | None = None
    ) -> None:
        """The inverse of read. Raises ValueError if `data` has not the size that read would give."""


@runtime_checkable
class PlacedStore(PageStore, Protocol):
    """A PageStore whose pool is one piece of memory, that stays there for the life of this process."""

    @property
    def memory(self) -> Memory: ...


class LentPool(Protocol):
    """Another process's pool, whose pages can be copied into ours."""

    def copy(self, extents: Sequence[Extent]) -> None:
        """Copy these bytes into our pool; returns when they are there. From any thread; copies take turns.

        Raises TransferError if the memory cannot be read, or after close.
        """

    def close(self) -> None:
        """Let go of it as soon as no copy runs. Calling it again does nothing."""


@runtime_checkable
class Lending(Protocol):
    """A way to copy pages straight out of one process's pool into another's: both sides of it."""

    def lend(self) -> bytes:
        """What `borrow` needs on the other side; at most 16 KiB. Raises TransferError if there is no way."""

    def borrow(self, handle: bytes, num_bytes: int) -> LentPool:
        """Another process's pool of `num_bytes`. Raises TransferError, also for a handle that leads to less."""

    def serving(self) -> AbstractContextManager[None]:
        """Entered while the other side may be copying out of our pool, by several at once."""
