"""Bringing a group up: in the foreground, or under a supervisor of its own; and what the run before may have left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from diptych.errors import ConfigError, DeadlineExceeded, Unavailable
from diptych.group.local.control import DownRequest, Request, StatusRequest, request
from diptych.group.local.environment import PACKAGE_ROOT
from diptych.group.local.launch import Launch, Prepared, prepare
from diptych.group.local.logs import last_lines
from diptych.group.local.paths import GroupFolder, write_atomically
from diptych.group.local.state import PodView, Snapshot
from diptych.group.local.strays import end_strays
from diptych.group.local.supervisor import Supervisor

POLL_S = 0.1
LOG_LINES = 20
STRAY_GRACE_S = 35.0

Show = Callable[[Snapshot], None]


class StartFailed(DeadlineExceeded):
    """The group did not become ready. The message ends with the last log lines of the pod in question."""

    code = "start_failed"


def recover(folder: GroupFolder) -> str:
    """Cleans up after a supervisor that died; the caller holds the lock. Returns what to tell, empty if nothing."""
    if not folder.state.exists():
        return ""
    try:
        process = f" (process {msgspec.json.decode(folder.state.read_bytes(), type=Snapshot).supervisor_pid})"
    except msgspec.DecodeError:  # written by another version
        process = ""
    count = end_strays(folder, STRAY_GRACE_S)
    folder.clear()
    left = f"; ended {count} processes it left" if count else "; its pods had ended with it"
    return f"the supervisor of {folder.group}{process} had died{left}"


def failure(snapshot: Snapshot, elapsed_s: float, timeout_s: float) -> tuple[str, PodView | None]:
    """Why a starting group has failed, and the pod to look at; ("", None) while there is hope."""
    if snapshot.status == "stopping":
        return "the group was taken down while it started", None
    looping = snapshot.crash_looping
    if looping is not None:
        return f"{looping.name} keeps ending: {looping.reason or looping.status}", looping
    if elapsed_s < timeout_s:
        return "", None
    late = next((pod for pod in snapshot.pods if pod.status != "ready"), None)
    return f"{late.name if late else snapshot.group} is not ready after {timeout_s:g} s", late


def _start_failed(folder: GroupFolder, why: str, pod: PodView | None) -> StartFailed:
    lines = last_lines(folder.logs / f"{pod.name}.log", LOG_LINES) if pod else []
    tail = "".join(f"\n  {line}" for line in lines)
    return StartFailed(f"{why}; last lines of its log:{tail}" if lines else why)


async def run_in_foreground(prepared: Prepared, folder: GroupFolder, show: Show, timeout_s: float | None) -> None:
    """Supervises the group in this process until SIGINT or SIGTERM (twice: at once) or `diptych down`.

    Raises StartFailed, after taking the group down, if it is not ready in time; None: somebody else judges that.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    failed: list[StartFailed] = []
    signals = 0
    ready = asyncio.Event()

    def on_change(snapshot: Snapshot) -> None:
        show(snapshot)
        if snapshot.status == "ready":
            ready.set()
        else:
            judge(snapshot)

    def judge(snapshot: Snapshot) -> None:
        if timeout_s is None or ready.is_set() or failed or snapshot.status == "stopping":
            return
        why, pod = failure(snapshot, loop.time() - began, timeout_s)
        if why:
            failed.append(_start_failed(folder, why, pod))
            supervisor.down()

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            supervisor.down()
        else:
            supervisor.kill()

    supervisor = Supervisor(prepared, folder, on_change)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    timer = loop.call_later(timeout_s or 0.0, lambda: judge(supervisor.snapshot()))
    try:
        await supervisor.run()
    finally:
        timer.cancel()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
    if failed:
        raise failed[0]


def start_detached(prepared: Prepared, folder: GroupFolder, lock: int, show: Show, timeout_s: float) -> Snapshot:
    """Starts a supervisor of its own and returns when every role is ready. Takes over `lock`.

    Raises StartFailed, after taking the group down, if that does not happen in time, or ConfigError if it cannot start.
    Ctrl-C takes the group down too, and comes out as KeyboardInterrupt.
    """
    began = time.monotonic()
    folder.logs.mkdir(mode=0o700, exist_ok=True)
    write_atomically(folder.launch, msgspec.json.encode(prepared.launch))
    process = _spawn_supervisor(folder, lock)
    try:
        return _until_ready(process, folder, show, began, timeout_s)
    except (KeyboardInterrupt, StartFailed):
        take_down(folder, show, timeout_s=STRAY_GRACE_S)
        process.wait(timeout=5)
        raise


def _until_ready(
    process: subprocess.Popen[bytes], folder: GroupFolder, show: Show, began: float, timeout_s: float
) -> Snapshot:
    """Waits for the group that `process` supervises. Raises as `start_detached`, and takes nothing down."""
    while True:
        time.sleep(POLL_S)
        snapshot = ask(folder, StatusRequest())
        if snapshot is None:
            if process.poll() is not None:
                raise ConfigError("\n".join(last_lines(folder.supervisor_log, LOG_LINES)) or "the supervisor ended")
            if time.monotonic() - began > timeout_s:
                process.terminate()
                raise StartFailed(f"the supervisor did not answer within {timeout_s:g} s")
            continue
        show(snapshot)
        if snapshot.status == "ready":
            return snapshot
        why, pod = failure(snapshot, time.monotonic() - began, timeout_s)
        if why:
            raise _start_failed(folder, why, pod)


def _spawn_supervisor(folder: GroupFolder, lock: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(part for part in (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")) if part)
    log = os.open(folder.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "diptych.group.local.up", str(folder.path), str(lock)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )
    finally:
        os.close(log)
        os.close(lock)  # the supervisor has it now


def ask(folder: GroupFolder, message: Request) -> Snapshot | None:
    """The supervisor's answer; None if there is no supervisor to ask."""
    try:
        return request(folder.control, message)
    except Unavailable:
        return None


def take_down(folder: GroupFolder, show: Show, *, timeout_s: float) -> bool:
    """Ends a running group in order; returns when it is gone, and whether there was one. Raises DeadlineExceeded."""
    if not folder.running():
        return False
    deadline = time.monotonic() + timeout_s
    message: Request = DownRequest()
    while folder.running():
        snapshot = ask(folder, message)
        if snapshot is not None:
            message = StatusRequest()
            show(snapshot)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"group {folder.group} is not down after {timeout_s:g} s; Ctrl-C in its terminal, or wait"
            )
        time.sleep(POLL_S)
    return True


def supervise(folder: GroupFolder) -> None:
    """The detached supervisor's main: runs what launch.json asks for until it is told to end."""
    prepared = prepare(msgspec.json.decode(folder.launch.read_bytes(), type=Launch))
    asyncio.run(run_in_foreground(prepared, folder, lambda _: None, None))


def main() -> int:
    path, lock = Path(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(lock, False)  # held until this process ends
    try:
        supervise(GroupFolder(path.parent, path.name))
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
