"""How requests are refused, come, leave, are handed over and taken back."""

from __future__ import annotations

import math

import pytest
from sched_server import CONTEXT, Server, config, request

from diptych.errors import AuditError, BadRequest, ContextLengthExceeded, DiptychError, Overloaded
from diptych.sched.audit import audit
from diptych.sched.pages import add_pages
from diptych.sched.queue import (
    abort,
    add,
    check_request,
    join,
    leave_to_writer,
    release,
    reserve,
    retract,
    writer_stopped,
)
from diptych.sched.state import Status, new_state
from diptych.types import Bootstrap, FirstToken, LogprobSpec, TokenLogprob

ROOM = Bootstrap("p", 1, 77)
WRITER = ("writer", 77)


# ---- checking ----


@pytest.mark.parametrize(
    ("changes", "kind", "message", "param"),
    [
        ({"prompt": []}, BadRequest, "the prompt is empty", "prompt"),
        (
            {"prompt": range(64)},
            ContextLengthExceeded,
            "the prompt has 64 tokens, but the model's context of 64 tokens leaves room for at most 63",
            "prompt",
        ),
        ({"prompt": [1], "max_new": 0}, BadRequest, "max_new_tokens must be at least 1, not 0", "max_new_tokens"),
        (
            {"prompt": [1, 2], "logprobs": LogprobSpec(prompt_start=2)},
            BadRequest,
            "logprob_start_len is 2, but the prompt has only 2 tokens",
            "logprob_start_len",
        ),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    changes: dict[str, object], kind: type[DiptychError], message: str, param: str
) -> None:
    server = Server()
    with pytest.raises(kind, match=message) as caught:
        check_request(server.state, request("a", **changes))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.param) == (400, param)
    assert type(caught.value) is kind


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    state = new_state(config(), 5)
    message = "the prompt has 21 tokens, but this server's KV pool of 20 tokens leaves room for at most 20"
    with pytest.raises(ContextLengthExceeded, match=message):
        check_request(state, request("a", range(21)))
    check_request(state, request("a", range(20)))


def test_the_longest_prompt_is_accepted_and_the_rest_is_cut_to_the_context() -> None:
    server = Server()
    server.submit(request("a", range(CONTEXT - 1), 100, ignore_eos=True))
    server.submit(request("b", range(CONTEXT - 10), 100, ignore_eos=True))
    server.run_to_end()
    assert [len(server.got[rid].tokens) for rid in "ab"] == [1, 10]


def test_a_request_id_in_use_and_a_full_queue_are_refused() -> None:
    server = Server(max_queued=2)
    server.submit(request("a", [1]))
    with pytest.raises(BadRequest, match="request id a is in use"):
        check_request(server.state, request("a", [1]))
    server.submit(request("b", [1]))
    with pytest.raises(Overloaded, match="2 requests are waiting") as caught:
        check_request(server.state, request("c", [1]))
    assert caught.value.status == 429
    server.run_to_end()
    check_request(server.state, request("a", [1]))


# ---- leaving ----


def test_abort_works_in_every_queue_and_only_once() -> None:
    server = Server(max_running=2)
    reserved = server.reserve(request("t", [1, 2], bootstrap=ROOM))
    server.submit(request("r", range(1, 30), 5), request("w", [1, 2]))
    server.step()
    assert [server.state.seqs[rid].status.value for rid in "trw"] == ["transferring", "running", "waiting"]
    for rid in "trw":
        seq = abort(server.state, rid, 0.0)
        assert seq is not None
        assert seq.status is Status.ABORTED
        assert abort(server.state, rid, 0.0) is None
        audit(server.state)
        assert set(server.state.seqs) >= {rid}
        release(server.state, seq, keep=True)
        audit(server.state)
    assert abort(server.state, "nobody", 0.0) is None
    assert server.state.counters.aborted == 3
    assert reserved is not None
    server.check_empty()


def test_a_finished_sequence_can_no_longer_be_aborted() -> None:
    server = Server()
    server.hold = True
    server.submit(request("a", [1, 2], 1))
    server.run()
    assert abort(server.state, "a", 0.0) is None
    assert server.state.counters.aborted == 0


def test_only_what_has_ended_can_be_released_and_only_once() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3], 1))
    seq = server.state.seqs["a"]
    with pytest.raises(AuditError, match="cannot be released: it is waiting"):
        release(server.state, seq, keep=True)
    server.run()
    with pytest.raises(AuditError, match="cannot be released: it is released"):
        release(server.state, seq, keep=True)


def test_release_without_keep_leaves_nothing_behind() -> None:
    server = Server(keep=False)
    server.submit(request("a", range(1, 14), 1))
    server.hold = True
    server.run()
    # the prompt went to the tree when it was complete; the sequence's release does not add to that
    server.release(server.state.seqs["a"])
    assert server.state.tree.evictable_pages == 3
    server.submit(request("b", range(20, 34), 4))
    server.step()
    server.abort("b", keep=False)
    server.check_empty()


def test_an_aborted_prompt_keeps_its_full_computed_pages_if_asked_to() -> None:
    server = Server(chunk_tokens=8)
    server.submit(request("a", range(1, 30), 4))
    server.step()
    server.abort("a", keep=True)
    assert server.state.tree.evictable_pages == 2
    server.submit(request("b", range(1, 30), 4))
    server.run_to_end()


def test_without_the_tree_nothing_is_kept() -> None:
    server = Server(radix=False)
    server.submit(request("a", range(1, 14), 3))
    server.run()
    assert server.state.pool.num_free == server.state.pool.num_pages


# ---- while a step runs ----


def test_pages_of_an_aborted_sequence_come_back_only_after_the_step_that_writes_them() -> None:
    server = Server()
    server.submit(request("a", range(1, 9)))
    server.begin()
    free = server.state.pool.num_free
    server.abort("a", keep=False)
    audit(server.state)
    assert (server.state.pool.num_free, "a" in server.state.seqs) == (free, True)
    assert server.finish() == []
    assert server.state.pool.num_free == server.state.pool.num_pages
    assert not server.state.seqs


@pytest.mark.parametrize(("keep", "kept"), [(True, 2), (False, 0)])
def test_what_a_step_computed_for_a_released_sequence_is_not_kept(keep: bool, kept: int) -> None:
    server = Server(chunk_tokens=8)
    server.submit(request("a", range(1, 20)), request("b", range(30, 34)))
    server.step()
    server.begin()
    server.abort("a", keep=keep)
    server.finish()
    assert server.state.tree.evictable_pages == kept  # what earlier steps computed, not what this one should have
    server.run_to_end()


def test_a_retraction_during_a_step_happens_after_it() -> None:
    server = Server()
    server.submit(request("a", range(1, 9), 5, ignore_eos=True))
    server.step()
    server.begin()
    (seq,) = server.state.running
    server.retract(seq)
    assert seq.status is Status.RUNNING
    assert len(server.finish()) == 1
    assert (seq.status, len(seq.tokens), seq.num_retractions) == (Status.WAITING, 10, 1)
    server.run_to_end()


def test_a_retraction_during_the_last_step_is_moot() -> None:
    server = Server()
    server.submit(request("a", range(1, 9), 1))
    server.begin()
    server.retract(server.state.running[0])
    server.finish()
    assert server.state.counters.retractions == 0
    server.check_empty()


def test_an_abort_overrules_a_retraction() -> None:
    server = Server()
    server.submit(request("a", range(1, 9), 5))
    server.begin()
    server.retract(server.state.running[0])
    server.abort("a")
    server.finish()
    assert server.state.counters.retractions == 0
    server.check_empty()


def test_only_running_sequences_are_retracted() -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3]))
    with pytest.raises(AuditError, match="cannot be retracted: it is waiting"):
        retract(server.state, server.state.seqs["a"], 0.0)


# ---- reserving and joining ----


def first_token(token: int = 5) -> FirstToken:
    return FirstToken(token, 8, TokenLogprob(-0.5, token))


def test_a_reservation_holds_the_prompts_pages_for_the_sequence_and_the_writer() -> None:
    server = Server()
    seq = server.reserve(request("a", range(1, 11), bootstrap=ROOM))
    assert seq is not None
    assert (seq.status, len(seq.pages), seq.prefix_tokens, seq.num_computed) == (Status.TRANSFERRING, 3, 0, 0)
    assert server.state.pool.leases == {("seq", "a"): set(seq.pages), WRITER: set(seq.pages)}


def test_a_reservation_shares_what_the_tree_has() -> None:
    server = Server()
    server.submit(request("old", range(1, 11), 1))
    server.run()
    seq = server.reserve(request("a", range(1, 11), bootstrap=ROOM))
    assert seq is not None
    assert (seq.prefix_tokens, seq.cached_tokens, seq.num_computed) == (8, 8, 8)
    assert server.state.pool.leases[WRITER] == set(seq.pages[2:])
    server.join(seq, first_token())
    assert WRITER not in server.state.pool.leases


def test_the_tree_is_not_used_when_it_is_off() -> None:
    server = Server(radix=False)
    server.submit(request("old", range(1, 11), 1))
    server.run()
    seq = server.reserve(request("a", range(1, 11), bootstrap=ROOM))
    assert seq is not None
    assert (seq.prefix_tokens, len(server.state.pool.leases[WRITER])) == (0, 3)


def test_the_last_page_is_always_sent() -> None:
    server = Server()
    server.submit(request("old", range(1, 9), 8, ignore_eos=True))
    server.run()
    seq = server.reserve(request("a", range(1, 9), bootstrap=ROOM))
    assert seq is not None
    assert (seq.prefix_tokens, len(seq.remote_pages)) == (4, 1)


def test_join_starts_decoding_with_the_first_token() -> None:
    server = Server()
    seq = server.reserve(request("a", range(1, 11), 4, bootstrap=ROOM))
    assert seq is not None
    (event,) = join(server.state, seq, first_token(), 3.0)
    audit(server.state)
    assert (event.seq, event.token, event.logprob, event.finish) == (seq, 5, TokenLogprob(-0.5, 5), None)  # type: ignore[union-attr]
    assert (seq.status, seq.num_computed, seq.tokens[-1], seq.cached_tokens) == (Status.RUNNING, 10, 5, 8)
    plan = server.begin()
    assert plan is not None
    assert (plan.rows[0].num_cached, plan.rows[0].position, plan.rows[0].num_output) == (10, 11, 1)


def test_followers_reuse_a_joined_prompt() -> None:
    server = Server()
    seq = server.reserve(request("a", range(1, 11), 9, bootstrap=ROOM))
    assert seq is not None
    server.join(seq, first_token())
    follower = server.reserve(request("b", range(1, 11), bootstrap=Bootstrap("p", 1, 78)))
    assert follower is not None
    assert follower.pages[:2] == seq.pages[:2]


@pytest.mark.parametrize(
    ("token", "changes", "kind"),
    [(0, {}, "stop"), (9, {"stop_token_ids": (9,)}, "stop"), (5, {"max_new": 1}, "length")],
)
def test_a_first_token_can_be_the_last(token: int, changes: dict[str, object], kind: str) -> None:
    server = Server()
    seq = server.reserve(request("a", range(1, 11), bootstrap=ROOM, **changes))  # type: ignore[arg-type]
    assert seq is not None
    (event,) = join(server.state, seq, first_token(token), 0.0)
    assert event.finish is not None  # type: ignore[union-attr]
    assert event.finish.type == kind  # type: ignore[union-attr]
    assert (seq.status, server.state.running) == (Status.FINISHED, [])
    release(server.state, seq, keep=True)
    assert server.state.tree.evictable_pages == 2
    server.got.clear()
    server.check_empty()


def test_an_aborted_transfer_cannot_join_and_keeps_its_pages_until_released() -> None:
    server = Server()
    seq = server.reserve(request("a", range(1, 11), bootstrap=ROOM))
    assert seq is not None
    assert abort(server.state, "a", 0.0) is seq
    audit(server.state)
    assert server.state.pool.leases[WRITER] == set(seq.pages)
    with pytest.raises(AuditError, match="cannot join the batch: it is aborted, not transferring"):
        join(server.state, seq, first_token(), 0.0)
    release(server.state, seq, keep=True)
    assert server.state.pool.num_free == server.state.pool.num_pages  # nothing of it was whole


def test_a_writer_that_goes_on_keeps_its_pages_and_nothing_else() -> None:
    server = Server()
    server.submit(request("old", range(1, 11), 1))
    server.run()
    seq = server.reserve(request("a", range(1, 16), bootstrap=ROOM))
    assert seq is not None
    remote = set(seq.remote_pages)
    assert len(remote) == 2
    assert abort(server.state, "a", 0.0) is seq
    leave_to_writer(server.state, seq)
    audit(server.state)
    assert (server.state.pool.leases[WRITER], server.state.seqs) == (remote, {})
    again = server.reserve(request("a", range(1, 16), bootstrap=Bootstrap("p", 1, 78)))  # the id is free
    assert again is not None
    assert remote.isdisjoint(again.pages)
    server.join(again, first_token())
    server.run()
    assert server.state.pool.leases[WRITER] == remote
    writer_stopped(server.state, 77)
    writer_stopped(server.state, 76)  # had nothing left
    server.got.clear()
    server.check_empty()


def test_the_queue_and_reservations_take_turns_by_arrival() -> None:
    server = Server(num_pages=8, max_running=8, reserved_decode_tokens=0)
    server.submit(request("old", range(40, 60), 9, ignore_eos=True))
    server.step()
    server.now = 1.0
    server.submit(request("a", range(1, 17)))  # 4 pages where 3 are free
    server.now = 2.0
    assert server.reserve(request("t", [1, 2], bootstrap=ROOM)) is None  # would fit, but came later
    while "old" in server.state.seqs:
        server.step()
    server.step()
    assert server.state.seqs["a"].status is Status.RUNNING
    assert server.reserve(request("t", [1, 2], bootstrap=ROOM)) is not None


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_nobody_in_the_queue_overtakes_an_older_reservation(policy: str) -> None:
    server = Server(num_pages=12, policy=policy, reserved_decode_tokens=0)
    server.submit(request("cached", range(1, 9), 1))
    server.run()
    server.submit(request("before", range(50, 54), 3, ignore_eos=True))
    server.now += 1
    server.state.reserving_since = server.now
    server.now += 1
    server.submit(request("after", range(1, 11), 3, ignore_eos=True))
    for _ in range(3):
        server.step()
    assert server.got["before"].finish is not None
    assert server.state.seqs["after"].status is Status.WAITING
    assert server.begin() is None
    server.state.reserving_since = math.inf
    server.run_to_end()


def test_a_retracted_sequence_goes_before_an_older_reservation() -> None:
    server = Server()
    server.now = 5.0
    server.submit(request("a", range(1, 9), 9, ignore_eos=True))
    server.step()
    server.retract(server.state.running[0])
    server.state.reserving_since = 1.0
    server.step()
    assert server.state.seqs["a"].status is Status.RUNNING
    server.run_to_end()


def test_reservations_keep_headroom_for_each_other() -> None:
    server = Server(num_pages=16, reserved_decode_tokens=8)
    held = [server.reserve(request(f"r{i}", range(1 + i, 9 + i), 30, bootstrap=ROOM)) for i in range(6)]
    # 2 pages each for the prompt, 2 for the next 8 tokens
    assert [seq is not None for seq in held] == [True] * 4 + [False] * 2


def test_a_reservation_evicts() -> None:
    server = Server(num_pages=8)
    server.submit(request("old", range(40, 64), 1))
    server.run()
    assert server.reserve(request("a", range(1, 25), bootstrap=ROOM)) is not None
    assert server.state.tree.num_evicted == 4


def test_nothing_is_reserved_while_a_retracted_sequence_waits() -> None:
    server = Server()
    server.submit(request("a", range(1, 9), 9, ignore_eos=True))
    server.step()
    server.retract(server.state.running[0])
    assert server.reserve(request("t", [1, 2], bootstrap=ROOM)) is None
    server.step()
    assert server.reserve(request("t", [1, 2], bootstrap=ROOM)) is not None


def test_prompt_logprobs_of_a_joined_sequence_are_prefills_business() -> None:
    server = Server()
    one = request("a", range(1, 11), 3, bootstrap=ROOM, logprobs=LogprobSpec(prompt_start=0), ignore_eos=True)
    seq = server.reserve(one)
    assert seq is not None
    (event,) = join(server.state, seq, first_token(), 0.0)
    assert event.prompt_logprobs is None  # type: ignore[union-attr]
    plan = server.begin()
    assert plan is not None
    assert plan.rows[0].prompt_targets is None


def test_a_reservation_made_during_a_step_gets_pages_of_its_own() -> None:
    server = Server(num_pages=8)
    server.submit(request("a", range(1, 9), 5))
    server.begin()
    server.abort("a", keep=False)
    seq = server.reserve(request("t", range(1, 21), bootstrap=ROOM))
    assert seq is not None
    assert set(seq.pages).isdisjoint(server.state.seqs["a"].pages)
    server.finish()


# ---- the audit of it all ----


def test_the_audit_sees_sequences_in_wrong_places() -> None:
    server = Server()
    server.submit(request("a", range(1, 9)), request("b", [1]))
    server.begin()
    state = server.state
    seq = state.seqs["a"]

    def fails(message: str) -> None:
        with pytest.raises(AuditError, match=message):
            audit(state)

    for at in (0, 2):
        state.tables.array[seq.table, at] += 1
        fails("page table of request a")
        state.tables.array[seq.table, at] -= 1
    seq.num_computed = 9
    fails("has computed 9 tokens in 2 pages")
    seq.num_computed = 0
    plan = state.flight.pop()
    fails("counts 1 steps in flight that sample 1 tokens; there are 0 that sample 0")
    state.flight.append(plan)
    seq.row += 1
    fails("request a expects 8 computed tokens")
    seq.row -= 1
    state.waiting.append(seq)
    fails("is running but queued as waiting")
    state.waiting.pop()
    state.running.remove(seq)
    fails("1 queued and 0 ended")
    state.running.insert(0, seq)
    del state.seqs["b"]
    fails("request b is running but queued")


def test_the_audit_sees_a_waiting_sequence_that_holds_something() -> None:
    server = Server()
    seq = add(server.state, request("a", [1, 2, 3]), 0.0)
    add_pages(server.state, seq, server.state.pool.alloc(1, seq.holder))
    with pytest.raises(AuditError, match="request a waits but holds 1 pages"):
        audit(server.state)


def test_a_sequence_moves_only_along_the_table() -> None:
    server = Server()
    seq = add(server.state, request("a", [1, 2, 3]), 0.0)
    with pytest.raises(AuditError, match="request a cannot go from waiting to finished"):
        seq.move(Status.FINISHED)


def test_reserve_respects_the_batch_size() -> None:
    server = Server(max_running=1)
    assert reserve(server.state, request("a", [1]), 0.0) is not None
    assert reserve(server.state, request("b", [1]), 0.0) is None
