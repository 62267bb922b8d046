"""Scenario 10: prefill and decode with different tensor parallel sizes exchange slices of KV heads."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from asking import settle
from mixed_requests import all_at_once, assert_same, mixed_requests
from pd_cluster import start_cluster

from diptych.testing.processes import metrics
from recipes.demo import parse_reply, problems, score
from recipes.demo.eval import request_body

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(("prefill", "decode"), [(4, 2), (2, 4)])
def test_different_tensor_parallel_sizes(prefill: int, decode: int) -> None:
    """Answers are right (a wrong slice of heads shows at once) and, to the last bit, the same when asked again."""
    with ExitStack() as stack:
        flags = {"prefill_flags": ("--tp", str(prefill)), "decode_flags": ("--tp", str(decode))}
        pd = start_cluster(stack, 1, **flags)
        asked = [problem for task in ("arithmetic", "copy", "extract") for problem in problems(task, 4, seed=2)]
        right = 0
        for problem in asked:
            reply = pd.router.post("/v1/chat/completions", request_body(problem, False, "demo"))
            right += score(problem, parse_reply(reply["choices"][0]["message"]["content"]), False)
        assert right >= len(asked) - 1
        bodies = mixed_requests(10, most_new=8)
        assert_same(all_at_once(pd.router, bodies), all_at_once(pd.router, bodies), f"tp {prefill} to {decode}")
        sent, received = (metrics(server.get("/metrics")) for server in pd.servers)
        assert sent["sglang:kv_pages_sent_total"] == received["sglang:kv_pages_received_total"] > 0
        assert sent["sglang:kv_bytes_sent_total"] == received["sglang:kv_bytes_received_total"] > 0
        settle(pd)
