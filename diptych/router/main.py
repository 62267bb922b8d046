"""The router as a process: sockets, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import signal
import sys

import uvloop

from diptych.net import bind_address, is_exposed, listen_socket
from diptych.router.app import INFERENCE, App
from diptych.router.client import HttpUpstream
from diptych.router.config import RouterConfig
from diptych.router.control import Control
from diptych.router.core import Core
from diptych.router.fleet import Fleet
from diptych.router.health import HealthChecker
from diptych.router.metrics import RouterMetrics
from diptych.router.server import HttpServer

log = logging.getLogger("diptych.router")


def run(config: RouterConfig) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends at once. Returns the exit status: 0 after an orderly end."""
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    _raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(config))


def _raise_file_limit() -> None:
    """Two connections to servers for each client: the usual 1,024 files are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))


async def _run(config: RouterConfig) -> int:
    router = Router(config, random.SystemRandom())  # rooms and request ids are not to be guessed
    stop = asyncio.Event()
    cut = asyncio.Event()

    def on_signal() -> None:
        (cut if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await router.start()
        if not await router.wait_ready(stop):
            return 1
        if not stop.is_set():
            print(f"ready: {router.url}", flush=True)  # as `diptych serve` does, for whoever started it
        await stop.wait()
        log.info("shutting down: %d requests are running", router.num_active)
        await router.drain(cut)
        return 0
    finally:
        await router.close()


async def _first(*events: asyncio.Event, timeout_s: float) -> None:
    """Wait until one of the events is set, or the time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class Router:
    """All parts of one router, put together. `start`, then `close`."""

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        loop = asyncio.get_running_loop()
        self._config = config
        self._upstream = HttpUpstream()
        self.fleet = Fleet(config, rng, loop.time)
        self.metrics = RouterMetrics(INFERENCE)
        core = Core(config, self.fleet, self._upstream, rng, self.metrics)
        self.app = App(config, self.fleet, core, Control(config, self.fleet, self._upstream), self.metrics, rng)
        headers = [(b"authorization", b"Bearer " + config.key.encode())] if config.key else []
        self._health = HealthChecker(config, self.fleet, self._upstream, headers)
        self._server = HttpServer(
            self.app.handle, max_body_bytes=config.max_payload_size, body_timeout_s=config.body_timeout_secs
        )
        self._metrics_server = HttpServer(
            self.app.metrics_only, max_body_bytes=0, body_timeout_s=config.body_timeout_secs
        )
        self.port = self.metrics_port = 0  # what the kernel chose, once they listen

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address := bind_address(self._config.host), address)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def num_active(self) -> int:
        return self._server.num_active

    async def start(self) -> None:
        """Listen and begin to check the servers. Raises ConfigError if a port is taken."""
        sock = listen_socket(self._config.host, self._config.port)
        self.port = sock.getsockname()[1]
        await self._server.start(sock)
        if self._config.prometheus_port >= 0:
            sock = listen_socket(self._config.prometheus_host, self._config.prometheus_port)
            self.metrics_port = sock.getsockname()[1]
            await self._metrics_server.start(sock)
        self._health.start()
        log.info("listening on %s:%d", self._config.host, self.port)
        if not self._config.key and is_exposed(self._config.host):
            log.warning("anybody who reaches this router can use it: set --api-key, or keep it in a trusted network")

    async def wait_ready(self, stop: asyncio.Event) -> bool:
        """Wait for one healthy server of each role; False if --worker-startup-timeout-secs went by without."""
        await _first(stop, self.fleet.complete, timeout_s=self._config.worker_startup_timeout_secs)
        if self.fleet.ready:
            log.info("ready: %d servers", sum(server.healthy for server in self.fleet.servers))
        elif not stop.is_set():
            log.error("no %s server became healthy in time", " and no ".join(self.fleet.missing))
        return self.fleet.ready or stop.is_set()

    async def drain(self, cut: asyncio.Event) -> None:
        """For the delay, be unready and end each connection with its answer; then refuse new work, and wait until the
        running requests have ended or the grace period is over. `cut` ends either wait.
        """
        self.app.draining = self._server.draining = True
        if self._config.shutdown_delay_secs:
            await _first(cut, timeout_s=self._config.shutdown_delay_secs)
        self.app.refusing = True
        await _first(cut, self._server.idle, timeout_s=self._config.shutdown_grace_period_secs)
        if self.num_active:
            log.warning("%d requests were cut off", self.num_active)

    async def close(self) -> None:
        await self._health.stop()
        await self._server.close()
        await self._metrics_server.close()
        self._upstream.close()
