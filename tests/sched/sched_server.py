"""A server without processes: scheduler, mock model, and what each request was given. Audited after every call."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from diptych.sched.audit import audit
from diptych.sched.commit import ChunkDone, Event, Sampled, cancel, commit
from diptych.sched.plan import schedule
from diptych.sched.queue import abort, add, check_request, join, release, reserve, retract
from diptych.sched.rows import split
from diptych.sched.state import Counters, SchedConfig, Seq, Status, new_state
from diptych.testing.mock_model import expected
from diptych.testing.mock_runner import MockRunner
from diptych.types import (
    Finish,
    FirstToken,
    Grammar,
    LogprobSpec,
    Plan,
    Request,
    RowResult,
    Sampling,
    StepResult,
    TokenLogprob,
)

CONTEXT = 64


@dataclass
class Got:
    """What one request has received so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    pages: list[tuple[int, int]] = field(default_factory=list)  # ranges named by ChunkDone
    aborted: bool = False


def config(**changes: object) -> SchedConfig:
    values: dict[str, object] = {
        "page_size": 4,
        "context_len": CONTEXT,
        "max_running": 8,
        "chunk_tokens": 16,
        "reserved_decode_tokens": 4,
        "eos_token_ids": (0,),
        **changes,
    }
    return SchedConfig(**values)  # type: ignore[arg-type]


def request(rid: str, prompt: Iterable[int], max_new: int = 8, **changes: object) -> Request:
    """A greedy request; `changes` go to Sampling, or to Request where it has the name."""
    own = {name: changes.pop(name) for name in ("namespace", "logprobs", "bootstrap") if name in changes}
    values: dict[str, object] = {"temperature": 0.0, **changes}
    sampling = Sampling(max_new_tokens=max_new, **values)  # type: ignore[arg-type]
    return Request(rid=rid, prompt=list(prompt), sampling=sampling, **own)  # type: ignore[arg-type]


class Server:
    """The engine's loop by hand: `submit`, `step` until `done`, `check`. Time is the number of steps.

    With `overlaps` a step plans ahead of the one in flight.
    """

    def __init__(
        self, num_pages: int = 64, *, world: int = 1, keep: bool = True, overlaps: bool = False, **changes: object
    ) -> None:
        settings = config(**changes)
        self.runner = MockRunner(
            num_pages, settings.page_size, world=world, context_len=settings.context_len, overlaps=overlaps
        )
        self.num_ahead = 0  # steps planned ahead
        self.state = new_state(settings, num_pages)
        self.requests: dict[str, Request] = {}
        self.got: dict[str, Got] = {}
        self.keep = keep  # finished sequences' pages go to the tree
        self.hold = False  # finished sequences are not released
        self.now = 0.0
        self.flight: deque[tuple[Plan, Plan | StepResult]] = deque()

    @property
    def plan(self) -> Plan | None:
        """The oldest in flight."""
        return self.flight[0][0] if self.flight else None

    def submit(self, *requests: Request) -> None:
        for one in requests:
            check_request(self.state, one)
            self.requests[one.rid] = one
            self.got[one.rid] = Got()
            add(self.state, one, self.now)
            audit(self.state)

    def begin(self) -> Plan | None:
        plan = schedule(self.state, self.now)
        audit(self.state)
        if plan is not None:
            self.num_ahead += bool(self.flight)
            self._fill_masks(plan)
            self.flight.append((plan, self.runner.launch(plan)))
        return plan

    def finish(self) -> list[Event]:
        plan, pending = self.flight.popleft()
        self.now += 1
        events = commit(self.state, plan, self.runner.collect(pending), self.now)
        audit(self.state)
        self.take(events)
        return events

    def step(self) -> list[Event] | None:
        """One step, and the next begun if that can be. None if there was nothing to compute."""
        if not self.flight and self.begin() is None:
            self.now += 1
            return None
        if self.runner.overlaps and len(self.flight) == 1:
            self.begin()
        return self.finish()

    def fail(self, poison: int) -> None:
        """The oldest step is lost after it has written into its pages, and so is what was begun behind it; its rows are
        run again, and row `poison` fails alone."""
        steps, self.flight = list(self.flight), deque()
        for _, pending in steps:
            self.runner.collect(pending)
        for plan, _ in reversed(steps[1:]):
            cancel(self.state, plan, self.now)
            audit(self.state)
        plan = steps[0][0]
        rows = [
            RowResult(-1) if part is None else self.runner.run(part).rows[0] for part in split(plan, self.state.seqs)
        ]
        if poison < len(rows):
            self.abort(plan.rows[poison].rid, keep=False)
            rows[poison] = RowResult(-1)
        events = commit(self.state, plan, StepResult(rows=rows), self.now)
        audit(self.state)
        self.take(events)

    def _fill_masks(self, plan: Plan) -> None:
        """Of those with a grammar: it allows what follows from all tokens so far."""
        for row in plan.rows:
            grammar = self.requests[row.rid].sampling.grammar
            if grammar is not None and row.samples:
                row.mask = mask_after(self.state.seqs[row.rid].tokens)

    def run(self, most: int = 2000) -> int:
        """Step until everything has ended. Returns the number of steps; fails if there are more than `most`."""
        steps = 0
        while self.state.waiting or self.state.running or self.flight:
            assert steps < most, f"{len(self.state.waiting)} waiting, {len(self.state.running)} running"
            self.step()
            steps += 1
        return steps

    def run_until(self, num_running: int) -> None:
        """Step until that many sequences decode."""
        for _ in range(100):
            if sum(len(seq.tokens) - seq.num_computed == 1 for seq in self.state.running) >= num_running:
                return
            self.step()
        raise AssertionError(f"{len(self.state.running)} running")

    def run_to_end(self) -> Counters:
        """Run, and check everything. Returns the counters."""
        self.run()
        self.check()
        self.check_empty()
        return self.state.counters

    def take(self, events: list[Event]) -> None:
        for event in events:
            got = self.got[event.seq.rid]
            assert got.finish is None and not got.aborted, "an event after the last"
            if isinstance(event, ChunkDone):
                got.pages.append((event.first_page, event.last_page))
            else:
                self._take_token(event, got)

    def _take_token(self, event: Sampled, got: Got) -> None:
        got.tokens.append(event.token)
        got.logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            assert got.prompt_logprobs is None, "prompt logprobs came twice"
            got.prompt_logprobs = event.prompt_logprobs
        got.finish = event.finish
        if event.finish is not None and not self.hold:
            self.release(event.seq)

    def release(self, seq: Seq, keep: bool | None = None) -> None:
        release(self.state, seq, keep=self.keep if keep is None else keep)
        audit(self.state)

    def abort(self, rid: str, keep: bool = True) -> None:
        seq = abort(self.state, rid, self.now)
        audit(self.state)
        if seq is not None:
            self.got[rid].aborted = True
            self.release(seq, keep)

    def retract(self, seq: Seq) -> None:
        retract(self.state, seq, self.now)
        audit(self.state)

    def reserve(self, one: Request) -> Seq | None:
        check_request(self.state, one)
        seq = reserve(self.state, one, self.now)
        audit(self.state)
        if seq is not None:
            self.requests[one.rid] = one
            self.got[one.rid] = Got()
        return seq

    def join(self, seq: Seq, first: FirstToken) -> None:
        events = join(self.state, seq, first, self.now)
        audit(self.state)
        self.take(events)

    def check(self) -> None:
        """Every request that ended has got exactly what it should; those that were aborted a beginning of it."""
        for rid, got in self.got.items():
            one = self.requests[rid]
            mask = mask_after if one.sampling.grammar is not None else None
            should = expected(one, self.runner.info, self.state.max_len, mask)
            if got.aborted or got.finish is None:
                assert got.tokens == should.tokens[: len(got.tokens)], rid
                assert got.logprobs == should.logprobs[: len(got.logprobs)], rid
            else:
                assert got.tokens == should.tokens, rid
                assert got.logprobs == should.logprobs, rid
                assert got.finish == should.finish, rid
                assert got.prompt_logprobs == should.prompt_logprobs, rid

    def check_empty(self) -> None:
        """Nothing is left but what the tree keeps."""
        audit(self.state)
        assert not self.state.seqs
        assert self.state.pool.num_free + self.state.tree.evictable_pages == self.state.pool.num_pages
        self.state.tree.flush()
        assert self.state.pool.num_free == self.state.pool.num_pages


def mask_after(tokens: Sequence[int]) -> bytes:
    """A grammar: two of three tokens are allowed; which, depends on all before."""
    allowed = (np.arange(101) + sum(tokens)) % 3 != 0
    return np.packbits(allowed, bitorder="little").tobytes()


def hand_over(prefill: Server, decode: Server, rid: str, seq: Seq) -> FirstToken:
    """Copy a prefilled sequence's pages into those decode reserved, head by head, but not what decode has already."""
    source = prefill.state.seqs[rid]
    assert source.status is Status.FINISHED
    skip = seq.prefix_tokens // decode.state.config.page_size
    num_heads = prefill.runner.info.num_kv_heads
    for head in range(num_heads):
        data = _store(prefill, head).read(source.pages[skip : len(seq.pages)], *_local(prefill, head))
        _store(decode, head).write(seq.pages[skip:], *_local(decode, head), data)
    got = prefill.got[rid]
    return FirstToken(got.tokens[0], source.cached_tokens, got.logprobs[0])


def _store(server: Server, head: int):  # type: ignore[no-untyped-def]
    return server.runner.stores[head // server.runner.store.num_heads]


def _local(server: Server, head: int) -> tuple[int, int]:
    local = head % server.runner.store.num_heads
    return local, local + 1


def mixed(rid: str, prompt: list[int], seed: int, max_new: int) -> Request:
    """A request whose settings follow from its seed: sampled or not, penalties, a grammar, logprobs, namespaces, stop
    tokens."""
    spec = [
        None,
        None,
        LogprobSpec(),
        LogprobSpec(prompt_start=0, top=2),
        LogprobSpec(prompt_start=len(prompt) // 2, token_ids=(3, 5)),
    ][seed % 5]
    return request(
        rid,
        prompt,
        max_new,
        temperature=float(seed % 3 != 0),
        seed=seed,
        presence_penalty=0.5 * (seed % 4 == 1),
        min_new_tokens=3 * (seed % 7 == 2),
        ignore_eos=seed % 11 == 3,
        stop_token_ids=(1, 2) if seed % 6 == 4 else (),
        grammar=Grammar("regex", "x") if seed % 13 == 5 else None,
        namespace="b" if seed % 4 == 3 else "",
        logprobs=spec,
    )
