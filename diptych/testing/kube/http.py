"""The API over HTTP: requests in, verbs called, answers and watch streams out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aiohttp import web

from diptych.testing.kube import admission, discovery, scale
from diptych.testing.kube.cluster import Cluster
from diptych.testing.kube.faults import Fault, Faults
from diptych.testing.kube.message import BODY_BYTES, delete_options, patch_kind, read_body, reply, send, verb_of
from diptych.testing.kube.paging import continue_from, continue_token
from diptych.testing.kube.record import Record, Request
from diptych.testing.kube.routes import Target, parse
from diptych.testing.kube.selectors import field_selector, label_selector
from diptych.testing.kube.status import (
    ApiError,
    Obj,
    bad_request,
    invalid,
    unauthorized,
)
from diptych.testing.kube.store import Change
from diptych.testing.kube.watch import Filter, Watcher

_WATCH_S = 1800.0
_NO_MANAGER = "Required value: is required for apply patch"


class Cut(Exception):
    """The connection is to end without an answer."""


class Handler:
    """One server's requests. `token`: the bearer token that is demanded (empty: none)."""

    def __init__(self, cluster: Cluster, record: Record, faults: Faults, *, token: str, bookmark_s: float) -> None:
        self._cluster, self._record, self._faults = cluster, record, faults
        self._token, self._bookmark_s = token, bookmark_s
        self._watchers: set[Watcher] = set()
        self._loop = asyncio.get_running_loop()
        cluster.store.listeners.append(self._changed)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    def close(self) -> None:
        with self._cluster.lock:  # then no change is on its way to a watcher
            self._cluster.store.listeners.remove(self._changed)
        self.drop_watches()

    def drop_watches(self) -> None:
        """From any thread."""
        for watcher in list(self._watchers):
            watcher.drop()

    def _changed(self, change: Change) -> None:
        if self._faults.loses(change):
            return
        for watcher in list(self._watchers):
            if watcher.resource == change.resource:
                watcher.feed(change)

    # requests

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        if self._faults.down:
            return self._cut(http)
        try:
            if self._token and http.headers.get("Authorization") != f"Bearer {self._token}":
                raise unauthorized()
            document = discovery.document(self._cluster.kinds, http.path)
            if document is not None:
                return reply(200, document)
            target = parse(self._cluster.kinds, http.path)
            return await self._asked(http, target)
        except ApiError as error:
            return reply(error.code, error.body(), error.headers)
        except Cut:
            return self._cut(http)

    def _cut(self, http: web.Request) -> web.Response:
        """Ends the connection; what is returned reaches nobody."""
        if http.transport is not None:
            http.transport.abort()
        return web.Response()

    async def _asked(self, http: web.Request, target: Target) -> web.StreamResponse:
        verb = verb_of(http, target)
        manager = http.query.get("fieldManager") or http.headers.get("User-Agent", "unknown").split("/")[0]
        request = Request(
            verb,
            target.kind.name,
            target.namespace or "",
            target.name,
            target.subresource,
            manager,
            dry_run=http.query.get("dryRun") == "All",
            at_s=self._cluster.clock.now(),
        )
        before = self._cluster.store.revision
        try:
            fault = self._faults.take(verb, target.kind.name, target.name, write=request.is_write)
            await self._before(fault)
            if verb == "watch":
                self._record.add(replace(request, code=200))
                return await self._watch(http, target)
            asked = await read_body(http)
            with self._cluster.lock:
                before = self._cluster.store.revision
                code, answer = self._call(http, target, request, asked)
                changed = self._cluster.store.revision != before
        except ApiError as error:
            self._record.add(replace(request, code=error.code))
            raise
        name = target.name or (answer["metadata"]["name"] if verb == "create" else "")
        self._record.add(replace(request, name=name, code=code, changed=changed))
        if fault is not None and fault.what == "lose_answer":
            raise Cut
        return reply(code, answer)

    async def _before(self, fault: Fault | None) -> None:
        if fault is None:
            return
        if fault.what == "answer":
            raise fault.error()
        if fault.what == "reset":
            raise Cut
        if fault.what == "delay":
            await asyncio.sleep(fault.seconds)

    def _call(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        if target.subresource == "scale":
            return scale.call(self._cluster.api, target, request, body, patch_kind(http))
        if target.subresource not in ("", "status"):
            return discovery.extra(self._cluster.api, target, request, body)
        return _VERBS[request.verb](self, http, target, request, body)

    def _get(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        return 200, self._cluster.api.get(target.kind, target.namespace or "", target.name)

    def _list(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        query = http.query
        after, revision = continue_from(query.get("continue", ""))
        if revision is None and query.get("resourceVersionMatch") == "Exact":
            revision = int(query["resourceVersion"])
        page = self._cluster.api.list(
            target.kind,
            target.namespace,
            labels=query.get("labelSelector", ""),
            fields=query.get("fieldSelector", ""),
            limit=int(query.get("limit") or 0),
            after=after,
            revision=revision,
        )
        metadata: Obj = {"resourceVersion": str(page.revision)}
        if page.after:
            metadata |= {"continue": continue_token(page.after, page.revision), "remainingItemCount": page.remaining}
        items = page.items
        if not target.kind.custom:  # as the real server: items of built-in kinds do not say what they are
            items = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in items]
        name = f"{target.kind.name}List"
        return 200, {"kind": name, "apiVersion": target.kind.api_version, "metadata": metadata, "items": items}

    def _create(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        self._strictly(http, target, body)
        if target.kind.custom and isinstance(body, dict) and not body.get("kind"):
            wanted = f"the object provided is unrecognized (must be of type {target.kind.name})"
            raise bad_request(f"{wanted}: Object 'Kind' is missing")
        namespace = target.namespace or ""
        created = self._cluster.api.create(
            target.kind, namespace, body, manager=request.manager, dry_run=request.dry_run
        )
        return 201, created

    def _update(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        self._strictly(http, target, body)
        return 200, self._cluster.api.update(
            target.kind,
            target.namespace or "",
            target.name,
            body,
            subresource=target.subresource,
            manager=request.manager,
            dry_run=request.dry_run,
        )

    def _patch(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        return 200, self._cluster.api.patch(
            target.kind,
            target.namespace or "",
            target.name,
            body,
            how=patch_kind(http),
            subresource=target.subresource,
            manager=request.manager,
            dry_run=request.dry_run,
        )

    def _apply(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        if not http.query.get("fieldManager"):
            raise invalid("PatchOptions", "meta.k8s.io", "", [("fieldManager", _NO_MANAGER)])
        namespace = target.namespace or ""
        existed = self._cluster.store.get(target.kind.key, namespace, target.name) is not None
        answer = self._cluster.api.apply(
            target.kind,
            namespace,
            target.name,
            body,
            manager=request.manager,
            force=http.query.get("force", "").lower() == "true",
            subresource=target.subresource,
            dry_run=request.dry_run,
        )
        return 200 if existed else 201, answer

    def _delete(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        options = delete_options(http, body)
        return 200, self._cluster.api.delete(target.kind, target.namespace or "", target.name, options)

    def _delete_collection(self, http: web.Request, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
        labels, fields = http.query.get("labelSelector", ""), http.query.get("fieldSelector", "")
        options = delete_options(http, body)
        items = self._cluster.api.delete_collection(
            target.kind, target.namespace, options, labels=labels, fields=fields
        )
        metadata = {"resourceVersion": str(self._cluster.store.revision)}
        name = f"{target.kind.name}List"
        return 200, {"kind": name, "apiVersion": target.kind.api_version, "metadata": metadata, "items": items}

    def _strictly(self, http: web.Request, target: Target, body: Any) -> None:
        if http.query.get("fieldValidation") == "Strict" and isinstance(body, dict):
            admission.refuse_strictly(target.kind, body)

    # watches

    async def _watch(self, http: web.Request, target: Target) -> web.StreamResponse:
        query = http.query
        fields = query.get("fieldSelector", "") or (f"metadata.name={target.name}" if target.name else "")
        chosen = Filter(
            target.kind,
            target.namespace,
            label_selector(query.get("labelSelector", "")),
            field_selector(fields, target.kind.fields),
        )
        watcher = Watcher(target.kind.key, self._loop)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(http)
        try:
            with self._cluster.lock:
                first = self._first_events(query, chosen)
                self._watchers.add(watcher)
            await send(response, first)
            await self._stream(response, query, chosen, watcher)
        except ApiError as error:
            await send(response, [{"type": "ERROR", "object": error.body()}])
        finally:
            self._watchers.discard(watcher)
        await response.write_eof()
        return response

    def _first_events(self, query: Any, chosen: Filter) -> list[Obj]:
        """What comes before news: what happened since the client's revision, or all there is."""
        store, resource = self._cluster.store, chosen.kind.key
        start, initial = query.get("resourceVersion", ""), query.get("sendInitialEvents") == "true"
        if start in ("", "0") or initial:
            events = [chosen.shown("ADDED", obj) for obj in store.all(resource) if chosen.has(obj)]
            if initial:
                events.append(self._bookmark(chosen, initial=True))
            return events
        if not start.isdigit():
            raise bad_request(f"invalid resource version {start!r}")
        events = [chosen.event(change) for change in store.since(resource, int(start))]  # type: ignore[misc]
        return [event for event in events if event is not None]

    def _bookmark(self, chosen: Filter, *, initial: bool = False) -> Obj:
        metadata: Obj = {"resourceVersion": str(self._cluster.store.revision)}
        if initial:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        kind = chosen.kind
        return {"type": "BOOKMARK", "object": {"kind": kind.name, "apiVersion": kind.api_version, "metadata": metadata}}

    async def _stream(self, response: web.StreamResponse, query: Any, chosen: Filter, watcher: Watcher) -> None:
        end_s = self._loop.time() + float(query.get("timeoutSeconds") or _WATCH_S)
        bookmarks = query.get("allowWatchBookmarks") == "true"
        bookmark_s = self._loop.time() + self._bookmark_s
        while (now_s := self._loop.time()) < end_s:
            if watcher.dropped:
                raise Cut
            with self._cluster.lock:
                events = [event for change in watcher.take() if (event := chosen.event(change)) is not None]
                if bookmarks and now_s >= bookmark_s:
                    events.append(self._bookmark(chosen))
                    bookmark_s = now_s + self._bookmark_s
            await send(response, events)
            if not watcher.dropped:
                await watcher.wait(min(end_s, bookmark_s if bookmarks else end_s) - self._loop.time())


Call = Callable[[Handler, web.Request, Target, Request, Any], tuple[int, Obj]]
_VERBS: dict[str, Call] = {
    "get": Handler._get,
    "list": Handler._list,
    "create": Handler._create,
    "update": Handler._update,
    "patch": Handler._patch,
    "apply": Handler._apply,
    "delete": Handler._delete,
    "deletecollection": Handler._delete_collection,
}
