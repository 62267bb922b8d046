"""What a result means: ends, completed pages, prompt logprobs, counters."""

from __future__ import annotations

import msgspec
import pytest
from sched_server import Server, request

from diptych.errors import AuditError
from diptych.sched.commit import ChunkDone, Event, Sampled, commit
from diptych.sched.stats import stats
from diptych.types import Bootstrap, Finish, FirstToken, LogprobSpec, Plan, RowResult, Stats, StepResult, TokenLogprob


def commit_tokens(server: Server, *tokens: int, eager: bool = False) -> list[Event]:
    """Plan a step and commit the given tokens as its result."""
    plan = server.begin()
    assert plan is not None
    server.flight.clear()
    server.now += 0.5
    rows = [RowResult(token) for token in tokens]
    return commit(server.state, plan, StepResult(rows=rows, duration_s=0.25, eager=eager), server.now)


def finish_of(events: list[Event]) -> Finish | None:
    (sampled,) = [event for event in events if isinstance(event, Sampled)]
    return sampled.finish


# ---- how a sequence ends ----


@pytest.mark.parametrize(
    ("changes", "tokens", "finish"),
    [
        ({}, [5, 0], Finish("stop", 0)),  # end of sequence
        ({"stop_token_ids": (7, 8)}, [5, 8], Finish("stop", 8)),
        ({"ignore_eos": True, "stop_token_ids": (7,)}, [0, 7, 5], Finish("length")),
        ({"min_new_tokens": 2}, [0, 0, 0], Finish("stop", 0)),  # the first that may be an end is the third
        ({"min_new_tokens": 1, "stop_token_ids": (7,)}, [7, 7], Finish("stop", 7)),
        ({}, [5, 5, 5], Finish("length")),
        ({}, [5, 5, 0], Finish("stop", 0)),  # a stop counts before the length
        ({"max_new": 1}, [5], Finish("length")),
        ({"max_new": 1}, [0], Finish("stop", 0)),
    ],
)
def test_ends(changes: dict[str, object], tokens: list[int], finish: Finish) -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3], **{"max_new": 3, **changes}))  # type: ignore[arg-type]
    for token in tokens[:-1]:
        assert finish_of(commit_tokens(server, token)) is None
    assert finish_of(commit_tokens(server, tokens[-1])) == finish
    assert server.state.seqs["a"].tokens == [1, 2, 3, *tokens]
    assert server.state.seqs["a"].num_computed == 3 + len(tokens) - 1


# ---- pages complete ----


def test_chunks_name_each_page_once_in_order_with_the_partial_one_last() -> None:
    server = Server(chunk_tokens=8)
    server.submit(request("a", range(1, 19), 3, ignore_eos=True))
    events = [server.step() or [] for _ in range(4)]
    seq = server.state.seqs["a"]
    assert events[0] == [ChunkDone(seq, 0, 2)]
    assert events[1] == [ChunkDone(seq, 2, 4)]
    assert events[2][0] == ChunkDone(seq, 4, 5)
    assert isinstance(events[2][1], Sampled)
    assert [type(event) for event in events[3]] == [Sampled]


def test_the_first_chunk_names_cached_pages_too() -> None:
    server = Server()
    server.submit(request("a", range(1, 19), 1))
    server.run()
    server.submit(request("b", range(1, 19), 1))
    server.run()
    assert server.got["b"].pages == [(0, 5)]


def test_a_retracted_prompt_names_no_page_twice() -> None:
    server = Server(chunk_tokens=8)
    server.submit(request("a", range(1, 31), 3))
    server.step()
    server.step()
    server.retract(server.state.running[0])
    server.state.tree.flush()
    server.run_to_end()
    assert server.got["a"].pages == [(0, 2), (2, 4), (4, 6), (6, 8)]


# ---- prompt logprobs ----


@pytest.mark.parametrize("start", [0, 1, 5, 17])
@pytest.mark.parametrize("retract_after", [None, 1, 2])
def test_prompt_logprobs_come_once_and_whole_whatever_happens(start: int, retract_after: int | None) -> None:
    server = Server(chunk_tokens=8)
    server.submit(request("other", range(1, 15), 1))
    server.run()
    spec = LogprobSpec(prompt_start=start, top=2)
    server.submit(request("a", range(1, 19), 5, logprobs=spec, ignore_eos=True))
    for step in range(8):
        if step == retract_after:
            server.retract(server.state.running[0])
        server.step()
    server.run_to_end()
    got = server.got["a"].prompt_logprobs
    assert got is not None
    assert [entry.token for entry in got] == list(range(1 + start, 19))
    assert (got[0].logprob is None) == (start == 0)


def test_wrong_prompt_logprobs_are_not_taken() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3], logprobs=LogprobSpec(prompt_start=0)))
    plan = server.begin()
    assert plan is not None
    row = RowResult(5, None, [TokenLogprob(-1.0, 2)])
    with pytest.raises(AuditError, match="1 prompt logprobs of request a for 2 tokens"):
        commit(server.state, plan, StepResult(rows=[row]), 0.0)


# ---- what does not belong ----


def test_a_result_of_another_step_or_size_is_refused() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3]))
    plan = server.begin()
    assert plan is not None
    result = server.runner.run(plan)
    other: Plan = msgspec.structs.replace(plan, step=plan.step + 1)
    with pytest.raises(AuditError, match="does not belong"):
        commit(server.state, other, result, 0.0)
    with pytest.raises(AuditError, match="does not belong"):
        commit(server.state, plan, StepResult(rows=[]), 0.0)
    commit(server.state, plan, result, 0.0)
    with pytest.raises(AuditError, match="does not belong"):
        commit(server.state, plan, result, 0.0)


def test_rows_of_aborted_sequences_are_dropped_and_the_others_are_not() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3]), request("b", [4, 5, 6]))
    server.begin()
    server.abort("a")
    assert {event.seq.rid for event in server.finish()} == {"b"}
    server.run_to_end()


# ---- counters ----


def test_stats_count_what_happened() -> None:
    server = Server(num_pages=20)
    server.submit(request("a", range(1, 11), 4, ignore_eos=True))
    server.now = 2.0
    commit_tokens(server, 5)
    server.submit(request("b", range(1, 11), 2, ignore_eos=True))
    commit_tokens(server, 6, 7, eager=True)
    report = stats(server.state)
    assert report == Stats(
        num_running_reqs=2,
        # a holds 3 pages of its own; b shares two of them and has one: the tree's pages are all in use
        num_used_tokens=16,
        max_total_num_tokens=80,
        num_pages=20,
        page_size=4,
        free_pages=16,
        cache_hit_rate=8 / 20,
        prompt_tokens_total=20,
        generation_tokens_total=3,
        cached_tokens_total=8,
        forward_seconds_total=0.5,
        steps_total=2,
        num_eager_decode_steps_total=1,
        queue_time_s=[2.0, 0.0],
    )
    assert stats(server.state).queue_time_s == []
    server.state.running[1].arrival_at = 0.0
    server.retract(server.state.running[1])
    server.submit(request("c", [1]))
    server.reserve(request("t", [1], bootstrap=Bootstrap("p", 1, 1)))
    report = stats(server.state)
    assert (report.num_queue_reqs, report.num_retracted_reqs, report.num_retractions_total) == (2, 1, 1)
    assert report.num_decode_transfer_queue_reqs == 0  # nothing is reserved while a retracted one waits
    server.abort("c")
    report = stats(server.state)
    assert (report.num_aborted_requests_total, report.num_queue_reqs) == (1, 1)


def test_used_tokens_do_not_include_what_can_be_evicted() -> None:
    server = Server(num_pages=12)
    server.submit(request("a", range(1, 11), 1))
    server.run()
    report = stats(server.state)
    assert (report.num_used_tokens, report.evictable_tokens, report.free_pages) == (0, 8, 10)
    server.submit(request("b", range(40, 86), 1))
    server.run()
    assert stats(server.state).evicted_tokens_total == 8
    assert stats(server.state).prompt_tokens_total == 56


def test_a_transfer_counts_as_one() -> None:
    server = Server()
    seq = server.reserve(request("t", [1, 2], bootstrap=Bootstrap("p", 1, 1)))
    assert stats(server.state).num_decode_transfer_queue_reqs == 1
    assert seq is not None
    server.now = 3.0
    server.join(seq, FirstToken(5, 1))
    report = stats(server.state)
    assert (report.num_decode_transfer_queue_reqs, report.num_running_reqs, report.queue_time_s) == (0, 1, [3.0])
    assert (report.prompt_tokens_total, report.cached_tokens_total, report.generation_tokens_total) == (2, 1, 1)


def test_throughput_is_measured_over_a_second_and_nothing_when_idle() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3], 30, ignore_eos=True), request("b", [1, 2, 3], 30, ignore_eos=True))
    for _ in range(3):
        commit_tokens(server, 5, 5)
    assert stats(server.state).gen_throughput == 4.0
    server.abort("a")
    for _ in range(2):
        commit_tokens(server, 5)
    assert stats(server.state).gen_throughput == 2.0
    server.abort("b")
    assert stats(server.state).gen_throughput == 0.0


def test_idle_time_does_not_lower_the_throughput() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3], 5, ignore_eos=True))
    for _ in range(5):
        commit_tokens(server, 5)
    assert server.state.counters.throughput == 2.0
    server.release(server.state.seqs["a"])
    server.now += 100.0
    server.submit(request("b", [1, 2, 3], 5, ignore_eos=True))
    commit_tokens(server, 5)
    assert stats(server.state).gen_throughput == 2.0
