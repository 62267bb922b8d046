"""Messages between our own processes arrive whole, in order, whatever the pieces; the other end's death is noticed."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
import numpy as np

from diptych.engine.channel import Channel
from diptych.engine.ranks import RunPlan, ToRank
from diptych.types import Abort, Plan, Request, Row, Sampling, Submit, ToEngine


async def pair(receives: Any) -> tuple[Channel, Channel, asyncio.Queue[Any], asyncio.Event]:
    left, right = socket.socketpair()
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    closed = asyncio.Event()
    near: Channel = Channel(receives, lambda _: None, lambda: None)
    far: Channel = Channel(receives, inbox.put_nowait, closed.set)
    await near.open(left.detach())
    await far.open(right.detach())
    return near, far, inbox, closed


async def test_messages_keep_order_and_content() -> None:
    near, far, inbox, _ = await pair(ToEngine)
    sent: list[ToEngine] = []
    for i in range(200):
        prompt = list(range(i * 37 % 5000))
        sent += [Submit(Request(rid=f"r{i}", prompt=prompt, sampling=Sampling(seed=i))), Abort(f"r{i}")]
    for message in sent:
        near.send(message)
    assert [await asyncio.wait_for(inbox.get(), 5) for _ in sent] == sent
    near.close()
    far.close()


async def test_plans_arrive_as_writable_arrays() -> None:
    near, far, inbox, _ = await pair(ToRank)
    row = Row(rid="a", num_new=2, num_cached=0, samples=True, sampling=Sampling(), position=2)
    plan = Plan(
        step=1,
        rows=[row],
        token_ids=np.array([5, 6], np.int32),
        positions=np.array([0, 1], np.int32),
        slots=np.array([16, 17], np.int64),
        q_starts=np.array([0, 2], np.int32),
        kv_lens=np.array([2], np.int32),
        pages=np.array([[1, 0]], np.int32),
    )
    near.send(RunPlan(plan))
    received = (await asyncio.wait_for(inbox.get(), 5)).plan
    for name in ("token_ids", "positions", "slots", "q_starts", "kv_lens", "pages"):
        mine, theirs = getattr(plan, name), getattr(received, name)
        assert theirs.dtype == mine.dtype and theirs.flags.writeable and np.array_equal(mine, theirs)
    assert received.rows == plan.rows
    near.close()
    far.close()


async def test_bytes_in_pieces() -> None:
    left, right = socket.socketpair()
    left.setblocking(False)
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    far: Channel = Channel(ToEngine, inbox.put_nowait, lambda: None)
    await far.open(right.detach())
    body = msgspec.msgpack.encode(Abort("x"))
    frame = len(body).to_bytes(4, "little") + body
    loop = asyncio.get_running_loop()
    for byte in frame + frame:
        await loop.sock_sendall(left, bytes([byte]))
    assert await asyncio.wait_for(inbox.get(), 5) == Abort("x")
    assert await asyncio.wait_for(inbox.get(), 5) == Abort("x")
    left.close()
    far.close()


async def test_the_other_end_dies() -> None:
    near, far, _, closed = await pair(ToEngine)
    near.close()
    await asyncio.wait_for(closed.wait(), 5)
    far.send(Abort("nobody hears"))  # no error: on_close has told
