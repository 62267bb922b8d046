"""The only decode server is replaced under load: no request is lost, and every answer is right."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack

import pytest
from asking import counters, endless, in_flight, settle, until
from mixed_requests import all_at_once, essence
from pd_cluster import start_cluster, start_decode

from diptych.testing.processes import metrics

pytestmark = pytest.mark.timeout(300)

NUM_BEGUN, NUM_LATER = 4, 32


def test_an_update_of_the_only_decode_server_loses_no_request() -> None:
    """SIGTERM, and its successor at the same address only when it is gone: what it has it ends, the rest is held."""
    with ExitStack() as stack:
        pd = start_cluster(stack, 1, router_flags=("--hold-timeout-secs", "120"))
        old = pd.decode.pop()
        begun = [endless(index, 40, 300) for index in range(NUM_BEGUN)]
        later = [endless(50 + index, 60, 8) for index in range(NUM_LATER)]
        expected = [essence(reply) for reply in all_at_once(pd.router, begun + later)]
        with in_flight(pd.router, begun) as first:
            until(lambda: counters(old).get("num_running_reqs", 0) == NUM_BEGUN, "all decode")
            old.signal(signal.SIGTERM)
            until(lambda: any("draining" in line for line in list(old.log)), "it drains")
            with in_flight(pd.router, later) as rest:
                until(lambda: _held(pd.router.get("/metrics")) == NUM_LATER, "the others are held")
                assert old.process.wait(60) == 0
                assert _held(pd.router.get("/metrics")) == NUM_LATER
                pd.decode.append(start_decode(stack, "--port", old.url.rpartition(":")[2]))
                answers = [reply.result() for reply in (*first, *rest)]
        assert [status for status, _ in answers] == [200] * len(answers), [a for a in answers if a[0] != 200]
        assert [essence(json.loads(text)) for _, text in answers] == expected
        pd.decode[0].wait_ready()
        settle(pd)


def _held(text: str) -> float:
    return metrics(text)["diptych_router_requests_held"]
