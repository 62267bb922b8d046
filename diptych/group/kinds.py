"""The API: the four kinds of workloads.x-k8s.io/v1alpha1, defined once.

From these structs come the custom resource definitions (`crds`), the checks of `diptych validate` (`validate`), what
the local runner reads (`spec`) and what the operator reads. v0.4 is the primary contract; fields that v0.5 and v0.6
added are here too. Fields that are ours say so, and are explained in docs/kubernetes-api.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from diptych.errors import ConfigError
from diptych.group.pod import Container, PodTemplate, Volume
from diptych.group.reader import Object, Rule, field_names, keyed
from diptych.group.role import (
    MAX_ROLES,
    Count,
    Name,
    Percent,
    Positive,
    Role,
    ScalingAdapter,
    Strings,
    says,
)
from diptych.group.status import AdapterStatus, GroupStatus, ProfileStatus, SetStatus

API_GROUP = "workloads.x-k8s.io"
API_VERSION = f"{API_GROUP}/v1alpha1"


class ObjectMeta(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names(
        "uid resourceVersion generation creationTimestamp deletionTimestamp deletionGracePeriodSeconds managedFields"
        " ownerReferences finalizers generateName selfLink"
    )

    name: Annotated[str, Meta(min_length=1)]
    namespace: str = "default"
    labels: Strings = msgspec.field(default_factory=dict)
    annotations: Strings = msgspec.field(default_factory=dict)


class RoleTemplate(Object, frozen=True, kw_only=True):
    name: Name
    template: PodTemplate


class KubeScheduling(Object, frozen=True, kw_only=True):
    schedule_timeout_seconds: Annotated[Count, says("After so long the gang gives its places back.")] = 60


class VolcanoScheduling(Object, frozen=True, kw_only=True):
    priority_class_name: str | None = None
    queue: str | None = None


class PodGroupPolicy(Object, frozen=True, kw_only=True):
    rules: ClassVar = (
        Rule(
            "!(has(self.kubeScheduling) && has(self.volcanoScheduling))",
            "kubeScheduling and volcanoScheduling exclude each other",
            lambda it: it.kube_scheduling is None or it.volcano_scheduling is None,
        ),
    )

    kube_scheduling: Annotated[KubeScheduling | None, says("PodGroup of scheduler-plugins.")] = None
    volcano_scheduling: Annotated[VolcanoScheduling | None, says("PodGroup of Volcano.")] = None


class CoordinatedUpdate(Object, frozen=True, kw_only=True):
    max_skew: Annotated[Percent | None, says("How far the updated shares of two roles may be apart.")] = None
    partition: Annotated[Percent | None, says("Share of each role that keeps its old template.")] = None
    max_unavailable: Annotated[Percent | None, says("Instead of the roles' own maxUnavailable.")] = None


class CoordinatedScaling(Object, frozen=True, kw_only=True):
    max_skew: Annotated[Percent | None, says("How far the created shares of two roles may be apart.")] = None
    progression: Annotated[
        Literal["OrderScheduled", "OrderReady"], says("What counts as created: a pod with a node, or a ready one.")
    ] = "OrderScheduled"


class CoordinationStrategy(Object, frozen=True, kw_only=True):
    rolling_update: CoordinatedUpdate | None = None
    scaling: CoordinatedScaling | None = None


class Coordination(Object, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=63)]
    roles: Annotated[tuple[Name, ...], Meta(max_length=MAX_ROLES)]
    strategy: CoordinationStrategy | None = None


class ScalingGroup(Object, frozen=True, kw_only=True):
    name: Annotated[Name, says("A RoleBasedGroupScalingAdapter can target it like a role.")]
    roles: Annotated[
        dict[str, Positive], Meta(min_length=1, max_length=MAX_ROLES), says("Pods of each role in one unit.")
    ]
    replicas: Annotated[Count, says("Units: a role has so many times its pods of one unit.")] = 1
    scaling_adapter: ScalingAdapter | None = None


class GroupSpec(Object, frozen=True, kw_only=True):
    cluster_fields: ClassVar[frozenset[str]] = field_names("podGroupPolicy coordination paused")
    rules: ClassVar = (
        Rule(
            "self.roles.all(r, !has(r.dependencies) || r.dependencies.all(d, self.roles.exists(o, o.name == d)))",
            "a role depends on a role that is not there",
            lambda it: True,  # `checks.group_problems` names the field
        ),
    )

    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=MAX_ROLES), keyed("name")]
    role_templates: Annotated[
        tuple[RoleTemplate, ...], Meta(max_length=MAX_ROLES), keyed("name"), says("Templates that roles share.")
    ] = ()
    pod_group_policy: Annotated[PodGroupPolicy | None, says("Gang scheduling.")] = None
    coordination: Annotated[
        tuple[Coordination, ...], Meta(max_length=MAX_ROLES), keyed("name"), says("Roles that move in step.")
    ] = ()
    scaling_groups: Annotated[
        tuple[ScalingGroup, ...],
        Meta(max_length=MAX_ROLES),
        keyed("name"),
        says("Ours. Roles that are scaled in a ratio, as one."),
    ] = ()
    paused: Annotated[bool, says("Ours. No update of any role begins or goes on; pods are still replaced.")] = False


class RoleBasedGroup(Object, frozen=True, kw_only=True):
    """Roles of one application that are created, updated, scaled and restarted together."""

    cluster_fields: ClassVar[frozenset[str]] = frozenset({"status"})

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: GroupSpec
    status: GroupStatus | None = None

    @property
    def name(self) -> str:
        return self.metadata.name

    def role(self, name: str) -> Role:
        """Raises ConfigError that lists the roles there are."""
        for role in self.spec.roles:
            if role.name == name:
                return role
        raise ConfigError(
            f"group {self.name} has no role {name}; its roles: {', '.join(r.name for r in self.spec.roles)}"
        )


class SetRollingUpdate(Object, frozen=True, kw_only=True):
    max_unavailable: Annotated[
        Positive | Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,2}%$(?!\n)", max_length=4)],
        says("Groups that may be missing or updated at a time. A percentage is rounded down, to 1 at least."),
    ] = "100%"


class SetRolloutStrategy(Object, frozen=True, kw_only=True):
    rolling_update: SetRollingUpdate | None = None


class SetSpec(Object, frozen=True, kw_only=True):
    template: Annotated[GroupSpec, says("The spec of each RoleBasedGroup.")]
    replicas: Annotated[Count, says("RoleBasedGroups; they are called <set>-<index>.")] = 1
    rollout_strategy: Annotated[
        SetRolloutStrategy | None, says("Ours. How many groups get a new template at a time; by default all.")
    ] = None


class RoleBasedGroupSet(Object, frozen=True, kw_only=True):
    """Several RoleBasedGroups with one spec."""

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: SetSpec
    status: SetStatus | None = None


class ScaleTarget(Object, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=63), says("A RoleBasedGroup of the same namespace.")]
    role: Annotated[str, Meta(min_length=1, max_length=63), says("A role, or a scaling group (ours).")]


class AdapterSpec(Object, frozen=True, kw_only=True):
    scale_target_ref: ScaleTarget
    replicas: Annotated[Count | None, says("Set by whoever scales, such as an autoscaler.")] = None


class RoleBasedGroupScalingAdapter(Object, frozen=True, kw_only=True):
    """The scale subresource of one role, or of one scaling group: what an autoscaler targets."""

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: AdapterSpec
    status: AdapterStatus | None = None


class ProfileSpec(Object, frozen=True, kw_only=True):
    init_containers: Annotated[tuple[Container, ...], keyed("name")] = ()
    containers: Annotated[tuple[Container, ...], keyed("name")] = ()
    volumes: Annotated[tuple[Volume, ...], keyed("name")] = ()
    update_strategy: Annotated[
        Literal["NoUpdate", "RollingUpdate"], says("Whether a change of the profile reaches pods that run.")
    ] = "NoUpdate"


class ClusterEngineRuntimeProfile(Object, frozen=True, kw_only=True):
    """Sidecars, init containers and volumes that roles have injected by name (`engineRuntimes`)."""

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: ProfileSpec
    status: ProfileStatus | None = None


KINDS: dict[str, type[Object]] = {
    kind.__name__: kind
    for kind in (RoleBasedGroup, RoleBasedGroupSet, RoleBasedGroupScalingAdapter, ClusterEngineRuntimeProfile)
}
