"""The API server: a cluster behind real HTTP on a loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from diptych.errors import DeadlineExceeded
from diptych.net import listen_socket
from diptych.testing.kube.cluster import Cluster
from diptych.testing.kube.faults import Faults
from diptych.testing.kube.http import Handler
from diptych.testing.kube.record import Record

_START_S = 10.0


class KubeServer:
    """`with KubeServer(cluster) as server:` or `async with`; `server.url` is where it listens.

    On a real clock its thread also runs the controllers. `token`: clients must send it as bearer token.
    `bookmark_s`: how often a watch that asked for bookmarks gets one.
    """

    def __init__(self, cluster: Cluster | None = None, *, token: str = "", bookmark_s: float = 5.0) -> None:
        self.cluster = cluster or Cluster()
        self.record = Record()
        self.faults = Faults(self.cluster.api)
        self.url = ""
        self._token, self._bookmark_s = token, bookmark_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._work: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._error: BaseException | None = None

    # life

    def start(self) -> None:
        """Raises DeadlineExceeded if the server does not listen soon, or whatever kept it from listening."""
        self._thread = threading.Thread(target=self._run, name="kube-server", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_S):
            raise DeadlineExceeded(f"the API server did not listen within {_START_S:.0f} s")
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Cuts watches, ends the thread. Raises what a simulated controller died of, if one did."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_S)
        if self._thread.is_alive():
            raise DeadlineExceeded(f"the API server did not stop within {_START_S:.0f} s")
        self._thread = None
        if self._error is not None:
            raise self._error

    def __enter__(self) -> KubeServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> KubeServer:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.stop)

    # for clients

    def kubeconfig(self, path: Path, *, namespace: str = "default") -> Path:
        """Writes a kubeconfig that leads here, and returns its path."""
        user = {"token": self._token} if self._token else {}
        config: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
        }
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    # the thread

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop, self._work = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        options = {"token": self._token, "bookmark_s": self._bookmark_s}
        handler = Handler(self.cluster, self.record, self.faults, **options)  # type: ignore[arg-type]
        runner = web.AppRunner(handler.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        sock = listen_socket("127.0.0.1", 0)
        await web.SockSite(runner, sock).start()
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.faults.on_drop = handler.drop_watches
        self.faults.on_outage = self._end_outage_after
        self.cluster.on_work = self._wake
        driver = asyncio.create_task(self._drive()) if not self.cluster.clock.manual else None
        self._ready.set()
        await self._stop.wait()
        with self.cluster.lock:
            self.cluster.on_work = lambda: None
        handler.close()
        try:
            if driver is not None:
                driver.cancel()
                await driver
        except asyncio.CancelledError:
            pass
        finally:
            await runner.cleanup()

    def _wake(self) -> None:
        """From any thread: the controllers have work."""
        if self._loop is not None and self._work is not None and not self._work.is_set():
            self._loop.call_soon_threadsafe(self._work.set)

    def _end_outage_after(self, seconds: float) -> None:
        if self._loop is not None:
            loop = self._loop
            loop.call_soon_threadsafe(loop.call_later, seconds, self.faults.end_outage)

    async def _drive(self) -> None:
        """Runs the controllers whenever there is work or a timer is due, a few steps at a time."""
        assert self._work is not None
        while True:
            self._work.clear()
            busy = False
            for _ in range(20):
                with self.cluster.lock:
                    busy = self.cluster.work.run_one()
                if not busy:
                    break
            if busy:
                await asyncio.sleep(0)
                continue
            next_s = self.cluster.clock.next_at()
            timeout_s = None if next_s is None else max(0.0, next_s - self.cluster.clock.now())
            try:
                await asyncio.wait_for(self._work.wait(), timeout_s)
            except TimeoutError:
                pass
