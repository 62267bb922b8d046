"""The conversation between the two rank 0s over one authenticated control link."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from diptych.errors import DiptychError
from diptych.transfer import wire
from diptych.transfer.link import Link, LinkClosed

CONTROL_PURPOSE = "kv control"
_BEATS = 5  # in a heartbeat timeout


class Conversation:
    """Sends what is posted, in order; hands what arrives to `on_message`; ends when the link breaks or falls silent.

    Both sides say Ping whenever they have said nothing for a fifth of `heartbeat_s`, so silence means that the other
    side is dead, stopped or cut off, even if its socket looks open.
    """

    def __init__(
        self, link: Link, heartbeat_s: float, on_message: Callable[[Conversation, wire.ControlMessage], None]
    ) -> None:
        self.boot_id = ""  # of the other side, and where its ranks receive: from Attach or Welcome
        self.addresses: list[list[str]] = []
        self.pp_size = 1
        self._link = link
        self._heartbeat_s = heartbeat_s
        self._on_message = on_message
        self._outbox: deque[wire.Message] = deque()
        self._posted = asyncio.Event()

    def post(self, message: wire.Message) -> None:
        """Send `message` soon. Nothing happens if the link is broken: its rooms are failed by whoever runs it."""
        self._outbox.append(message)
        self._posted.set()

    async def run(self) -> str:
        """Until the link breaks. Returns why; the link is closed then, also if cancelled."""
        writer = asyncio.get_running_loop().create_task(self._write(), name="control-writer")
        try:
            return await self._read()
        except DiptychError as error:
            return error.message
        finally:
            self._link.close()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _read(self) -> str:
        loop = asyncio.get_running_loop()
        while True:
            deadline = loop.time() + self._heartbeat_s
            try:
                async with asyncio.timeout_at(deadline):
                    header, _ = await self._link.recv()
            except TimeoutError:
                if loop.time() - deadline > self._heartbeat_s / _BEATS:
                    continue  # it was we who stood still: look again what has arrived meanwhile
                return f"the other server said nothing for {self._heartbeat_s:g} s"
            message = wire.decode_control(header)
            if not isinstance(message, wire.Ping):
                self._on_message(self, message)

    async def _write(self) -> None:
        """Ends by closing the link, which ends the reader too."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._heartbeat_s / _BEATS):
                        await self._posted.wait()
                except TimeoutError:
                    self._outbox.append(wire.Ping())
                self._posted.clear()
                while self._outbox:
                    async with asyncio.timeout(self._heartbeat_s):
                        await self._link.send(wire.encode(self._outbox.popleft()))
        except (LinkClosed, TimeoutError):
            self._link.close()


async def say(link: Link, message: wire.Message, timeout_s: float) -> None:
    """One message outside a conversation. Raises LinkClosed."""
    try:
        async with asyncio.timeout(timeout_s):
            await link.send(wire.encode(message))
    except TimeoutError:
        raise LinkClosed(f"the other server took nothing for {timeout_s:g} s") from None


async def hear(link: Link, timeout_s: float) -> wire.ControlMessage:
    """One message outside a conversation. Raises LinkClosed or ProtocolError."""
    try:
        async with asyncio.timeout(timeout_s):
            header, _ = await link.recv()
    except TimeoutError:
        raise LinkClosed(f"the other server said nothing for {timeout_s:g} s") from None
    return wire.decode_control(header)


def disagreement(ours: wire.Terms, theirs: wire.Terms) -> str:
    """What the two servers do not have in common, naming both values; "" if nothing."""
    words = {
        "layout": "KV layout",
        "fingerprint": "model",
        "page_size": "--page-size",
        "num_kv_heads": "number of kv heads",
        "num_layers": "number of layers",
    }
    different = [
        f"{word} {getattr(ours, name)} here, {getattr(theirs, name)} there"
        for name, word in words.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    return "prefill and decode do not fit: " + "; ".join(different) if different else ""
