"""One group's supervisor: observes its pods, asks `plan` what to do, does it, until the group is down.

All decisions are `plan`'s and `pods.control`'s. This file turns their actions into processes and what happens to
processes into observations.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack

import msgspec

from diptych.errors import ConfigError
from diptych.group.actions import (
    Action,
    ApplyRole,
    DeletePod,
    DeleteRole,
    Desired,
    Failures,
    Observed,
    ObservedRole,
    PodState,
    RecordFailures,
    RecordRollout,
    RestartPolicy,
    Rollback,
    Rollout,
    Target,
    Wait,
)
from diptych.group.local import limits
from diptych.group.local.addresses import claim_slot
from diptych.group.local.control import ControlServer, DownRequest, Request, ScaleRequest, UpdateRequest
from diptych.group.local.endpoints import Candidate, endpoints
from diptych.group.local.environment import write_programs
from diptych.group.local.fleet import Fleet
from diptych.group.local.launch import Prepared, prepare, with_claims
from diptych.group.local.paths import GroupFolder, write_atomically
from diptych.group.local.process import LocalPod
from diptych.group.local.services import LocalServices
from diptych.group.local.state import Snapshot
from diptych.group.local.views import group_status, pod_view, role_views
from diptych.group.plan import plan
from diptych.group.pods import PodAction, RestartPod, StartPod, StopPod, control, kept_revision
from diptych.group.restart import count_failure

Key = tuple[str, int]  # role, index
NOTHING = Target(0, 0, "")


class Supervisor:
    """Runs a prepared group whose lock the caller holds. `on_change` gets each new snapshot, in the loop."""

    def __init__(self, prepared: Prepared, folder: GroupFolder, on_change: Callable[[Snapshot], None]) -> None:
        self._history = [prepared]  # the last one holds
        self._folder = folder
        self._on_change = on_change
        self._desired = prepared.desired
        self._targets: dict[str, Target] = {}
        self._kept: dict[str, str] = {}  # by role: the revision of pods below the partition
        self._rollouts: dict[str, Rollout] = {}
        self._failures: dict[str, Failures] = {}
        self._changed = asyncio.Event()
        self._been_ready = False
        self._message = ""
        self._started_at = time.time()
        self._shown: Snapshot | None = None
        self._services: LocalServices
        self._fleet: Fleet
        self._tasks: asyncio.TaskGroup

    @property
    def _prepared(self) -> Prepared:
        return self._history[-1]

    async def run(self) -> None:
        """Returns when the group is down; raises ConfigError if it cannot come up. Nothing is left running."""
        async with AsyncExitStack() as cleanup:
            cleanup.callback(self._folder.clear)
            self._folder.create()
            write_programs(self._folder)
            slot = claim_slot()
            cleanup.callback(slot.close)
            self._services = LocalServices(self._prepared, slot)
            self._fleet = Fleet(self._folder, slot, self._services, self._prepared.gpus, self)
            cleanup.push_async_callback(self._services.close)
            await self._services.open()
            control_server = ControlServer(self._folder.control, self._handle)
            cleanup.push_async_callback(control_server.close)
            await control_server.open()
            async with asyncio.TaskGroup() as self._tasks:
                await self._reconcile_until_down()

    def down(self) -> None:
        """Ends the group in order, with grace periods."""
        self._desired = msgspec.structs.replace(self._desired, deleted=True)
        self._changed.set()

    def kill(self) -> None:
        """Ends the group without grace periods."""
        self.down()
        self._fleet.kill()

    def scale(self, role: str, replicas: int) -> None:
        """Raises ConfigError for an unknown role, a bad number, no GPUs or addresses for it, a group that is ending."""
        self._prepared.manifest.group.role(role)
        if replicas < 0:
            raise ConfigError(f"{replicas} replicas: the number must be 0 or more")
        roles = tuple(
            msgspec.structs.replace(each, replicas=replicas) if each.name == role else each
            for each in self._desired.roles
        )
        wanted = msgspec.structs.replace(self._desired, roles=roles)
        self._check_room(self._prepared, wanted)
        self._desired = wanted
        self._message = ""
        self._changed.set()

    def update(self, prepared: Prepared) -> None:
        """Goes over to another manifest of the same group. Raises ConfigError if that needs a new start."""
        ports = self._prepared.launch.service_ports
        if prepared.manifest.services != self._prepared.manifest.services or prepared.launch.service_ports not in (
            {},
            ports,
        ):
            raise ConfigError(f"Services change only with a new start; `diptych down {prepared.group}` comes first")
        self._check_room(prepared, prepared.desired)
        launch = msgspec.structs.replace(prepared.launch, service_ports=ports)
        self._history.append(msgspec.structs.replace(prepared, launch=launch))
        self._desired = prepared.desired
        self._message = ""
        self._changed.set()

    def _check_room(self, prepared: Prepared, wanted: Desired) -> None:
        """Raises ConfigError if the machine has not what `wanted` needs, or the group is ending."""
        if self._desired.deleted:
            raise ConfigError(f"group {self._desired.group} is being taken down")
        manifest = prepared.manifest
        replicas = {each.name: each.replicas for each in wanted.roles}
        problems = limits.gpu_problems(manifest.group.spec.roles, replicas, len(prepared.gpus))
        leaving = sum(
            pod.setup.facts.index >= replicas.get(pod.setup.facts.role, 0) for pod in self._fleet
        )  # they still have their addresses
        problems += limits.address_problems(sum(replicas.values()) + leaving, len(manifest.services))
        if problems:
            raise ConfigError(problems[0])

    def snapshot(self) -> Snapshot:
        observed = self._observe()
        return Snapshot(
            group=self._desired.group,
            status=group_status(self._desired, observed, self._been_ready),
            supervisor_pid=os.getpid(),
            started_at=self._started_at,
            source=self._prepared.launch.source,
            roles=role_views(self._desired, observed, self._fleet),
            pods=tuple(pod_view(pod, self._desired, self._failures) for pod in self._fleet),
            services=self._services.views(),
            message=self._message,
        )

    # -- the loop

    async def _reconcile_until_down(self) -> None:
        while True:
            self._changed.clear()
            waits = self._reconcile(asyncio.get_running_loop().time())
            self._publish()
            if self._desired.deleted and not len(self._fleet):
                return
            try:
                async with asyncio.timeout_at(min((wait.until for wait in waits), default=None)):
                    await self._changed.wait()
            except TimeoutError:
                pass  # a back-off or a deadline is over

    def _reconcile(self, now: float) -> list[Wait]:
        """Does what is due; returns what is due later."""
        actions: list[Action | PodAction] = []
        for action in plan(self._desired, self._observe(), now):
            self._carry_out(action)
            actions.append(action)
        for seen in self._observe().roles:
            kept = self._kept.get(seen.name, seen.target.revision)
            self._kept[seen.name] = kept = kept_revision(seen.target, kept, seen.pods)
            policy = self._policy(seen.name)
            for step in control(seen.target, kept, seen.pods, now, self._desired.backoff, self._failures, policy):
                self._control(seen.name, step)
                actions.append(step)
        self._route()
        waits = [action for action in actions if isinstance(action, Wait)]
        if len(waits) < len(actions):
            self._changed.set()  # what was done may make more due
        return waits

    def _observe(self) -> Observed:
        pods: dict[str, list[PodState]] = {role: [] for role in self._targets} | self._fleet.states()
        roles = tuple(
            ObservedRole(
                name=role,
                target=self._targets.get(role, NOTHING),
                pods=tuple(states),
                deleting=role not in self._targets,
                dependencies=self._dependencies(role),
                rollout=self._rollouts.get(role),
            )
            for role, states in pods.items()
        )
        return Observed(roles=roles, failures=self._failures)

    def _dependencies(self, role: str) -> tuple[str, ...]:
        """By the newest manifest that has the role: one that is gone still ends before what it needs."""
        roles = (each for prepared in reversed(self._history) for each in prepared.desired.roles)
        return next((each.dependencies for each in roles if each.name == role), ())

    def _carry_out(self, action: Action) -> None:
        match action:
            case ApplyRole(role, target):
                self._targets[role] = target
            case DeleteRole(role):
                for about in (self._targets, self._kept, self._rollouts):
                    about.pop(role, None)
            case DeletePod(role, name):
                self._fleet.stop(role, next(pod.setup.facts.index for pod in self._fleet if pod.name == name))
            case RecordRollout(role, rollout):
                self._rollouts[role] = rollout
            case RecordFailures(key, failures):
                if failures is None:
                    self._failures.pop(key, None)
                else:
                    self._failures[key] = failures
            case Rollback(role, to, why):
                self._roll_back(role, to)
                self._message = f"the update was undone: {why}"
            case Wait():
                pass

    def _control(self, role: str, step: PodAction) -> None:
        match step:
            case StartPod(index, revision):
                self._fleet.start(role, index, revision, self._with(role, revision))
            case RestartPod(index):
                self._fleet.restart(role, index)
            case StopPod(index):
                self._fleet.stop(role, index)
            case Wait():
                pass

    def _roll_back(self, role: str, to: str) -> None:
        """Returns to the newest manifest in which the role had the revision `to`, with the replicas of now."""
        good = self._with(role, to)
        replicas = {each.name: each.replicas for each in self._desired.roles}
        roles = tuple(
            msgspec.structs.replace(each, replicas=replicas.get(each.name, each.replicas))
            for each in good.desired.roles
        )
        self._history.append(good)
        self._desired = msgspec.structs.replace(good.desired, roles=roles)

    def _with(self, role: str, revision: str) -> Prepared:
        """The newest manifest in which the role had this revision."""
        return next(
            prepared
            for prepared in reversed(self._history)
            if any(each.name == role and each.revision == revision for each in prepared.desired.roles)
        )

    def changed(self) -> None:
        """See Owner."""
        self._changed.set()

    def follow(self, pod: Coroutine[None, None, None]) -> None:
        """See Owner."""
        self._tasks.create_task(pod)

    def ended(self, pod: LocalPod) -> None:
        """See Owner. What a restart policy minds is counted by `plan`."""
        if self._policy(pod.setup.facts.role) == "None" or not pod.been_ready:
            backoff = self._desired.backoff
            self._failures[pod.name] = count_failure(self._failures.get(pod.name), pod.ended_at, backoff)

    def _policy(self, role: str) -> RestartPolicy:
        return next((each.restart_policy for each in self._desired.roles if each.name == role), "None")

    def _route(self) -> None:
        """Sends each Service's connections to the pods that are ready now."""
        pods = [pod for pod in self._fleet if pod.phase == "running"]
        candidates = [Candidate(pod.name, pod.setup.facts.labels, pod.ready) for pod in pods]
        services = self._prepared.manifest.services
        for service, names_ in endpoints(services, () if self._desired.deleted else candidates).items():
            if self._services.endpoints.get(service, ()) != names_:
                specs = {pod.name: pod.setup.spec for pod in pods}
                ips = {pod.name: pod.setup.facts.ip for pod in pods}
                self._services.set_endpoints(service, names_, specs, ips)

    # -- what others see

    def _handle(self, request: Request) -> Snapshot:
        if isinstance(request, ScaleRequest):
            self.scale(request.role, request.replicas)
        elif isinstance(request, UpdateRequest):
            self.update(prepare(with_claims(request.launch, self._prepared.launch.claims)))
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
