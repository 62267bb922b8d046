"""What the router answers to: which request goes where, who may ask, and what every answer carries."""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
from collections.abc import Awaitable, Callable

import msgspec

from diptych.errors import BadRequest, DiptychError, MethodNotAllowed, NotFound, Unauthorized, Unavailable
from diptych.router.config import RouterConfig
from diptych.router.control import Control
from diptych.router.core import Core
from diptych.router.exchange import Client, ClientRequest, Headers
from diptych.router.fleet import Fleet
from diptych.router.metrics import CONTENT_TYPE, Exposition, RouterMetrics
from diptych.router.replies import error_event, send_error, send_json

INFERENCE = ("/v1/chat/completions", "/v1/completions", "/generate")
OPEN = frozenset(("/health", "/liveness", "/readiness", "/ready"))  # for probes, which have no key
MAX_ID_BYTES = 128

Handle = Callable[[ClientRequest, Client, Headers], Awaitable[None]]

log = logging.getLogger(__name__)


class App:
    """Answers every request; `draining` makes it unready, `refusing` refuse new work."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        core: Core,
        control: Control,
        metrics: RouterMetrics,
        rng: random.Random,
    ) -> None:
        self.draining = self.refusing = False
        self._config = config
        self._fleet = fleet
        self._core = core
        self._metrics = metrics
        self._rng = rng
        self._exposition = Exposition(metrics, fleet, core.gate, core.hold, core.alone)
        self._key = config.key.encode()
        self._origins = frozenset(origin.encode() for origin in config.cors_allowed_origins)
        self._id_headers = tuple(name.lower().encode() for name in config.request_id_headers)
        post, get = ("POST",), ("GET",)
        self._routes: dict[str, tuple[tuple[str, ...], Handle]] = {
            **dict.fromkeys(INFERENCE, (post, core.serve)),
            "/health": (get, self._alive),
            "/liveness": (get, self._alive),
            "/readiness": (get, self._ready),
            "/ready": (get, self._ready),
            "/metrics": (get, self._metrics_text),
            "/workers": (get, self._workers),
            "/get_loads": (get, self._loads),
            "/v1/models": (get, control.first),
            "/get_model_info": (get, control.first),
            "/model_info": (get, control.first),
            "/get_server_info": (get, control.server_info),
            "/server_info": (get, control.server_info),
            "/health_generate": (get, control.everywhere),
            "/flush_cache": (("GET", "POST"), control.everywhere),
            "/abort_request": (post, control.everywhere),
        }
        self._v1_post: Handle = control.any_post
        self._v1_get: Handle = control.first

    async def handle(self, request: ClientRequest, client: Client) -> None:
        """Answer one request, whatever it is."""
        extra = self._extra(request)
        status = 499  # as the access logs of proxies have it: the client left
        try:
            await self._dispatch(request, client, extra)
            status = client.status
        except DiptychError as error:
            log.info("%s %s: %d %s", request.method, request.route, error.status, error.message)
            if client.started:
                client.write(error_event(error))
                client.finish()
            else:
                send_error(client, error, extra)
            status = error.status
        except asyncio.CancelledError:
            self._metrics.disconnects += 1
            raise
        finally:
            self._metrics.responded(request.route, status)

    async def _dispatch(self, request: ClientRequest, client: Client, extra: Headers) -> None:
        method, path = request.method, request.route
        if method == "OPTIONS":
            self._preflight(client, extra)
            return
        methods, handle = self._routes.get(path) or self._prefixed(path)
        if method not in methods and not (method == "HEAD" and "GET" in methods):
            raise MethodNotAllowed(f"{path} takes {' or '.join(methods)}, not {method}")
        if path not in OPEN:
            self._check_key(request)
            if self.refusing and method == "POST":
                raise Unavailable("the router is shutting down; ask another one")
        if method == "HEAD":  # the answer's body is left out when it is written
            request = msgspec.structs.replace(request, method="GET")
        await handle(request, client, extra)

    def _prefixed(self, path: str) -> tuple[tuple[str, ...], Handle]:
        """Routes of /v1 that the router knows nothing of go to one server as they are."""
        if not path.startswith("/v1/") or not _is_plain(path):
            raise NotFound(f"there is no {path[:100]} here")
        if path.startswith("/v1/models/"):
            return ("GET",), self._v1_get
        return ("POST",), self._v1_post

    def _check_key(self, request: ClientRequest) -> None:
        if not self._key:
            return
        scheme, _, shown = (request.header(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._key):
            raise Unauthorized("a valid API key is needed: Authorization: Bearer <key>")

    def _extra(self, request: ClientRequest) -> Headers:
        """What the router adds to the request and to its answer: an id, and leave for pages of other origins."""
        given = next((v for name in self._id_headers if (v := request.header(name))), None)
        if given is None or len(given) > MAX_ID_BYTES:
            given = b"%032x" % self._rng.getrandbits(128)
        extra = [(b"x-request-id", given)]
        if self._origins:
            origin = request.header(b"origin")
            if origin is not None and (origin in self._origins or b"*" in self._origins):
                extra += [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        return extra

    def _preflight(self, client: Client, extra: Headers) -> None:
        if not any(name == b"access-control-allow-origin" for name, _ in extra):
            raise BadRequest("pages of this origin may not call the router; see --cors-allowed-origins")
        allowed = [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
            (b"access-control-max-age", b"600"),
        ]
        client.send(204, extra + allowed, b"")

    # what the router knows itself

    async def _alive(self, _: ClientRequest, client: Client, extra: Headers) -> None:
        client.send(200, extra, b"")

    async def _ready(self, _: ClientRequest, client: Client, extra: Headers) -> None:
        if self.draining:
            raise Unavailable("the router is shutting down")
        if missing := self._fleet.missing:
            raise Unavailable(f"no {' and no '.join(missing)} server is healthy yet")
        send_json(client, {"status": "ready"}, extra)

    async def _metrics_text(self, _: ClientRequest, client: Client, extra: Headers) -> None:
        client.send(200, [(b"content-type", CONTENT_TYPE), *extra], self._exposition.text())

    async def metrics_only(self, request: ClientRequest, client: Client) -> None:
        """The handler of the separate metrics port."""
        if request.route == "/metrics" and request.method == "GET":
            await self._metrics_text(request, client, [])
        else:
            send_error(client, NotFound("there is only GET /metrics on this port"), [])

    async def _workers(self, _: ClientRequest, client: Client, extra: Headers) -> None:
        now = asyncio.get_running_loop().time()
        workers = [server.report(now) for server in self._fleet.servers]
        counts = {f"{role}_count": len(servers) for role, servers in self._fleet.roles.items()}
        send_json(client, {"workers": workers, "total": len(workers), "stats": counts}, extra)

    async def _loads(self, _: ClientRequest, client: Client, extra: Headers) -> None:
        loads = [
            {"worker": s.address.url, "worker_type": s.role, "load": s.num_requests, "prompt_bytes": s.prompt_bytes}
            for s in self._fleet.servers
        ]
        send_json(client, {"workers": loads}, extra)


def _is_plain(path: str) -> bool:
    """A path that no server can read as another one."""
    segments = path.split("/")[1:]
    return "%" not in path and "\\" not in path and all(part not in ("", ".", "..") for part in segments)
