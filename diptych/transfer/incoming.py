"""What a decode rank is willing to take: the rooms it expects, and the checks before a frame is written.

The order matters: a frame is refused unless its room is live, its epoch and each page's generation are the reserved
ones, and its checksum is right; only then does it reach the store. No page is written twice, none after Cancel.
Lent pages pass the same checks but for the checksum, and are copied out of the sender's pool.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec
import numpy as np

from diptych.errors import CorruptTransfer, TransferError
from diptych.kv.extents import Block, PoolShape, extents
from diptych.transfer import wire
from diptych.transfer.commands import AnyEvent, Cancel, Cancelled, Expect, Expecting, Received, TransferFailed
from diptych.transfer.link import LinkClosed

if TYPE_CHECKING:
    from diptych.kv.store import LentPool, PageStore

T = TypeVar("T")


class Counters(msgspec.Struct):
    """Of one rank's data plane. They only grow."""

    pages_sent: int = 0
    bytes_sent: int = 0
    pages_received: int = 0  # of rooms that are complete
    bytes_received: int = 0
    stale_frames: int = 0  # refused: unknown, cancelled or superseded room, or pages of another generation
    duplicate_frames: int = 0  # refused: already here
    corrupt_frames: int = 0
    protocol_errors: int = 0  # links closed because of what came over them
    failures: int = 0  # rooms failed on this rank


def total(ranks: Sequence[Counters]) -> Counters:
    """What the ranks of a server have done together, rank 0 first. Every rank has its part of each page: pages are
    counted once, as rank 0 has.
    """
    sums = {name: sum(getattr(rank, name) for rank in ranks) for name in Counters.__struct_fields__}
    return Counters(**sums | {"pages_sent": ranks[0].pages_sent, "pages_received": ranks[0].pages_received})


async def offload(executor: Executor | None, work: Callable[..., T], *args: object) -> T:
    """`work(*args)` in `executor`, or here and now without one."""
    if executor is None:
        return work(*args)
    return await asyncio.get_running_loop().run_in_executor(executor, functools.partial(work, *args))


class Lender(NamedTuple):
    """The pool of the rank at the other end of a link, from which we copy."""

    pool: LentPool
    shape: PoolShape


class _Expected:
    """One live room. `pending[i, h, l]`: head h of layer l of this rank of the room's i-th page is still to come."""

    def __init__(self, command: Expect, num_heads: int, num_layers: int) -> None:
        self.epoch = command.epoch
        self.index = {page: i for i, page in enumerate(command.pages)}
        self.generations = command.generations
        self.pending = np.ones((len(command.pages), num_heads, num_layers), np.bool_)
        self.num_missing = self.pending.size  # not yet in the store
        self.next_sequence: dict[int, int] = {}  # of each source
        self.num_bytes = 0
        self.num_writing = 0
        self.live = True  # not cancelled
        self.failed = False

    def rows_of(self, frame: wire.Frame) -> list[int] | None:
        """Where the frame's pages are in `pending`, or None if one of them is not expected with that generation."""
        rows = [self.index.get(page, -1) for page in frame.pages]
        if any(
            row < 0 or self.generations[row] != generation
            for row, generation in zip(rows, frame.generations, strict=True)
        ):
            return None
        return rows


class Incoming:
    """`heads` and `layers` are this rank's, numbered over the whole model."""

    def __init__(
        self,
        store: PageStore,
        heads: range,
        layers: range,
        counters: Counters,
        on_event: Callable[[AnyEvent], None],
        executor: Executor | None,
    ) -> None:
        self._store = store
        self._shape = shape_of(store)
        self._heads, self._layers = heads, layers
        self._counters = counters
        self._on_event = on_event
        self._executor = executor
        self._rooms: dict[int, _Expected] = {}

    def __len__(self) -> int:
        return len(self._rooms)

    def expect(self, command: Expect) -> None:
        old = self._rooms.get(command.room)
        if old is not None:
            self.cancel(Cancel(command.room, old.epoch))
        room = _Expected(command, len(self._heads), len(self._layers))
        self._rooms[command.room] = room
        self._on_event(Expecting(command.room, command.epoch))
        if not room.num_missing:
            self._complete(command.room, room)

    def cancel(self, command: Cancel) -> bool:
        """False if the room is not one of ours. Answers Cancelled at once, or when the write in progress has ended."""
        room = self._rooms.get(command.room)
        if room is None or room.epoch != command.epoch:
            return False
        del self._rooms[command.room]
        room.live = False
        if not room.num_writing:
            self._on_event(Cancelled(command.room, command.epoch))
        return True

    async def take(self, header: bytes, payload: memoryview, lender: Lender | None = None) -> wire.Frame:
        """One frame, as it came; `lender` has its pages, if they are lent.

        Raises ProtocolError, CorruptTransfer or LinkClosed if the link it came over cannot be trusted.
        """
        frame = wire.unpack_frame(header)
        room = self._rooms.get(frame.room)
        rows = room.rows_of(frame) if room and room.epoch == frame.epoch and not room.failed else None
        if room is None or rows is None:
            self._counters.stale_frames += 1
            return frame
        expected = room.next_sequence.get(frame.source, 0)
        if frame.sequence < expected:
            self._counters.duplicate_frames += 1
            return frame
        try:
            if frame.sequence > expected:
                raise CorruptTransfer("KV corruption: a data frame is missing")
            room.next_sequence[frame.source] = expected + 1
            await self._write(frame, room, rows, payload, lender)
        except CorruptTransfer as error:
            self._counters.corrupt_frames += 1
            self._fail(frame.room, room, error)
        except TransferError as error:
            self._fail(frame.room, room, error)
            raise LinkClosed(error.message) from None  # what cannot be copied now cannot be copied for others either
        return frame

    async def _write(
        self, frame: wire.Frame, room: _Expected, rows: list[int], payload: memoryview, lender: Lender | None
    ) -> None:
        heads = _within(frame.head_start, frame.head_stop, self._heads, "heads")
        layers = _within(frame.layer_start, frame.layer_stop, self._layers, "layers")
        num_parts = len(rows) * len(heads) * len(layers)
        num_bytes = num_parts * self._shape.layer_bytes
        if len(payload) != (0 if frame.lent else num_bytes):
            raise CorruptTransfer(
                f"KV corruption: {len(payload)} bytes for {len(rows)} pages, {len(heads)} heads, {len(layers)} layers"
            )
        if frame.lent:
            write = self._copying(frame, frame.lent, heads, layers, lender)
        else:
            write = functools.partial(self._store.write, frame.pages, heads.start, heads.stop, payload, layers)
        place = rows, slice(heads.start, heads.stop), slice(layers.start, layers.stop)
        if not room.pending[place].all() or len(set(rows)) != len(rows):
            raise CorruptTransfer("KV corruption: a page came twice")
        room.num_writing += 1  # from here to its end, a Cancel waits for us
        try:
            if not frame.lent and await offload(self._executor, wire.crc, payload) != frame.payload_crc:
                raise CorruptTransfer("KV corruption: pages do not match their checksum")
            if not room.live:
                self._counters.stale_frames += 1
                return
            room.pending[place] = False
            await offload(self._executor, write)
        finally:
            room.num_writing -= 1
            if not room.live and not room.num_writing:
                self._on_event(Cancelled(frame.room, frame.epoch))
        self._counters.bytes_received += num_bytes
        room.num_bytes += num_bytes
        room.num_missing -= num_parts
        if room.live and not room.failed and not room.num_missing:
            self._complete(frame.room, room)

    def _copying(
        self, frame: wire.Frame, lent: wire.Source, heads: range, layers: range, lender: Lender | None
    ) -> Callable[[], None]:
        """Raises CorruptTransfer if the pages are not in the lender's pool."""
        if lender is None:
            raise CorruptTransfer("KV corruption: pages of a pool that was not lent")
        dst = Block(frame.pages, heads.start, layers.start)
        src = Block(lent.pages, lent.head, lent.layer)
        try:
            copies = extents(self._shape, dst, lender.shape, src, len(heads), len(layers))
        except ValueError as error:
            raise CorruptTransfer(f"KV corruption: {error}") from None
        return functools.partial(lender.pool.copy, copies)

    def _complete(self, number: int, room: _Expected) -> None:
        del self._rooms[number]
        self._counters.pages_received += len(room.index)
        self._on_event(Received(number, room.epoch, sum(room.next_sequence.values()), room.num_bytes))

    def _fail(self, number: int, room: _Expected, error: TransferError) -> None:
        """Nothing more is taken for the room, but it is rank 0 that ends it, with a Cancel."""
        if room.live and not room.failed:
            self._counters.failures += 1
            room.failed = True
            self._on_event(TransferFailed(number, room.epoch, error.message, error.code))


def shape_of(store: PageStore) -> PoolShape:
    return PoolShape(store.num_pages, store.num_heads, store.num_layers, store.head_bytes // store.num_layers)


def _within(start: int, stop: int, mine: range, what: str) -> range:
    """[start, stop) counted within the rank. Raises CorruptTransfer if not all of it is this rank's."""
    if start < mine.start or stop > mine.stop:
        raise CorruptTransfer(f"KV corruption: {what} {start}:{stop} are not this rank's")
    return range(start - mine.start, stop - mine.start)
