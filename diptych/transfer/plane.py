"""The data plane of one rank: carries out what rank 0's hubs command, and says what became of it.

The same object sends (on a prefill rank) and receives (on a decode rank).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING

from diptych.errors import ConfigError, DiptychError, ProtocolError, TransferError
from diptych.transfer import auth, wire
from diptych.transfer.commands import AnyCommand, AnyEvent, Cancel, Cancelled, Connect, Expect, Send
from diptych.transfer.incoming import Counters, Incoming, Lender, offload, shape_of
from diptych.transfer.link import Link, LinkClosed, Listener, Transport
from diptych.transfer.outgoing import Outgoing
from diptych.transfer.pool import DATA_PURPOSE
from diptych.transfer.stream import StreamLink
from diptych.transfer.tasks import Tasks

if TYPE_CHECKING:
    from diptych.kv.share import Grid
    from diptych.kv.store import Lending, LentPool, PageStore

log = logging.getLogger(__name__)

MAX_LINKS = 1024  # taken from others; beyond that a caller is turned away


class DataPlane:
    """Moves pages between `store`, which is what `rank` of `grid` holds, and other servers.

    `executor` runs gathering, checksums and scattering; without one they run on the event loop, 2 MiB at a time.
    `transports` are in order of preference. Raises ConfigError if the store cannot be sent.
    """

    def __init__(
        self,
        store: PageStore,
        transports: Sequence[Transport],
        rank: int,
        grid: Grid,
        on_event: Callable[[AnyEvent], None],
        *,
        secret: str = "",
        rng: random.Random | None = None,
        executor: Executor | None = None,
        send_timeout_s: float = 5.0,
        idle_timeout_s: float = 60.0,
    ) -> None:
        heads, layers = grid.heads(rank), grid.layers(rank)
        if (store.num_heads, store.num_layers) != (len(heads), len(layers)):
            raise ConfigError(
                f"rank {rank} holds {store.num_heads} kv heads, not {len(heads)}, "
                f"or {store.num_layers} layers, not {len(layers)}"
            )
        if store.head_bytes > wire.MAX_PAYLOAD_BYTES:
            raise ConfigError(f"one kv head of a page has {store.head_bytes} bytes; choose a smaller --page-size")
        self.counters = Counters()
        self._store, self._executor = store, executor
        self._transports = transports
        lendings = {transport.scheme: transport.lending(store) for transport in transports}
        self._lendings = {scheme: lending for scheme, lending in lendings.items() if lending is not None}
        self._secret = secret
        self._rng = rng or random.SystemRandom()
        self._timeout_s = send_timeout_s
        self._on_event = on_event
        self._listeners: list[Listener] = []
        self._links: dict[Link, None] = {}  # taken from others
        self._tasks = Tasks()
        self._incoming = Incoming(store, heads, layers, self.counters, on_event, executor)
        self._outgoing = Outgoing(
            store,
            transports,
            self._lendings,
            rank=rank,
            grid=grid,
            secret=secret,
            rng=self._rng,
            counters=self.counters,
            on_event=on_event,
            executor=executor,
            send_timeout_s=send_timeout_s,
            idle_timeout_s=idle_timeout_s,
        )

    async def start(self, host: str) -> list[str]:
        """Listen (decode). Returns the addresses at which this rank receives, in order of preference."""
        for transport in self._transports:
            lending = self._lendings.get(transport.scheme)
            self._listeners.append(await transport.listen(host, partial(self._on_link, lending)))
        return [listener.address for listener in self._listeners]

    def execute(self, command: AnyCommand) -> None:
        """Begin to carry a command out; returns at once. Events follow, some of them before this returns."""
        match command:
            case Send():
                self._outgoing.send(command)
            case Expect():
                self._incoming.expect(command)
            case Connect():
                self._outgoing.connect(command)
            case Cancel():
                if not self._incoming.cancel(command) and not self._outgoing.cancel(command):
                    self._on_event(Cancelled(command.room, command.epoch))

    def snapshot(self) -> dict[str, int]:
        """What is held: all zero once everything has ended and idle links have been closed."""
        return {
            "rooms": len(self._incoming) + len(self._outgoing),
            "links": len(self._links) + self._outgoing.num_links,
            "tasks": self._outgoing.num_tasks,
        }

    async def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        await self._outgoing.close()
        await self._tasks.close()
        for link in list(self._links):  # of tasks that never began
            link.close()
        self._links.clear()

    def _on_link(self, lending: Lending | None, link: Link) -> None:
        if len(self._links) >= MAX_LINKS:
            link.close()
            return
        self._links[link] = None
        self._tasks.spawn(self._take_frames(link, lending), "data-link-in")

    async def _take_frames(self, link: Link, lending: Lending | None) -> None:
        lender: Lender | None = None
        try:
            await auth.answer(link, DATA_PURPOSE, self._secret, self._rng, self._timeout_s)
            lender = None if lending is None else await self._borrow(link, lending)
            while True:
                header, payload = await link.recv()
                if lender is not None and isinstance(link, StreamLink) and link.hung_up():
                    return  # a frame that was still on its way: the memory it speaks of may be gone
                frame = await self._incoming.take(header, payload, lender)
                if lender is not None:
                    await link.send(wire.encode(wire.Taken(frame.room, frame.epoch, frame.sequence)))
                await asyncio.sleep(0)  # a sender that never pauses must not keep the loop from others
        except LinkClosed:
            return
        except (ProtocolError, auth.AuthError):
            self.counters.protocol_errors += 1
        except DiptychError:
            self.counters.corrupt_frames += 1
        finally:
            self._links.pop(link, None)
            link.close()
            if lender is not None:
                self._unmap(lender.pool)

    async def _borrow(self, link: Link, lending: Lending) -> Lender:
        """The pool of the rank that has called. Raises ProtocolError, or LinkClosed if it cannot be reached."""
        try:
            async with asyncio.timeout(self._timeout_s):
                lend = wire.decode_loan((await link.recv())[0])
        except TimeoutError:
            raise LinkClosed(f"nothing was lent within {self._timeout_s:g} s") from None
        if not isinstance(lend, wire.Lend):
            raise ProtocolError("a link over which nothing is lent")
        shape = shape_of(self._store)._replace(
            num_pages=lend.num_pages, num_heads=lend.num_heads, num_layers=lend.num_layers
        )
        try:
            pool = await self._map(lending, lend.handle, shape.num_bytes)
        except TransferError as error:
            log.warning("pages will not come straight from the prefill server's memory: %s", error.message)
            await link.send(wire.encode(wire.Lent(mapped=False)))
            raise LinkClosed(error.message) from None
        try:
            await link.send(wire.encode(wire.Lent(mapped=True)))
        except BaseException:
            self._unmap(pool)
            raise
        return Lender(pool, shape)

    async def _map(self, lending: Lending, handle: bytes, num_bytes: int) -> LentPool:
        """Raises TransferError."""
        mapping = asyncio.ensure_future(offload(self._executor, lending.borrow, handle, num_bytes))
        try:
            return await asyncio.shield(mapping)
        except asyncio.CancelledError:
            mapping.add_done_callback(self._mapped_in_vain)
            raise

    def _mapped_in_vain(self, mapping: asyncio.Future[LentPool]) -> None:
        if mapping.exception() is None:
            self._unmap(mapping.result())

    def _unmap(self, pool: LentPool) -> None:
        """Not on the event loop: it waits for a copy that runs, and may wait for the device."""
        if self._executor is None:
            pool.close()
        else:
            self._executor.submit(pool.close)
