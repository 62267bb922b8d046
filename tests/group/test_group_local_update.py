"""A running group goes over to another manifest: real processes, one after the other; and Services follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from group_manifests import group, role, service, text, toy

from diptych.errors import ConfigError
from diptych.group.local.endpoints import Candidate, endpoints
from diptych.group.local.launch import Launch, prepare
from diptych.group.local.state import Snapshot
from diptych.group.spec import parse


def manifest(version: str, replicas: int = 3, command: list[str] | None = None, **fields: Any) -> str:
    env = [{"name": "VERSION", "value": version}]
    return text(
        group(
            role("a", command or toy(), replicas=replicas, env=env, **fields),
            role("b", toy(), env=env, dependencies=["a"]),
        ),
        service("a"),
    )


def launch(content: str) -> Launch:
    return Launch(manifest=content, source="test", cwd=str(Path.cwd()))


def num_ready(snapshot: Snapshot, name: str) -> int:
    return sum(pod.role == name and pod.status == "ready" for pod in snapshot.pods)


async def versions(running: Any, fetch: Any) -> dict[str, str]:
    return {pod.name: (await fetch(running.address(pod.name)))["env"]["VERSION"] for pod in running.now.pods}


async def test_a_rolling_update_of_processes(run_group: Any, fetch: Any) -> None:
    async with run_group(manifest("1"), service_ports={"toy": 0}) as running:
        await running.until_ready()
        begun = len(running.history)
        running.supervisor.update(prepare(launch(manifest("2"))))
        await running.until(lambda now: now.status == "not ready")
        await running.until_ready()
        assert await versions(running, fetch) == dict.fromkeys(("toy-a-0", "toy-a-1", "toy-a-2", "toy-b-0"), "2")
        during = running.history[begun:]
        assert min(num_ready(each, "a") for each in during) == 2
        assert running.now.services[0].pods == ("toy-a-0", "toy-a-1", "toy-a-2")
        # b comes after a: as long as b is out, all of a is back
        assert all(num_ready(each, "a") == 3 for each in during if num_ready(each, "b") == 0)
        assert sum(pod.restarts for pod in running.now.pods) == 0
        # the same again is no update
        pids = [pod.pids for pod in running.now.pods]
        running.supervisor.update(prepare(launch(manifest("2"))))
        assert running.supervisor.snapshot().status == "ready"
        assert [pod.pids for pod in running.now.pods] == pids


async def test_surge_and_partition(run_group: Any, fetch: Any) -> None:
    strategy = {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1, "partition": 1}}
    async with run_group(manifest("1", rolloutStrategy=strategy), service_ports={"toy": 0}) as running:
        await running.until_ready()
        begun = len(running.history)
        running.supervisor.update(prepare(launch(manifest("2", rolloutStrategy=strategy))))
        await running.until(lambda now: now.status == "not ready")
        await running.until_ready()
        assert await versions(running, fetch) == {"toy-a-0": "1", "toy-a-1": "2", "toy-a-2": "2", "toy-b-0": "2"}
        during = running.history[begun:]
        assert min(num_ready(each, "a") for each in during) == 3
        assert max(len([pod for pod in each.pods if pod.role == "a"]) for each in during) == 4


async def test_an_update_that_does_not_become_ready_is_undone(run_group: Any, fetch: Any, tmp_path: Path) -> None:
    strategy = {"progressDeadlineSeconds": 1, "rollbackOnFailure": True}
    never = toy("--when", str(tmp_path / "never"))
    async with run_group(manifest("1"), service_ports={"toy": 0}) as running:
        await running.until_ready()
        running.supervisor.scale("a", 2)
        await running.until_ready()
        broken = manifest("2", replicas=2, command=never, rolloutStrategy=strategy)
        running.supervisor.update(prepare(launch(broken)))
        await running.until(lambda now: now.message)
        assert running.now.message == "the update was undone: a made no progress for 1 s"
        await running.until(lambda now: now.status == "ready" and len(now.pods) == 3)
        assert await versions(running, fetch) == {"toy-a-0": "1", "toy-a-1": "1", "toy-b-0": "1"}


async def test_roles_that_come_and_go(run_group: Any) -> None:
    async with run_group(text(group(role("a", toy()), role("b", toy())))) as running:
        await running.until_ready()
        changed = text(group(role("a", toy()), role("c", toy(), dependencies=["a"])))
        running.supervisor.update(prepare(launch(changed)))
        await running.until(lambda now: [pod.name for pod in now.pods] == ["toy-a-0", "toy-c-0"])
        await running.until_ready()
        assert [each.name for each in running.now.roles] == ["a", "c"]
        with pytest.raises(ConfigError, match="Services change only with a new start; `diptych down toy`"):
            running.supervisor.update(prepare(launch(text(group(role("a", toy())), service("a")))))
        with pytest.raises(ConfigError, match="at most 254"):
            running.supervisor.update(prepare(launch(text(group(role("a", toy(), replicas=254))))))


async def test_roles_that_go_end_before_what_they_needed(run_group: Any) -> None:
    chain = [role("a", toy()), role("b", toy(), dependencies=["a"]), role("c", toy(), dependencies=["b"])]
    async with run_group(text(group(*chain))) as running:
        await running.until_ready()
        begun = len(running.history)
        running.supervisor.update(prepare(launch(text(group(role("d", toy()))))))
        await running.until(lambda now: [pod.name for pod in now.pods] == ["toy-d-0"])
        ended = [{pod.role for pod in each.pods if pod.status == "stopping"} for each in running.history[begun:]]
        assert [each for i, each in enumerate(ended) if each and each not in ended[:i]] == [{"c"}, {"b"}, {"a"}]


# ---- which pods are behind a Service -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "publish", "expected"),
    [
        ({}, False, ()),
        ({"role": "a"}, False, ("a-0", "a-1")),
        ({"role": "a"}, True, ("a-0", "a-1", "a-2")),
        ({"role": "a", "index": "1"}, False, ("a-1",)),
        ({"role": "b"}, False, ()),
    ],
)
def test_a_service_has_the_ready_pods_that_its_selector_matches(
    selector: dict[str, str], publish: bool, expected: tuple[str, ...]
) -> None:
    wanted = service("a")
    wanted["spec"] |= {"selector": selector, "publishNotReadyAddresses": publish}
    services = parse(text(group(role("a", toy())), wanted)).services
    pods = [Candidate(f"a-{i}", {"role": "a", "index": str(i)}, ready=i < 2) for i in range(3)]
    assert endpoints(services, pods) == {"toy": expected}
    assert endpoints(services, []) == {"toy": ()}
