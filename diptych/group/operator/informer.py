"""A local copy of one kind's objects that follows the API server: list once, then watch.

A watch that ends goes on where it stopped; one that the server cannot continue (410) starts with a new list, and what
disappeared meanwhile is reported as deleted. So after any disturbance the copy is right again without a restart.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

import msgspec

from diptych.errors import DiptychError, NotFound
from diptych.group import names
from diptych.group.operator.api import Api, Forbidden, Gone, Watch
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import Json, Kind, key_of

log = logging.getLogger(__name__)

WATCH_S = 300  # the server is asked to end a watch after so long; clients then spread over its instances again
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.0  # short: a watch is one request, and what happens meanwhile is not seen
NOT_SERVED_S = 30.0  # how often a kind is tried that the cluster does not know
MAX_DELETED = 1024  # deleted objects whose last version is remembered

GROUP_LABEL = f"{names.PREFIX}/name"

Key = tuple[str, str]
OnChange = Callable[[Json], None]


class Informer:
    """Follows `kind` in one namespace (or in all: ""), those with the labels of `selector`.

    `on_change` gets each object that was added, changed or deleted, from the informer's thread. Objects are kept as
    JSON text without `managedFields`: a tenth of the memory of dictionaries. `optional`: the cluster may lack the kind,
    or not let us see it.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind,
        namespace: str,
        selector: str,
        on_change: OnChange,
        metrics: Metrics,
        *,
        optional: bool = False,
    ) -> None:
        self.kind = kind
        self._api, self._namespace, self._selector = api, namespace, selector
        self._on_change, self._metrics, self._optional = on_change, metrics, optional
        self._lock = threading.Lock()
        self._objects: dict[Key, bytes] = {}
        self._versions: dict[Key, str] = {}
        self._groups = _Index()  # by (namespace, group) of the group's label
        self._owners = _Index()  # by the uid of the controlling owner
        self._deleted: OrderedDict[Key, str] = OrderedDict()  # when, lately
        self._stopping = threading.Event()
        self._watch: Watch | None = None
        self.synced = threading.Event()  # a first list is here (or the cluster lacks an optional kind)
        self._thread = threading.Thread(target=self._follow, name=f"watch-{kind.plural}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end; `join` waits for it."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.close()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # ---- reading ----

    def get(self, namespace: str, name: str) -> Json | None:
        with self._lock:
            text = self._objects.get((namespace, name))
        return None if text is None else dict(msgspec.json.decode(text))

    def of_group(self, namespace: str, group: str) -> list[Json]:
        """The objects with this group's label."""
        return self._select(self._groups, (namespace, group))

    def owned(self, uid: str) -> list[Json]:
        """The objects whose controller is the object `uid`."""
        return self._select(self._owners, uid)

    def _select(self, index: _Index, value: Hashable) -> list[Json]:
        with self._lock:
            texts = [self._objects[key] for key in index.keys_of(value)]
        return [msgspec.json.decode(text) for text in texts]

    def all_keys(self) -> list[Key]:
        with self._lock:
            return list(self._objects)

    def saw(self, obj: Json) -> None:
        """An answer of the API server to a write of ours: the copy need not wait for the watch to show it."""
        self._put(obj, only_newer=True)

    # ---- following ----

    def _follow(self) -> None:
        retry_s = FIRST_RETRY_S
        version = ""
        while not self._stopping.is_set():
            try:
                if not version:
                    version = self._list()
                    self.synced.set()
                started = time.monotonic()
                version = self._watch_from(version)
                if time.monotonic() - started > LAST_RETRY_S:
                    retry_s = FIRST_RETRY_S
                    continue
            except Gone:
                version = ""
                self._metrics.relists.labels(self.kind.kind).inc()
                continue
            except (NotFound, Forbidden) as error:
                version = ""
                if self._optional:
                    if not self.synced.is_set():
                        log.info("%s is not used: %s", self.kind.kind, error.message)
                    self.synced.set()
                    self._stopping.wait(NOT_SERVED_S)
                    continue
                hint = "is the CRD installed (diptych crds | kubectl apply -f -)?"
                log.warning(
                    "%s: %s", error.message, hint if isinstance(error, NotFound) else "see deploy/operator/role"
                )
            except DiptychError as error:
                if self._stopping.is_set():
                    return
                log.warning("%s: %s", self.kind.kind, error.message)
            except Exception:
                log.exception("following %s failed; it is listed again", self.kind.plural)
                version = ""
            self._stopping.wait(retry_s * random.uniform(0.8, 1.2))
            retry_s = min(LAST_RETRY_S, 2 * retry_s)

    def _list(self) -> str:
        items, version = self._api.list(self.kind, self._namespace, self._selector)
        found = {key_of(item) for item in items}
        for item in items:
            self._put(item)
        for key in set(self.all_keys()) - found:
            self._drop(key)
        return version

    def _watch_from(self, version: str) -> str:
        """Follow until the stream ends. Returns the version to go on from."""
        self._watch = self._api.watch(self.kind, self._namespace, self._selector, version, WATCH_S)
        if self._stopping.is_set():
            self._watch.close()
        try:
            for event, obj in self._watch:
                version = obj["metadata"]["resourceVersion"]
                if event == "DELETED":
                    self._drop(key_of(obj), version)
                elif event != "BOOKMARK":
                    self._put(obj)
        except Gone:
            raise
        except DiptychError as error:
            if not self._stopping.is_set():
                log.info("%s: %s; going on from version %s", self.kind.kind, error.message, version)
        return version

    def _put(self, obj: Json, *, only_newer: bool = False) -> None:
        key, version = key_of(obj), obj["metadata"]["resourceVersion"]
        obj["metadata"].pop("managedFields", None)
        text = msgspec.json.encode(obj)
        with self._lock:
            known = self._versions.get(key) or self._deleted.get(key)
            if known == version or (only_newer and known is not None and _newer(known, version)):
                return
            self._deleted.pop(key, None)
            self._objects[key] = text
            self._versions[key] = version
            group = (obj["metadata"].get("labels") or {}).get(GROUP_LABEL)
            self._groups.set(key, (key[0], group) if group else None)
            self._owners.set(key, _controller(obj))
        self._on_change(obj)

    def _drop(self, key: Key, version: str = "") -> None:
        with self._lock:
            text = self._objects.pop(key, None)
            self._versions.pop(key, None)
            self._groups.set(key, None)
            self._owners.set(key, None)
            if version:
                self._deleted[key] = version
                self._deleted.move_to_end(key)
                while len(self._deleted) > MAX_DELETED:
                    self._deleted.popitem(last=False)
        if text is not None:
            self._on_change(msgspec.json.decode(text))


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


def _controller(obj: Json) -> str | None:
    owners = obj["metadata"].get("ownerReferences") or []
    return next((each["uid"] for each in owners if each.get("controller")), None)


def _newer(one: str, two: str) -> bool:
    """Whether resource version `one` is later than `two`. They are numbers that grow (KEP-5504); if a server has
    others, the watch decides."""
    return one.isdigit() and two.isdigit() and int(one) > int(two)
