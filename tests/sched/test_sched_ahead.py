"""A step planned while the one before it is in flight: what it may know, whom it leaves out, what it does not touch."""

from __future__ import annotations

import pytest
from sched_server import Server, request

from diptych.errors import AuditError
from diptych.sched.audit import audit
from diptych.sched.commit import cancel
from diptych.sched.plan import schedule
from diptych.sched.state import Status
from diptych.types import Grammar, LogprobSpec, Plan


def ahead_of(server: Server) -> Plan:
    """Begin two steps; the second."""
    assert server.begin() is not None
    plan = server.begin()
    assert plan is not None
    return plan


def flying(num_running: int = 1, **changes: object) -> Server:
    """Requests r0, r1, … that decode and never stop, 4 tokens each so far, nothing in flight."""
    server = Server(overlaps=True, **changes)  # type: ignore[arg-type]
    for index in range(num_running):
        server.submit(request(f"r{index}", [50 + index, 1, 2], 12, ignore_eos=True))
    server.begin()
    server.finish()
    return server


def test_tokens_in_flight_are_named_by_their_rows() -> None:
    server = flying(3)
    server.submit(request("p", range(10, 31), 2, ignore_eos=True))  # one whole chunk, then the rest
    first = server.begin()
    assert first is not None
    assert [(row.rid, row.num_new, row.samples) for row in first.rows][2:] == [("r2", 1, True), ("p", 12, False)]
    server.abort("r0")
    plan = server.begin()
    assert plan is not None
    rows = [(row.rid, row.num_cached, row.num_new, row.samples, row.position, row.num_output) for row in plan.rows]
    assert rows == [("r1", 4, 1, True, 5, 2), ("r2", 4, 1, True, 5, 2), ("p", 12, 9, True, 21, 0)]
    assert plan.token_ids.tolist() == [-2, -3, *range(22, 31)]
    assert (plan.positions.tolist(), plan.kv_lens.tolist()) == ([4, 4, *range(12, 21)], [5, 5, 21])
    server.run_to_end()


def test_who_begins_is_planned_ahead_too() -> None:
    server = flying(1)
    assert server.begin() is not None
    server.submit(request("b", [7, 8, 9], 3, ignore_eos=True))
    plan = server.begin()
    assert plan is not None
    assert [row.rid for row in plan.rows] == ["r0", "b"]
    server.finish()
    plan = server.begin()
    assert plan is not None
    assert plan.token_ids.tolist() == [-1, -2]  # the rows of the step that is in flight now
    server.run_to_end()


@pytest.mark.parametrize("max_new", [1, 2, 3])
def test_a_last_token_by_length_is_known_before(max_new: int) -> None:
    server = Server(overlaps=True)
    server.submit(request("a", [1, 2, 3], max_new, ignore_eos=True))
    steps = server.run()
    assert (steps, server.state.counters.steps) == (max_new, max_new)
    server.run_to_end()


def test_a_token_after_an_end_is_dropped_and_its_pages_stay_until_it_is_computed() -> None:
    server = Server(overlaps=True)
    prompt = range(1, 13)
    server.submit(request("a", prompt, 20, ignore_eos=True))
    server.run()
    third = server.got["a"].tokens[2]
    assert third not in server.got["a"].tokens[:2]
    server.submit(request("b", prompt, 20, ignore_eos=False, stop_token_ids=(third,)))
    while server.got["b"].finish is None:
        server.step()
    seq = server.state.seqs["b"]
    assert (seq.status, seq.in_flight, len(seq.pages)) == (Status.FINISHED, 1, 4)
    assert [row.rid for row in server.state.flight[0].rows] == ["b"]
    assert server.finish() == []  # of the step that computed a token in vain
    assert server.got["b"].tokens == server.got["a"].tokens[:3]
    server.run_to_end()


@pytest.mark.parametrize(
    "changes", [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"grammar": Grammar("regex", "x")}]
)
def test_nothing_overtakes_a_request_whose_token_is_needed_at_once(changes: dict[str, object]) -> None:
    server = flying(1, chunk_tokens=8)
    server.submit(request("p", range(1, 15), 4, ignore_eos=True, **changes))
    plan = ahead_of(server)  # chunks of its prompt are planned ahead, and so is the last one
    assert [row.rid for row in plan.rows] == ["r0", "p"]
    server.finish()
    plan = server.begin()
    assert plan is not None and plan.rows[1].samples
    server.finish()
    assert server.begin() is None
    server.finish()
    assert server.begin() is not None
    assert server.begin() is None
    server.run_to_end()


def test_memory_that_is_short_is_waited_for_and_taken_from_nobody() -> None:
    server = Server(6, overlaps=True, radix=False, reserved_decode_tokens=0)
    server.submit(request("a", range(1, 11), 14, ignore_eos=True), request("b", range(1, 11), 14, ignore_eos=True))
    while server.begin() is not None:
        if len(server.flight) == 2:
            server.finish()
    assert (len(server.flight), server.state.pool.num_free) == (1, 0)
    assert server.state.counters.retractions == 0
    server.finish()
    assert server.begin() is not None
    assert server.state.counters.retractions == 1
    server.run_to_end()


@pytest.mark.parametrize("how", ["retract", "abort"])
def test_what_is_taken_away_leaves_when_nothing_computes_it(how: str) -> None:
    server = flying(2)
    ahead_of(server)
    seq = server.state.seqs["r0"]
    pages = list(seq.pages)
    if how == "retract":
        server.retract(seq)
    else:
        server.abort("r0")
    server.finish()
    assert (seq.in_flight, seq.pages) == (1, pages)
    plan = server.begin()
    assert plan is not None and [row.rid for row in plan.rows] == ["r1"]
    server.finish()
    assert seq.pages == []
    assert seq.status is (Status.WAITING if how == "retract" else Status.RELEASED)
    server.run_to_end()


def test_prompt_logprobs_of_chunks_in_flight_come_once() -> None:
    server = Server(overlaps=True, chunk_tokens=4)
    server.submit(request("a", range(1, 31), 3, logprobs=LogprobSpec(prompt_start=5, top=1)))
    server.run_to_end()
    assert server.num_ahead > 6


def test_a_cancelled_plan_is_planned_again() -> None:
    server = flying(2)
    server.submit(request("p", range(10, 20), 3, ignore_eos=True))
    server.begin()
    before = [(seq.num_planned, seq.num_pending, seq.in_flight, seq.row) for seq in server.state.running]
    server.submit(request("q", range(60, 70), 3, ignore_eos=True))
    server.abort("r0")
    plan = server.begin()
    assert plan is not None
    with pytest.raises(AuditError, match="cannot be cancelled"):
        cancel(server.state, server.state.flight[0], 0.0)
    server.flight.pop()
    server.runner._launched.pop()
    cancel(server.state, plan, 0.0)
    audit(server.state)
    states = [(seq.num_planned, seq.num_pending, seq.in_flight, seq.row) for seq in server.state.running]
    assert states == [*before[1:], (0, 0, 0, states[-1][3])]
    again = schedule(server.state, 0.0)
    assert again is not None
    assert again.step == plan.step + 1
    assert again.token_ids.tolist() == plan.token_ids.tolist() == [-2, -3, *range(60, 70)]
    cancel(server.state, again, 0.0)
    server.run_to_end()


def test_a_sequence_that_ends_while_only_a_cancelled_plan_had_it_is_gone() -> None:
    server = flying(2)
    server.begin()
    server.submit(request("q", [1, 2, 3]))
    plan = server.begin()
    assert plan is not None
    server.abort("q")
    assert "q" in server.state.seqs
    server.flight.pop()
    server.runner._launched.pop()
    cancel(server.state, plan, 0.0)
    assert "q" not in server.state.seqs
    server.run_to_end()
