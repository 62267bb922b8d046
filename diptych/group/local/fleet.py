"""The pods of a local group: each one's processes, address, GPUs and names."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Protocol

from diptych.errors import ConfigError
from diptych.group import names
from diptych.group.actions import PodState
from diptych.group.expand import PodFacts
from diptych.group.local.addresses import Slot
from diptych.group.local.gpus import GpuPool
from diptych.group.local.launch import Prepared
from diptych.group.local.paths import GroupFolder, write_atomically
from diptych.group.local.process import LocalPod, PodSetup
from diptych.group.local.services import LocalServices, readiness
from diptych.group.pod import gpus_wanted

Key = tuple[str, int]  # role, index


class Owner(Protocol):
    """Who has the pods."""

    def changed(self) -> None:
        """Something about a pod has changed."""

    def follow(self, pod: Coroutine[None, None, None]) -> None:
        """Run this, which follows a pod until it ends, in a task."""

    def ended(self, pod: LocalPod) -> None:
        """The pod ended by itself; it is forgotten only when it is stopped."""


class Fleet:
    """Starts and stops pods for `owner`; addresses come from `slot`, GPUs from the machine's."""

    def __init__(
        self,
        folder: GroupFolder,
        slot: Slot,
        services: LocalServices,
        gpus: tuple[str, ...],
        owner: Owner,
    ) -> None:
        self._folder, self._slot, self._services = folder, slot, services
        self._machine_gpus, self._gpus = gpus, GpuPool(gpus)
        self._owner = owner
        self._pods: dict[Key, LocalPod] = {}
        self._ended: dict[Key, tuple[int, str]] = {}  # restarts, and the last reason, of pods that are made anew
        self._hosts = ""

    def __len__(self) -> int:
        return len(self._pods)

    def __iter__(self) -> Iterator[LocalPod]:
        """All pods by role and index."""
        return iter([pod for _, pod in sorted(self._pods.items())])

    def states(self) -> dict[str, list[PodState]]:
        """What `plan` sees of the pods, by role."""
        states: dict[str, list[PodState]] = {}
        for pod in self:
            if pod.phase != "gone":  # about to be forgotten
                facts = pod.setup.facts
                state = PodState(
                    name=pod.name,
                    index=facts.index,
                    uid=facts.uid,
                    revision=pod.setup.revision,
                    phase=pod.phase,
                    ready=pod.ready,
                    ready_since=pod.ready_since,
                    unproven=not pod.been_ready,
                )
                states.setdefault(facts.role, []).append(state)
        return states

    def start(self, role: str, index: int, revision: str, prepared: Prepared) -> None:
        """Makes a new pod from the role's template in `prepared`."""
        key = role, index
        pod = self._pods[key] = LocalPod(self._setup(role, index, revision, prepared), self._owner.changed)
        pod.restarts, pod.reason = self._ended.pop(key, (pod.restarts, pod.reason))
        self._run(key, fresh=True)

    def restart(self, role: str, index: int) -> None:
        """Starts a pod that has ended again, in place."""
        self._run((role, index), fresh=False)

    def stop(self, role: str, index: int) -> None:
        """Ends a pod and forgets it, at once if it has ended."""
        pod = self._pods[role, index]
        if pod.phase == "exited":
            self._ended[role, index] = (pod.restarts, pod.reason)
            self._forget((role, index))
        else:
            pod.stop()

    def kill(self) -> None:
        """Ends all pods without grace periods."""
        for pod in self:
            pod.kill()

    def _run(self, key: Key, fresh: bool) -> None:
        pod = self._pods[key]
        self._write_hosts()
        pod.begin()
        self._owner.follow(self._follow(key, pod, fresh))

    async def _follow(self, key: Key, pod: LocalPod, fresh: bool) -> None:
        await pod.run(fresh)
        if pod.phase == "gone":
            self._forget(key)
        else:
            self._owner.ended(pod)

    def _forget(self, key: Key) -> None:
        pod = self._pods.pop(key)
        self._gpus.give_back(pod.name)
        self._slot.release(pod.name)
        self._write_hosts()
        self._owner.changed()

    def _setup(self, role_name: str, index: int, revision: str, prepared: Prepared) -> PodSetup:
        manifest, launch = prepared.manifest, prepared.launch
        role, group = manifest.group.role(role_name), manifest.group
        name = names.pod_name(group.name, role_name, index)
        labels = {
            **role.template.metadata.labels,
            **names.role_labels(group.metadata.namespace, group.name, role_name),
            **names.pod_labels(group.name, role_name, index),
        }
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
            revision=revision,
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
        devices = self._gpus.take(pod, wanted if self._machine_gpus else 0)
        if devices is None:
            raise ConfigError(f"it needs {wanted} GPUs and too few are free; another group has them")
        return devices

    def _write_hosts(self) -> None:
        """Names of all pods there are, ready or not, as a headless Service publishes them; and of the Services."""
        lines = self._services.host_lines()
        for pod in self:
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
