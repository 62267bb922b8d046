"""Environment variables and `$(VAR)` references, as the kubelet resolves them. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec

from diptych.errors import ConfigError
from diptych.group.pod import Container, EnvVar

_REFERENCE = re.compile(r"\$\$|\$\(([^)]*)\)")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class PodFacts(msgspec.Struct, frozen=True):
    """What a pod may ask about itself through fieldRef."""

    group: str
    role: str
    index: int
    name: str
    namespace: str
    uid: str
    ip: str
    node: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` becomes the variable's value; an unknown one stays as it is; `$$` is a literal `$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)


FIELDS: dict[str, Callable[[PodFacts], str]] = {
    "metadata.name": lambda facts: facts.name,
    "metadata.namespace": lambda facts: facts.namespace,
    "metadata.uid": lambda facts: facts.uid,
    "spec.nodeName": lambda facts: facts.node,
    "spec.serviceAccountName": lambda _: "default",
    "status.hostIP": lambda _: "127.0.0.1",
    "status.hostIPs": lambda _: "127.0.0.1",
    "status.podIP": lambda facts: facts.ip,
    "status.podIPs": lambda facts: facts.ip,
}


def is_field(path: str) -> bool:
    """Whether Kubernetes offers this path to a variable's fieldRef."""
    return path in FIELDS or _SUBSCRIPT.fullmatch(path) is not None


def field_value(path: str, facts: PodFacts) -> str:
    """The value of a fieldRef. Raises ConfigError unless `is_field`."""
    if path in FIELDS:
        return FIELDS[path](facts)
    found = _SUBSCRIPT.fullmatch(path)
    if found:
        return (facts.labels if found[1] == "labels" else facts.annotations).get(found[2], "")
    raise ConfigError(f"fieldPath {path} is unknown; known: {', '.join(FIELDS)}, metadata.labels['…']")


def container_environment(container: Container, facts: PodFacts) -> dict[str, str]:
    """The variables the manifest gives this container, the group's own first.

    A value may refer to variables defined before it. The group's names cannot be overridden, as with RoleBasedGroup.
    """
    own = {"GROUP_NAME": facts.group, "ROLE_NAME": facts.role, "ROLE_INDEX": str(facts.index)}
    variables = dict(own)
    for each in container.env:
        if each.name not in own:
            variables[each.name] = _value(each, variables, facts)
    return variables


def _value(variable: EnvVar, earlier: Mapping[str, str], facts: PodFacts) -> str:
    if variable.value_from is not None and variable.value_from.field_ref is not None:
        return field_value(variable.value_from.field_ref.field_path, facts)
    return expand(variable.value or "", earlier)


def argv(container: Container, variables: Mapping[str, str]) -> list[str]:
    """The command line: command and args with their references resolved."""
    return [expand(each, variables) for each in (*container.command, *container.args)]
