"""The audit finds every kind of corruption, and says which pages and holders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from diptych.errors import AuditError
from diptych.kv.audit import audit
from diptych.kv.pool import Holder, PagePool
from diptych.kv.radix import TREE, Match, Node, RadixTree

SEQ, WRITER = ("seq", "a"), ("writer", 3)


@dataclass
class Ledger:
    """12 pages: a tree of three nodes (0-3), the first locked and shared by SEQ, which holds 4-5, and WRITER on 5."""

    pool: PagePool
    tree: RadixTree
    expected: dict[Holder, list[int]]
    matches: list[Match]

    def audit(self) -> None:
        audit(self.pool, self.tree, self.expected, self.matches)

    def node(self, *pages: int) -> Node:
        return next(node for node in self.tree.nodes() if node.pages == list(pages))


@pytest.fixture
def ledger() -> Ledger:
    pool = PagePool(12, 2)
    tree = RadixTree(pool)
    first = pool.alloc(3, SEQ)
    tree.insert("", [1, 2, 3, 4, 5, 6], first)
    last = pool.alloc(1, SEQ)
    tree.insert("", [1, 2, 9, 9], [first[0], *last])
    pool.release([*first, *last], SEQ)
    match = tree.match("", [1, 2], 2)
    tree.lock(match)
    pool.share(match.pages, SEQ)
    own = pool.alloc(2, SEQ)
    pool.share(own[1:], WRITER)
    return Ledger(pool, tree, {SEQ: [0, *own], WRITER: own[1:]}, [match])


def test_a_sound_ledger_passes(ledger: Ledger) -> None:
    ledger.audit()
    audit(ledger.pool, ledger.tree, ledger.expected)  # without handles


def leak(ledger: Ledger) -> None:
    ledger.pool.free.pop()


def free_twice(ledger: Ledger) -> None:
    ledger.pool.free.append(ledger.pool.free[0])


def free_while_held(ledger: Ledger) -> None:
    ledger.pool.free.append(4)


def free_unknown(ledger: Ledger) -> None:
    ledger.pool.free[0] = 12


def miscount(ledger: Ledger) -> None:
    ledger.pool.refcounts[5] -= 1


def count_a_free_page(ledger: Ledger) -> None:
    ledger.pool.refcounts[11] += 1


def unexpected_lease(ledger: Ledger) -> None:
    ledger.pool.share([4], ("seq", "ghost"))


def missing_lease(ledger: Ledger) -> None:
    ledger.pool.release([5], WRITER)


def writer_only(ledger: Ledger) -> None:
    ledger.pool.release([4], SEQ)


def tree_lost_its_lease(ledger: Ledger) -> None:
    ledger.pool.release([2], TREE)


def evictable_but_shared(ledger: Ledger) -> None:
    ledger.pool.share([3], SEQ)
    ledger.expected[SEQ] = [*ledger.expected[SEQ], 3]


def evictable_count(ledger: Ledger) -> None:
    ledger.tree.evictable_pages += 1


def lock_lost(ledger: Ledger) -> None:
    node = ledger.node(0)
    node.locks = 0
    ledger.tree.evictable_pages += 1


def lock_too_many(ledger: Ledger) -> None:
    ledger.node(0).locks += 1


def child_locked_more_than_its_parent(ledger: Ledger) -> None:
    ledger.node(1, 2).locks = 2
    ledger.tree.evictable_pages -= 2


def match_not_locked(ledger: Ledger) -> None:
    ledger.matches[0].locked = False


def wrong_child_key(ledger: Ledger) -> None:
    node = ledger.node(0)
    node.children[(7, 7)] = node.children.pop((9, 9))


def wrong_parent(ledger: Ledger) -> None:
    ledger.node(3).parent = ledger.node(1, 2)


def wrong_namespace(ledger: Ledger) -> None:
    ledger.node(3).namespace = "other"


def page_twice_in_the_tree(ledger: Ledger) -> None:
    ledger.node(3).pages[0] = 2


def page_twice_in_a_node(ledger: Ledger) -> None:
    ledger.node(1, 2).pages[0] = 2


def keys_and_pages_differ(ledger: Ledger) -> None:
    ledger.node(1, 2).keys.pop()


def short_key(ledger: Ledger) -> None:
    ledger.node(1, 2).keys[1] = (5,)


def not_queued(ledger: Ledger) -> None:
    ledger.node(3).queued = False


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (leak, "1 pages are lost"),
        (free_twice, "twice on the free list"),
        (free_while_held, r"pages \[4\] are free and held: 4: \[\('seq', 'a'\)\]"),
        (free_unknown, "do not exist"),
        (miscount, r"pages \[5\] have a wrong reference count"),
        (count_a_free_page, r"pages \[11\] have a wrong reference count"),
        (unexpected_lease, r"\('seq', 'ghost'\) holds pages \[4\] that it should not"),
        (missing_lease, r"\('writer', 3\) should hold pages \[5\] and does not"),
        (writer_only, r"\('seq', 'a'\) should hold pages \[4\]"),
        (tree_lost_its_lease, r"\('tree',\) should hold pages \[2\]"),
        (evictable_but_shared, r"evictable pages \[3\] have holders besides the tree"),
        (evictable_count, "3 pages are evictable, the tree counts 4"),
        (lock_lost, "not locked as often|should be locked|less often"),
        (lock_too_many, r"nodes with pages \[\[0\]\] are not locked as often"),
        (child_locked_more_than_its_parent, "locked less often than its children"),
        (match_not_locked, r"the match of pages \[0\] should be locked"),
        (wrong_child_key, "wrong node or key"),
        (wrong_parent, "wrong node or key"),
        (wrong_namespace, "two namespaces"),
        (page_twice_in_the_tree, "twice in the tree"),
        (page_twice_in_a_node, "twice in the tree"),
        (keys_and_pages_differ, "1 keys, 2 pages"),
        (short_key, "not one page long"),
        (not_queued, "not queued"),
    ],
)
def test_corruption_is_found(ledger: Ledger, corrupt: Callable[[Ledger], None], message: str) -> None:
    corrupt(ledger)
    with pytest.raises(AuditError, match=message):
        ledger.audit()
