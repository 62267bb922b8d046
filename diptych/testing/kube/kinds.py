"""Which kinds are served, and where: a table of built-in kinds, and those that CRDs add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diptych.testing.kube.status import Obj, no_such_path


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind at one version. `schema` is the structural schema of a CRD's version (None: built in).

    `generation`: whether metadata.generation counts changes of the spec. `scale` maps specReplicasPath,
    statusReplicasPath and labelSelectorPath of the scale subresource.
    """

    group: str
    version: str
    name: str
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    status: bool = False
    generation: bool = False
    scale: dict[str, str] | None = None
    schema: Obj | None = field(default=None, repr=False)

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def custom(self) -> bool:
        return self.schema is not None

    @property
    def conditional(self) -> bool:
        """Whether an update must name the resource version it is based on."""
        return self.custom or self.key in _CONDITIONAL

    @property
    def shown_deleted(self) -> bool:
        """Whether the answer to a deletion is the object, even if it is gone."""
        return self.key in _SHOWN_DELETED

    @property
    def fields(self) -> tuple[str, ...]:
        """What a field selector may name."""
        return "metadata.name", "metadata.namespace", *_SELECTABLE.get(self.key, ())

    @property
    def key(self) -> tuple[str, str]:
        """Where its objects are stored: all versions of a kind share them."""
        return self.group, self.plural

    def resource(self) -> Obj:
        """Its entry in the discovery document."""
        verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
        entry: Obj = {
            "name": self.plural,
            "singularName": self.name.lower(),
            "namespaced": self.namespaced,
            "kind": self.name,
            "verbs": verbs,
        }
        return {**entry, "shortNames": list(self.short)} if self.short else entry

    def subresources(self) -> Iterator[Obj]:
        verbs = ["get", "patch", "update"]
        if self.status:
            yield {
                "name": f"{self.plural}/status",
                "singularName": "",
                "namespaced": self.namespaced,
                "kind": self.name,
                "verbs": verbs,
            }
        if self.scale:
            yield {
                "name": f"{self.plural}/scale",
                "singularName": "",
                "namespaced": self.namespaced,
                "group": "autoscaling",
                "version": "v1",
                "kind": "Scale",
                "verbs": verbs,
            }


_CONDITIONAL = (("coordination.k8s.io", "leases"), ("policy", "poddisruptionbudgets"))
_SHOWN_DELETED = (("", "pods"), ("", "services"), ("", "serviceaccounts"), ("", "persistentvolumeclaims"))
_SELECTABLE = {
    ("", "pods"): ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "status.phase", "status.podIP"),
    ("", "events"): ("involvedObject.kind", "involvedObject.name", "involvedObject.uid", "reason", "type"),
    ("", "namespaces"): ("status.phase",),
    ("", "services"): ("spec.clusterIP", "spec.type"),
    ("apps", "replicasets"): ("status.replicas",),
}
_SCALE = {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"}
_HPA_SCALE = {**_SCALE, "labelSelectorPath": ".status.hpaPodSelector"}


def _kind(api_version: str, name: str, plural: str, **options: Any) -> Kind:
    group, _, version = api_version.rpartition("/")
    return Kind(group, version, name, plural, **options)


BUILT_IN = (
    _kind("v1", "Namespace", "namespaces", namespaced=False, short=("ns",), status=True),
    _kind("v1", "Pod", "pods", short=("po",), status=True, generation=True),
    _kind("v1", "Service", "services", short=("svc",), status=True),
    _kind("v1", "ConfigMap", "configmaps", short=("cm",)),
    _kind("v1", "Event", "events", short=("ev",)),
    _kind("v1", "Secret", "secrets"),
    _kind("v1", "ServiceAccount", "serviceaccounts", short=("sa",)),
    _kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims", short=("pvc",), status=True),
    _kind("apps/v1", "StatefulSet", "statefulsets", short=("sts",), status=True, generation=True, scale=_SCALE),
    _kind("apps/v1", "Deployment", "deployments", short=("deploy",), status=True, generation=True, scale=_SCALE),
    _kind("apps/v1", "ReplicaSet", "replicasets", short=("rs",), status=True, generation=True, scale=_SCALE),
    _kind("apps/v1", "ControllerRevision", "controllerrevisions"),
    _kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", short=("pdb",), status=True, generation=True),
    _kind("coordination.k8s.io/v1", "Lease", "leases"),
    _kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", short=("hpa",), status=True),
    _kind("events.k8s.io/v1", "Event", "events", short=("ev",)),
    _kind("scheduling.x-k8s.io/v1alpha1", "PodGroup", "podgroups", status=True, generation=True),
    _kind("scheduling.volcano.sh/v1beta1", "PodGroup", "podgroups", status=True, generation=True),
    _kind(
        "leaderworkerset.x-k8s.io/v1",
        "LeaderWorkerSet",
        "leaderworkersets",
        short=("lws",),
        status=True,
        generation=True,
        scale=_HPA_SCALE,
    ),
    _kind(
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        namespaced=False,
        short=("crd", "crds"),
        status=True,
        generation=True,
    ),
)


class Kinds:
    """All kinds served now. `without` names groups that are not installed (their paths answer 404)."""

    def __init__(self, without: frozenset[str] = frozenset()) -> None:
        self._by_path: dict[tuple[str, str, str], Kind] = {}
        for kind in BUILT_IN:
            if kind.group not in without:
                self.add(kind)

    def add(self, kind: Kind) -> None:
        self._by_path[kind.group, kind.version, kind.plural] = kind

    def remove(self, kind: Kind) -> None:
        self._by_path.pop((kind.group, kind.version, kind.plural), None)

    def __iter__(self) -> Iterator[Kind]:
        return iter(list(self._by_path.values()))

    def at(self, group: str, version: str, plural: str) -> Kind:
        """The kind of a path. Raises 404."""
        kind = self._by_path.get((group, version, plural))
        if kind is None:
            raise no_such_path()
        return kind

    def find(self, name: str | Kind) -> Kind:
        """By `Kind`, or `group/version/Kind` (`v1/Pod`) where the bare name is shared by several. Raises KeyError."""
        if isinstance(name, Kind):
            return name
        api_version, _, bare = name.rpartition("/")
        for kind in self._by_path.values():
            if kind.name == bare and api_version in ("", kind.api_version):
                return kind
        raise KeyError(f"no kind {name} is served")

    def groups(self) -> dict[str, list[str]]:
        """Group name → its versions, without the core group."""
        found: dict[str, list[str]] = {}
        for kind in self._by_path.values():
            versions = found.setdefault(kind.group, [])
            if kind.version not in versions:
                versions.append(kind.version)
        found.pop("", None)
        return found

    def of(self, group: str, version: str) -> list[Kind]:
        """The kinds of one group and version. Raises 404 when there is none."""
        found = [kind for kind in self._by_path.values() if (kind.group, kind.version) == (group, version)]
        if not found:
            raise no_such_path()
        return found
