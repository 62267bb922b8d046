"""What only a real cluster can say: every shipped manifest is taken as it is, `kubectl` shows what a person looks for,
and a HorizontalPodAutoscaler scales a role."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_place import REAL, Place, role

from diptych.group.operator.resources import ADAPTER, POD, Json, Kind

pytestmark = pytest.mark.skipif(not REAL, reason="needs a real cluster: DIPTYCH_TEST_CLUSTER=1")

AUTOSCALERS = Kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
KUSTOMIZATIONS = ("deploy/operator", "deploy/operator-all-namespaces")
MANIFESTS = sorted(
    str(path)
    for path in (*Path("examples").rglob("*.yaml"), *Path("deploy").rglob("*.yaml"))
    if "operator" not in str(path) and "RoleBasedGroup" in path.read_text()
)


def kubectl(*arguments: str, stdin: str = "") -> str:
    """Raises CalledProcessError."""
    program = shutil.which("kubectl")
    assert program is not None
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dry_run(place: Place, documents: list[Json]) -> list[str]:
    """What the API server would store, each object in the test's namespace if it is of one."""
    text = yaml.safe_dump_all([_moved(place, each) for each in documents])
    flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-o", "name")
    return kubectl("apply", *flags, "-f", "-", stdin=text).split()


def _moved(place: Place, document: dict[str, Any]) -> Json:
    metadata = document["metadata"]
    return {**document, "metadata": {**metadata, "namespace": place.namespace}} if "namespace" in metadata else document


@pytest.mark.parametrize("path", KUSTOMIZATIONS)
def test_the_operators_manifests_are_taken(place: Place, path: str) -> None:
    documents = [each for each in yaml.safe_load_all(kubectl("kustomize", path)) if each]
    assert len(dry_run(place, documents)) == len(documents)


@pytest.mark.parametrize("path", MANIFESTS)
def test_shipped_manifests_are_taken(place: Place, path: str) -> None:
    documents = [each for each in yaml.safe_load_all(Path(path).read_text()) if each]
    for each in documents:
        each["metadata"]["namespace"] = place.namespace
    assert len(dry_run(place, documents)) == len(documents)


def test_kubectl_shows_where_a_group_stands(place: Place) -> None:
    place.create("g", role("a", scalingAdapter={"enable": True}))
    place.wait_ready("g")
    place.until(lambda: place.read(ADAPTER, "g-a").get("status", {}).get("phase") == "Bound", "the adapter is bound")
    header, row = kubectl("-n", place.namespace, "get", "rbg").splitlines()
    assert header.split() == ["NAME", "READY", "AGE"] and row.split()[:2] == ["g", "True"]
    header, row = kubectl("-n", place.namespace, "get", "rbgsa").splitlines()
    assert header.split() == ["NAME", "PHASE", "REPLICAS", "AGE"] and row.split()[:3] == ["g-a", "Bound", "1"]
    kubectl("-n", place.namespace, "scale", "rolebasedgroupscalingadapter", "g-a", "--replicas", "2")
    place.until(lambda: sorted(place.objects(POD, "g")) == ["g-a-0", "g-a-1"], "a second pod")
    place.wait_ready("g")
    events = json.loads(kubectl("-n", place.namespace, "get", "events", "-o", "json"))["items"]
    assert {"RoleCreated", "SuccessfulScale"} <= {each["reason"] for each in events}


def test_an_autoscaler_of_the_cluster_scales_a_role(place: Place) -> None:
    """Below its least it needs no metrics to scale."""
    place.create("g", role("a", scalingAdapter={"enable": True}))
    place.wait_ready("g")
    target = {"apiVersion": ADAPTER.api_version, "kind": ADAPTER.kind, "name": "g-a"}
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 9}},
    }
    place.make(AUTOSCALERS, "g-a", {"scaleTargetRef": target, "minReplicas": 3, "maxReplicas": 4, "metrics": [metric]})
    place.until(lambda: sorted(place.objects(POD, "g")) == [f"g-a-{i}" for i in range(3)], "three pods")
    place.wait_ready("g")
    place.until(lambda: place.read(ADAPTER, "g-a")["status"]["replicas"] == 3, "the adapter says three")
