"""What one machine refuses, what it says it leaves out, and the GPUs it finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from group_manifests import EXAMPLES, group, role, service, shell, text

from diptych.errors import ConfigError
from diptych.group.local.gpus import GpuPool, find_gpus
from diptych.group.local.launch import Launch, prepare, read_launch


def launch(manifest: str, **options: Any) -> Launch:
    return Launch(manifest=manifest, source="test", cwd="/", **options)


def test_the_seed_manifest_says_each_thing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seed = (EXAMPLES / "seed" / "sglang_pd.yaml").read_text()
    assert prepare(launch(seed, claims={"llm-model": "/demo"})).notes == (
        "images are not pulled: commands are programs of this machine, and `python3` is the one that runs diptych",
        "claim llm-model is /demo",
        "nvidia.com/gpu: there is no GPU here, so the pods run on the CPU",
        "cpu and memory limits are not enforced",
        "aliyun/erdma: devices of this kind are not handed out",
        "emptyDir dshm is an ordinary folder: its medium and sizeLimit have no effect",
    )


def test_the_demo_manifest_leaves_nothing_out() -> None:
    prepared = prepare(launch((EXAMPLES / "demo.yaml").read_text(), claims={"demo-model": "/demo"}))
    assert prepared.notes == ("claim demo-model is /demo",)
    assert [(each.name, each.replicas) for each in prepared.desired.roles] == [
        ("router", 1),
        ("prefill", 2),
        ("decode", 1),
    ]


def test_the_manifest_for_two_gpus_wants_two(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = (EXAMPLES / "two-gpus.yaml").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    prepared = prepare(launch(manifest, claims={"model": "/demo"}))
    assert (prepared.gpus, prepared.notes) == (("4", "6"), ("claim model is /demo",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match="the pods ask for 2 GPUs"):
        prepare(launch(manifest, claims={"model": "/demo"}))


def test_other_fields_and_objects_are_said_once() -> None:
    first = role("a", shell("true"), container={"lifecycle": {}}, pod={"tolerations": []})
    second = role("b", shell("true"), container={"lifecycle": {}}, pod={"tolerations": []})
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    assert prepare(launch(text(group(first, second), config))).notes == (
        "tolerations has no effect here (spec.roles[0].template.spec)",
        "lifecycle hooks do not run",
        "ConfigMap c is not used: --claim names the folder of a claim",
    )


def test_a_service_for_others_is_said() -> None:
    others = service("a")
    others["spec"]["selector"] = {"app": "other"}
    assert prepare(launch(text(group(role("a", shell("true"))), others))).notes == (
        "Service toy selects no pod of this group: nothing will answer at its port",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pod": {"volumes": [{"name": "v", "hostPath": {"path": "/etc"}}]}},
            r"spec.roles\[0\].template.spec.volumes\[0\]: hostPath volumes are refused",
        ),
        ({"pod": {"initContainers": []}}, r"spec.roles\[0\].template.spec: init containers do not run locally"),
        ({"container": {"envFrom": []}}, r"containers\[0\]: there are no config maps or secrets here"),
        ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {}}}]}, r"env\[1\].valueFrom: there are no secrets here"),
        ({"container": {"command": []}}, r"containers\[0\].command: is required here"),
        ({"container": {"readinessProbe": {"grpc": {"port": 1}}}}, "grpc probes are not asked here"),
        ({"container": {"readinessProbe": {}}}, r"containers\[0\].readinessProbe: needs exec, tcpSocket or httpGet"),
        ({"leaderWorkerSet": {"size": 2}}, r"spec.roles\[0\].leaderWorkerSet.size: .* use size 1"),
        ({"replicas": 255}, "at most 254 pods and Services, not 255"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(launch(text(group(role("a", shell("true"), **fields)))))


def test_udp_is_refused() -> None:
    udp = service("a")
    udp["spec"]["ports"][0]["protocol"] = "UDP"
    with pytest.raises(ConfigError, match="Service toy: protocol UDP is not forwarded"):
        prepare(launch(text(group(role("a", shell("true"))), udp)))


@pytest.mark.parametrize(
    ("claims", "ports", "message"),
    [
        (["model"], [], "--claim model: must have the form NAME=DIR"),
        (["model=/no/such"], [], "--claim model=/no/such: there is no such folder"),
        ([], ["toy"], "--service-port toy: must have the form NAME=PORT"),
        ([], ["toy=http"], "--service-port toy=http: the port must be a number"),
        ([], ["toy=65536"], "--service-port toy=65536: the port must be a number"),
        ([], ["other=1"], "--service-port other: no such service; there is: toy"),
        (["model=/"], [], "--claim model: no volume claims it; claimed are: none"),
    ],
)
def test_options(claims: list[str], ports: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(text(group(role("a", shell("true"))), service("a")))
    with pytest.raises(ConfigError, match=message):
        prepare(read_launch(str(path), claims, ports))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"cannot read no\.yaml: No such file or directory"):
        read_launch("no.yaml")


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    listing = (
        "GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)"
    )
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-3")
    assert find_gpus() == ["1", "GPU-3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == []


def test_two_pools_never_hand_out_the_same_device() -> None:
    devices = [f"limits-test-{sys.executable}-{number}" for number in range(3)]
    one, two = GpuPool(devices), GpuPool(devices)
    assert one.take("a", 2) == devices[:2]
    assert one.take("a", 2) == devices[:2]
    assert two.take("b", 2) is None
    assert two.take("b", 1) == devices[2:]
    one.give_back("a")
    assert two.take("c", 2) == devices[:2]
    for pod in ("b", "c"):
        two.give_back(pod)


def test_group_imports_with_torch_absent() -> None:
    code = "import sys; sys.modules['torch'] = None; import diptych.group.commands, diptych.mounts"
    assert subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES.parent).returncode == 0
