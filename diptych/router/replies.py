"""Answers that the router writes itself: errors in OpenAI's envelope, JSON, and the last words of a broken stream."""

from __future__ import annotations

from typing import Any

import msgspec

from diptych.errors import DiptychError, Overloaded, Unavailable
from diptych.router.exchange import Client, Headers
from diptych.router.retry import GivenUp

JSON = (b"content-type", b"application/json")
RETRY_AFTER_S = 1.0  # what a client is told when the error does not say


def error_body(error: DiptychError) -> bytes:
    """OpenAI's envelope."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def send_error(client: Client, error: DiptychError, headers: Headers) -> None:
    """A whole answer that tells an error, with Retry-After where trying again can help."""
    extra = [JSON, *headers]
    if isinstance(error, Overloaded | Unavailable):
        seconds = getattr(error, "retry_after_s", RETRY_AFTER_S)
        extra.append((b"retry-after", b"%d" % max(1, round(seconds))))
    elif isinstance(error, GivenUp):
        extra.append((b"x-should-retry", b"false"))  # OpenAI's libraries repeat other 5xx by themselves
    client.send(error.status, extra, error_body(error))


def with_retry_after(status: int, headers: Headers) -> Headers:
    """The headers of an answer that a server has told, with Retry-After if trying again can help and it lacks one."""
    if status != Unavailable.status or any(name == b"retry-after" for name, _ in headers):
        return headers
    return [*headers, (b"retry-after", b"%d" % RETRY_AFTER_S)]


def send_json(client: Client, value: Any, headers: Headers, status: int = 200) -> None:
    client.send(status, [JSON, *headers], msgspec.json.encode(value))


def error_event(error: DiptychError) -> bytes:
    """An error in a stream that has begun, and the stream's end. Starts on a line of its own, whatever came before."""
    return b"\n\ndata: " + error_body(error) + b"\n\ndata: [DONE]\n\n"
