"""A group's status, as the API has it, and when it is written: at once when Ready turns, else after two seconds, so
that pods that become ready one after the other are one write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from diptych.errors import DiptychError
from diptych.group import actions
from diptych.group.operator.api import ApiError
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.resources import GROUP, Json, key_of

TEMPLATE = "rolebasedgroupset.workloads.x-k8s.io/template-hash"  # annotation of a set's groups
DELAY_S = 2.0
MAX_MESSAGE = 4096  # characters of what was refused, and why; the API takes 32768


class Reporter:
    """Writes statuses. Remembers since when one differs from what is written."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._since: dict[tuple[str, str], float] = {}

    def write(self, group: Json, status: actions.GroupStatus, now: float) -> float | None:
        """Report `status`. Returns the seconds until a change that is held back should be written."""
        old = group.get("status") or {}
        new = as_json(status, old, now) | _of_template(group)
        key = key_of(group)
        if all(old.get(field) == value for field, value in new.items()):
            self.forget(*key)
            return None
        with self._lock:
            waited_s = now - self._since.setdefault(key, now)
        if waited_s < DELAY_S and not _turns(old, new):
            return DELAY_S - waited_s
        self._cluster.apply_status(GROUP, group, new)
        self.forget(*key)
        return None

    def forget(self, namespace: str, name: str) -> None:
        """Nothing is to be written about this group."""
        with self._lock:
            self._since.pop((namespace, name), None)

    def refuse(self, group: Json, message: str, now: float) -> None:
        """Report a spec that cannot be carried out."""
        conditions = (
            actions.Condition("Ready", False, "InvalidSpec", message[:MAX_MESSAGE]),
            actions.Condition("Progressing", False, "InvalidSpec", "waiting for a spec that can be carried out"),
        )
        old = group.get("status") or {}
        status = actions.GroupStatus(group["metadata"]["generation"], conditions, ())
        new = as_json(status, old, now) | _of_template(group) | {"roleStatuses": old.get("roleStatuses") or []}
        self._cluster.apply_status(GROUP, group, new)


@contextmanager
def adding_to(error: ApiError) -> Iterator[None]:
    """Where `error` is reported: what goes wrong with that does not hide it. Raises ApiError that says both."""
    try:
        yield
    except DiptychError as second:
        raise ApiError(f"{error.message}; and the status cannot say so: {second.message}") from second


def as_json(status: actions.GroupStatus, old: Json, now: float) -> Json:
    """As the API has it. A condition keeps the time of its last turn."""
    before = {each["type"]: each for each in old.get("conditions") or []}
    conditions = []
    for each in status.conditions:
        state = "True" if each.status else "False"
        last = before.get(each.type, {})
        since = last["lastTransitionTime"] if last.get("status") == state else timestamp(now)
        conditions.append(
            {
                "type": each.type,
                "status": state,
                "reason": each.reason,
                "message": each.message,
                "lastTransitionTime": since,
                "observedGeneration": status.observed_generation,
            }
        )
    roles = [
        {"name": each.name, "replicas": each.replicas, "readyReplicas": each.ready, "updatedReplicas": each.updated}
        for each in status.roles
    ]
    return {"observedGeneration": status.observed_generation, "conditions": conditions, "roleStatuses": roles}


def _of_template(group: Json) -> Json:
    """Which template of its set the status is about: what a set gives its groups is not all in their specs, and
    annotations make no new generation."""
    template = (group["metadata"].get("annotations") or {}).get(TEMPLATE)
    return {"observedTemplate": template} if template else {}


def _turns(old: Json, new: Json) -> bool:
    """Whether Ready becomes something else, or is said for the first time to be true."""
    was, now = (
        next((each["status"] for each in status.get("conditions") or [] if each["type"] == "Ready"), "")
        for status in (old, new)
    )
    return was != now and not (was == "" and now == "False")


def timestamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
