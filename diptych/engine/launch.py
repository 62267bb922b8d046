"""Start the engine processes of a server and watch over them, from the API process (which never imports torch)."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from diptych.config import ServerConfig
from diptych.engine.channel import Channel
from diptych.engine.client import EngineLink
from diptych.errors import ConfigError, DeadlineExceeded
from diptych.model.fit import check_fit
from diptych.types import Failed, FromEngine, Ready

log = logging.getLogger(__name__)

START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 10.0
STALL_S = 5  # of silence, after which this server is not ready: its engine's process is stopped, or starved
SILENCE_S = 15.0  # beyond the longest step that --watchdog-timeout allows: then the engine's loop hangs
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """In the child, before exec: the kernel ends it when the thread that started it ends (Linux, prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class EngineProcesses:
    """The processes of one engine. `link` is what the API uses once `start` has returned, and `config`
    then has the settings that depend on the engine's device."""

    def __init__(self, config: ServerConfig, *, bootstrap: tuple[str, int] = ("", 0), bootstrap_key: str = "") -> None:
        self.config = config
        self._bootstrap_key = bootstrap_key  # what its registration must show
        self._bootstrap = bootstrap  # host and port of the bootstrap service in this process
        self._processes: list[asyncio.subprocess.Process] = []
        self._directory = ""
        self._channel: Channel | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._heard = False  # a message, since somebody last looked
        self.link: EngineLink | None = None
        self.failure = ""  # why the engine ended, when it did so by itself
        self.on_death: Callable[[], None] = lambda: None

    async def start(self) -> EngineLink:
        """Spawn all ranks and wait until the engine can serve. Raises ConfigError with the engine's reason."""
        check_fit(self.config)  # here it takes no seconds, and is said once
        self._ready = asyncio.get_running_loop().create_future()
        self._directory = tempfile.mkdtemp(prefix="diptych-")
        ours, leader = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(1, self.config.num_ranks)]
        store = str(Path(self._directory) / "ranks")
        with leader:
            fds = [pair[0].fileno() for pair in pairs]
            await self._spawn(0, leader, [pair[0] for pair in pairs], store, fds)
        for rank, (near, far) in enumerate(pairs, start=1):
            near.close()
            with far:
                await self._spawn(rank, far, [], store, [])
        self._channel = Channel(FromEngine, self._receive, self._closed)
        await self._channel.open(ours.detach())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await self._ready
        except TimeoutError:
            raise DeadlineExceeded(f"the engine was not ready within {START_TIMEOUT_S:g} s") from None
        self.config = dataclasses.replace(self.config, **ready.settings)
        self.link = EngineLink(self._channel.send, ready.model, ready.max_total_num_tokens)
        self._watchers.append(asyncio.create_task(self.watch_silence()))
        return self.link

    async def _spawn(
        self,
        rank: int,
        sock: socket.socket,
        inherited: list[socket.socket],
        store: str,
        fds: list[int],
    ) -> None:
        spec = {
            "config": self.config,
            "rank": rank,
            "store_path": store,
            "leader_fd": sock.fileno(),
            "follower_fds": fds,
            "bootstrap_host": self._bootstrap[0],
            "bootstrap_port": self._bootstrap[1],
            "bootstrap_key": self._bootstrap_key,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "diptych.engine.worker",
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[sock.fileno(), *(s.fileno() for s in inherited)],
            env=self._environment(),
            preexec_fn=_die_with_parent,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        self._processes.append(process)
        self._watchers.append(asyncio.create_task(self._watch(rank, process)))

    def _environment(self) -> dict[str, str]:
        threads = str(self.config.cpu_threads)
        return dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, GLOO_SOCKET_IFNAME="lo")

    async def _watch(self, rank: int, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if not self._stopping:
            self._end(f"engine process of rank {rank} ended with status {code}; its log says why")

    async def watch_silence(self) -> None:
        """Notice an engine that says nothing: soon it is stalled, in the end it counts as dead. A living one sends
        something every second, whatever its model computes.
        """
        silent_s = 0
        while silent_s < self.config.watchdog_timeout + SILENCE_S:
            self._heard = False
            await asyncio.sleep(1)  # counted, not measured: a time in which this process stood still too says nothing
            silent_s = 0 if self._heard else silent_s + 1
            if self.link is not None and self.link.stalled != (silent_s >= STALL_S):
                self.link.stalled = silent_s >= STALL_S
                log.warning("the engine %s", f"has said nothing for {silent_s} s" if silent_s else "is back")
        self._end(f"the engine has said nothing for {silent_s} s (--watchdog-timeout)")

    def _receive(self, message: Any) -> None:
        self._heard = True
        if isinstance(message, Ready):
            assert self._ready is not None
            self._ready.set_result(message)
        elif isinstance(message, Failed):
            self._end(message.message)
        elif self.link is not None:
            self.link.receive(message)

    def _closed(self) -> None:
        # The watcher knows the exit status; give it the word unless the process only closed its channel.
        if not self._stopping:
            asyncio.get_running_loop().call_later(1.0, self._end, "the engine closed its channel")

    def _end(self, reason: str) -> None:
        if self.failure or self._stopping:
            return
        self.failure = reason
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(ConfigError(reason))
            return
        log.error("%s", reason)
        if self.link is not None:
            self.link.died()
        self.on_death()

    async def _let_end(self) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for process in self._processes:
                    await process.wait()
        except TimeoutError:
            log.warning("an engine process did not end within %g s and is killed", STOP_TIMEOUT_S)

    async def stop(self) -> None:
        """End all processes: close their channel, then SIGKILL after STOP_TIMEOUT_S. Leaves nothing behind."""
        self._stopping = True
        if self._channel is not None:
            self._channel.close()
        if self.link is not None:  # one that still loads does not listen, and holds nothing
            await self._let_end()
        for process in self._processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self.link is not None:
            self.link.died()
        shutil.rmtree(self._directory, ignore_errors=True)
