"""The pod template of a role's workload: the manifest's, with what every pod of a group gets. Pure.

labels       group, role, group-unique-key: Services select by them
environment  GROUP_NAME, ROLE_NAME, ROLE_INDEX before the manifest's own, so that `$(ROLE_INDEX)` is valid in those; one
             that is given twice once, as server-side apply demands, at its first place with its last value
/etc/rbg     the discovery file, in every container that mounts nothing there itself
sidecars     of the engine runtime profiles that the role names
affinity     for a group that wants a topology domain (a host, a rack) for itself
gang         the mark by which the scheduler knows the pods of one PodGroup
drain        a preStop hook, so that a pod leaves only when its requests have ended
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.group import names
from diptych.group.operator.resources import Json

CONFIG_VOLUME, CONFIG_PATH = "rbg-cluster-config", "/etc/rbg"
POD_INDEX_LABEL = "apps.kubernetes.io/pod-index"
EXCLUSIVE_TOPOLOGY = f"{names.PREFIX}/exclusive-topology"
DISABLE_EXCLUSIVE = f"{names.PREFIX}/disable-exclusive-topology"
KUBE_GANG, VOLCANO_GANG = "pod-group.scheduling.sigs.k8s.io/name", "scheduling.k8s.io/group-name"
DRAIN_S, DEFAULT_PORT = 300, 8000
UNIQUE_KEY = f"{names.PREFIX}/group-unique-key"


def pod_template(
    group: Json,
    role: Json,
    template: Json,
    profiles: Mapping[str, Json],
    *,
    indexed: bool,
    gang: str = "",
) -> Json:
    """`template` (the role's, resolved) with the additions above; arguments are not changed.

    `profiles`: spec of each ClusterEngineRuntimeProfile by name. `indexed`: pods have ordinals. `gang`:
    "scheduler-plugins", "volcano" or "" for none.
    """
    namespace, name = group["metadata"].get("namespace", "default"), group["metadata"]["name"]
    out = copy.deepcopy(template)
    metadata = out.setdefault("metadata", {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **names.role_labels(namespace, name, role["name"])}
    spec = out["spec"]
    _mount_config(spec, name)
    _add_runtimes(spec, role.get("engineRuntimes") or [], profiles)
    _set_environment(spec, name, role["name"], indexed)
    _add_drain(spec, role)
    _add_exclusive_topology(metadata, spec, group)
    if gang == "scheduler-plugins":
        metadata["labels"][KUBE_GANG] = name
    elif gang == "volcano":
        metadata.setdefault("annotations", {})[VOLCANO_GANG] = name
    return out


def in_gang(pod: Json, gang: str) -> bool:
    """Whether the pod has the mark of this scheduler."""
    if gang == "scheduler-plugins":
        return KUBE_GANG in (pod["metadata"].get("labels") or {})
    return VOLCANO_GANG in (pod["metadata"].get("annotations") or {})


def _mount_config(spec: Json, config_map: str) -> None:
    mount = {"name": CONFIG_VOLUME, "mountPath": CONFIG_PATH, "readOnly": True}
    for container in spec["containers"]:
        mounts = container.get("volumeMounts") or []
        if all(each["mountPath"] != CONFIG_PATH for each in mounts):
            container["volumeMounts"] = [*mounts, dict(mount)]
    volume = {"name": CONFIG_VOLUME, "configMap": {"name": config_map}}
    spec["volumes"] = _union(spec.get("volumes") or [], [volume])


def _add_runtimes(spec: Json, runtimes: Sequence[Json], profiles: Mapping[str, Json]) -> None:
    """Sidecars, init containers and volumes of each profile; the role may add arguments and variables to sidecars."""
    for runtime in runtimes:
        profile = copy.deepcopy(profiles[runtime["profileName"]])
        changes = {each["name"]: each for each in runtime.get("containers") or []}
        for container in profile.get("containers") or []:
            change = changes.get(container["name"], {})
            for field in ("env", "args"):
                if change.get(field):
                    container[field] = [*(container.get(field) or []), *change[field]]
        for field in ("initContainers", "containers", "volumes"):
            if profile.get(field):
                spec[field] = _union(spec.get(field) or [], profile[field])


def _union(own: Sequence[Json], more: Sequence[Json]) -> list[Json]:
    """`own`, and those of `more` whose name is not taken."""
    taken = {each["name"] for each in own}
    return [*own, *(each for each in more if each["name"] not in taken)]


def _set_environment(spec: Json, group: str, role: str, indexed: bool) -> None:
    variables: list[Json] = [{"name": "GROUP_NAME", "value": group}, {"name": "ROLE_NAME", "value": role}]
    if indexed:
        source = {"fieldRef": {"fieldPath": f"metadata.labels['{POD_INDEX_LABEL}']"}}
        variables.append({"name": "ROLE_INDEX", "valueFrom": source})
    own = {each["name"] for each in variables}
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        rest = {each["name"]: each for each in container.get("env") or [] if each["name"] not in own}
        container["env"] = [*copy.deepcopy(variables), *rest.values()]


def _add_drain(spec: Json, role: Json) -> None:
    """The first container is asked to drain and waited for; the pod has that long before it is killed."""
    drain = role.get("drain")
    if not drain:
        return
    seconds = int(drain.get("timeoutSeconds") or DRAIN_S)
    container = spec["containers"][0]
    port = drain.get("port") or DEFAULT_PORT
    container.setdefault("lifecycle", {}).setdefault("preStop", {"httpGet": {"path": drain["path"], "port": port}})
    spec["terminationGracePeriodSeconds"] = max(int(spec.get("terminationGracePeriodSeconds") or 30), seconds)


def _add_exclusive_topology(metadata: Json, spec: Json, group: Json) -> None:
    """Pods of this group attract one another within a domain, and repel those of other groups."""
    topology = (group["metadata"].get("annotations") or {}).get(EXCLUSIVE_TOPOLOGY)
    if not topology or (metadata.get("annotations") or {}).get(DISABLE_EXCLUSIVE):
        return
    metadata.setdefault("annotations", {})[EXCLUSIVE_TOPOLOGY] = topology
    key = metadata["labels"][UNIQUE_KEY]
    ours = {"key": UNIQUE_KEY, "operator": "In", "values": [key]}
    others = [{"key": UNIQUE_KEY, "operator": "Exists"}, {"key": UNIQUE_KEY, "operator": "NotIn", "values": [key]}]
    affinity = spec.setdefault("affinity", {})
    _require(affinity, "podAffinity", topology, [ours])
    _require(affinity, "podAntiAffinity", topology, others)


def _require(affinity: Json, kind: str, topology: str, expressions: list[Any]) -> None:
    """Add a term, unless the manifest has one of its own for this key and topology."""
    terms = affinity.setdefault(kind, {}).setdefault("requiredDuringSchedulingIgnoredDuringExecution", [])
    if not any(_is_exclusive(term, topology) for term in terms):
        terms.append({"topologyKey": topology, "labelSelector": {"matchExpressions": expressions}})


def _is_exclusive(term: Json, topology: str) -> bool:
    expressions = (term.get("labelSelector") or {}).get("matchExpressions") or []
    return term.get("topologyKey") == topology and any(each.get("key") == UNIQUE_KEY for each in expressions)
