"""What is concluded from a server's own words; the words are those that the servers really say."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from mock_server import hang, refuse

from diptych.errors import DeadlineExceeded, DiptychError, EngineLost, TransferError, Unavailable
from diptych.router.replies import error_body
from diptych.router.verdict import Guilt, does_prefill, guilt, has_died, is_draining, is_leaving
from diptych.transfer.room import HubOptions, KVPoll, RoomEnd
from diptych.types import Finish

BODY = {"text": "a"}


class Room(RoomEnd):
    """A room that expires at once in any state."""

    def __init__(self, state: KVPoll, *, queued: bool) -> None:
        super().__init__(1, lambda room: None, HubOptions(bootstrap_timeout_s=0.01))
        self.expired: asyncio.Future[Finish] = asyncio.get_running_loop().create_future()
        self._enter(state, queued=queued)

    def _fail(self, error: Finish) -> None:
        self.expired.set_result(error)


def answer(finish: Finish) -> bytes:
    error = DiptychError(finish.message)
    error.code = finish.code
    return error_body(error)


@pytest.mark.parametrize(
    ("waiter", "state", "queued", "found"),
    [
        ("decode", KVPoll.Bootstrapping, False, Guilt.PREFILL),
        ("prefill", KVPoll.Bootstrapping, False, Guilt.DECODE),
        ("prefill", KVPoll.Transferring, False, Guilt.NOBODY),  # its own next step, or decode's last word
        ("decode", KVPoll.WaitingForInput, True, Guilt.NOBODY),  # queues: both are full rather than broken
        ("prefill", KVPoll.WaitingForInput, True, Guilt.NOBODY),
        ("decode", KVPoll.Transferring, True, Guilt.NOBODY),
    ],
)
async def test_who_made_a_hand_over_late(waiter: str, state: KVPoll, queued: bool, found: Guilt) -> None:
    finish = await Room(state, queued=queued).expired
    other = "prefill" if waiter == "decode" else "decode"
    assert guilt(waiter, finish.status, answer(finish)) is found
    assert guilt(other, TransferError.status, answer(finish)) is found  # as it arrives over the link


@pytest.mark.parametrize("status", [500, 504])
@pytest.mark.parametrize(
    "message",
    [
        "cannot reach the prefill server within 15 s (no answer); check that it runs",
        "the prefill server got no request for the room within 300 s",
    ],
)
def test_a_prefill_server_that_decode_does_not_find(status: int, message: str) -> None:
    assert guilt("decode", status, error_body(DeadlineExceeded(message))) is Guilt.PREFILL


@pytest.mark.parametrize(
    ("status", "data", "found"),
    [
        (504, b"gateway time-out", Guilt.TELLER),
        (504, error_body(DeadlineExceeded("something else")), Guilt.TELLER),
        (500, b"", Guilt.TELLER),
        (500, error_body(TransferError("lost the other server")), Guilt.SILENT),
        (500, b"KVTransferError", Guilt.SILENT),
        (500, b"waited for the other server to meet in the room", Guilt.TELLER),  # without its code it is no proof
    ],
)
@pytest.mark.parametrize("teller", ["prefill", "decode"])
def test_other_words(status: int, data: bytes, found: Guilt, teller: str) -> None:
    assert guilt(teller, status, data) is found


def test_a_server_of_both_phases_answers_for_itself() -> None:
    late = error_body(DeadlineExceeded("waited 300 s for the other server to meet in the room"))
    assert guilt("worker", 504, late) is Guilt.TELLER


def test_who_can_do_the_prefill() -> None:
    assert does_prefill(msgspec.json.encode({"status": "ok", "local_prefill": True}))
    for other in (b"", b"ok", b"{}", b'"local_prefill"', b'{"local_prefill":false}', b'{"local_prefill":1}', b"\xff"):
        assert not does_prefill(other)
    assert not does_prefill(b"[" * 100_000)


def test_who_is_leaving() -> None:
    draining = b'{"error":{"message":"this server is draining; send the request to another server, or later"}}'
    assert is_leaving(503, draining) and not is_leaving(500, draining)
    assert is_draining(503, draining) and not is_draining(500, draining)
    stopped = b'{"error":{"message":"the engine of this server has stopped"}}'
    assert is_leaving(503, stopped) and not is_draining(503, stopped)
    assert not is_leaving(503, b'{"error":{"message":"the queue is full"}}')
    assert not is_leaving(503, b"the engine of this server does not answer")  # it may again


def test_who_has_died() -> None:
    words = "the engine of this server has stopped; the request was lost, send it again"
    assert has_died(503, error_body(EngineLost(words))) and is_leaving(503, error_body(EngineLost(words)))
    assert not has_died(503, error_body(Unavailable(words)))  # before it had the request
    assert not has_died(500, error_body(EngineLost(words)))


@pytest.mark.parametrize(
    ("teller", "message", "charged"),  # charged: a role, or "" for nobody
    [
        ("decode", "cannot reach the prefill server within 15 s (no answer)", "prefill"),
        ("prefill", "waited 300 s for the other server to meet in the room", "decode"),
        ("prefill", "waited 300 s for the KV transfer to go on", ""),
        ("decode", "the hand-over took 1800 s with its queues", ""),
        ("decode", "something else", "decode"),
    ],
)
async def test_the_one_who_was_late_is_charged(cluster: Any, teller: str, message: str, charged: str) -> None:
    c = await cluster(1, 1, disable_retries=True)
    script = refuse(504, message, code="deadline_exceeded")
    for role in ("prefill", "decode"):
        getattr(c, role)[0].scripts.append(script if role == teller else hang())
    status, _ = await c.post("/generate", BODY)
    assert status == 504
    assert {server.role: server.num_failed for server in c.router.fleet.servers} == {
        role: int(role == charged) for role in ("prefill", "decode")
    }
