"""The prefix cache: a radix tree whose edges are runs of whole pages, one tree for each namespace.

A node stands for the tokens from the root to its end. Children of a node differ in their first page, which is their
key. The tree holds a lease of its own on each of its pages. Sequences lock the nodes whose pages they use; what is not
locked can be evicted, leaves first, the least recently used first, page by page from a leaf's end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from diptych.errors import AuditError
from diptych.kv.pool import Holder, PagePool

TREE: Holder = ("tree",)
PageKey = tuple[int, ...]  # the tokens of one page


@dataclass(slots=True, eq=False)
class Node:
    """`keys[i]` are the tokens whose KV page `pages[i]` holds. A root has neither, and no parent."""

    namespace: str
    parent: Node | None
    keys: list[PageKey]
    pages: list[int]
    last_used: int
    serial: int
    locks: int = 0  # locked matches that end here or below
    queued: bool = False  # has an entry in the eviction heap
    children: dict[PageKey, Node] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Match:
    """The longest cached prefix: its pages in order, and the node at its end. A handle for lock and unlock.

    Good until the next eviction, unless locked; then until unlocked.
    """

    node: Node
    pages: list[int]
    num_tokens: int
    locked: bool = False


class RadixTree:
    """Prefix cache over `pool`. `version` changes whenever a `peek` may answer differently.

    The order of eviction is a logical counter's, one tick for each match or insert: no clock.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.page_size = pool.page_size
        self.evictable_pages = 0  # pages of unlocked nodes
        self.num_evicted = 0  # pages evicted so far, for metrics
        self.version = 0
        self._roots: dict[str, Node] = {}
        self._ticks = 0
        self._serials = 0
        # (last_used, serial, node) of each evictable leaf. Touching a node leaves its entry as it is; an entry that
        # turns out to be too old when it reaches the top is pushed again, so that a match costs nothing here.
        self._heap: list[tuple[int, int, Node]] = []

    # ---- finding ----

    def match(self, namespace: str, tokens: Sequence[int], limit: int) -> Match:
        """The longest cached prefix of `tokens`: whole pages, at most `limit` tokens. Marks it as just used.

        Splits the node in which the match ends, so that a lock covers what was matched and no more.
        """
        node = self._roots.get(namespace) or self._new_node(namespace, None, [], [])
        self._ticks += 1
        most = max(0, min(len(tokens), limit)) // self.page_size
        pages: list[int] = []
        while len(pages) < most:
            child = node.children.get(self._key(tokens, len(pages)))
            if child is None:
                break
            same = self._common(child, tokens, len(pages), most)
            if same < len(child.keys):
                child = self._split(child, same)
            node = child
            node.last_used = self._ticks
            pages += node.pages
        return Match(node, pages, len(pages) * self.page_size)

    def peek(self, namespace: str, tokens: Sequence[int], limit: int) -> tuple[int, int]:
        """How many pages `match` would return, and how many of them are evictable now. Changes nothing."""
        node = self._roots.get(namespace)
        if node is None:
            return 0, 0
        most = max(0, min(len(tokens), limit)) // self.page_size
        matched = unlocked = 0
        while matched < most:
            child = node.children.get(self._key(tokens, matched))
            if child is None:
                break
            same = self._common(child, tokens, matched, most)
            matched += same
            unlocked += 0 if child.locks else same
            if same < len(child.keys):
                break
            node = child
        return matched, unlocked

    # ---- locking ----

    def lock(self, match: Match) -> None:
        """Keep the match's pages from eviction. Call it before anything evicts. Raises AuditError if already locked."""
        if match.locked:
            raise AuditError("a match of the radix tree was locked twice")
        match.locked = True
        self.version += 1
        node = match.node
        while node.parent is not None:
            if not node.locks:
                self.evictable_pages -= len(node.pages)
            node.locks += 1
            node = node.parent

    def unlock(self, match: Match) -> None:
        """Undo lock. Raises AuditError if not locked."""
        if not match.locked:
            raise AuditError("a match of the radix tree was unlocked without being locked")
        match.locked = False
        self.version += 1
        node = match.node
        while node.parent is not None:
            node.locks -= 1
            if not node.locks:
                self.evictable_pages += len(node.pages)
                self._enqueue(node)
            node = node.parent

    # ---- growing and shrinking ----

    def insert(self, namespace: str, tokens: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Remember that `pages` hold the KV of `tokens` (whole pages: len(tokens) == len(pages) * page_size).

        The tree takes a lease on the pages it lacks; the caller keeps its own leases. Returns the pages that the tree
        did not take because it has others with the same contents.
        """
        if len(tokens) != len(pages) * self.page_size:
            raise ValueError(f"{len(tokens)} tokens do not fill {len(pages)} pages of {self.page_size}")
        if not pages:
            return []
        match = self.match(namespace, tokens, len(tokens))
        known = len(match.pages)
        fresh = list(pages[known:])
        if fresh:
            self.pool.share(fresh, TREE)
            if match.node.parent is None:
                self._roots[namespace] = match.node
            keys = self._keys(tokens, known, len(pages))
            leaf = self._new_node(namespace, match.node, keys, fresh)
            match.node.children[keys[0]] = leaf
            self.evictable_pages += len(fresh)
            self.version += 1
            self._enqueue(leaf)
        return [mine for mine, ours in zip(pages, match.pages, strict=False) if mine != ours]

    def evict(self, num_pages: int) -> int:
        """Give up to `num_pages` unlocked pages back to the pool, least recently used first. Returns how many."""
        evicted = self._evict(num_pages)
        self.num_evicted += evicted
        return evicted

    def flush(self) -> int:
        """Forget everything that is not locked. Returns the number of pages given back."""
        return self._evict(self.evictable_pages)

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before their children."""
        for root in self._roots.values():
            stack = list(root.children.values())
            while stack:
                node = stack.pop()
                yield node
                stack.extend(node.children.values())

    # ---- inside ----

    def _key(self, tokens: Sequence[int], page: int) -> PageKey:
        return tuple(tokens[page * self.page_size : (page + 1) * self.page_size])

    def _keys(self, tokens: Sequence[int], start: int, stop: int) -> list[PageKey]:
        """The keys of pages `start` to `stop`, all of them whole."""
        part = tokens[start * self.page_size : stop * self.page_size]
        return list(zip(*[iter(part)] * self.page_size, strict=True))

    def _common(self, node: Node, tokens: Sequence[int], start: int, stop: int) -> int:
        """How many of the node's keys equal those of pages `start` to `stop` of `tokens`; the first is known to."""
        if len(node.keys) == 1:
            return 1
        query = self._keys(tokens, start, min(stop, start + len(node.keys)))
        if query == node.keys:
            return len(query)
        pairs = zip(query, node.keys, strict=False)
        return next((same for same, (mine, theirs) in enumerate(pairs) if mine != theirs), len(query))

    def _new_node(self, namespace: str, parent: Node | None, keys: list[PageKey], pages: list[int]) -> Node:
        self._serials += 1
        return Node(namespace, parent, keys, pages, self._ticks, self._serials)

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node in front of `node` that takes its first `at` pages. Handles still point at the end, `node`."""
        assert node.parent is not None
        upper = self._new_node(node.namespace, node.parent, node.keys[:at], node.pages[:at])
        upper.locks = node.locks
        node.parent.children[upper.keys[0]] = upper
        del node.keys[:at], node.pages[:at]
        node.parent = upper
        upper.children[node.keys[0]] = node
        return upper

    def _enqueue(self, node: Node) -> None:
        if not (node.queued or node.locks or node.children or node.parent is None):
            node.queued = True
            heapq.heappush(self._heap, (node.last_used, node.serial, node))

    def _evict(self, num_pages: int) -> int:
        evicted = 0
        while evicted < num_pages and self._heap:
            used, _, node = self._heap[0]
            if node.locks or node.children or node.last_used != used:
                heapq.heappop(self._heap)
                node.queued = False
                self._enqueue(node)
                continue
            count = min(num_pages - evicted, len(node.pages))
            self._drop_tail(node, count)
            evicted += count
        return evicted

    def _drop_tail(self, leaf: Node, count: int) -> None:
        """Give back the last `count` pages of the leaf on top of the heap; without pages left it leaves the tree."""
        self.pool.release(leaf.pages[-count:], TREE)
        self.evictable_pages -= count
        self.version += 1
        parent, key = leaf.parent, leaf.keys[0]
        assert parent is not None
        del leaf.keys[-count:], leaf.pages[-count:]
        if leaf.pages:
            return
        heapq.heappop(self._heap)
        leaf.parent = None
        del parent.children[key]
        self._enqueue(parent)
        if parent.parent is None and not parent.children:
            del self._roots[parent.namespace]
