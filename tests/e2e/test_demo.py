"""`make demo` as a person at a terminal uses it: interrupted, followed, ended by another command."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from diptych.group.local.paths import GroupFolder
from diptych.group.local.strays import find_strays

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60


@contextmanager
def demo(state: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo; at the end, nothing of it is left."""
    command = [sys.executable, "-u", "examples/demo.py", *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(os.environ, DIPTYCH_STATE_DIR=str(state)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
    folder = GroupFolder(state, "demo")
    assert not folder.running() and find_strays(folder) == []


def read_until(stream: IO[str] | None, wanted: str) -> str:
    assert stream is not None
    read = ""
    while wanted not in read:
        line = stream.readline()
        assert line, read
        read += line
    return read


def diptych(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "diptych", *arguments], dict(os.environ, DIPTYCH_STATE_DIR=str(state))
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=WAIT_S
    )


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path, "--port", "0") as process:
        read_until(process.stdout, "demo-prefill-0 starting")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
        rest, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130
    assert "Traceback" not in rest and "demo is down" in rest


def test_what_it_suggests_works_and_it_ends_with_its_group(tmp_path: Path) -> None:
    with demo(tmp_path, "--port", "0") as process:
        told = read_until(process.stdout, "Serving until Ctrl-C.")
        bench = told[told.index(".venv/bin/diptych bench") :].split("\n  kill ")[0]
        measured = diptych(tmp_path, *shlex.split(bench.replace("\\\n", " "))[1:])
        assert measured.returncode == 0, measured.stderr
        down = diptych(tmp_path, "down", "demo")
        assert down.returncode == 0, down.stderr
        rest, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
    assert "Traceback" not in rest


def test_a_taken_port_names_the_demos_own_option(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo(tmp_path, "--port", str(port)) as process:
            told, _ = process.communicate(timeout=WAIT_S)
            assert process.returncode == 2
    assert f"port {port} of 127.0.0.1 is in use" in told and "examples/demo.py --port PORT" in told
