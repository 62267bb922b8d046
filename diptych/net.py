"""Names and sockets, aware of the pod a process runs in.

`diptych up` runs every pod of a group on this machine, each with its own loopback address. Two variables tell our
programs: `DIPTYCH_HOSTS` names a hosts file (`IP name name…`, re-read when it changes), so that pod DNS names
resolve, and `DIPTYCH_POD_IP` is the address that a wildcard bind (0.0.0.0) means inside the pod. On Kubernetes both
are unset.
All servers bind through `listen_socket` and all clients resolve through `resolve` or `Resolver`.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from ipaddress import ip_address
from pathlib import Path

from aiohttp.abc import AbstractResolver, ResolveResult

from diptych.errors import ConfigError, Unavailable

BACKLOG = 1024  # connections that wait to be accepted; asyncio and aiohttp set 100 and 128 unless they are told
_WILDCARDS = ("", "0.0.0.0", "::", "*")
_cached: tuple[tuple[str, int, int], dict[str, str]] | None = None


def is_host(text: str) -> bool:
    """Whether `text` has the form of a host name or an address (IPv6 also in brackets), and so cannot become another
    URL than the one it is put into.
    """
    return re.fullmatch(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}|\[[0-9A-Fa-f:.]{2,45}\]", text) is not None


def bind_address(host: str) -> str:
    """The address to bind for `host`: a wildcard inside a local pod means the pod's own address."""
    if host in _WILDCARDS:
        return os.environ.get("DIPTYCH_POD_IP") or ("0.0.0.0" if host in ("", "*") else host)
    return host


def is_exposed(host: str) -> bool:
    """Whether others than this machine's own programs can reach a server that listens on `host`."""
    try:
        return not ip_address(resolve_now(bind_address(host))).is_loopback
    except (Unavailable, ValueError):
        return True


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not accept yet: the port is ours, connections are refused until somebody listens.

    Port 0 lets the kernel choose. Raises ConfigError that names the address.
    """
    address = bind_address(host)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((resolve_now(address), port))
    except OSError as error:
        sock.close()
        reason = error.strerror
        raise ConfigError(f"cannot listen on {address}:{port} ({reason}); choose another --host or --port") from None
    sock.setblocking(False)
    return sock


def listen_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket, non-blocking. Port 0 lets the kernel choose. Raises ConfigError with the address."""
    sock = bind_socket(host, port)
    sock.listen(BACKLOG)
    return sock


def _pod_hosts() -> dict[str, str]:
    """name -> address from the file in DIPTYCH_HOSTS, read again whenever it was rewritten."""
    global _cached
    path = os.environ.get("DIPTYCH_HOSTS")
    if not path:
        return {}
    try:
        stat = os.stat(path)
        key = (path, stat.st_mtime_ns, stat.st_ino)
        if _cached is None or _cached[0] != key:
            lines = [line.split("#")[0].split() for line in Path(path).read_text().splitlines()]
            _cached = key, {name: fields[0] for fields in lines if fields for name in fields[1:]}
    except FileNotFoundError:
        return {}
    return _cached[1]


def resolve_now(host: str, family: int = socket.AF_UNSPEC) -> str:
    """`host` as an address. Blocks for names that the pod's hosts file does not have. Raises Unavailable if unknown."""
    known = _pod_hosts().get(host)
    if known:
        return known
    try:
        return str(socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0][4][0])
    except (socket.gaierror, UnicodeError) as error:  # the latter: a label of no or too many letters
        why = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise Unavailable(f"the name {host} does not resolve ({why}); check the address or the DNS") from None


async def resolve(host: str, *, timeout_s: float = 5.0) -> str:
    """`host` as an address, without blocking the loop. Raises Unavailable, or TimeoutError after `timeout_s`."""
    known = _pod_hosts().get(host)
    if known:
        return known
    if host.replace(".", "").isdigit() or ":" in host:
        return host
    return await asyncio.wait_for(asyncio.to_thread(resolve_now, host), timeout_s)


class Resolver(AbstractResolver):
    """`resolve` for aiohttp clients: `TCPConnector(resolver=Resolver())`."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            address = await resolve(host)
        except Unavailable as error:
            raise OSError(error.message) from None
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
        ]

    async def close(self) -> None:
        return None
