"""Decode's connection to one prefill server: found through its bootstrap service, kept, shared by all rooms."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from diptych.errors import DeadlineExceeded, DiptychError, ProtocolError, TransferError, Unauthorized
from diptych.transfer import auth, wire
from diptych.transfer.auth import AuthError
from diptych.transfer.control import CONTROL_PURPOSE, Conversation, disagreement, hear, say
from diptych.transfer.receiver import Receiver
from diptych.transfer.room import failure
from diptych.types import Finish

if TYPE_CHECKING:
    from diptych.transfer.receive_hub import ReceiveHub

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class Peer:
    """Lives while it is connected or somebody wants it to be; `run` is its life, in a task of the hub's."""

    def __init__(self, hub: ReceiveHub, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._hub = hub
        self._conversation: Conversation | None = None
        self._rooms: dict[int, Receiver] = {}
        self._unsaid: deque[wire.Message] = deque()  # aborts for the time when the link is there

    @property
    def connected(self) -> bool:
        return self._conversation is not None

    def join(self, receiver: Receiver) -> None:
        self._rooms[receiver.room] = receiver
        if self.connected:
            receiver.meet()

    def leave(self, receiver: Receiver) -> None:
        self._rooms.pop(receiver.room, None)

    def post(self, message: wire.Message) -> None:
        if self._conversation is not None:
            self._conversation.post(message)
        elif isinstance(message, wire.Abort) and len(self._unsaid) < wire.MAX_RANKS:
            self._unsaid.append(message)

    async def run(self) -> None:
        """Connect, talk until the link breaks, fail the rooms that are left: whatever it was that ended it."""
        error = failure("the connection to the prefill server failed", TransferError.code)
        try:
            error = await self._connect_and_talk()
        finally:
            self._hub.peer_ended(self)
            for receiver in list(self._rooms.values()):
                receiver.fail(error)

    async def _connect_and_talk(self) -> Finish:
        try:
            conversation = await self._connect()
        except DiptychError as error:
            return failure(error.message, error.code, error.status)
        self._conversation = conversation
        while self._unsaid:
            conversation.post(self._unsaid.popleft())
        for receiver in list(self._rooms.values()):
            receiver.meet()
        try:
            why = await conversation.run()
        finally:
            self._conversation = None
        return failure(f"lost the prefill server: {why}", TransferError.code)

    async def _connect(self) -> Conversation:
        """Try until the deadline, at growing intervals. Raises the reason: trying again may help nobody else."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._hub.connect_timeout_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout_at(give_up_at):
                    return await self._attach()
            except (Unauthorized, AuthError, ProtocolError, Disagreement):
                raise
            except (DiptychError, TimeoutError, OSError) as error:
                why = error.message if isinstance(error, DiptychError) else "no answer"
            if loop.time() + pause >= give_up_at:
                raise DeadlineExceeded(
                    f"cannot reach the prefill server within {self._hub.connect_timeout_s:g} s ({why}); check that it "
                    "runs and that the request's bootstrap_host and bootstrap_port are its own"
                )
            await asyncio.sleep(pause * (0.5 + self._hub.rng.random()))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _attach(self) -> Conversation:
        """One attempt. Closes the link if it fails."""
        hub, timeout_s = self._hub, self._hub.options.heartbeat_timeout_s
        route = await hub.fetch_route(self.host, self.port, timeout_s)
        link = await hub.transport.connect(route.control_address, timeout_s)
        try:
            await auth.call(link, CONTROL_PURPOSE, hub.options.secret, hub.rng, timeout_s)
            await say(link, wire.Attach(hub.boot_id, hub.terms, hub.addresses, hub.pp_size), timeout_s)
            welcome = await hear(link, timeout_s)
            if not isinstance(welcome, wire.Welcome):
                raise ProtocolError("the prefill server does not greet")
            if different := disagreement(hub.terms, welcome.terms):
                raise Disagreement(different)
        except BaseException:
            link.close()
            raise
        conversation = Conversation(link, timeout_s, self._on_message)
        conversation.boot_id = welcome.boot_id
        return conversation

    def _on_message(self, _: Conversation, message: wire.ControlMessage) -> None:
        match message:
            case wire.Final():
                if receiver := self._rooms.get(message.room):
                    receiver.on_final(message)
            case wire.Abort():
                if receiver := self._rooms.get(message.room):
                    receiver.on_abort(message)
            case _:
                return  # what only decode says: nothing to do for it


class Disagreement(TransferError):
    """The two servers cannot exchange pages. Trying again does not help."""
