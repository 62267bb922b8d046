"""`diptych validate`: all kinds, several files, each mistake with its field, and what documents mean to each other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from group_manifests import EXAMPLES, group, role, service, shell, text

from diptych.cli import main
from diptych.group.crds import crds
from diptych.group.reader import Object, Reading
from diptych.group.role import DisruptionBudget, RollingUpdate, RolloutStrategy
from diptych.group.validate import check, object_problems

TRUE = shell("true")
EVERY_FIELD = Path(__file__).parent / "every_field.yaml"
LWS = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}


def problems(document: dict[str, Any]) -> list[str]:
    return [str(each) for each in object_problems(document, open_pods=False)]


def a(**fields: Any) -> dict[str, Any]:
    return group(role("a", TRUE, **fields))


def without_template(**fields: Any) -> dict[str, Any]:
    return {"name": "a", **fields}


def as_set(document: dict[str, Any], replicas: int = 1, name: str = "set") -> dict[str, Any]:
    spec = {"replicas": replicas, "template": document["spec"]}
    return {**document, "kind": "RoleBasedGroupSet", "metadata": {"name": name}, "spec": spec}


def adapter(name: str, target: str, to: str) -> dict[str, Any]:
    return {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroupScalingAdapter",
        "metadata": {"name": name},
        "spec": {"scaleTargetRef": {"name": target, "role": to}},
    }


HTTP = [{"name": "http", "containerPort": 8000}]
TEMPLATES = [{"name": "base", "template": role("a", TRUE)["template"]}]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (a(dependencies=["b"]), "spec.roles[0].dependencies[0]: there is no role b; there is: a"),
        (
            group(role("prefill", TRUE), role("b", TRUE, dependencies=["prefil"])),
            "spec.roles[1].dependencies[0]: there is no role prefil; did you mean prefill?",
        ),
        (
            group(role("a", TRUE, dependencies=["b"]), role("b", TRUE, dependencies=["a"])),
            "spec.roles: dependencies go in a circle: a -> b -> a",
        ),
        (group(role("a", TRUE), role("a", TRUE)), "spec.roles[1].name: a is already used"),
        (
            a(workload={"kind": "Pod"}),
            "spec.roles[0].workload: must be one of apps/v1/StatefulSet, apps/v1/Deployment,",
        ),
        (
            a(workload={"apiVersion": "workloads.x-k8s.io/v1alpha1", "kind": "InstanceSet"}),
            "spec.roles[0].workload: must be one of",
        ),
        (a(components=[{"name": "x"}]), "spec.roles[0]: components needs the workload InstanceSet"),
        (group(without_template()), "spec.roles[0]: needs either template or templateRef"),
        (
            group(role("a", TRUE, templateRef={"name": "base"}, templatePatch={}), roleTemplates=TEMPLATES),
            "spec.roles[0]: needs either template or templateRef",
        ),
        (
            group(without_template(templateRef={"name": "base"}), roleTemplates=TEMPLATES),
            "spec.roles[0]: templatePatch goes with templateRef; write templatePatch: {} to change nothing",
        ),
        (a(templatePatch={}), "spec.roles[0]: templatePatch goes with templateRef"),
        (
            group(without_template(templateRef={"name": "bass"}, templatePatch={}), roleTemplates=TEMPLATES),
            "spec.roles[0].templateRef.name: there is no role template bass; did you mean base?",
        ),
        (
            group(
                without_template(templateRef={"name": "base"}, templatePatch={}, workload=LWS), roleTemplates=TEMPLATES
            ),
            "spec.roles[0]: templateRef is not possible with the workload LeaderWorkerSet",
        ),
        (
            group(
                without_template(
                    templateRef={"name": "base"},
                    templatePatch={"spec": {"containers": [{"name": "a", "tty": 1, "replicas": 2}]}},
                ),
                roleTemplates=TEMPLATES,
            ),
            "spec.roles[0].template, patched.spec.containers[0].replicas: unknown field",
        ),
        (
            group(
                without_template(templateRef={"name": "base"}, templatePatch={"spec": {"containers": [{}]}}),
                roleTemplates=TEMPLATES,
            ),
            "spec.roles[0].templatePatch.spec.containers[0]: needs name",
        ),
        (
            a(workload=LWS, leaderWorkerSet={"patchWorkerTemplate": {"spec": {"containers": None}}}),
            "spec.roles[0].template, patched for workers.spec.containers: is required",
        ),
        (
            a(rolloutStrategy={"rollingUpdate": {"maxUnavailable": 0}}),
            "spec.roles[0].rolloutStrategy.rollingUpdate: maxUnavailable and maxSurge must not both be 0",
        ),
        (a(rolloutStrategy={"rollbackOnFailure": True}), "rollbackOnFailure needs progressDeadlineSeconds"),
        (a(podDisruptionBudget={}), "spec.roles[0].podDisruptionBudget: needs either minAvailable or maxUnavailable"),
        (a(drain={}), "spec.roles[0].drain.path: is required"),
        (
            a(container={"ports": [{"containerPort": 1, "name": "Http_1"}]}),
            "spec.roles[0].template.spec.containers[0].ports[0].name: 'Http_1' must be up to 15",
        ),
        (
            a(container={"ports": [{"containerPort": 1, "name": "http"}, {"containerPort": 2, "name": "http"}]}),
            "containers[0].ports[1].name: http is already used",
        ),
        (
            a(container={"ports": [{"containerPort": 1}, {"containerPort": 1, "hostIP": "10.0.0.1"}]}),
            "containers[0].ports[1].containerPort: 1/TCP is already listed",
        ),
        (a(servicePorts=[{"port": 1}, {"port": 1}]), "spec.roles[0].servicePorts[1].port: 1/TCP is already used"),
        (
            group(role("a", TRUE), podGroupPolicy={"kubeScheduling": {}, "volcanoScheduling": {}}),
            "spec.podGroupPolicy: kubeScheduling and volcanoScheduling exclude each other",
        ),
        (
            group(role("a", TRUE), coordination=[{"name": "c", "roles": ["a", "x"]}]),
            "spec.coordination[0].roles[1]: there is no role x",
        ),
        (
            group(role("a", TRUE), scalingGroups=[{"name": "g", "roles": {"x": 1}}]),
            "spec.scalingGroups[0].roles.x: there is no role x",
        ),
        (
            group(role("a", TRUE), scalingGroups=[{"name": "a", "roles": {"a": 1}}]),
            "spec.scalingGroups[0].name: a is a role",
        ),
        (
            group(role("a", TRUE), scalingGroups=[{"name": "g", "roles": {"a": 1}}, {"name": "h", "roles": {"a": 1}}]),
            "spec.scalingGroups[1].roles.a: the scaling group g already scales a",
        ),
        (
            group(role("a", TRUE, scalingAdapter={"enable": True}), scalingGroups=[{"name": "g", "roles": {"a": 1}}]),
            "spec.scalingGroups[0].roles.a: a has a scalingAdapter of its own",
        ),
        (
            group(role("a", TRUE), name="1st"),
            "metadata.name: '1st' must be lower-case letters, digits and dashes, a letter",
        ),
        (group(role("a", TRUE), name="a.b"), "metadata.name: 'a.b' must be lower-case letters, digits and dashes"),
        (
            group(role("a" * 20, TRUE), name="g" * 32),
            "spec.roles[0].name: " + "g" * 32 + "-" + "a" * 20 + " has 53 characters, a StatefulSet may have 52",
        ),
        (
            group(role("a", TRUE, workload=LWS, replicas=11), name="g" * 48),
            "has 50 characters, a LeaderWorkerSet may have 49",
        ),
        (
            group(role("a", TRUE, workload=LWS, replicas=2), role("a-1", TRUE)),
            "spec.roles[1].name: the workers of role a are called toy-a-1 too",
        ),
        (as_set(a(dependencies=["b"])), "spec.template.roles[0].dependencies[0]: there is no role b"),
        (as_set(a(), name="s" * 49), "spec.template.roles[0].name: " + "s" * 49 + "-0-a has 53 characters"),
        ({**a(), "kind": "RoleBasedGrup"}, "kind: RoleBasedGrup is no kind of workloads.x-k8s.io; did you mean RoleB"),
        ({**a(), "apiVersion": "workloads.x-k8s.io/v1alpha2"}, "apiVersion: must be workloads.x-k8s.io/v1alpha1"),
        (adapter("x", "g", ""), "spec.scaleTargetRef.role: expected str of length >= 1"),
    ],
)
def test_mistakes_name_the_field(document: dict[str, Any], message: str) -> None:
    found = problems(document)
    assert any(message in each for each in found), found


@pytest.mark.parametrize(
    "document",
    [
        a(),
        a(drain=None),
        a(workload=LWS, replicas=2),
        group(role("a", TRUE, workload=LWS, replicas=2), role("a-2", TRUE), role("a-01", TRUE)),
        group(without_template(templateRef={"name": "base"}, templatePatch={}), roleTemplates=TEMPLATES),
        group(role("a" * 20, TRUE), name="g" * 31),
        a(rolloutStrategy={"rollingUpdate": {"maxUnavailable": "0%", "maxSurge": 1}}),
        a(rolloutStrategy={"rollingUpdate": {"partition": 9}}),
        group(role("a", TRUE), podGroupPolicy={}),
        as_set(a(), replicas=0),
        as_set(a(), replicas=2**31 - 1),
    ],
)
def test_what_is_right_is_accepted(document: dict[str, Any]) -> None:
    assert problems(document) == []


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (RollingUpdate, {"maxUnavailable": "0%", "maxSurge": "1%"}, {"maxUnavailable": "0%", "maxSurge": 0}),
        (DisruptionBudget, {"minAvailable": 0}, {"minAvailable": 0, "maxUnavailable": 0}),
        (RolloutStrategy, {"rollbackOnFailure": False}, {"rollbackOnFailure": True}),
    ],
)
def test_rules_hold_and_fail(kind: type[Object], right: dict[str, Any], wrong: dict[str, Any]) -> None:
    for value, expected in ((right, []), (wrong, [kind.rules[0].message])):
        reading = Reading()
        reading.read(kind, value)
        assert [each.message for each in reading.problems] == expected


def test_the_operator_lets_fields_of_newer_pods_through() -> None:
    """Unknown fields below a pod template, wherever it is; not those of a role."""
    newer = {"container": {"newField": 1, "readinessProbe": {"newer": {}}}, "pod": {"newest": True}}
    patched = without_template(templateRef={"name": "base"}, templatePatch={"spec": {"newest": True}})
    patched["name"] = "b"
    document = group(role("a", TRUE, **newer), patched, roleTemplates=TEMPLATES)
    assert object_problems(document) == []
    assert len(problems(document)) == 3
    assert [str(each) for each in object_problems(a(newField=1))] == ["spec.roles[0].newField: unknown field"]


def test_a_sidecar_profile_may_bring_the_volume_that_is_mounted() -> None:
    mounting = {"container": {"volumeMounts": [{"name": "models", "mountPath": "/models"}]}}
    assert problems(a(**mounting)) == [
        "spec.roles[0].template.spec.containers[0].volumeMounts[0].name: no volume is called models"
    ]
    assert problems(a(**mounting, engineRuntimes=[{"profileName": "patio"}])) == []


def test_a_shared_template_needs_to_be_whole_only_once_it_is_patched() -> None:
    template = role("a", TRUE, container={"volumeMounts": [{"name": "models", "mountPath": "/models"}]})["template"]
    templates = [{"name": "base", "template": template}]
    patch = {"spec": {"volumes": [{"name": "models", "emptyDir": {}}]}}
    whole = without_template(templateRef={"name": "base"}, templatePatch=patch)
    assert problems(group(whole, roleTemplates=templates)) == []
    part = without_template(templateRef={"name": "base"}, templatePatch={})
    assert problems(group(part, roleTemplates=templates)) == [
        "spec.roles[0].template, patched.spec.containers[0].volumeMounts[0].name: no volume is called models"
    ]


def files(tmp_path: Path, *contents: str) -> list[str]:
    paths = [tmp_path / f"{number}.yaml" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    return [str(path) for path in paths]


def crossed(tmp_path: Path, *documents: dict[str, Any]) -> list[str]:
    found = check(files(tmp_path, *(text(each) for each in documents)))
    return [f"{Path(each.source).stem}: {problem}" for each in found for problem in each.problems]


def test_two_groups_that_would_share_a_workload(tmp_path: Path) -> None:
    first, second = group(role("c", TRUE), name="a-b"), group(role("b-c", TRUE), name="a")
    assert crossed(tmp_path, first, second) == [
        "1: spec.roles[0].name: a-b-c is what role c of a-b is called too; rename one of them"
    ]
    elsewhere = copy.deepcopy(second)
    elsewhere["metadata"]["namespace"] = "other"
    assert crossed(tmp_path, first, elsewhere) == []


def test_a_child_of_a_set_that_shares_a_workload_with_a_group(tmp_path: Path) -> None:
    children = as_set(group(role("c", TRUE)), replicas=2, name="a")
    assert crossed(tmp_path, children, group(role("1-c", TRUE), name="a")) == [
        "1: spec.roles[0].name: a-1-c is what role c of a-1 is called too; rename one of them"
    ]


def test_an_object_with_the_name_of_one_that_is_made(tmp_path: Path) -> None:
    taken = service("a", name="toy-a")
    assert crossed(tmp_path, a(), taken) == [
        "1: metadata.name: toy-a is the name of what role a of toy gets; choose another"
    ]
    assert crossed(tmp_path, a(), service("a", name="toy")) == []


def test_one_object_twice(tmp_path: Path) -> None:
    found = crossed(tmp_path, a(), a())
    assert len(found) == 1 and found[0].startswith("1: metadata.name: RoleBasedGroup toy is in ")


def test_an_adapter_without_its_role(tmp_path: Path) -> None:
    scaled = group(role("prefill", TRUE), scalingGroups=[{"name": "pd", "roles": {"prefill": 2}}])
    found = crossed(
        tmp_path, adapter("x", "toy", "prefil"), adapter("y", "toy", "pd"), adapter("z", "far", "q"), scaled
    )
    assert found == ["0: spec.scaleTargetRef.role: there is no role or scaling group prefil; did you mean prefill?"]


def test_a_service_without_its_role_or_its_port(tmp_path: Path) -> None:
    templates = [{"name": "base", "template": role("a", TRUE, container={"ports": HTTP})["template"]}]
    known = group(without_template(templateRef={"name": "base"}, templatePatch={}), roleTemplates=templates)
    elsewhere = service("b", name="elsewhere")
    elsewhere["metadata"]["namespace"] = "other"
    found = crossed(
        tmp_path,
        *(known, service("b"), service("a", name="typo", target="htpp")),
        *(service("a", name="right", target="http"), elsewhere),
    )
    assert found == [
        "1: spec.selector[rolebasedgroup.workloads.x-k8s.io/role]: there is no role b; there is: a",
        "2: spec.ports[0].targetPort: there is no container port htpp; did you mean http?",
    ]


def test_the_command_says_ok_for_each_document(capsys: pytest.CaptureFixture[str]) -> None:
    seed, claims = EXAMPLES / "seed" / "sglang_pd.yaml", EXAMPLES / "seed" / "llm-model.yaml"
    assert main(["validate", str(seed), str(claims), str(EVERY_FIELD)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok  {seed}: RoleBasedGroup sglang-pd",
        f"ok  {seed}: Service sglang-pd",
        f"--  {claims}: Secret oss-secret: not checked, no kind of workloads.x-k8s.io",
        f"--  {claims}: PersistentVolume llm-model: not checked, no kind of workloads.x-k8s.io",
        f"--  {claims}: PersistentVolumeClaim llm-model: not checked, no kind of workloads.x-k8s.io",
        f"ok  {EVERY_FIELD}: RoleBasedGroup full",
        f"ok  {EVERY_FIELD}: RoleBasedGroup volcano",
        f"ok  {EVERY_FIELD}: RoleBasedGroupScalingAdapter full-pd",
        f"ok  {EVERY_FIELD}: ClusterEngineRuntimeProfile patio",
    ]


def test_the_command_names_all_mistakes_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = a(replica=2, restartPolicy="Never")
    first, second = files(tmp_path, text(broken, service("a")), "just: text")
    assert main(["validate", first, second]) == 2
    out, err = capsys.readouterr()
    assert out == f"ok  {first}: Service toy\n"
    assert err.splitlines() == [
        "diptych: 3 mistakes:",
        f"  {first}: RoleBasedGroup toy: spec.roles[0].replica: unknown field; did you mean replicas?",
        f"  {first}: RoleBasedGroup toy: spec.roles[0].restartPolicy: invalid enum value 'Never'",
        f"  {second}: document 1: needs apiVersion and kind",
    ]


def test_a_broken_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = files(tmp_path, "a: [1", text(a(replicas=-1)))
    missing = str(tmp_path / "none.yaml")
    assert main(["validate", missing, first, second]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "diptych: 3 mistakes:",
        f"  {missing}: cannot read {missing}: No such file or directory",
        f"  {first}: the manifest is no valid YAML: line 1: expected ',' or ']', but got '<stream end>'",
        f"  {second}: RoleBasedGroup toy: spec.roles[0].replicas: expected int >= 0",
    ]


def test_no_image_is_a_note_for_kubernetes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo = str(EXAMPLES / "demo.yaml")
    assert main(["validate", demo]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok  {demo}: RoleBasedGroup demo",
        f"note  {demo}: RoleBasedGroup demo: no image for router/router, prefill/prefill, decode/decode:"
        " `diptych up` needs none, Kubernetes will refuse the pods",
        f"ok  {demo}: Service demo",
    ]
    leader = {"spec": {"containers": [{"name": "a", "image": "i"}]}}
    half = a(workload=LWS, leaderWorkerSet={"patchLeaderTemplate": leader})
    (file,) = files(tmp_path, text(as_set(half)))
    assert [each.note.split(":")[0] for each in check([file])] == ["no image for a/a"]


def test_a_field_that_kubernetes_does_not_offer(tmp_path: Path) -> None:
    env = [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "status.podIQ"}}}]
    assert crossed(tmp_path, a(env=env)) == [
        "0: spec.roles[0].template.spec.containers[0].env[1].valueFrom.fieldRef.fieldPath:"
        " there is no field status.podIQ; did you mean status.podIP?"
    ]
    env = [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}]
    assert crossed(tmp_path, a(env=env)) == []


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, comment = files(tmp_path, "", "# later\n---\n")
    assert main(["validate", empty, comment]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "diptych: 2 mistakes:",
        f"  {empty}: there is nothing in it; it needs at least one object, with apiVersion and kind",
        f"  {comment}: there is nothing in it; it needs at least one object, with apiVersion and kind",
    ]


def test_the_command_prints_the_definitions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crds"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == crds()
