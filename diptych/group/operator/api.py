"""Calls of the Kubernetes API, over the official client: JSON in, JSON out, our errors.

The official client brings configuration, credentials, TLS and connections. Its 700 models are not used: objects here
are what the API server says, and what we apply is exactly what we own.
"""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.rest import RESTResponse

from diptych.errors import DiptychError, NotFound, Overloaded, Unavailable
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import Json, Kind

FIELD_MANAGER = "diptych"
APPLY_PATCH, MERGE_PATCH = "application/apply-patch+yaml", "application/merge-patch+json"
UNTYPED = "failed to create typed patch object"  # a refusal that comes as a 500: the schema has no place for an apply
REQUEST_TIMEOUT_S = 30.0
PAGE = 500  # objects a list request returns at most
KEEP_ALIVE = (  # a server that vanished without a word is noticed within half a minute, even by an idle watch
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class ApiError(DiptychError):
    """The API server refused a call; the same call would be refused again."""

    code = "kubernetes_error"


class Forbidden(ApiError):
    """The operator's role does not allow the call."""

    code = "forbidden"


class Conflict(DiptychError):
    """Somebody changed the object first: read it again."""

    code = "conflict"


class Gone(DiptychError):
    """The API server does not remember that resource version any more: list again."""

    code = "gone"


class Api:
    """Blocking, safe to use from several threads. Raises NotFound, Conflict, Gone, Overloaded (429), Unavailable (no
    answer, 5xx) and ApiError (anything else the server refuses)."""

    def __init__(self, configuration: Configuration, metrics: Metrics, num_connections: int = 32) -> None:
        configuration.connection_pool_maxsize = num_connections
        configuration.retries = urllib3.Retry(0)  # the queue decides when to try again
        configuration.socket_options = list(KEEP_ALIVE)
        self._client = ApiClient(configuration)
        self._metrics = metrics
        self._timeout_s = REQUEST_TIMEOUT_S

    def close(self) -> None:
        self._client.close()

    def within(self, timeout_s: float) -> Api:
        """The same, but a call fails (Unavailable) when nothing came for so long."""
        other = copy.copy(self)
        other._timeout_s = timeout_s
        return other

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        return self._call("GET", kind, namespace, name)

    def list(self, kind: Kind, namespace: str = "", selector: str = "") -> tuple[list[Json], str]:
        """All objects, and the resource version to watch from."""
        items: list[Json] = []
        query: dict[str, str] = {"limit": str(PAGE)}
        if selector:
            query["labelSelector"] = selector
        while True:
            page = self._call("GET", kind, namespace, query=query)
            items += page.get("items") or []
            metadata = page["metadata"]
            if not metadata.get("continue"):
                return items, metadata["resourceVersion"]
            query["continue"] = metadata["continue"]

    def watch(self, kind: Kind, namespace: str, selector: str, resource_version: str, timeout_s: int) -> Watch:
        """Changes after `resource_version`. The server ends the stream after about `timeout_s`."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
        }
        if selector:
            query["labelSelector"] = selector
        return Watch(self._open("GET", kind.path(namespace), query, timeout_s=(self._timeout_s, timeout_s + 10)))

    def apply(self, kind: Kind, obj: Json, subresource: str = "") -> Json:
        """Server-side apply of everything we own of the object; it is created if it is not there."""
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **obj}
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        metadata = obj["metadata"]
        namespace = metadata.get("namespace", "")
        return self._call("PATCH", kind, namespace, metadata["name"], subresource, query, body, APPLY_PATCH)

    def merge(self, kind: Kind, namespace: str, name: str, patch: Json, subresource: str = "") -> Json:
        """JSON merge patch (RFC 7386); with `metadata.resourceVersion` in it, Conflict if the object has changed."""
        query = {"fieldManager": FIELD_MANAGER}
        return self._call("PATCH", kind, namespace, name, subresource, query, patch, MERGE_PATCH)

    def create(self, kind: Kind, obj: Json) -> Json:
        """Raises Conflict if it is there already."""
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **obj}
        namespace = obj["metadata"].get("namespace", "")
        return self._call("POST", kind, namespace, query={"fieldManager": FIELD_MANAGER}, body=body)

    def replace(self, kind: Kind, obj: Json) -> Json:
        """Raises Conflict unless `metadata.resourceVersion` is the newest."""
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **obj}
        metadata = obj["metadata"]
        query = {"fieldManager": FIELD_MANAGER}
        return self._call("PUT", kind, metadata.get("namespace", ""), metadata["name"], "", query, body)

    def delete(self, kind: Kind, namespace: str, name: str, uid: str, *, foreground: bool = False) -> Json | None:
        """The answer: the object if it stays for a while, else a Status. None if that very object (by uid) was gone.

        `foreground`: it stays until what belongs to it is gone.
        """
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Foreground" if foreground else "Background"}
        try:
            return self._call("DELETE", kind, namespace, name, body=body)
        except (NotFound, Conflict):
            return None

    # ---- inside ----

    def _call(
        self,
        verb: str,
        kind: Kind,
        namespace: str,
        name: str = "",
        subresource: str = "",
        query: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        path = kind.path(namespace, name, subresource)
        return self._decode(self._open(verb, path, query or {}, body, content_type))

    def _open(
        self,
        verb: str,
        path: str,
        query: dict[str, str],
        body: Json | None = None,
        content_type: str = "application/json",
        timeout_s: Any = None,
    ) -> RESTResponse:
        """The response, its body still unread. Raises for every status but 2xx."""
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        content: Any = json.dumps(body) if body is not None and content_type == APPLY_PATCH else body
        request = self._client.param_serialize(
            verb,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=content,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*request, _request_timeout=timeout_s or self._timeout_s)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            self._metrics.api_requests.labels(verb, "none").inc()
            raise Unavailable(f"the API server does not answer: {_in_words(error)}") from None
        self._metrics.api_requests.labels(verb, str(response.status)).inc()
        if not 200 <= response.status < 300:
            raise _error(verb, path, response)
        return response

    @staticmethod
    def _decode(response: RESTResponse) -> Json:
        try:
            return msgspec.json.decode(_body(response), type=dict[str, Any])
        except (urllib3.exceptions.HTTPError, OSError, msgspec.DecodeError) as error:
            raise Unavailable(f"the API server's answer broke off: {type(error).__name__}") from None


class Watch:
    """An open stream of changes: iterate, and `close` from any thread to end it. Raises Gone, Unavailable."""

    def __init__(self, response: RESTResponse) -> None:
        self._response = response.response

    def __iter__(self) -> Iterator[tuple[str, Json]]:
        """(ADDED, MODIFIED, DELETED or BOOKMARK; the object). Ends when the server ends the stream."""
        rest = b""
        try:
            for part in self._response.stream(1 << 16, decode_content=False):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    event = msgspec.json.decode(line, type=dict[str, Any])
                    if event["type"] == "ERROR":
                        raise _stream_error(event["object"])
                    yield event["type"], event["object"]
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError, msgspec.DecodeError) as error:
            raise Unavailable(f"the watch broke off: {type(error).__name__}") from None
        finally:
            self._response.close()

    def close(self) -> None:
        """The reader gets an end of file."""
        try:
            self._response.shutdown()
        except (ValueError, OSError, RuntimeError):
            return  # it has ended already


def _body(response: RESTResponse) -> bytes:
    data: bytes = response.read()
    return data


def _in_words(error: Exception) -> str:
    """What is wrong with a connection, without what urllib3 wraps it in."""
    reason = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason else error
    cause = reason.__cause__ or next((each for each in reason.args if isinstance(each, OSError)), reason)
    return getattr(cause, "strerror", None) or str(cause)


def _error(verb: str, path: str, response: RESTResponse) -> DiptychError:
    status = response.status
    try:
        message = str(json.loads(_body(response)).get("message", ""))
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError):
        message = ""
    text = f"{verb} {path}: {status} {message}".rstrip()
    if status == 403:
        return Forbidden(text)
    if status == 404:
        return NotFound(text)
    if status == 409:
        return Conflict(text)
    if status == 410:
        return Gone(text)
    if status == 429:
        after = str(response.response.headers.get("Retry-After", "1"))
        return Overloaded(text, retry_after_s=float(after) if after.isdigit() else 1.0)
    return Unavailable(text) if status >= 500 and UNTYPED not in message else ApiError(text)


def _stream_error(status: Json) -> DiptychError:
    text = f"watch: {status.get('code')} {status.get('message', '')}"
    return Gone(text) if status.get("code") == 410 else Unavailable(text)
