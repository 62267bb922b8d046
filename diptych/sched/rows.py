"""Plans as arrays."""

from __future__ import annotations

import numpy as np

from diptych.sched.state import SchedState, Seq, Status
from diptych.types import I32, I64, Plan, Row


def build(state: SchedState, decoding: list[Seq], chunks: list[tuple[Seq, int]]) -> Plan:
    """The plan of a step: a row for each of `decoding` (one token), then for each of `chunks` (sequence, tokens).

    Marks them in flight. A token that the step in flight samples has the id -1 - r, r being its row there. Decode rows
    cost a few list reads each; everything of a token's size is done by numpy.
    """
    page_size = state.config.page_size
    seqs = [*decoding, *(seq for seq, _ in chunks)]
    num_rows, num_decode = len(seqs), len(decoding)
    starts: I32 = np.array([seq.num_planned for seq in seqs], np.int32)
    tokens = [-1 - seq.row if seq.num_pending else seq.tokens[-1] for seq in decoding]
    owners = np.arange(num_rows)
    q_starts: I32 = np.arange(num_rows + 1, dtype=np.int32)
    positions, kv_lens = starts, starts + np.int32(1)
    if chunks:
        for seq, length in chunks:
            tokens += seq.tokens[seq.num_planned : seq.num_planned + length]
        lengths = np.ones(num_rows, np.int32)
        lengths[num_decode:] = [length for _, length in chunks]
        np.cumsum(lengths, out=q_starts[1:])
        owners = np.repeat(owners, lengths)
        positions = np.arange(q_starts[-1], dtype=np.int32) + (starts - q_starts[:-1])[owners]
        kv_lens = starts + lengths
    width = -(-int(kv_lens.max()) // page_size)
    pages = state.tables.array[[seq.table for seq in seqs], :width]
    slots: I64 = pages[owners, positions // page_size].astype(np.int64) * page_size + positions % page_size
    rows = [_decode_row(seq, index) for index, seq in enumerate(decoding)]
    rows += [_chunk_row(seq, length, num_decode + index) for index, (seq, length) in enumerate(chunks)]
    return Plan(
        step=state.step,
        rows=rows,
        token_ids=np.array(tokens, np.int32),
        positions=positions,
        slots=slots,
        q_starts=q_starts,
        kv_lens=kv_lens,
        pages=pages,
    )


def _decode_row(seq: Seq, index: int) -> Row:
    """One token, and the next is sampled."""
    request = seq.request
    start, num_pending = seq.num_planned, seq.num_pending
    stop = start + 1
    seq.num_planned = stop
    seq.num_pending = num_pending + 1
    seq.in_flight += 1
    seq.row = index
    return Row(
        rid=request.rid,
        num_new=1,
        num_cached=start,
        samples=True,
        sampling=request.sampling,
        position=stop,
        num_prompt=seq.num_prompt,
        num_output=stop - seq.num_prompt,
        logprobs=request.logprobs,
        history=seq.tokens.copy() if seq.needs_history else None,
    )


def _chunk_row(seq: Seq, length: int, index: int) -> Row:
    """`length` tokens, all known."""
    request = seq.request
    start = seq.num_planned
    stop = start + length
    samples = stop == len(seq.tokens)
    seq.num_planned = stop
    seq.num_pending += samples
    seq.in_flight += 1
    seq.row = index
    row = Row(
        rid=request.rid,
        num_new=length,
        num_cached=start,
        samples=samples,
        sampling=request.sampling,
        position=stop,
        num_prompt=seq.num_prompt,
        num_output=len(seq.tokens) - seq.num_prompt,
        logprobs=request.logprobs,
        history=seq.tokens.copy() if samples and seq.needs_history else None,
    )
    if seq.next_target < seq.num_prompt:
        _add_targets(row, seq, stop)
    return row


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


def _add_targets(row: Row, seq: Seq, stop: int) -> None:
    """Ask for the logprobs of prompt tokens that this row's inputs predict and that are still to come."""
    first = max(seq.next_target, row.num_cached + 1)  # a step in flight brings those before
    targets = seq.tokens[first : min(stop + 1, seq.num_prompt)]
    if targets:
        row.prompt_targets = targets
        row.target_start = first - 1 - row.num_cached
