"""Groups of real processes under a supervisor in this event loop."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from group_manifests import PORT, group, python, role, service, shell, text, toy

from diptych.errors import ConfigError
from diptych.group.local.addresses import claim_slot
from diptych.group.local.state import Snapshot, changes


def status(name: str, wanted: str) -> Any:
    return lambda snapshot: any(pod.name == name and pod.status == wanted for pod in snapshot.pods)


def seen(history: list[Snapshot]) -> list[str]:
    """All changes as a person would read them, without addresses."""
    before = [None, *history]
    lines = [line for old, new in zip(before, history, strict=False) for line in changes(old, new)]
    return [re.sub(r" at 127\.[.0-9]+", "", line) for line in lines]


async def test_roles_start_when_what_they_need_is_ready_and_end_in_reverse(
    run_group: Any, fetch: Any, tmp_path: Path
) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    note = ["--log", str(log)]
    manifest = text(
        group(
            role("front", toy(*note), dependencies=["back", "side"]),
            role("back", toy("--when", str(go), *note), replicas=2),
            role("side", toy(*note)),
        ),
        service("front"),
    )
    async with run_group(manifest, service_ports={"toy": 0}) as running:
        await running.until(status("toy-side-0", "ready"))
        assert [(each.name, each.waiting_for) for each in running.now.roles] == [
            ("front", ("back",)),
            ("back", ()),
            ("side", ()),
        ]
        assert "toy-front-0" not in [pod.name for pod in running.now.pods]
        go.touch()
        ready = await running.until_ready()
        lines = seen(running.history)
        assert lines.index("toy-front-0 starting") > lines.index("toy-back-0 ready")
        assert lines.index("toy-front-0 starting") > lines.index("toy-back-1 ready")
        assert ready.services[0].pods == ("toy-front-0",)
        answer = await fetch(f"http://{ready.services[0].address}/")
        assert answer["env"]["HOSTNAME"] == "toy-front-0"
        pids = [pid for pod in ready.pods for pid in pod.pids]
    stops = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("stop")]
    assert stops[0] == "toy-front-0"
    assert sorted(stops) == ["toy-back-0", "toy-back-1", "toy-front-0", "toy-side-0"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert sorted(path.name for path in running.folder.path.iterdir()) == ["lock", "logs"]
    with socket.socket() as sock:  # the Service's port is free again
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", int(ready.services[0].address.split(":")[1])))


async def test_a_pod_that_dies_is_restarted_with_back_off(run_group: Any, fetch: Any) -> None:
    async with run_group(text(group(role("a", toy()), role("b", toy(), dependencies=["a"])))) as running:
        await running.until_ready()
        first = await fetch(running.address("toy-a-0"))
        ip, neighbour = running.pod("toy-a-0").ip, running.pod("toy-b-0").pids
        for restarts in (1, 2, 3):
            with pytest.raises(OSError, match=r".*"):
                await fetch(running.address("toy-a-0") + "/exit?3")
            await running.until(
                lambda snapshot, restarts=restarts: (
                    snapshot.status == "ready" and running.pod("toy-a-0").restarts == restarts
                )
            )
        again = await fetch(running.address("toy-a-0"))
        assert again["pid"] != first["pid"]
        assert running.pod("toy-a-0").ip == ip
        assert running.pod("toy-b-0").pids == neighbour  # a dependent is left alone
        assert "toy-a-0 starting (restart 1: a ended with exit code 3)" in seen(running.history)
        log = (running.folder.logs / "toy-a-0.log").read_text()
        assert log.count("listening as toy-a-0") == 4
        waits = _waits(running.history)  # after the first end there is none
        assert len(waits) == 2 and 0.2 <= waits[0] < 0.4 <= waits[1]


def _waits(history: list[Snapshot]) -> list[float]:
    """Seconds that toy-a-0 spent waiting to be restarted, each time."""
    pods = [pod for snapshot in history for pod in snapshot.pods if pod.name == "toy-a-0"]
    ends = {pod.restarts: pod.since for pod in pods if pod.status == "restarting"}
    starts = {pod.restarts: pod.since for pod in reversed(pods) if pod.status == "starting"}
    return [starts[number + 1] - ends[number] for number in sorted(ends)]


async def test_a_killed_pod_is_restarted_and_its_children_do_not_stay(run_group: Any) -> None:
    script = shell("sleep 60 & echo child $!; wait")
    async with run_group(text(group(role("a", script, probe=False)))) as running:
        await running.until_ready()
        keeper = psutil.Process(running.pod("toy-a-0").pids[0])
        processes = [keeper, *keeper.children(recursive=True)]
        keeper.kill()
        snapshot = await running.until(lambda _: running.pod("toy-a-0").restarts == 1)
        await asyncio.to_thread(psutil.wait_procs, processes, timeout=10)
        assert not any(process.is_running() and process.status() != "zombie" for process in processes)
        assert running.pod("toy-a-0").reason == "a was killed with its keeper (signal 9)"
        assert snapshot.pods[0].ip == running.history[0].pods[0].ip


async def test_scaling(run_group: Any, fetch: Any) -> None:
    manifest = text(group(role("a", toy()), role("b", toy(), dependencies=["a"])), service("a"))
    async with run_group(manifest, service_ports={"toy": 0}) as running:
        await running.until_ready()
        running.supervisor.scale("a", 3)
        await running.until(lambda snapshot: snapshot.status == "ready" and len(snapshot.pods) == 4)
        assert running.now.services[0].pods == ("toy-a-0", "toy-a-1", "toy-a-2")
        url = f"http://{running.now.services[0].address}/"
        assert {(await fetch(url))["env"]["ROLE_INDEX"] for _ in range(3)} == {"0", "1", "2"}
        hosts = running.folder.hosts.read_text()
        assert "toy-a-2.toy-a" in hosts
        running.supervisor.scale("a", 1)
        await running.until(lambda snapshot: snapshot.status == "ready" and len(snapshot.pods) == 2)
        assert [pod.name for pod in running.now.pods] == ["toy-a-0", "toy-b-0"]
        assert "toy-a-2.toy-a" not in running.folder.hosts.read_text()
        running.supervisor.scale("a", 0)
        await running.until(lambda snapshot: snapshot.status == "ready" and len(snapshot.pods) == 1)
        with pytest.raises(ConfigError, match="group toy has no role c; its roles: a, b"):
            running.supervisor.scale("c", 1)
        with pytest.raises(ConfigError, match="-1 replicas"):
            running.supervisor.scale("a", -1)
        with pytest.raises(ConfigError, match="at most 254"):  # refused before anything starts
            running.supervisor.scale("a", 255)


async def test_what_a_pod_is_told(run_group: Any, fetch: Any, tmp_path: Path) -> None:
    """Addresses, names, variables, mounts, interpreter."""
    model = tmp_path / "model"
    model.mkdir()
    env = [
        {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "URL", "value": "http://$(POD_IP):8000/$(WHO)"},
        {"name": "PYTHONPATH", "value": "/mine"},
    ]
    mounts = [{"name": "model", "mountPath": "/models/Qwen3-32B/"}, {"name": "tmp", "mountPath": "/scratch"}]
    volumes = [{"name": "model", "persistentVolumeClaim": {"claimName": "m"}}, {"name": "tmp", "emptyDir": {}}]
    manifest = text(
        group(role("a", toy(), env=env, container={"volumeMounts": mounts}, pod={"volumes": volumes}, replicas=2)),
        service("a"),
    )
    async with run_group(manifest, claims={"m": str(model)}, service_ports={"toy": 0}) as running:
        await running.until_ready()
        answer = await fetch(running.address("toy-a-1"))
        env_seen, ip = answer["env"], running.pod("toy-a-1").ip
        assert answer["executable"] == sys.executable
        assert ip.startswith("127.77.") and env_seen["DIPTYCH_POD_IP"] == ip
        assert (env_seen["GROUP_NAME"], env_seen["ROLE_NAME"], env_seen["ROLE_INDEX"]) == ("toy", "a", "1")
        assert env_seen["URL"] == f"http://{ip}:8000/toy-a-1"
        assert env_seen["CUDA_VISIBLE_DEVICES"] == ""
        assert env_seen["PYTHONPATH"].split(os.pathsep)[0].endswith("group/shims")
        assert env_seen["PYTHONPATH"].split(os.pathsep)[-1] == "/mine"
        mapped = dict(json.loads(env_seen["DIPTYCH_MOUNTS"]))
        assert mapped["/models/Qwen3-32B/"] == str(model)
        assert Path(mapped["/scratch"]) == running.folder.pods / "toy-a-1" / "volumes" / "tmp"
        assert Path(mapped["/scratch"]) in running.folder.pods.glob("*/volumes/*")
        hosts = {
            name: line.split()[0] for line in running.folder.hosts.read_text().splitlines() for name in line.split()[1:]
        }
        for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local"):
            assert hosts[f"toy-a-1.toy-a{suffix}"] == ip
            assert f"{hosts[f'toy{suffix}']}:80" == running.now.services[0].inside
        assert (await fetch(f"http://{running.now.services[0].inside}/"))["env"]["ROLE_NAME"] == "a"
    assert model.is_dir()


async def test_an_empty_dir_outlives_a_restart_and_not_the_pod(run_group: Any) -> None:
    """On Kubernetes a container that restarts keeps it; a pod that is made anew does not."""
    code = """
    import json, os, pathlib, time
    folder = pathlib.Path(dict(json.loads(os.environ["DIPTYCH_MOUNTS"]))["/scratch"])
    print("found", sorted(path.name for path in folder.iterdir()), flush=True)
    (folder / "mark").touch()
    """
    fields: dict[str, Any] = {
        "probe": False,
        "container": {"volumeMounts": [{"name": "tmp", "mountPath": "/scratch"}]},
        "pod": {"volumes": [{"name": "tmp", "emptyDir": {}}]},
    }
    keeps = role("keeps", python(code), **fields)
    anew = role("anew", python(code), restartPolicy="RecreateRoleInstanceOnPodRestart", **fields)
    async with run_group(text(group(keeps, anew))) as running:
        await running.until(lambda now: len(now.pods) == 2 and all(pod.restarts >= 2 for pod in now.pods))
        logs = {name: (running.folder.logs / f"toy-{name}-0.log").read_text() for name in ("keeps", "anew")}
    assert "found []" in logs["keeps"] and "found ['mark']" in logs["keeps"]
    assert "found []" in logs["anew"] and "found ['mark']" not in logs["anew"]


async def test_the_group_restarts_as_one_when_its_policy_says_so(run_group: Any, fetch: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    manifest = text(
        group(
            role("a", toy("--log", str(log)), dependencies=["b"]),
            role("b", toy("--log", str(log)), restartPolicy="RecreateRBGOnPodRestart"),
        )
    )
    async with run_group(manifest) as running:
        await running.until_ready()
        with pytest.raises(OSError, match=r".*"):
            await fetch(running.address("toy-b-0") + "/exit?1")
        await running.until(lambda snapshot: snapshot.status == "not ready")
        await running.until_ready()
    events = log.read_text().splitlines()
    assert events[:5] == ["start toy-b-0", "start toy-a-0", "stop toy-a-0", "start toy-b-0", "start toy-a-0"]


async def test_what_ends_before_it_is_ready_restarts_alone_whatever_the_policy(run_group: Any, tmp_path: Path) -> None:
    log, mark = tmp_path / "log", tmp_path / "mark"
    code = f"""
    import pathlib, sys, time
    count = int(pathlib.Path({str(mark)!r}).read_text()) if pathlib.Path({str(mark)!r}).exists() else 0
    pathlib.Path({str(mark)!r}).write_text(str(count + 1))
    sys.exit(1)
    """
    broken = role("broken", ["python3", "-c", python(code)[-1]], restartPolicy="RecreateRBGOnPodRestart")
    async with run_group(text(group(role("well", toy("--log", str(log))), broken))) as running:
        await running.until(lambda now: any(pod.role == "broken" and pod.restarts >= 2 for pod in now.pods))
        assert running.pod("toy-well-0").restarts == 0
    assert log.read_text().splitlines().count("start toy-well-0") == 1


async def test_a_wildcard_bind_means_the_pods_own_address(run_group: Any) -> None:
    """Two pods of one machine listen on 0.0.0.0:8000 through diptych.net, and find each other by name."""
    code = f"""
    from diptych.net import listen_socket, resolve_now
    import os, socket
    server = listen_socket("0.0.0.0", {PORT})
    server.setblocking(True)
    other = "toy-a-%d.toy-a" % (1 - int(os.environ["ROLE_INDEX"]))
    print("listening on", server.getsockname(), "other", resolve_now(other), flush=True)
    while True:
        server.accept()[0].close()
    """
    command = ["python3", "-c", python(code)[-1]]
    async with run_group(text(group(role("a", command, replicas=2)))) as running:
        await running.until_ready()
        ips = [running.pod(f"toy-a-{index}").ip for index in (0, 1)]
        for index in (0, 1):
            log = (running.folder.logs / f"toy-a-{index}.log").read_text()
            assert f"listening on ('{ips[index]}', {PORT}) other {ips[1 - index]}" in log


async def test_a_container_behind_a_service_is_ready_when_its_port_is(run_group: Any, tmp_path: Path) -> None:
    """The seed's scheduler has no readiness probe."""
    go = tmp_path / "go"
    roles = [role("a", toy("--when", str(go)), probe=False), role("b", toy("--when", str(go)), probe=False)]
    async with run_group(text(group(*roles), service("a")), service_ports={"toy": 0}) as running:
        await running.until(status("toy-b-0", "ready"))  # nothing says when this one is
        assert running.pod("toy-a-0").status == "starting"
        go.touch()
        await running.until_ready()


async def test_liveness_restarts_a_pod(run_group: Any) -> None:
    probe = {"exec": {"command": ["sh", "-c", "test $(ROLE_INDEX) = 1"]}, "periodSeconds": 1, "failureThreshold": 1}
    container = {"livenessProbe": probe}
    command = shell("exec sleep 60")
    async with run_group(text(group(role("a", command, probe=False, replicas=2, container=container)))) as running:
        await running.until(lambda now: any(pod.name == "toy-a-0" and pod.restarts >= 1 for pod in now.pods))
        assert running.pod("toy-a-1").restarts == 0
        assert running.pod("toy-a-0").reason == "liveness probe failed 1 times: sh ended with 1"


async def test_a_pod_of_two_containers_is_one(run_group: Any) -> None:
    """Both have to be ready; when one ends, both are started again."""
    first, second = role("a", toy()), role("b", shell("trap 'exit 0' TERM; echo side; sleep 60 & wait"), probe=False)
    containers = [each["template"]["spec"]["containers"][0] for each in (first, second)]
    first["template"]["spec"]["containers"] = containers
    async with run_group(text(group(first))) as running:
        await running.until_ready()
        keepers = running.pod("toy-a-0").pids
        assert len(keepers) == 2
        os.kill(psutil.Process(keepers[1]).children()[0].pid, signal.SIGKILL)
        await running.until(lambda now: now.status == "ready" and running.pod("toy-a-0").restarts == 1)
        assert not set(keepers) & set(running.pod("toy-a-0").pids)


async def test_a_command_that_is_not_there(run_group: Any) -> None:
    async with run_group(text(group(role("a", ["no-such-program"])))) as running:
        looping = (await running.until(lambda now: now.crash_looping)).crash_looping
        assert looping.reason.startswith("a ended with exit code 127")
        log = (running.folder.logs / "toy-a-0.log").read_text()
        assert "cannot run no-such-program: No such file or directory" in log


async def test_a_taken_service_port_is_named(run_group: Any) -> None:
    manifest = text(group(role("a", toy())), service("a"))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use; .*--service-port toy=PORT"):
            async with run_group(manifest, service_ports={"toy": port}) as running:
                await running.until_ready()


async def test_two_groups_do_not_collide(run_group: Any) -> None:
    one, two = (text(group(role("a", toy()), name=name)) for name in ("one", "two"))
    async with run_group(one) as first, run_group(two) as second:
        await first.until_ready()
        await second.until_ready()
        assert first.pod("one-a-0").ip != second.pod("two-a-0").ip


def test_a_slot_is_free_again_when_its_holder_is_gone() -> None:
    slot = claim_slot()
    other = claim_slot()
    assert slot.number != other.number
    first = slot.pod_address("a")
    assert (first, slot.pod_address("b")) == (f"127.77.{slot.number}.1", f"127.77.{slot.number}.2")
    assert slot.service_address("a") == f"127.77.{slot.number}.254"
    slot.release("a")
    assert slot.pod_address("c") == first
    slot.close()
    again = claim_slot()
    assert again.number == slot.number
    again.close()
    other.close()


async def test_gpus_are_handed_out(run_group: Any, fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that no other group of this machine uses stand for devices: handing out needs no driver."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"test-{os.getpid()}-0,test-{os.getpid()}-1,test-{os.getpid()}-2")
    wants = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    manifest = text(group(role("a", toy(), replicas=2, container=wants), role("b", toy())))
    async with run_group(manifest) as running:
        await running.until_ready()
        got = [(await fetch(running.address(f"toy-a-{i}")))["env"]["CUDA_VISIBLE_DEVICES"] for i in (0, 1)]
        assert len(set(got)) == 2 and all(each.startswith("test-") for each in got)
        assert (await fetch(running.address("toy-b-0")))["env"]["CUDA_VISIBLE_DEVICES"] == ""
        with pytest.raises(ConfigError, match=r"ask for 4 GPUs .* and there are 3"):
            running.supervisor.scale("a", 4)
        other = text(group(role("a", toy(), replicas=2, container=wants), name="other"))
        async with run_group(other) as second:
            looping = (await second.until(lambda now: now.crash_looping)).crash_looping
            assert "cannot start: it needs 1 GPUs and too few are free" in looping.reason
            running.supervisor.scale("a", 1)  # one is given back
            await second.until_ready()
