"""The API process's side of an engine: streams end once, early closing aborts, a dead engine ends everything."""

from __future__ import annotations

import asyncio

import pytest

from diptych.engine.client import EngineLink
from diptych.errors import BadRequest, Unavailable
from diptych.types import (
    Abort,
    Complete,
    Control,
    ControlReply,
    Finish,
    ModelInfo,
    Output,
    Outputs,
    Request,
    Sampling,
    Submit,
    ToEngine,
)

MODEL = ModelInfo(
    architecture="Mock",
    vocab_size=8,
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    kv_dtype="float32",
    context_len=64,
    eos_token_ids=(0,),
    num_parameters=1,
    weight_bytes=4,
    fingerprint="x",
)


def make() -> tuple[EngineLink, list[ToEngine]]:
    sent: list[ToEngine] = []
    return EngineLink(sent.append, MODEL, 64), sent


def request(rid: str) -> Request:
    return Request(rid=rid, prompt=[1], sampling=Sampling())


async def test_a_stream_ends_with_its_finish() -> None:
    link, sent = make()
    outputs = link.generate(request("a"))
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    assert sent == [Submit(request("a"))]
    link.receive(Outputs([Output(rid="a", tokens=[1]), Output(rid="other", tokens=[9])]))
    link.receive(Outputs([Output(rid="a", tokens=[2], finish=Finish("length"))]))
    assert (await first).tokens == [1]
    assert [output.tokens async for output in outputs] == [[2]]
    assert len(sent) == 1  # nothing to abort


async def test_closing_early_aborts() -> None:
    link, sent = make()
    outputs = link.generate(request("a"))
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    link.receive(Outputs([Output(rid="a", tokens=[1])]))
    await first
    await outputs.aclose()  # type: ignore[attr-defined]
    assert isinstance(sent[-1], Abort) and sent[-1].rid == "a"


async def test_the_same_rid_twice_is_refused() -> None:
    link, _ = make()
    first = asyncio.create_task(anext(link.generate(request("a"))))
    await asyncio.sleep(0)
    with pytest.raises(BadRequest, match="rid"):
        await anext(link.generate(request("a")))
    first.cancel()


async def test_a_dead_engine_ends_streams_and_questions() -> None:
    link, _ = make()
    stream = asyncio.create_task(anext(link.generate(request("a"))))
    question = asyncio.create_task(link.control("state"))
    await asyncio.sleep(0)
    link.died()
    for task in (stream, question):
        with pytest.raises(Unavailable):
            await task
    with pytest.raises(Unavailable):
        await anext(link.generate(request("b")))


async def test_control_answers_by_id() -> None:
    link, sent = make()
    one, two = asyncio.create_task(link.control("state")), asyncio.create_task(link.control("flush_cache"))
    await asyncio.sleep(0)
    first, second = sent
    assert isinstance(first, Control) and isinstance(second, Control)
    link.receive(ControlReply(second.id, False, {"message": "busy", "status": 400}))
    link.receive(ControlReply(first.id, True, {"requests": 0}))
    assert await one == {"requests": 0}
    with pytest.raises(BadRequest, match="busy"):
        await two


async def test_a_complete_text_is_no_abort() -> None:
    link, sent = make()
    outputs = link.generate(request("a"))
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    link.receive(Outputs([Output(rid="a", tokens=[1])]))
    await first
    link.complete("a")
    await outputs.aclose()  # type: ignore[attr-defined]
    assert sent[-1] == Complete("a")
