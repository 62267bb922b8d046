"""Policies, and the picture of the servers' prefix caches."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.pick import PickState, pick
from diptych.router.prefixes import NODE_BYTES, PrefixTree, common_prefix


@dataclass(eq=False)
class Load:
    address: ServerAddress
    num_requests: int = 0
    prompt_bytes: int = 0


def loads(*pairs: tuple[int, int]) -> list[Load]:
    return [Load(ServerAddress("h", i), *pair) for i, pair in enumerate(pairs)]


def state(policy: str, **settings) -> PickState:
    return PickState(RouterConfig(policy=policy, **settings), "worker")


def test_round_robin_takes_turns():
    servers, turns = loads((9, 0), (0, 0), (0, 0)), state("round_robin")
    assert [pick(turns, servers, b"", random.Random(0)).address.port for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_random_takes_all_alike():
    servers, rng = loads((9, 0), (0, 0)), random.Random(0)
    counts = Counter(pick(state("random"), servers, b"", rng).address.port for _ in range(1000))
    assert min(counts.values()) > 450


@pytest.mark.parametrize(
    ("pairs", "best"), [([(2, 0), (1, 900), (3, 0)], {1}), ([(1, 50), (1, 20), (1, 20)], {1, 2}), ([(5, 5)], {0})]
)
def test_least_load_counts_requests_then_bytes(pairs, best):
    rng = random.Random(0)
    assert {pick(state("least_load"), loads(*pairs), b"", rng).address.port for _ in range(50)} == best


def test_power_of_two_takes_the_better_of_two():
    servers, rng = loads((0, 0), (1, 0), (2, 0)), random.Random(0)
    counts = Counter(pick(state("power_of_two"), servers, b"", rng).address.port for _ in range(3000))
    assert counts[2] == 0 and counts[0] > 1.8 * counts[1] > 0


def test_cache_aware_goes_where_the_prefix_is():
    servers, caches, rng = loads((0, 0), (0, 0), (0, 0)), state("cache_aware"), random.Random(0)
    system = [bytes([65 + i]) * 300 for i in range(6)]
    first = {text: pick(caches, servers, text, rng).address.port for text in system}
    assert Counter(first.values()) == {0: 2, 1: 2, 2: 2}  # new prompts go where there is most room
    for text, port in first.items():
        assert all(pick(caches, servers, text + b"question %d" % i, rng).address.port == port for i in range(5))


def test_cache_aware_follows_the_prefix_only_above_the_threshold():
    caches, rng = state("cache_aware", cache_threshold=0.5), random.Random(0)
    servers = loads((0, 0), (0, 0))
    home = pick(caches, servers, b"a" * 200, rng)
    assert pick(caches, servers, b"a" * 101 + b"b" * 99, rng) is home
    assert pick(caches, servers, b"a" * 100 + b"c" * 100, rng) is not home


def test_cache_aware_does_not_take_a_common_opening_for_a_cached_prefix():
    caches, rng = state("cache_aware"), random.Random(0)
    servers = loads((0, 0), (0, 0))
    chosen = [pick(caches, servers, b'[{"role":"user","content":"%d"}]' % i, rng) for i in range(10)]
    assert Counter(server.address.port for server in chosen) == {0: 5, 1: 5}


def test_cache_aware_balances_when_loads_differ_absolutely_and_relatively():
    rng, text = random.Random(0), b"a" * 100

    def second(*pairs):
        caches = state("cache_aware", balance_abs_threshold=8, balance_rel_threshold=2.0)
        caches.tree.insert(text, ServerAddress("h", 0))
        return pick(caches, loads(*pairs), text, rng).address.port

    assert second((8, 0), (0, 0)) == 0  # not enough more
    assert second((9, 0), (0, 0)) == 1
    assert second((29, 0), (15, 0)) == 0  # not twice as many
    assert second((31, 0), (15, 0)) == 1


def test_cache_aware_without_a_prompt_takes_the_least_loaded():
    assert pick(state("cache_aware"), loads((2, 0), (1, 0)), b"", random.Random(0)).address.port == 1


texts = st.lists(st.sampled_from([b"a", b"ab", b"abc", b"b", b"xy" * 40]), max_size=8).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, st.integers(0, 2), st.booleans()), max_size=30), texts)
def test_tree_knows_what_a_list_of_all_prompts_knows(steps, asked):
    tree, model = PrefixTree(1 << 30), {}
    for text, server, is_loss in steps:
        if is_loss:
            tree.remove(server)
            model.pop(server, None)
        elif text:
            tree.insert(text, server)
            model.setdefault(server, []).append(text)
    expected = {s: max((common_prefix(t, asked, 0) for t in known), default=0) for s, known in model.items()}
    assert tree.match(asked) == {s: n for s, n in expected.items() if n}
    prefixes = {s: len({t[:i] for t in known for i in range(1, len(t) + 1)}) for s, known in model.items()}
    assert {s: n for s, n in tree.sizes.items() if n} == prefixes


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 10))
def test_common_prefix(edge, rest, at):
    text = b"z" * at + rest
    expected = next((i for i, (a, b) in enumerate(zip(edge, rest, strict=False)) if a != b), min(len(edge), len(rest)))
    assert common_prefix(edge, text, at) == expected


def test_tree_is_bounded_and_forgets_the_oldest():
    tree, rng = PrefixTree(100_000), random.Random(0)
    prompts = [rng.randbytes(500) for _ in range(1000)]
    for number, prompt in enumerate(prompts):
        tree.insert(prompt, number % 3)
        tree.insert(prompts[0], 0)  # in use all the time
        assert tree.size_bytes <= 100_000
    assert tree.match(prompts[0])[0] == 500 == max(tree.match(prompts[-1]).values())
    assert max(tree.match(prompts[5]).values(), default=0) < 4
    assert sum(tree.sizes.values()) <= tree.size_bytes
    for server in range(3):
        tree.remove(server)
    assert tree.size_bytes == 0


def test_tree_is_fast_enough_for_long_prompts():
    tree, rng = PrefixTree(16 << 20), random.Random(0)
    long = rng.randbytes(1 << 20)
    tree.insert(long, 0)
    changed = bytearray(long)
    changed[700_000] ^= 1
    assert tree.match(bytes(changed)) == {0: 700_000}
    assert tree.size_bytes == (1 << 20) + NODE_BYTES
