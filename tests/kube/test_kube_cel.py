"""The part of CEL that rules of definitions are written in, and what an API server does with rules."""

from __future__ import annotations

from typing import Any

import pytest

from diptych.testing.kube import ApiError, Cluster
from diptych.testing.kube.cel import CelError, compiled

SELF: dict[str, Any] = {"n": 2, "s": "it's", "b": True, "l": [1, 2, 3], "m": {"k": {"v": 1}}, "none": []}


def value(text: str) -> Any:
    return compiled(text)({"self": SELF})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1 + 2 == 3 && 'a' + \"b\" == 'ab'", True),
        ("[1] + [2] == [1, 2]", True),
        ("self.n == '2'", False),  # never equal across types
        ("self.b == 1", False),
        ("self.s == 'it\\'s'", True),
        ("!self.b || self.n >= 2", True),
        ("!(self.n < 2) && self.n != 3 && -self.n < 0", True),
        ("self.n in [1, 2]", True),
        ("'2' in self.l", False),
        ("self.l[0] + self.m['k'].v", 2),
        ("has(self.m.k) && !has(self.m.x)", True),
        ("has(self.m.k.v)", True),
        ("type(self.n) == int ? self.n == 2 : self.n == '2'", True),
        ("type(self.s) == int ? 1 : type(self.s) == string ? 2 : 3", 2),
        ("size(self.l) == 3 && size(self.s) == 4", True),
        ("self.l.all(x, x > 0) && self.l.exists(x, x == 3) && self.none.all(x, false)", True),
        ("self.l.all(x, self.l.exists(y, y == x))", True),
        ("true || self.x", True),  # what decides makes errors unimportant, on either side
        ("self.x == 1 || true", True),
        ("false && self.x == 1", False),
        ("self.x == 1 && false", False),
    ],
)
def test_expressions(text: str, wanted: Any) -> None:
    found = value(text)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    "text",
    ["", "1 +", "(1", "self.n == 1 2", "self.l.map(x, x)", "matches('a')", "has(self)", "self.", "1 ~ 2", "has(1)"],
)
def test_what_is_no_expression_of_this_part_is_refused(text: str) -> None:
    with pytest.raises(CelError):
        compiled(text)


@pytest.mark.parametrize(
    "text", ["self.x", "other", "self.n < '3'", "self.n + 'a'", "self.l[3]", "self.x || false", "true + true"]
)
def test_errors_of_values(text: str) -> None:
    with pytest.raises(CelError):
        value(text)


def definition(rule: str) -> dict[str, Any]:
    spec = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}, "t": {"type": "array", "items": {"type": "string"}}},
        "x-kubernetes-validations": [{"rule": rule, "message": "n must be even"}],
    }
    schema = {"type": "object", "properties": {"spec": spec}}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.com"},
        "spec": {
            "group": "example.com",
            "names": {"kind": "Thing", "plural": "things"},
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def thing(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": spec}


def test_rules_are_asked_of_objects_of_the_right_shape() -> None:
    cluster = Cluster(clock="manual")
    cluster.create(definition("self.n in [2, 4]"))
    cluster.create(thing(n=2))
    for bad, text in (
        (thing(n=3), "spec: Invalid value: n must be even"),
        (thing(n=10), "body should be less than or equal to 9, spec: Invalid value: n must be even]"),
        (thing(), 'spec: Invalid value: "object": no such key: n evaluating rule: n must be even'),
        (thing(n=3, t=[1]), "correct the existing errors to complete validation]"),
    ):
        with pytest.raises(ApiError) as refused:
            cluster.create({**bad, "metadata": {"name": "b"}})
        assert refused.value.code == 422 and refused.value.message.endswith(text)
        assert ("must be even" in text) == ("must be even" in refused.value.message)


def test_a_definition_with_a_rule_that_is_none_is_refused() -> None:
    with pytest.raises(ApiError, match=r"spec\.versions\[0\]\.schema"):
        Cluster(clock="manual").create(definition("self.n =="))
