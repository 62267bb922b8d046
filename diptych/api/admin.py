"""Administration: drain, flush the cache, abort requests, pause and continue, audit."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import psutil
from aiohttp import web

from diptych.api.context import CONTEXT
from diptych.api.wire import json_response, read_body
from diptych.errors import BadRequest, DeadlineExceeded

log = logging.getLogger(__name__)

PAUSE_MODES = ("abort", "in_place", "retract")


class AbortBody(msgspec.Struct):
    rid: str | None = None
    abort_all: bool = False
    message: str | None = None


class PauseBody(msgspec.Struct):
    mode: str = "abort"


async def drain(request: web.Request) -> web.Response:
    """Turn unready, for good, and answer when the running requests have ended, or with 504 after --drain-timeout. For a
    preStop hook; SIGTERM does the same before it ends the server.
    """
    ctx = request.app[CONTEXT]
    log.info("draining: no new requests; %d are running", ctx.service.num_running)
    ctx.begin_drain()
    if not await ctx.drained():
        raise DeadlineExceeded(f"{ctx.service.num_running} requests are still running after --drain-timeout")
    return json_response({"status": "ok", "message": "no request is running, and none will be taken"})


async def flush_cache(request: web.Request) -> web.Response:
    """Empty the prefix cache. Only when nothing runs: the engine refuses otherwise, and says so."""
    ctx = request.app[CONTEXT]
    if ctx.service.num_running:
        raise BadRequest(
            f"{ctx.service.num_running} requests are running; the cache can be flushed only when none is",
        )
    result = await ctx.service.engine.control("flush_cache")
    log.info("cache flushed")
    return json_response({"success": True, "message": "cache flushed", **result})


async def abort_request(request: web.Request) -> web.Response:
    """Abort the requests whose id begins with `rid`, or all. Unknown ids are no error: the request may just have
    ended.
    """
    ctx = request.app[CONTEXT]
    body = await read_body(request, AbortBody)
    if not body.abort_all and not body.rid:
        raise BadRequest("give the rid of a request, or abort_all: true", param="rid")
    rid = "" if body.abort_all else body.rid or ""
    count = await ctx.service.abort(rid, body.message or "aborted by /abort_request")
    log.info("[%s] abort: %d requests", rid or "all", count)
    return json_response({"success": True, "aborted": count})


async def pause_generation(request: web.Request) -> web.Response:
    """Stop generating until /continue_generation. Running requests are aborted, or stay (in_place, retract)."""
    ctx = request.app[CONTEXT]
    body = await read_body(request, PauseBody) if request.can_read_body else PauseBody()
    if body.mode not in PAUSE_MODES:
        raise BadRequest(f"mode must be one of {', '.join(PAUSE_MODES)}", param="mode")
    await ctx.service.engine.control("pause", mode=body.mode)
    ctx.paused = True
    if body.mode == "abort":
        await ctx.service.abort("", "aborted by /pause_generation")
    log.info("generation paused: %s", body.mode)
    return json_response({"status": "ok", "message": "generation paused", "mode": body.mode})


async def continue_generation(request: web.Request) -> web.Response:
    ctx = request.app[CONTEXT]
    await ctx.service.engine.control("continue")
    ctx.paused = False
    log.info("generation continues")
    return json_response({"status": "ok", "message": "generation continues"})


async def audit(request: web.Request) -> web.Response:
    """Have the engine recompute who holds which page, and count what both processes hold: for leak hunts.

    `ok` false is a defect. On an idle server `requests`, `held`, `rooms` and `transfers` are zero, and free + cached is
    pages.
    """
    service = request.app[CONTEXT].service
    result = await service.engine.control("audit")
    process = psutil.Process()
    api = {"num_fds": process.num_fds(), "num_tasks": len(asyncio.all_tasks()), "rss_bytes": process.memory_info().rss}
    return json_response({**result, "sequences": service.num_running, "api": api})


def add_routes(app: web.Application) -> None:
    app.router.add_get("/audit", audit, allow_head=False)
    app.router.add_get("/drain", drain, allow_head=False)
    app.router.add_post("/drain", drain)
    app.router.add_get("/flush_cache", flush_cache, allow_head=False)
    app.router.add_post("/flush_cache", flush_cache)
    app.router.add_post("/abort_request", abort_request)
    app.router.add_post("/pause_generation", pause_generation)
    app.router.add_post("/continue_generation", continue_generation)
