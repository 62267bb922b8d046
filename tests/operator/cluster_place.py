"""A namespace with an operator: on our API server or, with DIPTYCH_TEST_CLUSTER=1, on the cluster of the kubeconfig.

There the namespace is made for the test and deleted afterwards, and the operator is the ServiceAccount of
deploy/operator with the Role of deploy/operator, so that a permission it lacks fails the test. The definitions must be
installed (`diptych crds | kubectl apply --server-side -f -`), and no other operator may watch the namespace.

What a test does to pods, any cluster lets it do: readiness is held back by a readiness gate, a failure is written into
a pod's status. So nothing here depends on who runs the pods.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from driver import is_pod_ready
from kube_world import World
from kubernetes.client import ApiClient, Configuration, CoreV1Api
from kubernetes.client.exceptions import ApiException

from diptych.errors import DiptychError, NotFound
from diptych.group.operator.api import Api, Conflict
from diptych.group.operator.main import Operator, connect
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.observe import unix_time
from diptych.group.operator.report import timestamp
from diptych.group.operator.resources import GROUP, POD, Json, Kind
from diptych.testing.kube import Behaviour

REAL = os.environ.get("DIPTYCH_TEST_CLUSTER") == "1"
IMAGE = os.environ.get("DIPTYCH_TEST_IMAGE", "registry.k8s.io/pause:3.9")
SECOND_IMAGE = os.environ.get("DIPTYCH_TEST_IMAGE_2", "registry.k8s.io/pause:3.10")
DEADLINE_S = 300.0 if REAL else 30.0
DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
ACCOUNT = "diptych-operator"
NAMESPACES = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
ACCOUNTS = Kind("", "v1", "ServiceAccount", "serviceaccounts")
ROLES = Kind("rbac.authorization.k8s.io", "v1", "Role", "roles")
BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings")
GROUP_LABEL = "rolebasedgroup.workloads.x-k8s.io/name"
ROLE_LABEL = "rolebasedgroup.workloads.x-k8s.io/role"
GATE = "diptych.test/open"


class Place:
    """`admin` makes a configuration that may do anything, `operator` the operator's."""

    def __init__(self, admin: Callable[[], Configuration], operator: Callable[[], Configuration], name: str) -> None:
        self.namespace = name
        self.api = Api(admin(), Metrics())
        self._admin, self._operator = admin, operator
        self._running: list[tuple[Operator, threading.Thread]] = []

    def start(self, identity: str = "contract", *, elect: bool = False) -> Operator:
        made = Operator(self._operator(), self.namespace, self.namespace, identity=identity, elect=elect)
        thread = threading.Thread(target=made.run)
        thread.start()
        self._running.append((made, thread))
        return made

    def stop(self, operator: Operator) -> None:
        operator.stop()
        for each, thread in self._running:
            if each is operator:
                thread.join(60)
                assert not thread.is_alive()

    def stop_all(self) -> None:
        for operator, _ in self._running:
            self.stop(operator)

    def close(self) -> None:
        """Whatever the test did, the operator was never forbidden to write."""
        self.stop_all()
        self.api.close()
        refused = {
            (sample.labels["method"], sample.labels["code"]): sample.value
            for operator, _ in self._running
            for metric in operator.metrics.api_requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["code"] == "403" and sample.labels["method"] != "GET"
        }
        assert not refused

    @contextmanager
    def core(self) -> Iterator[CoreV1Api]:
        """The official client."""
        with ApiClient(self._admin()) as client:
            yield CoreV1Api(client)

    # ---- objects ----

    def create(self, name: str, *roles: Json, **spec: Any) -> None:
        self.make(GROUP, name, {"roles": list(roles), **spec})

    def make(self, kind: Kind, name: str, spec: Json) -> Json:
        return self.api.create(kind, {"metadata": {"namespace": self.namespace, "name": name}, "spec": spec})

    def read(self, kind: Kind, name: str) -> Json:
        """Raises NotFound."""
        return self.api.get(kind, self.namespace, name)

    def exists(self, kind: Kind, name: str) -> bool:
        try:
            self.read(kind, name)
        except NotFound:
            return False
        return True

    def edit(self, name: str, change: Callable[[Json], Any], kind: Kind = GROUP) -> None:
        while True:
            obj = self.read(kind, name)
            change(obj)
            try:
                self.api.replace(kind, obj)
                return
            except Conflict:
                continue

    def delete(self, kind: Kind, name: str) -> None:
        self.api.delete(kind, self.namespace, name, self.read(kind, name)["metadata"]["uid"])

    def objects(self, kind: Kind, name: str) -> dict[str, Json]:
        """Those of a group that are not ending."""
        found, _ = self.api.list(kind, self.namespace, f"{GROUP_LABEL}={name}")
        return {each["metadata"]["name"]: each for each in found if "deletionTimestamp" not in each["metadata"]}

    def images(self, name: str) -> dict[str, str]:
        return {pod: image_of(each) for pod, each in self.objects(POD, name).items()}

    def uids(self, name: str) -> dict[str, str]:
        return {pod: each["metadata"]["uid"] for pod, each in self.objects(POD, name).items()}

    # ---- pods ----

    def change_status(self, pod: str, change: Callable[[Json], Any]) -> None:
        """What a kubelet would write."""
        while True:
            obj = self.read(POD, pod)
            change(obj["status"])
            patch = {"metadata": {"resourceVersion": obj["metadata"]["resourceVersion"]}, "status": obj["status"]}
            try:
                self.api.merge(POD, self.namespace, pod, patch, "status")
                return
            except Conflict:
                continue

    def open(self, *pods: str) -> None:
        """Lets pods with a readiness gate become ready, as soon as they are there."""
        for pod in pods:
            self.until(lambda pod=pod: self._stays(pod), f"the pod {pod}")  # type: ignore[misc]
            self.change_status(pod, _open_gate)

    def _stays(self, pod: str) -> bool:
        try:
            return "deletionTimestamp" not in self.read(POD, pod)["metadata"]
        except NotFound:
            return False

    def crash(self, pod: str) -> None:
        """The pod's first container ended, and runs again, a second after the pod was ready: times here are seconds."""

        def change(status: Json) -> None:
            turned = next(each["lastTransitionTime"] for each in status["conditions"] if each["type"] == "Ready")
            first = status["containerStatuses"][0]
            first["restartCount"] += 1
            first["state"] = {"running": {"startedAt": timestamp(unix_time(turned) + 1)}}

        self.change_status(pod, change)

    def evict(self, pod: str) -> int:
        """The status of the answer: 201, or 429 if a budget forbids it."""
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": self.namespace}}
        with self.core() as core:
            try:
                core.create_namespaced_pod_eviction(pod, self.namespace, body)
            except ApiException as error:
                return int(error.status)
            return 201

    # ---- waiting ----

    def until(self, done: Callable[[], Any], what: str) -> None:
        ends = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < ends, f"{what} did not come about within {DEADLINE_S:g} s"
            time.sleep(0.1 if REAL else 0.02)

    def is_ready(self, name: str) -> bool:
        found = self.read(GROUP, name)
        status = found.get("status") or {}
        conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
        return (
            status.get("observedGeneration") == found["metadata"]["generation"]
            and conditions.get("Ready") == "True"
            and conditions.get("RollingUpdateInProgress") == "False"
        )

    def wait_ready(self, name: str) -> None:
        self.until(lambda: self.is_ready(name), f"{name} is ready")

    def wait_observed(self, name: str) -> None:
        """Until the operator has acted on the group as it is now."""
        generation = self.read(GROUP, name)["metadata"]["generation"]
        self.until(
            lambda: (self.read(GROUP, name).get("status") or {}).get("observedGeneration") == generation,
            f"{name} is observed",
        )

    @contextmanager
    def watching(self, name: str, measure: Callable[[dict[str, Json]], Any]) -> Iterator[list[Any]]:
        """What `measure` says of the group's pods (those that are ending too) after every change within the block."""
        pods, version = self.api.list(POD, self.namespace, f"{GROUP_LABEL}={name}")
        known = {each["metadata"]["name"]: each for each in pods}
        seen = [measure(known)]
        stream = self.api.watch(POD, self.namespace, f"{GROUP_LABEL}={name}", version, 600)

        def follow() -> None:
            try:
                for event, obj in stream:
                    if event == "DELETED":
                        known.pop(obj["metadata"]["name"], None)
                    elif event != "BOOKMARK":
                        known[obj["metadata"]["name"]] = obj
                    seen.append(measure(known))
            except DiptychError:
                return  # closed

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield seen
        finally:
            stream.close()
            thread.join(60)
            assert not thread.is_alive()


def _open_gate(status: Json) -> None:
    conditions = [each for each in status.get("conditions") or [] if each["type"] != GATE]
    status["conditions"] = [*conditions, {"type": GATE, "status": "True"}]


def image_of(pod: Json) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def num_ready(pods: dict[str, Json]) -> int:
    return sum(is_pod_ready(pod) for pod in pods.values() if "deletionTimestamp" not in pod["metadata"])


def role(name: str, replicas: int = 1, *, gate: bool = False, **more: Any) -> Json:
    """`gate`: its pods become ready when `Place.open` says so."""
    spec: Json = {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": IMAGE}]}
    if gate:
        spec["readinessGates"] = [{"conditionType": GATE}]
    return {"name": name, "replicas": replicas, "template": {"spec": spec}, **more}


def set_image(*roles: str) -> Callable[[Json], None]:
    """An edit that gives these roles (all) the second image."""

    def change(obj: Json) -> None:
        for each in obj["spec"]["roles"]:
            if not roles or each["name"] in roles:
                each["template"]["spec"]["containers"][0]["image"] = SECOND_IMAGE

    return change


@contextmanager
def our_place(folder: Path) -> Iterator[Place]:
    world = World(folder)
    world.cluster.pods.behaviour = Behaviour(ready_s=0.05, ended_s=0.1)  # nothing happens in no time
    made = Place(world.configuration, world.configuration, "default")
    try:
        yield made
        made.close()
    finally:
        world.close()


@contextmanager
def real_place() -> Iterator[Place]:
    namespace = f"diptych-test-{uuid.uuid4().hex[:8]}"
    api = Api(_admin(), Metrics())
    created = api.create(NAMESPACES, {"metadata": {"name": namespace}})
    made = Place(_admin, lambda: _as_operator(namespace), namespace)
    try:
        _permit(api, namespace)
        yield made
        made.close()
    finally:
        for group in api.list(GROUP, namespace)[0]:  # no operator is left to end them in order
            api.merge(GROUP, namespace, group["metadata"]["name"], {"metadata": {"finalizers": None}})
        api.delete(NAMESPACES, "", namespace, created["metadata"]["uid"])
        api.close()


def _admin() -> Configuration:
    return connect(None)[0]


def _permit(api: Api, namespace: str) -> None:
    """What `kubectl apply -k deploy/operator` gives the operator, in this namespace."""
    where = {"name": ACCOUNT, "namespace": namespace}
    api.create(ACCOUNTS, {"metadata": where})
    for document in yaml.safe_load_all((DEPLOY / "operator" / "role.yaml").read_text()):
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
        metadata = {**document["metadata"], "namespace": namespace}
        api.create({"Role": ROLES, "RoleBinding": BINDINGS}[document["kind"]], {**document, "metadata": metadata})


def _as_operator(namespace: str) -> Configuration:
    """The cluster of the kubeconfig, with a token of the operator's ServiceAccount and no other credentials."""
    configuration = _admin()
    with ApiClient(_admin()) as client:
        body = {"spec": {"audiences": [], "expirationSeconds": 3600}}
        answer = CoreV1Api(client).create_namespaced_service_account_token(ACCOUNT, namespace, body)
    configuration.cert_file = configuration.key_file = None
    configuration.api_key = {"authorization": f"Bearer {answer.status.token}"}
    return configuration
