"""HTTP messages of the API: what a request asks for, and how answers are written."""

from __future__ import annotations

from typing import Any

import msgspec
import yaml
from aiohttp import web

from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.routes import Target
from diptych.testing.kube.status import ApiError, Obj, bad_request, invalid, method_not_allowed, unsupported_media_type

BODY_BYTES = 3 * 1024 * 1024  # kube-apiserver's limit
_PATCHES = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
    "application/apply-patch+cbor": "",
}


def verb_of(http: web.Request, target: Target) -> str:
    named = bool(target.name)
    if http.method == "GET":
        if http.query.get("watch", "").lower() in ("true", "1"):
            return "watch"
        return "get" if named else "list"
    if http.method == "PATCH" and named:
        return "apply" if patch_kind(http) == "apply" else "patch"
    by_method = {"POST": "create", "PUT": "update", "DELETE": "delete" if named else "deletecollection"}
    verb = by_method.get(http.method)
    if verb is None or (verb == "update" and not named) or (verb == "create" and named and not target.subresource):
        raise method_not_allowed()
    return verb


def patch_kind(http: web.Request) -> str:
    if http.method != "PATCH":
        return ""
    kind = _PATCHES.get(http.content_type)
    if not kind:
        raise unsupported_media_type(*_PATCHES)
    return kind


def delete_options(http: web.Request, body: Any) -> Deleting:
    options = body if isinstance(body, dict) else {}
    conditions = options.get("preconditions") or {}
    grace = http.query.get("gracePeriodSeconds") or options.get("gracePeriodSeconds")
    policy = http.query.get("propagationPolicy") or options.get("propagationPolicy") or "Background"
    if options.get("orphanDependents"):
        policy = "Orphan"
    if policy not in ("Background", "Foreground", "Orphan"):
        why = f'Unsupported value: "{policy}": supported values: "Foreground", "Background", "Orphan", "nil"'
        raise invalid("DeleteOptions", "meta.k8s.io", "", [("propagationPolicy", why)])
    return Deleting(
        policy=policy,
        grace_s=None if grace is None else int(grace),
        uid=conditions.get("uid"),
        revision=conditions.get("resourceVersion"),
        dry_run=http.query.get("dryRun") == "All" or bool(options.get("dryRun")),
    )


async def read_body(http: web.Request) -> Any:
    try:
        raw = await http.read()
    except web.HTTPRequestEntityTooLarge:
        message = f"Request entity too large: limit is {BODY_BYTES}"
        raise ApiError(413, "RequestEntityTooLarge", message) from None
    if not raw.strip():
        return None
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        try:
            return yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise bad_request(f"the body is neither JSON nor YAML: {error}") from None


def reply(code: int, body: Obj, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=code, body=msgspec.json.encode(body), content_type="application/json", headers=headers)


async def send(response: web.StreamResponse, events: list[Obj]) -> None:
    if events:
        await response.write(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
