"""What a step computes, in which order, and who gives way."""

from __future__ import annotations

import time

import pytest
from sched_server import Server, request

from diptych.errors import AuditError
from diptych.sched.commit import Sampled, cancel, commit
from diptych.sched.plan import LPM_PATIENCE, schedule
from diptych.sched.queue import add, reserve
from diptych.sched.rows import split
from diptych.sched.state import SchedConfig, Status, new_state
from diptych.types import Bootstrap, LogprobSpec, Plan, RowResult, Sampling, StepResult


def shape(plan: Plan | None) -> list[tuple[str, int, int, bool]]:
    """(rid, tokens cached, tokens new, samples) of each row."""
    assert plan is not None
    return [(row.rid, row.num_cached, row.num_new, row.samples) for row in plan.rows]


def decoding_server(count: int, num_pages: int = 64, **changes: object) -> Server:
    """`count` sequences r0, r1... of 3 prompt tokens that decode."""
    server = Server(num_pages, **changes)
    for index in range(count):
        server.submit(request(f"r{index}", [5 + index, 2, 3], 30, ignore_eos=True))
    server.step()
    assert all(seq.num_computed == 3 for seq in server.state.running)
    return server


# ---- rows and arrays ----


def test_a_plan_lists_decode_rows_first_and_its_arrays_say_where_each_token_goes() -> None:
    server = decoding_server(2)
    server.submit(request("p", range(10, 20)))
    plan = server.begin()
    assert shape(plan) == [("r0", 3, 1, True), ("r1", 3, 1, True), ("p", 0, 10, True)]
    assert plan is not None
    r0, r1, p = server.state.running
    assert plan.token_ids.tolist() == [r0.tokens[3], r1.tokens[3], *range(10, 20)]
    assert plan.positions.tolist() == [3, 3, *range(10)]
    assert plan.q_starts.tolist() == [0, 1, 2, 12]
    assert plan.kv_lens.tolist() == [4, 4, 10]
    assert plan.pages.tolist() == [[*r0.pages, 0, 0], [*r1.pages, 0, 0], p.pages]
    assert plan.slots.tolist() == [
        r0.pages[0] * 4 + 3,
        r1.pages[0] * 4 + 3,
        *[p.pages[i // 4] * 4 + i % 4 for i in range(10)],
    ]
    kinds = [plan.token_ids, plan.positions, plan.slots, plan.q_starts, plan.kv_lens, plan.pages]
    assert [array.dtype.name for array in kinds] == ["int32", "int32", "int64", "int32", "int32", "int32"]


def test_the_rows_of_a_plan_run_one_by_one_give_what_the_plan_gives() -> None:
    """Also after the plan has been run, wholly or in part: writing the same slots again changes nothing."""
    server = decoding_server(2)
    server.submit(request("p", range(10, 20)))
    plan = server.begin()
    assert plan is not None
    parts = split(plan, server.state.seqs)
    assert [shape(part) for part in parts] == [[row] for row in shape(plan)]
    p = parts[2]
    assert (p.q_starts.tolist(), p.kv_lens.tolist(), p.token_ids.tolist()) == ([0, 10], [10], [*range(10, 20)])
    assert p.pages.tolist() == [server.state.running[2].pages]
    server.runner.run(parts[1])
    whole = server.runner.run(plan).rows
    assert [server.runner.run(part).rows for part in reversed(parts)] == [[row] for row in reversed(whole)]
    server.run_to_end()


def test_rows_carry_what_sampling_needs() -> None:
    server = Server(chunk_tokens=4)
    server.submit(request("a", [7, 8, 9, 10, 11, 12], 9, presence_penalty=1.0, ignore_eos=True))
    first = server.begin()
    assert first is not None
    assert (first.rows[0].samples, first.rows[0].history) == (False, None)
    server.finish()
    row = server.begin().rows[0]  # type: ignore[union-attr]
    assert (row.position, row.num_prompt, row.num_output) == (6, 6, 0)
    assert row.history == [7, 8, 9, 10, 11, 12]
    server.finish()
    row = server.begin().rows[0]  # type: ignore[union-attr]
    assert (row.position, row.num_prompt, row.num_output) == (7, 6, 1)
    assert row.history == server.state.running[0].tokens
    assert row.history is not server.state.running[0].tokens  # what is computed does not change under the runner


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"min_new_tokens": 4, "temperature": 1.0, "logit_bias": {3: 1.0}}, False),
    ],
)
def test_history_comes_only_with_penalties(changes: dict[str, object], needed: bool) -> None:
    server = Server()
    server.submit(request("a", [1, 2, 3], **changes))
    assert (server.begin().rows[0].history is not None) == needed  # type: ignore[union-attr]


def test_steps_are_numbered_and_committed_one_by_one() -> None:
    server = decoding_server(1)
    first = server.begin()
    second = server.begin()
    assert first is not None and second is not None
    assert second.step == first.step + 1
    with pytest.raises(AuditError, match=f"step {first.step} has not been committed"):
        schedule(server.state, 0.0)
    with pytest.raises(AuditError, match=f"step {second.step} does not belong to the oldest"):
        commit(server.state, second, StepResult(rows=[RowResult(5)]), 0.0)
    with pytest.raises(AuditError, match=f"step {first.step} cannot be cancelled"):
        cancel(server.state, first, 0.0)


def test_nothing_to_do_and_paused_give_no_plan() -> None:
    server = Server()
    assert server.begin() is None
    server = decoding_server(1)
    server.state.paused = True
    assert server.begin() is None
    server.abort("r0")  # still works
    server.state.paused = False
    assert server.begin() is None
    server.check_empty()


# ---- the token budget ----


def test_prompts_share_what_decode_rows_leave_of_a_step() -> None:
    server = decoding_server(3, chunk_tokens=16)
    server.submit(request("p", range(1, 41)), request("q", range(50, 60)))
    assert shape(server.begin())[3:] == [("p", 0, 12, False)]  # 13 are left: three whole pages
    server.finish()
    assert shape(server.begin())[3:] == [("p", 12, 12, False)]
    server.finish()
    assert shape(server.begin())[3:] == [("p", 24, 12, False)]
    server.finish()
    assert shape(server.begin())[3:] == [("p", 36, 4, True), ("q", 0, 8, False)]


def test_a_full_decode_batch_leaves_prompts_a_page() -> None:
    server = decoding_server(6, chunk_tokens=6)
    assert len(server.state.running) == 1  # 3 tokens of 6; what is left is less than a page
    server.run_until(6)
    server.submit(request("p", range(1, 12)))
    assert shape(server.begin())[6:] == [("p", 0, 4, False)]
    server.finish()
    assert shape(server.begin())[6:] == [("p", 4, 4, False)]
    server.finish()
    assert shape(server.begin())[6:] == [("p", 8, 3, True)]


def test_chunks_smaller_than_a_page_are_raised_to_one() -> None:
    server = Server(chunk_tokens=1)
    server.submit(request("p", range(1, 12)))
    assert shape(server.begin()) == [("p", 0, 4, False)]


def test_no_limit_computes_everything_at_once() -> None:
    server = Server(chunk_tokens=-1)
    server.submit(request("p", range(1, 50)), request("q", range(50, 99)))
    assert shape(server.begin()) == [("p", 0, 49, True), ("q", 0, 49, True)]


def test_chunks_end_at_page_boundaries_when_a_prefix_is_cached() -> None:
    server = Server(chunk_tokens=6)
    server.submit(request("a", range(1, 14), 1))
    server.run()
    server.submit(request("b", [*range(1, 13), *range(60, 80)], 1))
    assert shape(server.begin()) == [("b", 12, 4, False)]
    server.finish()
    assert shape(server.begin()) == [("b", 16, 4, False)]


def test_a_cached_prompt_computes_only_its_last_page() -> None:
    server = Server()
    server.submit(request("a", range(1, 13), 1))
    server.run()
    server.submit(request("b", range(1, 13), 1))
    assert shape(server.begin()) == [("b", 8, 4, True)]  # the last token is always computed, so the last page is ours
    assert server.state.running[0].cached_tokens == 8


def test_a_prompt_is_reused_while_its_first_request_still_decodes() -> None:
    server = Server()
    server.submit(request("a", range(1, 11), 20, ignore_eos=True))
    server.step()
    server.submit(request("b", range(1, 11), 2, ignore_eos=True))
    assert shape(server.begin()) == [("a", 10, 1, True), ("b", 8, 2, True)]
    server.run_to_end()


def test_a_prompt_is_offered_to_the_tree_once() -> None:
    server = decoding_server(1)
    version = server.state.tree.version
    for _ in range(9):
        server.step()
    assert server.state.tree.version == version
    assert server.state.tree.evictable_pages == 0
    server.run_to_end()


def test_the_same_prompt_computed_twice_at_once_is_kept_once() -> None:
    server = Server(num_pages=12)
    server.submit(request("a", range(1, 13), 1), request("b", range(1, 13), 1))
    assert shape(server.begin()) == [("a", 0, 12, True), ("b", 0, 4, False)]
    server.hold = True
    server.finish()
    server.run()
    server.check()
    a, b = server.state.seqs["a"], server.state.seqs["b"]
    assert set(a.pages).isdisjoint(b.pages)
    assert (server.state.tree.evictable_pages, server.state.pool.num_free) == (0, 6)
    server.release(b)
    assert (server.state.tree.evictable_pages, server.state.pool.num_free) == (0, 9)
    server.release(a)
    assert (server.state.tree.evictable_pages, server.state.pool.num_free) == (3, 9)


# ---- admission ----


def test_places_in_the_batch_are_limited_and_reserved_ones_count() -> None:
    server = Server(max_running=3)
    assert server.reserve(request("t", [1, 2], bootstrap=Bootstrap("p", 1, 1))) is not None
    server.submit(*[request(f"r{i}", [i + 1, 2]) for i in range(4)])
    assert [row[0] for row in shape(server.begin())] == ["r0", "r1"]


def test_a_place_is_free_only_when_someone_has_left() -> None:
    server = decoding_server(2, max_running=2)
    server.submit(request("late", [1, 2], 1))
    for _ in range(3):
        assert [row[0] for row in shape(server.begin())] == ["r0", "r1"]
        server.finish()
    server.abort("r0")
    assert [row[0] for row in shape(server.begin())] == ["r1", "late"]
    server.run_to_end()


def test_nobody_jumps_a_request_that_lacks_pages() -> None:
    server = Server(num_pages=10)
    server.submit(request("a", range(1, 25), 4, ignore_eos=True))
    server.submit(request("large", range(30, 54), 4), request("small", [1], 1))
    server.step()
    assert [seq.rid for seq in server.state.running] == ["a"]
    assert [seq.rid for seq in server.state.waiting] == ["large", "small"]
    server.run_to_end()


def test_admission_keeps_headroom_for_those_that_run() -> None:
    # 16 pages; a new one needs 2 for its prompt and 2 for the next 8 tokens, one that decodes 3 and 2
    server = Server(num_pages=16, reserved_decode_tokens=8)
    server.submit(*[request(f"r{i}", [i + 1, *range(7)], 30, ignore_eos=True) for i in range(6)])
    server.step()
    assert len(server.state.running) == 2
    server.step()
    assert len(server.state.running) == 3
    server.run_to_end()


def test_headroom_is_not_more_than_a_sequence_can_use() -> None:
    server = Server(num_pages=16, reserved_decode_tokens=512, chunk_tokens=-1)
    server.submit(*[request(f"r{i}", [i + 1, *range(6)], 5, ignore_eos=True) for i in range(6)])
    server.step()
    assert len(server.state.running) == 5  # 7 + 4 tokens stored: 3 pages each
    assert server.run_to_end().retractions == 0


def test_a_request_that_fills_the_pool_runs_alone() -> None:
    server = Server(num_pages=8, context_len=64)
    server.submit(request("a", range(1, 33), 30, ignore_eos=True), request("b", [1], 1))
    server.run()
    server.check()
    assert len(server.got["a"].tokens) == 1  # 32 stored, and one that needs no place
    server.check_empty()


# ---- preemption ----


def test_the_last_admitted_gives_way_and_waits_in_front() -> None:
    server = Server(num_pages=8, reserved_decode_tokens=0, radix=False, max_running=3)
    server.submit(*[request(f"r{i}", [i + 1, *range(7)], 9, ignore_eos=True) for i in range(4)])
    while not server.state.counters.retractions:
        server.step()
    assert [seq.rid for seq in server.state.running] == ["r0", "r1"]
    assert [seq.rid for seq in server.state.waiting] == ["r2", "r3"]
    assert server.state.waiting[0].num_retractions == 1
    server.run_to_end()


def test_several_that_give_way_keep_their_order() -> None:
    server = Server(num_pages=12, reserved_decode_tokens=0)
    server.submit(*[request(f"r{i}", [i + 1, 2, 3], 30, ignore_eos=True) for i in range(4)])
    server.step()
    for seq in server.state.running[:0:-1]:
        server.retract(seq)
    assert [seq.rid for seq in server.state.waiting] == ["r1", "r2", "r3"]
    server.run_to_end()


def test_what_was_computed_is_found_again() -> None:
    server = decoding_server(1)
    for _ in range(10):
        server.step()
    (seq,) = server.state.running
    assert (len(seq.tokens), seq.num_computed) == (14, 13)
    server.retract(seq)
    assert (seq.status, seq.pages, seq.num_computed) == (Status.WAITING, [], 0)
    assert shape(server.begin()) == [("r0", 12, 2, True)]
    assert seq.cached_tokens == 0  # a retraction is not a cache hit of the prompt
    server.run_to_end()


def test_what_is_computed_again_is_offered_again() -> None:
    server = decoding_server(1)
    server.step()
    (seq,) = server.state.running
    server.retract(seq)
    server.state.tree.flush()
    server.step()
    server.submit(request("b", [*seq.tokens[:4], 99], 1))
    assert shape(server.begin()) == [("r0", 5, 1, True), ("b", 4, 1, True)]
    server.run_to_end()


def test_nobody_is_admitted_in_a_step_that_retracts() -> None:
    server = Server(num_pages=6, reserved_decode_tokens=0, radix=False)
    server.submit(request("a", range(1, 9), 9, ignore_eos=True), request("b", range(11, 23), 5, ignore_eos=True))
    server.step()
    server.step()
    server.submit(request("c", [1], 1))
    while not server.state.counters.retractions:
        assert server.begin() is not None
        if not server.state.counters.retractions:
            server.finish()
    assert [seq.rid for seq in server.state.running] == ["a"]
    server.finish()
    server.run_to_end()


def test_eviction_comes_before_preemption() -> None:
    server = Server(num_pages=12)
    server.submit(request("old", range(60, 84), 1))
    server.run()
    assert server.state.tree.evictable_pages == 6
    server.submit(request("a", range(1, 9), 20, ignore_eos=True), request("b", range(11, 19), 12, ignore_eos=True))
    assert server.run_to_end().retractions == 0
    assert server.state.tree.num_evicted > 0


def test_the_oldest_waits_when_only_pages_of_others_are_left_and_goes_on_when_they_return() -> None:
    server = Server(num_pages=8, reserved_decode_tokens=0)
    server.submit(request("a", range(1, 9), 9, ignore_eos=True))
    server.step()
    held = server.reserve(request("t", range(20, 41), 1, bootstrap=Bootstrap("p", 1, 1)))
    assert held is None  # the next page of `a` is kept free
    held = server.reserve(request("t", range(20, 40), 1, bootstrap=Bootstrap("p", 1, 1)))
    assert held is not None
    while server.begin() is not None:
        server.finish()
    assert [seq.rid for seq in server.state.running] == ["a"]
    assert server.state.counters.retractions == 0
    server.abort("t")
    server.run_to_end()


# ---- longest prefix first ----


def lpm_server() -> Server:
    server = Server(policy="lpm", max_running=1, chunk_tokens=32)
    server.submit(request("seed", range(1, 25), 1))
    server.run()
    return server


def test_the_longest_cached_prefix_goes_first() -> None:
    server = lpm_server()
    server.submit(
        request("none", range(60, 80), 1), request("some", [*range(1, 10), 99], 1), request("most", [*range(1, 20)], 1)
    )
    order = []
    while server.state.waiting or server.state.running:
        events = server.step() or []
        order += [event.seq.rid for event in events if isinstance(event, Sampled)]
    assert order == ["most", "some", "none"]
    server.check()


def test_equal_prefixes_keep_the_order_of_arrival() -> None:
    server = lpm_server()
    server.submit(*[request(f"r{i}", [*range(1, 9), 50 + i], 1) for i in range(3)])
    assert shape(server.begin())[0][0] == "r0"


def test_nobody_is_passed_over_for_ever() -> None:
    server = lpm_server()
    server.submit(request("unlucky", range(60, 80), 1))
    passed = 0
    for index in range(LPM_PATIENCE + 5):
        server.submit(request(f"r{index}", [*range(1, 20), 30 + index], 1))
        server.step()
        if server.got["unlucky"].finish is not None:
            break
        passed += 1
    assert passed == LPM_PATIENCE
    server.run_to_end()


def test_a_retracted_request_goes_before_cached_ones() -> None:
    server = lpm_server()
    server.submit(request("a", range(60, 80), 20, ignore_eos=True))
    server.run_until(1)
    server.submit(request("b", [*range(1, 20)], 1))
    server.retract(server.state.running[0])
    server.state.tree.flush()
    assert shape(server.begin())[0][0] == "a"
    server.finish()
    server.run_to_end()


# ---- prompt logprobs ----


def test_prompt_targets_continue_over_chunks() -> None:
    server = Server(chunk_tokens=4)
    server.submit(request("a", [7, 8, 9, 10, 11, 12], 2, logprobs=LogprobSpec(prompt_start=2)))
    row = server.begin().rows[0]  # type: ignore[union-attr]
    assert (row.prompt_targets, row.target_start) == ([9, 10, 11], 1)
    server.finish()
    row = server.begin().rows[0]  # type: ignore[union-attr]
    assert (row.prompt_targets, row.target_start) == ([12], 0)
    server.finish()
    row = server.begin().rows[0]  # type: ignore[union-attr]
    assert (row.prompt_targets, row.target_start) == (None, 0)


@pytest.mark.parametrize(("start", "cached"), [(-1, 12), (0, 0), (4, 0), (5, 4), (9, 8), (13, 12)])
def test_prompt_logprobs_limit_what_comes_from_the_cache(start: int, cached: int) -> None:
    server = Server(chunk_tokens=-1)
    server.submit(request("a", range(1, 15), 1))
    server.run()
    server.submit(request("b", range(1, 15), 1, logprobs=LogprobSpec(prompt_start=start)))
    row = server.begin().rows[0]  # type: ignore[union-attr]
    assert row.num_cached == cached
    server.run_to_end()


# ---- cost ----


def test_planning_64_decode_rows_takes_a_fraction_of_a_millisecond() -> None:
    config = SchedConfig(page_size=16, context_len=8192, chunk_tokens=-1)
    state = new_state(config, 20_000)
    for index in range(64):
        prompt = [(index * 7919 + i * 31) % 150_000 for i in range(2000)]
        add(state, request(f"r{index}", prompt, 4000, ignore_eos=True), 0.0)
    best = float("inf")
    for _ in range(40):
        start = time.thread_time()
        plan = schedule(state, 0.0)
        best = min(best, time.thread_time() - start)
        assert plan is not None
        commit(state, plan, StepResult(rows=[RowResult(7) for _ in plan.rows]), 0.0)
    assert len(state.running) == 64
    assert best < 400e-6


def test_a_long_queue_that_cannot_be_admitted_costs_little() -> None:
    config = SchedConfig(page_size=16, context_len=4096, policy="lpm", max_running=64)
    state = new_state(config, 300)
    for index in range(1000):
        add(state, request(f"r{index}", [index + 1] * 2000, 500, ignore_eos=True), 0.0)
    best = float("inf")
    for _ in range(30):
        start = time.thread_time()
        plan = schedule(state, 0.0)
        best = min(best, time.thread_time() - start)
        assert plan is not None
        commit(state, plan, StepResult(rows=[RowResult(7) for _ in plan.rows]), 0.0)
    assert best < 400e-6


def test_a_reservation_is_not_scheduled() -> None:
    server = Server()
    assert reserve(server.state, request("t", [1, 2, 3]), 0.0) is not None
    assert server.begin() is None
    assert isinstance(server.state.transferring[0].request.sampling, Sampling)
