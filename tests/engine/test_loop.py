"""The engine loop alone: steps that fail or hang, and requests under an id that is taken."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from diptych.engine.channel import Channel
from diptych.engine.loop import Engine, EngineBroken
from diptych.engine.ranks import RankReady, Ranks, RunPlan, ToRank
from diptych.engine.roles.unified import UnifiedRole
from diptych.sched.audit import audit
from diptych.sched.plan import schedule
from diptych.sched.queue import add
from diptych.sched.state import SchedConfig, SchedState, new_state
from diptych.testing.mock_model import MockRunner, expected
from diptych.testing.virtual import run_virtual
from diptych.types import FromEngine, Output, Outputs, Plan, Request, Sampling, StepResult, Submit

Compute = Callable[[Plan], Awaitable[StepResult]]


class Server:
    """A server of both phases. `broken`: what happens at each step instead of computing, by step number."""

    def __init__(self, broken: dict[int, Callable[[], Awaitable[Any]]], watchdog_s: float = 300.0) -> None:
        self.runner = MockRunner(16, 4, context_len=64)
        self.state = make_state()
        self.outputs: dict[str, list[Output]] = {}
        self._broken = broken
        self.engine = Engine(self.state, self._compute, self._emit, grammars=None, watchdog_s=watchdog_s)
        UnifiedRole(self.engine)

    async def _compute(self, plan: Plan) -> StepResult:
        await asyncio.sleep(0.01)
        if plan.step in self._broken:
            await self._broken[plan.step]()
        return self.runner.run(plan)

    def _emit(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self.outputs.setdefault(output.rid, []).append(output)

    def submit(self, rid: str, prompt: list[int]) -> Request:
        request = Request(rid=rid, prompt=prompt, sampling=Sampling(max_new_tokens=4, temperature=0.0))
        self.engine.deliver(Submit(request))
        return request

    def codes(self, rid: str) -> list[str]:
        """The ends that were told; a request has one."""
        return [output.finish.code for output in self.outputs[rid] if output.finish is not None]

    def tokens(self, rid: str) -> list[int]:
        return [token for output in self.outputs[rid] for token in output.tokens]


def make_state() -> SchedState:
    return new_state(SchedConfig(page_size=4, context_len=64, reserved_decode_tokens=4), 16)


async def fail() -> None:
    raise ValueError("out of luck")


def test_a_failed_step_ends_its_own_requests_only() -> None:
    async def story() -> None:
        server = Server({2: fail})
        running = asyncio.ensure_future(server.engine.run())
        for rid in "ab":
            server.submit(rid, [1, 2, 3])
        await asyncio.sleep(1)
        assert server.codes("a") == server.codes("b") == ["step_failed"]
        later = server.submit("a", [1, 2, 3])
        server.outputs.clear()
        await asyncio.sleep(1)
        assert server.codes("a") == [""]
        assert server.tokens("a") == expected(later, server.runner.info, 64).tokens
        audit(server.state)
        server.engine.stop()
        await running

    run_virtual(story())


@pytest.mark.parametrize("hangs", [False, True])
def test_a_broken_engine_ends(hangs: bool) -> None:
    async def part() -> None:
        raise EngineBroken("rank 1 went another way")

    async def hang() -> None:
        await asyncio.sleep(1000)

    async def story() -> None:
        server = Server({1: hang if hangs else part}, watchdog_s=30)
        server.submit("a", [1])
        with pytest.raises(EngineBroken, match="watchdog" if hangs else "another way"):
            await server.engine.run()

    run_virtual(story())


def test_a_request_under_a_taken_id_leaves_the_first_alone() -> None:
    async def story() -> None:
        server = Server({})
        first = server.submit("a", [1, 2, 3])
        server.submit("a", [9])
        running = asyncio.ensure_future(server.engine.run())
        await asyncio.sleep(1)
        assert sorted(server.codes("a")) == ["", "invalid_value"]
        assert server.tokens("a") == expected(first, server.runner.info, 64).tokens
        server.engine.stop()
        await running

    run_virtual(story())


async def test_a_step_that_fails_on_rank_0_of_several_breaks_the_engine() -> None:
    """The other ranks are somewhere in that step: their next sums would mix two steps."""

    class Failing:
        def run(self, plan: Plan) -> StepResult:
            raise ValueError("out of memory")

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
        await leader.compute(plan)
    heard = await asyncio.wait_for(told.get(), 5)
    assert isinstance(heard, RunPlan) and [row.mask for row in heard.plan.rows] == [None]  # followers do not sample
    assert plan.rows[0].mask is not None
    with pytest.raises(ValueError):
        await alone.compute(plan)
    for ranks in (alone, leader):
        ranks.close()
    follower.close()
    await asyncio.sleep(0)
