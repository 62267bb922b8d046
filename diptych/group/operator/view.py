"""One look at a group: what its spec asks for and what there is, in the words of the plan, and the objects that carry
out the plan's words."""

from __future__ import annotations

import hashlib

import msgspec

from diptych.errors import ConfigError
from diptych.group.actions import Backoff, Desired, Kind, Observed, Target
from diptych.group.defaults import without_defaults
from diptych.group.desired import desired_group, template_revision
from diptych.group.gang import min_member
from diptych.group.kinds import RoleBasedGroup
from diptych.group.operator import objects
from diptych.group.operator.adapters import with_scale
from diptych.group.operator.cache import controller_of
from diptych.group.operator.cluster import Cluster, is_orphan
from diptych.group.operator.observe import DEPENDENCIES, REVISION, ROLE_LABEL, is_marked, observe
from diptych.group.operator.resources import (
    ADAPTER,
    DEPLOYMENT,
    GROUP,
    LEADER_WORKER_SET,
    POD,
    PROFILE,
    STATEFUL_SET,
    Json,
)
from diptych.group.operator.resources import Kind as Resource
from diptych.group.operator.takeover import live_templates, runs_the_same
from diptych.group.operator.template import in_gang, pod_template
from diptych.group.reader import Reading
from diptych.group.resolve import leader_worker_templates, resolve_spec

WORKLOADS: dict[Kind, Resource] = {
    "StatefulSet": STATEFUL_SET,
    "Deployment": DEPLOYMENT,
    "LeaderWorkerSet": LEADER_WORKER_SET,
}
FIXED = ("serviceName", "selector")  # of a workload's spec; those of v0.3 and v0.5 differ from ours
PROFILES = f"{objects.names.PREFIX}/profiles"  # annotation of workloads: hash of the profiles in its template
MAX_PODS = 10_000  # of a group: its discovery file must fit into a ConfigMap


class View:
    """Raises ConfigError for what the group cannot have. `group` is as scaled by its adapters; of one that is being
    deleted only what there is counts."""

    def __init__(self, cluster: Cluster, group: Json) -> None:
        metadata = group["metadata"]
        self._cluster = cluster
        self.deleted = bool(metadata.get("deletionTimestamp"))
        self.group = with_scale(group, cluster.owned(ADAPTER, metadata["uid"]))
        self.spec: Json = {"roles": []} if self.deleted else resolve_spec(self.group["spec"])
        self.roles: dict[str, Json] = {role["name"]: role for role in self.spec["roles"]}
        self._check_size()
        self._profiles = _profiles(cluster, self.spec["roles"])
        gang = objects.gang_of(group)
        self.templates = {name: _templates(group, role, self._profiles, gang) for name, role in self.roles.items()}
        self.workloads: dict[str, tuple[Kind, Json]] = {}  # by role
        self.doubles: list[tuple[Kind, Json]] = []  # of a role whose kind was changed
        for kind, resource in WORKLOADS.items():
            for workload in cluster.owned(resource, metadata["uid"]):
                self._sort_in(kind, workload)
        self._pods = cluster.of_group(POD, metadata["namespace"], metadata["name"])
        self.observed: Observed = observe(group, self.workloads, self._pods)
        strangers = self._find_strays()
        self._pods = [pod for pod in self._pods if pod["metadata"]["labels"].get(ROLE_LABEL) not in strangers]
        self.observed = observe(group, self.workloads, self._pods)
        self.revisions = {name: self._revision(role, gang) for name, role in self.roles.items()}
        self.adopted = {name for name in self.workloads if self._is_to_be_adopted(name)}
        for name in self.adopted:
            self.workloads[name][1]["metadata"].setdefault("annotations", {})[REVISION] = self.revisions[name]
        if self.adopted:
            self.observed = observe(group, self.workloads, self._pods)
        self.desired = self._desired()

    def _desired(self) -> Desired:
        if self.deleted:  # its spec may be anything
            return Desired(group=self.group["metadata"]["name"], roles=(), deleted=True)
        reading = Reading(open_pods=True)
        group = reading.read(RoleBasedGroup, {**self.group, "spec": self.spec})
        if group is None:
            raise ConfigError("\n".join(map(str, reading.problems)))
        return desired_group(group, self.revisions, Backoff())

    def _check_size(self) -> None:
        sizes = {name: (role.get("leaderWorkerSet") or {}).get("size", 1) for name, role in self.roles.items()}
        pods = sum(role["replicas"] * sizes[name] for name, role in self.roles.items())
        if pods > MAX_PODS:
            raise ConfigError(f"spec.roles: {pods} pods are too many, a group may have {MAX_PODS}")

    def _revision(self, role: Json, gang: str) -> str:
        """Of the role's pods. A profile that says NoUpdate counts by its name: a change of it reaches new pods only
        together with another change. Nor do fields count that say only their default, where the API server fills them
        in; they once did, and what runs under such a name keeps it."""
        counted = {
            name: profile if profile.get("updateStrategy") == "RollingUpdate" else {}
            for name, profile in self._profiles.items()
        }
        templates, profiles = _templates(self.group, role, counted, gang), sorted(_named(role))
        written = template_revision({"t": templates, "p": profiles})
        if workload_kind(role) == "LeaderWorkerSet" or written in self._in_use(role["name"]):
            return written
        return template_revision({"t": [without_defaults(each) for each in templates], "p": profiles})

    def _in_use(self, name: str) -> set[str]:
        """Revisions of the role's workload and pods."""
        seen = self.observed.role(name)
        return {seen.target.revision, *(pod.revision for pod in seen.pods)} if seen else set()

    def _is_to_be_adopted(self, name: str) -> bool:
        """Whether the upstream controller made the role's workload, which runs what the role asks for."""
        kind, live = self.workloads[name]
        return (
            name in self.roles
            and workload_kind(self.roles[name]) == kind
            and REVISION not in (live["metadata"].get("annotations") or {})
            and self._cluster.is_upstreams(WORKLOADS[kind], live)
            and runs_the_same(live_templates(live), self.templates[name])
        )

    def _sort_in(self, kind: Kind, workload: Json) -> None:
        name = workload["metadata"]["name"].removeprefix(f"{self.group['metadata']['name']}-")
        role = self.roles.get(name)
        if name in self.workloads or (role is not None and workload_kind(role) != kind):
            self.doubles.append((kind, workload))
        else:
            self.workloads[name] = (kind, workload)

    def _find_strays(self) -> set[str]:
        """For pods without a workload that we know of: it may have lost our labels or our owner reference. Then it is
        ours again; but with a group that was deleted without its dependents, they are nobody's. Returns those roles."""
        strangers = set()
        uid, namespace = self.group["metadata"]["uid"], self.group["metadata"]["namespace"]
        gone = {seen.name for seen in self.observed.roles if seen.deleting and seen.name not in self.workloads}
        for name in sorted(gone):
            role = self.roles.get(name)
            for kind in [workload_kind(role)] if role else WORKLOADS:
                live = self._cluster.look_up(WORKLOADS[kind], namespace, objects.object_name(self.group, name))
                owner = controller_of(live) if live else {}
                if live and (
                    owner.get("uid") == uid
                    or (not self.deleted and is_orphan(live, objects.labels_of(self.group, name)))
                ):
                    self.workloads[name] = (kind, live)
                elif live and (not owner or owner["kind"] == GROUP.kind):
                    strangers.add(name)
        return strangers

    def pod_group(self) -> tuple[Resource, Json] | None:
        """Pods that were placed without the gang, before it was wanted, are none of those it waits for."""
        gang = objects.gang_of(self.group)
        placed = [pod for pod in self._pods if (pod.get("spec") or {}).get("nodeName")]
        outside = sum("deletionTimestamp" not in pod["metadata"] and not in_gang(pod, gang) for pod in placed)
        return objects.pod_group(self.group, max(1, min_member(self.desired, self.observed) - outside))

    def keeps_template(self, name: str) -> bool:
        """Whether the role's workload has profiles that have changed since, which its pods are not to get now, or the
        template of the upstream controller."""
        kind, live = self.workloads[name]
        annotations = live["metadata"].get("annotations") or {}
        if annotations.get(REVISION) != self.revisions[name]:
            return False
        upstreams = not is_marked(live) and self._cluster.is_upstreams(WORKLOADS[kind], live)
        return upstreams or annotations.get(PROFILES, "") != self._used(name)

    def _used(self, name: str) -> str:
        """Hash of the profiles in the role's template; empty without any."""
        used = {each: self._profiles[each] for each in sorted(_named(self.roles[name]))}
        return hashlib.sha256(msgspec.json.encode(used, order="sorted")).hexdigest()[:10] if used else ""

    def workload(self, name: str, target: Target, annotations: dict[str, str]) -> tuple[Resource, Json]:
        """The workload object of a desired role. Of one that is there, what cannot be changed stays."""
        role = self.roles[name]
        templates = [self._labelled(template, name) for template in self.templates[name]]
        kind = workload_kind(role)
        if kind == "StatefulSet":
            made = objects.stateful_set(self.group, role, templates[0], target)
        elif kind == "Deployment":
            made = objects.deployment(self.group, role, templates[0], target)
        else:
            made = objects.leader_worker_set(self.group, role, templates[0], templates[1], target)
        made["metadata"]["annotations"] |= self.marks(name, target.revision) | annotations
        if name in self.workloads:
            live = self.workloads[name][1]["spec"]
            made["spec"] |= {field: live[field] for field in FIXED if field in made["spec"] and field in live}
        return WORKLOADS[kind], made

    def marks(self, name: str, revision: str) -> dict[str, str]:
        """The annotations of the role's workload that do not change while it is updated."""
        role = self.roles[name]
        own = {
            REVISION: revision,
            DEPENDENCIES: ",".join(role.get("dependencies") or []),
            PROFILES: self._used(name),
        }
        return {key: value for key, value in own.items() if value}

    def services(self) -> dict[str, str]:
        """By role: the Service through which the pods of its StatefulSet have names. (v0.5 called it s-...)"""
        found = {name: live["spec"].get("serviceName") for name, (_, live) in self.workloads.items()}
        return {name: service for name, service in found.items() if service}

    def _labelled(self, template: Json, name: str) -> Json:
        """With the revision, by which the plan knows old pods from new ones."""
        metadata = template["metadata"]
        labels = {**metadata["labels"], REVISION: self.revisions[name]}
        return {**template, "metadata": {**metadata, "labels": labels}}


def workload_kind(role: Json) -> Kind:
    kind: Kind = (role.get("workload") or {}).get("kind") or "StatefulSet"
    return kind


def _named(role: Json) -> set[str]:
    return {runtime["profileName"] for runtime in role.get("engineRuntimes") or []}


def _profiles(cluster: Cluster, roles: list[Json]) -> dict[str, Json]:
    found = {}
    for name in sorted({name for role in roles for name in _named(role)}):
        profile = cluster.get(PROFILE, "", name)
        if profile is None:
            raise ConfigError(f"there is no ClusterEngineRuntimeProfile {name}; create it, or remove it from the role")
        found[name] = profile["spec"]
    return found


def _templates(group: Json, role: Json, profiles: dict[str, Json], gang: str) -> list[Json]:
    """The finished pod template, or for a LeaderWorkerSet the leader's and the workers'."""
    if workload_kind(role) != "LeaderWorkerSet":
        indexed = workload_kind(role) == "StatefulSet"
        return [pod_template(group, role, role["template"], profiles, indexed=indexed, gang=gang)]
    leader, worker = leader_worker_templates(role)
    return [
        pod_template(group, role, leader, profiles, indexed=True, gang=gang),
        pod_template(group, {**role, "engineRuntimes": []}, worker, {}, indexed=True, gang=gang),
    ]
