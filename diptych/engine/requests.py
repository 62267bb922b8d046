"""The requests of one engine, from their arrival to their one end, and what is to be told of them."""

from __future__ import annotations

import asyncio

from diptych.engine.roles.role import Role
from diptych.errors import Aborted, BadRequest, DiptychError
from diptych.sched.events import ChunkDone, Event
from diptych.sched.queue import abort, complete, release
from diptych.sched.state import SchedState, Seq
from diptych.text.grammar import GrammarCompiler, GrammarState
from diptych.types import Abort, Complete, Finish, Output, Plan, Request

STEP_FAILED = Finish("abort", message="the model failed on this request", status=500, code="step_failed")


class Requests:
    """A request is in the scheduler's hands (`state`), in the role's, or in both; here is what they share.

    `told` collects outputs for the API process; the loop sends them and starts it anew.
    """

    def __init__(self, state: SchedState, grammars: GrammarCompiler | None) -> None:
        self.state = state
        self.role: Role  # set by the role itself, which needs this first
        self.told: list[Output] = []
        self._grammars = grammars
        self._grammar_of: dict[str, GrammarState] = {}

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def num_grammars(self) -> int:
        """Of requests that are not over."""
        return len(self._grammar_of)

    # ---- what the API process asks for ----

    def submit(self, request: Request, now: float) -> None:
        if request.rid in self.state.seqs or request.rid in self.role.held():
            # Not `refuse`: the grammar under this id is the other one's.
            taken = BadRequest(f"request id {request.rid} is in use by another request", param="rid")
            self.told.append(Output(rid=request.rid, finish=_ended_by(taken)))
            return
        try:
            if request.sampling.grammar is not None:
                if self._grammars is None:
                    raise BadRequest("this server runs with --grammar-backend none: no structured output")
                self._grammar_of[request.rid] = GrammarState(request.sampling, self._grammars)
            self.role.admit(request, now)
        except DiptychError as error:
            self.refuse(request.rid, _ended_by(error))

    def abort(self, message: Abort) -> None:
        rids = [message.rid] if message.rid else [*self.state.seqs, *self.role.held()]
        for rid in dict.fromkeys(rids):
            self.fail(rid, Finish("abort", message=message.message, status=Aborted.status, code=message.code))

    def complete(self, message: Complete) -> None:
        seq = complete(self.state, message.rid)
        if seq is not None:
            self.end(seq, keep=True)

    # ---- what steps do to them ----

    def fill_masks(self, plan: Plan) -> list[tuple[str, DiptychError]]:
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

    def fail_in_step(self, failed: list[str], refused: list[tuple[str, DiptychError]]) -> None:
        """End what a step could not compute, and those that `fill_masks` returned for it."""
        for rid in failed:
            self.fail(rid, STEP_FAILED)
        for rid, error in refused:
            self.fail(rid, _ended_by(error))

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
        self.told.append(
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

    # ---- how they end ----

    def publish_end(self, seq: Seq, finish: Finish) -> None:
        """Tell the API process that a sequence ended, without a further token."""
        self.told.append(
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
        self.told.append(Output(rid=rid, finish=finish))

    def forget(self, rid: str) -> None:
        """Drop what is kept of a request here."""
        self._grammar_of.pop(rid, None)

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

    def fail(self, rid: str, finish: Finish) -> None:
        """End a request wherever it is: in the role's hands, in the scheduler, in both. Unknown ones are ignored."""
        held = self.role.abort(rid, finish)
        if not self.end_early(rid, finish) and held:
            self.state.counters.aborted += 1
            self.refuse(rid, finish)


def _ended_by(error: DiptychError) -> Finish:
    return Finish("abort", message=error.message, status=error.status, code=error.code)
