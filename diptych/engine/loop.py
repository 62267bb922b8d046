"""The engine loop: plan, run, commit, publish. One asyncio task; everything between two steps happens here.

Where the device can, a step is planned and launched while the one before it runs, so that it never waits for us: at
most two are in flight. What arrives meanwhile waits in the inbox until a step is committed, and a page that a step in
flight uses keeps its owner until that one is. The three roles differ only in the hooks of `Role`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from diptych.engine.step import Device, Step, collect, run_rows
from diptych.errors import Aborted, AuditError, BadRequest, DiptychError
from diptych.sched import audit as ledger
from diptych.sched.commit import cancel, commit
from diptych.sched.events import ChunkDone, Event, Sampled
from diptych.sched.plan import MAX_IN_FLIGHT, schedule
from diptych.sched.queue import abort, complete, release, retract
from diptych.sched.rows import split
from diptych.sched.state import SchedState, Seq
from diptych.sched.stats import stats
from diptych.text.grammar import GrammarCompiler, GrammarState
from diptych.types import (
    Abort,
    Complete,
    Control,
    ControlReply,
    Finish,
    FromEngine,
    Output,
    Outputs,
    Plan,
    Request,
    Stats,
    Submit,
    ToEngine,
)

log = logging.getLogger(__name__)

STATS_PERIOD_S = 0.05  # a busy engine reports its state at most this often
IDLE_TICK_S = 1.0  # an idle engine looks at its deadlines at least this often


STEP_FAILED = Finish("abort", message="the model failed on this request", status=500, code="step_failed")


class Role(Protocol):
    """What a prefill server, a decode server and a server of both phases do differently."""

    retracts: bool  # running sequences may lose their pages at any time between two steps

    def admit(self, request: Request, now: float) -> None:
        """A new request. Raises DiptychError if it cannot be served; nothing is held then."""

    def advance(self, now: float) -> None:
        """Between steps: move hand-overs on."""

    def chunk_done(self, event: ChunkDone) -> None:
        """Some of a prompt's pages were filled."""

    def finished(self, seq: Seq, event: Sampled) -> bool:
        """The sequence has its last token. False: the role publishes the end and releases the pages later."""

    def abort(self, rid: str, finish: Finish) -> bool:
        """Forget a request that the role holds, and tell the other side. True if its end is still to be published."""

    def held(self) -> list[str]:
        """Requests that the role knows, in its queues or in a hand-over."""

    def add_stats(self, report: Stats) -> None:
        """Fill in the role's part of the report."""


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
        self.role: Role  # set by the role itself, which needs the engine first
        self.wake = asyncio.Event()
        self.facts: dict[str, Any] = {}  # what the worker adds to the `state` report
        self.census: Callable[[], dict[str, Any]] = dict  # and to the `audit` report
        self._device = device
        self._emit = emit
        self._grammars = grammars
        self._watchdog_s = watchdog_s
        self._disturb = disturb
        self._inbox: deque[ToEngine] = deque()
        self._flight: deque[Step] = deque()
        self._outputs: list[Output] = []
        self._grammar_of: dict[str, GrammarState] = {}
        self._last_report = Stats()
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
            self.role.advance(self.now())
            # 2) decide what runs next, and hand it to the device
            begun = len(self._flight) < most and self._begin()
            # 3) while that runs, tell the API process what the step before did
            self._publish(self.now(), idle=not self._flight)
            if not self._flight:
                await self._sleep()
            elif not begun or len(self._flight) == most:
                # 4) wait for the oldest step, and write down what it did
                await self._finish()
        self._publish(self.now(), idle=False)

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
            self._handle(self._inbox.popleft(), self.now())

    # ---- one step ----

    def _begin(self) -> bool:
        """Plan a step and launch it, if there is one. None is planned ahead of a control message."""
        if self._stopping or self._inbox:
            return False
        if self._disturb is not None:
            self._disturb(self.state, self.now())
        plan = schedule(self.state, self.now())
        if plan is None:
            return False
        refused = self._fill_masks(plan)
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
                cancel(self.state, void.plan, self.now())
            result, failed = await run_rows(self._device, plan, split(plan, self.state.seqs), self._watchdog_s)
        for rid in failed:
            self._fail(rid, STEP_FAILED)
        for rid, error in step.refused:
            self._fail(rid, _ended_by(error))
        for event in commit(self.state, plan, result, self.now()):
            self.on_event(event)

    def _fill_masks(self, plan: Plan) -> list[tuple[str, DiptychError]]:
        """Put each constrained row's allowed tokens into the plan. Returns the requests whose grammar gave up."""
        refused: list[tuple[str, DiptychError]] = []
        for row in plan.rows if self._grammar_of else ():
            grammar = self._grammar_of.get(row.rid)
            if grammar is None or not row.samples:
                continue
            try:
                row.mask = grammar.mask()
            except DiptychError as error:
                refused.append((row.rid, error))
        return refused

    def on_event(self, event: Event) -> None:
        """Pass on what a step (or a finished hand-over) did to one sequence."""
        if isinstance(event, ChunkDone):
            self.role.chunk_done(event)
            return
        seq, finish = event.seq, event.finish
        request = seq.request
        if request.rid in self._grammar_of:
            self._grammar_of[request.rid].advance(event.token)
        if finish is not None and not self.role.finished(seq, event):
            finish = None
        self._outputs.append(
            Output(
                rid=request.rid,
                tokens=[event.token],
                logprobs=None if request.logprobs is None or event.logprob is None else [event.logprob],
                prompt_logprobs=event.prompt_logprobs,
                finish=finish,
                prompt_tokens=seq.num_prompt,
                cached_tokens=seq.cached_tokens,
                num_retractions=seq.num_retractions,
            )
        )
        if finish is not None:
            self.end(seq, keep=True)

    # ---- for the roles ----

    def publish_end(self, seq: Seq, finish: Finish) -> None:
        """Tell the API process that a sequence ended, without a further token."""
        self._outputs.append(
            Output(
                rid=seq.rid,
                finish=finish,
                prompt_tokens=seq.num_prompt,
                cached_tokens=seq.cached_tokens,
                num_retractions=seq.num_retractions,
            )
        )

    def refuse(self, rid: str, finish: Finish) -> None:
        """End a request that never became a sequence."""
        self.forget(rid)
        self._outputs.append(Output(rid=rid, finish=finish))

    def forget(self, rid: str) -> None:
        """Drop what the loop itself keeps of a request."""
        self._grammar_of.pop(rid, None)

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def end(self, seq: Seq, *, keep: bool) -> None:
        """Give the sequence's pages back; with `keep` its prefix stays in the cache."""
        self.forget(seq.rid)
        release(self.state, seq, keep=keep)

    def end_early(self, rid: str, finish: Finish) -> bool:
        """Take a sequence out of the scheduler, wherever it is, and publish why. False if there is none."""
        seq = abort(self.state, rid, self.now())
        if seq is None:
            return False
        self.end(seq, keep=False)
        self.publish_end(seq, finish)
        return True

    # ---- messages ----

    def _handle(self, message: ToEngine, now: float) -> None:
        if isinstance(message, Submit):
            self._submit(message.request, now)
        elif isinstance(message, Abort):
            rids = [message.rid] if message.rid else [*self.state.seqs, *self.role.held()]
            for rid in dict.fromkeys(rids):
                self._fail(rid, Finish("abort", message=message.message, status=Aborted.status, code=message.code))
        elif isinstance(message, Complete):
            seq = complete(self.state, message.rid)
            if seq is not None:
                self.end(seq, keep=True)
        else:
            self._control(message)

    def _submit(self, request: Request, now: float) -> None:
        if request.rid in self.state.seqs or request.rid in self.role.held():
            # Not `refuse`: the grammar under this id is the other one's.
            taken = BadRequest(f"request id {request.rid} is in use by another request", param="rid")
            self._outputs.append(Output(rid=request.rid, finish=_ended_by(taken)))
            return
        try:
            if request.sampling.grammar is not None:
                if self._grammars is None:
                    raise BadRequest("this server runs with --grammar-backend none: no structured output")
                self._grammar_of[request.rid] = GrammarState(request.sampling, self._grammars)
            self.role.admit(request, now)
        except DiptychError as error:
            self.refuse(request.rid, _ended_by(error))

    def _fail(self, rid: str, finish: Finish) -> None:
        """End a request wherever it is: in the role's hands, in the scheduler, in both. Unknown ones are ignored."""
        held = self.role.abort(rid, finish)
        if not self.end_early(rid, finish) and held:
            self.state.counters.aborted += 1
            self.refuse(rid, finish)

    def _control(self, message: Control) -> None:
        try:
            result = self._run_control(message.op, message.args)
            self._emit(ControlReply(message.id, True, result))
        except DiptychError as error:
            self._emit(
                ControlReply(message.id, False, {"message": error.message, "status": error.status, "code": error.code})
            )

    def _run_control(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        state = self.state
        if op == "pause":
            state.paused = True
            if args.get("mode") == "retract" and self.role.retracts:
                for seq in reversed(list(state.running)):
                    retract(state, seq, self.now())
            return {"paused": True}
        if op == "continue":
            state.paused = False
            return {"paused": False}
        if op == "flush_cache":
            if state.seqs or self.role.held():
                raise BadRequest("the cache can be flushed only when no request is running; wait, or abort them first")
            return {"flushed_pages": state.tree.flush()}
        if op == "audit":
            return self._audit()
        if op == "state":
            return {
                "requests": len(state.seqs),
                "held": len(self.role.held()),
                "stats": self._last_report,
                **self.facts,
            }
        raise BadRequest(f"unknown control operation {op!r}")

    def _audit(self) -> dict[str, Any]:
        """Recompute the page ledger. `ok` false is a defect of ours, and is logged as one."""
        try:
            ledger.audit(self.state)
        except AuditError as error:
            log.error("audit: %s", error.message)
            return {"ok": False, "message": error.message, **self.census()}
        pool, tree = self.state.pool, self.state.tree
        return {
            "ok": True,
            "pages": pool.num_pages,
            "free": pool.num_free,
            "cached": sum(len(node.pages) for node in tree.nodes()),
            "requests": len(self.state.seqs),
            "held": len(self.role.held()),
            "grammars": len(self._grammar_of),
            **self.census(),
        }

    # ---- reports ----

    def _report(self) -> Stats:
        report = stats(self.state)
        self.role.add_stats(report)
        self._last_report = report
        return report

    def _publish(self, now: float, *, idle: bool) -> None:
        due = now - self._stats_at >= STATS_PERIOD_S
        if not self._outputs and not (due or idle):
            return
        report = None
        if due or idle:
            report = self._report()
            self._stats_at = now
        self._emit(Outputs(self._outputs, report))
        self._outputs = []


def _ended_by(error: DiptychError) -> Finish:
    return Finish("abort", message=error.message, status=error.status, code=error.code)
