"""The engine loop alone: steps that fail or hang, requests under an id that is taken, what is planned ahead."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from diptych.engine.channel import Channel
from diptych.engine.loop import Engine
from diptych.engine.ranks import RankReady, Ranks, RunPlan, ToRank
from diptych.engine.roles.unified import UnifiedRole
from diptych.errors import EngineBroken, StepFailed
from diptych.sched.audit import audit
from diptych.sched.plan import schedule
from diptych.sched.queue import add
from diptych.sched.state import SchedConfig, SchedState, new_state
from diptych.testing.mock_model import expected
from diptych.testing.mock_runner import MockRunner
from diptych.testing.virtual import run_virtual
from diptych.types import (
    Abort,
    Control,
    ControlReply,
    FromEngine,
    LogprobSpec,
    Output,
    Outputs,
    Plan,
    Request,
    Sampling,
    StepResult,
    Submit,
    TokenLogprob,
)


class Server:
    """A server of both phases, and its device. `broken`: what happens at a step instead of computing, by its number.

    A pass with one of the `poisonous` requests fails after it has filled the slots it was to write with something else.
    """

    def __init__(
        self, broken: dict[int, Callable[[], Awaitable[Any]]], watchdog_s: float = 300.0, *, overlaps: bool = False
    ) -> None:
        self.runner = MockRunner(16, 4, context_len=64)
        self.overlaps = overlaps
        self._turn = asyncio.Lock()
        self.state = make_state()
        self.outputs: dict[str, list[Output]] = {}
        self.poisonous: set[str] = set()
        self.passes: list[list[str]] = []
        self._broken = broken
        self.engine = Engine(self.state, self, self._emit, grammars=None, watchdog_s=watchdog_s)
        UnifiedRole(self.engine.requests)

    def launch(self, plan: Plan) -> asyncio.Task[StepResult]:
        return asyncio.ensure_future(self._compute(plan))

    async def collect(self, launched: asyncio.Task[StepResult]) -> StepResult:
        return await launched

    async def _compute(self, plan: Plan) -> StepResult:
        async with self._turn:
            return await self._run(plan)

    async def _run(self, plan: Plan) -> StepResult:
        await asyncio.sleep(0.01)
        if plan.step in self._broken:
            await self._broken[plan.step]()
        self.passes.append([row.rid for row in plan.rows])
        if self.poisonous.intersection(self.passes[-1]):
            self.runner.run(msgspec.structs.replace(plan, token_ids=np.abs(plan.token_ids) + 1))
            raise ValueError("cannot compute this")
        return self.runner.run(plan)

    def _emit(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self.outputs.setdefault(output.rid, []).append(output)

    def submit(self, rid: str, prompt: list[int]) -> Request:
        request = Request(
            rid=rid, prompt=prompt, sampling=Sampling(max_new_tokens=4, temperature=0.0), logprobs=LogprobSpec(top=2)
        )
        self.engine.deliver(Submit(request))
        return request

    def right(self, request: Request) -> list[TokenLogprob | None]:
        """The tokens it must give, with their logprobs."""
        return expected(request, self.runner.info, 64).logprobs

    def codes(self, rid: str) -> list[str]:
        """The ends that were told; a request has one."""
        return [output.finish.code for output in self.outputs[rid] if output.finish is not None]

    def tokens(self, rid: str) -> list[TokenLogprob | None]:
        return [logprob for output in self.outputs[rid] for logprob in output.logprobs or ()]


def make_state() -> SchedState:
    return new_state(SchedConfig(page_size=4, context_len=64, reserved_decode_tokens=4), 16)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("poisonous", ["", "a", "b", "bc", "abcd"])
def test_a_request_that_makes_a_pass_fail_ends_alone(poisonous: str, decoding: bool, overlaps: bool) -> None:
    """The others of the step go on with the same tokens and logprobs, and leave nothing wrong in the cache."""

    async def story() -> None:
        server = Server({}, overlaps=overlaps)
        running = asyncio.ensure_future(server.engine.run())
        requests = {rid: server.submit(rid, [*range(1, 2 * at + 3), ord(rid)]) for at, rid in enumerate("abcd")}
        await asyncio.sleep(0.015 if decoding else 0)  # 10 ms a step; the first takes all the prompts
        server.poisonous.update(poisonous)
        await asyncio.sleep(1)
        for rid, request in requests.items():
            assert server.codes(rid) == (["step_failed"] if rid in poisonous else [""]), rid
            if rid not in poisonous:
                assert server.tokens(rid) == server.right(request)
        if poisonous:
            void = [[*"abcd"]] * overlaps  # launched behind the one that fails
            assert server.passes[decoding : decoding + 5 + overlaps] == [[*"abcd"], *void, ["a"], ["b"], ["c"], ["d"]]
        server.poisonous.clear()
        server.outputs.clear()
        again = [server.submit(rid, list(request.prompt)) for rid, request in requests.items()]
        await asyncio.sleep(1)
        assert [server.tokens(request.rid) for request in again] == [server.right(request) for request in again]
        audit(server.state)
        assert not server.state.seqs
        server.engine.stop()
        await running

    run_virtual(story())


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_comes_while_a_failed_step_is_repaired_waits_for_its_end(overlaps: bool) -> None:
    """An abort of a request of that step, between two of its rows: its pages come back after all of them."""

    async def story() -> None:
        server = Server({}, overlaps=overlaps)
        running = asyncio.ensure_future(server.engine.run())
        first, _, third = (server.submit(rid, [1, 2, 3]) for rid in "abc")
        server.poisonous.add("b")
        await asyncio.sleep(0.015 + 0.01 * overlaps)
        server.engine.deliver(Abort("a"))
        await asyncio.sleep(1)
        assert [server.codes(rid) for rid in "abc"] == [["aborted"], ["step_failed"], [""]]
        assert server.tokens("a") == server.right(first)[:1]
        assert server.tokens("c") == server.right(third)
        audit(server.state)
        assert not server.state.seqs
        server.engine.stop()
        await running

    run_virtual(story())


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_broken_engine_ends(hangs: bool, overlaps: bool) -> None:
    async def part() -> None:
        raise EngineBroken("rank 1 went another way")

    async def hang() -> None:
        await asyncio.sleep(1000)

    async def story() -> None:
        server = Server({1: hang if hangs else part}, watchdog_s=30, overlaps=overlaps)
        server.submit("a", [1])
        with pytest.raises(EngineBroken, match="watchdog" if hangs else "another way"):
            await server.engine.run()

    run_virtual(story())


def test_the_next_step_is_launched_before_the_last_one_is_told() -> None:
    """The device has always a step to go on with, until the last one."""

    async def story() -> None:
        server = Server({}, overlaps=True)
        log: list[str] = []
        launch, collect, emit = server.launch, server.collect, server.engine._emit

        def launching(plan: Plan) -> asyncio.Task[StepResult]:
            log.append(f"launch {plan.step}")
            return launch(plan)

        async def collecting(launched: asyncio.Task[StepResult]) -> StepResult:
            result = await collect(launched)
            log.append("collect")
            return result

        def emitting(message: FromEngine) -> None:
            if isinstance(message, Outputs) and message.outputs:
                log.append("tell")
            emit(message)

        server.launch, server.collect = launching, collecting  # type: ignore[method-assign]
        server.engine._emit = emitting
        request = server.submit("a", [1, 2, 3])
        running = asyncio.ensure_future(server.engine.run())
        await asyncio.sleep(1)
        one = ["collect", "launch {}", "tell"]
        middle = [word.format(step) for step in (3, 4) for word in one]
        assert log == ["launch 1", "launch 2", *middle, "collect", "tell", "collect", "tell"]
        assert server.tokens("a") == server.right(request)
        server.engine.stop()
        await running

    run_virtual(story())


def test_a_control_message_is_answered_when_no_step_is_in_flight() -> None:
    """So the cache can be flushed as soon as the last request has ended, whatever is still computed in vain."""

    async def story() -> None:
        server = Server({}, overlaps=True)
        replies: list[tuple[ControlReply, int]] = []
        emit = server.engine._emit

        def emitting(message: FromEngine) -> None:
            if isinstance(message, ControlReply):
                replies.append((message, len(server.state.flight)))
            if isinstance(message, Outputs) and any(output.finish is not None for output in message.outputs):
                server.engine.deliver(Control(7, "flush_cache"))
            emit(message)

        server.engine._emit = emitting
        right = expected(server.submit("a", [1, 2, 3]), server.runner.info, 64).tokens
        server.engine._inbox.clear()
        sampling = Sampling(max_new_tokens=40, temperature=0.0, stop_token_ids=(right[1],))
        server.engine.deliver(Submit(Request(rid="a", prompt=[1, 2, 3], sampling=sampling)))
        running = asyncio.ensure_future(server.engine.run())
        await asyncio.sleep(1)
        assert server.passes == [["a"]] * 3  # the third was computed in vain
        assert replies == [(ControlReply(7, True, {"flushed_pages": 1}), 0)]
        server.engine.stop()
        await running

    run_virtual(story())


def test_a_request_under_a_taken_id_leaves_the_first_alone() -> None:
    async def story() -> None:
        server = Server({})
        first = server.submit("a", [1, 2, 3])
        server.submit("a", [9])
        running = asyncio.ensure_future(server.engine.run())
        await asyncio.sleep(1)
        assert sorted(server.codes("a")) == ["", "invalid_value"]
        assert server.tokens("a") == server.right(first)
        server.engine.stop()
        await running

    run_virtual(story())


async def test_a_step_that_fails_on_rank_0_of_several_breaks_the_engine() -> None:
    """The other ranks are somewhere in that step: their next sums would mix two steps."""

    class Failing:
        overlaps = False

        def launch(self, plan: Plan) -> None:
            raise ValueError("out of memory")

        def collect(self, launched: None) -> StepResult:
            raise AssertionError("it was not launched")

    class Unlucky:
        """All ranks are done, but nothing came of it."""

        def launch(self, plan: Plan) -> None:
            pass

        def collect(self, launched: None) -> StepResult:
            raise StepFailed("in sampling")

    near, far = socket.socketpair()
    told: asyncio.Queue[Any] = asyncio.Queue()
    follower = Channel(ToRank, told.put_nowait, lambda: None)
    await follower.open(far.detach())
    follower.send(RankReady([]))
    state = make_state()
    add(state, Request(rid="a", prompt=[1, 2], sampling=Sampling()), 0.0)
    plan = schedule(state, 0.0)
    assert plan is not None
    plan.rows[0].mask = b"\xff"
    alone, leader = (Ranks(cast(Any, Failing()), lambda *_: None, lambda _: None) for _ in range(2))
    await leader.connect([near.detach()], 5)
    with pytest.raises(EngineBroken, match="step 1 failed on rank 0 of 2"):
        await leader.collect(leader.launch(plan))
    heard = await asyncio.wait_for(told.get(), 5)
    assert isinstance(heard, RunPlan) and [row.mask for row in heard.plan.rows] == [None]  # followers do not sample
    assert plan.rows[0].mask is not None
    with pytest.raises(ValueError):
        await alone.collect(alone.launch(plan))
    leader.runner = cast(Any, Unlucky())
    with pytest.raises(StepFailed):
        await leader.collect(leader.launch(plan))
    for ranks in (alone, leader):
        ranks.close()
    follower.close()
    await asyncio.sleep(0)
