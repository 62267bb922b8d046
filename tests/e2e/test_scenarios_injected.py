"""SGLang's scenarios with injected faults: transfers that fail, pages that arrive damaged, memory that is taken away.

Prefill 0 fails one hand-over in five; prefill 1 flips a bit in every frame; decode loses all pages every few steps.
Pages travel through shared memory alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from asking import ask, counters, endless, in_flight, settle
from mixed_requests import assert_same, generate, mixed_requests, one_by_one
from pd_cluster import PDCluster, start_decode, start_prefill, start_router

from diptych.testing.processes import ServerProcess, metrics

pytestmark = pytest.mark.timeout(300)


def faults(**plan: Any) -> dict[str, str]:
    return {"DIPTYCH_TEST_FAULTS": json.dumps({"seed": 3, **plan})}


@pytest.fixture(scope="module")
def servers() -> Iterator[PDCluster]:
    """The faulty servers; the router is in front of prefill 0, and retries."""
    with ExitStack() as stack:
        common = ("--disaggregation-transfer-backend", "shm")
        prefill = [
            start_prefill(stack, *common, env=faults(fail_transfers=0.2)),
            start_prefill(stack, *common, env=faults(corrupt_frames=1.0)),
        ]
        decode = [start_decode(stack, *common, env=faults(retract_every=5))]
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
    """Scenario 6: without retries some of 60 requests at once fail, and say so; the others are right."""
    bodies = [endless(index, 30, 3, **servers.bootstrap(9000 + index)) for index in range(60)]
    with in_flight(servers.prefill[0], bodies) as prefilled, in_flight(servers.decode[0], bodies) as decoded:
        answers = [reply.result() for reply in decoded]
        assert [status for status, _ in answers] == [reply.result()[0] for reply in prefilled]  # both know
    failed = [text for status, text in answers if status != 200]
    assert 0 < len(failed) < 30
    assert all(json.loads(text)["error"]["message"] == "injected failure of a transfer" for text in failed)
    for index in (index for index, (status, _) in enumerate(answers) if status == 200):
        if index % 6 == 0:
            expected = generate(unified, endless(index, 30, 3))["output_ids"]
            assert json.loads(answers[index][1])["output_ids"] == expected
    assert health(servers) == [200, 200, 200]
    settle(servers)


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
