"""Whatever the settings: what comes out equals generation without pages, `==`, logprobs included."""

from __future__ import annotations

import random

import pytest
from sched_server import CONTEXT, Server, hand_over, mixed, request

from diptych.sched.state import Status
from diptych.types import Bootstrap, Request

POLICIES = ("fcfs", "lpm")


def workload(seed: int, count: int, longest: int = CONTEXT - 4) -> list[Request]:
    """Requests of mixed kinds; most prompts begin alike: prefixes are shared, diverge, are computed twice at once."""
    rng = random.Random(seed)
    trunk = [rng.randrange(1, 101) for _ in range(longest)]
    requests = []
    for index in range(count):
        length = rng.randrange(1, longest)
        shared = rng.choice([0, length, rng.randrange(length + 1)])
        prompt = trunk[:shared] + [rng.randrange(1, 101) for _ in range(length - shared)]
        requests.append(mixed(f"r{index}", prompt, rng.randrange(10_000), rng.randrange(1, 24)))
    return requests


def serve(server: Server, requests: list[Request], seed: int = 0) -> None:
    """Random arrivals, all to the end."""
    rng = random.Random(seed)
    waiting = list(requests)
    while waiting:
        for _ in range(rng.randrange(3)):
            if waiting:
                server.submit(waiting.pop(0))
        server.step()
    server.run()
    server.check()
    server.check_empty()


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 16, -1])
@pytest.mark.parametrize("max_running", [1, 3, 16])
def test_cache_chunks_and_batch_size_do_not_show(radix: bool, chunk_tokens: int, max_running: int) -> None:
    server = Server(80, radix=radix, chunk_tokens=chunk_tokens, max_running=max_running)
    serve(server, workload(7, 24))


@pytest.mark.parametrize("page_size", [1, 2, 5, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_page_size_and_policy_do_not_show(page_size: int, policy: str) -> None:
    serve(Server(-(-300 // page_size), page_size=page_size, policy=policy), workload(8, 24))


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("num_pages", [16, 20, 30])
@pytest.mark.parametrize(("policy", "overlaps"), [("fcfs", False), ("fcfs", True), ("lpm", True)])
def test_retraction_does_not_show(radix: bool, num_pages: int, policy: str, overlaps: bool) -> None:
    server = Server(num_pages, radix=radix, reserved_decode_tokens=0, policy=policy, max_running=8, overlaps=overlaps)
    serve(server, workload(9, 30, longest=24))
    assert server.state.counters.retractions > 0
    assert (server.num_ahead > 0) == overlaps


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_settings_do_not_show(seed: int, overlaps: bool) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 4, 8])
    server = Server(
        rng.choice([CONTEXT // page_size, 2 * CONTEXT // page_size]),
        page_size=page_size,
        chunk_tokens=rng.choice([1, 5, 8, 32, -1]),
        radix=rng.random() < 0.7,
        reserved_decode_tokens=rng.choice([0, 8, 512]),
        policy=rng.choice(POLICIES),
        max_running=rng.choice([2, 5, 9]),
        keep=rng.random() < 0.8,
        overlaps=overlaps,
    )
    serve(server, workload(seed, 20, longest=min(CONTEXT, server.state.max_len) - 2), seed)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_sequence_retracted_at_every_step_still_gives_the_same(overlaps: bool) -> None:
    server = Server(40, overlaps=overlaps)
    server.submit(*workload(3, 6, longest=30))
    steps = 0
    while server.state.waiting or server.state.running:
        server.step()
        steps += 1
        for seq in server.state.running[::-1]:
            if (steps + seq.num_computed) % 3 == 0:
                server.retract(seq)
        assert steps < 3000
    server.run()
    server.check()
    server.check_empty()
    assert server.state.counters.retractions > 20


@pytest.mark.parametrize(("prefill_world", "decode_world"), [(1, 1), (1, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize(("decode_radix", "overlaps"), [(True, False), (False, False), (True, True)])
def test_prefill_and_decode_apart_give_the_same(
    prefill_world: int, decode_world: int, decode_radix: bool, overlaps: bool
) -> None:
    prefill = Server(60, world=prefill_world, chunk_tokens=8, overlaps=overlaps)
    decode = Server(50, world=decode_world, radix=decode_radix, overlaps=overlaps)
    prefill.hold = True
    spared = 0
    for room, one in enumerate(workload(11, 30, longest=40)):
        one = with_room(one, room)
        seq = decode.reserve(one)
        while seq is None:
            assert decode.step() is not None
            seq = decode.reserve(one)
        spared += seq.prefix_tokens
        prefill.submit(half(one))
        decode.step()
        prefill.run()
        assert prefill.got[one.rid].pages[-1][1] == len(seq.pages)
        decode.join(seq, hand_over(prefill, decode, one.rid, seq))
        prefill.release(prefill.state.seqs[one.rid])
    decode.run()
    decode.check()
    decode.check_empty()
    prefill.check_empty()
    assert (spared > 0) == decode_radix


def with_room(one: Request, room: int) -> Request:
    """The request as a router sends it; prompt logprobs stay with prefill, and at least one token is wanted."""
    changed = request(one.rid, one.prompt, one.sampling.max_new_tokens, namespace=one.namespace)
    return Request(
        rid=one.rid,
        prompt=one.prompt,
        sampling=changed.sampling,
        namespace=one.namespace,
        bootstrap=Bootstrap("p", 1, room),
    )


def half(one: Request) -> Request:
    """What a prefill server computes of it: the prompt and the first token."""
    return request(one.rid, one.prompt, 1, namespace=one.namespace)


def test_a_joined_sequence_that_is_retracted_is_computed_again_by_decode() -> None:
    prefill, decode = Server(40), Server(40)
    prefill.hold = True
    one = with_room(request("a", range(1, 31), 20), 5)
    seq = decode.reserve(one)
    assert seq is not None
    prefill.submit(half(one))
    prefill.run()
    decode.join(seq, hand_over(prefill, decode, "a", seq))
    decode.step()
    decode.retract(seq)
    decode.state.tree.flush()
    decode.run()
    decode.check()
    assert (seq.num_retractions, decode.got["a"].pages) == (1, [])


def test_wrong_pages_would_show() -> None:
    """The mock is a judge only if damage changes what comes out."""
    prefill, decode = Server(40), Server(40)
    prefill.hold = True
    one = with_room(request("a", range(1, 31), 20, ignore_eos=True), 5)
    seq = decode.reserve(one)
    assert seq is not None
    prefill.submit(half(one))
    prefill.run()
    first = hand_over(prefill, decode, "a", seq)
    page = seq.pages[3]
    data = bytearray(decode.runner.store.read([page], 2, 3))
    data[17] ^= 1
    decode.runner.store.write([page], 2, 3, memoryview(data))
    decode.join(seq, first)
    decode.run()
    assert seq.status is Status.RELEASED
    with pytest.raises(AssertionError):
        decode.check()
