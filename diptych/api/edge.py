"""The one middleware: keys, counting, and every error in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from diptych.api.context import CONTEXT
from diptych.api.wire import HUNG_UP, error_response
from diptych.errors import BadRequest, DiptychError, MethodNotAllowed, NotFound

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CLIENT_GONE = 499


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    ctx = request.app[CONTEXT]
    endpoint = _endpoint(request)
    method = request.method if request.method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE") else "other"
    metrics = ctx.metrics
    if metrics is not None:
        metrics.http_started(method, endpoint)
    status = CLIENT_GONE
    try:
        ctx.keys.check(endpoint, request.headers.get("Authorization"))
        response = await handler(request)
        status = response.status
    except asyncio.CancelledError:
        log.info("%s %s: %s", method, endpoint, HUNG_UP)
        raise
    except Exception as error:
        response = _failure(error, request)
        status = response.status
    finally:
        if metrics is not None:
            metrics.http_ended(method, endpoint, status)
    log.debug("%s %s %d", method, endpoint, status)
    return response


def _endpoint(request: web.Request) -> str:
    """The route's pattern, so that neither keys nor metrics depend on how a path is written; "other" when there is
    none.
    """
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _failure(error: Exception, request: web.Request) -> web.Response:
    if isinstance(error, DiptychError):
        if error.status >= 500 and error.status != 503:
            log.warning("%s: %s", _endpoint(request), error.message)
        return error_response(error)
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        response = error_response(MethodNotAllowed(f"this route takes {allowed}, not {error.method[:20]}"))
        response.headers["Allow"] = allowed
        return response
    if isinstance(error, web.HTTPNotFound):
        return error_response(NotFound("there is no such route"))
    if isinstance(error, web.HTTPException) and error.status < 500:
        return error_response(BadRequest(f"the request cannot be read: {error.reason}"))
    log.error("%s failed", _endpoint(request), exc_info=error)
    return error_response(DiptychError("internal error; the server's log has the details"))
