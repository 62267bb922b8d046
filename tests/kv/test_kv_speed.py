"""Costs that decide how long planning a step takes: CPU time, best of several, with a margin for a busy machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from diptych.kv.audit import audit
from diptych.kv.pool import PagePool
from diptych.kv.radix import RadixTree

ME = ("seq", "me")


def best_s(call: Callable[[], object], times: int = 15) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best


def branching_tree(num_tokens: int) -> tuple[RadixTree, list[int]]:
    """A tree in which others have branched off `tokens` at almost every page: the slowest to match."""
    rng = random.Random(num_tokens)
    tree = RadixTree(PagePool(2 * num_tokens // 16 + 64, 16))
    tokens = [rng.randrange(150_000) for _ in range(num_tokens)]
    pages = tree.pool.alloc(num_tokens // 16, ME)
    tree.insert("", tokens, pages)
    for index in range(1, num_tokens // 16):
        branch = tree.pool.alloc(1, ME)
        tree.insert("", [*tokens[: index * 16], *range(16)], [*pages[:index], *branch])
        tree.pool.release(branch, ME)
    tree.pool.release(pages, ME)
    return tree, tokens


def test_a_match_of_4k_tokens_takes_well_under_a_millisecond() -> None:
    tree, tokens = branching_tree(4096)
    assert len(tree.match("", tokens, 4096).pages) == 256
    assert best_s(lambda: tree.match("", tokens, 4095)) < 1e-3


def test_a_match_scales_with_the_length_of_the_prompt() -> None:
    small, tokens = branching_tree(4096)
    large, more = branching_tree(8192)
    once = best_s(lambda: small.match("", tokens, 4095), 40)
    twice = best_s(lambda: large.match("", more, 8191), 40)
    assert twice / once < 3.0


def test_eviction_does_not_look_at_the_whole_tree() -> None:
    tree, _ = branching_tree(4096)
    assert best_s(lambda: tree.evict(1)) < 1e-4


def test_the_audit_takes_at_most_a_millisecond_per_thousand_pages() -> None:
    rng = random.Random(1)
    tree = RadixTree(PagePool(20_000, 16))
    for _ in range(250):
        pages = tree.pool.alloc(64, ME)
        tree.insert("", [rng.randrange(150_000) for _ in range(64 * 16)], pages)
        tree.pool.release(pages, ME)
    assert best_s(lambda: audit(tree.pool, tree, {}), 8) < 20e-3
