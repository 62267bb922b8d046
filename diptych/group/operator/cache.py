"""Copies of one kind's objects, with the two ways in which reconcilers look for them. Thread-safe.

Objects are kept as JSON text without `managedFields`: a tenth of the memory of dictionaries.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import msgspec

from diptych.group import names
from diptych.group.operator.resources import Json, Kind, key_of
from diptych.group.operator.takeover import is_upstreams

GROUP_LABEL = f"{names.PREFIX}/name"
MAX_DELETED = 1024  # deleted objects whose last version is remembered

Key = tuple[str, str]
OnChange = Callable[[Json], None]


class Cache:
    """Of `kind`. `on_change` gets each object that was added, changed or deleted, from the thread that told of it.

    What happens arrives twice, as the answer to a write of ours and from the watch; whichever comes late is ignored.
    """

    def __init__(self, kind: Kind, on_change: OnChange) -> None:
        self.kind = kind
        self._on_change = on_change
        self._lock = threading.Lock()
        self._objects: dict[Key, bytes] = {}
        self._versions: dict[Key, str] = {}
        self._groups = _Index()  # by (namespace, group) of the group's label
        self._owners = _Index()  # by the uid of the controlling owner
        self._upstreams: set[Key] = set()  # of which the upstream controller owns fields
        self._deleted: OrderedDict[Key, str] = OrderedDict()  # when, lately
        self._listing: set[Key] | None = None  # what was told of since a list was asked for

    # ---- reading ----

    def get(self, namespace: str, name: str) -> Json | None:
        with self._lock:
            text = self._objects.get((namespace, name))
        return None if text is None else dict(msgspec.json.decode(text))

    def has(self, namespace: str, name: str) -> bool:
        with self._lock:
            return (namespace, name) in self._objects

    def is_upstreams(self, namespace: str, name: str) -> bool:
        """Whether the upstream controller owns fields of the object."""
        with self._lock:
            return (namespace, name) in self._upstreams

    def of_group(self, namespace: str, group: str) -> list[Json]:
        """The objects with this group's label."""
        return self._select(self._groups, (namespace, group))

    def owned(self, uid: str) -> list[Json]:
        """The objects whose controller is the object `uid`."""
        return self._select(self._owners, uid)

    def all_keys(self) -> list[Key]:
        with self._lock:
            return list(self._objects)

    def _select(self, index: _Index, value: Hashable) -> list[Json]:
        with self._lock:
            texts = [self._objects[key] for key in index.keys_of(value)]
        return [msgspec.json.decode(text) for text in texts]

    # ---- following ----

    def put(self, obj: Json) -> None:
        """The object is so now, unless something later is known of it."""
        key, version = key_of(obj), obj["metadata"]["resourceVersion"]
        with self._lock:
            known = self._versions.get(key) or self._deleted.get(key)
            if known == version or (known is not None and _newer(known, version)):
                return
            if self._listing is not None:
                self._listing.add(key)
            self._set(key, obj)
        self._on_change(obj)

    def drop(self, key: Key, version: str) -> None:
        """The object was deleted at `version`, unless another of its name was made since."""
        with self._lock:
            known = self._versions.get(key)
            if known is not None and _newer(known, version):
                return
            if self._listing is not None:
                self._listing.add(key)
            text = self._remove(key, version)
        if text is not None:
            self._on_change(msgspec.json.decode(text))

    def begin_list(self) -> None:
        """A list is asked for: what is told of from here on is later than it."""
        with self._lock:
            self._listing = set()

    def replace(self, items: list[Json], version: str) -> None:
        """These are all objects, as of `version`; what else there was is gone. Whatever was known before counts no
        more: versions go back when a cluster is restored from a backup."""
        found = {key_of(item): item for item in items}
        changed: list[Json] = []
        with self._lock:
            later, self._listing = self._listing or set(), None
            for key, item in found.items():
                if key not in later and self._versions.get(key) != item["metadata"]["resourceVersion"]:
                    self._set(key, item)
                    changed.append(item)
            for key in self._objects.keys() - found.keys() - later:
                text = self._remove(key, version)
                changed += [msgspec.json.decode(text)] if text else []
        for obj in changed:
            self._on_change(obj)

    def _set(self, key: Key, obj: Json) -> None:
        self._upstreams.discard(key)
        if is_upstreams(obj["metadata"].pop("managedFields", None)):
            self._upstreams.add(key)
        self._deleted.pop(key, None)
        self._objects[key] = msgspec.json.encode(obj)
        self._versions[key] = obj["metadata"]["resourceVersion"]
        group = (obj["metadata"].get("labels") or {}).get(GROUP_LABEL)
        self._groups.set(key, (key[0], group) if group else None)
        self._owners.set(key, controller_of(obj).get("uid"))

    def _remove(self, key: Key, version: str) -> bytes | None:
        text = self._objects.pop(key, None)
        self._versions.pop(key, None)
        self._groups.set(key, None)
        self._owners.set(key, None)
        self._upstreams.discard(key)
        self._deleted[key] = version
        self._deleted.move_to_end(key)
        while len(self._deleted) > MAX_DELETED:
            self._deleted.popitem(last=False)
        return text


class _Index:
    """Keys by one value each has."""

    def __init__(self) -> None:
        self._value: dict[Key, Hashable] = {}
        self._keys: dict[Hashable, dict[Key, None]] = {}

    def set(self, key: Key, value: Hashable | None) -> None:
        """`key` has this value from now on; None: no value."""
        old = self._value.get(key)
        if old == value:
            return
        if old is not None:
            del self._value[key]
            del self._keys[old][key]
            if not self._keys[old]:
                del self._keys[old]
        if value is not None:
            self._value[key] = value
            self._keys.setdefault(value, {})[key] = None

    def keys_of(self, value: Hashable) -> list[Key]:
        return list(self._keys.get(value, ()))


def controller_of(obj: Json) -> Json:
    """The owner reference of the object's controller; empty if it has none."""
    owners = obj["metadata"].get("ownerReferences") or []
    return next((each for each in owners if each.get("controller")), {})


def _newer(one: str, two: str) -> bool:
    """Whether resource version `one` is later than `two`. They are numbers that grow (KEP-5504); if a server has
    others, what is told last counts."""
    return one.isdigit() and two.isdigit() and int(one) > int(two)
