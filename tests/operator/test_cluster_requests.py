"""Requests one by one, and what an API server answers: the same, whether it is ours or a real one (see cluster_place).

The texts are those of Kubernetes 1.36.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from cluster_place import Place, role
from kubernetes.client import ApiClient

from diptych.group.operator.resources import ADAPTER, CONFIG_MAP, DEPLOYMENT, GROUP, LEASE, POD, SERVICE, Json, Kind

APPLY, JSON_PATCH = "application/apply-patch+yaml", "application/json-patch+json"
MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
POD_SPEC = {"containers": [{"name": "c", "image": "i"}]}


class Server:
    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client, self._namespace = client, namespace

    def ask(
        self, verb: str, kind: Kind, name: str = "", body: Any = None, content: str = "application/json", **query: str
    ) -> tuple[int, Json]:
        path, _, subresource = name.partition("/")
        headers = {"Accept": "application/json"} | ({"Content-Type": content} if body is not None else {})
        sent = json.dumps(body) if content == APPLY else body
        request = self._client.param_serialize(
            verb,
            kind.path(self._namespace, path, subresource),
            query_params=list(query.items()),
            header_params=headers,
            body=sent,
            auth_settings=["BearerToken"],
        )
        response = self._client.call_api(*request, _request_timeout=30)
        return response.status, json.loads(response.read())

    def refuses(self, code: int, reason: str, text: str, *request: Any, **query: str) -> None:
        status, answer = self.ask(*request, **query)
        assert (status, answer["kind"], answer.get("reason", "")) == (code, "Status", reason), answer
        assert text in answer["message"]


@pytest.fixture
def server(place: Place) -> Any:
    place.stop_all()
    with place.core() as core:
        yield Server(core.api_client, place.namespace)


def named(name: str, kind: Kind | None = None, **more: Any) -> Json:
    what = {"apiVersion": kind.api_version, "kind": kind.kind} if kind else {}
    return {**what, "metadata": {"name": name}, **more}


def test_updates_and_patches(server: Server) -> None:
    assert server.ask("POST", CONFIG_MAP, "", named("c", data={"a": "1"}))[0] == 201
    server.refuses(409, "AlreadyExists", 'configmaps "c" already exists', "POST", CONFIG_MAP, "", named("c"))
    stale = {"metadata": {"name": "c", "resourceVersion": "1"}}
    server.refuses(409, "Conflict", "the object has been modified", "PUT", CONFIG_MAP, "c", stale)
    server.refuses(409, "Conflict", "the object has been modified", "PATCH", CONFIG_MAP, "c", stale, MERGE)
    server.refuses(400, "BadRequest", "does not match the", "PUT", CONFIG_MAP, "c", named("other"))
    server.refuses(404, "NotFound", 'configmaps "x" not found', "PATCH", CONFIG_MAP, "x", {"data": {}}, MERGE)
    test = [{"op": "test", "path": "/data/a", "value": "2"}]
    server.refuses(422, "Invalid", "the server rejected our request", "PATCH", CONFIG_MAP, "c", test, JSON_PATCH)
    assert server.ask("PATCH", CONFIG_MAP, "c", {"data": {"a": None, "b": "2"}}, MERGE)[1]["data"] == {"b": "2"}
    assert server.ask("PUT", CONFIG_MAP, "c", named("c", data={"z": "1"}))[1]["data"] == {"z": "1"}


def test_some_kinds_take_no_update_that_names_no_version(server: Server) -> None:
    text = "metadata.resourceVersion: Invalid value: 0: must be specified for an update"
    lease = named("l", spec={"holderIdentity": "x", "leaseDurationSeconds": 6})
    group = named("g", GROUP, spec={"roles": [role("a")]})
    for kind, body in ((LEASE, lease), (GROUP, group)):
        assert server.ask("POST", kind, "", body)[0] == 201
        server.refuses(422, "Invalid", text, "PUT", kind, body["metadata"]["name"], body)


def test_applies(server: Server) -> None:
    server.ask("POST", CONFIG_MAP, "", named("c", data={"a": "1"}), fieldManager="maker")
    mine = named("c", CONFIG_MAP, data={"a": "2"})
    conflict = 'conflict with "maker" using v1'
    server.refuses(409, "Conflict", conflict, "PATCH", CONFIG_MAP, "c", mine, APPLY, fieldManager="m")
    answer = server.ask("PATCH", CONFIG_MAP, "c", mine, APPLY, fieldManager="m", force="true")[1]
    assert answer["data"] == {"a": "2"}
    nothing = server.ask("PATCH", CONFIG_MAP, "c", named("c", CONFIG_MAP), APPLY, fieldManager="m")[1]
    assert "data" not in nothing
    server.refuses(422, "Invalid", "fieldManager: Required value", "PATCH", CONFIG_MAP, "c", mine, APPLY)
    spoilt = {**mine, "metadata": {"name": "c", "managedFields": []}}
    text = "metadata.managedFields must be nil"
    server.refuses(400, "BadRequest", text, "PATCH", CONFIG_MAP, "c", spoilt, APPLY, fieldManager="m")
    status = named("g", GROUP, status={"observedGeneration": 1})
    server.refuses(404, "NotFound", "", "PATCH", GROUP, "g/status", status, APPLY, fieldManager="m")


def test_custom_kinds_are_stricter(server: Server) -> None:
    spec = {"roles": [role("a")]}
    untyped = "the object provided is unrecognized (must be of type RoleBasedGroup): Object 'Kind' is missing"
    status, answer = server.ask("POST", GROUP, "", named("g", spec=spec))
    assert status == 400 and untyped in answer["message"]
    assert server.ask("POST", GROUP, "", named("g", GROUP, spec=spec))[0] == 201
    accepted = "accepted media types include: application/json-patch+json, application/merge-patch+json, "
    patch = {"spec": {"paused": True}}
    server.refuses(415, "UnsupportedMediaType", accepted, "PATCH", GROUP, "g", patch, STRATEGIC)
    strange = named("h", GROUP, spec=spec, bogus=1)
    strict = {"fieldValidation": "Strict"}
    text = 'strict decoding error: unknown field "bogus"'
    server.refuses(400, "BadRequest", text, "POST", GROUP, "", strange, **strict)
    assert server.ask("POST", GROUP, "", strange, dryRun="All")[0] == 201
    assert server.ask("GET", GROUP, "h")[0] == 404


def test_selectors(server: Server) -> None:
    server.ask("POST", CONFIG_MAP, "", named("c"))
    found = server.ask("GET", CONFIG_MAP, fieldSelector="metadata.name=c")[1]["items"]
    assert [each["metadata"]["name"] for each in found] == ["c"]
    text = '"data.x" is not a known field selector: only "metadata.name", "metadata.namespace"'
    server.refuses(400, "BadRequest", text, "GET", CONFIG_MAP, fieldSelector="data.x=c")
    text = "unable to parse requirement"
    server.refuses(400, "BadRequest", text, "GET", CONFIG_MAP, labelSelector="a in (b")


def test_deletions(server: Server) -> None:
    server.ask("POST", CONFIG_MAP, "", named("c"))
    other = {"preconditions": {"uid": "another"}}
    server.refuses(409, "Conflict", "Operation cannot be fulfilled on", "DELETE", CONFIG_MAP, "c", other)
    policy = {"propagationPolicy": "Sideways"}
    text = 'propagationPolicy: Unsupported value: "Sideways"'
    server.refuses(422, "Invalid", text, "DELETE", CONFIG_MAP, "c", policy)
    status, answer = server.ask("DELETE", CONFIG_MAP, "c")
    assert (status, answer["kind"], answer["status"]) == (200, "Status", "Success")
    server.refuses(404, "NotFound", 'configmaps "c" not found', "DELETE", CONFIG_MAP, "c")


def test_some_kinds_are_shown_when_they_are_deleted(server: Server) -> None:
    """At the version of their deletion, so that a cache that is told of it twice is not misled."""
    gated = {**POD_SPEC, "schedulingGates": [{"name": "x"}]}
    for kind, spec in ((SERVICE, {"clusterIP": "None"}), (POD, gated)):
        made = server.ask("POST", kind, "", named("x", spec=spec))[1]
        status, answer = server.ask("DELETE", kind, "x")
        assert (status, answer["kind"], answer["metadata"]["uid"]) == (200, kind.kind, made["metadata"]["uid"])
        assert int(answer["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
        assert server.ask("GET", kind, "x")[0] == 404


def test_finalizers(server: Server) -> None:
    server.ask("POST", GROUP, "", named("g", GROUP, spec={"roles": [role("a")]}))
    first = {"metadata": {"finalizers": ["x.io/y"]}}
    assert server.ask("PATCH", GROUP, "g", first, MERGE)[0] == 200
    assert "deletionTimestamp" in server.ask("DELETE", GROUP, "g")[1]["metadata"]
    text = "no new finalizers can be added if the object is being deleted"
    more = {"metadata": {"finalizers": ["x.io/y", "x.io/z"]}}
    server.refuses(422, "Invalid", text, "PATCH", GROUP, "g", more, MERGE)
    assert server.ask("PATCH", GROUP, "g", {"metadata": {"finalizers": None}}, MERGE)[0] == 200
    assert server.ask("GET", GROUP, "g")[0] == 404


def test_workloads(server: Server) -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": POD_SPEC}
    spec = {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": template}
    stuck = {**spec, "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}
    text = "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0"
    server.refuses(422, "Invalid", text, "POST", DEPLOYMENT, "", named("d", spec=stuck))
    other = {**spec, "selector": {"matchLabels": {"x": "y"}}}
    text = "`selector` does not match template `labels`"
    server.refuses(422, "Invalid", text, "POST", DEPLOYMENT, "", named("d", spec=other))
    assert server.ask("POST", DEPLOYMENT, "", named("d", spec=spec))[0] == 201
    patch = {"spec": {"selector": {"matchLabels": {"c": "d"}}}}
    server.refuses(422, "Invalid", "field is immutable", "PATCH", DEPLOYMENT, "d", patch, MERGE)


def test_the_scale_of_an_adapter(server: Server) -> None:
    spec = {"scaleTargetRef": {"name": "g", "role": "a"}}
    assert server.ask("POST", ADAPTER, "", named("a", ADAPTER, spec=spec))[0] == 201
    text = 'the spec replicas field ".spec.replicas" does not exist'
    server.refuses(500, "InternalError", text, "GET", ADAPTER, "a/scale")
    patched = server.ask("PATCH", ADAPTER, "a/scale", {"spec": {"replicas": 2}}, MERGE)[1]
    assert patched["spec"] == {"replicas": 2} and patched["status"] == {"replicas": 0}
    assert server.ask("PUT", ADAPTER, "a/scale", {**patched, "spec": {"replicas": 3}})[1]["spec"] == {"replicas": 3}
    assert server.ask("GET", ADAPTER, "a")[1]["spec"]["replicas"] == 3
