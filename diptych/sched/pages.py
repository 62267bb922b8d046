"""A sequence's pages: taking them, growing, offering them to the tree, giving them back."""

from __future__ import annotations

from diptych.sched.state import SchedState, Seq


def pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def future_pages(state: SchedState, seq: Seq) -> int:
    """Pages that `seq`, not admitted yet, wants after its first ones: for `reserved_decode_tokens`, or to its end."""
    page_size = state.config.page_size
    length = min(seq.max_tokens - 1, len(seq.tokens) + state.config.reserved_decode_tokens)
    return max(0, pages_for(length, page_size) - pages_for(len(seq.tokens), page_size))


def headroom(state: SchedState) -> int:
    """Pages to keep free for all sequences that run or will run without asking again, each as in `future_pages`.

    A running sequence whose next token has no page yet counts that page too. Written out, because it is asked for at
    each admission and looks at every sequence.
    """
    page_size = state.config.page_size
    reserved = state.config.reserved_decode_tokens
    total = 0
    for group in (state.running, state.transferring):
        for seq in group:
            length = len(seq.tokens) + seq.num_pending + reserved
            if length >= seq.max_tokens:
                length = seq.max_tokens - 1
            missing = -(-length // page_size) - len(seq.pages)
            if missing > 0:
                total += missing
    return total


def fits(state: SchedState, seq: Seq, reserve: int) -> bool:
    """Can `seq` have pages for all its tokens now, with `reserve` pages left over?

    Unless it would be alone, `future_pages` of its own must be left too. Exact: if it answers yes, `take` succeeds. The
    tree is asked again only when it has changed.
    """
    matched, unlocked = peek(state, seq)
    needed = pages_for(len(seq.tokens), state.config.page_size) - matched
    if state.running or state.transferring:
        needed += reserve + future_pages(state, seq)
    # the matched pages that are evictable now will not be once they are ours
    return needed <= state.pool.num_free + state.tree.evictable_pages - unlocked


def peek(state: SchedState, seq: Seq) -> tuple[int, int]:
    """Pages of `seq` that the tree has, and how many of those are evictable."""
    if not state.config.radix:
        return 0, 0
    if seq.peeked[0] != state.tree.version:
        found = state.tree.peek(seq.namespace, seq.tokens, seq.match_limit)
        seq.peeked = (state.tree.version, *found)
    return seq.peeked[1:]


def take(state: SchedState, seq: Seq) -> list[int]:
    """Give `seq` pages for all its tokens: what the tree has, locked and shared, then new ones, which are returned.

    Evicts. Raises OutOfPages if `fits` has not been asked.
    """
    if state.config.radix:
        seq.match = state.tree.match(seq.namespace, seq.tokens, seq.match_limit)
        state.tree.lock(seq.match)
        state.pool.share(seq.match.pages, seq.holder)
        add_pages(state, seq, seq.match.pages)
        seq.prefix_tokens = seq.match.num_tokens
    seq.num_computed = seq.num_planned = seq.prefix_tokens
    needed = pages_for(len(seq.tokens), state.config.page_size) - len(seq.pages)
    make_room(state, needed)
    fresh = state.pool.alloc(needed, seq.holder)
    add_pages(state, seq, fresh)
    return fresh


def add_pages(state: SchedState, seq: Seq, pages: list[int]) -> None:
    """Append pages that `seq` has a lease of."""
    if seq.table < 0:
        seq.table = state.tables.take()
    have = len(seq.pages)
    state.tables.array[seq.table, have : have + len(pages)] = pages
    seq.pages += pages


def make_room(state: SchedState, num_pages: int) -> bool:
    """Evict until `num_pages` are free. False if that cannot be."""
    missing = num_pages - state.pool.num_free
    if missing > state.tree.evictable_pages:
        return False
    if missing > 0:
        state.tree.evict(missing)
    return True


def offer(state: SchedState, seq: Seq) -> None:
    """Let the tree keep the full pages computed so far, for others to reuse while `seq` goes on. The lock covers them.

    Nothing happens if someone else was faster with the same tokens: then our pages stay ours alone until released. So
    a sequence never locks pages that are not its own, and one that is alone can use the whole pool.
    """
    seq.prefix_cached = True
    if not state.config.radix:
        return
    page_size = state.config.page_size
    full = seq.num_computed // page_size * page_size
    known, _ = state.tree.peek(seq.namespace, seq.tokens, full)
    if known * page_size > seq.prefix_tokens:
        return
    _insert(state, seq)
    match = state.tree.match(seq.namespace, seq.tokens, full)
    state.tree.lock(match)
    _unlock(state, seq)
    seq.match = match


def give_back(state: SchedState, seq: Seq, *, keep: bool) -> None:
    """End all leases of `seq`; with `keep` the tree takes the full pages computed so far first."""
    if keep and state.config.radix:
        _insert(state, seq)
    drop_writer(state, seq)
    _unlock(state, seq)
    state.pool.release(seq.pages, seq.holder)
    if seq.table >= 0:
        state.tables.give_back(seq.table, len(seq.pages))
    seq.pages, seq.table = [], -1
    seq.num_computed = seq.num_planned = seq.prefix_tokens = 0
    seq.prefix_cached = False


def drop_writer(state: SchedState, seq: Seq) -> None:
    """No remote side writes into the pages of `seq` any more."""
    if seq.remote_pages and seq.writer is not None:
        state.pool.release(seq.remote_pages, seq.writer)
    seq.remote_pages = []


def _insert(state: SchedState, seq: Seq) -> None:
    """Full pages to the tree; our own leases stay."""
    num_pages = seq.num_computed // state.config.page_size
    tokens = seq.tokens[: num_pages * state.config.page_size]
    state.tree.insert(seq.namespace, tokens, seq.pages[:num_pages])


def _unlock(state: SchedState, seq: Seq) -> None:
    if seq.match is not None:
        state.tree.unlock(seq.match)
        seq.match = None
