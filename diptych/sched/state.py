"""The scheduler's words: its settings, a sequence, and the state that schedule and commit work on."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from diptych.errors import AuditError
from diptych.kv.pool import Holder, PagePool
from diptych.kv.radix import Match, RadixTree
from diptych.sched.tables import PageTables
from diptych.types import Plan, Request, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedConfig:
    """Sizes in tokens unless the name says otherwise."""

    page_size: int
    context_len: int  # longest sequence, prompt and output
    max_running: int = 64  # sequences that are computed together, transferring ones included
    chunk_tokens: int = 512  # tokens of a step while prompts are prefilled; -1: no limit
    policy: str = "fcfs"  # or lpm: longest cached prefix first
    radix: bool = True  # keep computed pages for reuse
    reserved_decode_tokens: int = 512  # kept free for each running sequence when another one is admitted
    max_queued: int = 4096
    eos_token_ids: tuple[int, ...] = ()


class Status(Enum):
    WAITING = "waiting"  # in the queue; holds no pages
    RUNNING = "running"  # in the batch; holds pages for all its tokens
    TRANSFERRING = "transferring"  # reserved: holds pages that a remote side fills
    FINISHED = "finished"  # has its last token; holds its pages until released
    ABORTED = "aborted"  # holds its pages until released
    RELEASED = "released"  # gone


_MOVES: dict[Status, tuple[Status, ...]] = {
    Status.WAITING: (Status.RUNNING, Status.TRANSFERRING, Status.ABORTED),
    Status.RUNNING: (Status.WAITING, Status.FINISHED, Status.ABORTED),
    Status.TRANSFERRING: (Status.RUNNING, Status.ABORTED),
    Status.FINISHED: (Status.RELEASED,),
    Status.ABORTED: (Status.RELEASED,),
    Status.RELEASED: (),
}


class After(Enum):
    """What to do with a sequence once no step that computes it is in flight."""

    NOTHING = 0
    RETRACT = 1
    RELEASE = 2
    RELEASE_AND_KEEP = 3


@dataclass(slots=True, eq=False, kw_only=True)
class Seq:
    """One request on its way. `tokens` is prompt and output; the KV of the first `num_computed` is in `pages`.

    While decoding, num_computed == len(tokens) - 1: the KV of the last sampled token is written by the step that
    follows. What steps in flight do to it is ahead of that: once they are done it has len(tokens) + num_pending tokens,
    and the KV of num_planned.
    """

    request: Request
    tokens: list[int]
    num_prompt: int
    max_tokens: int  # length at which the sequence ends
    arrival_at: float
    stops: frozenset[int]  # tokens that end it, once it has `min_tokens`
    min_tokens: int
    needs_history: bool  # sampling looks at all its tokens
    needs_tokens: bool  # so it does, or a grammar: no step can be planned while its last token is not known
    next_target: int  # first prompt position whose logprob is still to come; num_prompt: none is
    prompt_logprobs: list[TokenLogprob] | None = None  # collected so far; None: not wanted, or handed out
    status: Status = Status.WAITING
    num_computed: int = 0
    num_planned: int = 0  # num_computed when all steps in flight are done
    num_pending: int = 0  # tokens that steps in flight sample
    in_flight: int = 0  # how many of those steps compute it
    row: int = 0  # its row in the last of them
    pages: list[int] = field(default_factory=list)
    remote_pages: list[int] = field(default_factory=list)  # those a remote side may still write
    match: Match | None = None  # lock on those of our pages that the tree has too
    prefix_tokens: int = 0  # tokens found in the tree when the pages were taken
    prefix_cached: bool = False  # our prompt's pages have been offered to the tree since the pages were taken
    cached_tokens: int = 0  # prompt tokens that did not have to be computed, for the usage report
    num_announced: int = 0  # pages that ChunkDone events have named so far
    num_retractions: int = 0
    num_passed_over: int = 0  # times another one was admitted while this one was first in the queue
    first_admitted_at: float | None = None
    after_step: After = After.NOTHING
    peeked: tuple[int, int, int] = (-1, 0, 0)  # tree version, and what peek said then
    table: int = -1  # row of `pages` in the state's tables; -1: holds none

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def namespace(self) -> str:
        return self.request.namespace

    @property
    def holder(self) -> Holder:
        return ("seq", self.request.rid)

    @property
    def writer(self) -> Holder | None:
        """Who else may write into the pages of a transferring sequence."""
        return ("writer", self.request.bootstrap.room) if self.request.bootstrap else None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def match_limit(self) -> int:
        """Tokens that may come from the tree: the last one is always computed, and so is what prompt logprobs need."""
        limit = len(self.tokens) - 1
        return min(limit, self.next_target - 1) if self.next_target < self.num_prompt else limit

    def move(self, status: Status) -> None:
        """Change status along the table. Raises AuditError for a move that is not in it."""
        if status not in _MOVES[self.status]:
            raise AuditError(f"request {self.rid} cannot go from {self.status.value} to {status.value}")
        self.status = status


@dataclass(slots=True)
class Counters:
    """What has happened so far, for Stats."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    aborted: int = 0
    retractions: int = 0
    forward_s: float = 0.0
    steps: int = 0
    eager_steps: int = 0
    queue_time_s: list[float] = field(default_factory=list)  # since the last snapshot
    window_at: float | None = None  # start of the window over which throughput is measured
    window_tokens: int = 0
    throughput: float = 0.0


@dataclass(slots=True)
class SchedState:
    """All sequences that hold something or wait for it, by rid in `seqs`, and the queues they are in.

    `running` is in the order of admission. FINISHED and ABORTED sequences are in `seqs` alone, until released.
    """

    config: SchedConfig
    pool: PagePool
    tree: RadixTree
    max_len: int  # longest sequence that context and pool allow
    tables: PageTables
    seqs: dict[str, Seq] = field(default_factory=dict)
    waiting: deque[Seq] = field(default_factory=deque)
    running: list[Seq] = field(default_factory=list)
    transferring: list[Seq] = field(default_factory=list)
    reserving_since: float = math.inf  # arrival of the first request that waits for a reservation; set by the role
    draining: dict[Holder, list[int]] = field(default_factory=dict)  # writers whose sequences are gone, and their pages
    paused: bool = False
    step: int = 0  # number of the last plan
    flight: list[Plan] = field(default_factory=list)  # plans neither committed nor cancelled, the oldest first
    counters: Counters = field(default_factory=Counters)


def new_state(config: SchedConfig, num_pages: int) -> SchedState:
    """An empty scheduler over a pool of `num_pages`."""
    pool = PagePool(num_pages, config.page_size)
    # the KV of a sequence's last token is never stored
    max_len = min(config.context_len, num_pages * config.page_size + 1)
    return SchedState(
        config=config,
        pool=pool,
        tree=RadixTree(pool),
        max_len=max_len,
        tables=PageTables(-(-max_len // config.page_size)),
    )
