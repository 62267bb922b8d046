"""Which headers pass between a client and the servers."""

from __future__ import annotations

from diptych.router.exchange import Headers

# RFC 9110, 7.6.1: about one connection only. Lengths are set anew for each connection.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    )
)
# Answers are relayed or read as they are, so servers must not compress them; 100 Continue is the router's to say.
_REQUEST_ONLY = _HOP_BY_HOP | {b"host", b"accept-encoding", b"expect", b"http2-settings"}


def to_server(headers: Headers, key: str, extra: Headers) -> Headers:
    """A client's headers for the servers, with the router's `key` where the client shows none."""
    kept = _without(headers, _REQUEST_ONLY)
    if key and not any(name == b"authorization" for name, _ in kept):
        kept.append((b"authorization", b"Bearer " + key.encode()))
    if extra:
        own = {name for name, _ in extra}
        kept = [header for header in kept if header[0] not in own]
        kept += extra
    return kept


def to_client(headers: Headers, extra: Headers) -> Headers:
    """A server's headers for the client; `extra` replaces those of the same name."""
    drop = _HOP_BY_HOP | {name for name, _ in extra} if extra else _HOP_BY_HOP
    return _without(headers, drop) + extra


def _without(headers: Headers, drop: frozenset[bytes]) -> Headers:
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            named.update(word.strip().lower() for word in value.split(b","))
    if named:
        drop = drop | named
    return [header for header in headers if header[0] not in drop]
