"""Drives a Runner by plans of its own, without the scheduler: pages from a shuffled list, chunks as told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from diptych.model.runner import Runner
from diptych.types import LogprobSpec, Plan, Row, RowResult, Sampling, TokenLogprob

VOCAB = 211
GREEDY = Sampling(temperature=0.0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(10, VOCAB) for _ in range(length)]


@dataclass
class Sequence:
    """A request on its way. `num_cached` tokens of `tokens` are in `pages`."""

    prompt: list[int]
    sampling: Sampling = GREEDY
    logprobs: LogprobSpec | None = None
    mask: bytes | None = None
    rid: str = "r"
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    outputs: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.outputs


class Driver:
    """Runs sequences over `runner`'s pages. `seed` shuffles which pages they get."""

    def __init__(self, runner: Runner, page_size: int, seed: int = 0) -> None:
        self.runner, self.page_size = runner, page_size
        self.free = list(range(runner.num_pages))
        random.Random(seed).shuffle(self.free)
        self.step = 0

    def plan(self, parts: list[tuple[Sequence, int]]) -> Plan:
        """A plan in which each sequence computes its next n tokens."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows, q_starts = [], [0]
        for seq, count in parts:
            start, stop = seq.num_cached, seq.num_cached + count
            while len(seq.pages) * self.page_size < stop:
                seq.pages.append(self.free.pop())
            token_ids += seq.tokens[start:stop]
            positions += range(start, stop)
            slots += [seq.pages[p // self.page_size] * self.page_size + p % self.page_size for p in range(start, stop)]
            q_starts.append(len(token_ids))
            rows.append(self._row(seq, start, stop))
        pages = np.zeros((len(parts), max(len(seq.pages) for seq, _ in parts)), np.int32)
        for row, (seq, _) in enumerate(parts):
            pages[row, : len(seq.pages)] = seq.pages
        self.step += 1
        return Plan(
            step=self.step,
            rows=rows,
            token_ids=np.array(token_ids, np.int32),
            positions=np.array(positions, np.int32),
            slots=np.array(slots, np.int64),
            q_starts=np.array(q_starts, np.int32),
            kv_lens=np.array([seq.num_cached + count for seq, count in parts], np.int32),
            pages=pages,
        )

    def _row(self, seq: Sequence, start: int, stop: int) -> Row:
        row = Row(
            rid=seq.rid,
            num_new=stop - start,
            num_cached=start,
            samples=stop == len(seq.tokens),
            sampling=seq.sampling,
            position=stop,
            history=seq.tokens,
            num_prompt=len(seq.prompt),
            num_output=len(seq.outputs),
            logprobs=seq.logprobs,
            mask=seq.mask,
        )
        if seq.logprobs is not None and seq.logprobs.prompt_start >= 0:
            first = max(seq.logprobs.prompt_start, start + 1, 1)
            targets = seq.prompt[first : stop + 1]
            if targets:
                row.prompt_targets, row.target_start = targets, first - 1 - start
        return row

    def run(self, parts: list[tuple[Sequence, int]]) -> list[RowResult]:
        """One step; the sequences take their tokens and logprobs."""
        results = self.runner.run(self.plan(parts)).rows
        for (seq, count), result in zip(parts, results, strict=True):
            seq.num_cached += count
            seq.prompt_logprobs += result.prompt_logprobs or []
            if result.token >= 0:
                seq.outputs.append(result.token)
                if result.logprob is not None:
                    seq.output_logprobs.append(result.logprob)
        return results

    def generate(self, seq: Sequence, num_tokens: int, chunk: int = 10**9) -> list[int]:
        """`num_tokens` tokens of one sequence alone, its prompt in chunks."""
        while len(seq.outputs) < num_tokens:
            self.run([(seq, min(chunk, len(seq.tokens) - seq.num_cached))])
        return seq.outputs

    def release(self, seq: Sequence) -> None:
        """Give the pages back (and forget what was cached)."""
        self.free += seq.pages
        seq.pages, seq.num_cached = [], 0
