"""The whole ledger of pages, recomputed from scratch and compared with what pool and tree believe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from diptych.errors import AuditError
from diptych.kv.pool import Holder, PagePool
from diptych.kv.radix import TREE, Match, Node, RadixTree


def audit(
    pool: PagePool,
    tree: RadixTree,
    expected_holders: Mapping[Holder, Iterable[int]],
    matches: Iterable[Match] | None = None,
) -> None:
    """Raise AuditError if a page is lost, free while held, held by the wrong ones, or miscounted. Changes nothing.

    `expected_holders`: the pages of each holder but the tree, from whoever knows (the scheduler's sequences).
    `matches`, when given: all locked handles there are, so that lock counts are checked to the unit. Costs O(pages +
    tokens in the tree's keys).
    """
    _audit_tree(tree, matches)
    expected = {holder: set(pages) for holder, pages in expected_holders.items()}
    expected[TREE] = {page for node in tree.nodes() for page in node.pages}
    _audit_leases(pool, {holder: pages for holder, pages in expected.items() if pages})
    _audit_free(pool)
    for node in tree.nodes():
        shared = [page for page in node.pages if not node.locks and pool.refcounts[page] != 1]
        _check(not shared, f"evictable pages {shared[:8]} have holders besides the tree: {_who(pool, shared)}")


def _audit_leases(pool: PagePool, expected: dict[Holder, set[int]]) -> None:
    if pool.leases == expected:
        return
    for holder in sorted({*pool.leases, *expected}, key=str):
        has, should = pool.leases.get(holder, set()), expected.get(holder, set())
        _check(has <= should, f"{holder} holds pages {sorted(has - should)[:8]} that it should not")
        _check(should <= has, f"{holder} should hold pages {sorted(should - has)[:8]} and does not")


def _audit_free(pool: PagePool) -> None:
    """Free and held pages are disjoint and together are all; reference counts are numbers of holders."""
    free = set(pool.free)
    _check(len(free) == len(pool.free), "a page is twice on the free list")
    _check(free <= set(range(pool.num_pages)), "the free list names pages that do not exist")
    counts = Counter(page for pages in pool.leases.values() for page in pages)
    wrong = [page for page in range(pool.num_pages) if pool.refcounts[page] != counts[page]]
    _check(not wrong, f"pages {wrong[:8]} have a wrong reference count")
    both = [page for page in counts if page in free]
    _check(not both, f"pages {both[:8]} are free and held: {_who(pool, both)}")
    _check(len(free) + len(counts) == pool.num_pages, f"{pool.num_pages - len(free) - len(counts)} pages are lost")


def _audit_tree(tree: RadixTree, matches: Iterable[Match] | None) -> None:
    seen: set[int] = set()
    num_pages = evictable = 0
    for node in tree.nodes():
        fault = _fault(tree, node)
        _check(fault is None, f"the radix tree's node with pages {node.pages[:8]} {fault}")
        seen.update(node.pages)
        num_pages += len(node.pages)
        evictable += 0 if node.locks else len(node.pages)
    _check(len(seen) == num_pages, f"{num_pages - len(seen)} pages are twice in the tree")
    _check(
        evictable == tree.evictable_pages, f"{evictable} pages are evictable, the tree counts {tree.evictable_pages}"
    )
    if matches is not None:
        locks = Counter(node for match in matches for node in _path(match))
        wrong = [node.pages[:4] for node in tree.nodes() if node.locks != locks[node]]
        _check(not wrong, f"nodes with pages {wrong[:4]} are not locked as often as their users say")


def _fault(tree: RadixTree, node: Node) -> str | None:
    """What is wrong with a node by itself."""
    if not node.pages or len(node.keys) != len(node.pages):
        return f"has {len(node.keys)} keys, {len(node.pages)} pages"
    if any(len(key) != tree.page_size for key in node.keys):
        return "has a key that is not one page long"
    if not (node.children or node.locks or node.queued):
        return "is evictable but not queued for eviction"
    if node.locks < sum(child.locks for child in node.children.values()):
        return "is locked less often than its children"
    parent = node.parent
    if parent is None or parent.children.get(node.keys[0]) is not node:
        return "hangs on the wrong node or key"
    return None if parent.namespace == node.namespace else "is in two namespaces"


def _path(match: Match) -> Iterable[Node]:
    _check(match.locked, f"the match of pages {match.pages[:8]} should be locked")
    node = match.node
    while node.parent is not None:
        yield node
        node = node.parent


def _who(pool: PagePool, pages: list[int]) -> str:
    return "; ".join(f"{page}: {pool.holders(page)}" for page in pages[:4])


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AuditError(message)
