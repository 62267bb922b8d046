"""Makes the cluster as a RoleBasedGroup wants it: observe, plan, carry out, report.

Nothing is kept between two calls but what lies in the cluster, so a new operator goes on where an old one ended, and
looking twice writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from diptych.errors import ConfigError, NotFound
from diptych.group.actions import (
    Action,
    ApplyRole,
    DeletePod,
    DeleteRole,
    Failures,
    RecordFailures,
    RecordRollout,
    Rollback,
    Rollout,
    Target,
    Wait,
)
from diptych.group.conditions import GROUP_RESTART, group_restart, group_status, not_carried_out
from diptych.group.operator import objects
from diptych.group.operator.api import ApiError
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.discovery import config_yaml
from diptych.group.operator.history import History
from diptych.group.operator.observe import FAILURES, ROLLOUT, failures_text
from diptych.group.operator.report import MAX_MESSAGE, Reporter, adding_to
from diptych.group.operator.resources import (
    ADAPTER,
    CONFIG_MAP,
    DISRUPTION_BUDGET,
    GROUP,
    POD,
    POD_GROUP,
    SERVICE,
    VOLCANO_POD_GROUP,
    Json,
)
from diptych.group.operator.resources import Kind as Resource
from diptych.group.operator.view import WORKLOADS, View, workload_kind
from diptych.group.plan import plan
from diptych.group.validate import object_problems

FINALIZER = "workloads.x-k8s.io/ordered-shutdown"


class GroupReconciler:
    """See Reconciler. `clock` gives Unix time."""

    def __init__(self, cluster: Cluster, clock: Callable[[], float]) -> None:
        self._cluster, self._clock = cluster, clock
        self._reporter = Reporter(cluster)

    def reconcile(self, namespace: str, name: str) -> float | None:
        group = self._cluster.get(GROUP, namespace, name)
        if group is None or group["metadata"].get("deletionTimestamp"):
            self._reporter.forget(namespace, name)
        if group is None:
            return None
        try:
            view = self._look(group)
        except ConfigError as error:
            self._refuse(group, error.message)
            return None
        now = self._clock()
        status = group_status(view.desired, view.observed, group["metadata"]["generation"], now)
        with self._cluster.events.of_refusals(group):
            try:
                waits = [_Pass(self._cluster, view, now).carry_out(plan(view.desired, view.observed, now))]
            except ApiError as error:
                if not view.deleted:
                    with adding_to(error):
                        self._reporter.write(group, not_carried_out(status, error.message[:MAX_MESSAGE]), now)
                raise
            if not view.deleted:
                waits.append(self._reporter.write(group, status, now))
        return min((wait_s for wait_s in waits if wait_s is not None), default=None)

    def _look(self, group: Json) -> View:
        """Raises ConfigError with everything that is wrong with the spec."""
        problems = [] if group["metadata"].get("deletionTimestamp") else object_problems(group)
        if problems:
            raise ConfigError("\n".join(map(str, problems)))
        return View(self._cluster, group)

    def _refuse(self, group: Json, message: str) -> None:
        """The spec cannot be carried out: say so, and leave what runs as it is."""
        self._cluster.events.tell(group, "Warning", "InvalidSpec", message)
        self._reporter.refuse(group, message, self._clock())


class _Pass:
    """Carries out what the plan asked for in one look."""

    def __init__(self, cluster: Cluster, view: View, now: float) -> None:
        self._cluster, self._view, self._now = cluster, view, now
        self._group = view.group
        metadata = self._group["metadata"]
        self._namespace, self._name = metadata["namespace"], metadata["name"]
        self._rollouts: dict[str, Rollout] = {}
        self._failures: dict[str, Failures] = dict(view.observed.failures)
        self._targets: dict[str, Target] = {}
        self._wait_until: list[float] = []

    def carry_out(self, actions: list[Action]) -> float | None:
        """Returns the seconds until the plan wants to be asked again, if nothing happens before."""
        for action in actions:
            if isinstance(action, ApplyRole):
                self._targets[action.role] = action.target
            elif isinstance(action, RecordRollout):
                self._rollouts[action.role] = action.rollout
        self._record_failures(actions)
        if self._view.deleted:
            self._shut_down(actions)
            return self._again()
        if self._rolls_back(actions):
            return None  # the group has changed
        self._keep_finalizer()
        History(self._cluster, self._group).keep(self._view.revisions)
        self._apply_shared()
        for kind, workload in self._view.doubles:
            self._cluster.delete(WORKLOADS[kind], workload, foreground=True)
        for role in self._view.desired.roles:
            self._apply_role(role.name)
        for action in actions:
            self._act(action)
        self._remove_what_is_not_wanted()
        return self._again()

    def _again(self) -> float | None:
        return max(0.0, min(self._wait_until) - self._now) if self._wait_until else None

    # ---- what is kept ----

    def _record_failures(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, RecordFailures):
                if action.failures is None:
                    self._failures.pop(action.unit, None)
                else:
                    self._tell_of_restart(action)
                    self._failures[action.unit] = action.failures
        text = failures_text(self._failures)
        if text != (self._group["metadata"].get("annotations") or {}).get(FAILURES):
            self._annotate_group({FAILURES: text})

    def _tell_of_restart(self, action: RecordFailures) -> None:
        """An event, if the whole group is to be made anew. Before that is recorded: afterwards it is no news."""
        before, record = self._failures.get(action.unit), action.failures
        if record is None or not record.pending or (before is not None and before.pending):
            return
        pods = [pod.name for role in self._view.observed.roles for pod in role.pods if pod.uid == record.uid]
        message = f"pod {', '.join(pods)} failed; {group_restart(self._view.desired, record)}"
        self._cluster.events.tell(self._group, "Warning", GROUP_RESTART, message)

    def _annotate_group(self, annotations: dict[str, str | None]) -> None:
        self._cluster.merge(GROUP, self._namespace, self._name, {"metadata": {"annotations": annotations}})

    # ---- the group's own objects ----

    def _apply_shared(self) -> None:
        replicas = {role.name: role.replicas for role in self._view.desired.roles}
        text = config_yaml(self._name, self._view.spec["roles"], replicas, self._view.services())
        for name in self._config_maps():
            self._cluster.apply(CONFIG_MAP, objects.config_map(self._group, name, text))
        for name in objects.scaled(self._group):
            self._cluster.apply(ADAPTER, objects.adapter(self._group, name))
        gang = self._view.pod_group()
        for kind in (POD_GROUP, VOLCANO_POD_GROUP):
            if gang is not None and gang[0] == kind:
                self._cluster.apply(kind, gang[1])
            else:
                for old in self._cluster.owned(kind, self._group["metadata"]["uid"]):
                    self._cluster.delete(kind, old)

    def _config_maps(self) -> list[str]:
        """The group's discovery file, and those of roles that the upstream controller has made: pods may mount them."""
        there = {each["metadata"]["name"] for each in self._cluster.owned(CONFIG_MAP, self._group["metadata"]["uid"])}
        return [self._name, *sorted(there & self._names(self._view.roles))]

    # ---- roles ----

    def _apply_role(self, name: str) -> None:
        """The role's objects as they should be; nothing for a role that is not to be created yet."""
        there = self._view.workloads.get(name)
        target = self._targets.get(name)
        if there is None and (target is None or self._has_double(name)):
            return
        role = self._view.roles[name]
        if workload_kind(role) == "StatefulSet":
            self._cluster.apply(SERVICE, objects.headless_service(self._group, role))
        if there is not None and "deletionTimestamp" not in there[1]["metadata"]:
            self._apply_workload(name, target or self._observed_target(name), there[1])
        elif there is None and target is not None:
            self._create_workload(name, target)
        budget = objects.disruption_budget(self._group, role)
        if budget is not None:
            self._cluster.apply(DISRUPTION_BUDGET, budget)

    def _has_double(self, name: str) -> bool:
        """Whether the role's workload of another kind is still there; what that one made may have our names."""
        return any(objects.object_name(self._group, name) == each["metadata"]["name"] for _, each in self._view.doubles)

    def _observed_target(self, name: str) -> Target:
        seen = self._view.observed.role(name)
        assert seen is not None
        return seen.target

    def _create_workload(self, name: str, target: Target) -> None:
        resource, made = self._view.workload(name, target, self._rollout_annotation(name))
        self._cluster.apply(resource, made)
        self._cluster.events.tell(self._group, "Normal", "RoleCreated", f"role {name}: {target.replicas} replicas")

    def _apply_workload(self, name: str, target: Target, live: Json) -> None:
        """All of it while it has the wanted revision; else only what does not concern the template."""
        annotations = self._rollout_annotation(name)
        if name in self._view.adopted:
            annotations |= self._view.marks(name, target.revision)
        if target.revision == self._view.revisions[name] and not self._view.keeps_template(name):
            resource, made = self._view.workload(name, target, annotations)
            if objects.has_rolling_update(live) and target.on_delete:
                # An apply takes away only what is ours; a partition that came by patch, or a default, would stay.
                self._cluster.merge(resource, self._namespace, live["metadata"]["name"], objects.ON_DELETE)
            self._cluster.apply(resource, made)
        elif name in self._targets or name in self._rollouts or name in self._view.adopted:
            kind = self._view.workloads[name][0]
            patch = objects.retarget(kind, target, annotations)
            self._cluster.merge(WORKLOADS[kind], self._namespace, live["metadata"]["name"], patch)

    def _rollout_annotation(self, name: str) -> dict[str, str]:
        seen = self._view.observed.role(name)
        rollout = self._rollouts.get(name) or (seen.rollout if seen else None)
        return {ROLLOUT: msgspec.json.encode(rollout).decode()} if rollout else {}

    # ---- single actions ----

    def _act(self, action: Action) -> None:
        if isinstance(action, DeletePod):
            pod = {"metadata": {"namespace": self._namespace, "name": action.pod, "uid": action.uid}}
            if self._cluster.delete(POD, pod):
                message = f"pod {action.pod} is deleted: {action.reason}"
                self._cluster.events.tell(self._group, "Normal", "PodDeleted", message)
        elif isinstance(action, DeleteRole):
            self._delete_role(action.role)
        elif isinstance(action, Wait):
            self._wait_until.append(action.until)

    def _delete_role(self, name: str) -> None:
        """The workload stays until its pods are gone: it says on which roles they depend."""
        found = self._view.workloads.get(name)
        if found is not None:
            self._cluster.delete(WORKLOADS[found[0]], found[1], foreground=True)

    def _remove_what_is_not_wanted(self) -> None:
        """Objects of roles that are gone, and of features that were switched off."""
        wanted = self._wanted_names()
        for resource in (SERVICE, DISRUPTION_BUDGET, ADAPTER, CONFIG_MAP):
            for each in self._cluster.owned(resource, self._group["metadata"]["uid"]):
                if each["metadata"]["name"] not in wanted[resource]:
                    self._cluster.delete(resource, each)

    def _wanted_names(self) -> dict[Resource, set[str]]:
        """Names of the objects that stay; a Service stays while a StatefulSet's pods may still need it."""
        served = {name for name, role in self._view.roles.items() if workload_kind(role) == "StatefulSet"}
        served |= {role.name for role in self._view.observed.roles if role.kind == "StatefulSet"}
        budgets = [role["name"] for role in self._view.roles.values() if role.get("podDisruptionBudget")]
        return {
            SERVICE: self._names(served),
            DISRUPTION_BUDGET: self._names(budgets),
            ADAPTER: self._names(objects.scaled(self._group)),
            CONFIG_MAP: set(self._config_maps()),
        }

    def _names(self, roles: Iterable[str]) -> set[str]:
        return {objects.object_name(self._group, role) for role in roles}

    # ---- the end ----

    def _keep_finalizer(self) -> None:
        """A group whose roles depend on one another ends in order; that needs us when it is deleted."""
        ordered = any(role.dependencies for role in self._view.desired.roles)
        have = self._group["metadata"].get("finalizers") or []
        if ordered and FINALIZER not in have:
            self._set_finalizers([*have, FINALIZER])
        elif not ordered and FINALIZER in have:
            self._set_finalizers([each for each in have if each != FINALIZER])

    def _set_finalizers(self, finalizers: list[str]) -> None:
        metadata = {"resourceVersion": self._group["metadata"]["resourceVersion"], "finalizers": finalizers}
        try:
            self._cluster.merge(GROUP, self._namespace, self._name, {"metadata": metadata})
        except NotFound:
            return  # it was the last one, and the group is gone

    def _shut_down(self, actions: list[Action]) -> None:
        have = self._group["metadata"].get("finalizers") or []
        if FINALIZER not in have:
            return  # the cluster's garbage collection does all
        orphans = "orphan" in have  # those who delete the group want to keep the rest
        for action in [] if orphans else actions:
            self._act(action)
        if orphans or not self._view.observed.roles:
            self._set_finalizers([each for each in have if each != FINALIZER])

    def _rolls_back(self, actions: list[Action]) -> bool:
        """Whether the group's spec was set back to an earlier revision."""
        action = next((each for each in actions if isinstance(each, Rollback)), None)
        if action is None:
            return False
        restored = History(self._cluster, self._group).undo_to(action.role, action.to)
        why = action.why if restored else f"{action.why}, and no earlier revision of the spec has its old template"
        reason = "RolledBack" if restored else "RollbackFailed"
        self._cluster.events.tell(self._group, "Warning", reason, why)
        return restored
