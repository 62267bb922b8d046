"""JSON in, JSON out: reading bodies, writing replies and errors in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import functools
import math
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from diptych.api.limits import BODY_TIMEOUT_S, MAX_BODY_BYTES, MAX_CONTAINERS
from diptych.api.mistakes import refuse_near_misses, wrong_field
from diptych.errors import BadRequest, DiptychError, Overloaded, PayloadTooLarge
from diptych.types import Finish

T = TypeVar("T", bound=msgspec.Struct)
encode = msgspec.json.Encoder().encode
_decode_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
HUNG_UP = "whoever asked hung up: the client, or a router that ends this half or asks elsewhere"


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body as `kind`. Raises BadRequest that names the field, or PayloadTooLarge."""
    if request.content_type != "application/json":
        raise BadRequest("the Content-Type must be application/json", param="content-type")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BadRequest("the body must not be compressed", param="content-encoding")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
        return decode(body, kind)
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise PayloadTooLarge(f"the body must not have more than {MAX_BODY_BYTES} bytes") from None


def decode(body: bytes, kind: type[T]) -> T:
    """JSON as `kind`. Raises BadRequest that names the field, also for one whose name is nearly right."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise BadRequest(f"the body must not have more than {MAX_CONTAINERS} brackets and braces")
    try:
        refuse_near_misses(_decode_names(body), kind)
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequest(f"the body is not valid JSON: {reason}") from None


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def convert(value: Any, kind: type[T], param: str) -> T:
    """Decoded JSON as `kind`. Raises BadRequest that names the field within `param`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise wrong_field(str(error), param) from None


def error_body(error: DiptychError) -> dict[str, Any]:
    """OpenAI's envelope."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: DiptychError) -> web.Response:
    headers = {}
    if error.status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, Overloaded) else 1.0
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(error), error.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=encode(value), status=status, content_type="application/json", headers=headers)


_TYPES = {
    400: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class EngineRefusal(DiptychError):
    """The engine ended a request with an error; status and code are the engine's."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish.message or "the engine aborted the request")
        self.status = finish.status if finish.status >= 400 else 500
        self.code = finish.code or "aborted"
        self.type = _TYPES.get(self.status, "server_error")


def is_failure(finish: Finish) -> bool:
    """Whether this end is an error. An abort that a client or an operator asked for (499) is not: what there is so
    far is the answer.
    """
    return finish.type == "abort" and finish.status not in (200, 499)
