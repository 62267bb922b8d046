"""Label and field selectors: from their text and from LabelSelector objects to predicates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from diptych.testing.kube.status import Obj, bad_request

Labels = Mapping[str, str]
LabelTest = Callable[[Labels], bool]

_KEY = r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?"
_SET = re.compile(rf"^(?P<key>{_KEY})\s+(?P<op>in|notin)\s+\((?P<values>[^)]*)\)$")
_EQUAL = re.compile(rf"^(?P<key>{_KEY})\s*(?P<op>==|=|!=)\s*(?P<value>[A-Za-z0-9._-]*)$")
_EXISTS = re.compile(rf"^(?P<not>!?)\s*(?P<key>{_KEY})$")


def _split(text: str) -> list[str]:
    """At commas outside of parentheses."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _term(text: str) -> LabelTest:
    if match := _SET.match(text):
        key, values = match["key"], {value.strip() for value in match["values"].split(",")}
        if match["op"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := _EQUAL.match(text):
        key, value = match["key"], match["value"].strip()
        if match["op"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if match := _EXISTS.match(text):
        key, absent = match["key"], bool(match["not"])
        return lambda labels: (key in labels) != absent
    raise bad_request(f"unable to parse requirement: {text!r} is no label selector")


def label_selector(text: str) -> LabelTest:
    """`a=b,c in (d,e),!f` as a predicate on labels. Raises 400."""
    terms = [_term(part) for part in _split(text)]
    return lambda labels: all(term(labels) for term in terms)


def field_selector(text: str, known: Sequence[str]) -> Callable[[Obj], bool]:
    """`metadata.name=a,status.phase!=Running` as a predicate on objects. Raises 400, also for fields not `known`."""
    terms = []
    for part in _split(text):
        match = re.match(r"^([A-Za-z.]+)(==|=|!=)(.*)$", part)
        if not match:
            raise bad_request(f"invalid field selector {part!r}")
        if match[1] not in known:
            only = ", ".join(f'"{each}"' for each in known)
            raise bad_request(f'"{match[1]}" is not a known field selector: only {only}')
        terms.append((match[1].split("."), match[2] != "!=", match[3]))
    return lambda obj: all((_text_at(obj, path) == value) == wanted for path, wanted, value in terms)


def _text_at(obj: Obj, path: list[str]) -> str:
    for key in path:
        obj = obj.get(key, {}) if isinstance(obj, dict) else {}
    return "" if obj == {} else str(obj)


def matches(selector: Obj, labels: Labels) -> bool:
    """A LabelSelector object (matchLabels, matchExpressions); an empty one matches everything."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    return all(_expression(term, labels) for term in selector.get("matchExpressions", []))


def _expression(term: Obj, labels: Labels) -> bool:
    value, values = labels.get(term["key"]), term.get("values", [])
    operator = term["operator"]
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    return (value is not None) == (operator == "Exists")


def selector_text(selector: Obj) -> str:
    """A LabelSelector's text, as scale subresources show it."""
    parts = [f"{key}={value}" for key, value in sorted(selector.get("matchLabels", {}).items())]
    for term in selector.get("matchExpressions", []):
        operator, values = term["operator"], ",".join(term.get("values", []))
        texts = {"In": f"{term['key']} in ({values})", "NotIn": f"{term['key']} notin ({values})"}
        parts.append(texts.get(operator, term["key"] if operator == "Exists" else f"!{term['key']}"))
    return ",".join(parts)
