"""One role of a group, as the API has it. See `kinds`, which holds the rest of the API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from diptych.errors import ConfigError
from diptych.group.pod import Container, PodTemplate, Port
from diptych.group.reader import Object, Rule, field_names, keyed

MAX_ROLES = 32  # bounds what the API server reckons a CEL rule may cost
WORKLOADS = ("apps/v1/StatefulSet", "apps/v1/Deployment", "leaderworkerset.x-k8s.io/v1/LeaderWorkerSet")

RestartPolicy = Literal["None", "RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart"]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$(?!\n)", min_length=1, max_length=63)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Percent = Annotated[str, Meta(pattern=r"^([0-9]|[1-9][0-9]|100)%$(?!\n)", max_length=4)]
IntOrPercent = Count | Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,2})%$(?!\n)", max_length=4)]
Strings = dict[str, str]
Raw = dict[str, Any]  # passed on as it is


def says(text: str) -> Meta:
    return Meta(description=text)


class Workload(Object, frozen=True, kw_only=True):
    rules: ClassVar = (
        Rule(
            f"(self.apiVersion + '/' + self.kind) in {list(WORKLOADS)}",
            f"must be one of {', '.join(WORKLOADS)}",
            lambda it: f"{it.api_version}/{it.kind}" in WORKLOADS,
        ),
    )

    api_version: Annotated[str, Meta(max_length=253)] = "apps/v1"
    kind: Annotated[str, Meta(max_length=63)] = "StatefulSet"


class LeaderWorkerSet(Object, frozen=True, kw_only=True):
    cluster_fields: ClassVar[frozenset[str]] = field_names("patchLeaderTemplate patchWorkerTemplate")

    size: Annotated[Positive, says("Pods of one replica, its leader included.")] = 1
    patch_leader_template: Annotated[Raw | None, says("Strategic merge patch of the leader's template.")] = None
    patch_worker_template: Annotated[Raw | None, says("Strategic merge patch of the workers' template.")] = None


class InPlaceUpdate(Object, frozen=True, kw_only=True):
    grace_period_seconds: Count = 0


def _is_zero(value: int | str | None) -> bool:
    return value in (0, "0%")


class RollingUpdate(Object, frozen=True, kw_only=True):
    rules: ClassVar = (
        Rule(
            "!((type(self.maxUnavailable) == int ? self.maxUnavailable == 0 : self.maxUnavailable == '0%') && "
            "(type(self.maxSurge) == int ? self.maxSurge == 0 : self.maxSurge == '0%'))",
            "maxUnavailable and maxSurge must not both be 0: no pod could ever be replaced",
            lambda it: not (_is_zero(it.max_unavailable) and _is_zero(it.max_surge)),
        ),
    )

    partition: Annotated[IntOrPercent, says("Pods below this index keep their old template.")] = 0
    max_unavailable: Annotated[
        IntOrPercent, says("Pods that may be missing during an update. A percentage is rounded down.")
    ] = 1
    max_surge: Annotated[IntOrPercent, says("Pods above `replicas` during an update. A percentage is rounded up.")] = 0
    paused: Annotated[bool, says("No update of this role begins or goes on.")] = False
    type: Annotated[
        Literal["Recreate", "InPlaceIfPossible"] | None,
        says("Accepted for v0.6's InstanceSet; pods of other workloads are always recreated."),
    ] = None
    in_place_update_strategy: Annotated[InPlaceUpdate | None, says("Accepted; goes with InPlaceIfPossible.")] = None


class RolloutStrategy(Object, frozen=True, kw_only=True):
    rules: ClassVar = (
        Rule(
            "!self.rollbackOnFailure || has(self.progressDeadlineSeconds)",
            "rollbackOnFailure needs progressDeadlineSeconds: it says when an update has failed",
            lambda it: not it.rollback_on_failure or it.progress_deadline_seconds is not None,
        ),
    )

    type: Literal["RollingUpdate"] = "RollingUpdate"
    rolling_update: RollingUpdate | None = None
    progress_deadline_seconds: Annotated[
        Positive | None, says("Ours. An update has failed when no further pod became ready for so long.")
    ] = None
    rollback_on_failure: Annotated[bool, says("Ours. A failed update is undone: the revision before it returns.")] = (
        False
    )


class RoleServicePort(Object, frozen=True, kw_only=True):
    port: Annotated[int, Meta(ge=1, le=65535)]
    name: Annotated[str, Meta(max_length=63)] | None = None
    protocol: Annotated[str, Meta(max_length=8)] = "TCP"
    target_port: Annotated[Port | None, says("Accepted; the discovery file has `port`.")] = None
    node_port: Annotated[int | None, says("Accepted, without effect.")] = None
    app_protocol: Annotated[str | None, says("Accepted, without effect.")] = None


class EngineRuntime(Object, frozen=True, kw_only=True):
    profile_name: Annotated[str, Meta(min_length=1, max_length=253), says("A ClusterEngineRuntimeProfile.")]
    inject_containers: Annotated[tuple[str, ...], says("Accepted, without effect.")] = ()
    containers: Annotated[
        tuple[Container, ...], keyed("name"), says("args and env that are added to the profile's containers.")
    ] = ()


class ScalingAdapter(Object, frozen=True, kw_only=True):
    enable: Annotated[bool, says("Whether the group has a RoleBasedGroupScalingAdapter for this.")] = False


class TemplateRef(Object, frozen=True, kw_only=True):
    name: Name


class DisruptionBudget(Object, frozen=True, kw_only=True):
    rules: ClassVar = (
        Rule(
            "has(self.minAvailable) != has(self.maxUnavailable)",
            "needs either minAvailable or maxUnavailable",
            lambda it: (it.min_available is None) != (it.max_unavailable is None),
        ),
    )

    min_available: Annotated[IntOrPercent | None, says("Pods that an eviction must leave.")] = None
    max_unavailable: Annotated[IntOrPercent | None, says("Pods that evictions may take at a time.")] = None


class Drain(Object, frozen=True, kw_only=True):
    path: Annotated[
        str,
        Meta(pattern="^/", max_length=1024),
        says("Asked with GET before the pod is ended; it answers when its requests have ended or moved."),
    ]
    port: Annotated[Port, says("Number or name of a port of the first container.")] = 8000
    timeout_seconds: Annotated[Positive, says("The pod is ended after so long at the latest.")] = 300


class Role(Object, frozen=True, kw_only=True):
    cluster_fields: ClassVar[frozenset[str]] = field_names(
        "labels annotations rolloutStrategy servicePorts engineRuntimes scalingAdapter minReadySeconds components"
        " podDisruptionBudget minAvailable drain"
    )
    rules: ClassVar = (
        Rule(
            "has(self.template) != has(self.templateRef)",
            "needs either template or templateRef",
            lambda it: (it.own_template is None) != (it.template_ref is None),
        ),
        Rule(
            "has(self.templateRef) == has(self.templatePatch)",
            "templatePatch goes with templateRef; write templatePatch: {} to change nothing",
            lambda it: (it.template_ref is None) == (it.template_patch is None),
        ),
        Rule(
            "!has(self.templateRef) || self.workload.kind != 'LeaderWorkerSet'",
            "templateRef is not possible with the workload LeaderWorkerSet; write the template into the role",
            lambda it: it.template_ref is None or it.workload.kind != "LeaderWorkerSet",
        ),
        Rule(
            "!has(self.components)",
            "components needs the workload InstanceSet, which is not supported",
            lambda it: it.components is None,
        ),
    )

    name: Annotated[Name, says("Part of the names of the role's pods: <group>-<name>-<index>.")]
    replicas: Annotated[Count, says("Pods, or leaders of a LeaderWorkerSet; scalingGroups overrides it.")] = 1
    labels: Annotated[Strings, says("Of the workload object, not of pods.")] = msgspec.field(default_factory=dict)
    annotations: Annotated[Strings, says("Of the workload object, not of pods.")] = msgspec.field(default_factory=dict)
    dependencies: Annotated[
        tuple[Name, ...], Meta(max_length=MAX_ROLES), says("Roles that must be ready before this one is created.")
    ] = ()
    workload: Annotated[Workload, says("What runs the pods.")] = Workload()
    own_template: Annotated[PodTemplate | None, says("The pods.")] = msgspec.field(name="template", default=None)
    template_ref: Annotated[TemplateRef | None, says("One of roleTemplates, instead of a template.")] = None
    template_patch: Annotated[Raw | None, says("Strategic merge patch of the referenced template.")] = None
    leader_worker_set: Annotated[LeaderWorkerSet | None, says("Of the workload LeaderWorkerSet.")] = None
    components: Annotated[tuple[Raw, ...] | None, says("v0.6's InstanceSet; not supported.")] = None
    rollout_strategy: Annotated[RolloutStrategy | None, says("How pods get a new template.")] = None
    own_restart_policy: Annotated[
        RestartPolicy | None,
        says(
            "What a container's restart brings about; by default None, or with a LeaderWorkerSet"
            " RecreateRoleInstanceOnPodRestart."
        ),
    ] = msgspec.field(name="restartPolicy", default=None)
    min_ready_seconds: Annotated[Count, says("A pod counts as available once it was ready for so long.")] = 0
    service_ports: Annotated[
        tuple[RoleServicePort, ...], keyed("port", "protocol"), says("Ports in the discovery file.")
    ] = ()
    engine_runtimes: Annotated[
        tuple[EngineRuntime, ...], keyed("profileName"), says("Sidecar profiles to inject.")
    ] = ()
    scaling_adapter: ScalingAdapter | None = None
    pod_disruption_budget: Annotated[DisruptionBudget | None, says("Ours. The role gets a PodDisruptionBudget.")] = None
    min_available: Annotated[
        Count | None, says("Ours. Replicas that gang scheduling needs of this role; by default all.")
    ] = None
    drain: Annotated[Drain | None, says("Ours. How a pod is asked to finish its requests before it ends.")] = None

    @property
    def template(self) -> PodTemplate:
        """The pods. Raises ConfigError for a role whose templateRef has not been resolved (`resolve.resolve_spec`)."""
        if self.own_template is None:
            raise ConfigError(f"role {self.name} has no template of its own; its templateRef must be resolved first")
        return self.own_template

    @property
    def restart_policy(self) -> RestartPolicy:
        if self.own_restart_policy is not None:
            return self.own_restart_policy
        return "RecreateRoleInstanceOnPodRestart" if self.workload.kind == "LeaderWorkerSet" else "None"
