"""The parent of a container, as a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from group_manifests import python, quoted, shell

from diptych.group.local import keeper

WAIT_S = 10.0
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(command: list[str], grace_s: float = 5.0) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-I", "-S", keeper.__file__, str(grace_s), *command]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(WAIT_S)


def appears(path: Path) -> str:
    """The content of a file that another process is about to write."""
    deadline = time.monotonic() + WAIT_S
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path} has not been written"
        time.sleep(0.01)
    return path.read_text().strip()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_status_is_the_containers(start: Start, command: str, status: int) -> None:
    assert start(shell(command)).wait(WAIT_S) == status


def test_a_command_that_is_not_there(start: Start) -> None:
    assert start(["no-such-program"]).wait(WAIT_S) == 127


def test_sigterm_reaches_the_program_behind_a_shell(start: Start, tmp_path: Path) -> None:
    """A shell dies of SIGTERM at once; its child still gets to finish, and only then the keeper ends."""
    done, up = tmp_path / "done", tmp_path / "up"
    trap = f"trap 'sleep 0.2; echo finished > {quoted(done)}; exit 0' TERM"
    script = f"({trap}; echo up > {quoted(up)}; sleep 60 & wait); true"
    process = start(shell(script))
    appears(up)
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert done.read_text() == "finished\n"


def test_what_ignores_sigterm_is_killed_after_the_grace_period(start: Start, tmp_path: Path) -> None:
    up = tmp_path / "up"
    process = start(shell(f"trap '' TERM; echo up > {quoted(up)}; while true; do sleep 0.05; done"), grace_s=0.3)
    appears(up)
    began = time.monotonic()
    process.terminate()
    assert process.wait(WAIT_S) == 128 + signal.SIGKILL
    assert 0.3 <= time.monotonic() - began < 3.0


def test_sigint_kills_at_once(start: Start, tmp_path: Path) -> None:
    up = tmp_path / "up"
    process = start(shell(f"trap '' TERM; echo up > {quoted(up)}; while true; do sleep 0.05; done"), grace_s=60.0)
    appears(up)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 128 + signal.SIGKILL


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    open({path!r}, "w").write(f"{{os.getpid()}}\\n")
    time.sleep(60)
    os._exit(0)
while not os.path.exists({path!r}): time.sleep(0.01)
{after}
"""


@pytest.mark.parametrize("after", ["", "time.sleep(60)"])
def test_a_process_in_a_session_of_its_own_does_not_escape(start: Start, tmp_path: Path, after: str) -> None:
    """Whether the main process ends by itself or is stopped."""
    path = tmp_path / "pid"
    process = start(python(DAEMON.format(path=str(path), after=after)), grace_s=0.2)
    pid = int(appears(path))
    if after:
        process.terminate()
    process.wait(WAIT_S)
    assert gone(pid)


def test_the_end_of_the_supervisor_ends_the_container(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    process = start(shell(f"echo $$ > {quoted(path)}; exec sleep 60"))
    pid = int(appears(path))
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert gone(pid)


def test_a_killed_keeper_takes_the_main_process_along(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    process = start(shell(f"echo $$ > {quoted(path)}; exec sleep 60"))
    pid = int(appears(path))
    process.kill()
    process.wait(WAIT_S)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=WAIT_S)
    assert gone(pid)


def test_the_container_gets_nothing_of_the_keepers(start: Start, tmp_path: Path) -> None:
    """Standard input is empty, no descriptors beyond the three are open, and signals are as a program expects them."""
    path = tmp_path / "facts"
    code = """
    import os, signal, sys
    fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
    extra = [fd for fd in fds if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}")]
    default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    open(sys.argv[1], "w").write(f"{sys.stdin.read()!r} {extra} {default}\\n")
    """
    assert start([*python(code), str(path)]).wait(WAIT_S) == 0
    assert path.read_text() == "'' [] True\n"


def test_cpu_time_while_waiting(start: Start, tmp_path: Path) -> None:
    """A keeper sleeps; it does not poll."""
    up = tmp_path / "up"
    process = start(shell(f"echo up > {quoted(up)}; exec sleep 60"))
    appears(up)
    before = psutil.Process(process.pid).num_ctx_switches().voluntary
    time.sleep(0.3)  # an interval in which nothing should happen
    assert psutil.Process(process.pid).num_ctx_switches().voluntary - before <= 1
    assert os.getsid(process.pid) == process.pid
