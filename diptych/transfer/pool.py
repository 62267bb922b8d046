"""The data links of one prefill rank: opened on demand, shared by rooms, closed when broken or long idle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from diptych.errors import ProtocolError
from diptych.transfer import auth, wire
from diptych.transfer.auth import AuthError
from diptych.transfer.link import Link, LinkClosed, Transport
from diptych.transfer.tasks import Tasks

if TYPE_CHECKING:
    from diptych.kv.store import Lending

DATA_PURPOSE = "kv data"
_FRAMES_IN_HAND = 2  # of one link: one on its way while the next is gathered; bounds memory when the other side is slow

Addresses = tuple[str, ...]  # of one rank, in order of preference


class DataLink:
    """One open link and the rooms that have frames on it. `turn` is taken before a frame is gathered.

    `lending`: the other side copies out of our pool in this way, and says of each frame when it has.
    """

    def __init__(self, link: Link, lending: Lending | None, opening: asyncio.Future[DataLink]) -> None:
        self.link = link
        self.lending = lending
        self.opening = opening  # what the pool knows it by
        self.turn = asyncio.Semaphore(_FRAMES_IN_HAND)
        self.rooms: set[int] = set()
        self.idle: asyncio.TimerHandle | None = None
        self.broken = ""  # why
        self._untaken: dict[wire.Taken, asyncio.Future[None]] = {}  # frames that the other side is still to copy

    async def deliver(self, header: bytes, payload: memoryview, frame: wire.Taken, timeout_s: float) -> None:
        """Send a frame, wait until lent pages have been copied, give the frame's turn back.

        Never cancelled for one room's sake: half a frame would end the link for all. A link that takes nothing for
        `timeout_s` is closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if self.lending is None:
                    await self.link.send(header, payload)
                    return
                taken = self._untaken[frame] = asyncio.get_running_loop().create_future()
                with self.lending.serving():
                    await self.link.send(header, payload)
                    await taken
        except TimeoutError:
            self.broken = f"the decode server took no KV pages for {timeout_s:g} s"
            self.link.close()
        except LinkClosed as error:
            self.broken = self.broken or error.message
        finally:
            self._untaken.pop(frame, None)
            self.turn.release()

    async def listen(self) -> None:
        """Hear what has been taken, until the link breaks. Raises LinkClosed or ProtocolError."""
        try:
            while True:
                header, _ = await self.link.recv()
                message = wire.decode_loan(header) if self.lending is not None else None
                if not isinstance(message, wire.Taken):
                    raise ProtocolError("a message on a link that only takes frames")
                taken = self._untaken.get(message)
                if taken is not None and not taken.done():
                    taken.set_result(None)
        except (LinkClosed, ProtocolError) as error:
            for taken in self._untaken.values():
                if not taken.done():
                    taken.set_exception(LinkClosed(error.message))
                    taken.exception()  # its frame may still be on its way out, and hears it there
            raise


class LinkPool:
    """`on_broken(rooms, why)` is called when a link breaks while rooms use it. `lend`: our pool, in one of the
    `lendings`, which are by transport."""

    def __init__(
        self,
        transports: Sequence[Transport],
        lendings: Mapping[str, Lending],
        secret: str,
        rng: random.Random,
        on_broken: Callable[[list[int], str], None],
        lend: Callable[[Lending], wire.Lend],
        *,
        connect_timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        self._transports = {transport.scheme: transport for transport in transports}
        self._secret = secret
        self._rng = rng
        self._on_broken = on_broken
        self._lendings, self._lend = lendings, lend
        self._connect_timeout_s = connect_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._links: dict[Addresses, asyncio.Future[DataLink]] = {}
        self._tasks = Tasks()

    def __len__(self) -> int:
        return len(self._links)

    def prepare(self, addresses: Addresses) -> asyncio.Future[DataLink]:
        """Begin to open the link if it is not there."""
        opening = self._links.get(addresses)
        if opening is None:
            opening = self._links[addresses] = asyncio.get_running_loop().create_future()
            self._tasks.spawn(self._keep(addresses, opening), "data-link")
        return opening

    async def use(self, addresses: Addresses, room: int) -> DataLink:
        """The link to a rank, for `room` until `leave`. Raises LinkClosed, AuthError or ProtocolError."""
        found = await asyncio.shield(self.prepare(addresses))
        found.rooms.add(room)
        if found.idle is not None:
            found.idle.cancel()
            found.idle = None
        return found

    def leave(self, room: int) -> None:
        for opening in self._links.values():
            if opening.done() and room in (link := opening.result()).rooms:
                link.rooms.discard(room)
                self._rest(link)

    async def close(self) -> None:
        await self._tasks.close()
        self._links.clear()

    async def _keep(self, addresses: Addresses, opening: asyncio.Future[DataLink]) -> None:
        """Open the link, hand it to whoever waits, notice when it breaks."""
        found: DataLink | None = None
        try:
            link, lending = await self._dial(addresses)
            found = DataLink(link, lending, opening)
            opening.set_result(found)
            self._rest(found)
            await found.listen()
        except (LinkClosed, AuthError, ProtocolError) as error:
            if not opening.done():
                opening.set_exception(error)
                opening.exception()  # nobody may be waiting for it
            elif rooms := list(opening.result().rooms):
                self._on_broken(rooms, opening.result().broken or error.message)
        finally:
            if self._links.get(addresses) is opening:
                del self._links[addresses]
            if not opening.done():
                opening.cancel()
            if found is not None:
                found.link.close()
                if found.idle is not None:
                    found.idle.cancel()

    def _rest(self, link: DataLink) -> None:
        """Retire the link later, unless a room uses it again. A mapped pool stays: it costs nothing but its making."""
        if not link.rooms and link.idle is None and link.lending is None:
            link.idle = asyncio.get_running_loop().call_later(self._idle_timeout_s, self._retire, link)

    def _retire(self, link: DataLink) -> None:
        """No room may find it any more. Its task notices that it is closed and does the rest."""
        self._links = {to: opening for to, opening in self._links.items() if opening is not link.opening}
        link.link.close()

    async def _dial(self, addresses: Addresses) -> tuple[Link, Lending | None]:
        """The first address that answers, and how our pool is lent over it. Raises what the last one raised."""
        error: LinkClosed | AuthError | ProtocolError = LinkClosed("no transport in common")
        for address in addresses:
            transport = self._transports.get(address.partition("://")[0])
            if transport is None:
                continue
            try:
                link = await transport.connect(address, self._connect_timeout_s)
                await auth.call(link, DATA_PURPOSE, self._secret, self._rng, self._connect_timeout_s)
                lending = self._lendings.get(transport.scheme)
                if lending is not None:
                    await self._lend_over(link, lending)
                return link, lending
            except (LinkClosed, AuthError, ProtocolError) as failure:
                error = failure
        raise error

    async def _lend_over(self, link: Link, lending: Lending) -> None:
        """Have the other side map our pool. Closes the link and raises LinkClosed or ProtocolError if it cannot."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await link.send(wire.encode(self._lend(lending)))
                answer = wire.decode_loan((await link.recv())[0])
            if answer != wire.Lent(mapped=True):
                raise LinkClosed("the decode server cannot map this server's memory")
        except BaseException as error:
            link.close()
            if isinstance(error, TimeoutError):
                raise LinkClosed(f"pool not mapped within {self._connect_timeout_s:g} s") from None
            raise
