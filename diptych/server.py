"""One server: an API process in front of its engine processes. `diptych serve` runs this.

Order of the start: the port is bound (so that a conflict shows at once) but refuses connections; the bootstrap service
of a prefill server listens; the engine loads; then the API listens, and the server says that it is ready. On SIGTERM it
turns unready, finishes what runs within --drain-timeout, and ends its engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from secrets import token_hex

import uvloop
from aiohttp import web

from diptych import net
from diptych.api.app import build_app, spare_collector
from diptych.api.auth import normal_key
from diptych.api.context import CONTEXT
from diptych.api.site import KEEPALIVE_S, start_site
from diptych.config import ServerConfig
from diptych.engine.launch import EngineProcesses
from diptych.obs import logs
from diptych.text.tokenizer import Tokenizer
from diptych.transfer.bootstrap import bootstrap_app

log = logging.getLogger(__name__)

READY = "ready: "  # printed on standard output, followed by the URL, once requests are accepted


def run_server(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT; a second one cuts the drain short. Returns 0, or 1 if the engine died."""
    logs.set_up(config.log_level, "server")
    return uvloop.run(_serve(config))


async def _serve(config: ServerConfig) -> int:
    stop, cut = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (cut if stop.is_set() else stop).set())
    tokenizer = Tokenizer.load(config.tokenizer_path or config.model_path, config.chat_template)
    async with AsyncExitStack() as stack:
        sock = net.bind_socket(config.host, config.port)
        stack.callback(sock.close)
        config = dataclasses.replace(config, port=sock.getsockname()[1])
        # Without a secret only our own engine, which is told a key drawn here, may register with the service.
        bootstrap_key = config.pd_secret or token_hex(16)
        bootstrap = await _start_bootstrap(config, bootstrap_key, stack)
        if bootstrap is not None:
            config = dataclasses.replace(config, disaggregation_bootstrap_port=bootstrap[1])
        engine = EngineProcesses(config, bootstrap=bootstrap or ("", 0), bootstrap_key=bootstrap_key)
        stack.push_async_callback(engine.stop)
        if warning := exposure(config):
            log.warning("%s", warning)
        name = f" as {config.served_model_name}" if config.served_model_name else ""
        log.info("loading %s%s", config.model_path, name)
        start = asyncio.ensure_future(engine.start())
        await _first(start, stop.wait())
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return 0
        config = engine.config
        app = build_app(config, start.result(), tokenizer)
        runner = await start_site(app, sock)
        stack.push_async_callback(runner.cleanup)
        died = asyncio.Event()
        engine.on_death = died.set
        if engine.failure:
            died.set()
        spare_collector()
        print(f"{READY}{_url(config)}", flush=True)
        await _first(stop.wait(), died.wait())
        app[CONTEXT].begin_drain()
        if died.is_set():
            return 1
        await _drain(config, app, cut, died)
        return 0


def exposure(config: ServerConfig) -> str:
    """What to tell whoever starts a server that anybody in the network can use; "" if it is not so."""
    closed = normal_key(config) or (config.disaggregation_mode != "null" and config.pd_secret)
    if closed or not net.is_exposed(config.host):
        return ""
    wish = "set --api-key" if config.disaggregation_mode == "null" else "set --api-key, DIPTYCH_PD_SECRET or both"
    return f"anybody who reaches this server can use it: {wish}, or keep it in a trusted network"


async def _start_bootstrap(config: ServerConfig, key: str, stack: AsyncExitStack) -> tuple[str, int] | None:
    """The bootstrap service of a prefill server: host and port at which its engine registers. None on other servers."""
    if config.disaggregation_mode != "prefill":
        return None
    sock = net.listen_socket(config.host, config.disaggregation_bootstrap_port)
    host, port = sock.getsockname()[:2]
    runner = web.AppRunner(bootstrap_app(key), access_log=None, keepalive_timeout=KEEPALIVE_S, auto_decompress=False)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.SockSite(runner, sock, backlog=net.BACKLOG).start()
    log.info("bootstrap service on %s:%d", host, port)
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


async def _drain(config: ServerConfig, app: web.Application, cut: asyncio.Event, died: asyncio.Event) -> None:
    """Let running requests end, within --drain-timeout of SIGTERM or, if that came first, of /drain."""
    log.info(
        "draining: no new requests, running ones have %g s; a second signal (Ctrl-C) cuts them off",
        config.drain_timeout,
    )
    drained = asyncio.ensure_future(app[CONTEXT].drained())
    await _first(drained, cut.wait(), died.wait())
    if drained.done() and not drained.result():
        log.warning("requests were still running after --drain-timeout and are cut off")
    drained.cancel()


async def _first(*waits: Awaitable[object]) -> None:
    """Wait until one of them is done. Coroutines are cancelled then, futures are left alone."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait, task in zip(waits, tasks, strict=True):
            if wait is not task:
                task.cancel()


def _url(config: ServerConfig) -> str:
    host = net.bind_address(config.host)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"
