"""The engine loop: plan, run, commit, publish. One asyncio task; everything between two steps happens here.

Where the device can, a step is planned and launched while the one before it runs, so that it never waits for us: at
most two are in flight. What arrives meanwhile waits in the inbox until a step is committed, and a page that a step in
flight uses keeps its owner until that one is. The three roles differ only in their hooks (`engine/roles/role.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from diptych.engine.console import Console
from diptych.engine.requests import Requests
from diptych.engine.step import Device, Step, collect, run_rows
from diptych.sched.commit import cancel, commit
from diptych.sched.plan import MAX_IN_FLIGHT, schedule
from diptych.sched.rows import split
from diptych.sched.state import SchedState
from diptych.text.grammar import GrammarCompiler
from diptych.types import Abort, Complete, Control, FromEngine, Outputs, Submit, ToEngine

STATS_PERIOD_S = 0.05  # a busy engine reports its state at most this often
IDLE_TICK_S = 1.0  # an idle engine looks at its deadlines at least this often


class Engine:
    """Runs one scheduler over one device.

    `emit` takes messages for the API process; `disturb`, if given, may change the scheduler's state before each step
    (fault injection in tests).
    """

    def __init__(
        self,
        state: SchedState,
        device: Device,
        emit: Callable[[FromEngine], None],
        *,
        grammars: GrammarCompiler | None,
        watchdog_s: float = 300.0,
        disturb: Callable[[SchedState, float], None] | None = None,
    ) -> None:
        self.state = state
        self.requests = Requests(state, grammars)
        self.console = Console(self.requests)
        self.wake = asyncio.Event()
        self._device = device
        self._emit = emit
        self._watchdog_s = watchdog_s
        self._disturb = disturb
        self._inbox: deque[ToEngine] = deque()
        self._flight: deque[Step] = deque()
        self._stats_at = 0.0
        self._stopping = False

    # ---- from outside ----

    def deliver(self, message: ToEngine) -> None:
        """Queue a message; it is handled before the next step."""
        self._inbox.append(message)
        self.wake.set()

    def stop(self) -> None:
        """Let `run` return after the steps in flight."""
        self._stopping = True
        self.wake.set()

    async def run(self) -> None:
        """Serve until `stop`. Raises only when the engine cannot go on."""
        most = MAX_IN_FLIGHT if self._device.overlaps else 1
        while not self._stopping or self._flight:
            # 1) take in what has arrived, and move the hand-overs on
            self._take_in()
            self.requests.role.advance(self._now())
            # 2) decide what runs next, and hand it to the device
            begun = len(self._flight) < most and self._begin()
            # 3) while that runs, tell the API process what the step before did
            self._publish(self._now(), idle=not self._flight)
            if not self._flight:
                await self._sleep()
            elif not begun or len(self._flight) == most:
                # 4) wait for the oldest step, and write down what it did
                await self._finish()
        self._publish(self._now(), idle=False)

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(IDLE_TICK_S):
                await self.wake.wait()
        except TimeoutError:
            pass

    def _take_in(self) -> None:
        """Handle what has arrived. A control message, and what came after it, waits until no step is in flight."""
        self.wake.clear()
        while self._inbox and not (self._flight and isinstance(self._inbox[0], Control)):
            self._handle(self._inbox.popleft(), self._now())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- one step ----

    def _begin(self) -> bool:
        """Plan a step and launch it, if there is one. None is planned ahead of a control message."""
        if self._stopping or self._inbox:
            return False
        if self._disturb is not None:
            self._disturb(self.state, self._now())
        plan = schedule(self.state, self._now())
        if plan is None:
            return False
        refused = self.requests.fill_masks(plan)
        self._flight.append(Step(plan, self._device.launch(plan), refused))
        return True

    async def _finish(self) -> None:
        """Wait for the oldest step, and commit it. If it failed, what was launched behind it is void, and its rows are
        run one by one; requests that cannot be computed end with an error."""
        step = self._flight.popleft()
        plan = step.plan
        result = await collect(self._device, step, self._watchdog_s)
        failed: list[str] = []
        if result is None:
            while self._flight:
                void = self._flight.pop()
                await collect(self._device, void, self._watchdog_s)
                cancel(self.state, void.plan, self._now())
            result, failed = await run_rows(self._device, plan, split(plan, self.state.seqs), self._watchdog_s)
        self.requests.fail_in_step(failed, step.refused)
        for event in commit(self.state, plan, result, self._now()):
            self.requests.on_event(event)

    # ---- messages ----

    def _handle(self, message: ToEngine, now: float) -> None:
        if isinstance(message, Submit):
            self.requests.submit(message.request, now)
        elif isinstance(message, Abort):
            self.requests.abort(message)
        elif isinstance(message, Complete):
            self.requests.complete(message)
        else:
            self._emit(self.console.answer(message))

    def _publish(self, now: float, *, idle: bool) -> None:
        """Send what steps and messages did to requests, and now and then the engine's state."""
        due = now - self._stats_at >= STATS_PERIOD_S
        if not self.requests.told and not (due or idle):
            return
        report = None
        if due or idle:
            report = self.console.report()
            self._stats_at = now
        self._emit(Outputs(self.requests.told, report))
        self.requests.told = []
