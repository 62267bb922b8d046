"""DESIGN.md, decision 3: the same token ids and logprob bits, whatever the server's settings and its other work.

46 requests of all kinds (penalties, seeds, grammars, biases, logprobs of prompt and output) are asked one by one of a
plain server; everything else must answer the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from asking import counters, endless
from mixed_requests import all_at_once, assert_same, generate, mixed_requests, one_by_one
from pd_cluster import MODEL, PDCluster, assert_idle, start_cluster

from diptych.testing.processes import ServerProcess, metrics

pytestmark = pytest.mark.timeout(300)

BODIES = [*mixed_requests(), *(endless(index, 20, 60, return_logprob=True) for index in range(6))]
VARIANTS = {
    "no cache, chunks of 16, one at a time": (
        *("--disable-radix-cache", "--chunked-prefill-size", "16", "--max-running-requests", "1"),
    ),
    "chunks of 48, a small pool that preempts": (
        *("--chunked-prefill-size", "48", "--max-running-requests", "32"),
        *("--max-total-tokens", "512", "--num-reserved-decode-tokens", "0"),
    ),
    "whole prompts, pages of 8": ("--chunked-prefill-size", "-1", "--page-size", "8"),
    "pages of 32, longest prefix first": ("--page-size", "32", "--schedule-policy", "lpm"),
}


@pytest.fixture(scope="module")
def reference(unified: ServerProcess) -> list[dict[str, Any]]:
    """Each request alone, on a server that has never seen its prompt."""
    unified.post("/flush_cache", {})
    replies = []
    for body in BODIES:
        replies.append(generate(unified, body))
        unified.post("/flush_cache", {})
    assert {reply["meta_info"]["cached_tokens"] for reply in replies} == {0}
    return replies


@pytest.fixture(scope="module")
def variants() -> Iterator[dict[str, ServerProcess]]:
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(ServerProcess("serve", *MODEL, *flags)) for name, flags in VARIANTS.items()
        }
        for server in servers.values():
            server.wait_ready()
        yield servers


def test_in_a_crowd_and_with_a_warm_cache(unified: ServerProcess, reference: list[dict[str, Any]]) -> None:
    assert_same(reference, all_at_once(unified, BODIES), "in a crowd")
    replies = one_by_one(unified, BODIES)
    assert_same(reference, replies, "with a warm cache")
    assert sum(reply["meta_info"]["cached_tokens"] for reply in replies) > 2000
    assert_idle(unified)


@pytest.mark.parametrize("name", VARIANTS)
def test_whatever_the_settings(variants: dict[str, ServerProcess], reference: list[dict[str, Any]], name: str) -> None:
    server = variants[name]
    assert_same(reference, all_at_once(server, BODIES), name)
    if "no cache" not in name:
        assert_same(reference, all_at_once(server, BODIES), f"{name}, again")
    if "preempts" in name:
        assert counters(server)["num_retractions_total"] > 0
    assert_idle(server)


def test_disaggregated(cluster: PDCluster, reference: list[dict[str, Any]]) -> None:
    """Over router, prefill and decode: in a crowd, then with caches that are warm."""
    for what in ("disaggregated", "disaggregated, again"):
        assert_same(reference, all_at_once(cluster.router, BODIES), what)
    for server in cluster.servers:
        assert_idle(server)


def test_tensor_parallel_and_disaggregated() -> None:
    """Two ranks add up their halves in another order than one rank does, so that tp 2 is compared with tp 2.

    Prefill servers with tp 2 and another chunk size, a decode server with tp 2; test_scenarios_pp.py has the stages.
    """
    with ExitStack() as stack:
        alone = stack.enter_context(ServerProcess("serve", *MODEL, "--tp", "2"))
        alone.wait_ready()
        expected = one_by_one(alone, BODIES)
        alone.stop()
        pd = start_cluster(stack, 1, "--tp", "2", prefill_flags=("--chunked-prefill-size", "48"))
        assert_same(expected, all_at_once(pd.router, BODIES), "tp 2, disaggregated")
        for server in pd.servers:
            assert_idle(server)
        assert metrics(pd.decode[0].get("/metrics"))["sglang:kv_pages_received_total"] > 0
