"""Typed messages between a process and its child over an inherited socket pair.

Nobody else can open it, it leaves nothing on disk, and the death of either end is an end-of-file at the other, at once.
A frame is a four-byte little-endian length and a msgpack body.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec
import numpy as np

from diptych.errors import ProtocolError

MAX_FRAME_BYTES = 1 << 30


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).data)
    raise TypeError(f"cannot send {type(value).__name__}")


def _unpack_array(kind: Any, value: Any) -> Any:
    dtype, shape, data = value
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()  # writable, as torch wants it


class Channel(asyncio.Protocol):
    """One end. `on_message` is called for every message, `on_close` once when the other end is gone."""

    def __init__(self, receives: Any, on_message: Callable[[Any], None], on_close: Callable[[], None]) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_pack_array)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(receives, dec_hook=_unpack_array)
        self._on_message = on_message
        self._on_close = on_close
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._closed = False

    async def open(self, fd: int) -> None:
        """Take over the inherited socket `fd`."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=sock)

    def send(self, message: Any) -> None:
        """Send without waiting. After the other end is gone this does nothing: `on_close` has told."""
        if self._transport is None or self._closed:
            return
        body = self._encoder.encode(message)
        self._transport.write(len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=1 << 26)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4:
            size = int.from_bytes(buffer[start : start + 4], "little")
            if size > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {size} bytes between our own processes")
            if len(buffer) - start - 4 < size:
                break
            with memoryview(buffer)[start + 4 : start + 4 + size] as body:
                message = self._decoder.decode(body)
            start += 4 + size
            self._on_message(message)
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._on_close()
