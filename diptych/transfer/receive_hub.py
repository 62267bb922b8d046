"""All rooms of a decode server (rank 0), and its connections to prefill servers."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from diptych.errors import TransferError
from diptych.transfer import wire
from diptych.transfer.bootstrap import Route
from diptych.transfer.commands import AnyCommand, AnyEvent
from diptych.transfer.link import Transport
from diptych.transfer.peer import Peer
from diptych.transfer.receiver import NobodyReceiver, Receiver
from diptych.transfer.room import HubOptions, failure, in_use
from diptych.transfer.tasks import Tasks
from diptych.types import FAKE_BOOTSTRAP_HOST, Bootstrap

FetchRoute = Callable[[str, int, float], Awaitable[Route]]


class ReceiveHub:
    """`broadcast` hands a command to the data plane of every rank; their events come back through `handle_event`.

    `addresses` are where each rank's data plane receives; the ranks are `pp_size` stages of equally many.
    `on_change(room)` is called from the loop whenever a Receiver's state has changed, and when one that has failed is
    drained. `fake`: every room is received from nobody.
    """

    def __init__(
        self,
        terms: wire.Terms,
        addresses: list[list[str]],
        broadcast: Callable[[AnyCommand], None],
        on_change: Callable[[int], None],
        *,
        boot_id: str,
        vocab_size: int,
        pp_size: int = 1,
        transport: Transport,
        fetch_route: FetchRoute,
        options: HubOptions | None = None,
        fake: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.terms = terms
        self.addresses = addresses
        self.num_ranks, self.pp_size = len(addresses), pp_size
        self.broadcast = broadcast
        self.on_change = on_change
        self.boot_id = boot_id
        self.transport = transport
        self.fetch_route = fetch_route
        self.options = options or HubOptions()
        self.connect_timeout_s = min(self.options.bootstrap_timeout_s, 3 * self.options.heartbeat_timeout_s)
        self.rng = rng or random.SystemRandom()
        self._vocab_size = vocab_size
        self._fake = fake
        self._rooms: dict[int, Receiver] = {}
        self._peers: dict[tuple[str, int], Peer] = {}
        self._tasks = Tasks()

    def open(self, bootstrap: Bootstrap) -> Receiver:
        """Begin to receive a room; starts the handshake. Raises RoomInUse, also while a rank may still write for
        a request that has failed."""
        if self._fake or bootstrap.host == FAKE_BOOTSTRAP_HOST:
            return NobodyReceiver(self, bootstrap.room, self._vocab_size)
        if bootstrap.room in self._rooms:
            raise in_use(bootstrap.room)
        key = (bootstrap.host, bootstrap.port)
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(self, *key)
            self._tasks.spawn(peer.run(), "control-link")
        receiver = Receiver(self, peer, bootstrap.room, self.rng.getrandbits(63))
        self._rooms[bootstrap.room] = receiver
        peer.join(receiver)
        return receiver

    def handle_event(self, rank: int, event: AnyEvent) -> None:
        """What rank `rank`'s data plane reports. Events of rooms that are gone are ignored."""
        receiver = self._rooms.get(event.room)
        if receiver is not None:
            receiver.handle_event(rank, event)

    def snapshot(self) -> dict[str, int]:
        """What is held. `rooms` is zero after quiescence; `links` counts prefill servers that are connected."""
        return {
            "rooms": len(self._rooms),
            "links": sum(peer.connected for peer in self._peers.values()),
            "tasks": len(self._tasks),
        }

    async def close(self) -> None:
        """Fail what is left and disconnect; prefill learns by the broken link."""
        for receiver in list(self._rooms.values()):
            receiver.fail(failure("the decode server is stopping", TransferError.code))
        await self._tasks.close()

    # ---- called by Receiver and Peer ----

    def forget(self, receiver: Receiver) -> None:
        """The room is over, and nothing writes to its pages."""
        if self._rooms.get(receiver.room) is receiver:
            del self._rooms[receiver.room]

    def peer_ended(self, peer: Peer) -> None:
        """The next room for that server connects anew."""
        if self._peers.get((peer.host, peer.port)) is peer:
            del self._peers[peer.host, peer.port]
