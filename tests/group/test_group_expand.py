"""`$(VAR)` and fieldRef, as the kubelet does them."""

from __future__ import annotations

import pytest

from diptych.errors import ConfigError
from diptych.group.expand import PodFacts, argv, container_environment, expand, field_value
from diptych.group.pod import Container, EnvSource, EnvVar, FieldRef

FACTS = PodFacts(
    group="g",
    role="r",
    index=3,
    name="g-r-3",
    namespace="prod",
    uid="u-1",
    ip="127.77.1.4",
    node="here",
    labels={"apps.kubernetes.io/pod-index": "3"},
    annotations={"note": "hello"},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "one"),
        ("x$(A)y$(B)z", "xoney$(A)z"),  # values are not expanded again
        ("$(MISSING)", "$(MISSING)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$one"),
        ("$$$$(A)", "$$(A)"),
        ("$A ${A} $", "$A ${A} $"),
        ("$(A", "$(A"),
        ("$()", "$()"),
        ("$(A)$(A)", "oneone"),
    ],
)
def test_references(text: str, expected: str) -> None:
    assert expand(text, {"A": "one", "B": "$(A)"}) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metadata.name", "g-r-3"),
        ("metadata.namespace", "prod"),
        ("metadata.uid", "u-1"),
        ("status.podIP", "127.77.1.4"),
        ("spec.nodeName", "here"),
        ("metadata.labels['apps.kubernetes.io/pod-index']", "3"),
        ("metadata.annotations['note']", "hello"),
        ("metadata.labels['missing']", ""),
    ],
)
def test_field_references(path: str, expected: str) -> None:
    assert field_value(path, FACTS) == expected


def test_an_unknown_field_reference_is_named() -> None:
    with pytest.raises(ConfigError, match=r"status\.phase is unknown"):
        field_value("status.phase", FACTS)


def test_environment_and_command() -> None:
    container = Container(
        name="c",
        command=("serve", "--host", "$(POD_IP)"),
        args=("--name", "$(WHO)", "$$(WHO)"),
        env=(
            EnvVar(name="EARLY", value="$(LATE)"),  # not defined yet: stays
            EnvVar(name="POD_IP", value_from=EnvSource(field_ref=FieldRef(field_path="status.podIP"))),
            EnvVar(name="WHO", value="$(ROLE_NAME)-$(ROLE_INDEX)@$(POD_IP)"),
            EnvVar(name="LATE", value="late"),
            EnvVar(name="GROUP_NAME", value="mine"),  # the group's own names win
            EnvVar(name="EMPTY"),
        ),
    )
    variables = container_environment(container, FACTS)
    assert variables == {
        "GROUP_NAME": "g",
        "ROLE_NAME": "r",
        "ROLE_INDEX": "3",
        "EARLY": "$(LATE)",
        "POD_IP": "127.77.1.4",
        "WHO": "r-3@127.77.1.4",
        "LATE": "late",
        "EMPTY": "",
    }
    assert argv(container, variables) == ["serve", "--host", "127.77.1.4", "--name", "r-3@127.77.1.4", "$(WHO)"]
