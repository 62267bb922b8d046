"""Cluster DNS and Service selection, computed from the objects: which pods a name means."""

from __future__ import annotations

from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Store

DOMAIN = "cluster.local"
_SERVICES, _PODS = ("", "services"), ("", "pods")


def is_ready(pod: Obj) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _candidates(store: Store, service: Obj) -> list[Obj]:
    selector = service["spec"].get("selector")
    if not selector:
        return []
    wanted = selector.items()
    pods = store.all(_PODS, service["metadata"]["namespace"])
    found = [pod for pod in pods if wanted <= pod["metadata"].get("labels", {}).items()]
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


def selected(store: Store, service: Obj) -> list[str]:
    """Names of the pods whose labels the Service's selector matches, ready or not."""
    return [pod["metadata"]["name"] for pod in _candidates(store, service)]


def _endpoints(store: Store, service: Obj) -> list[Obj]:
    """Pods behind the name: with an address, alive, and ready unless the Service publishes those that are not."""
    unready = service["spec"].get("publishNotReadyAddresses", False)
    pods = [pod for pod in _candidates(store, service) if pod.get("status", {}).get("podIP")]
    alive = [pod for pod in pods if pod["status"].get("phase") not in ("Succeeded", "Failed")]
    return [pod for pod in alive if unready or (is_ready(pod) and "deletionTimestamp" not in pod["metadata"])]


def resolve(store: Store, name: str, namespace: str) -> list[str]:
    """Names of the pods that `name` leads to from within `namespace`, sorted; empty when it does not resolve.

    Forms: service, pod.service, each with .namespace, .svc and the cluster domain after it. For a Service with a
    cluster IP these are the pods that a connection may reach; only headless ones have names of single pods.
    """
    parts = name.removesuffix(".").removesuffix(f".{DOMAIN}").removesuffix(".svc").split(".")
    for place, rest in ((namespace, parts), (parts[-1], parts[:-1])):
        if not 1 <= len(rest) <= 2:
            continue
        service = store.get(_SERVICES, place, rest[-1])
        if service is None:
            continue
        pods = _endpoints(store, service)
        if len(rest) == 2:
            headless = service["spec"].get("clusterIP") == "None"
            pods = [pod for pod in pods if headless and _host(pod) == (rest[0], rest[1])]
        if pods:
            return [pod["metadata"]["name"] for pod in pods]
    return []


def _host(pod: Obj) -> tuple[str, str]:
    return pod["spec"].get("hostname", ""), pod["spec"].get("subdomain", "")
