"""PodDisruptionBudgets: their status, and evictions that they refuse."""

from __future__ import annotations

from collections.abc import Iterable

from diptych.testing.kube.api import Api
from diptych.testing.kube.controllers import Key
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.owned import is_healthy, whole, write_status
from diptych.testing.kube.selectors import matches
from diptych.testing.kube.status import ApiError, Obj
from diptych.testing.kube.store import Change, key_of

BUDGETS, PODS = ("policy", "poddisruptionbudgets"), ("", "pods")
_SCALABLE = {"StatefulSet": "statefulsets", "ReplicaSet": "replicasets"}


class Disruptions:
    def __init__(self, api: Api) -> None:
        self._api = api

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == BUDGETS:
            yield change.key
        elif change.resource == PODS or (change.resource[0] == "apps" and change.resource[1] in _SCALABLE.values()):
            yield from (key_of(budget) for budget in self._api.store.all(BUDGETS, change.key[0]))

    def sync(self, key: Key) -> None:
        budget = self._api.store.get(BUDGETS, *key)
        if budget is None:
            return
        pods = _pods(self._api, budget)
        expected = self._expected(pods)
        healthy = sum(is_healthy(pod) for pod in pods)
        spec = budget.get("spec", {})
        if "maxUnavailable" in spec:
            desired = max(0, expected - whole(spec["maxUnavailable"], expected, up=True))
        else:
            desired = whole(spec.get("minAvailable", 1), expected, up=True)
        status = {
            "currentHealthy": healthy,
            "desiredHealthy": desired,
            "expectedPods": expected,
            "disruptionsAllowed": max(0, healthy - desired) if expected else 0,
            "observedGeneration": budget["metadata"]["generation"],
        }
        write_status(self._api, budget, status)

    def _expected(self, pods: list[Obj]) -> int:
        """Replicas of the workloads that the pods belong to."""
        found: dict[str, int] = {}
        for pod in pods:
            owner = next((one for one in pod["metadata"].get("ownerReferences", []) if one.get("controller")), None)
            obj = self._api.store.by_uid(owner["uid"]) if owner else None
            found[owner["uid"] if owner else pod["metadata"]["uid"]] = (obj or {}).get("spec", {}).get("replicas", 1)
        return sum(found.values())


def _pods(api: Api, budget: Obj) -> list[Obj]:
    selector = budget.get("spec", {}).get("selector")
    if selector is None:
        return []
    pods = api.store.all(PODS, budget["metadata"]["namespace"])
    return [pod for pod in pods if matches(selector, pod["metadata"].get("labels", {}))]


def evict(api: Api, namespace: str, name: str, options: Deleting) -> None:
    """Deletes a pod unless a budget forbids it. Raises 429, 404."""
    pod = api.get("Pod", namespace, name)
    for budget in api.store.all(BUDGETS, namespace):
        selector = budget.get("spec", {}).get("selector")
        if selector is None or not matches(selector, pod["metadata"].get("labels", {})) or not is_healthy(pod):
            continue
        if budget.get("status", {}).get("disruptionsAllowed", 0) < 1:
            message = "Cannot evict pod as it would violate the pod's disruption budget."
            causes = [{"reason": "DisruptionBudget", "message": f"The budget {budget['metadata']['name']} is used up"}]
            raise ApiError(429, "TooManyRequests", message, details={"causes": causes}, headers={"Retry-After": "10"})
    api.delete("Pod", namespace, name, options)
