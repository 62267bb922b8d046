"""What is read in a body, and where the servers meet."""

from __future__ import annotations

import json
import random
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import BadRequest
from diptych.router.body import MAX_ROOMS, Ask, read_body
from diptych.router.body import add_rooms as add_rooms_in_parts
from diptych.router.config import ServerAddress

SERVER = ServerAddress("p", 1, 34000)


def add_rooms(ask: Ask, server: ServerAddress, rng: random.Random) -> bytes:
    return b"".join(add_rooms_in_parts(ask, server, rng))


FIELDS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"


def route_of(body: object) -> str:
    """The route whose field for the prompt a body has."""
    return CHAT if "messages" in body else TEXT if "prompt" in body else NATIVE


def rooms_of(body: object, server: ServerAddress = SERVER, route: str = "") -> dict:
    added = add_rooms(read_body(json.dumps(body).encode(), route or route_of(body)), server, random.Random(3))
    return {name: json.loads(added)[name] for name in FIELDS}


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"messages": []}, None),
        ({"messages": [], "n": 1}, None),
        ({"messages": [], "n": 3}, 3),
        ({"messages": [], "n": None}, None),
        ({"prompt": "a"}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": []}, None),
        ({"prompt": ["a"]}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"text": "a"}, None),
        ({"text": ["a", "b", "c"]}, 3),
        ({"input_ids": [1, 2]}, None),
        ({"input_ids": [[1, 2], [3, 4]]}, 2),
        ({"text": "a", "sampling_params": {"n": 4}}, 4),
        ({"text": ["a", "b"], "sampling_params": {"n": 2}}, 4),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 2}]}, 4),
        ({"text": ["a", "b"], "sampling_params": []}, 2),
        ({"text": "a", "sampling_params": None}, None),
        ({"text": "a", "sampling_params": {"n": "many"}}, None),
        ({"prompt": "a", "n": -2}, None),
        ({"prompt": "a", "n": 0}, None),
        ({"prompt": "a", "n": 1.5}, None),
    ],
)
def test_a_room_for_each_sequence(body, count):
    found = rooms_of(body)
    if count is None:
        assert found["bootstrap_host"] == "p" and found["bootstrap_port"] == 34000
        assert isinstance(found["bootstrap_room"], int)
        return
    assert found["bootstrap_host"] == ["p"] * count and found["bootstrap_port"] == [34000] * count
    assert len(set(found["bootstrap_room"])) == count


@pytest.mark.parametrize(
    ("route", "body", "count"),
    [
        (NATIVE, {"text": "a", "n": 2}, None),
        (NATIVE, {"text": "a", "prompt": ["x", "y"], "messages": []}, None),
        (NATIVE, {"input_ids": [[1], [2]], "prompt": "x"}, 2),
        (TEXT, {"prompt": "a", "text": ["x", "y"], "sampling_params": {"n": 3}}, None),
        (TEXT, {"prompt": ["a"], "n": 2, "input_ids": [1]}, 2),
        (CHAT, {"messages": [], "prompt": ["x", "y"]}, None),
        (CHAT, {"messages": [], "text": ["x", "y"], "n": 3, "sampling_params": {"n": 2}}, 3),
    ],
)
def test_fields_of_other_routes_do_not_count(route, body, count):
    room = rooms_of(body, route=route)["bootstrap_room"]
    assert (len(room) if isinstance(room, list) else None) == count


def test_an_absent_port_is_null_and_ipv6_has_brackets():
    assert rooms_of({"text": "a"}, ServerAddress("fe80::1", 1))["bootstrap_port"] is None
    assert rooms_of({"text": ["a"]}, ServerAddress("fe80::1", 1))["bootstrap_port"] == [None]
    assert rooms_of({"text": "a"}, ServerAddress("fe80::1", 1))["bootstrap_host"] == "[fe80::1]"


@pytest.mark.parametrize(("prompt", "num"), [(b"[ \n1, 2]", None), (b"[\r\n\t[1], [2]]", 2), (b"[ ]", None)])
def test_white_space_in_front_of_the_first_item(prompt, num):
    assert read_body(b'{"input_ids":' + prompt + b"}", NATIVE).num_rooms == num


def test_token_ids_are_not_taken_apart():
    """They are the longest lists, and the router's one thread reads them."""
    body = b'{"input_ids":[' + b"1," * 500_000 + b"1]}"
    tracemalloc.start()
    try:
        assert read_body(body, NATIVE).num_rooms is None
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()


def test_every_attempt_has_its_own_rooms():
    ask, rng = read_body(b'{"text":"a"}', NATIVE), random.Random(1)
    rooms = [json.loads(add_rooms(ask, SERVER, rng))["bootstrap_room"] for _ in range(1000)]
    assert len(set(rooms)) == 1000
    assert all(0 <= room < 2**63 for room in rooms) and max(rooms) > 2**62


def test_the_clients_bytes_stay_as_they_are():
    body = b' {"a" : 1.0e5, "text":"\\u00e9\xc3\xa9" , "b":[1,  2]\n} \n'
    assert add_rooms(read_body(body, NATIVE), SERVER, random.Random(0)).startswith(
        body.rstrip()[:-1] + b',"bootstrap_host"'
    )


@pytest.mark.parametrize("body", [b"{}", b" {\n\t} ", b"{" + b" " * 1000 + b"}"])
def test_an_object_without_members(body):
    assert set(json.loads(add_rooms(read_body(body, NATIVE), SERVER, random.Random(0)))) == set(FIELDS)


def test_a_body_of_many_megabytes_is_read_fast():
    filler = b" " * (16 << 20)
    for body in (
        b"{" + filler + b"}",
        b'{"text":"' + filler + b'"}',
        b'{"prompt":[[1],' + filler + b"[2]]" + filler + b"}",
    ):
        for route in (NATIVE, TEXT, CHAT):
            started = time.process_time()
            read_body(body, route)
            assert time.process_time() - started < 1.0


def test_a_clients_own_rooms_are_replaced():
    body = b'{"text":"a","bootstrap_room":7,"bootstrap_h\\u006fst":"evil","temperature":1.50}'
    added = add_rooms(read_body(body, NATIVE), SERVER, random.Random(0))
    assert added.count(b"bootstrap_room") == 1 and b"evil" not in added and b"1.50" in added


def test_what_else_is_read():
    ask = read_body(b'{"messages": [{"role":"user"}], "stream": true}', CHAT)
    assert (ask.key, ask.merges_logprobs) == (b'[{"role":"user"}]', False)
    assert read_body(b'{"text":"a","return_logprob":true}', NATIVE).merges_logprobs
    assert read_body(b'{"text":["a"],"return_logprob":[true]}', NATIVE).merges_logprobs
    assert read_body(b'{"prompt":"a","echo":true,"logprobs":1}', TEXT).merges_logprobs
    for body in (b'{"return_logprob":false}', b'{"return_logprob":null}', b'{"echo":true}', b'{"logprobs":1}'):
        assert not read_body(body, NATIVE).merges_logprobs


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'"x"', b"{", b'{"a":}', b"{}{}", b'{"a":NaN}', b"\xff{}", b'{"a":' + b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(BadRequest):
        read_body(body, NATIVE)


def test_too_many_sequences_are_refused():
    assert read_body(b'{"n":%d}' % MAX_ROOMS, TEXT).num_rooms == MAX_ROOMS
    with pytest.raises(BadRequest):
        read_body(b'{"n":%d}' % (MAX_ROOMS + 1), CHAT)
    with pytest.raises(BadRequest):
        read_body(b'{"n":99999999}', TEXT)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(
    ("messages", "prompt", "text", "input_ids", "n", "stream", "sampling_params", "return_logprob", "echo", *FIELDS)
) | st.text(max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, json_values, max_size=6), st.booleans(), st.sampled_from((CHAT, TEXT, NATIVE)))
def test_any_object_keeps_its_members(body, ascii_only, route):
    try:
        ask = read_body(json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"), route)
    except BadRequest:
        return
    added = json.loads(add_rooms(ask, SERVER, random.Random(0)))
    assert {k: v for k, v in added.items() if k not in FIELDS} == {k: v for k, v in body.items() if k not in FIELDS}
    assert all(name in added for name in FIELDS)
    lengths = {len(added[name]) if isinstance(added[name], list) else None for name in FIELDS}
    assert lengths == {ask.num_rooms}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | st.text(alphabet='{}[]":,\\ ntrue0123456789.eE-', max_size=40).map(str.encode))
def test_any_bytes_are_understood_or_refused(body):
    try:
        ask = read_body(body, NATIVE)
    except BadRequest:
        return
    json.loads(add_rooms(ask, SERVER, random.Random(0)))
