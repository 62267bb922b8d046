"""The page pool: which pages are free, and who holds the others.

A page is free exactly when nobody holds it. A holder is a hashable tuple: `("seq", rid)`, `("tree",)` or `("writer",
room)`, where a writer is a remote side that may still write into the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from diptych.errors import AuditError, OutOfPages

Holder = tuple[str | int, ...]


class PagePool:
    """Leases on `num_pages` pages of `page_size` tokens. All operations cost O(pages named), none looks at the others.

    Which pages `alloc` returns depends on the calls so far and nothing else, so a run can be replayed.
    Read-only for others (the audit looks at them): `generation`, `leases` (holder -> its pages), `refcounts` (holders a
    page), `free`.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs at least one page of one token, not {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.generation = [0] * num_pages  # +1 at each allocation: a write meant for an earlier owner is refused
        self.leases: dict[Holder, set[int]] = {}
        self.refcounts = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))  # a stack: the next page is the last item

    @property
    def num_free(self) -> int:
        return len(self.free)

    def alloc(self, n: int, holder: Holder) -> list[int]:
        """`n` free pages, now held by `holder` alone. Raises OutOfPages, and takes none, if there are fewer."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > len(self.free):
            raise OutOfPages(f"{n} pages wanted, {len(self.free)} of {self.num_pages} free")
        if n == 0:
            return []
        pages = self.free[: -n - 1 : -1]
        del self.free[-n:]
        for page in pages:
            self.refcounts[page] = 1
            self.generation[page] += 1
        self.leases.setdefault(holder, set()).update(pages)
        return pages

    def share(self, pages: Collection[int], holder: Holder) -> None:
        """One more holder of each page. Raises AuditError, and changes nothing, if one is free or is held already."""
        if not pages:
            return
        held = self.leases.get(holder, set())
        wanted = set(pages)
        if len(wanted) != len(pages) or not held.isdisjoint(wanted):
            raise AuditError(f"{holder} cannot hold a page twice: {sorted(_doubles(pages) | (held & wanted))[:8]}")
        for page in pages:
            if not (0 <= page < self.num_pages and self.refcounts[page]):
                raise AuditError(f"{holder} cannot share page {page}: nobody holds it")
        for page in pages:
            self.refcounts[page] += 1
        self.leases.setdefault(holder, set()).update(wanted)

    def release(self, pages: Sequence[int], holder: Holder) -> None:
        """End these leases; pages without holders are free. Raises AuditError, and changes nothing, if it lacks one."""
        if not pages:
            return
        held = self.leases.get(holder, set())
        leaving = set(pages)
        if len(leaving) != len(pages) or not leaving <= held:
            raise AuditError(
                f"{holder} cannot release pages it does not hold: {sorted(_doubles(pages) | (leaving - held))[:8]}"
            )
        held -= leaving
        if not held:
            del self.leases[holder]
        for page in reversed(pages):  # so that the first of them is the next to be handed out: runs stay contiguous
            self.refcounts[page] -= 1
            if not self.refcounts[page]:
                self.free.append(page)

    def holders(self, page: int) -> list[Holder]:
        """Everyone who holds `page`. Looks through all leases: for messages and tests."""
        return [holder for holder, pages in self.leases.items() if page in pages]


def _doubles(pages: Collection[int]) -> set[int]:
    return {page for page, count in Counter(pages).items() if count > 1}
