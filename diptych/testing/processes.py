"""Real servers as child processes, for tests and benchmarks: start, wait, ask, stop, leave nothing behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

READY = "ready: "  # `diptych serve` and `diptych route` print "ready: URL" on standard output when they accept requests
ROOT = Path(__file__).resolve().parents[2]


class ServerProcess(AbstractContextManager["ServerProcess"]):
    """One `diptych serve` or `diptych route` (the first word of `args`) in its own process group.

    `url` is known once `wait_ready` has returned; the kernel chooses the port when the flags say `--port 0`.
    """

    def __init__(self, *args: str, env: dict[str, str] | None = None) -> None:
        self.args = args
        self.url = ""
        self.log: deque[str] = deque(maxlen=2000)  # last lines of both output streams
        self._lines: queue.Queue[str | None] = queue.Queue()
        environment = dict(os.environ, PYTHONUNBUFFERED="1", **(env or {}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diptych", *args],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))
            self._lines.put(line)
        self._lines.put(None)

    def wait_ready(self, timeout_s: float = 90.0) -> ServerProcess:
        """Return once the server says that it is ready. Raises RuntimeError, with its log, if it ends or is late."""
        deadline = time.monotonic() + timeout_s
        while not self.url:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"{self.args} not ready within {timeout_s:g} s:\n{self.tail()}") from None
            if line is None:
                raise RuntimeError(f"{self.args} ended with status {self.process.wait()}:\n{self.tail()}")
            if line.startswith(READY):
                self.url = line.removeprefix(READY).strip()
        return self

    def tail(self, lines: int = 40) -> str:
        return "\n".join(list(self.log)[-lines:])

    def get(self, path: str, timeout_s: float = 30.0) -> Any:
        """GET `path`; JSON is decoded, anything else is text."""
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as reply:
            body = reply.read().decode()
            return json.loads(body) if "json" in reply.headers["Content-Type"] else body

    def post(self, path: str, body: Any, timeout_s: float = 120.0) -> Any:
        """POST a JSON body and decode the JSON reply. Raises urllib.error.HTTPError for 4xx and 5xx."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.loads(reply.read())

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def signal(self, number: int) -> None:
        """Send a signal to the server's own process (not to its children)."""
        os.kill(self.process.pid, number)

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, wait, and SIGKILL to the group if that does not help. Returns the exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def metrics(text: str) -> dict[str, float]:
    """A Prometheus page as {name: sum over label sets}; histogram buckets are left out."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#") and "_bucket" not in line:
            name, _, value = line.rpartition(" ")
            name = name.split("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


def assert_backlog(port: int) -> None:
    """300 connections find room at a server whose loop is the caller's, so that it accepts none meanwhile."""
    count = min(300, int(Path("/proc/sys/net/core/somaxconn").read_text()))  # the kernel's own limit
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
