"""SGLang's scenarios for prefill and decode (reference: what its users' tests check), on clusters without faults.

A second cluster has tight settings: a prefill server with chunks of 64 and 4 slots beside one with chunks of 208, a
decode server with 2 slots that keeps prefixes, pages over TCP alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from asking import ask, counters, endless, in_flight, is_idle, prompt, settle, until
from mixed_requests import all_at_once, assert_same, generate, mixed_requests, one_by_one
from pd_cluster import PDCluster, assert_idle, start_decode, start_prefill, start_router

from diptych.testing.processes import ServerProcess, metrics
from recipes.demo.eval import evaluate
from recipes.demo.problem import TASKS
from recipes.demo.report import BAR, summary

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def tight() -> Iterator[PDCluster]:
    with ExitStack() as stack:
        common = ("--disaggregation-transfer-backend", "tcp")
        prefill = [
            start_prefill(stack, *common, "--chunked-prefill-size", "64", "--max-running-requests", "4"),
            start_prefill(stack, *common, "--chunked-prefill-size", "208"),
        ]
        slots = ("--max-running-requests", "2", "--disaggregation-decode-enable-radix-cache")
        decode = [start_decode(stack, *common, *slots)]
        for server in (*prefill, *decode):
            server.wait_ready()
        yield PDCluster(prefill, decode, start_router(stack, prefill, decode))


@pytest.fixture(scope="module")
def small_chunks(tight: PDCluster) -> Iterator[PDCluster]:
    """The tight cluster by a router that knows only the prefill server with chunks of 64."""
    with ExitStack() as stack:
        router = start_router(stack, tight.prefill[:1], tight.decode)
        yield PDCluster(tight.prefill[:1], tight.decode, router)


def test_accuracy_through_the_router(cluster: PDCluster) -> None:
    """Scenario 1: held-out problems of every task, with thinking and without, 16 at a time, reach the model's bar."""
    args = argparse.Namespace(
        base_url=cluster.router.url, model="demo", tasks=TASKS, num=8, concurrency=16, seed=1, timeout=240.0, api_key=""
    )
    outcomes = asyncio.run(evaluate(args))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    wrong = [(outcome.task, outcome.question, outcome.reply) for outcome in outcomes if not outcome.right]
    assert 1 - len(wrong) / len(outcomes) >= BAR, wrong
    for row in summary(outcomes):
        assert row["right"] >= row["num"] - 1, (row, wrong)
    settle(cluster)


def test_pause_in_place_on_both_nodes(cluster: PDCluster) -> None:
    """Scenario 5: while paused no engine takes a step and nobody is answered; afterwards all 32 succeed."""
    with in_flight(cluster.router, [endless(index, 40, 60) for index in range(32)]) as replies:
        until(lambda: counters(cluster.decode[0]).get("num_running_reqs", 0) >= 4, "requests decode")
        for server in cluster.servers:
            server.post("/pause_generation", {"mode": "in_place"})
        before = [(counters(server)["steps_total"], server.get("/audit")["sequences"]) for server in cluster.servers]
        decoding = before[-1][1]
        assert decoding > 0
        for _ in range(20):  # each answer has gone once around the engine's loop
            for server in cluster.servers:
                server.get("/audit")
        after = [(counters(server)["steps_total"], server.get("/audit")["sequences"]) for server in cluster.servers]
        assert [steps for steps, _ in after] == [steps for steps, _ in before]
        assert after[-1][1] == decoding
        assert sum(not reply.done() for reply in replies) >= decoding
        assert ask(cluster.decode[0].url, "/health_generate")[0] == 503  # it would not generate
        assert ask(cluster.decode[0].url, "/health")[0] == 200  # but nothing is wrong with it
        for server in cluster.servers:
            server.post("/continue_generation", {})
        answers = [reply.result() for reply in replies]
    assert [status for status, _ in answers] == [200] * 32
    assert all(json.loads(text)["meta_info"]["completion_tokens"] == 60 for _, text in answers)
    settle(cluster)


def test_pause_and_abort_leave_nothing(small_chunks: PDCluster) -> None:
    """Scenario 9: 64 clients on 4 slots, 16 pauses of the prefill server, then abort_all."""
    node = small_chunks.prefill[0]
    with in_flight(small_chunks.router, [endless(index, 100, 400) for index in range(64)]) as replies:
        until(lambda: counters(node)["steps_total"] > 4, "prefill works")
        for cycle in range(16):
            node.post("/pause_generation", {"mode": ("in_place", "retract")[cycle % 2]})
            node.post("/continue_generation", {})
        while not all(reply.done() for reply in replies):  # those that the router had not sent on yet come after
            small_chunks.router.post("/abort_request", {"abort_all": True})
        answers = [reply.result() for reply in replies]
    ends = [json.loads(text)["meta_info"]["finish_reason"]["type"] for status, text in answers if status == 200]
    assert len(ends) == 64 and set(ends) <= {"length", "abort"} and ends.count("abort") > 40, answers
    settle(small_chunks)
    assert metrics(node.get("/metrics"))["sglang:num_running_reqs"] == 0


def test_pause_on_an_idle_node(small_chunks: PDCluster) -> None:
    for mode in ("retract", "in_place", "abort"):
        for server in small_chunks.servers:
            server.post("/pause_generation", {"mode": mode})
            server.post("/continue_generation", {})
    assert len(generate(small_chunks.router, endless(1, 30, 3))["output_ids"]) == 3


def test_abort_in_the_middle_of_a_chunked_prefill(small_chunks: PDCluster) -> None:
    """Scenario 14: abort by rid on both nodes; a quick answer, healthy servers, all pages back."""
    node = small_chunks.prefill[0]
    steps = counters(node)["steps_total"]
    with in_flight(small_chunks.router, [endless(3, 7000, 4, rid="to-be-aborted")]) as replies:
        until(lambda: counters(node)["steps_total"] > steps + 2, "chunks are computed")
        assert not replies[0].done()
        aborted_at = time.monotonic()
        for server in small_chunks.servers:
            server.post("/abort_request", {"rid": "to-be-aborted"})
        status, text = replies[0].result()
        assert time.monotonic() - aborted_at < 5
    assert status == 200 and json.loads(text)["meta_info"]["finish_reason"]["type"] == "abort", (status, text)
    assert counters(node)["steps_total"] < steps + 7000 / 64
    for server in (*small_chunks.servers, small_chunks.router):
        assert ask(server.url, "/health")[0] == 200
    settle(small_chunks)


def test_every_first_token_is_its_own(tight: PDCluster) -> None:
    """Scenario 16: 40 requests at once for 2 slots, each with its own forced tokens."""
    bodies = []
    for index in range(40):
        sampling = {"temperature": 0, "max_new_tokens": 3, "logit_bias": {str(500 + index): 100}}
        bodies.append({"input_ids": prompt(index, 5 + 3 * index), "sampling_params": sampling})
    replies = all_at_once(tight.router, bodies)
    assert [reply["output_ids"] for reply in replies] == [[500 + index] * 3 for index in range(40)]
    settle(tight)


def test_a_decode_server_keeps_prefixes(tight: PDCluster, unified: ServerProcess) -> None:
    """Scenario 12: three rounds; from the second on decode has most pages and prefill sends only the rest."""
    for server in tight.servers:
        server.post("/flush_cache", {})
    assert tight.decode[0].get("/server_info")["disable_radix_cache"] is False
    bodies = [endless(100 + index, 160, 4, return_logprob=True) for index in range(4)]
    expected = one_by_one(unified, bodies)
    received = [metrics(tight.decode[0].get("/metrics"))["sglang:kv_pages_received_total"]]
    for turn in range(3):
        assert_same(expected, one_by_one(tight.router, bodies), f"round {turn}")
        received.append(metrics(tight.decode[0].get("/metrics"))["sglang:kv_pages_received_total"])
    assert [after - before for before, after in itertools.pairwise(received)] == [40, 4, 4]
    assert counters(tight.decode[0])["evictable_tokens"] >= 4 * 160
    for server in (*tight.servers, tight.router):
        assert ask(server.url, "/health")[0] == 200


def test_different_chunk_sizes_give_one_answer(tight: PDCluster, unified: ServerProcess) -> None:
    """Scenario 17 (without pipeline parallelism, which is not built), over TCP, with 2 slots and warm decode caches."""
    bodies = mixed_requests(24)
    assert_same(one_by_one(unified, bodies), all_at_once(tight.router, bodies), "chunks of 64 and 208")
    sent = [metrics(server.get("/metrics"))["sglang:kv_pages_sent_total"] for server in tight.prefill]
    assert all(sent)
    settle(tight)


def test_abort_of_a_waiting_request(tight: PDCluster) -> None:
    """Abort of one that waits for one of decode's slots: the others' answers stay."""
    with in_flight(tight.router, [endless(index, 20, 100, rid=f"wait-{index}") for index in range(6)]) as replies:
        until(lambda: tight.decode[0].get("/audit")["sequences"] == 6, "all have arrived")
        tight.router.post("/abort_request", {"rid": "wait-5"})
        status, text = replies[5].result()
        assert status == 200 and json.loads(text)["meta_info"]["finish_reason"]["type"] == "abort"
        assert [reply.result()[0] for reply in replies[:5]] == [200] * 5
    settle(tight)
    for server in tight.servers:
        assert is_idle(server) and assert_idle(server)["ok"]
