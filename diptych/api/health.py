"""Is this server alive, is it ready, can it generate?

`/health` and `/ready` say what the server knows of itself: 503 while it drains or when its engine is gone. A decode
server adds that it can do the prefill itself, so that a router may ask it to.
`/health_generate` proves it: the engine generates a token for nobody, and any answer of the engine within 20 s counts.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, cast

from aiohttp import web

from diptych.api.context import CONTEXT, Context
from diptych.api.wire import EngineRefusal, is_failure, json_response
from diptych.errors import Unavailable
from diptych.types import FAKE_BOOTSTRAP_HOST, Bootstrap, Request, Sampling

PROBE_TIMEOUT_S = 20.0


async def health(request: web.Request) -> web.Response:
    ctx = request.app[CONTEXT]
    trouble = ctx.trouble()
    if trouble:
        raise Unavailable(trouble)
    able = {"local_prefill": True} if ctx.config.disaggregation_mode == "decode" else {}
    return json_response({"status": "ok", **able})


async def health_generate(request: web.Request) -> web.Response:
    """One token through the engine. Concurrent callers share a probe."""
    ctx = request.app[CONTEXT]
    trouble = ctx.trouble() or ("generation is paused" if ctx.paused else "")
    if trouble:
        raise Unavailable(trouble)
    if ctx.probe is None or ctx.probe.done():
        ctx.probe = asyncio.create_task(_probe(ctx))
        ctx.probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())  # its callers may have left
    await asyncio.shield(ctx.probe)
    return json_response({"status": "ok"})


async def _probe(ctx: Context) -> None:
    """Return when the engine has answered. Raises Unavailable after PROBE_TIMEOUT_S, or what the engine says."""
    answer = asyncio.create_task(_one_token(ctx))
    other = asyncio.create_task(ctx.service.progress())
    try:
        done, _ = await asyncio.wait({answer, other}, timeout=PROBE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if answer in done:
            answer.result()
        elif not done:
            raise Unavailable(f"the engine has answered nothing for {PROBE_TIMEOUT_S:g} s")
    finally:
        for task in (answer, other):
            task.cancel()
        await asyncio.gather(answer, other, return_exceptions=True)


async def _one_token(ctx: Context) -> None:
    mode = ctx.config.disaggregation_mode
    pair = None if mode == "null" else Bootstrap(FAKE_BOOTSTRAP_HOST, ctx.config.disaggregation_bootstrap_port, 0)
    request = Request(
        rid=f"HEALTH_CHECK_{ctx.new_id()}",
        prompt=[0],
        sampling=Sampling(max_new_tokens=1, temperature=0.0),
        bootstrap=pair,
    )
    async with aclosing(cast(Any, ctx.service.engine.generate(request))) as outputs:
        async for output in outputs:
            if output.finish is not None and is_failure(output.finish):
                raise EngineRefusal(output.finish)
            return
    raise Unavailable("the engine ended the probe without an answer")


async def _end_probe(app: web.Application) -> None:
    probe = app[CONTEXT].probe
    if probe is not None:
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)


def add_routes(app: web.Application) -> None:
    app.on_cleanup.append(_end_probe)
    app.router.add_get("/health", health)
    app.router.add_get("/ready", health)
    app.router.add_get("/health_generate", health_generate)
