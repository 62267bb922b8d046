"""Any sequence of calls on one scheduler: a sound ledger after each, exact outputs, an end within a bound of steps."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sched_server import Server, hand_over, mixed, request

from diptych.sched.audit import audit
from diptych.sched.queue import abort, leave_to_writer, writer_stopped
from diptych.sched.state import Seq, Status
from diptych.types import Bootstrap, FirstToken, Request

TRUNK = [1 + index * 37 % 100 for index in range(32)]  # what most prompts begin with
prompts = st.tuples(st.integers(0, 28), st.lists(st.integers(1, 3), min_size=1, max_size=4)).map(
    lambda drawn: [*TRUNK[: drawn[0]], *drawn[1]]
)


class SchedMachine(RuleBasedStateMachine):
    """A small pool: eviction and retraction are common. A second server computes prompts for reserve and join."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.transferring: list[tuple[Seq, FirstToken]] = []
        self.dying: list[Seq] = []  # aborted, their writer not yet stopped
        self.prefill = Server(100, context_len=40)
        self.prefill.hold = True

    @initialize(
        num_pages=st.sampled_from([10, 11, 13, 20]),
        chunk_tokens=st.sampled_from([1, 4, 6, 16, -1]),
        max_running=st.sampled_from([1, 3, 8]),
        radix=st.booleans(),
        policy=st.sampled_from(["fcfs", "lpm"]),
        reserved=st.sampled_from([0, 4, 512]),
        overlaps=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        chunk_tokens: int,
        max_running: int,
        radix: bool,
        policy: str,
        reserved: int,
        overlaps: bool,
    ) -> None:
        self.server = Server(
            num_pages,
            context_len=40,
            chunk_tokens=chunk_tokens,
            max_running=max_running,
            radix=radix,
            policy=policy,
            reserved_decode_tokens=reserved,
            overlaps=overlaps,
        )

    @property
    def state(self):  # type: ignore[no-untyped-def]
        return self.server.state

    def name(self) -> str:
        self.count += 1
        return f"r{self.count}"

    # ---- what clients do ----

    @rule(several=st.lists(prompts, min_size=1, max_size=4), seed=st.integers(0, 999), max_new=st.integers(1, 16))
    def submit(self, several: list[list[int]], seed: int, max_new: int) -> None:
        for prompt in several:
            self.server.submit(mixed(self.name(), prompt, seed, max_new))

    @precondition(lambda self: self.state.seqs)
    @rule(data=st.data(), keep=st.booleans())
    def abort(self, data: st.DataObject, keep: bool) -> None:
        rid = data.draw(st.sampled_from(sorted(self.state.seqs)))
        if self.state.seqs[rid].status is not Status.TRANSFERRING:
            self.server.abort(rid, keep)

    # ---- what the engine does ----

    @precondition(lambda self: len(self.server.flight) <= self.server.runner.overlaps)
    @rule()
    def begin(self) -> None:
        self.server.begin()

    @precondition(lambda self: self.server.plan is not None)
    @rule()
    def finish(self) -> None:
        self.server.finish()

    @rule(steps=st.integers(1, 20))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.server.step()

    @precondition(lambda self: self.server.plan is not None)
    @rule(poison=st.integers(0, 12))
    def fail(self, poison: int) -> None:
        self.server.fail(poison)

    @precondition(lambda self: self.state.running)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        self.server.retract(self.state.running[data.draw(st.integers(0, len(self.state.running) - 1))])

    @precondition(lambda self: len(self.server.flight) < 2)
    @rule()
    def pause(self) -> None:
        self.state.paused = True
        assert self.server.begin() is None
        self.state.paused = False

    @precondition(lambda self: self.count % 8 == 7)
    @rule()
    def flush(self) -> None:
        self.state.tree.flush()
        audit(self.state)

    # ---- the decode role ----

    @rule(prompt=prompts, max_new=st.integers(1, 12))
    def reserve(self, prompt: list[int], max_new: int) -> None:
        rid = self.name()
        one = request(rid, prompt, max_new, bootstrap=Bootstrap("p", 1, self.count))
        seq = self.server.reserve(one)
        if seq is None:
            return
        self.prefill.submit(Request(rid=rid, prompt=prompt, sampling=request(rid, prompt, 1).sampling))
        self.prefill.run()
        self.transferring.append((seq, hand_over(self.prefill, self.server, rid, seq)))
        self.prefill.release(self.prefill.state.seqs[rid])

    @precondition(lambda self: self.transferring)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        seq, first = self.transferring.pop(data.draw(st.integers(0, len(self.transferring) - 1)))
        self.server.join(seq, first)

    @precondition(lambda self: self.transferring)
    @rule(data=st.data(), forget=st.booleans())
    def abort_transfer(self, data: st.DataObject, forget: bool) -> None:
        """Pages stay held until the writer has stopped, with the sequence or without."""
        seq, _ = self.transferring.pop(data.draw(st.integers(0, len(self.transferring) - 1)))
        assert abort(self.state, seq.rid, self.server.now) is seq
        self.server.got[seq.rid].aborted = True
        audit(self.state)
        if forget:
            leave_to_writer(self.state, seq)
            audit(self.state)
        self.dying.append(seq)

    @precondition(lambda self: self.dying)
    @rule(keep=st.booleans())
    def writer_stopped(self, keep: bool) -> None:
        self.bury(self.dying.pop(), keep)

    def bury(self, seq: Seq, keep: bool) -> None:
        if seq.status is not Status.RELEASED:
            self.server.release(seq, keep)
        elif seq.request.bootstrap is not None:
            writer_stopped(self.state, seq.request.bootstrap.room)
            audit(self.state)

    # ---- the end ----

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        while self.transferring:
            self.server.join(*self.transferring.pop())
        while self.dying:
            self.bury(self.dying.pop(), True)
        # each sequence has at most 40 tokens to compute; the oldest always computes at least one a step
        self.server.run(most=40 * (len(self.state.seqs) + 1))
        self.server.check()
        self.server.check_empty()
        assert all(got.aborted or got.finish is not None for got in self.server.got.values())
        self.prefill.check_empty()


SchedMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
TestSchedMachine = SchedMachine.TestCase
