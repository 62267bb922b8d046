"""RadixTree against a dictionary: (namespace, tokens of the first k pages) -> page, last use, locks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from diptych.errors import AuditError
from diptych.kv.audit import audit
from diptych.kv.pool import PagePool
from diptych.kv.radix import TREE, Match, RadixTree

ME = ("seq", "me")


def tree_of(num_pages: int = 32, page_size: int = 2) -> RadixTree:
    return RadixTree(PagePool(num_pages, page_size))


def keep(tree: RadixTree, tokens: list[int], namespace: str = "") -> list[int]:
    """Insert `tokens` in pages of their own and let go of them. Returns the pages."""
    pages = tree.pool.alloc(len(tokens) // tree.page_size, ME)
    tree.insert(namespace, tokens, pages)
    tree.pool.release(pages, ME)
    audit(tree.pool, tree, {})
    return pages


def test_match_finds_the_longest_prefix_in_whole_pages() -> None:
    tree = tree_of()
    pages = keep(tree, [1, 2, 3, 4, 5, 6])
    for tokens, limit, expected in [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, pages),
        ([1, 2, 3, 4, 5, 6], 6, pages),
        ([1, 2, 3, 4, 5, 6], 5, pages[:2]),  # the limit cuts a page
        ([1, 2, 3, 4, 5, 9], 6, pages[:2]),  # the last page differs
        ([1, 2, 3], 3, pages[:1]),
        ([1], 1, []),
        ([2, 1], 2, []),
        ([], 0, []),
        ([1, 2], -1, []),
    ]:
        peeked = tree.peek("", tokens, limit)
        match = tree.match("", tokens, limit)
        assert (match.pages, match.num_tokens) == (expected, 2 * len(expected))
        assert peeked == (len(expected), len(expected))
        audit(tree.pool, tree, {}, [])


def test_a_limit_of_nothing_finds_nothing_even_with_pages_of_one_token() -> None:
    tree = tree_of(page_size=1)
    keep(tree, [1, 2])
    for limit in (-1, 0):
        assert tree.peek("", [1, 2], limit) == (0, 0)
        assert tree.match("", [1, 2], limit).pages == []
    assert tree.peek("", [1, 2], 1) == (1, 1)


def test_an_empty_namespace_costs_nothing() -> None:
    tree = tree_of()
    for tenant in range(100):
        keep(tree, [1, 2, 3, 4], f"tenant {tenant}")
        tree.match(f"stranger {tenant}", [1, 2], 2)
        tree.flush()
    assert tree._roots == {}
    assert tree._heap == []


def test_namespaces_never_meet() -> None:
    tree = tree_of()
    ours, theirs = keep(tree, [1, 2, 3, 4], "a"), keep(tree, [1, 2, 3, 4], "b")
    assert set(ours).isdisjoint(theirs)
    assert tree.match("a", [1, 2, 3, 4], 4).pages == ours
    assert tree.match("b", [1, 2, 3, 4], 4).pages == theirs
    assert tree.match("c", [1, 2, 3, 4], 4).pages == []


def test_insert_keeps_what_it_lacks_and_names_the_rest() -> None:
    tree = tree_of()
    first = keep(tree, [1, 2, 3, 4])
    mine = tree.pool.alloc(3, ME)
    assert tree.insert("", [1, 2, 3, 4, 5, 6], mine) == mine[:2]
    assert tree.match("", [1, 2, 3, 4, 5, 6], 6).pages == [*first, mine[2]]
    tree.pool.release(mine, ME)
    assert tree.pool.leases == {TREE: {*first, mine[2]}}


def test_inserting_the_trees_own_pages_again_returns_nothing() -> None:
    tree = tree_of()
    pages = keep(tree, [1, 2, 3, 4])
    assert tree.insert("", [1, 2], pages[:1]) == []
    assert tree.insert("", [], []) == []
    with pytest.raises(ValueError, match="3 tokens do not fill 1 pages of 2"):
        tree.insert("", [1, 2, 3], pages[:1])


def test_divergence_splits_a_node_and_both_sides_survive() -> None:
    tree = tree_of()
    left = keep(tree, [1, 2, 3, 4, 5, 6])
    right = keep(tree, [1, 2, 3, 4, 7, 8, 9, 9])
    assert tree.match("", [1, 2, 3, 4, 5, 6], 6).pages == left
    assert tree.match("", [1, 2, 3, 4, 7, 8, 9, 9], 8).pages == [*left[:2], *right[2:]]
    assert sorted(len(node.pages) for node in tree.nodes()) == [1, 2, 2]


def test_eviction_takes_the_least_recently_used_leaf_from_its_end() -> None:
    tree = tree_of()
    old, new = keep(tree, [1, 2, 3, 4, 5, 6]), keep(tree, [7, 8, 9, 10])
    assert tree.evict(2) == 2
    assert tree.match("", [1, 2, 3, 4, 5, 6], 6).pages == old[:1]  # now the most recent
    assert tree.evict(1) == 1
    assert tree.match("", [7, 8, 9, 10], 4).pages == new[:1]
    assert tree.evict(9) == 2
    assert (tree.evict(1), tree.evictable_pages, tree.num_evicted) == (0, 0, 5)
    assert tree.pool.num_free == tree.pool.num_pages
    audit(tree.pool, tree, {}, [])


def test_a_lock_protects_the_matched_prefix_and_no_more() -> None:
    tree = tree_of()
    pages = keep(tree, [1, 2, 3, 4, 5, 6])
    match = tree.match("", [1, 2, 3, 4], 4)
    tree.lock(match)
    assert tree.evictable_pages == 1
    assert tree.evict(9) == 1
    assert tree.match("", [1, 2, 3, 4, 5, 6], 6).pages == pages[:2]
    tree.unlock(match)
    assert tree.evict(9) == 2


def test_a_lock_survives_splits_and_counts_users() -> None:
    tree = tree_of()
    pages = keep(tree, [1, 2, 3, 4, 5, 6])
    whole, part = tree.match("", [1, 2, 3, 4, 5, 6], 6), tree.match("", [1, 2], 2)
    tree.lock(whole)
    tree.lock(part)
    keep(tree, [1, 2, 3, 4, 9, 9])
    audit(tree.pool, tree, {}, [whole, part])
    assert tree.evict(9) == 1
    tree.unlock(whole)
    assert tree.evict(9) == 2
    assert tree.match("", [1, 2, 3, 4], 4).pages == pages[:1]
    tree.unlock(part)
    audit(tree.pool, tree, {}, [])


def test_locks_are_taken_and_given_back_once() -> None:
    tree = tree_of()
    keep(tree, [1, 2])
    match = tree.match("", [1, 2], 2)
    with pytest.raises(AuditError, match="without being locked"):
        tree.unlock(match)
    tree.lock(match)
    with pytest.raises(AuditError, match="twice"):
        tree.lock(match)


def test_an_empty_match_locks_nothing() -> None:
    tree = tree_of()
    match = tree.match("nobody", [1, 2], 2)
    tree.lock(match)
    keep(tree, [1, 2], "nobody")
    assert tree.evictable_pages == 1
    tree.unlock(match)
    assert tree.flush() == 1


def test_flush_forgets_all_that_is_not_locked_and_is_not_counted_as_eviction() -> None:
    tree = tree_of()
    keep(tree, [1, 2, 3, 4], "a")
    keep(tree, [1, 2, 3, 4], "b")
    match = tree.match("a", [1, 2], 2)
    tree.lock(match)
    assert (tree.flush(), tree.num_evicted) == (3, 0)
    assert [node.pages for node in tree.nodes()] == [match.pages]
    tree.unlock(match)
    assert tree.flush() == 1
    assert list(tree.nodes()) == []


def test_the_version_changes_whenever_peek_may_answer_differently() -> None:
    tree = tree_of()
    versions = [tree.version]
    keep(tree, [1, 2, 3, 4])
    versions.append(tree.version)
    match = tree.match("", [1, 2], 2)
    tree.lock(match)
    versions.append(tree.version)
    tree.unlock(match)
    versions.append(tree.version)
    tree.evict(1)
    versions.append(tree.version)
    assert len(set(versions)) == len(versions)
    tree.match("", [1, 2], 2)
    tree.peek("", [1, 2], 2)
    assert tree.version == versions[-1]


PAGE = 2
Prefix = tuple[str, tuple[int, ...]]
tokens_of = st.lists(st.integers(0, 1), max_size=6).map(lambda bits: [token for bit in bits for token in (bit, 7)])


class RadixMachine(RuleBasedStateMachine):
    """Any sequence of calls: the tree and a dictionary of prefixes agree on matches, locks and each page evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(24, PAGE)
        self.tree = RadixTree(self.pool)
        self.page: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.matches: list[tuple[Match, list[Prefix]]] = []
        self.ticks = 0

    def prefixes(self, namespace: str, tokens: list[int], limit: int) -> list[Prefix]:
        """The cached prefixes of `tokens`, shortest first."""
        found: list[Prefix] = []
        for stop in range(PAGE, min(len(tokens), limit) + 1, PAGE):
            if (namespace, tuple(tokens[:stop])) not in self.page:
                break
            found.append((namespace, tuple(tokens[:stop])))
        return found

    def touch(self, found: list[Prefix]) -> None:
        self.ticks += 1
        self.used.update(dict.fromkeys(found, self.ticks))

    def locked(self) -> set[Prefix]:
        return {prefix for _, held in self.matches for prefix in held}

    @rule(namespace=st.sampled_from("ab"), tokens=tokens_of, limit=st.integers(0, 13))
    def match(self, namespace: str, tokens: list[int], limit: int) -> None:
        found = self.prefixes(namespace, tokens, limit)
        unlocked = [prefix for prefix in found if prefix not in self.locked()]
        assert self.tree.peek(namespace, tokens, limit) == (len(found), len(unlocked))
        match = self.tree.match(namespace, tokens, limit)
        assert match.pages == [self.page[prefix] for prefix in found]
        assert match.num_tokens == PAGE * len(found)
        self.touch(found)

    @rule(namespace=st.sampled_from("ab"), tokens=tokens_of)
    def lock(self, namespace: str, tokens: list[int]) -> None:
        found = self.prefixes(namespace, tokens, len(tokens))
        match = self.tree.match(namespace, tokens, len(tokens))
        self.touch(found)
        self.tree.lock(match)
        self.pool.share(match.pages, ("seq", str(id(match))))
        self.matches.append((match, found))

    @precondition(lambda self: self.matches)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        match, _ = self.matches.pop(data.draw(st.integers(0, len(self.matches) - 1)))
        self.tree.unlock(match)
        self.pool.release(match.pages, ("seq", str(id(match))))

    @rule(namespace=st.sampled_from("ab"), tokens=tokens_of)
    def insert(self, namespace: str, tokens: list[int]) -> None:
        num_pages = len(tokens) // PAGE
        if num_pages > self.pool.num_free:
            return
        pages = self.pool.alloc(num_pages, ME)
        found = self.prefixes(namespace, tokens, len(tokens))
        assert self.tree.insert(namespace, tokens, pages) == pages[: len(found)]
        if pages:
            every = [(namespace, tuple(tokens[: PAGE * count])) for count in range(1, num_pages + 1)]
            for prefix, page in zip(every, pages, strict=True):
                self.page.setdefault(prefix, page)
            self.touch(every)
        self.pool.release(pages, ME)

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        assert self.tree.evict(count) == sum(self.evict_one() for _ in range(count))

    def evict_one(self) -> bool:
        parents = {(namespace, tokens[:-PAGE]) for namespace, tokens in self.page}
        leaves = [prefix for prefix in self.page if prefix not in parents and prefix not in self.locked()]
        if not leaves:
            return False
        oldest = min(leaves, key=lambda prefix: self.used[prefix])
        del self.page[oldest], self.used[oldest]
        return True

    @rule()
    def flush(self) -> None:
        kept = self.locked()
        assert self.tree.flush() == len(self.page) - len(kept)
        self.page = {prefix: page for prefix, page in self.page.items() if prefix in kept}

    @invariant()
    def agree(self) -> None:
        assert self.pool.leases.get(TREE, set()) == set(self.page.values())
        assert self.tree.evictable_pages == len(self.page) - len(self.locked())
        holders = {("seq", str(id(match))): match.pages for match, _ in self.matches}
        audit(self.pool, self.tree, holders, [match for match, _ in self.matches])


RadixMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
TestRadixMachine = RadixMachine.TestCase
