"""Which prefill server a request names: the three bootstrap fields, by the role of this server.

* A server of both phases ignores them.
* A prefill server needs bootstrap_room. Host and port are its own.
* A decode server needs bootstrap_room and bootstrap_host; without a port, its own --disaggregation-bootstrap-port
counts. `"bootstrap_host": null`, written out, and no room asks it to do the prefill itself. Fields that are simply
absent are an error, because they mean that the client talks to a part of a pair by mistake.
* Several sequences (a batch, n > 1) need a list of rooms, one each; host and port may be lists of that length or one
for all.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from diptych.api.limits import MAX_INT64
from diptych.api.schemas import Pairing
from diptych.errors import BadRequest
from diptych.net import is_host
from diptych.types import Bootstrap


def bootstraps(fields: Pairing, mode: str, own_port: int, count: int) -> list[Bootstrap | None]:
    """The meeting point of each of `count` sequences; None: no hand-over. Raises BadRequest that names the field."""
    if mode == "null" or (mode == "decode" and _wants_local_prefill(fields)):
        return [None] * count
    if fields.bootstrap_room is UNSET or fields.bootstrap_room is None:
        raise BadRequest(
            f"this is a {mode} server and the request has no bootstrap_room; send it to the router"
            + (", or set bootstrap_host to null to let this server do the prefill" if mode == "decode" else ""),
            param="bootstrap_room",
        )
    hosts, ports = (_spread(getattr(fields, name), count, name) for name in ("bootstrap_host", "bootstrap_port"))
    rooms = _spread(fields.bootstrap_room, count, "bootstrap_room")
    if count > 1 and not isinstance(fields.bootstrap_room, list):
        raise BadRequest(
            f"bootstrap_room must be a list of {count}: each sequence needs a room", param="bootstrap_room"
        )
    if len(set(rooms)) < count:
        raise BadRequest("bootstrap_room names a room twice; each sequence needs its own", param="bootstrap_room")
    return [_one(*three, mode, own_port) for three in zip(hosts, ports, rooms, strict=True)]


def _wants_local_prefill(fields: Pairing) -> bool:
    return fields.bootstrap_host is None and fields.bootstrap_room in (UNSET, None)


def _spread(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [None if value is UNSET else value] * count
    if len(value) != count:
        raise BadRequest(f"{name} must have one entry for each of the {count} sequences, not {len(value)}", param=name)
    return value


def _one(host: str | None, port: int | None, room: int | None, mode: str, own_port: int) -> Bootstrap:
    if room is None or not 0 <= room <= MAX_INT64:
        raise BadRequest(f"bootstrap_room must be a number from 0 to {MAX_INT64}", param="bootstrap_room")
    if port is not None and not 0 < port <= 65535:
        raise BadRequest("bootstrap_port must be a port number", param="bootstrap_port")
    if mode == "decode" and not host:
        raise BadRequest("bootstrap_host is missing: the request names no prefill server", param="bootstrap_host")
    if host and not is_host(host):
        raise BadRequest("bootstrap_host is no host name", param="bootstrap_host")
    return Bootstrap(host or "", own_port if port is None else port, room)
