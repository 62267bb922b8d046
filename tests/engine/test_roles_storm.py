"""Everything that may happen to a request, at random moments, on a prefill and a decode server that are short of pages.

Clients leave, operators abort on one side or both, stop strings end requests early, generation is paused, retracted and
continued. With odd seeds the servers plan ahead. Each stream that its client still reads ends once; its tokens are a
prefix of the right ones; in the end nothing is held.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from diptych.sched.audit import audit
from diptych.testing.cluster import Cluster
from diptych.testing.mock_model import expected
from diptych.testing.server import SimServer
from diptych.testing.virtual import run_virtual
from diptych.types import FAKE_BOOTSTRAP_HOST, Bootstrap, LogprobSpec, Output, Request, Sampling

NUM_REQUESTS = 20


class Storm:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.overlaps = seed % 2 == 1
        self.ends: list[str] = []

    async def run(self) -> None:
        self.cluster = Cluster(self.rng.getrandbits(32), prefill=1, decode=1, overlaps=self.overlaps)
        await self.cluster.start()
        self.servers = [self.cluster.servers["p0"], self.cluster.servers["d0"]]
        chaos = asyncio.ensure_future(self.chaos())
        await asyncio.gather(*(self.request(number) for number in range(NUM_REQUESTS)))
        chaos.cancel()
        await asyncio.gather(chaos, return_exceptions=True)
        for server in self.servers:
            await server.link.control("continue")
        await asyncio.sleep(40)
        for server in self.servers:
            audit(server.state)
            assert not any(server.holds().values()), (server.name, server.holds())
            assert (await server.link.control("audit"))["ok"]
            await server.link.control("flush_cache")
            assert server.state.pool.num_free == server.state.pool.num_pages
        await self.cluster.close()

    async def request(self, number: int) -> None:
        rng = random.Random(self.rng.getrandbits(32))
        await asyncio.sleep(rng.uniform(0, 1))
        prompt = [7] * rng.choice([0, 8, 24]) + [rng.randrange(1, 90) for _ in range(rng.choice([1, 4, 9, 40]))]
        host = FAKE_BOOTSTRAP_HOST if rng.random() < 0.1 else "p0"
        request = Request(
            rid=f"r{number}",
            prompt=prompt,
            sampling=Sampling(
                max_new_tokens=rng.choice([1, 1, 2, 9, 30]),
                min_new_tokens=rng.choice([0, 0, 1, 5]),
                seed=rng.getrandbits(30),
                repetition_penalty=rng.choice([1.0, 1.3]),
            ),
            logprobs=LogprobSpec(top=2) if rng.random() < 0.3 else None,
            bootstrap=Bootstrap(host, 0, number) if rng.random() < 0.9 else None,
        )
        sides = self.servers if request.bootstrap is not None else self.servers[1:]
        right = expected(request, self.servers[1].runner.info, 256).tokens
        readers = [asyncio.ensure_future(self.read(server, request, right, rng.random())) for server in sides]
        if rng.random() < 0.3:
            await asyncio.sleep(rng.uniform(0, 1))
            for server in rng.choice([self.servers, self.servers[:1], self.servers[1:]]):
                await server.link.abort(request.rid, "enough")
        await asyncio.gather(*readers)

    async def read(self, server: SimServer, request: Request, right: list[int], fate: float) -> None:
        """fate: below 0.15 the client leaves, below 0.3 the text is complete after some tokens."""
        outputs: list[Output] = []
        stream = server.link.generate(request)
        try:
            async with asyncio.timeout(8 * fate if fate < 0.15 else 200):
                async for output in stream:
                    outputs.append(output)
                    if 0.15 <= fate < 0.3 and sum(len(o.tokens) for o in outputs) > 20 * (fate - 0.15):
                        server.link.complete(request.rid)
                        break
        except TimeoutError:
            assert fate < 0.15, f"{request.rid} hangs on {server.name}"
        await stream.aclose()  # type: ignore[attr-defined]
        tokens = [token for output in outputs for token in output.tokens]
        faked = request.bootstrap is not None and request.bootstrap.host == FAKE_BOOTSTRAP_HOST
        if not faked or server is self.servers[0]:
            assert tokens == right[: len(tokens)], (request.rid, server.name)
        if request.logprobs is not None:
            assert [entry.token for output in outputs for entry in output.logprobs or []] == tokens
        ends = [output.finish for output in outputs if output.finish is not None]
        assert len(ends) <= 1 and (ends == [] or outputs[-1].finish is ends[0])
        if ends and ends[0].type != "abort" and server is self.servers[1] and request.bootstrap is None:
            assert tokens == right
        self.ends.append(ends[0].code or ends[0].type if ends else "left")

    async def chaos(self) -> None:
        rng = random.Random(self.rng.getrandbits(32))
        while True:
            await asyncio.sleep(rng.uniform(0, 0.5))
            server = rng.choice(self.servers)
            await server.link.control("pause", mode=rng.choice(["in_place", "retract"]))
            await asyncio.sleep(rng.uniform(0, 0.2))
            await server.link.control("continue")


@pytest.mark.parametrize("block", range(3))
def test_ten_storms(block: int) -> None:
    ends: list[str] = []
    for seed in range(block * 10, block * 10 + 10):
        storm = Storm(seed)
        try:
            run_virtual(storm.run())
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        ends += storm.ends
    assert {"length", "left", "aborted"} <= set(ends)
