"""The commands as a person uses them: processes, exit statuses, what is printed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from group_manifests import group, role, service, shell, text, toy

from diptych.cli import main
from diptych.group.local.paths import GroupFolder
from diptych.group.local.strays import find_strays

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
Diptych = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "diptych", *arguments]


@pytest.fixture
def diptych(state_folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Diptych]:
    """Runs the command: `up` as a process of its own, the others in this one. Takes every group down at the end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        if arguments[0] == "up":
            return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=WAIT_S, cwd=ROOT)
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as usage:  # argparse
            status = int(usage.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    yield run
    for state in state_folder.glob("*/state.json"):
        run("down", state.parent.name)
    for lock in state_folder.glob("*/lock"):
        folder = GroupFolder(state_folder, lock.parent.name)
        assert not folder.running() and find_strays(folder) == []


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A role that another waits for, and a Service."""
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", toy(), replicas=2), role("b", toy(), dependencies=["a"])), service("b")))
    return path


def up(diptych: Diptych, manifest: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return diptych("up", str(manifest), "--detach", "--service-port", "toy=0", "--timeout", "20", *more)


def read(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return dict(json.load(reply))


def test_detached_from_up_to_down(diptych: Diptych, manifest: Path, state_folder: Path) -> None:
    started = up(diptych, manifest)
    assert started.returncode == 0, started.stderr
    lines = [line.split(" s  ")[-1] for line in started.stderr.splitlines()]
    assert "toy-b waits for a" in lines
    assert lines.index("toy-a-1 ready") < next(i for i, line in enumerate(lines) if line.startswith("toy-b-0 starting"))
    assert any(line.startswith("toy is ready: http://127.0.0.1:") for line in lines)
    assert (state_folder.stat().st_mode & 0o777, (state_folder / "toy" / "control.sock").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )

    status = json.loads(diptych("status", "--json").stdout)
    assert [pod["name"] for pod in status["pods"]] == ["toy-a-0", "toy-a-1", "toy-b-0"]
    assert read(f"http://{status['services'][0]['address']}/")["env"]["HOSTNAME"] == "toy-b-0"
    shown = diptych("status", "toy").stdout
    assert shown.startswith("toy: ready") and "role a  2/2 ready" in shown and "toy-b-0" in shown
    assert all(str(pod["pids"][0]) in shown for pod in status["pods"])

    again = up(diptych, manifest)
    assert (again.returncode, again.stderr) == (
        2,
        "diptych: group toy is already running; `diptych down toy` ends it\n",
    )

    scaled = diptych("scale", "toy/a", "1")
    assert scaled.returncode == 0 and "toy is changing" in scaled.stderr and "not ready" not in scaled.stderr
    assert [pod["name"] for pod in json.loads(diptych("status", "toy", "--json").stdout)["pods"]] == [
        "toy-a-0",
        "toy-b-0",
    ]
    refused = diptych("scale", "toy/c", "1")
    assert (refused.returncode, refused.stderr) == (2, "diptych: group toy has no role c; its roles: a, b\n")

    logs = diptych("logs", "toy").stdout
    assert "toy-a-0 | listening as toy-a-0\n" in logs and "toy-b-0 | listening as toy-b-0\n" in logs
    one = diptych("logs", "toy/a/0", "--tail", "1").stdout
    assert one == "listening as toy-a-0\n"
    assert diptych("logs", "toy-a-0", "--tail", "1").stdout == one  # the name that `status` shows
    assert diptych("logs", "toy/a/7").stderr.startswith("diptych: no logs of toy/a/7; there are: toy-a-0, ")

    down = diptych("down", "toy")
    assert (down.returncode, down.stderr.splitlines()[-1]) == (0, "toy is down")
    assert diptych("down", "toy").returncode == 1
    assert diptych("status").stdout == "no groups are running\n"
    assert "listening as toy-b-0" in diptych("logs", "toy/b").stdout  # still there after the end


def test_logs_are_followed_until_the_group_ends(diptych: Diptych, manifest: Path) -> None:
    assert up(diptych, manifest).returncode == 0
    with subprocess.Popen(command("logs", "-f", "toy"), stdout=subprocess.PIPE, text=True, cwd=ROOT) as follower:
        assert follower.stdout is not None
        seen = [follower.stdout.readline()]
        assert diptych("scale", "toy/a", "3").returncode == 0
        assert diptych("down", "toy").returncode == 0
        seen += follower.stdout.readlines()
        assert follower.wait(WAIT_S) == 0
    assert "toy-a-2 | listening as toy-a-2\n" in seen  # a pod that came later
    assert seen.count("toy-a-0 | listening as toy-a-0\n") == 1


def test_a_crash_loop_at_start_shows_the_log(diptych: Diptych, tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", shell("echo the model is not there; exit 4")))))
    for mode in ([], ["--detach"]):
        failed = diptych("up", str(path), *mode)
        assert failed.returncode == 1
        assert "diptych: toy-a-0 keeps ending: a ended with exit code 4" in failed.stderr
        assert "last lines of its log:\n  --- " in failed.stderr and "\n  the model is not there\n" in failed.stderr
        assert diptych("status").stdout == "no groups are running\n"


def test_a_timeout_at_start_names_the_pod(diptych: Diptych, tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", toy()), role("b", shell("echo loading; exec sleep 60")))))
    for mode in ([], ["--detach"]):
        failed = diptych("up", str(path), "--timeout", "1.5", *mode)
        assert failed.returncode == 1
        assert "diptych: toy-b-0 is not ready after 1.5 s; last lines of its log:" in failed.stderr
        assert "\n  loading\n" in failed.stderr


def test_what_cannot_run_here_is_refused_at_once(diptych: Diptych, tmp_path: Path) -> None:
    volumes = {"volumes": [{"name": "m", "persistentVolumeClaim": {"claimName": "llm-model"}}]}
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", toy(), pod=volumes)), service("a")))
    failed = diptych("up", str(path))
    assert failed.returncode == 2
    assert "which folder is the claim llm-model (roles a)? Add --claim llm-model=DIR" in failed.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for mode in ([], ["--detach"]):
            claim = ["--claim", f"llm-model={tmp_path}", "--service-port", f"toy={port}"]
            failed = diptych("up", str(path), *claim, *mode)
            assert failed.returncode == 2
            assert f"port {port} of 127.0.0.1 is in use; choose another with --service-port toy=PORT" in failed.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_foreground_ends_in_order(
    manifest: Path, state_folder: Path, number: signal.Signals, diptych: Diptych
) -> None:
    arguments = command("up", str(manifest), "--service-port", "toy=0")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        lines = _read_until(process.stderr, "toy is ready")
        process.send_signal(number)
        lines += process.stderr.readlines()
        assert process.wait(WAIT_S) == 0
    ends = [line.split(" s  ")[-1].strip() for line in lines if line.endswith("is gone\n")]
    assert ends[0] == "toy-b-0 is gone" and sorted(ends) == ["toy-a-0 is gone", "toy-a-1 is gone", "toy-b-0 is gone"]


def test_a_second_interrupt_does_not_wait(tmp_path: Path, diptych: Diptych) -> None:
    path = tmp_path / "toy.yaml"
    stubborn = role("a", shell("trap '' TERM; echo up; while true; do sleep 0.05; done"), probe=False, grace_s=60)
    path.write_text(text(group(stubborn)))
    with subprocess.Popen(command("up", str(path)), stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        _read_until(process.stderr, "toy is ready")
        process.send_signal(signal.SIGINT)
        _read_until(process.stderr, "toy-a-0 stopping")
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(10) == 0


def test_an_interrupted_start_leaves_nothing(tmp_path: Path, state_folder: Path, diptych: Diptych) -> None:
    """Detached too: nobody else knows yet that there is a group."""
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", toy("--when", str(tmp_path / "never"))))))
    arguments = command("up", str(path), "--detach")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        _read_until(process.stderr, "toy-a-0 starting")
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(WAIT_S) == 130
    assert told.splitlines()[-1] == "toy is down" and "Traceback" not in told
    assert not GroupFolder(state_folder, "toy").running()


def _read_until(stream: Any, wanted: str) -> list[str]:
    """Lines up to the wanted one; the stream's process is expected to print it."""
    lines = []
    while not lines or wanted not in lines[-1]:
        line = stream.readline()
        assert line, "".join(lines)
        lines.append(line)
    return lines


@pytest.mark.parametrize("then", ["status", "up"])
def test_a_killed_supervisor_takes_its_pods_along(
    diptych: Diptych, manifest: Path, state_folder: Path, then: str
) -> None:
    assert up(diptych, manifest).returncode == 0
    status = json.loads(diptych("status", "toy", "--json").stdout)
    folder = GroupFolder(state_folder, "toy")
    assert len(find_strays(folder)) >= 6  # three pods, each with its keeper
    os.kill(status["supervisor_pid"], signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while find_strays(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if then == "up":
        again = up(diptych, manifest)
        assert again.returncode == 0
        told = again.stderr
    else:
        shown = diptych("status")
        assert shown.returncode == 0
        told = shown.stderr
    assert f"the supervisor of toy (process {status['supervisor_pid']}) had died; its pods had ended with it" in told
    assert diptych("down", "toy").returncode == (0 if then == "up" else 1)


def test_two_ups_at_once_are_one(diptych: Diptych, manifest: Path) -> None:
    """Whoever is second is told so, and disturbs nothing."""
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(up(diptych, manifest))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.returncode for result in results) == [0, 2]
    assert "already running" in next(result.stderr for result in results if result.returncode == 2)


def test_a_very_long_state_folder(manifest: Path, diptych: Diptych, tmp_path: Path, monkeypatch: Any) -> None:
    """A Unix socket's address holds 107 bytes; folders may be longer."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    monkeypatch.setenv("DIPTYCH_STATE_DIR", str(deep))
    assert up(diptych, manifest).returncode == 0
    assert diptych("status", "toy").stdout.startswith("toy: ready")
    assert diptych("down", "toy").returncode == 0


def test_a_reader_that_has_seen_enough(diptych: Diptych, manifest: Path) -> None:
    assert up(diptych, manifest).returncode == 0
    for arguments in (["status", "toy"], ["logs", "toy"], ["logs", "-f", "toy"]):
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(command(*arguments), stdout=writer, stderr=subprocess.PIPE, timeout=WAIT_S, cwd=ROOT)
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b""), arguments


def test_the_version(diptych: Diptych) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shown = diptych("--version")
    assert (shown.returncode, shown.stdout) == (0, f"diptych {project['version']}\n")


def test_help_tells_defaults_and_units(diptych: Diptych) -> None:
    shown = " ".join(diptych("up", "--help").stdout.split())
    assert "seconds until all roles must be ready (default: 600)" in shown
    assert diptych("up").returncode == 2
    assert diptych("scale", "toy", "1").stderr == "diptych: toy: must have the form GROUP/ROLE\n"
    assert diptych("logs", "toy/a/x").stderr == "diptych: toy/a/x: must have the form GROUP[/ROLE[/INDEX]]\n"
    assert diptych("status", "../x").returncode == 2


def test_up_update_changes_a_running_group(diptych: Diptych, tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", toy(), replicas=2))))
    refused = diptych("up", str(path), "--update")
    assert (refused.returncode, refused.stderr) == (2, "diptych: group toy is not running\n")
    assert diptych("up", str(path), "--detach").returncode == 0
    before = json.loads(diptych("status", "toy", "--json").stdout)
    path.write_text(text(group(role("a", toy(), replicas=2, env=[{"name": "NEW", "value": "1"}]))))
    updated = diptych("up", str(path), "--update")
    assert (updated.returncode, updated.stdout) == (0, "")
    after = json.loads(diptych("status", "toy", "--json").stdout)
    assert after["status"] == "ready" and len(after["pods"]) == 2
    assert not {pid for pod in before["pods"] for pid in pod["pids"]} & {
        pid for pod in after["pods"] for pid in pod["pids"]
    }


def test_an_update_keeps_the_claims_it_knows(diptych: Diptych, tmp_path: Path) -> None:
    path, folders = tmp_path / "toy.yaml", [tmp_path / "m", tmp_path / "n"]
    for folder in folders:
        folder.mkdir()

    def write(*claims: str) -> None:
        volumes = [{"name": each, "persistentVolumeClaim": {"claimName": each}} for each in claims]
        path.write_text(
            text(group(role("a", toy(), pod={"volumes": volumes}, env=[{"name": "N", "value": claims[-1]}])))
        )

    write("m")
    assert diptych("up", str(path), "--detach", "--claim", f"m={folders[0]}").returncode == 0
    write("m", "n")
    refused = diptych("up", str(path), "--update")
    assert refused.returncode == 2 and "Add --claim n=DIR" in refused.stderr and "--claim m=" not in refused.stderr
    for claims, options in ((("m", "n"), ["--claim", f"n={folders[1]}"]), (("n",), [])):
        write(*claims)
        updated = diptych("up", str(path), "--update", *options)
        assert updated.returncode == 0, updated.stderr
