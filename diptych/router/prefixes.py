"""Which prompts have gone to which server: an approximate picture of the servers' prefix caches.

A radix tree over the prompts as sent. Each node knows the servers that have seen the text up to its end, and when they
last did. Memory is bounded: the least recently used ends are forgotten first.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

NODE_BYTES = 400  # what a node costs besides its text, about
KEEP = 0.75  # of the limit, after evicting


class _Node:
    __slots__ = ("children", "parent", "seen", "text")

    def __init__(self, text: bytes, parent: _Node | None) -> None:
        self.text = text
        self.parent = parent
        self.children: dict[int, _Node] = {}  # by the first byte of their text
        self.seen: dict[Hashable, int] = {}  # server -> when, in ticks


class PrefixTree:
    """`limit_bytes` bounds texts and nodes together. Not shared between threads."""

    def __init__(self, limit_bytes: int) -> None:
        self.size_bytes = 0
        self.sizes: dict[Hashable, int] = {}  # server -> bytes of text it has seen
        self._limit_bytes = limit_bytes
        self._root = _Node(b"", None)
        self._tick = 0

    def match(self, text: bytes) -> dict[Hashable, int]:
        """server -> length of the longest beginning of `text` it has seen, for those that have seen some."""
        found: dict[Hashable, int] = {}
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                break
            common = common_prefix(child.text, text, at)
            for server in child.seen:
                found[server] = at + common
            at += common
            if common < len(child.text):
                break
            node = child
        return found

    def insert(self, text: bytes, server: Hashable) -> None:
        """`server` is about to see `text`."""
        self._tick += 1
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                child = self._add(node, text[at:])
                common = len(child.text)
            else:
                common = common_prefix(child.text, text, at)
                if common < len(child.text):
                    child = self._split(child, common)
            if server not in child.seen:
                self.sizes[server] = self.sizes.get(server, 0) + len(child.text)
            child.seen[server] = self._tick
            at += common
            node = child
        if self.size_bytes > self._limit_bytes:
            self._evict(round(self._limit_bytes * KEEP))

    def remove(self, server: Hashable) -> None:
        """`server` has lost its cache."""
        if self.sizes.pop(server, None) is None:
            return
        for node in self._nodes():
            node.seen.pop(server, None)
        for node in reversed(self._nodes()):
            if not node.seen:
                self._drop(node)

    def _add(self, parent: _Node, text: bytes) -> _Node:
        node = parent.children[text[0]] = _Node(text, parent)
        self.size_bytes += len(text) + NODE_BYTES
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a node in two; returns the upper half, which `node` now hangs from."""
        parent = node.parent
        assert parent is not None
        upper = parent.children[node.text[0]] = _Node(node.text[:at], parent)
        upper.seen = dict(node.seen)
        node.text, node.parent = node.text[at:], upper
        upper.children[node.text[0]] = node
        self.size_bytes += NODE_BYTES
        return upper

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.text[0]]
        self.size_bytes -= len(node.text) + NODE_BYTES
        for server in node.seen:
            self.sizes[server] -= len(node.text)

    def _nodes(self) -> list[_Node]:
        """All nodes but the root, parents before children."""
        found = list(self._root.children.values())
        for node in found:
            found.extend(node.children.values())
        return found

    def _evict(self, target_bytes: int) -> None:
        """Forget leaves, the least recently used first, until the tree has at most `target_bytes`."""
        leaves = [(max(node.seen.values()), id(node), node) for node in self._nodes() if not node.children]
        heapq.heapify(leaves)
        while leaves and self.size_bytes > target_bytes:
            _, _, node = heapq.heappop(leaves)
            self._drop(node)
            parent = node.parent
            if parent is not None and parent is not self._root and not parent.children:
                heapq.heappush(leaves, (max(parent.seen.values()), id(parent), parent))


def common_prefix(edge: bytes, text: bytes, at: int) -> int:
    """How many bytes of `edge` agree with `text` from position `at` on. Halves the range: memcmp does the work."""
    high = min(len(edge), len(text) - at)
    if edge[:high] == text[at : at + high]:
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if edge[low:middle] == text[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low
