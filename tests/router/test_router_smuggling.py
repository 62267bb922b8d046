"""Requests that try to hide another one, and bytes that are no requests: nothing of them reaches a server."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import BadRequest
from diptych.router.server import check_head, request_target

POST = b"POST /generate HTTP/1.1\r\nHost: a\r\n"
HIDDEN = b"POST /flush_cache HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"

CORPUS = {
    "both lengths": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "both lengths, other order": POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello" + HIDDEN,
    "two equal lengths": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello" + HIDDEN,
    "list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello" + HIDDEN,
    "signed length": POST + b"Content-Length: +5\r\n\r\nhello" + HIDDEN,
    "negative length": POST + b"Content-Length: -5\r\n\r\nhello" + HIDDEN,
    "hex length": POST + b"Content-Length: 0x5\r\n\r\nhello" + HIDDEN,
    "huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\nhello" + HIDDEN,
    "bare line feeds": (POST + b"Content-Length: 0\r\n\r\n").replace(b"\r\n", b"\n") + HIDDEN,
    "one bare line feed": POST + b"X: a\nContent-Length: 5\r\n\r\nhello" + HIDDEN,
    "bare carriage return": POST + b"X: a\rContent-Length: 5\r\n\r\nhello" + HIDDEN,
    "folded header": POST + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "space before colon": POST + b"Content-Length : 5\r\n\r\nhello" + HIDDEN,
    "space before name": POST + b" Content-Length: 5\r\n\r\nhello" + HIDDEN,
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "identity coding": POST + b"Transfer-Encoding: identity\r\n\r\n" + HIDDEN,
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "chunked twice": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "vertical tab before chunked": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "quoted chunked": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n' + HIDDEN,
    "chunk size with 0x": POST + CHUNKED + b"\r\n0x2\r\n{}\r\n0\r\n\r\n" + HIDDEN,
    "chunk size with sign": POST + CHUNKED + b"\r\n+2\r\n{}\r\n0\r\n\r\n" + HIDDEN,
    "chunk size overflow": POST + CHUNKED + b"\r\nfffffffffffffffff2\r\n{}\r\n0\r\n\r\n" + HIDDEN,
    "chunk with bare line feed": POST + CHUNKED + b"\r\n2\n{}\r\n0\r\n\r\n" + HIDDEN,
    "chunk longer than its size": POST + CHUNKED + b"\r\n1\r\n{}\r\n0\r\n\r\n" + HIDDEN,
    "chunk extension with line feed": POST + CHUNKED + b"\r\n2;\n{}\r\n0\r\n\r\n" + HIDDEN,
    "NUL in a value": POST + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "NUL in a name": POST + b"X\x00: a\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "empty name": POST + b": a\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "chunked in HTTP/1.0": b"POST /generate HTTP/1.0\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "HTTP/2.0": b"POST /generate HTTP/2.0\r\nHost: a\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "HTTP/0.9": b"GET /health\r\n\r\n" + HIDDEN,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
    "no host": b"POST /generate HTTP/1.1\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "two hosts": POST + b"Host: b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
    "space in the target": b"POST /gene rate HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN,
    "control in the target": b"POST /generate\x01 HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN,
    "lower-case method": b"post /generate HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + HIDDEN,
    "connect": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN,
    "upgrade with more behind": b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
    + HIDDEN,
}


async def exchange(port: int, data: bytes) -> bytes:
    """Everything that comes back before the router ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("name", CORPUS)
async def test_nothing_hidden_reaches_a_server(cluster, name):
    c = await cluster(1, 1)
    answer = await exchange(c.router.port, CORPUS[name])
    assert not any(server.controls or server.bodies for server in c.servers)
    served = name == "upgrade with more behind"  # the request itself is fine, what follows it is not read
    assert answer.startswith(b"HTTP/1.1 200" if served else (b"HTTP/1.1 4",)[0])
    assert answer.count(b"HTTP/1.1 ") == 1 and b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "path",
    ["/v1/../flush_cache", "/v1/%2e%2e/flush_cache", "/v1//x", "/v1/./x", "/v1/a\\b", "//flush_cache", "/v1", "/x"],
)
async def test_paths_that_could_be_read_as_others_are_refused(cluster, path):
    c = await cluster(1, 1)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
    answer = await exchange(c.router.port, head.encode())
    assert answer.startswith(b"HTTP/1.1 404")
    assert not any(server.controls or server.bodies for server in c.servers)


async def test_an_absolute_target_names_only_its_path(cluster):
    c = await cluster(1, 1)
    head = b"GET http://evil:9/model_info?a=b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    assert (await exchange(c.router.port, head)).startswith(b"HTTP/1.1 200")
    assert c.prefill[0].controls == [("GET", "/model_info?a=b", b"")]


async def test_random_bytes_harm_nobody(cluster):
    c = await cluster(1, 1)
    rng = __import__("random").Random(11)
    whole = POST + b'Content-Length: 12\r\nX: y\r\n\r\n{"text":"a"}'
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        sock = socket.create_connection(("127.0.0.1", c.router.port))
        sock.sendall(data + HIDDEN[: rng.randrange(len(HIDDEN))])
        sock.close()
        await asyncio.sleep(0)
    status, _ = await c.post("/generate", {"text": "a"})
    assert status == 200


header_names = st.sampled_from([b"content-length", b"transfer-encoding", b"host", b"expect", b"x"])
header_values = st.sampled_from([b"0", b"5", b"chunked", b"Chunked ", b"gzip", b"100-continue", b"a"])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["1.0", "1.1", "2.0"]), st.lists(st.tuples(header_names, header_values), max_size=5))
def test_heads_are_unambiguous_or_refused(version, headers):
    headers = [(n, v) for n, v in headers if n != b"content-length" or v.isdigit()]  # the parser has seen to that
    try:
        length, _ = check_head(version, headers)
    except BadRequest:
        return
    assert version in ("1.0", "1.1")
    assert sum(name == b"host" for name, _ in headers) == 1 or version == "1.0"
    assert all(value.strip().lower() == b"chunked" for name, value in headers if name == b"transfer-encoding")
    assert length == int(next((v for n, v in reversed(headers) if n == b"content-length"), b"0"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_any_target_is_a_path_or_nothing(url):
    target = request_target(url)
    assert target == "*" or target.startswith("/")
