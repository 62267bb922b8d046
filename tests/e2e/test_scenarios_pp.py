"""Scenario 17: pipeline stages on either side of the hand-over, with different chunk sizes."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from asking import counters, endless, in_flight, settle, until
from mixed_requests import all_at_once, assert_same, mixed_requests, one_by_one
from pd_cluster import PDCluster, start_cluster, start_decode, start_prefill, start_router

from diptych.testing.processes import ServerProcess, metrics
from recipes.demo import parse_reply, problems, score
from recipes.demo.eval import request_body

pytestmark = pytest.mark.timeout(300)
BODIES = mixed_requests(20, most_new=8)


def test_any_stages_on_either_side_give_the_same_bits(unified: ServerProcess) -> None:
    """A prefill server of one stage and one of three, in chunks of their own, hand over to a decode server of two."""
    expected = one_by_one(unified, BODIES)
    with ExitStack() as stack:
        prefill = [
            start_prefill(stack, "--chunked-prefill-size", "48"),
            start_prefill(stack, "--pp-size", "3", "--chunked-prefill-size", "80"),
        ]
        decode = [start_decode(stack, "--pp-size", "2")]
        for server in (*prefill, *decode):
            server.wait_ready()
        pd = PDCluster(prefill, decode, start_router(stack, prefill, decode))
        for what in ("with stages", "with stages, again"):
            assert_same(expected, all_at_once(pd.router, BODIES), what)
        settle(pd)
        received = metrics(decode[0].get("/metrics"))["sglang:kv_pages_received_total"]
        sent = [metrics(server.get("/metrics"))["sglang:kv_pages_sent_total"] for server in prefill]
        assert all(sent) and sum(sent) == received
        a_stage_that_dies_ends_its_server(decode[0], pd.router)


def a_stage_that_dies_ends_its_server(decode: ServerProcess, router: ServerProcess) -> None:
    """SIGKILL of the second stage while it decodes: rank 0 waits for it in the middle of a step, and notices."""
    stages = [process for process in decode.tree() if "diptych.engine.worker" in process.cmdline()]
    assert len(stages) == 2
    with in_flight(router, [endless(index, 30, 2000) for index in range(4)]) as replies:
        until(lambda: counters(decode).get("num_running_reqs", 0) == 4, "all decode")
        max(stages, key=lambda process: process.create_time()).kill()
        killed_at = time.monotonic()
        assert decode.process.wait(20) == 1
        assert time.monotonic() - killed_at < 10
        assert all(reply.result()[0] in (500, 502, 503) for reply in replies)


def test_stages_of_two_ranks_hand_over_to_one_process() -> None:
    """Answers are right (a wrong slice of heads or layers would show), and asked again the same to the last bit.

    Two ranks add up their halves in another order than one does, so there is no one server to compare with.
    """
    with ExitStack() as stack:
        pd = start_cluster(stack, 1, prefill_flags=("--tp", "2", "--pp-size", "2", "--chunked-prefill-size", "48"))
        asked = [problem for task in ("arithmetic", "copy", "extract") for problem in problems(task, 3, seed=3)]
        right = 0
        for problem in asked:
            reply = pd.router.post("/v1/chat/completions", request_body(problem, False, "demo"))
            right += score(problem, parse_reply(reply["choices"][0]["message"]["content"]), False)
        assert right >= len(asked) - 1
        assert_same(all_at_once(pd.router, BODIES), all_at_once(pd.router, BODIES), "tp 2, pp 2 to one process")
        sent, received = (metrics(server.get("/metrics")) for server in pd.servers)
        assert sent["sglang:kv_pages_sent_total"] == received["sglang:kv_pages_received_total"] > 0
        settle(pd)
