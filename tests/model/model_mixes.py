"""Steps that mix chunks of prompts and decode rows at random, in turn or each launched behind the one before it."""

from __future__ import annotations

import random
from collections.abc import Iterator

from model_driver import Driver, Sequence

from diptych.model.runner import Pending, Runner

Parts = list[tuple[Sequence, int]]


def mixes(seqs: list[Sequence], seed: int, steps: int, chunk: int) -> Iterator[Parts]:
    """What each step computes: of most sequences a token, or up to `chunk` of what they have not computed yet."""
    rnd = random.Random(seed)
    for _ in range(steps):
        some = [seq for seq in seqs if rnd.random() < 0.8] or seqs
        rnd.shuffle(some)
        yield [(seq, rnd.randint(1, min(chunk, len(seq.tokens) - seq.num_cached))) for seq in some]


def run_mixes(runner: Runner, seqs: list[Sequence], seed: int, steps: int, *, chunk: int = 60, page: int = 16) -> None:
    driver = Driver(runner, page)
    for parts in mixes(seqs, seed, steps, chunk):
        driver.run(parts)


def run_overlapped(
    runner: Runner, seqs: list[Sequence], seed: int, steps: int, *, chunk: int = 60, page: int = 16
) -> None:
    """As run_mixes, but each step is launched before the tokens of the one before are known on the host."""
    driver = Driver(runner, page)
    pending: Pending | None = None
    before: Parts = []
    for parts in mixes(seqs, seed, steps, chunk):
        plan = driver.plan(parts)
        for b, (seq, _) in enumerate(parts):
            row = next((r for r, (other, _) in enumerate(before) if other is seq), -1)
            if row >= 0 and pending is not None and pending.plan.rows[row].samples:
                plan.token_ids[plan.q_starts[b]] = -1 - row
        behind = runner.launch(plan)
        _take(runner, pending, before)
        for (seq, count), told in zip(parts, plan.rows, strict=True):
            seq.num_cached += count
            seq.outputs += [0] * told.samples  # a place for the token that is not known yet
        pending, before = behind, parts
    _take(runner, pending, before)


def _take(runner: Runner, pending: Pending | None, parts: Parts) -> None:
    if pending is None:
        return
    for (seq, _), result in zip(parts, runner.collect(pending).rows, strict=True):
        if result.token >= 0:
            seq.outputs[-1] = result.token
            seq.output_logprobs += [result.logprob] if result.logprob is not None else []
