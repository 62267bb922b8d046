"""PagePool against a dictionary: page -> set of holders."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diptych.errors import AuditError, OutOfPages
from diptych.kv.audit import audit
from diptych.kv.pool import Holder, PagePool
from diptych.kv.radix import RadixTree

HOLDERS: list[Holder] = [("seq", "a"), ("seq", "b"), ("writer", 1), ("writer", 2)]


def test_a_fresh_pool_hands_out_pages_in_order_and_counts_generations() -> None:
    pool = PagePool(4, 16)
    assert pool.alloc(3, ("seq", "a")) == [0, 1, 2]
    assert (pool.num_free, pool.generation, pool.refcounts) == (1, [1, 1, 1, 0], [1, 1, 1, 0])


def test_released_pages_come_back_in_order_with_a_new_generation() -> None:
    pool = PagePool(4, 16)
    pages = pool.alloc(4, ("seq", "a"))
    pool.release(pages[1:3], ("seq", "a"))
    assert pool.alloc(2, ("seq", "b")) == [1, 2]
    assert pool.generation == [1, 2, 2, 1]


def test_alloc_takes_nothing_when_it_cannot_take_all() -> None:
    pool = PagePool(4, 16)
    pool.alloc(2, ("seq", "a"))
    with pytest.raises(OutOfPages, match="3 pages wanted, 2 of 4 free"):
        pool.alloc(3, ("seq", "b"))
    assert pool.num_free == 2
    assert pool.leases == {("seq", "a"): {0, 1}}
    assert pool.generation == [1, 1, 0, 0]


def test_alloc_of_nothing_and_of_less() -> None:
    pool = PagePool(4, 16)
    assert pool.alloc(0, ("seq", "a")) == []
    pool.share([], ("seq", "a"))
    pool.release([], ("seq", "a"))
    assert pool.leases == {}
    with pytest.raises(ValueError, match="-1"):
        pool.alloc(-1, ("seq", "a"))
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0, 16)
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(4, 0)
    assert PagePool(1, 1).alloc(1, ("seq", "a")) == [0]


def test_a_page_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = PagePool(2, 16)
    pages = pool.alloc(2, ("seq", "a"))
    pool.share(pages, ("writer", 7))
    pool.release(pages, ("seq", "a"))
    assert pool.num_free == 0
    assert pool.holders(0) == [("writer", 7)]
    pool.release([1], ("writer", 7))
    assert (pool.num_free, pool.free) == (1, [1])


@pytest.mark.parametrize(
    ("pages", "holder", "wrong"),
    [
        ([0], ("seq", "b"), [0]),  # somebody else's
        ([2], ("seq", "a"), [2]),  # free
        ([0, 0, 1], ("seq", "a"), [0]),  # twice at once
        ([0, 2], ("seq", "a"), [2]),  # one right, one wrong
        ([9], ("seq", "a"), [9]),  # no such page
    ],
)
def test_releasing_what_is_not_held_raises_and_changes_nothing(
    pages: list[int], holder: Holder, wrong: list[int]
) -> None:
    pool = PagePool(4, 16)
    pool.alloc(2, ("seq", "a"))
    with pytest.raises(AuditError, match="cannot release") as caught:
        pool.release(pages, holder)
    assert caught.value.message.endswith(f"{wrong}")
    assert pool.leases == {("seq", "a"): {0, 1}}
    assert pool.refcounts == [1, 1, 0, 0]
    assert pool.free == [3, 2]


@pytest.mark.parametrize("pages", [[0], [1, 1], [2], [-1], [4], [1, 2]])
def test_sharing_what_is_free_or_held_already_raises_and_changes_nothing(pages: list[int]) -> None:
    pool = PagePool(4, 16)
    pool.alloc(2, ("seq", "a"))
    pool.share([0], ("seq", "b"))
    with pytest.raises(AuditError, match="cannot"):
        pool.share(pages, ("seq", "b"))
    assert pool.leases == {("seq", "a"): {0, 1}, ("seq", "b"): {0}}
    assert pool.refcounts == [2, 1, 0, 0]


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of calls: the pool and a dictionary agree on who holds what, and on which calls are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 4)
        self.tree = RadixTree(self.pool)
        self.holders: dict[int, set[Holder]] = {page: set() for page in range(12)}
        self.generation = [0] * 12

    @rule(n=st.integers(0, 8), holder=st.sampled_from(HOLDERS))
    def alloc(self, n: int, holder: Holder) -> None:
        free = [page for page, holders in self.holders.items() if not holders]
        if n > len(free):
            with pytest.raises(OutOfPages):
                self.pool.alloc(n, holder)
            return
        pages = self.pool.alloc(n, holder)
        assert len(set(pages)) == n
        assert set(pages) <= set(free)
        for page in pages:
            self.holders[page].add(holder)
            self.generation[page] += 1

    @rule(pages=st.lists(st.integers(0, 11), max_size=6), holder=st.sampled_from(HOLDERS))
    def share(self, pages: list[int], holder: Holder) -> None:
        twice = len(set(pages)) != len(pages)
        if twice or any(holder in self.holders[page] or not self.holders[page] for page in pages):
            with pytest.raises(AuditError):
                self.pool.share(pages, holder)
            return
        self.pool.share(pages, holder)
        for page in pages:
            self.holders[page].add(holder)

    @rule(pages=st.lists(st.integers(0, 11), max_size=4), holder=st.sampled_from(HOLDERS))
    def release_any(self, pages: list[int], holder: Holder) -> None:
        if len(set(pages)) != len(pages) or any(holder not in self.holders[page] for page in pages):
            with pytest.raises(AuditError):
                self.pool.release(pages, holder)
            return
        self._release(pages, holder)

    @precondition(lambda self: any(self.holders.values()))
    @rule(data=st.data())
    def release_held(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted({h for hs in self.holders.values() for h in hs}, key=str)))
        held = [page for page, holders in self.holders.items() if holder in holders]
        self._release(data.draw(st.lists(st.sampled_from(held), unique=True)), holder)

    def _release(self, pages: list[int], holder: Holder) -> None:
        self.pool.release(pages, holder)
        for page in pages:
            self.holders[page].remove(holder)

    @invariant()
    def agree(self) -> None:
        assert self.pool.refcounts == [len(holders) for holders in self.holders.values()]
        assert set(self.pool.free) == {page for page, holders in self.holders.items() if not holders}
        assert self.pool.generation == self.generation
        assert all(set(self.pool.holders(page)) == holders for page, holders in self.holders.items())
        expected: dict[Holder, set[int]] = {}
        for page, holders in self.holders.items():
            for holder in holders:
                expected.setdefault(holder, set()).add(page)
        audit(self.pool, self.tree, expected, [])


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
TestPoolMachine = PoolMachine.TestCase
