"""The words of `plan`: what is desired of a group, what is observed of it, and what is to be done. Plain data.

Times are seconds on a clock that a restart of the runner does not set back (Unix time on Kubernetes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

RestartPolicy = Literal["None", "RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart"]
Kind = Literal["StatefulSet", "Deployment", "LeaderWorkerSet"]
Phase = Literal["running", "stopping", "exited"]
RolloutState = Literal["progressing", "held", "complete", "failed"]
Quantity = int | str  # a number of pods, or a percentage of a role's replicas: "25%"


# ---- desired -----------------------------------------------------------------------------------------------------


class Backoff(msgspec.Struct, frozen=True):
    """When what failed is started again: at once, then after `base_s`·2^k up to `cap_s`.

    The count begins anew once `stable_s` have passed without a failure.
    """

    base_s: float = 10.0
    cap_s: float = 300.0
    stable_s: float = 600.0

    def delay_s(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th failure in a row."""
        if failures <= 1:
            return 0.0
        return min(self.cap_s, self.base_s * 2.0 ** min(failures - 2, 60))


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """How a role goes from one revision to the next.

    Ordinals below `partition` keep the old one. A pod counts as available `min_ready_s` after it became ready. Without
    progress for `progress_deadline_s` the rollout has failed (None: never); `rollback`: then return to what was good.
    """

    partition: Quantity = 0
    max_unavailable: Quantity = 1
    max_surge: Quantity = 0
    paused: bool = False
    min_ready_s: float = 0.0
    progress_deadline_s: float | None = None
    rollback: bool = False


class DesiredRole(msgspec.Struct, frozen=True, kw_only=True):
    """`revision`: hash of the pod template, and of nothing else. `size`: pods of one replica (LeaderWorkerSet).

    `gang_min`: replicas that must be placed together; None: all.
    """

    name: str
    replicas: int
    dependencies: tuple[str, ...] = ()
    revision: str = ""
    kind: Kind = "StatefulSet"
    size: int = 1
    restart_policy: RestartPolicy = "None"
    update: Update = Update()
    gang_min: int | None = None


class CoordinatedUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """Percent of each role's replicas. `max_skew`: how far the updated share of one role may be ahead of another's.

    `max_unavailable` and `partition` stand in for the roles' own; None: theirs.
    """

    max_skew: int = 100
    partition: int | None = None
    max_unavailable: int | None = None


class CoordinatedScaling(msgspec.Struct, frozen=True, kw_only=True):
    """`max_skew`: percent that one role's share of its desired replicas may be ahead of another's.

    What counts as there: pods that have a node (OrderScheduled), or that are ready (OrderReady).
    """

    max_skew: int = 100
    progression: Literal["OrderScheduled", "OrderReady"] = "OrderScheduled"


class Coordination(msgspec.Struct, frozen=True, kw_only=True):
    """Roles that move together. A role may be in several: the strictest counts."""

    roles: tuple[str, ...]
    update: CoordinatedUpdate | None = None
    scaling: CoordinatedScaling | None = None


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """Role names are unique and their dependencies known and free of cycles (`spec` checks that).

    `paused`: no rollout of any role goes on. `deleted`: the group is to end, in order.
    """

    group: str
    roles: tuple[DesiredRole, ...]
    coordinations: tuple[Coordination, ...] = ()
    backoff: Backoff = Backoff()
    paused: bool = False
    deleted: bool = False


# ---- observed ----------------------------------------------------------------------------------------------------


class Target(msgspec.Struct, frozen=True):
    """What a role's workload object asks its controller for: the fields that `plan` decides.

    Ordinals below `partition` stay at the revision they had, those from it on get `revision`. `on_delete`: the
    controller deletes nothing by itself (updateStrategy OnDelete), and whatever it creates has `revision`; `partition`
    is then 0. A Deployment, which knows no ordinals, is paused while `partition` is not 0; it is then `replicas`.
    """

    replicas: int
    partition: int
    revision: str
    on_delete: bool = False


class PodState(msgspec.Struct, frozen=True, kw_only=True):
    """One pod as seen; for a LeaderWorkerSet one replica, with its leader's name and uid.

    `index`: the ordinal, -1 for a Deployment's. `revision` equals the role's iff it was made from that template.
    `phase`: stopping, from the moment its end was asked for; exited, when it ended by itself for good (Failed).
    `restarted`: a container was restarted in it once it had been ready, sidecars left out. `ready` counts only while it
    runs. `unproven`: it has not been ready yet. `unplaced`: the scheduler says that no node takes it. `cut_off`:
    unready only because its node is not heard of; it may well serve.
    """

    name: str
    index: int
    uid: str = ""
    revision: str = ""
    phase: Phase = "running"
    scheduled: bool = True
    unplaced: bool = False
    ready: bool = False
    ready_since: float = 0.0
    restarted: bool = False
    unproven: bool = False
    cut_off: bool = False


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be kept of a role's last update. `good`: the last revision that was complete before it.

    `updated`: available pods of `revision` when it last progressed.
    """

    revision: str
    good: str
    state: RolloutState
    started_at: float
    progressed_at: float
    updated: int = 0


class ObservedRole(msgspec.Struct, frozen=True, kw_only=True):
    """A role that has a workload object, or still has pods of one.

    `settled`: its controller has seen `target` (observedGeneration). `deleting`: the object is gone or going.
    `dependencies`: as last applied; they order the end of a role that is no longer desired.
    """

    name: str
    target: Target
    pods: tuple[PodState, ...] = ()
    kind: Kind = "StatefulSet"
    settled: bool = True
    deleting: bool = False
    dependencies: tuple[str, ...] = ()
    rollout: Rollout | None = None


class Failures(msgspec.Struct, frozen=True):
    """Failures in a row of one restart unit and when the last one was; `uid`: the pod that it was counted for.

    `pending`: a restart of the whole group that this failure asked for has not emptied the group yet.
    """

    count: int
    last_at: float
    uid: str = ""
    pending: bool = False


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """All there is of the group. `failures` by restart unit (`restart.unit`), as `RecordFailures` asked to keep."""

    roles: tuple[ObservedRole, ...] = ()
    failures: Mapping[str, Failures] = {}

    def role(self, name: str) -> ObservedRole | None:
        return next((role for role in self.roles if role.name == name), None)


# ---- to be done --------------------------------------------------------------------------------------------------


class ApplyRole(msgspec.Struct, frozen=True):
    """Create the role's workload object and all that belongs to it, or change it: in one write, to this target."""

    role: str
    target: Target


class DeleteRole(msgspec.Struct, frozen=True):
    """Delete the workload object, and what belongs to it; its pods end with it."""

    role: str


class DeletePod(msgspec.Struct, frozen=True):
    """Delete this very pod (precondition: its uid); its controller makes another."""

    role: str
    pod: str
    uid: str
    reason: str


class RecordRollout(msgspec.Struct, frozen=True):
    """Keep this as `ObservedRole.rollout`, before the actions that follow."""

    role: str
    rollout: Rollout


class RecordFailures(msgspec.Struct, frozen=True):
    """Keep this in `Observed.failures`, before the actions that follow; None: forget the unit."""

    unit: str
    failures: Failures | None


class Rollback(msgspec.Struct, frozen=True):
    """Return the whole group to the newest revision of its spec in which `role` had the revision `to`."""

    role: str
    to: str
    why: str


class Wait(msgspec.Struct, frozen=True):
    """Ask again at `until`, if nothing observed changes before."""

    until: float
    why: str


Action = ApplyRole | DeleteRole | DeletePod | RecordRollout | RecordFailures | Rollback | Wait


# ---- told --------------------------------------------------------------------------------------------------------


class Condition(msgspec.Struct, frozen=True):
    """`type`: Ready | Progressing | RollingUpdateInProgress | RestartInProgress. `message`: what a person can do."""

    type: str
    status: bool
    reason: str
    message: str


class RoleStatus(msgspec.Struct, frozen=True):
    name: str
    replicas: int
    ready: int
    updated: int


class GroupStatus(msgspec.Struct, frozen=True):
    observed_generation: int
    conditions: tuple[Condition, ...]
    roles: tuple[RoleStatus, ...]
