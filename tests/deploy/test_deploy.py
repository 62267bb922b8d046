"""What deploy/ ships: objects pass Kubernetes' own schemas, the definitions are today's, the role is just enough."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from diptych.config import parse_server_args
from diptych.group.crds import crds_yaml
from diptych.group.operator.template import pod_template
from diptych.group.resolve import resolve_spec
from diptych.group.validate import check
from diptych.router.config import parse_router_args

sys.path.insert(0, str(Path("tests/operator")))
from kube_world import World, group, role, until

OPERATOR = Path("deploy/operator")
EVERYWHERE = Path("deploy/operator-all-namespaces")
FILES = sorted([*OPERATOR.glob("*.yaml"), EVERYWHERE / "binding.yaml"])
GROUPS = [Path("deploy/qwen3-32b/qwen3-32b.yaml"), Path("deploy/demo/demo.yaml")]
OURS = ("workloads.x-k8s.io/", "monitoring.coreos.com/", "kustomize.config.k8s.io/")


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


@pytest.mark.parametrize("path", [*FILES, *GROUPS], ids=str)
def test_every_object_passes_the_schemas_of_kubernetes(path: Path) -> None:
    for each in documents(path):
        if not each["apiVersion"].startswith(OURS):
            kubernetes_validate.validate(each, "1.33", strict=True)


def test_our_own_manifests_are_valid() -> None:
    checked = check([str(path) for path in GROUPS])
    assert [each.problems for each in checked] == [[]] * 4


def test_the_definitions_are_todays() -> None:
    assert (OPERATOR / "crds.yaml").read_text() == crds_yaml(), "run: diptych crds > deploy/operator/crds.yaml"


def test_kustomizations_name_files_that_are_there_and_contain_no_base_of_theirs() -> None:
    """kustomize refuses a base that is a parent folder of what names it."""
    found = list(Path("deploy").rglob("kustomization.yaml"))
    assert len(found) == 3
    for path in found:
        for name in documents(path)[0]["resources"]:
            base = (path.parent / name).resolve()
            assert base.exists() and base not in path.resolve().parents, f"{path}: {name}"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kustomize comes with kubectl")
@pytest.mark.parametrize("namespace", ["diptych", "elsewhere"])
def test_the_operator_for_all_namespaces_is_built_and_its_rights_are_its_accounts(
    tmp_path: Path, namespace: str
) -> None:
    """Also when the base's namespace is changed, as its comment says one may."""
    shutil.copytree("deploy", tmp_path / "deploy")
    base = tmp_path / OPERATOR / "kustomization.yaml"
    base.write_text(base.read_text().replace("\nnamespace: diptych\n", f"\nnamespace: {namespace}\n"))
    command = ["kubectl", "kustomize", str(tmp_path / EVERYWHERE)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    objects = list(yaml.safe_load_all(built))
    found = {each["kind"]: each for each in objects}
    names = [(each["kind"], each["metadata"]["name"]) for each in objects if "Role" in each["kind"]]
    assert sorted(names) == [
        ("ClusterRole", "diptych-operator"),
        ("ClusterRoleBinding", "diptych-operator"),
        ("Role", "diptych-operator-lease"),
        ("RoleBinding", "diptych-operator-lease"),
    ]
    assert found["Role"]["metadata"]["namespace"] == found["RoleBinding"]["metadata"]["namespace"] == namespace
    assert found["RoleBinding"]["subjects"] == found["ClusterRoleBinding"]["subjects"]
    assert [rule["resources"] for rule in found["Role"]["rules"]] == [["leases"]]
    assert found["Namespace"]["metadata"]["name"] == found["ServiceAccount"]["metadata"]["namespace"] == namespace
    account = {"kind": "ServiceAccount", "name": "diptych-operator", "namespace": namespace}
    assert found["ClusterRoleBinding"]["subjects"] == [account]
    assert found["ClusterRoleBinding"]["roleRef"]["kind"] == "ClusterRole"
    assert "namespace" not in found["ClusterRole"]["metadata"]
    resources = {name for rule in found["ClusterRole"]["rules"] for name in rule["resources"]}
    assert {"clusterengineruntimeprofiles", "statefulsets"} <= resources and "leases" not in resources
    assert "--all-namespaces" in found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]


def test_the_operator_image_installs_what_is_tested() -> None:
    pins = dict(
        line.partition(";")[0].strip().split("==")
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in lines(Path(name))
        if "==" in line
    )
    for line in lines(Path("deploy/requirements-operator.txt")):
        name, version = line.split("==")
        assert pins[name] == version, name


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r"))]


def test_containers_are_restricted() -> None:
    deployment = next(each for each in documents(OPERATOR / "deployment.yaml") if each["kind"] == "Deployment")
    templates = [deployment["spec"]["template"]]
    for group_ in (documents(path)[0]["spec"] for path in GROUPS):
        templates += [group_["roles"][0]["template"], group_["roleTemplates"][0]["template"]]
    for template in templates:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_a_pod_of_ours_has_time_to_end_its_requests(path: Path) -> None:
    """The kubelet's patience is longer than ours, with some seconds to spare."""
    made = documents(path)[0]
    made["metadata"]["namespace"] = "default"
    for each in resolve_spec(made["spec"])["roles"]:
        spec = pod_template(made, each, each["template"], {}, indexed=True)["spec"]
        container = spec["containers"][0]
        if each["name"] == "router":
            config = parse_router_args(container["args"][1:])
            drain_s = config.shutdown_delay_secs + config.shutdown_grace_period_secs
        else:
            drain_s = parse_server_args(container["args"][1:]).drain_timeout
            assert container["lifecycle"] == {"preStop": {"httpGet": {"path": "/drain", "port": "http"}}}
        assert drain_s + 10 <= spec["terminationGracePeriodSeconds"]


def test_the_role_allows_what_the_operator_does_and_names_no_secrets(tmp_path: Path) -> None:
    """A busy life of groups, sets and adapters: every request that was answered is in the roles, and the one of the
    operator's own namespace is used by the election alone."""
    everywhere, own = (allowed_by(each) for each in documents(OPERATOR / "role.yaml") if each["kind"] == "Role")
    assert not everywhere & own
    allowed = everywhere | own
    assert not any("*" in each for each in allowed)
    assert not {r for _, r, _ in allowed} & {"secrets", "pods/exec", "serviceaccounts", "roles"}
    world = World(tmp_path)
    try:
        mark = world.server.record.mark()
        world.start(elect=True)
        busy = role("a", 2, podDisruptionBudget={"maxUnavailable": 1}, scalingAdapter={"enable": True})
        deployment = role("c", workload={"apiVersion": "apps/v1", "kind": "Deployment"})
        policy = {"kubeScheduling": {"scheduleTimeoutSeconds": 30}}
        world.create(group("g", busy, role("b", dependencies=["a"]), deployment, podGroupPolicy=policy))
        world.wait_ready("g")
        world.edit("g", lambda each: each["spec"]["roles"].pop(0) and each["spec"]["roles"][0].pop("dependencies"))
        until(lambda: world.names("StatefulSet") == ["g-b"], "a is gone")
        world.wait_ready("g")
        used = set()
        for each in world.server.record.requests(mark):
            if each.manager or each.verb in ("get", "list", "watch", "delete"):
                used |= needed(world, each)
        assert used - allowed == {
            ("workloads.x-k8s.io", "clusterengineruntimeprofiles", verb) for verb in ("list", "watch")
        }
        assert used & own == {("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")} == own
    finally:
        world.close()


def allowed_by(role_: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {
        (group_, resource, verb)
        for rule in role_["rules"]
        for group_ in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed(world: World, request: Any) -> set[tuple[str, str, str]]:
    """What RBAC asks for: an apply is a patch, and a create if the object is new."""
    kind = world.cluster.kinds.find(request.kind)
    resource = f"{kind.plural}/{request.subresource}" if request.subresource else kind.plural
    verbs = {"apply": ("patch", "create")}.get(request.verb, (request.verb,))
    if request.subresource:
        verbs = tuple(verb for verb in verbs if verb != "create")
    return {(kind.group, resource, verb) for verb in verbs}
