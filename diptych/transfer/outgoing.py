"""What a prefill rank sends: for each room a task that gathers pages into frames and hands them to the data links."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

from diptych.errors import DiptychError, TransferError
from diptych.transfer import wire
from diptych.transfer.commands import AnyEvent, Cancel, Cancelled, Connect, Send, Sent, TransferFailed
from diptych.transfer.heads import Piece, pieces_to_send
from diptych.transfer.incoming import Counters, offload
from diptych.transfer.link import LinkClosed, Transport
from diptych.transfer.pool import DataLink, LinkPool
from diptych.transfer.tasks import Tasks

if TYPE_CHECKING:
    from diptych.kv.share import Grid
    from diptych.kv.store import Lending, PageStore


class Cut(NamedTuple):
    """Items [start, stop) of a command's pages, heads [head_start, head_stop): what one frame holds."""

    start: int
    stop: int
    head_start: int
    head_stop: int


def cuts(num_pages: int, heads: range, head_bytes: int, frame_bytes: int) -> Iterator[Cut]:
    """Frames of about `frame_bytes`, never less than one head of one page (of all layers that are sent)."""
    num_heads = max(1, min(len(heads), frame_bytes // head_bytes))
    pages = max(1, frame_bytes // (num_heads * head_bytes))
    for head in range(heads.start, heads.stop, num_heads):
        for start in range(0, num_pages, pages):
            yield Cut(start, min(start + pages, num_pages), head, min(head + num_heads, heads.stop))


class _Room:
    """A room that is being sent from this rank."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.commands: asyncio.Queue[Send] = asyncio.Queue()
        self.frames: list[int] = []  # so far, to each decode rank
        self.num_bytes = 0
        self.failed = False  # nothing more is sent; rank 0 ends the room with a Cancel
        self.task: asyncio.Task[None] | None = None


class Outgoing:
    """`store` is what `rank` of `grid` holds."""

    def __init__(
        self,
        store: PageStore,
        transports: Sequence[Transport],
        lendings: Mapping[str, Lending],
        *,
        rank: int,
        grid: Grid,
        secret: str,
        rng: random.Random,
        counters: Counters,
        on_event: Callable[[AnyEvent], None],
        executor: Executor | None,
        send_timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        self._store = store
        self._rank, self._grid = rank, grid
        self._first_head, self._first_layer = grid.heads(rank).start, grid.layers(rank).start
        self._counters = counters
        self._on_event = on_event
        self._executor = executor
        self._send_timeout_s = send_timeout_s
        self._rooms: dict[int, _Room] = {}
        self._tasks = Tasks()
        self._pool = LinkPool(
            transports,
            lendings,
            secret,
            rng,
            self._link_broke,
            self._lend,
            connect_timeout_s=send_timeout_s,
            idle_timeout_s=idle_timeout_s,
        )

    def __len__(self) -> int:
        return len(self._rooms)

    @property
    def num_links(self) -> int:
        return len(self._pool)

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)

    def connect(self, command: Connect) -> None:
        for piece in self._pieces(command):
            self._pool.prepare(tuple(command.peers[piece.rank]))

    def send(self, command: Send) -> None:
        room = self._rooms.get(command.room)
        if room is None:
            room = self._rooms[command.room] = _Room(command.epoch)
            room.frames = [0] * len(command.peers)
            room.task = self._tasks.spawn(self._run(command.room, room), f"send-{command.room}")
        if not room.failed:
            room.commands.put_nowait(command)

    def cancel(self, command: Cancel) -> bool:
        """False if the room is not one of ours. What is already with a link still arrives, and is refused there."""
        room = self._rooms.get(command.room)
        if room is None or room.epoch != command.epoch:
            return False
        del self._rooms[command.room]
        self._stop(command.room, room)
        self._on_event(Cancelled(command.room, command.epoch))
        return True

    async def close(self) -> None:
        await self._tasks.close()
        await self._pool.close()
        self._rooms.clear()

    def _pieces(self, command: Connect | Send) -> list[Piece]:
        return pieces_to_send(self._grid, self._rank, self._grid.over(len(command.peers), command.pp_size))

    def _stop(self, number: int, room: _Room) -> None:
        self._pool.leave(number)
        if room.task is not None:
            room.task.cancel()

    def _fail(self, number: int, room: _Room, message: str, code: str) -> None:
        if self._rooms.get(number) is room and not room.failed:
            self._counters.failures += 1
            room.failed = True
            self._stop(number, room)
            self._on_event(TransferFailed(number, room.epoch, message, code))

    def _link_broke(self, numbers: list[int], why: str) -> None:
        for number in numbers:
            if room := self._rooms.get(number):
                self._fail(number, room, why, TransferError.code)

    def _lend(self, lending: Lending) -> wire.Lend:
        """Raises LinkClosed if the pool's memory cannot be lent."""
        store = self._store
        try:
            handle = lending.lend()
        except TransferError as error:
            raise LinkClosed(error.message) from None
        return wire.Lend(handle, store.num_pages, store.num_heads, store.num_layers)

    # ---- one room ----

    async def _run(self, number: int, room: _Room) -> None:
        """Carry the room's commands out until `last`. It stays known, so that a broken link fails it, until Cancel."""
        try:
            last = False
            while not last:
                command = await room.commands.get()  # ended by Cancel; rank 0 has the deadline
                await self._send_pages(room, command)
                last = command.last
            self._on_event(Sent(number, room.epoch, room.frames, room.num_bytes))
        except* DiptychError as group:
            error = _first(group)
            self._fail(number, room, error.message, error.code)
        except* Exception:
            self._fail(number, room, "this rank could not send its pages", TransferError.code)
            raise

    async def _send_pages(self, room: _Room, command: Send) -> None:
        pieces = self._pieces(command)
        if not command.src_pages or not pieces:
            return
        async with asyncio.TaskGroup() as group:
            for piece in pieces:
                group.create_task(self._send_piece(room, command, piece))
        self._counters.pages_sent += len(command.src_pages)

    async def _send_piece(self, room: _Room, command: Send, piece: Piece) -> None:
        """One frame is gathered while the one before it is on its way."""
        link = await self._pool.use(tuple(command.peers[piece.rank]), command.room)
        head_bytes = self._store.head_bytes // self._store.num_layers * len(piece.layers)
        lent = link.lending is not None
        frame_bytes = wire.LENT_FRAME_BYTES if lent else wire.FRAME_BYTES
        delivery: asyncio.Task[None] | None = None
        for cut in cuts(len(command.src_pages), piece.heads, head_bytes, frame_bytes):
            await link.turn.acquire()
            try:
                frame, payload = await self._frame(room, command, piece, cut, lent)
                await self._delivered(link, delivery)
            except BaseException:
                link.turn.release()
                raise
            name = wire.Taken(frame.room, frame.epoch, frame.sequence)
            sending = link.deliver(wire.pack_frame(frame), payload, name, self._send_timeout_s)
            delivery = self._tasks.spawn(sending, "frame")
            num_bytes = (cut.stop - cut.start) * (cut.head_stop - cut.head_start) * head_bytes
            room.num_bytes += num_bytes
            self._counters.bytes_sent += num_bytes
            await asyncio.sleep(0)  # it begins, and others have their turn
        await self._delivered(link, delivery)

    @staticmethod
    async def _delivered(link: DataLink, delivery: asyncio.Task[None] | None) -> None:
        if delivery is not None:
            await asyncio.shield(delivery)
        if link.broken:
            raise LinkClosed(link.broken)

    async def _frame(
        self, room: _Room, command: Send, piece: Piece, cut: Cut, lent: bool
    ) -> tuple[wire.Frame, memoryview]:
        """A frame and its payload: none if the pages are lent."""
        src_pages = command.src_pages[cut.start : cut.stop]
        source, payload, crc = None, memoryview(b""), 0
        if lent:
            head, layer = cut.head_start - self._first_head, piece.layers.start - self._first_layer
            source = wire.Source(src_pages, head, layer)
        else:
            payload, crc = await offload(self._executor, self._gather, src_pages, cut, piece.layers)
        frame = wire.Frame(
            room=command.room,
            epoch=command.epoch,
            source=self._rank,
            sequence=room.frames[piece.rank],
            pages=command.dst_pages[cut.start : cut.stop],
            generations=command.generations[cut.start : cut.stop],
            head_start=cut.head_start,
            head_stop=cut.head_stop,
            layer_start=piece.layers.start,
            layer_stop=piece.layers.stop,
            payload_crc=crc,
            lent=source,
        )
        room.frames[piece.rank] += 1
        return frame, payload

    def _gather(self, pages: list[int], cut: Cut, layers: range) -> tuple[memoryview, int]:
        heads = cut.head_start - self._first_head, cut.head_stop - self._first_head
        mine = range(layers.start - self._first_layer, layers.stop - self._first_layer)
        payload = self._store.read(pages, *heads, mine).cast("B")
        return payload, wire.crc(payload)


def _first(group: BaseExceptionGroup[DiptychError]) -> DiptychError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DiptychError)
    return error
