"""What a hostile client sends is refused as the client's mistake, and reaches nobody else."""

from __future__ import annotations

import gzip
import zlib

import pytest
from api_server import INFERENCE, Serve


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "gzip, identity"])
@pytest.mark.parametrize(
    "body",
    [b'{"prompt": "hi"}', gzip.compress(b'{"prompt": "hi"}'), zlib.compress(b" " * 50_000_000)],
    ids=["plain", "gzip", "bomb"],
)
async def test_compressed_bodies_are_refused(serve: Serve, path: str, coding: str, body: bytes) -> None:
    server = await serve()
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    async with server.http.post(server.url + path, data=body, headers=headers) as response:
        reply = await response.json()
    assert (response.status, reply["error"]["param"]) == (400, "content-encoding")


@pytest.mark.parametrize(
    "host",
    ["a/b", "a?b", "a#b", "user@a", "a b", "a:b:zz", "é", "[", "[]", "]::1[", "x" * 254, "a\\b", "%2e", "\u3002"],
)
async def test_a_bootstrap_host_that_is_none(serve: Serve, host: str) -> None:
    """It becomes part of a URL on the decode server, so it must not be able to lead elsewhere."""
    server = await serve(disaggregation_mode="decode")
    body = {"input_ids": [1], "bootstrap_host": host, "bootstrap_room": 5}
    status, reply = await server.post("/generate", body)
    assert (status, reply["error"]["param"]) == (400, "bootstrap_host")
