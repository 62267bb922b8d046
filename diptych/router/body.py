"""What the router reads in a request's body, and the three bootstrap fields that it adds.

A body is parsed once, skipping what does not matter here. The fields go in front of its last brace, so that both
servers see the client's bytes otherwise unchanged.
"""

from __future__ import annotations

import random
import re
from typing import Any

import msgspec

from diptych.errors import BadRequest
from diptych.router.config import ServerAddress
from diptych.router.exchange import Body

MAX_ROOMS = 16384
KEY_BYTES = 1 << 20
NUM_ROOMS_BITS = 63  # rooms are drawn from [0, 2**63)

_BLANK = re.compile(rb"[ \t\r\n]*")
_FIRST_ITEM = re.compile(rb"\[[ \t\r\n]*(.)")  # of a list: how it begins
_BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


class _Fields(msgspec.Struct):
    """The members that matter, still as JSON text: their types are the servers' to judge."""

    n: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    sampling_params: msgspec.Raw = msgspec.Raw()
    return_logprob: msgspec.Raw = msgspec.Raw()
    echo: msgspec.Raw = msgspec.Raw()
    logprobs: msgspec.Raw = msgspec.Raw()
    bootstrap_host: msgspec.Raw = msgspec.Raw()
    bootstrap_port: msgspec.Raw = msgspec.Raw()
    bootstrap_room: msgspec.Raw = msgspec.Raw()


class Ask(msgspec.Struct, frozen=True):
    """A body, understood as far as routing needs."""

    body: bytes
    end: int  # where the body's last brace is
    separator: bytes  # what comes between its members and more of them
    key: bytes  # the prompt as sent, at most KEY_BYTES of it, for cache-aware routing; b"" if there is none
    num_rooms: int | None  # how many rooms a batch or n > 1 needs, None: one, not in a list
    merges_logprobs: bool  # the prompt's logprobs are in the prefill server's answer and must be moved to decode's


_decoder = msgspec.json.Decoder(_Fields)
_items = msgspec.json.Decoder(list[msgspec.Raw])


def read_body(body: bytes, route: str) -> Ask:
    """Understand a body for `route`, whose fields are the only ones that count: servers ignore those of other routes.

    Raises BadRequest when it is no JSON object or asks for too many sequences.
    """
    try:
        found = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the body must be a JSON object: {error}") from None
    if found.bootstrap_host or found.bootstrap_port or found.bootstrap_room:
        body = _without_bootstrap(body)
    end = body.rindex(b"}")
    prompt, num_rooms = _asked(found, route)
    return Ask(
        body=body,
        end=end,
        separator=b"" if _is_empty(body, end) else b",",
        key=bytes(memoryview(prompt)[:KEY_BYTES]),
        num_rooms=num_rooms,
        merges_logprobs=_is_set(found.return_logprob) or (_is_set(found.echo) and _is_set(found.logprobs)),
    )


def add_rooms(ask: Ask, prefill: ServerAddress, rng: random.Random) -> Body:
    """The body for both servers of a pair: the client's, and where they meet. Every call draws new rooms."""
    host: Any = prefill.bootstrap_host
    port: Any = prefill.bootstrap_port
    if ask.num_rooms is None:
        room: Any = rng.getrandbits(NUM_ROOMS_BITS)
    else:
        host, port = [host] * ask.num_rooms, [port] * ask.num_rooms
        room = [rng.getrandbits(NUM_ROOMS_BITS) for _ in range(ask.num_rooms)]
    fields = msgspec.json.encode(dict(zip(_BOOTSTRAP, (host, port, room), strict=True)))
    return memoryview(ask.body)[: ask.end], ask.separator + fields[1:]


def without_rooms(ask: Ask) -> Body:
    """The body for a decode server that does the prefill itself: it meets nobody."""
    return memoryview(ask.body)[: ask.end], ask.separator + b'"bootstrap_host":null}'


def _is_empty(body: bytes, end: int) -> bool:
    """Whether the object that ends at `end` has no members: only white space comes between its braces."""
    blank = _BLANK.match(body, body.rindex(b"{", 0, end) + 1, end)
    return blank is not None and blank.end() == end


def _without_bootstrap(body: bytes) -> bytes:
    """A client's own bootstrap fields are replaced, never sent twice."""
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({name: value for name, value in members.items() if name not in _BOOTSTRAP})


def _asked(found: _Fields, route: str) -> tuple[msgspec.Raw, int | None]:
    """The prompt, and how many rooms are needed."""
    if route == "/generate":
        prompt, ids = found.text or found.input_ids, not found.text
        return prompt, _num_rooms(_batch_size(prompt, ids=ids), _copies_of_params(found.sampling_params))
    if route == "/v1/completions":
        return found.prompt, _num_rooms(_batch_size(found.prompt, ids=False), _copies(found.n))
    return found.messages, _num_rooms(None, _copies(found.n))


def _num_rooms(batch: int | None, copies: int | None) -> int | None:
    """One room a sequence: prompts times n. Values of a wrong type count as one; the servers refuse them."""
    copies = copies or 1
    if batch is None and copies == 1:
        return None
    total = (batch or 1) * copies
    if total > MAX_ROOMS:
        raise BadRequest(f"the request asks for {total} sequences; at most {MAX_ROOMS} fit in one", param="n")
    return total


def _batch_size(prompt: msgspec.Raw, *, ids: bool) -> int | None:
    """How many prompts a list of texts or of token lists holds; None for one text or one list of tokens, which may be
    millions, so that it is not taken apart.
    """
    first = _FIRST_ITEM.match(memoryview(prompt))
    if first is None or first[1] not in ((b"[",) if ids else (b"[", b'"')):
        return None
    return len(_items.decode(prompt))


def _copies(n: msgspec.Raw) -> int | None:
    text = bytes(n)
    return max(int(text), 1) if text.isdigit() and len(text) < 10 else None


def _copies_of_params(params: msgspec.Raw) -> int | None:
    """n of `/generate`: in sampling_params, or in the first of a list of them."""
    text = bytes(params)
    if text[:1] == b"[":
        listed = _items.decode(text)
        text = bytes(listed[0]) if listed else b""
    if text[:1] != b"{":
        return None
    return _copies(msgspec.json.decode(text, type=dict[str, msgspec.Raw]).get("n", msgspec.Raw()))


def _is_set(value: msgspec.Raw) -> bool:
    """Whether a member asks for something: present, and neither null, false nor an empty list."""
    return bytes(value) not in (b"", b"null", b"false", b"[]")
