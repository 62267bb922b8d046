"""What a supervisor tells about its group: over the control socket, and in state.json for when it is gone."""

from __future__ import annotations

from typing import Literal

import msgspec

GroupStatus = Literal["starting", "ready", "not ready", "stopping"]
PodStatus = Literal["starting", "ready", "not ready", "stopping", "restarting"]


class PodView(msgspec.Struct, frozen=True):
    """`restarts`: how often it was started again; `failures`: ends in a row; `reason`: why it last ended."""

    name: str
    role: str
    index: int
    status: PodStatus
    ip: str
    since: float  # Unix time of the last change of status
    restarts: int = 0
    failures: int = 0
    reason: str = ""
    gpus: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()


class RoleView(msgspec.Struct, frozen=True):
    name: str
    replicas: int
    ready: int
    waiting_for: tuple[str, ...] = ()


class ServiceView(msgspec.Struct, frozen=True):
    """`address`: where this machine's users reach it; `inside`: its own address within the group."""

    name: str
    port_name: str
    address: str
    inside: str
    pods: tuple[str, ...] = ()


class Snapshot(msgspec.Struct, frozen=True):
    group: str
    status: GroupStatus
    supervisor_pid: int
    started_at: float  # Unix time
    source: str
    roles: tuple[RoleView, ...] = ()
    pods: tuple[PodView, ...] = ()
    services: tuple[ServiceView, ...] = ()
    message: str = ""

    @property
    def crash_looping(self) -> PodView | None:
        """A pod that has ended twice in a row and is not ready."""
        return next((pod for pod in self.pods if pod.failures >= 2 and pod.status != "ready"), None)


def changes(before: Snapshot | None, after: Snapshot) -> list[str]:
    """What a person should hear, one line each, in the order of the group."""
    old = {pod.name: pod for pod in before.pods} if before else {}
    waited = {role.name: role.waiting_for for role in before.roles} if before else {}
    group = [_group_line(after)] if before is not None and before.status != after.status else []
    lines = group if after.status == "stopping" else []
    lines += [f"{name} is gone" for name in old if name not in {pod.name for pod in after.pods}]
    for pod in after.pods:
        was = old.get(pod.name)
        if was is None or (was.status, was.restarts, was.reason) != (pod.status, pod.restarts, pod.reason):
            lines.append(_pod_line(pod))
    for role in after.roles:
        if role.waiting_for and waited.get(role.name) != role.waiting_for:
            lines.append(f"{after.group}-{role.name} waits for {', '.join(role.waiting_for)}")
    return lines if after.status == "stopping" else lines + group


def _pod_line(pod: PodView) -> str:
    details = [f"GPU {','.join(pod.gpus)}"] if pod.gpus and pod.status == "starting" else []
    if pod.reason and pod.status != "ready":
        details.append(f"restart {pod.restarts}: {pod.reason}" if pod.status == "starting" else pod.reason)
    where = f" at {pod.ip}" if pod.status == "starting" else ""
    return f"{pod.name} {pod.status}{where}" + (f" ({'; '.join(details)})" if details else "")


def _group_line(snapshot: Snapshot) -> str:
    if snapshot.status != "ready":
        asked_for = snapshot.status == "not ready" and not any(_lost(pod) for pod in snapshot.pods)
        state = "changing" if asked_for else snapshot.status
        return f"{snapshot.group} is {state}" + (f": {snapshot.message}" if snapshot.message else "")
    addresses = ", ".join(f"http://{each.address}" for each in snapshot.services if each.address)
    return f"{snapshot.group} is ready" + (f": {addresses}" if addresses else "")


def _lost(pod: PodView) -> bool:
    """Whether it was ready, or had been started, and is not any more."""
    return pod.status in ("not ready", "restarting") or (pod.status == "starting" and bool(pod.reason))
