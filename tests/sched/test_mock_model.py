"""The mock model is a judge only if every bit in the cache, and every field of a row, changes what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sched_server import request

from diptych.testing.mock_model import expected
from diptych.testing.mock_runner import HEAD_DIM, NUM_LAYERS, MockRunner
from diptych.types import LogprobSpec, Plan, Row, RowResult, Sampling, TokenLogprob

PAGE = 4


def plan_of(row: Row, tokens: list[int], pages: list[int]) -> Plan:
    """One row that computes `tokens` after `row.num_cached`."""
    positions = np.arange(row.num_cached, row.num_cached + len(tokens), dtype=np.int32)
    table = np.array(pages, np.int32)
    return Plan(
        step=1,
        rows=[row],
        token_ids=np.array(tokens, np.int32),
        positions=positions,
        slots=table[positions // PAGE].astype(np.int64) * PAGE + positions % PAGE,
        q_starts=np.array([0, len(tokens)], np.int32),
        kv_lens=np.array([row.num_cached + len(tokens)], np.int32),
        pages=table[None],
    )


def row_of(num_cached: int, num_new: int, sampling: Sampling | None = None, **changes: object) -> Row:
    values: dict[str, object] = {
        "rid": "a",
        "num_new": num_new,
        "num_cached": num_cached,
        "samples": True,
        "sampling": sampling or Sampling(temperature=0.0),
        "position": num_cached + num_new,
        **changes,
    }
    return Row(**values)  # type: ignore[arg-type]


def run(runner: MockRunner, row: Row, tokens: list[int], pages: list[int]) -> RowResult:
    return runner.run(plan_of(row, tokens, pages)).rows[0]


def fingerprint(runner: MockRunner, length: int, pages: list[int]) -> float:
    """A number that stands for the whole cache of `length` tokens: the logprob of a fixed token computed after them."""
    row = row_of(length, 1, samples=False, prompt_targets=[7])
    logprobs = run(runner, row, [9], [*pages, runner.num_pages - 1]).prompt_logprobs
    assert logprobs is not None
    assert logprobs[0].logprob is not None
    return logprobs[0].logprob


def filled(world: int = 1, stages: int = 1) -> MockRunner:
    runner = MockRunner(12, PAGE, world=world, stages=stages)
    run(runner, row_of(0, 8), list(range(1, 9)), [2, 5])
    return runner


def test_every_entry_of_every_slot_counts() -> None:
    runner = filled()
    store = runner.store
    truth = fingerprint(runner, 8, [2, 5])
    assert store.head_bytes == NUM_LAYERS * 2 * PAGE * HEAD_DIM * 8
    for page, head in itertools.product([2, 5], range(4)):
        clean = bytes(store.read([page], head, head + 1))
        for at in range(0, len(clean), 8):
            dirty = bytearray(clean)
            dirty[at + 3] ^= 0x10
            store.write([page], head, head + 1, memoryview(dirty))
            assert fingerprint(runner, 8, [2, 5]) != truth
        store.write([page], head, head + 1, memoryview(clean))
    assert fingerprint(runner, 8, [2, 5]) == truth


def test_order_and_place_count_and_what_is_beyond_the_end_does_not() -> None:
    runner = filled()
    truth = fingerprint(runner, 8, [2, 5])
    assert fingerprint(runner, 8, [5, 2]) != truth
    assert fingerprint(runner, 8, [2, 2]) != truth
    assert fingerprint(runner, 8, [2, 6]) != truth
    short = fingerprint(runner, 5, [2, 5])
    run(runner, row_of(0, 8), [1, 2, 3, 4, 5, 60, 70, 80], [3, 4])
    assert fingerprint(runner, 5, [3, 4]) == short


def test_the_kv_of_a_token_depends_on_all_before_it() -> None:
    runner = MockRunner(12, PAGE)
    run(runner, row_of(0, 8), [1, 2, 3, 4, 5, 6, 7, 8], [0, 1])
    run(runner, row_of(0, 8), [9, 2, 3, 4, 5, 6, 7, 8], [2, 3])
    assert bytes(runner.store.read([1], 0, 4)) != bytes(runner.store.read([3], 0, 4))


def test_heads_differ_and_ranks_hold_slices_of_them() -> None:
    whole, split = filled(), filled(world=2)
    assert (whole.store.num_heads, split.store.num_heads, len(split.stores)) == (4, 2, 2)
    assert whole.store.layout == split.store.layout == "page,head,layer,kv,slot,dim:uint64:4:2:2"
    heads = [bytes(whole.store.read([2, 5], head, head + 1)) for head in range(4)]
    assert len(set(heads)) == 4
    assert [bytes(split.stores[head // 2].read([2, 5], head % 2, head % 2 + 1)) for head in range(4)] == heads


def test_stages_hold_layers() -> None:
    whole, split = filled(), filled(world=2, stages=2)
    assert [(store.num_heads, store.num_layers) for store in split.stores] == [(2, 1)] * 4
    assert split.store.layout == whole.store.layout
    for rank, (layer, head) in enumerate(((0, 0), (0, 2), (1, 0), (1, 2))):
        part = whole.store.read([2, 5], head, head + 2, range(layer, layer + 1))
        assert bytes(split.stores[rank].read([2, 5], 0, 2)) == bytes(part)
    assert fingerprint(split, 8, [2, 5]) == fingerprint(whole, 8, [2, 5])


def test_pages_can_be_copied_in_slices_of_heads() -> None:
    source, target = filled(), MockRunner(12, PAGE, world=4)
    assert fingerprint(target, 8, [7, 1]) != fingerprint(source, 8, [2, 5])
    for head in range(4):
        target.stores[head].write([7, 1], 0, 1, source.store.read([2, 5], head, head + 1))
    assert fingerprint(target, 8, [7, 1]) == fingerprint(source, 8, [2, 5])


def test_a_write_of_the_wrong_size_is_refused() -> None:
    runner = filled()
    with pytest.raises(ValueError, match="for 2 pages of 1 heads"):
        runner.store.write([1, 2], 0, 1, runner.store.read([1], 0, 1))
    with pytest.raises(ValueError, match="3 heads cannot be split over 2 ranks"):
        MockRunner(4, PAGE, num_kv_heads=3, world=2)
    assert len(runner.store.read([], 0, 4)) == 0


def test_the_same_plan_gives_the_same_result() -> None:
    sampling = Sampling(temperature=1.0, seed=4)
    assert run(filled(), row_of(8, 1, sampling), [3], [2, 5, 6]) == run(
        filled(), row_of(8, 1, sampling), [3], [2, 5, 6]
    )


def tokens_over(name: str, values: list[object], **fixed: object) -> set[int]:
    tokens = set()
    for value in values:
        sampling = Sampling(**{"temperature": 1.0, **fixed, **({name: value} if name != "position" else {})})  # type: ignore[arg-type]
        row = row_of(8, 1, sampling, **({"position": value} if name == "position" else {}))
        tokens.add(run(filled(), row, [3], [2, 5, 6]).token)
    return tokens


def test_seed_and_position_count_when_sampling_and_only_then() -> None:
    assert len(tokens_over("seed", [1, 2, 3, 4, 5, 6])) > 3
    assert len(tokens_over("position", [9, 10, 11, 12, 13, 14])) > 3
    assert len(tokens_over("seed", [1, 2, 3, 4, 5, 6], temperature=0.0)) == 1
    assert len(tokens_over("position", [9, 10, 11], temperature=0.0)) == 1


def test_a_penalty_needs_the_history_and_uses_all_of_it() -> None:
    sampling = Sampling(temperature=0.0, frequency_penalty=0.5)
    with pytest.raises(ValueError, match="no history"):
        run(filled(), row_of(8, 1, sampling), [3], [2, 5, 6])
    histories = [[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 3, 3], [9, 2, 3], [8, 2, 3]]
    tokens = {run(filled(), row_of(8, 1, sampling, history=history), [3], [2, 5, 6]).token for history in histories}
    assert len(tokens) > 3


def test_masks_and_minimum_lengths_are_obeyed() -> None:
    only_eleven = bytes([0, 1 << 3]) + bytes(11)
    assert run(filled(), row_of(8, 1, mask=only_eleven), [3], [2, 5, 6]).token == 11
    two = bytes([1 << 0, 1 << 3]) + bytes(11)
    strict = Sampling(temperature=0.0, min_new_tokens=2)
    assert run(filled(), row_of(8, 1, strict, mask=two, num_output=1), [3], [2, 5, 6]).token == 11
    stop = Sampling(temperature=0.0, min_new_tokens=2, stop_token_ids=(11,))
    three = bytes([1 << 0, 1 << 3 | 1 << 4]) + bytes(11)
    assert run(filled(), row_of(8, 1, stop, mask=three, num_output=1), [3], [2, 5, 6]).token == 12


def test_logprobs_come_as_asked_for() -> None:
    runner = filled()
    assert run(runner, row_of(8, 1), [3], [2, 5, 6]).logprob is None
    row = row_of(8, 1, logprobs=LogprobSpec(top=3, token_ids=(4, 9)))
    result = run(runner, row, [3], [2, 5, 6])
    assert isinstance(result.logprob, TokenLogprob)
    assert result.logprob.token == result.token
    assert len(result.logprob.top) == 3
    assert result.logprob.top == sorted(result.logprob.top, reverse=True)
    assert [token for _, token in result.logprob.chosen] == [4, 9]
    assert run(runner, row_of(8, 1, samples=False), [3], [2, 5, 6]) == RowResult(-1)


def test_expected_generates_without_pages() -> None:
    runner = MockRunner(12, PAGE)
    one = request("a", [1, 2, 3], 6, ignore_eos=True)
    tokens = [1, 2, 3]
    first = run(runner, row_of(0, 3), tokens, [4, 0, 9])
    tokens.append(first.token)
    while len(tokens) < 9:
        tokens.append(run(runner, row_of(len(tokens) - 1, 1), tokens[-1:], [4, 0, 9]).token)
    assert expected(one, runner.info, 100).tokens == tokens[3:]
    assert expected(one, runner.info, 5).tokens == tokens[3:5]
    assert expected(one, runner.info, 5).finish.type == "length"
