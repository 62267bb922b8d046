"""Plans as arrays."""

from __future__ import annotations

import numpy as np

from diptych.sched.state import Seq, Status
from diptych.types import I32, I64, Plan, Row


def build(step: int, page_size: int, decoding: list[Seq], chunks: list[tuple[Seq, int]]) -> Plan:
    """The plan of a step: a row for each of `decoding` (one token), then for each of `chunks` (sequence, tokens).

    Marks them in flight. A token that the step in flight samples has the id -1 - r, r being its row there. Decode rows
    cost a few list reads each; everything of a token's size is done by numpy.
    """
    num_decode = len(decoding)
    num_rows = num_decode + len(chunks)
    seqs = decoding + [seq for seq, _ in chunks]
    lengths = [1] * num_decode + [length for _, length in chunks]
    cached = [seq.num_planned for seq in seqs]
    rows = [_row(seq, start, length) for seq, start, length in zip(seqs, cached, lengths, strict=True)]

    q_starts = np.zeros(num_rows + 1, np.int32)
    np.cumsum(lengths, out=q_starts[1:])
    starts = np.array(cached, np.int32)
    kv_lens = starts + np.array(lengths, np.int32)
    pages = np.zeros((num_rows, max(len(seq.pages) for seq in seqs)), np.int32)
    for index, seq in enumerate(seqs):
        pages[index, : len(seq.pages)] = seq.table[: len(seq.pages)]

    total = int(q_starts[-1])
    token_ids: I32 = np.empty(total, np.int32)
    positions: I32 = np.empty(total, np.int32)
    slots: I64 = np.empty(total, np.int64)
    token_ids[:num_decode] = [-1 - seq.row if seq.num_pending else seq.tokens[-1] for seq in decoding]
    positions[:num_decode] = starts[:num_decode]
    last = pages[np.arange(num_decode), positions[:num_decode] // page_size]
    slots[:num_decode] = last.astype(np.int64) * page_size + positions[:num_decode] % page_size
    at = num_decode
    for seq, length in chunks:
        start, stop = seq.num_planned, seq.num_planned + length
        token_ids[at : at + length] = seq.tokens[start:stop]
        span = np.arange(start, stop)
        positions[at : at + length] = span
        slots[at : at + length] = seq.table[span // page_size].astype(np.int64) * page_size + span % page_size
        at += length
    for index, (seq, row) in enumerate(zip(seqs, rows, strict=True)):
        seq.in_flight += 1
        seq.num_planned = row.num_cached + row.num_new
        seq.num_pending += row.samples
        seq.row = index
    return Plan(
        step=step,
        rows=rows,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        q_starts=q_starts,
        kv_lens=kv_lens,
        pages=pages,
    )


def split(plan: Plan, seqs: dict[str, Seq]) -> list[Plan | None]:
    """The rows of `plan`, the oldest in flight, as plans of one row, in order. None: its sequence has ended since.

    A row writes only the slots of its own tokens and reads only pages that no other row writes, so they can be run
    after `plan` was, wholly or in part, and give what it would have given. Tokens that the step before has sampled are
    filled in.
    """
    return [
        _only(plan, index, seqs[row.rid].tokens) if seqs[row.rid].status is Status.RUNNING else None
        for index, row in enumerate(plan.rows)
    ]


def _only(plan: Plan, index: int, tokens: list[int]) -> Plan:
    start, stop = int(plan.q_starts[index]), int(plan.q_starts[index + 1])
    first = plan.rows[index].num_cached
    return Plan(
        step=plan.step,
        rows=[plan.rows[index]],
        token_ids=np.array(tokens[first : first + stop - start], np.int32),
        positions=plan.positions[start:stop],
        slots=plan.slots[start:stop],
        q_starts=np.array([0, stop - start], np.int32),
        kv_lens=plan.kv_lens[index : index + 1],
        pages=plan.pages[index : index + 1],
    )


def _row(seq: Seq, start: int, length: int) -> Row:
    stop = start + length
    num_tokens = len(seq.tokens) + seq.num_pending
    samples = stop == num_tokens
    request = seq.request
    row = Row(
        rid=request.rid,
        num_new=length,
        num_cached=start,
        samples=samples,
        sampling=request.sampling,
        position=stop,
        num_prompt=seq.num_prompt,
        num_output=num_tokens - seq.num_prompt,
        logprobs=request.logprobs,
    )
    if samples and seq.needs_history:
        row.history = seq.tokens.copy()
    if seq.next_target < seq.num_prompt:
        _add_targets(row, seq, stop)
    return row


def _add_targets(row: Row, seq: Seq, stop: int) -> None:
    """Ask for the logprobs of prompt tokens that this row's inputs predict and that are still to come."""
    first = max(seq.next_target, row.num_cached + 1)  # a step in flight brings those before
    targets = seq.tokens[first : min(stop + 1, seq.num_prompt)]
    if targets:
        row.prompt_targets = targets
        row.target_start = first - 1 - row.num_cached
