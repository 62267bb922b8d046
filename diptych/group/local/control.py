"""The supervisor's control socket: JSON lines over a Unix socket that only its owner can open.

One request a line, one reply a line. The socket's folder is mode 0700, which keeps everybody else out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from diptych.errors import ConfigError, DeadlineExceeded, DiptychError, Unavailable
from diptych.group.local.launch import Launch
from diptych.group.local.state import Snapshot

LINE_LIMIT_BYTES = 16 * 1024 * 1024
REQUEST_TIMEOUT_S = 10.0


class StatusRequest(msgspec.Struct, frozen=True, tag="status", tag_field="op"):
    pass


class ScaleRequest(msgspec.Struct, frozen=True, tag="scale", tag_field="op"):
    role: str
    replicas: int


class UpdateRequest(msgspec.Struct, frozen=True, tag="update", tag_field="op"):
    """Make the group what this launch asks for, by rolling updates."""

    launch: Launch


class DownRequest(msgspec.Struct, frozen=True, tag="down", tag_field="op"):
    """`now`: without grace periods."""

    now: bool = False


Request = StatusRequest | ScaleRequest | UpdateRequest | DownRequest


class Reply(msgspec.Struct, frozen=True):
    """The group as it is after the request, or why the request was refused."""

    snapshot: Snapshot | None = None
    error: str = ""


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits a Unix address (107 bytes), however deep its folder is."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


class ControlServer:
    """Answers requests with `handle`; a DiptychError it raises becomes the reply's error."""

    def __init__(self, path: Path, handle: Callable[[Request], Snapshot]) -> None:
        self._path = path
        self._handle = handle
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path.unlink(missing_ok=True)
        with _short_path(self._path) as name:
            sock.bind(name)
        self._path.chmod(0o600)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=LINE_LIMIT_BYTES)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while line := await reader.readline():
                writer.write(msgspec.json.encode(self._answer(line)) + b"\n")
                await writer.drain()
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # the client has gone, or sent no lines: nothing to tell it
        finally:
            self._tasks.discard(task)
            writer.close()

    def _answer(self, line: bytes) -> Reply:
        try:
            return Reply(snapshot=self._handle(msgspec.json.decode(line, type=Request)))
        except msgspec.DecodeError as error:
            return Reply(error=f"no valid request: {error}")
        except DiptychError as error:
            return Reply(error=error.message)


def request(path: Path, message: Request, timeout_s: float = REQUEST_TIMEOUT_S) -> Snapshot:
    """Asks the supervisor behind `path`. Raises Unavailable if there is none, ConfigError if it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            with _short_path(path) as name:
                sock.connect(name)
            sock.sendall(msgspec.json.encode(message) + b"\n")
            line = sock.makefile("rb").readline(LINE_LIMIT_BYTES)
        except TimeoutError:
            raise DeadlineExceeded(f"the group's supervisor gave no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise Unavailable(f"the group's supervisor cannot be reached ({error.strerror})") from None
    if not line:
        raise Unavailable("the group's supervisor ended before it answered")
    reply = msgspec.json.decode(line, type=Reply)
    if reply.snapshot is None:
        raise ConfigError(reply.error)
    return reply.snapshot
