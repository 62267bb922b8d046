"""All rooms of a prefill server (rank 0): listens for decode servers and brings each room's two halves together."""

from __future__ import annotations

import random
from collections.abc import Callable

from diptych.errors import DiptychError, RoomInUse, TransferError
from diptych.kv.share import Grid
from diptych.transfer import auth, wire
from diptych.transfer.commands import AnyCommand, AnyEvent, Connect
from diptych.transfer.control import CONTROL_PURPOSE, Conversation, disagreement, hear, say
from diptych.transfer.link import Link, Listener, Transport
from diptych.transfer.room import HubOptions, failure, in_use
from diptych.transfer.sender import NobodySender, Sender
from diptych.transfer.tasks import Tasks
from diptych.transfer.unmet import Early, Unmet, refuse

MAX_CONVERSATIONS = 256


class SendHub:
    """`broadcast` hands a command to the data plane of every rank; their events come back through `handle_event`.

    `on_change(room)` is called from the loop whenever a Sender's state has changed. `fake`: every room goes to nobody.
    """

    def __init__(
        self,
        terms: wire.Terms,
        num_ranks: int,
        broadcast: Callable[[AnyCommand], None],
        on_change: Callable[[int], None],
        *,
        boot_id: str,
        options: HubOptions | None = None,
        fake: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self.terms = terms
        self.num_ranks = num_ranks
        self.broadcast = broadcast
        self.options = options or HubOptions()
        self.boot_id = boot_id
        self._fake = fake
        self._on_change = on_change
        self._rng = rng or random.SystemRandom()
        self._rooms: dict[int, Sender] = {}
        self._unmet = Unmet(self.options.bootstrap_timeout_s)
        self._links: dict[Link, None] = {}
        self._conversations: dict[Conversation, None] = {}
        self._tasks = Tasks()
        self._listener: Listener | None = None

    async def start(self, transport: Transport, host: str) -> str:
        """Listen for decode servers. Returns the control address to register with the bootstrap service."""
        self._listener = await transport.listen(host, self._on_link)
        return self._listener.address

    def open(self, room: int, num_pages: int, *, nobody: bool = False) -> Sender:
        """Begin to hand over a prompt of `num_pages` pages. `nobody`: the request's bootstrap host is the fake one.

        Raises RoomInUse. If decode gave the room up first, the Sender has failed already.
        """
        if nobody or self._fake:
            return NobodySender(self, room, num_pages, self._on_change)
        if room in self._rooms:
            raise in_use(room)
        sender = self._rooms[room] = Sender(self, room, num_pages, self._on_change)
        known = self._unmet.take(room)
        if isinstance(known, Early):
            sender.attach(known.conversation, known.epoch)
            if known.reserve is not None:
                sender.reserve(known.reserve)
        elif known is not None:
            sender.fail(failure(known.message, known.code))
        return sender

    def handle_event(self, rank: int, event: AnyEvent) -> None:
        """What rank `rank`'s data plane reports. Events of rooms that have ended are ignored."""
        sender = self._rooms.get(event.room)
        if sender is not None:
            sender.handle_event(rank, event)

    def snapshot(self) -> dict[str, int]:
        """What is held. `rooms` is zero after quiescence; `links` counts decode servers that are connected."""
        return {
            "rooms": len(self._rooms) + len(self._unmet),
            "links": len(self._links),
            "tasks": len(self._tasks),
        }

    async def close(self) -> None:
        """Fail what is left and disconnect."""
        if self._listener is not None:
            self._listener.close()
        for sender in list(self._rooms.values()):
            sender.fail(failure("the prefill server is stopping", TransferError.code))
        self._unmet.close()
        await self._tasks.close()
        for link in list(self._links):  # of tasks that never began
            link.close()
        self._links.clear()

    # ---- called by Sender ----

    def ended(self, sender: Sender, epoch: int | None, abort: wire.Abort | None) -> None:
        del self._rooms[sender.room]
        self._unmet.end(sender.room, epoch, abort)

    # ---- decode servers ----

    def _on_link(self, link: Link) -> None:
        if len(self._links) >= MAX_CONVERSATIONS:
            link.close()
            return
        self._links[link] = None
        self._tasks.spawn(self._converse(link), "control-link")

    async def _converse(self, link: Link) -> None:
        try:
            conversation = await self._meet(link)
            if conversation is None:
                return
            self._conversations[conversation] = None
            self.broadcast(Connect(conversation.addresses, conversation.pp_size))
            why = "the conversation failed"
            try:
                why = await conversation.run()
            finally:
                self._conversations.pop(conversation, None)
                self._lost(conversation, why)
        except DiptychError:
            return  # whoever called has been told, or is gone
        finally:
            self._links.pop(link, None)
            link.close()

    async def _meet(self, link: Link) -> Conversation | None:
        """The handshake. None if the two servers do not fit; then decode says so to its rooms."""
        timeout_s = self.options.heartbeat_timeout_s
        await auth.answer(link, CONTROL_PURPOSE, self.options.secret, self._rng, timeout_s)
        attach = await hear(link, timeout_s)
        if not isinstance(attach, wire.Attach) or not attach.addresses:
            return None
        await say(link, wire.Welcome(self.boot_id, self.terms, self.num_ranks), timeout_s)
        if disagreement(self.terms, attach.terms):
            await hear(link, timeout_s)  # until decode has read the welcome and hangs up
            return None
        conversation = Conversation(link, timeout_s, self._on_message)
        whole = Grid(self.terms.num_kv_heads, self.terms.num_layers)
        whole.over(len(attach.addresses), attach.pp_size)  # raises if no rank could send to those
        conversation.boot_id = attach.boot_id
        conversation.addresses, conversation.pp_size = attach.addresses, attach.pp_size
        return conversation

    def _lost(self, conversation: Conversation, why: str) -> None:
        error = failure(f"lost the decode server: {why}", TransferError.code)
        for sender in [s for s in self._rooms.values() if s.speaks_with(conversation)]:
            sender.fail(error)
        self._unmet.lose(conversation)

    # ---- messages ----

    def _on_message(self, conversation: Conversation, message: wire.ControlMessage) -> None:
        match message:
            case wire.Open():
                self._on_open(conversation, message.room, message.epoch)
            case wire.Reserve():
                self._on_reserve(conversation, message)
            case wire.Done():
                sender = self._rooms.get(message.room)
                if sender is not None and sender.speaks_with(conversation, message.epoch):
                    sender.done()
            case wire.Abort():
                self._on_abort(conversation, message)
            case _:
                return  # what only prefill says: nothing to do for it

    def _on_open(self, conversation: Conversation, room: int, epoch: int) -> None:
        """Decode has the room's request, before us or after us, or after we have given it up."""
        sender = self._rooms.get(room)
        if sender is None:
            self._unmet.open(conversation, room, epoch)
        elif not sender.attached:
            sender.attach(conversation, epoch)
        elif not sender.speaks_with(conversation, epoch):
            refuse(conversation, room, epoch, in_use(room).message, RoomInUse.code)

    def _on_reserve(self, conversation: Conversation, message: wire.Reserve) -> None:
        self._on_open(conversation, message.room, message.epoch)  # does nothing more if it was opened before
        sender = self._rooms.get(message.room)
        if sender is None:
            self._unmet.reserve(conversation, message)
        elif sender.speaks_with(conversation, message.epoch):
            sender.reserve(message)

    def _on_abort(self, conversation: Conversation, message: wire.Abort) -> None:
        sender = self._rooms.get(message.room)
        if sender is None:
            self._unmet.give_up(conversation, message)
            return
        if not sender.attached:
            sender.attach(conversation, message.epoch)
        if sender.speaks_with(conversation, message.epoch):
            sender.fail(failure(message.message, message.code))
