"""The parent of one container: starts it, passes on its end, and makes sure that nothing of it outlives the supervisor.

Run as a script by a bare interpreter (`python -I -S keeper.py GRACE_S COMMAND…`), so only the standard library, and
little of it. Standard input is a pipe from the supervisor: when it closes, by whatever death of the supervisor, the
container is stopped. SIGTERM asks for the same; SIGINT kills at once. Processes that leave the container's process
group are still this one's descendants (it is a subreaper) and are killed too. The exit status is the container's: its
code, or 128 + its signal.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def start(command: list[str]) -> int:
    """The container's main process, leader of its own process group, killed when this process is."""
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 256)  # what the supervisor lent to this process is not the container's
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def reap(main: int) -> tuple[int | None, bool]:
    """Collects what has ended: the main process's exit status, if it was among that, and whether no child is left."""
    status = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status, True
        if pid == 0:
            return status, False
        if pid == main:
            code = os.waitstatus_to_exitcode(raw)
            status = code if code >= 0 else 128 - code


def kill_rest() -> None:
    """Kills all descendants: children now, and each generation as it is handed to us."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    while True:
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def signal_group(main: int, number: int) -> None:
    try:
        os.killpg(main, number)
    except (ProcessLookupError, PermissionError):
        pass  # it has just ended, or has not made its group yet


def keep(grace_s: float, command: list[str]) -> int:
    """Runs the container until it ends or has to end."""
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    main = start(command)
    try:
        os.setpgid(main, main)  # whoever is first, it or we: its group exists from here on
    except OSError:
        pass
    ready = selectors.DefaultSelector()
    ready.register(0, selectors.EVENT_READ)
    ready.register(wake, selectors.EVENT_READ)
    status: int | None = None
    stopping = False
    kill_at: float | None = None
    while True:
        ended, alone = reap(main)
        status = ended if ended is not None else status
        # A shell dies of SIGTERM while its child is still finishing: the whole container has until the deadline.
        if status is not None and (alone or not stopping):
            return status
        events = {key.fd for key, _ in ready.select(None if kill_at is None else max(0.0, kill_at - time.monotonic()))}
        signals = os.read(wake, 4096) if wake in events else b""
        orphaned = 0 in events and not os.read(0, 4096)
        if orphaned:
            ready.unregister(0)
        if (orphaned or signal.SIGTERM in signals) and not stopping:
            stopping, kill_at = True, time.monotonic() + grace_s
            signal_group(main, signal.SIGTERM)
        if signal.SIGINT in signals or (kill_at is not None and time.monotonic() >= kill_at):
            stopping, kill_at = True, None
            signal_group(main, signal.SIGKILL)
            if status is not None:
                return status


if __name__ == "__main__":
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    exit_status = keep(float(sys.argv[1]), sys.argv[2:])
    kill_rest()
    sys.exit(exit_status)
