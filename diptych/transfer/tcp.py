"""TCP: works between any two hosts."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych.errors import DiptychError
from diptych.net import bind_address, listen_socket, resolve
from diptych.transfer.link import Link, LinkClosed, Listener
from diptych.transfer.stream import StreamLink

if TYPE_CHECKING:
    from diptych.kv.store import Lending, PageStore

_ACCEPT_PAUSE_S = 0.1  # when the process has no file descriptors left


class TcpTransport:
    scheme = "tcp"

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        sock = listen_socket(host, 0)
        port = sock.getsockname()[1]
        return SocketListener(
            sock, f"{self.scheme}://{join_host_port(advertised_host(host), port)}", lambda s: on_link(_link(s))
        )

    async def connect(self, address: str, timeout_s: float) -> Link:
        host, port = split_host_port(address.removeprefix(f"{self.scheme}://"))
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(timeout_s):
                target = await resolve(host, timeout_s=timeout_s)
                family = socket.AF_INET6 if ":" in target else socket.AF_INET
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_connect(sock, (target, port))
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise LinkClosed(f"no answer within {timeout_s:g} s") from None
            if isinstance(error, OSError):
                raise LinkClosed(f"cannot connect ({error.strerror or 'unreachable'})") from None
            if isinstance(error, UnicodeError):
                raise LinkClosed("cannot connect (not a host name)") from None
            if isinstance(error, DiptychError):
                raise LinkClosed(error.message) from None
            raise
        return _link(sock)

    def lending(self, store: PageStore) -> Lending | None:
        return None


class SocketListener:
    """Accepts on `sock`, which it owns, and hands each connection to `on_socket`."""

    def __init__(self, sock: socket.socket, address: str, on_socket: Callable[[socket.socket], None]) -> None:
        self.address = address
        self._sock = sock
        self._on_socket = on_socket
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors: the backlog waits until some are free again
            self._loop.remove_reader(self._sock)
            self._pause = self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)
            return
        self._on_socket(connection)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        if self._sock.fileno() == -1:
            return
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._sock)
        self._sock.close()


def _link(sock: socket.socket) -> StreamLink:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return StreamLink(sock)


def advertised_host(host: str) -> str:
    """The address under which others reach a server bound to `host`: for a wildcard, this machine's outgoing one."""
    bound = bind_address(host)
    if bound not in ("0.0.0.0", "::"):
        return bound
    family, probe = (socket.AF_INET, "192.0.2.1") if bound == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
    with socket.socket(family, socket.SOCK_DGRAM) as sock:  # connecting a datagram socket sends nothing
        try:
            sock.connect((probe, 9))
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1" if family == socket.AF_INET else "::1"


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises LinkClosed: the text comes from a peer."""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise LinkClosed("an address without a port")
    return host.strip("[]"), int(port)
