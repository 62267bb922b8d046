"""From a parsed YAML document to msgspec structs, with errors that name the field.

msgspec alone says `$.spec.roles[...].name`; a person with a manifest of 300 lines needs `spec.roles[1].name`, all the
mistakes at once, and a hint at the field they meant. Leaf values are still checked by msgspec, so constraints live in
the struct definitions (`Annotated[int, Meta(ge=0)]`), which a schema generator can read too.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta
from msgspec.structs import FieldInfo

T = TypeVar("T")


def field_names(text: str) -> frozenset[str]:
    """Names of fields, written as one text with blanks between them."""
    return frozenset(text.split())


class Rule(msgspec.Struct, frozen=True):
    """What several fields of one object must fulfil together, twice: in CEL for the API server, and in Python.

    `holds` takes the object. `message` says what to change.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


class Object(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A manifest object.

    `other_fields`: names that Kubernetes knows and this struct does not model. `cluster_fields`: modelled names that
    mean nothing to processes on one machine. `outline`: if set, the only fields that the custom resource's schema
    describes; all others pass through it unread.
    """

    other_fields: ClassVar[frozenset[str]] = frozenset()
    cluster_fields: ClassVar[frozenset[str]] = frozenset()
    outline: ClassVar[frozenset[str] | None] = None
    rules: ClassVar[tuple[Rule, ...]] = ()


@cache
def fields_of(kind: type[Object]) -> dict[str, FieldInfo]:
    """The fields of a struct by the names they have in manifests; looking them up anew would take most of the time."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def keyed(*names: str) -> Meta:
    """A list whose items have a unique value of these fields (Kubernetes' listType map)."""
    return Meta(extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(names)})


def metas(kind: Any) -> list[Meta]:
    """Everything that a type's annotations say about it."""
    return [each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Meta)]


def list_keys(kind: Any) -> list[str]:
    """The fields that `keyed` names; empty if items may repeat."""
    extras = [each.extra_json_schema or {} for each in metas(kind)]
    return next((each["x-kubernetes-list-map-keys"] for each in extras if "x-kubernetes-list-map-keys" in each), [])


class Problem(msgspec.Struct, frozen=True):
    """What is wrong with one field."""

    path: str
    message: str

    def __str__(self) -> str:
        path = self.path.removesuffix(": ")
        return f"{path}: {self.message}" if path else self.message


class Reading:
    """What reading a document found besides the object: problems, and fields without a meaning on one machine.

    `label` goes before each path, to tell documents of one file apart. With `open_pods` unknown fields below an
    `outline` object are no mistakes: a cluster may know more fields of a pod than this program.
    """

    def __init__(self, label: str = "", *, open_pods: bool = False) -> None:
        self.label = label
        self._open_pods = open_pods
        self._outlines = 0  # how many outline objects are around the one that is being read
        self.problems: list[Problem] = []
        self.unmodelled: list[tuple[str, str]] = []  # (path of the object, field name)

    def problem(self, path: str, message: str) -> None:
        self.problems.append(Problem(self.label + path, message))

    def add(self, problems: Iterable[Problem]) -> None:
        for each in problems:
            self.problem(each.path, each.message)

    def read(self, kind: type[T], value: Any, path: str = "") -> T | None:
        """`value` as `kind`. Mistakes go to `problems`; the object is None if it cannot be built."""
        before = len(self.problems)
        result = self._read(kind, value, path)
        return result if len(self.problems) == before else None

    def _read(self, kind: Any, value: Any, path: str) -> Any:
        plain = _unannotated(kind)
        if value is None and _optional(plain):
            return None
        plain = _without_none(plain)
        if isinstance(plain, type) and issubclass(plain, Object):
            return self._read_object(plain, value, path)
        if get_origin(plain) is tuple and _holds_object(item := get_args(plain)[0]):
            return self._read_list(kind, item, value, path)
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            self.problem(path, _sentence(error))
            return None

    def _read_list(self, kind: Any, item: Any, value: Any, path: str) -> Any:
        try:
            limits = getattr(kind, "__metadata__", ())
            msgspec.convert(value, Annotated[list[Any], *limits] if limits else list[Any])
        except msgspec.ValidationError as error:
            self.problem(path, _sentence(error))
            return None
        items = tuple(self._read(item, each, f"{path}[{i}]") for i, each in enumerate(value))
        if keys := list_keys(kind):
            self._check_keys(items, keys, path)
        return items

    def _check_keys(self, items: tuple[Object | None, ...], keys: list[str], path: str) -> None:
        seen = []
        for i, item in enumerate(items):
            if item is None:
                continue
            key = tuple(getattr(item, fields_of(type(item))[each].name) for each in keys)
            if key in seen:
                value = "/".join(str(each) for each in key)
                self.problem(f"{path}[{i}].{keys[0]}", f"{value} is already used")
            seen.append(key)

    def _read_object(self, kind: type[Object], value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            self.problem(path, f"expected an object, got {_type_name(value)}")
            return None
        self._outlines += kind.outline is not None
        try:
            return self._read_fields(kind, value, path)
        finally:
            self._outlines -= kind.outline is not None

    def _read_fields(self, kind: type[Object], value: dict[Any, Any], path: str) -> Any:
        fields = fields_of(kind)
        for name in value:
            if name in kind.other_fields or (name in kind.cluster_fields and value[name] is not None):
                self.unmodelled.append((path, str(name)))
            elif name not in fields and not (self._open_pods and self._outlines):
                self.problem(_join(path, name), _unknown(name, [*fields, *kind.other_fields]))
        read: dict[str, Any] = {}
        before = len(self.problems)
        for name, field in fields.items():
            if value.get(name) is None:  # an explicit null means the default, as on Kubernetes
                if field.required:
                    self.problem(_join(path, name), "is required")
                continue
            read[field.name] = self._read(field.type, value[name], _join(path, name))
        if len(self.problems) > before:
            return None
        result = kind(**read)
        for rule in kind.rules:
            if not rule.holds(result):
                self.problem(path, rule.message)
        return result


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _unannotated(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _without_none(kind: Any) -> Any:
    rest = [each for each in get_args(kind) if each is not type(None)]
    return _unannotated(rest[0]) if _optional(kind) and len(rest) == 1 else kind


def _holds_object(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Object)


def _type_name(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number"}.get(
        type(value), type(value).__name__
    )


def _unknown(name: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return "unknown field" + (f"; did you mean {close[0]}?" if close else "")


def _sentence(error: msgspec.ValidationError) -> str:
    """msgspec's message without its own path, which the caller knows better."""
    text = str(error).split(" - at ")[0].replace("`", "")
    return text[:1].lower() + text[1:]
