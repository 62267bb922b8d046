"""The API process's side of an engine: streams end once, early closing aborts, a dead engine ends everything."""

from __future__ import annotations

import asyncio

import pytest

from diptych.engine.client import EngineLink
from diptych.errors import BadRequest, EngineLost, Unavailable
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
    TokenLogprob,
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


def submitted(message: ToEngine) -> str:
    """The id that the engine knows the request by."""
    assert isinstance(message, Submit) and message.request == request(message.request.rid)
    return message.request.rid


async def test_a_stream_ends_with_its_finish() -> None:
    link, sent = make()
    outputs = link.generate(request("a"))
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    rid = submitted(sent[0])
    link.receive(Outputs([Output(rid=rid, tokens=[1]), Output(rid="other", tokens=[9])]))
    link.receive(Outputs([Output(rid=rid, tokens=[2], finish=Finish("length"))]))
    assert (await first).tokens == [1, 2]
    assert [output async for output in outputs] == []
    assert len(sent) == 1  # nothing to abort


async def test_what_nobody_took_becomes_one_output() -> None:
    """Tokens and their log-probabilities in order, the prompt's once, all the rest as it was last."""
    link, sent = make()
    heard: list[Output] = []
    outputs = link.generate(request("a"), heard=heard.append)
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    rid = submitted(sent[0])
    scores = [TokenLogprob(-0.5 * token, token) for token in range(6)]
    came = [
        Output(rid=rid, tokens=[1], logprobs=scores[1:2], prompt_logprobs=scores[:1], prompt_tokens=1),
        Output(rid=rid, tokens=[2, 3], logprobs=scores[2:4], prompt_tokens=1, num_retractions=1),
    ]
    link.receive(Outputs(came))
    assert await first == Output(
        rid=rid, tokens=[1, 2, 3], logprobs=scores[1:4], prompt_logprobs=scores[:1], prompt_tokens=1, num_retractions=1
    )
    came += [Output(rid=rid, tokens=[4], logprobs=scores[4:5])]
    link.receive(Outputs(came[2:]))
    assert await anext(outputs) is came[2]
    came += [Output(rid=rid, tokens=[5], logprobs=scores[5:]), Output(rid=rid, finish=Finish("length"))]
    for output in came[3:]:
        link.receive(Outputs([output]))
    assert [output async for output in outputs] == [
        Output(rid=rid, tokens=[5], logprobs=scores[5:], finish=Finish("length"))
    ]
    assert heard == came
    assert came[0].tokens == [1] and came[0].logprobs == scores[1:2]  # messages stay as they came


async def test_a_whole_answer_wakes_its_reader_once() -> None:
    link, sent = make()
    heard: list[Output] = []
    outputs = link.generate(request("a"), whole=True, heard=heard.append)
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    rid = submitted(sent[0])
    for token in range(5):
        link.receive(Outputs([Output(rid=rid, tokens=[token])]))
        await asyncio.sleep(0)
        assert len(heard) == token + 1 and not first.done()
    link.receive(Outputs([Output(rid=rid, finish=Finish("stop", 4))]))
    assert await first == Output(rid=rid, tokens=[0, 1, 2, 3, 4], finish=Finish("stop", 4))
    assert [output async for output in outputs] == []


async def test_a_whole_answer_is_lost_with_its_engine() -> None:
    link, sent = make()
    first = asyncio.create_task(anext(link.generate(request("a"), whole=True)))
    await asyncio.sleep(0)
    link.receive(Outputs([Output(rid=submitted(sent[0]), tokens=[1])]))
    link.died()
    with pytest.raises(EngineLost):
        await first


async def test_closing_early_aborts() -> None:
    link, sent = make()
    outputs = link.generate(request("a"))
    first = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    link.receive(Outputs([Output(rid=submitted(sent[0]), tokens=[1])]))
    await first
    await outputs.aclose()  # type: ignore[attr-defined]
    assert isinstance(sent[-1], Abort) and sent[-1].rid == submitted(sent[0])


@pytest.mark.parametrize("complete", [False, True])
async def test_what_is_left_of_a_request_does_not_reach_the_next_of_its_id(complete: bool) -> None:
    """The engine hears of the end a step later, and of the next request in the same breath."""
    link, sent = make()
    for _ in range(2):
        outputs = link.generate(request("a"))
        first = asyncio.create_task(anext(outputs))
        await asyncio.sleep(0)
        if len(sent) == 1:
            link.receive(Outputs([Output(rid=submitted(sent[0]), tokens=[1])]))
            await first
            if complete:
                link.complete("a")
            await outputs.aclose()  # type: ignore[attr-defined]
    old, _, new = sent
    left = Output(rid=submitted(old), tokens=[2]), Output(rid=submitted(old), finish=Finish("abort"))
    link.receive(Outputs([*left, Output(rid=submitted(new), tokens=[3], finish=Finish("length"))]))
    assert (await first).tokens == [3]


async def test_an_abort_names_the_request_as_the_engine_does() -> None:
    link, sent = make()
    first = asyncio.create_task(anext(link.generate(request("a"))))
    await asyncio.sleep(0)
    for rid in ("unknown", "a", ""):
        await link.abort(rid, "enough")
    assert sent[1:] == [Abort(submitted(sent[0]), "enough"), Abort("", "enough")]
    first.cancel()


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
    with pytest.raises(EngineLost):
        await stream
    for late in (question, anext(link.generate(request("b")))):
        with pytest.raises(Unavailable) as told:
            await late
        assert not isinstance(told.value, EngineLost)  # no request was with it


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
    link.receive(Outputs([Output(rid=submitted(sent[0]), tokens=[1])]))
    await first
    link.complete("a")
    await outputs.aclose()  # type: ignore[attr-defined]
    assert sent[-1] == Complete(submitted(sent[0]))
