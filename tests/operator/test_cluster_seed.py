"""The seed's deployment, unchanged, on any cluster (see cluster_place): order, names, and what its Service selects.

Where no node has its GPUs, its pods cannot be placed. The test then says of them what a kubelet would say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from cluster_place import REAL, Place
from driver import is_pod_ready

from diptych.group.operator.resources import GROUP, POD, SERVICE, STATEFUL_SET, Json

MANIFEST = Path("examples/seed/sglang_pd.yaml")
NAME, SERVERS = "sglang-pd", ["sglang-pd-decode-0", "sglang-pd-prefill-0", "sglang-pd-prefill-1"]
SCHEDULER = "sglang-pd-scheduler-0"


def cannot_be_placed(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(each["type"] == "PodScheduled" and each["status"] == "False" for each in conditions)


def run_by_hand(status: Json) -> None:
    others = [each for each in status.get("conditions") or [] if each["type"] != "Ready"]
    status.update(phase="Running", conditions=[*others, {"type": "Ready", "status": "True"}])


def wait_for(place: Place, names: list[str]) -> None:
    for name in names:
        place.until(lambda name=name: place.exists(POD, name), f"the pod {name}")  # type: ignore[misc]
        place.until(
            lambda name=name: is_pod_ready(pod := place.read(POD, name)) or cannot_be_placed(pod),  # type: ignore[misc]
            f"{name} runs, or cannot",
        )
        if not is_pod_ready(place.read(POD, name)):
            place.change_status(name, run_by_hand)


def test_the_seeds_deployment(place: Place) -> None:
    group, service = yaml.safe_load_all(MANIFEST.read_text())
    for kind, document in ((GROUP, group), (SERVICE, service)):
        metadata: dict[str, Any] = {**document["metadata"], "namespace": place.namespace}
        place.api.create(kind, {**document, "metadata": metadata})

    def state(pods: dict[str, Json]) -> tuple[bool, int]:
        """Whether the scheduler's pod is there, and how many servers are ready."""
        return SCHEDULER in pods, sum(is_pod_ready(pod) for name, pod in pods.items() if name != SCHEDULER)

    with place.watching(NAME, state) as seen:
        wait_for(place, SERVERS)
        wait_for(place, [SCHEDULER])
        place.wait_ready(NAME)
        place.until(lambda: seen[-1][0], "the scheduler's pod was seen")
    assert all(ready == len(SERVERS) for scheduler, ready in seen if scheduler)
    assert sorted(place.objects(POD, NAME)) == sorted([*SERVERS, SCHEDULER])
    assert sorted(place.objects(STATEFUL_SET, NAME)) == [
        f"{NAME}-{role}" for role in ("decode", "prefill", "scheduler")
    ]
    command = " ".join(place.read(POD, SCHEDULER)["spec"]["containers"][0]["command"])
    named = re.findall(r"http://([\w-]+)\.([\w-]+):8000", command)
    assert sorted(pod for pod, _ in named) == SERVERS
    for pod, domain in named:
        spec, headless = place.read(POD, pod)["spec"], place.read(SERVICE, domain)["spec"]
        assert (spec["hostname"], spec["subdomain"]) == (pod, domain)
        assert headless["clusterIP"] == "None" and headless["publishNotReadyAddresses"] is True
        assert pod in selected(place, headless["selector"])
    assert selected(place, place.read(SERVICE, NAME)["spec"]["selector"]) == [SCHEDULER]
    if REAL:
        assert place.read(SERVICE, NAME)["spec"]["clusterIP"] not in ("", "None")


def selected(place: Place, labels: dict[str, str]) -> list[str]:
    pods, _ = place.api.list(POD, place.namespace, ",".join(f"{key}={value}" for key, value in labels.items()))
    return sorted(pod["metadata"]["name"] for pod in pods)
