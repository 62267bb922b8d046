"""Unix sockets with abstract names: for two processes of one user on one host."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import struct
from pathlib import Path

from diptych.transfer.link import LinkClosed

_CREDENTIALS = struct.Struct("3i")


@functools.cache
def machine_id() -> str:
    """The same for two processes only if one kernel runs both."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def listen_unix(scheme: str) -> tuple[socket.socket, str]:
    """A socket that listens under a random name, and its address."""
    name = f"diptych-{os.urandom(16).hex()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + name)
    sock.listen(128)
    sock.setblocking(False)
    return sock, f"{scheme}://{machine_id()}/{name}"


async def connect_unix(address: str) -> socket.socket:
    """Raises LinkClosed for an address of another machine, OSError if nobody is there."""
    machine, _, name = address.partition("://")[2].partition("/")
    if machine != machine_id():
        raise LinkClosed("the other side is on another machine")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, "\0" + name)
    except BaseException:
        sock.close()
        raise
    return sock


def check_same_user(sock: socket.socket) -> None:
    """Raises LinkClosed unless the process at the other end belongs to our user."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
        raise LinkClosed("the other side belongs to another user")
