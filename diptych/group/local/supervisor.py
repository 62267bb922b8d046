"""One group's supervisor: observes its pods, asks `plan` what to do, does it, until the group is down.

All decisions are `plan`'s. This file turns its actions into processes and what happens to processes into observations.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import msgspec

from diptych.errors import ConfigError
from diptych.group import names
from diptych.group.expand import PodFacts
from diptych.group.local import limits
from diptych.group.local.addresses import Slot, claim_slot
from diptych.group.local.control import ControlServer, DownRequest, Request, ScaleRequest
from diptych.group.local.environment import write_programs
from diptych.group.local.gpus import GpuPool
from diptych.group.local.launch import Prepared
from diptych.group.local.paths import GroupFolder, write_atomically
from diptych.group.local.process import LocalPod, PodSetup
from diptych.group.local.services import LocalServices, readiness
from diptych.group.local.state import GroupStatus, PodStatus, PodView, RoleView, Snapshot
from diptych.group.plan import (
    Action,
    Failures,
    Observed,
    PodState,
    SetEndpoints,
    StartPod,
    StopPod,
    Wait,
    count_failure,
    group_ready,
    plan,
    restart_at,
    restart_unit,
    waiting_for,
)
from diptych.group.pod import gpus_wanted

Key = tuple[str, int]  # role, index


class Supervisor:
    """Runs a prepared group whose lock the caller holds. `on_change` gets each new snapshot, in the loop."""

    def __init__(self, prepared: Prepared, folder: GroupFolder, on_change: Callable[[Snapshot], None]) -> None:
        self._prepared = prepared
        self._folder = folder
        self._on_change = on_change
        self._desired = prepared.desired
        self._pods: dict[Key, LocalPod] = {}
        self._failures: dict[str, Failures] = {}
        self._gpus = GpuPool(prepared.gpus)
        self._changed = asyncio.Event()
        self._been_ready = False
        self._started_at = time.time()
        self._hosts = ""
        self._shown: Snapshot | None = None
        self._slot: Slot
        self._services: LocalServices
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Returns when the group is down; raises ConfigError if it cannot come up. Nothing is left running."""
        async with AsyncExitStack() as cleanup:
            cleanup.callback(self._folder.clear)
            self._folder.create()
            write_programs(self._folder)
            self._slot = claim_slot()
            cleanup.callback(self._slot.close)
            self._services = LocalServices(self._prepared, self._slot)
            cleanup.push_async_callback(self._services.close)
            await self._services.open()
            control = ControlServer(self._folder.control, self._handle)
            cleanup.push_async_callback(control.close)
            await control.open()
            async with asyncio.TaskGroup() as self._tasks:
                await self._reconcile_until_down()

    def down(self) -> None:
        """Ends the group in order, with grace periods."""
        self._desired = msgspec.structs.replace(self._desired, deleted=True)
        self._changed.set()

    def kill(self) -> None:
        """Ends the group without grace periods."""
        self.down()
        for pod in self._pods.values():
            pod.kill()

    def scale(self, role: str, replicas: int) -> None:
        """Raises ConfigError for an unknown role, a bad number, no GPUs or addresses for it, a group that is ending."""
        self._prepared.manifest.group.role(role)
        if self._desired.deleted:
            raise ConfigError(f"group {self._desired.group} is being taken down")
        if replicas < 0:
            raise ConfigError(f"{replicas} replicas: the number must be 0 or more")
        wanted = {each.name: each.replicas for each in self._desired.roles} | {role: replicas}
        manifest = self._prepared.manifest
        problems = limits.gpu_problems(manifest.group.spec.roles, wanted, len(self._prepared.gpus))
        leaving = sum(index >= wanted[name] for name, index in self._pods)  # they still have their addresses
        problems += limits.address_problems(sum(wanted.values()) + leaving, len(manifest.services))
        if problems:
            raise ConfigError(problems[0])
        roles = tuple(
            msgspec.structs.replace(each, replicas=replicas) if each.name == role else each
            for each in self._desired.roles
        )
        self._desired = msgspec.structs.replace(self._desired, roles=roles)
        self._changed.set()

    def snapshot(self) -> Snapshot:
        observed = self._observe()
        launch = self._prepared.launch
        return Snapshot(
            group=self._desired.group,
            status=self._status(observed),
            supervisor_pid=os.getpid(),
            started_at=self._started_at,
            source=launch.source,
            roles=tuple(
                RoleView(
                    name=role.name,
                    replicas=role.replicas,
                    ready=sum(pod.ready for pod in self._pods.values() if pod.setup.facts.role == role.name),
                    waiting_for=tuple(waiting_for(role, self._desired, observed)),
                )
                for role in self._desired.roles
            ),
            pods=tuple(self._view(pod) for _, pod in sorted(self._pods.items())),
            services=self._services.views(),
        )

    # -- the loop

    async def _reconcile_until_down(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            actions = plan(self._desired, self._observe(), loop.time(), self._prepared.launch.backoff)
            for action in actions:
                self._apply(action)
            self._publish()
            if self._desired.deleted and not self._pods:
                return
            wake_at = min((each.until for each in actions if isinstance(each, Wait)), default=None)
            try:
                async with asyncio.timeout_at(wake_at):
                    await self._changed.wait()
            except TimeoutError:
                pass  # a back-off is over

    def _observe(self) -> Observed:
        pods = tuple(
            PodState(role, index, pod.phase, pod.ready)
            for (role, index), pod in self._pods.items()
            if pod.phase != "gone"  # about to be forgotten
        )
        return Observed(pods, self._failures, self._services.endpoints)

    def _apply(self, action: Action) -> None:
        match action:
            case StartPod(role, index, fresh):
                self._start((role, index), fresh)
            case StopPod(role, index):
                self._stop((role, index))
            case SetEndpoints(service, pods):
                by_name = {pod.name: pod.setup for pod in self._pods.values()}
                roles = {name: self._prepared.manifest.group.role(setup.facts.role) for name, setup in by_name.items()}
                self._services.set_endpoints(
                    service, pods, roles, {name: setup.facts.ip for name, setup in by_name.items()}
                )
            case Wait():
                pass

    def _start(self, key: Key, fresh: bool) -> None:
        pod = self._pods.get(key)
        if pod is None:
            pod = self._pods[key] = LocalPod(self._setup(*key), self._changed.set)
        self._write_hosts()
        pod.begin()
        self._tasks.create_task(self._follow(key, pod, fresh))

    def _stop(self, key: Key) -> None:
        pod = self._pods[key]
        if pod.phase == "exited":
            self._forget(key)
        else:
            pod.stop()

    async def _follow(self, key: Key, pod: LocalPod, fresh: bool) -> None:
        await pod.run(fresh)
        if pod.phase == "gone":
            self._forget(key)
            return
        unit = restart_unit(self._desired, *key)
        ran_s = pod.ended_at - pod.started_at
        self._failures[unit] = count_failure(
            self._failures.get(unit), ran_s, pod.ended_at, self._prepared.launch.backoff
        )

    def _forget(self, key: Key) -> None:
        pod = self._pods.pop(key)
        self._gpus.give_back(pod.name)
        self._slot.release(pod.name)
        self._failures.pop(pod.name, None)
        self._write_hosts()
        self._changed.set()

    def _setup(self, role_name: str, index: int) -> PodSetup:
        manifest, launch = self._prepared.manifest, self._prepared.launch
        role, group = manifest.group.role(role_name), manifest.group
        name = names.pod_name(group.name, role_name, index)
        desired = next(each for each in self._desired.roles if each.name == role_name)
        labels = {**desired.labels, **names.pod_labels(group.name, role_name, index)}
        facts = PodFacts(
            group=group.name,
            role=role_name,
            index=index,
            name=name,
            namespace=group.metadata.namespace,
            uid=str(uuid.uuid4()),
            ip=self._slot.pod_address(name),
            node=platform.node(),
            labels=labels,
            annotations=role.template.metadata.annotations,
        )
        return PodSetup(
            facts=facts,
            spec=role.template.spec,
            folder=self._folder,
            claims=launch.claims,
            take_gpus=partial(self._take_gpus, name, gpus_wanted(role.template.spec)),
            readiness=readiness(role, labels, manifest.services),
            probing=launch.probing,
            cwd=launch.cwd,
            lent_fds=(self._slot.fileno(),),
        )

    def _take_gpus(self, pod: str, wanted: int) -> list[str]:
        """GPUs for a pod; none where the machine has none."""
        devices = self._gpus.take(pod, wanted if self._prepared.gpus else 0)
        if devices is None:
            raise ConfigError(f"it needs {wanted} GPUs and too few are free; another group has them")
        return devices

    # -- what others see

    def _handle(self, request: Request) -> Snapshot:
        if isinstance(request, ScaleRequest):
            self.scale(request.role, request.replicas)
        elif isinstance(request, DownRequest):
            if request.now:
                self.kill()
            else:
                self.down()
        return self.snapshot()

    def _publish(self) -> None:
        """Tells whoever watches, if there is news."""
        snapshot = self.snapshot()
        self._been_ready = self._been_ready or snapshot.status == "ready"
        if snapshot != self._shown:
            self._shown = snapshot
            write_atomically(self._folder.state, msgspec.json.encode(snapshot))
            self._on_change(snapshot)

    def _status(self, observed: Observed) -> GroupStatus:
        if self._desired.deleted:
            return "stopping"
        if group_ready(self._desired, observed):
            return "ready"
        return "not ready" if self._been_ready else "starting"

    def _view(self, pod: LocalPod) -> PodView:
        facts = pod.setup.facts
        failures = self._failures.get(restart_unit(self._desired, facts.role, facts.index))
        reason = pod.reason
        if pod.phase == "exited":
            wait_s = restart_at(failures, self._prepared.launch.backoff) - pod.ended_at
            reason += f"; restarts after {wait_s:.0f} s" if wait_s > 0 else ""
        return PodView(
            name=pod.name,
            role=facts.role,
            index=facts.index,
            status=_pod_status(pod),
            ip=facts.ip,
            since=pod.since,
            restarts=pod.restarts,
            failures=failures.count if failures else 0,
            reason=reason,
            gpus=pod.gpus,
            pids=pod.pids,
        )

    def _write_hosts(self) -> None:
        """Names of all pods there are, ready or not, as a headless Service publishes them; and of the Services."""
        lines = self._services.host_lines()
        for _, pod in sorted(self._pods.items()):
            facts = pod.setup.facts
            hosts = [
                name
                for service in names.role_services(facts.group, facts.role)
                for host in (f"{facts.name}.{service}", service)
                for name in names.dns_names(host, facts.namespace)
            ]
            lines.append(f"{facts.ip} {' '.join(hosts)}")
        text = "\n".join(lines) + "\n"
        if text != self._hosts:
            self._hosts = text
            write_atomically(self._folder.hosts, text.encode())


def _pod_status(pod: LocalPod) -> PodStatus:
    if pod.phase == "running":
        return "ready" if pod.ready else "not ready" if pod.been_ready else "starting"
    return "restarting" if pod.phase == "exited" else "stopping"
