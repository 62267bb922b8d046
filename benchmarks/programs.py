"""Starts the real programs (`python -m diptych …`) for a benchmark, waits until they are ready, and ends them."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
READY = "ready: "  # what servers and routers print on standard output, before their URL
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


class Program:
    """One `diptych` process. `url` waits until it accepts requests; `stop` ends it and its engine."""

    def __init__(self, *argv: str) -> None:
        self.argv = argv
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-m", "diptych", *argv]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self._url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY) and not self._url:
                self._url = line.removeprefix(READY).strip()
                self._ready.set()
        self._ready.set()  # standard output is closed: it has ended

    @property
    def url(self) -> str:
        """Where it is reached. Raises RuntimeError with its last words if it does not get there in time."""
        self._ready.wait(START_TIMEOUT_S)
        if not self._url:
            self._log.seek(0)
            last = "".join(self._log.readlines()[-20:])
            raise RuntimeError(f"`diptych {' '.join(self.argv)}` did not become ready:\n{last}")
        return self._url

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@contextmanager
def programs(*commands: Sequence[str]) -> Iterator[list[Program]]:
    """All `commands` started side by side and ready; stopped at the end, the last first."""
    started: list[Program] = []
    try:
        for command in commands:
            started.append(Program(*command))
        for program in started:
            _ = program.url
        yield started
    finally:
        for program in reversed(started):
            program.stop()


def server_command(model: str, *flags: str) -> list[str]:
    """A server on a free port, without what only people read."""
    return ["serve", "--model-path", model, "--port", "0", "--log-level", "warning", *flags]


def cpu_seconds(pid: int) -> float:
    """CPU time (user and system) of a process and its descendants so far."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def end_on_sigterm() -> None:
    """Make SIGTERM an orderly exit of this script, so that the programs it started end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def settle(seconds: float = 1.0) -> None:
    """Let processes that have just started or finished a round come to rest before the next is timed."""
    time.sleep(seconds)
