"""The verbs of the API on objects in memory; HTTP and the simulated controllers both come through here.

Every method is atomic (one lock), returns objects that the caller may change, and raises ApiError. `kind` is a Kind
or its name (`Pod`, `apps/v1/StatefulSet`); `namespace` is "" for cluster-scoped kinds.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from diptych.testing.kube import admission, apply, crds, defaults, deletion, managed
from diptych.testing.kube.clock import Clock
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.identity import check_identity, declaration
from diptych.testing.kube.kinds import Kind, Kinds
from diptych.testing.kube.managed import Manager
from diptych.testing.kube.patch import json_patch, merge_patch, strategic_patch
from diptych.testing.kube.selectors import field_selector, label_selector
from diptych.testing.kube.shapes import shape_of
from diptych.testing.kube.status import (
    Obj,
    already_exists,
    bad_request,
    forbidden,
    invalid,
    method_not_allowed,
    not_found,
    success,
    unsupported_media_type,
)
from diptych.testing.kube.store import Store, copy

Objects = list[Obj]  # inside the class, `list` is the verb
CONTROLLER = "kube-controller-manager"
_CUSTOM_PATCHES = ("application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml")


@dataclass(frozen=True)
class Page:
    """Of a list: objects, the revision they are of, and where the next page starts (None: this was the last)."""

    items: list[Obj]
    revision: int
    after: tuple[str, str] | None = None
    remaining: int = 0


class Api:
    def __init__(self, store: Store, kinds: Kinds, clock: Clock, lock: threading.RLock, gates: frozenset[str]) -> None:
        self.store, self.kinds, self.clock, self.lock, self.gates = store, kinds, clock, lock, gates
        self._names = 0

    # reads

    def get(self, kind: str | Kind, namespace: str, name: str) -> Obj:
        with self.lock:
            found = self.kinds.find(kind)
            return self._shown(found, copy(self._live(found, namespace, name)))

    def list(
        self,
        kind: str | Kind,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
        limit: int = 0,
        after: tuple[str, str] | None = None,
        revision: int | None = None,
    ) -> Page:
        """Sorted by namespace and name. `after` and `revision` continue an earlier page. Raises 410 if that is gone."""
        with self.lock:
            found = self.kinds.find(kind)
            has_labels, has_fields = label_selector(labels), field_selector(fields, found.fields)
            objects = self.store.at(found.key, revision if revision is not None else self.store.revision)
            keys = sorted(key for key in objects if namespace in (None, key[0]) and (after is None or key > after))
            chosen = []
            for key in keys:
                obj = objects[key]
                if has_labels(obj["metadata"].get("labels", {})) and has_fields(obj):
                    chosen.append(obj)
            page = chosen[:limit] if limit else chosen
            rest = len(chosen) - len(page)
            last = page[-1]["metadata"] if rest else None
            return Page(
                [self._shown(found, copy(obj)) for obj in page],
                revision if revision is not None else self.store.revision,
                (last.get("namespace", ""), last["name"]) if last else None,
                rest,
            )

    # writes

    def create(
        self, kind: str | Kind, namespace: str, body: Obj, *, manager: str = "test", dry_run: bool = False
    ) -> Obj:
        with self.lock:
            found = self.kinds.find(kind)
            obj = self._new(found, namespace, admission.check_type(found, body))
            return self._insert(found, obj, Manager(manager, "Update"), dry_run=dry_run)

    def update(
        self,
        kind: str | Kind,
        namespace: str,
        name: str,
        body: Obj,
        *,
        subresource: str = "",
        manager: str = "test",
        dry_run: bool = False,
    ) -> Obj:
        with self.lock:
            found = self.kinds.find(kind)
            obj = admission.check_type(found, copy(body))
            live = self._live(found, namespace, name)
            check_identity(found, live, obj)
            if found.conditional and not obj["metadata"].get("resourceVersion"):
                why = "Invalid value: 0: must be specified for an update"
                raise invalid(found.plural, found.group, name, [("metadata.resourceVersion", why)])
            return self._save(found, live, obj, Manager(manager, "Update", subresource), dry_run=dry_run)

    def patch(
        self,
        kind: str | Kind,
        namespace: str,
        name: str,
        patch: Any,
        *,
        how: str = "merge",
        subresource: str = "",
        manager: str = "test",
        dry_run: bool = False,
    ) -> Obj:
        """`how` is merge, json or strategic."""
        with self.lock:
            found = self.kinds.find(kind)
            live = self._live(found, namespace, name)
            shown = self._shown(found, live)
            if how == "strategic" and found.custom:
                raise unsupported_media_type(*_CUSTOM_PATCHES)
            if how == "json":
                result = json_patch(copy(shown), patch)
            elif how == "merge":
                result = merge_patch(shown, patch)
            else:
                result = strategic_patch(shown, patch, shape_of(found))
            obj = admission.check_type(found, result)
            check_identity(found, live, obj)
            return self._save(found, live, obj, Manager(manager, "Update", subresource), dry_run=dry_run)

    def apply(
        self,
        kind: str | Kind,
        namespace: str,
        name: str,
        config: Obj,
        *,
        manager: str,
        force: bool = False,
        subresource: str = "",
        dry_run: bool = False,
    ) -> Obj:
        """Server-side apply. A declaration equal to the last one writes nothing."""
        with self.lock:
            found = self.kinds.find(kind)
            config = declaration(found, namespace, name, config)
            live = self.store.get(found.key, namespace, name)
            who = Manager(manager, "Apply", subresource)
            shape = shape_of(found)
            if live is None:
                if subresource or config["metadata"].get("uid"):
                    raise not_found(found.plural, found.group, name)
                obj = self._new(found, namespace, config)
                owners = apply.first(obj, who, shape, found.status)
                return self._insert(found, obj, who, owners=owners, dry_run=dry_run)
            check_identity(found, live, config)
            base = self._shown(found, live)
            main = found.status and not subresource
            obj, owners = apply.apply(base, config, who, shape, force=force, main=main, status=subresource == "status")
            return self._save(found, live, obj, who, owners=owners, dry_run=dry_run)

    def delete(self, kind: str | Kind, namespace: str, name: str, options: Deleting | None = None) -> Obj:
        """The object if it stays for a while (grace, finalizers), else a Status; of some kinds always the object."""
        with self.lock:
            found, options = self.kinds.find(kind), options or Deleting()
            live = self._live(found, namespace, name)
            deletion.check(found, live, options)
            done = success(name, found.group, found.plural, live["metadata"]["uid"])
            if options.dry_run:
                return done
            obj = deletion.mark(found, live, options, self.clock.stamp())
            if obj is None:
                self._drop(found, live)
                return self._gone(live) if found.shown_deleted else done
            stored = self.store.put(found.key, obj) if obj != live else live
            return self._shown(found, copy(stored))

    def _gone(self, live: Obj) -> Obj:
        """As it was, at the version of its deletion."""
        return copy({**live, "metadata": {**live["metadata"], "resourceVersion": str(self.store.revision)}})

    def delete_collection(
        self,
        kind: str | Kind,
        namespace: str | None,
        options: Deleting | None = None,
        *,
        labels: str = "",
        fields: str = "",
    ) -> Objects:
        with self.lock:
            page = self.list(kind, namespace, labels=labels, fields=fields)
            for obj in page.items:
                self.delete(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], options)
            return page.items

    def replace(self, kind: str | Kind, obj: Obj, *, manager: str) -> Obj:
        """For the simulated scheduler: spec and status in one write, unchecked (as the binding subresource does)."""
        with self.lock:
            found = self.kinds.find(kind)
            live = self._live(found, obj["metadata"]["namespace"], obj["metadata"]["name"])
            owners = managed.after_update(live, obj, Manager(manager, "Update"), shape_of(found))
            return copy(self._put(found, managed.with_owners(obj, owners, live, self.clock.stamp())))

    # parts

    def _live(self, kind: Kind, namespace: str, name: str) -> Obj:
        live = self.store.get(kind.key, namespace, name)
        if live is None:
            raise not_found(kind.plural, kind.group, name)
        return live

    def _shown(self, kind: Kind, obj: Obj) -> Obj:
        """As an object of the version asked for."""
        return obj if obj["apiVersion"] == kind.api_version else {**obj, "apiVersion": kind.api_version}

    def _new(self, kind: Kind, namespace: str, body: Obj) -> Obj:
        """Checks name and namespace, and gives the object its metadata."""
        obj = copy(body)
        metadata = obj["metadata"]
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                raise invalid(
                    kind.name, kind.group, "", [("metadata.name", "Required value: name or generateName is required")]
                )
            metadata["name"] = metadata["generateName"] + self.suffix()
        if kind.namespaced:
            if metadata.setdefault("namespace", namespace) != namespace:
                raise bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
            self._check_namespace(kind, namespace, metadata["name"])
        else:
            metadata.pop("namespace", None)
        if self.store.get(kind.key, namespace, metadata["name"]) is not None:
            raise already_exists(kind.plural, kind.group, metadata["name"])
        if kind.status:
            obj.pop("status", None)
        obj["metadata"] = admission.new_metadata(kind, obj, self.clock.stamp())
        return obj

    def _check_namespace(self, kind: Kind, namespace: str, name: str) -> None:
        found = self.store.get(("", "namespaces"), "", namespace)
        if found is None:
            raise not_found("namespaces", "", namespace)
        if found["metadata"].get("deletionTimestamp"):
            message = f'{kind.plural} "{name}" is forbidden: unable to create new content in namespace {namespace} '
            message += "because it is being terminated"
            raise forbidden(
                message, details={"causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]}
            )

    def suffix(self, length: int = 5) -> str:
        """The next of a fixed sequence of random-looking suffixes (generateName)."""
        self._names += 1
        digest = hashlib.sha256(str(self._names).encode()).digest()
        return "".join("bcdfghjklmnpqrstvwxz2456789"[byte % 27] for byte in digest[:length])

    def _insert(
        self, kind: Kind, obj: Obj, who: Manager, *, dry_run: bool, owners: managed.Owners | None = None
    ) -> Obj:
        now = self.clock.stamp()
        obj = admission.admit(kind, obj, None, self.gates, now)
        if owners is None:
            owners = managed.after_update(None, obj, who, shape_of(kind))
        status = defaults.first_status(kind)
        if status is not None:
            obj["status"] = status
        obj = managed.with_owners(obj, owners, None, now)
        return copy(obj if dry_run else self._put(kind, obj))

    def _save(
        self,
        kind: Kind,
        live: Obj,
        new: Obj,
        who: Manager,
        *,
        owners: managed.Owners | None = None,
        dry_run: bool = False,
    ) -> Obj:
        """Replaces `live` by `new`, or only its status. Nothing is written when nothing changed."""
        obj = {**new, "metadata": admission.kept_metadata(live, new)}
        if who.subresource == "status":
            if not kind.status:
                raise method_not_allowed()
            obj = {**live, "apiVersion": kind.api_version, "status": new.get("status", {})}
        elif kind.status:
            obj.pop("status", None)
            if "status" in live:
                obj["status"] = live["status"]
        now = self.clock.stamp()
        if kind.custom or who.subresource != "status":  # nothing checks the status of built-in kinds
            obj = admission.admit(kind, obj, live, self.gates, now)
        if kind.generation and admission.spec_changed(kind, {**live, "apiVersion": obj["apiVersion"]}, obj):
            obj["metadata"]["generation"] = live["metadata"].get("generation", 0) + 1
        if owners is None:
            owners = managed.after_update(live, obj, who, shape_of(kind))
        obj = managed.with_owners(obj, owners, live, now)
        if apply.same({**live, "apiVersion": obj["apiVersion"]}, obj):
            return self._shown(kind, copy(live))
        if dry_run:
            return copy(obj)
        if deletion.is_finished(obj):
            self._drop(kind, obj)
            return copy(obj)
        return copy(self._put(kind, obj))

    def _put(self, kind: Kind, obj: Obj) -> Obj:
        stored = self.store.put(kind.key, obj)
        if kind.key == ("apiextensions.k8s.io", "customresourcedefinitions"):
            for served in crds.kinds_of(stored):
                self.kinds.add(served)
        return stored

    def _drop(self, kind: Kind, obj: Obj) -> None:
        self.store.remove(kind.key, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if kind.key == ("apiextensions.k8s.io", "customresourcedefinitions"):
            for served in crds.kinds_of(obj):
                for instance in list(self.store.all(served.key)):
                    self.store.remove(
                        served.key, instance["metadata"].get("namespace", ""), instance["metadata"]["name"]
                    )
                self.kinds.remove(served)
