"""A snapshot of the scheduler for metrics and load reports."""

from __future__ import annotations

from diptych.sched.state import SchedState
from diptych.types import Stats


def stats(state: SchedState) -> Stats:
    """What the scheduler knows of Stats. Hands out the queue times since the last snapshot, and forgets them.

    A token slot is used if its page is neither free nor evictable; token_usage is num_used_tokens /
    max_total_num_tokens.
    """
    counters, pool, tree = state.counters, state.pool, state.tree
    queue_time_s, counters.queue_time_s = counters.queue_time_s, []
    used = pool.num_pages - pool.num_free - tree.evictable_pages
    return Stats(
        num_running_reqs=len(state.running),
        num_queue_reqs=len(state.waiting),
        num_retracted_reqs=sum(seq.num_retractions > 0 for seq in state.waiting),
        num_used_tokens=used * pool.page_size,
        max_total_num_tokens=pool.num_pages * pool.page_size,
        num_pages=pool.num_pages,
        page_size=pool.page_size,
        evictable_tokens=tree.evictable_pages * pool.page_size,
        free_pages=pool.num_free,
        gen_throughput=counters.throughput if state.running else 0.0,
        cache_hit_rate=counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0,
        prompt_tokens_total=counters.prompt_tokens,
        generation_tokens_total=counters.generation_tokens,
        cached_tokens_total=counters.cached_tokens,
        num_aborted_requests_total=counters.aborted,
        num_retractions_total=counters.retractions,
        evicted_tokens_total=tree.num_evicted * pool.page_size,
        forward_seconds_total=counters.forward_s,
        steps_total=counters.steps,
        num_eager_decode_steps_total=counters.eager_steps,
        num_decode_transfer_queue_reqs=len(state.transferring),
        queue_time_s=queue_time_s,
    )
