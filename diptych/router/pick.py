"""Which server gets a request: the policies. Pure, but for the state they are handed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.prefixes import PrefixTree

MIN_MATCH_BYTES = 64  # about a page of KV: a shorter common beginning spares a server nothing


class Candidate(Protocol):
    """A server that may get the request, and its load: requests in flight, and bytes of prompts in flight."""

    @property
    def address(self) -> ServerAddress: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def prompt_bytes(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class PickState:
    """What policies remember between requests of one role."""

    def __init__(self, config: RouterConfig, role: str) -> None:
        self.policy = config.policy_of(role)
        self.turn = 0
        self.tree = PrefixTree(config.max_tree_size)
        self.threshold = config.cache_threshold
        self.balance_abs = config.balance_abs_threshold
        self.balance_rel = config.balance_rel_threshold


def pick(state: PickState, candidates: Sequence[C], key: bytes, rng: random.Random) -> C:
    """One of the `candidates`, which are not empty. `key`: the prompt. Changes `state` as the policy says."""
    if state.policy == "cache_aware":
        return _cache_aware(state, candidates, key, rng)
    if len(candidates) == 1:
        return candidates[0]
    if state.policy == "random":
        return rng.choice(candidates)
    if state.policy == "round_robin":
        state.turn += 1
        return candidates[(state.turn - 1) % len(candidates)]
    if state.policy == "power_of_two":
        return _least_loaded(rng.sample(candidates, 2), rng)
    return _least_loaded(candidates, rng)


def _load(candidate: Candidate) -> tuple[int, int]:
    return candidate.num_requests, candidate.prompt_bytes


def _least_loaded(candidates: Sequence[C], rng: random.Random) -> C:
    """The one with the fewest requests, then with the least prompt text in flight; among equals any."""
    least = min(map(_load, candidates))
    equals = [candidate for candidate in candidates if _load(candidate) == least]
    return equals[0] if len(equals) == 1 else rng.choice(equals)


def _cache_aware(state: PickState, candidates: Sequence[C], key: bytes, rng: random.Random) -> C:
    """The server that knows most of the prompt, unless loads are out of balance or none knows enough."""
    chosen = _by_prefix(state, candidates, key, rng) if len(candidates) > 1 else candidates[0]
    if key:
        state.tree.insert(key, chosen.address)
    return chosen


def _by_prefix(state: PickState, candidates: Sequence[C], key: bytes, rng: random.Random) -> C:
    loads = [candidate.num_requests for candidate in candidates]
    least, most = min(loads), max(loads)
    if not key or (most - least > state.balance_abs and most > state.balance_rel * least):
        return _least_loaded(candidates, rng)
    known = state.tree.match(key)
    longest = max((known.get(candidate.address, 0) for candidate in candidates), default=0)
    if longest >= MIN_MATCH_BYTES and longest > state.threshold * len(key):
        return _least_loaded([c for c in candidates if known.get(c.address, 0) == longest], rng)
    fewest = min(state.tree.sizes.get(candidate.address, 0) for candidate in candidates)
    return _least_loaded([c for c in candidates if state.tree.sizes.get(c.address, 0) == fewest], rng)
