"""A pod's status at each step of its life, as kubelet would write it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diptych.testing.kube.status import Obj


def config_maps(pod: Obj) -> list[str]:
    """Names of the ConfigMaps without which the pod's containers cannot start."""
    spec = pod["spec"]
    found = [volume.get("configMap") for volume in spec.get("volumes", [])]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        found += [source.get("configMapRef") for source in container.get("envFrom", [])]
        found += [(env.get("valueFrom") or {}).get("configMapKeyRef") for env in container.get("env", [])]
    return [one["name"] for one in found if one and not one.get("optional")]


def _with(conditions: list[Obj], now: str, **states: bool) -> list[Obj]:
    """Conditions with some set; the time of transition moves only when the state does."""
    old = {one["type"]: one for one in conditions}
    for name, state in states.items():
        text = str(state)
        if old.get(name, {}).get("status") != text:
            old[name] = {"type": name, "status": text, "lastProbeTime": None, "lastTransitionTime": now}
    return list(old.values())


def bound(pod: Obj, now: str) -> Obj:
    status = pod["status"]
    return {**status, "conditions": _with(status.get("conditions", []), now, PodScheduled=True)}


def _container(container: Obj, now: str) -> Obj:
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": f"sha256:{container['image']}",
        "ready": False,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": now}},
        "lastState": {},
    }


def running(pod: Obj, address: str, now: str) -> Obj:
    spec, status = pod["spec"], pod["status"]
    conditions = _with(
        status.get("conditions", []),
        now,
        Initialized=True,
        PodReadyToStartContainers=True,
        ContainersReady=False,
        Ready=False,
    )
    result: dict[str, Any] = {
        **status,
        "phase": "Running",
        "conditions": conditions,
        "startTime": now,
        "podIP": address,
        "podIPs": [{"ip": address}],
        "hostIP": "192.168.0.1",
        "containerStatuses": [_container(container, now) for container in spec["containers"]],
    }
    if spec.get("initContainers"):
        done = {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": now}}
        result["initContainerStatuses"] = [
            {**_container(container, now), "ready": True, "state": done} for container in spec["initContainers"]
        ]
    return result


def with_ready(pod: Obj, ready: bool, now: str) -> Obj:
    """`ready` is the containers'; the pod's also needs its readiness gates."""
    status = pod["status"]
    states = {one["type"]: one["status"] for one in status.get("conditions", [])}
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", [])]
    passed = all(states.get(gate) == "True" for gate in gates)
    return {
        **status,
        "conditions": _with(status.get("conditions", []), now, ContainersReady=ready, Ready=ready and passed),
        "containerStatuses": [{**one, "ready": ready} for one in status.get("containerStatuses", [])],
    }


def with_new_image(pod: Obj) -> Iterator[str]:
    """Names of containers that run another image than the spec now says."""
    images = {one["name"]: one["image"] for one in pod["spec"]["containers"]}
    for one in pod["status"].get("containerStatuses", []):
        if images.get(one["name"], one["image"]) != one["image"]:
            yield one["name"]


def restarted(pod: Obj, container: str, now: str) -> Obj:
    """One container ended with an error and runs again, not yet ready."""
    status = with_ready(pod, False, now)
    images = {one["name"]: one["image"] for one in pod["spec"]["containers"]}
    statuses = []
    for one in status.get("containerStatuses", []):
        if one["name"] == container:
            ended = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": now}}
            image = images[container]
            one = {
                **one,
                "image": image,
                "imageID": f"sha256:{image}",
                "restartCount": one["restartCount"] + 1,
                "state": {"running": {"startedAt": now}},
                "lastState": ended,
            }
        statuses.append(one)
    return {**status, "containerStatuses": statuses}


def failed(pod: Obj, reason: str, now: str) -> Obj:
    status = with_ready(pod, False, now)
    ended = {"terminated": {"exitCode": 137, "reason": reason, "finishedAt": now}}
    statuses = [{**one, "started": False, "state": ended} for one in status["containerStatuses"]]
    return {**status, "phase": "Failed", "reason": reason, "containerStatuses": statuses}
