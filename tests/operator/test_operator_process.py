"""`diptych operator` and `diptych rollout` as a person runs them: real processes against an API server."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kube_world import NAMESPACE, World, group, role, until

from diptych.cli import main
from diptych.group.operator import rollout
from diptych.group.operator.resources import Json
from diptych.net import listen_socket

DIPTYCH = [sys.executable, "-c", "from diptych.cli import entry; entry()"]


class Process:
    """One operator's process."""

    def __init__(self, kubeconfig: Path, log: Path, *flags: str) -> None:
        sock = listen_socket("127.0.0.1", 0)
        self.port = int(sock.getsockname()[1])
        sock.close()
        self.log = log
        command = [*DIPTYCH, "operator", "--kubeconfig", str(kubeconfig)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--bind", f"127.0.0.1:{self.port}", *flags], stdout=out, stderr=subprocess.STDOUT
            )

    def get(self, path: str) -> tuple[int, str]:
        """Status 0 if nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""
        except OSError:
            return 0, ""

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def operator(world: World, tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path / "kubeconfig", tmp_path / "log")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait(30)


def test_an_operators_life(world: World, operator: Process) -> None:
    until(lambda: operator.get("/readyz")[0] == 200, "it is ready")
    assert operator.get("/healthz") == (200, "ok\n") and operator.get("/other")[0] == 404
    world.create(group("g", role("router", dependencies=["a"]), role("a", 2)))
    world.wait_ready("g")
    until(lambda: "leader_election_master_status" in operator.get("/metrics")[1], "metrics")
    metrics = dict(line.rsplit(" ", 1) for line in operator.get("/metrics")[1].splitlines() if line[:1] not in "#")
    assert metrics['leader_election_master_status{name="diptych-operator"}'] == "1.0"
    assert float(metrics['controller_runtime_reconcile_total{controller="group",result="success"}']) > 0
    assert float(metrics['diptych_operator_writes_total{kind="StatefulSet",verb="apply"}']) >= 2
    assert metrics['diptych_operator_groups{ready="true"}'] == "1.0"
    assert metrics['diptych_operator_groups{ready="false"}'] == "0.0"
    assert operator.end(signal.SIGTERM) == 0, operator.log.read_text()
    lease = world.read("Lease", "diptych-operator")
    assert lease["spec"]["holderIdentity"] == "" and "Traceback" not in operator.log.read_text()


class Command:
    """Runs commands in this process: exit status, output, errors."""

    def __init__(self, kubeconfig: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._kubeconfig, self._capsys = kubeconfig, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = main([*words, "--kubeconfig", str(self._kubeconfig)])
        return code, *self._capsys.readouterr()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "kubeconfig", capsys)


def test_rollout_from_history_to_undo(world: World, run: Command) -> None:
    world.start()
    world.create(group("g", role("a", 2)))
    world.wait_ready("g")
    code, _, error = run("rollout", "undo", "g")
    assert code != 0 and "no earlier revision" in error

    def change(each: Json) -> None:
        each["spec"]["roles"][0]["template"]["spec"]["containers"][0]["image"] = "engine:2"
        each["spec"]["roles"][0]["replicas"] = 3

    world.edit("g", change)
    code, _, error = run("rollout", "status", "g", "--timeout", "60")
    assert code == 0, error
    code, text, _ = run("rollout", "history", "g")
    assert code == 0 and "2 (now)" in text and "engine:1" in text
    code, text, _ = run("rollout", "diff", "g")
    assert code == 0 and "-      - image: engine:2" in text and "+      - image: engine:1" in text
    assert run("rollout", "pause", "g")[0] == 0
    assert world.read("RoleBasedGroup", "g")["spec"]["paused"] is True
    assert run("rollout", "resume", "g")[0] == 0
    code, text, _ = run("rollout", "undo", "g", "--revision", "1")
    assert code == 0 and "back to revision 1" in text
    images = {"engine:1"}
    until(lambda: {each["spec"]["containers"][0]["image"] for each in world.pods().values()} == images, "it is back")
    assert world.read("RoleBasedGroup", "g")["spec"]["roles"][0]["replicas"] == 3
    code, _, error = run("rollout", "status", "none", "-n", NAMESPACE)
    assert code != 0 and "no RoleBasedGroup none" in error
    code, _, error = run("rollout", "undo", "g", "--revision", "77")
    assert code != 0 and "it has 2, 3" in error


def test_a_failed_update_is_an_exit_status_of_1(world: World, run: Command) -> None:
    world.start()
    world.create(group("g", role("a", engineRuntimes=[{"profileName": "none"}])))
    until(lambda: world.conditions("g").get("Ready", {}).get("reason") == "InvalidSpec", "it is refused")
    code, text, _ = run("rollout", "status", "g", "--timeout", "60")
    assert code == 1 and "there is no ClusterEngineRuntimeProfile none" in text


def test_rollout_status_waits_while_something_is_refused_and_says_what(
    world: World, run: Command, monkeypatch: Any
) -> None:
    world.start()
    world.create(group("g", role("a")))
    world.wait_ready("g")
    world.server.faults.forbid("write", "PodDisruptionBudget")
    world.edit("g", lambda each: each["spec"]["roles"][0].update(podDisruptionBudget={"maxUnavailable": 1}))
    until(lambda: world.conditions("g")["Progressing"]["reason"] == "FailedReconcile", "it is refused")
    assert world.is_ready("g")
    monkeypatch.setattr(rollout, "POLL_S", 0.01)
    code, text, told = run("rollout", "status", "g", "--timeout", "0.2")
    refusal = "refused, and tried again: PATCH "
    assert code != 0 and text.startswith(refusal) and "PodDisruptionBudget is forbidden" in text
    assert f"0.2 s: {refusal}" in told
    world.server.faults.clear()
    code, text, _ = run("rollout", "status", "g", "--timeout", "60")
    assert code == 0 and world.names("PodDisruptionBudget") == ["g-a"]


def test_rollout_status_waits_for_an_api_server_that_is_away(world: World, run: Command, monkeypatch: Any) -> None:
    world.start()
    world.create(group("g", role("a")))
    world.wait_ready("g")
    monkeypatch.setattr(rollout, "POLL_S", 0.01)
    faults = world.server.faults
    faults.answer(503, times=3, verb="get", kind="RoleBasedGroup")
    faults.answer(429, verb="get", kind="RoleBasedGroup")
    code, text, told = run("rollout", "status", "g", "--timeout", "60")
    assert code == 0 and "every replica of every role is ready" in text and faults.left() == 0
    assert told.count("trying until --timeout is over") == 1
    with faults.unreachable():
        code, _, told = run("rollout", "status", "g", "--timeout", "0.2")
    assert code != 0 and told.count("trying until --timeout is over") == 1
    assert told.count("the API server does not answer") == 2  # said at first, and at last
    code, _, told = run("rollout", "status", "g", "--timeout", "60")
    assert code == 0 and told == ""


def test_rollout_changes_what_somebody_else_writes_meanwhile(world: World, run: Command) -> None:
    world.create(group("g", role("a")))
    world.server.faults.answer(409, times=3, verb="update", kind="RoleBasedGroup")
    assert run("rollout", "pause", "g")[0] == 0
    assert world.read("RoleBasedGroup", "g")["spec"]["paused"] is True and world.server.faults.left() == 0
    code, _, error = run("rollout", "undo", "none")
    assert code != 0 and "no RoleBasedGroup none" in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["operator", "--workers", "0"], "--workers 0"),
        (["operator", "--bind", "nowhere"], "HOST:PORT"),
        (["rollout", "history", "g"], "no cluster"),
    ],
)
def test_wrong_flags_are_errors_that_name_them(tmp_path: Path, words: list[str], says: str, world: World) -> None:
    if words[0] == "rollout":
        (tmp_path / "kubeconfig").unlink()
    result = subprocess.run(
        [*DIPTYCH, *words, "--kubeconfig", str(tmp_path / "kubeconfig")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr
