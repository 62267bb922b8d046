"""GPU to GPU on one host: the decode rank copies pages straight out of the prefill rank's pool, which it has mapped.

Only messages travel, over a Unix socket; what maps and copies is the store (diptych/kv/store.py), and the data plane
makes use of it on links of transports that pull.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych.errors import ConfigError
from diptych.kv.store import Lending
from diptych.transfer.link import Link, LinkClosed, Listener
from diptych.transfer.stream import StreamLink
from diptych.transfer.tcp import SocketListener
from diptych.transfer.unix import check_same_user, connect_unix, listen_unix

if TYPE_CHECKING:
    from diptych.kv.store import PageStore


class CudaTransport:
    scheme = "cuda"

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        """`host` plays no part: the address is a random name."""

        def on_socket(sock: socket.socket) -> None:
            try:
                check_same_user(sock)
            except LinkClosed:  # a stranger learns it by the closed socket
                sock.close()
                return
            on_link(StreamLink(sock))

        sock, address = listen_unix(self.scheme)
        return SocketListener(sock, address, on_socket)

    async def connect(self, address: str, timeout_s: float) -> Link:
        try:
            async with asyncio.timeout(timeout_s):
                sock = await connect_unix(address)
        except TimeoutError:
            raise LinkClosed(f"no answer within {timeout_s:g} s") from None
        except OSError as error:  # another network namespace, or gone
            raise LinkClosed(f"cannot connect ({error.strerror})") from None
        try:
            check_same_user(sock)
        except LinkClosed:
            sock.close()
            raise
        return StreamLink(sock)

    def lending(self, store: PageStore) -> Lending:
        if not isinstance(store, Lending):
            raise ConfigError("pages of this pool cannot be copied by another process: it is not on a GPU")
        return store
