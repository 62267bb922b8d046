"""The manifest: what is read, and that each mistake names its field."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from group_manifests import EXAMPLES, group, role, service, shell, text

from diptych.errors import ConfigError
from diptych.group import spec
from diptych.group.pod import Probe, TcpSocketAction

SEED = (EXAMPLES / "seed" / "sglang_pd.yaml").read_text()


def test_the_seed_manifest() -> None:
    manifest = spec.parse(SEED)
    assert [(each.name, each.replicas, each.dependencies) for each in manifest.group.spec.roles] == [
        ("scheduler", 1, ("decode", "prefill")),
        ("prefill", 2, ()),
        ("decode", 1, ()),
    ]
    prefill = manifest.group.role("prefill").template.spec.containers[0]
    assert prefill.readiness_probe == Probe(
        tcp_socket=TcpSocketAction(port=8000), initial_delay_seconds=30, period_seconds=10
    )
    assert prefill.resources.limits == {"nvidia.com/gpu": "2", "aliyun/erdma": 1, "memory": "16Gi", "cpu": "4"}
    assert [each.name for each in manifest.services] == ["sglang-pd"]
    assert manifest.other_objects == ()


def test_other_kinds_are_reported() -> None:
    claims = (EXAMPLES / "seed" / "llm-model.yaml").read_text()
    manifest = spec.parse(SEED + "\n---\n" + claims)
    assert manifest.other_objects == (
        ("Secret", "oss-secret"),
        ("PersistentVolume", "llm-model"),
        ("PersistentVolumeClaim", "llm-model"),
    )


def _changed(path: str, value: Any) -> str:
    """The seed's group with one field set (or deleted, for ...)."""
    documents = list(yaml.safe_load_all(SEED))
    *parents, last = path.replace("[", ".").replace("]", "").split(".")
    where = documents[0]
    for name in parents:
        where = where[int(name)] if isinstance(where, list) else where[name]
    if value is ...:
        del where[last]
    else:
        where[last] = value
    return yaml.safe_dump_all(documents)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.roles[1].replicas", -1, "spec.roles[1].replicas: expected int >= 0"),
        ("spec.roles[1].replicas", "2", "spec.roles[1].replicas: expected int, got str"),
        ("spec.roles[0].dependencies", ["decod"], "spec.roles[0].dependencies[0]: there is no role decod"),
        ("spec.roles[2].name", "prefill", "spec.roles[2].name: prefill is already used"),
        ("spec.roles[2].name", "Decode", "spec.roles[2].name: expected str matching regex"),
        ("spec.roles[2].name", "decode\n", "spec.roles[2].name: expected str matching regex"),
        ("spec.roles[2].name", "d" * 60, "spec.roles[2].name: makes pod names longer than 63 characters"),
        ("spec.roles[1].dependencies", ["scheduler"], "spec.roles: dependencies go in a circle: scheduler -> "),
        ("spec.roles[1].restartPolicy", "Always", "spec.roles[1].restartPolicy: invalid enum value 'Always'"),
        ("spec.roles[1].template", ..., "spec.roles[1]: needs either template or templateRef"),
        ("spec.roles[1].template.spec.containers", [], "spec.roles[1].template.spec.containers: expected"),
        (
            "spec.roles[1].template.spec.containers[0].readinesProbe",
            {},
            "spec.roles[1].template.spec.containers[0].readinesProbe: unknown field; did you mean readinessProbe?",
        ),
        (
            "spec.roles[1].template.spec.containers[0].volumeMounts[1].name",
            "shm",
            "spec.roles[1].template.spec.containers[0].volumeMounts[1].name: no volume is called shm",
        ),
        (
            "spec.roles[1].template.spec.containers[0].volumeMounts[1].subPath",
            "../x",
            "volumeMounts[1].subPath: must be relative",
        ),
        (
            "spec.roles[1].template.spec.containers[0].volumeMounts[1].mountPath",
            "/models/Qwen3-32B/",
            "volumeMounts[1].mountPath: /models/Qwen3-32B/ is already mounted",
        ),
        (
            "spec.roles[1].template.spec.containers[0].readinessProbe.tcpSocket.port",
            "grpc",
            "spec.roles[1].template.spec.containers[0].readinessProbe: no port of the container is called grpc",
        ),
        ("spec.roles[1].workload", {"apiVersion": "v1", "kind": "Pod"}, "spec.roles[1].workload: must be one of"),
        ("metadata.name", "../x", "metadata.name: '../x' must be lower-case"),
        ("apiVersion", "workloads.x-k8s.io/v1alpha2", "apiVersion: must be workloads.x-k8s.io/v1alpha1"),
        ("kind", "RoleBasedGroups", "needs exactly one RoleBasedGroup, has 0; is RoleBasedGroups meant to be one?"),
    ],
)
def test_mistakes_name_the_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec.parse(_changed(path, value))
    assert message in error.value.message


def test_all_mistakes_at_once() -> None:
    broken = yaml.safe_load(_changed("spec.roles[1].replicas", -1).split("---")[0])
    broken["spec"]["roles"][2]["restartPolicy"] = "Never"
    broken["spec"]["rolez"] = []
    with pytest.raises(ConfigError) as error:
        spec.parse(yaml.safe_dump(broken))
    assert len(error.value.message.splitlines()) == 4


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("a: 1\na: 2", "line 1: the key a is written twice"),
        ("a: [1", "no valid YAML"),
        ("- 1", "document 1: needs apiVersion and kind"),
        ("!!python/object/apply:os.system [true]", "no valid YAML"),
        ("", "needs exactly one RoleBasedGroup, has 0"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("a: " + "9" * 5000, "no valid YAML"),
        ("a: 2001-99-99", "no valid YAML"),
        (r'a: ["b", "c\0d"]', "line 1: text must not contain a NUL character"),
    ],
)
def test_what_is_no_manifest(broken: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec.parse(broken)


def test_fields_of_later_versions_are_accepted() -> None:
    later = role(
        "a", shell("true"), minReadySeconds=3, annotations={"x": "y"}, rolloutStrategy={"type": "RollingUpdate"}
    )
    manifest = spec.parse(text(group(later, coordination=[{"name": "c", "roles": ["a"]}], podGroupPolicy={})))
    assert {each.field for each in manifest.unmodelled} == {
        "minReadySeconds",
        "annotations",
        "rolloutStrategy",
        "coordination",
        "podGroupPolicy",
    }


def test_a_null_is_the_default() -> None:
    document = group(role("a", shell("true"), replicas=None))
    assert spec.parse(text(document)).group.spec.roles[0].replicas == 1


def test_a_service_names_itself_in_errors() -> None:
    broken = service("a")
    broken["spec"]["ports"][0]["port"] = 0
    with pytest.raises(ConfigError, match=r"Service toy: spec.ports\[0\].port: expected int >= 1"):
        spec.parse(text(group(role("a", shell("true"))), broken))


def test_role_templates_are_resolved() -> None:
    shared = role("a", shell("true"))["template"]
    patch = {"spec": {"containers": [{"name": "a", "env": [{"name": "MODE", "value": "decode"}]}]}}
    decode = {"name": "decode", "templateRef": {"name": "base"}, "templatePatch": patch}
    document = group(role("prefill", shell("true")), decode, roleTemplates=[{"name": "base", "template": shared}])
    container = spec.parse(text(document)).group.role("decode").template.spec.containers[0]
    assert container.command == ("sh", "-c", "true")
    assert [each.name for each in container.env] == ["MODE", "POD_IP"]


def test_a_patch_that_spoils_a_template_names_the_role() -> None:
    shared = role("a", shell("true"))["template"]
    broken = {"name": "b", "templateRef": {"name": "base"}, "templatePatch": {"spec": {"containers": None}}}
    document = group(broken, roleTemplates=[{"name": "base", "template": shared}])
    with pytest.raises(ConfigError, match=r"spec.roles\[0\].template, patched.spec.containers: is required"):
        spec.parse(text(document))


def test_a_scaling_group_sets_the_replicas_of_its_roles() -> None:
    ratio = {"name": "pd", "replicas": 3, "roles": {"prefill": 2, "decode": 1}}
    document = group(role("prefill", shell("true"), replicas=7), role("decode", shell("true")), scalingGroups=[ratio])
    manifest = spec.parse(text(document))
    assert [each.replicas for each in manifest.group.spec.roles] == [6, 3]


def test_the_restart_policy_follows_the_workload() -> None:
    several = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}
    roles = spec.parse(
        text(
            group(
                role("a", shell("true")),
                role("b", shell("true"), workload=several),
                role("c", shell("true"), workload=several, restartPolicy="None"),
            )
        )
    ).group.spec.roles
    assert [each.restart_policy for each in roles] == ["None", "RecreateRoleInstanceOnPodRestart", "None"]


def test_sidecars_bring_no_volumes_here() -> None:
    mounting = role(
        "a",
        shell("true"),
        container={"volumeMounts": [{"name": "models", "mountPath": "/models"}]},
        engineRuntimes=[{"profileName": "patio"}],
    )
    with pytest.raises(ConfigError, match=r"volumeMounts\[0\].name: no volume is called models"):
        spec.parse(text(group(mounting)))


def unreachable(*roles: dict[str, Any], target: int | str = 8000, **selector: str) -> str:
    """What is said against a Service of the group toy."""
    wrong = service("a", target=target)
    wrong["spec"]["selector"] |= {name.replace("__", "/"): value for name, value in selector.items()}
    with pytest.raises(ConfigError) as refused:
        spec.parse(text(group(*roles), wrong))
    return refused.value.message.removeprefix("the manifest is wrong:\n  Service toy: spec.")


def test_a_service_that_would_reach_nothing() -> None:
    front = role("front", shell("true"), container={"ports": [{"name": "http", "containerPort": 8000}]})
    other = role("a", shell("true"), container={"ports": [{"name": "grpc", "containerPort": 9000}]})
    label = "rolebasedgroup.workloads.x-k8s.io/role"
    assert unreachable(front) == f"selector[{label}]: there is no role a; there is: front"
    assert unreachable(front, other, target="htpp") == (
        "ports[0].targetPort: there is no container port htpp; there is: grpc"
    )
    assert unreachable(front, other, app="x") == "selector: no pod of toy has all these labels"


def test_a_service_that_may_reach_something() -> None:
    ports = {"ports": [{"name": "http", "containerPort": 8000}]}
    labelled = role("a", shell("true"), container=ports)
    labelled["template"]["metadata"] = {"labels": {"app": "x"}}
    mine, others = service("a", target="http"), service("b", name="others")
    mine["spec"]["selector"] |= {"app": "x", "apps.kubernetes.io/pod-index": "0"}
    others["spec"]["selector"] = {"app": "y"}
    assert len(spec.parse(text(group(labelled), mine, others)).services) == 2
