"""SGLang's scenarios with injected faults: transfers that fail, pages that arrive damaged, memory that is taken away.

Prefill 0 fails one hand-over in twenty; prefill 1 flips a bit in every frame; decode loses all pages every few steps.
Prefill 0 and decode cannot compute a prompt with POISON in it. Pages travel through shared memory alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from asking import ask, counters, endless, in_flight, settle, until
from mixed_requests import assert_same, generate, mixed_requests, one_by_one
from pd_cluster import MODEL, PDCluster, assert_idle, start_decode, start_prefill, start_router

from diptych.testing.processes import ServerProcess, metrics

pytestmark = pytest.mark.timeout(300)


POISON = 299
NUM_AT_ONCE = 80


def faults(**plan: Any) -> dict[str, str]:
    return {"DIPTYCH_TEST_FAULTS": json.dumps({"seed": 4, **plan})}


@pytest.fixture(scope="module")
def servers() -> Iterator[PDCluster]:
    """The faulty servers; the router is in front of prefill 0, and retries."""
    with ExitStack() as stack:
        common = ("--disaggregation-transfer-backend", "shm")
        prefill = [
            start_prefill(stack, *common, env=faults(fail_transfers=0.05, poison_token=POISON)),
            start_prefill(stack, *common, env=faults(corrupt_frames=1.0)),
        ]
        decode = [start_decode(stack, *common, env=faults(retract_every=5, poison_token=POISON))]
        for server in (*prefill, *decode):
            server.wait_ready()
        yield PDCluster(prefill, decode, start_router(stack, prefill[:1], decode))


@pytest.fixture(scope="module")
def plain(servers: PDCluster) -> Iterator[PDCluster]:
    """The same servers behind a router that does not retry, in front of the prefill server that damages pages."""
    with ExitStack() as stack:
        router = start_router(stack, servers.prefill[1:], servers.decode, "--disable-retries")
        yield PDCluster(servers.prefill, servers.decode, router)


def health(pd: PDCluster) -> list[int]:
    return [ask(server.url, "/health_generate")[0] for server in pd.servers]


def test_retries_and_retractions_do_not_show(servers: PDCluster, unified: ServerProcess) -> None:
    """Scenarios 8 and 13: a failed hand-over is tried again in a new room, and pages are taken away every five steps;
    both counters grow, answers and logprobs are those of a quiet server.
    """
    bodies = [*mixed_requests(20), *(endless(index, 50, 24, return_logprob=True) for index in range(10))]
    expected, replies = one_by_one(unified, bodies), one_by_one(servers.router, bodies)
    assert_same(expected, replies, "with failures and retractions")
    for reply in replies:
        meta = reply["meta_info"]
        assert len(meta.get("output_token_logprobs", reply["output_ids"])) == meta["completion_tokens"]
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) > 20
    assert counters(servers.decode[0])["num_retractions_total"] > 20
    failed = metrics(servers.prefill[0].get("/metrics"))["sglang:num_transfer_failed_reqs_total"]
    assert failed > 0
    assert metrics(servers.router.get("/metrics"))["smg_worker_retries_total"] == failed
    settle(servers)


def test_failed_transfers_disturb_nobody_else(servers: PDCluster, unified: ServerProcess) -> None:
    """Scenario 6: without retries some of the requests at once fail, and say so; the others are right.

    How many fail follows from the seed and from how many hand-overs there were before.
    """
    bodies = [endless(index, 30, 3, **servers.bootstrap(9000 + index)) for index in range(NUM_AT_ONCE)]
    with in_flight(servers.prefill[0], bodies) as prefilled, in_flight(servers.decode[0], bodies) as decoded:
        answers = [reply.result() for reply in decoded]
        assert [status for status, _ in answers] == [reply.result()[0] for reply in prefilled]  # both know
    failed = [text for status, text in answers if status != 200]
    assert 0 < len(failed) < NUM_AT_ONCE / 4
    assert all(json.loads(text)["error"]["message"] == "injected failure of a transfer" for text in failed)
    for index in (index for index, (status, _) in enumerate(answers) if status == 200):
        if index % 6 == 0:
            expected = generate(unified, endless(index, 30, 3))["output_ids"]
            assert json.loads(answers[index][1])["output_ids"] == expected
    assert health(servers) == [200, 200, 200]
    settle(servers)


def test_poison_ends_its_own_request_only(servers: PDCluster, unified: ServerProcess) -> None:
    """A prompt that makes the forward pass fail, among others on decode and among others on prefill: it is told so,
    and the others get the same answers and logprobs as on a quiet server.
    """
    decode = servers.decode[0]
    poison = endless(90, 40, 4)
    poison["input_ids"][20] = POISON
    long = [endless(index, 30, 80, return_logprob=True) for index in range(6)]
    with in_flight(decode, [{**body, "bootstrap_host": None} for body in long]) as replies:
        until(lambda: counters(decode).get("num_running_reqs", 0) == len(long), "all decode")
        assert_poisoned(ask(decode.url, "/generate", {**poison, "bootstrap_host": None}))
        answers = [json.loads(text) for _, text in (reply.result() for reply in replies)]
    assert_same(one_by_one(unified, long), answers, "beside poison on decode")
    company = [int(found) for line in decode.log for found in re.findall(r"step \d+ failed with (\d+) requests", line)]
    assert company[0] > 1 and company[-1] == 1

    bodies = [endless(index, 400, 4, return_logprob=True) for index in range(20, 32)]
    with in_flight(servers.router, [*bodies[:6], poison, *bodies[6:]]) as replies:
        told = [reply.result() for reply in replies]
    assert_poisoned(told.pop(6))
    assert_same(one_by_one(unified, bodies), [json.loads(text) for _, text in told], "beside poison on prefill")
    assert health(servers) == [200, 200, 200]
    settle(servers)


@pytest.mark.parametrize("ranks", [("--tp-size", "2"), ("--pp-size", "2")])
def test_poison_ends_its_own_request_only_with_several_ranks(ranks: tuple[str, str], unified: ServerProcess) -> None:
    """Rank 0 fails by itself, after what it does with the others: they stay in step. In the row's own prompt logprobs
    they have an exchange after that.
    """
    with ServerProcess("serve", *MODEL, *ranks, env=faults(poison_token=POISON)) as server:
        server.wait_ready()
        bodies = [endless(index, 40, 30) for index in range(4)]
        poison = endless(90, 40, 4, return_logprob=True, logprob_start_len=0)
        poison["input_ids"][20] = POISON
        with in_flight(server, [*bodies, poison, poison]) as replies:
            told = [reply.result() for reply in replies]
        for answer in told[4:]:
            assert_poisoned(answer)
        assert [status for status, _ in told[:4]] == [200] * 4
        assert_same(one_by_one(unified, bodies), [json.loads(text) for _, text in told[:4]], "beside poison")
        assert_idle(server)


def test_a_pass_that_fails_ends_an_engine_of_several_ranks() -> None:
    """Which rank got how far is unknown, and their sums could mix two steps: the server says so and ends, with 1."""
    with ServerProcess("serve", *MODEL, "--pp-size", "2", env=faults(senseless_token=POISON)) as server:
        server.wait_ready()
        senseless = endless(90, 40, 4)
        senseless["input_ids"][20] = POISON
        status, text = ask(server.url, "/generate", senseless)
        assert status == 503
        assert "the engine of this server has stopped" in text
        assert server.process.wait(20) == 1
        assert any("step 1 failed on rank 0 of 2" in line for line in server.log), server.tail()


def test_a_request_that_kills_engines_kills_two() -> None:
    """The router gives up on it, and says so; the third prefill server lives, and serves others."""
    with ExitStack() as stack:
        prefill = [start_prefill(stack, env=faults(deadly_token=POISON)) for _ in range(3)]
        decode = [start_decode(stack)]
        for server in (*prefill, *decode):
            server.wait_ready()
        router = start_router(stack, prefill, decode)
        deadly = endless(90, 40, 4)
        deadly["input_ids"][20] = POISON
        status, text = ask(router.url, "/generate", deadly)
        assert (status, json.loads(text)["error"]["code"]) == (500, "servers_died")
        until(lambda: sum(server.process.poll() == 1 for server in prefill) == 2, "two servers have ended")
        for index in range(4):
            assert ask(router.url, "/generate", endless(index, 40, 4))[0] == 200
        assert metrics(router.get("/metrics"))["diptych_router_given_up_total"] == 1
        settle(PDCluster([server for server in prefill if server.process.poll() is None], decode, router))


def test_requests_beside_one_that_kills_engines_are_served(unified: ServerProcess) -> None:
    """Some were on both of its first servers, and it was on their third one; no fourth one dies."""
    with ExitStack() as stack:
        prefill = [start_prefill(stack, env=faults(deadly_token=POISON)) for _ in range(4)]
        decode = [start_decode(stack)]
        for server in (*prefill, *decode):
            server.wait_ready()
        pd = PDCluster(prefill, decode, start_router(stack, prefill, decode))
        bodies = [endless(index, 200, 4) for index in range(24)]
        deadly = endless(90, 40, 4)
        deadly["input_ids"][20] = POISON
        with in_flight(pd.router, [*bodies[:12], deadly, *bodies[12:]]) as replies:
            told = [reply.result() for reply in replies]
        status, text = told.pop(12)
        assert (status, json.loads(text)["error"]["code"]) == (500, "servers_died")
        assert {status for status, _ in told} == {200}
        assert_same(one_by_one(unified, bodies), [json.loads(text) for _, text in told], "beside a deadly one")
        assert sum(server.process.poll() is not None for server in prefill) <= 3
        assert metrics(pd.router.get("/metrics"))["diptych_router_given_up_total"] == 1
        settle(PDCluster([server for server in prefill if server.process.poll() is None], decode, pd.router))


def assert_poisoned(answer: tuple[int, str]) -> None:
    assert answer[0] == 500
    assert json.loads(answer[1])["error"]["message"] == "the model failed on this request"


def test_first_tokens_are_those_of_their_requests(unified: ServerProcess) -> None:
    """Scenario 16: 40 requests at once, 2 at a time on either server, each with a first token of its own that is
    forced; before the pages of each come those of the request before, for the same place, and are refused.
    """
    flags = ("--disaggregation-transfer-backend", "shm", "--max-running-requests", "2")
    with ExitStack() as stack:
        prefill = start_prefill(stack, *flags, env=faults(stale_frames=1.0))
        decode = start_decode(stack, *flags)
        for server in (prefill, decode):
            server.wait_ready()
        pd = PDCluster([prefill], [decode], start_router(stack, [prefill], [decode]))
        bodies = [endless(index, 50, 3, return_logprob=True) for index in range(40)]
        for index, body in enumerate(bodies):
            body["sampling_params"]["logit_bias"] = {str(400 + index): 100}
        with in_flight(pd.router, bodies) as replies:
            answers = [json.loads(text) for _, text in (reply.result() for reply in replies)]
        assert [answer["output_ids"][0] for answer in answers] == [400 + index for index in range(40)]
        assert_same(one_by_one(unified, bodies), answers, "among stale pages")
        refused = decode.get("/audit")["counters"]
        assert refused["stale_frames"] + refused["duplicate_frames"] == 39 and refused["stale_frames"] >= 26
        assert refused["corrupt_frames"] == 0
        settle(pd)


def test_damaged_pages_never_become_an_answer(plain: PDCluster) -> None:
    """Scenario 15: a flipped bit is seen, the request says so, both servers live on and give their pages back."""
    with in_flight(plain.router, [endless(index, 20 + index, 3) for index in range(12)]) as replies:
        answers = [reply.result() for reply in replies]
    assert all(status >= 500 for status, _ in answers)
    assert all("corruption" in text for _, text in answers)
    seen = plain.decode[0].get("/audit")["counters"]["corrupt_frames"]
    assert seen >= 12
    assert health(plain) == [200, 200, 200]
    settle(plain)


def test_healthy_traffic_has_no_corruption(servers: PDCluster) -> None:
    """Scenario 15, the other half: the same prompt three times, the same text, and no damaged frame more."""
    before = servers.decode[0].get("/audit")["counters"]["corrupt_frames"]
    body = {"text": "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"}
    body |= {"sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    texts = {generate(servers.router, body)["text"] for _ in range(3)}
    assert len(texts) == 1 and "42" in texts.pop()
    assert servers.decode[0].get("/audit")["counters"]["corrupt_frames"] == before
