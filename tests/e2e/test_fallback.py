"""The only prefill server dies under load: decode takes over its part, every request is answered, and rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack

import psutil
import pytest
from asking import ask, endless, in_flight, settle, until
from mixed_requests import essence
from pd_cluster import PDCluster, assert_idle, start_cluster

from diptych.testing.processes import ServerProcess, metrics

pytestmark = pytest.mark.timeout(300)

NUM_REQUESTS = 32


def everything(server: ServerProcess) -> list[psutil.Process]:
    """All processes, the engine's first: as when the machine goes."""
    return list(reversed(server.tree()))


def the_engine(server: ServerProcess) -> list[psutil.Process]:
    """The engine process alone, as when the kernel is out of memory; the server ends by itself."""
    return [process for process in server.tree() if "diptych.engine.worker" in process.cmdline()]


@pytest.mark.parametrize("victims", [everything, the_engine])
def test_no_request_is_lost_with_the_only_prefill_server(
    victims: Callable[[ServerProcess], list[psutil.Process]],
) -> None:
    with ExitStack() as stack:
        pd = start_cluster(stack, 1)
        logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        bodies = [
            endless(index, 120 + 5 * index, 8, **(logprobs if index % 4 == 0 else {})) for index in range(NUM_REQUESTS)
        ]
        expected = [essence(pd.router.post("/generate", body)) for body in bodies]
        assert _fallbacks(pd) == 0
        pd.prefill[0].post("/flush_cache", {})
        with in_flight(pd.router, bodies) as replies:
            until(lambda: pd.prefill[0].get("/audit")["sequences"] > 2, "prefill has work")
            for process in victims(pd.prefill[0]):
                process.kill()
            answers = [reply.result() for reply in replies]
        assert [status for status, _ in answers] == [200] * NUM_REQUESTS, [a for a in answers if a[0] != 200]
        assert [essence(json.loads(text)) for _, text in answers] == expected
        assert _fallbacks(pd) > 0
        until(lambda: ask(pd.router.url, "/ready")[0] == 503, "the router is not ready")
        assert "no prefill server" in ask(pd.router.url, "/ready")[1]
        _serves_alone(pd)
        pd.prefill.clear()
        settle(pd)
        assert_idle(pd.decode[0])


def _fallbacks(pd: PDCluster) -> float:
    return metrics(pd.router.get("/metrics"))["diptych_router_prefill_fallbacks_total"]


def _serves_alone(pd: PDCluster) -> None:
    """What comes later is served as well: chats, streams, batches."""
    before = _fallbacks(pd)
    chat = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "temperature": 0, "max_tokens": 60}
    reply = pd.router.post("/v1/chat/completions", chat)
    assert "42" in reply["choices"][0]["message"]["content"]
    status, text = ask(pd.router.url, "/v1/chat/completions", {**chat, "stream": True})
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    batch = pd.router.post("/v1/completions", {"prompt": [[300, 301], [302, 303]], "n": 2, "max_tokens": 2})
    assert len(batch["choices"]) == 4
    assert _fallbacks(pd) == before + 3
