"""The mock model as a runner: deterministic, paged, and unforgiving.

`MockRunner` stands where the real runner stands. What it writes for a token depends on everything before it *as read
back from the pages*; what comes next on all the slots that the plan's page table points to, in order. So a wrong page,
slot, head, order or position, or KV of another request, changes what comes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from diptych.kv.share import layer_range
from diptych.testing.mock_model import EMPTY, MASK, PLACE, U64, content_of, extend, result_of_row
from diptych.types import ModelInfo, Plan, StepResult

NUM_LAYERS, HEAD_DIM = 2, 2


class MockStore:
    """One rank's heads and layers of the pool, as PageStore."""

    def __init__(self, pool: U64) -> None:
        self._pool = pool  # [page, head, layer, 2, slot, dim], a view of the runner's
        self.num_pages, self.num_heads, self.num_layers = pool.shape[:3]
        self.head_bytes = int(np.prod(pool.shape[2:])) * pool.itemsize
        self.layout = f"page,head,layer,kv,slot,dim:uint64:{pool.shape[4]}:{NUM_LAYERS}:{pool.shape[5]}"

    def read(self, pages: Sequence[int], head_start: int, head_stop: int, layers: range | None = None) -> memoryview:
        """See PageStore.read."""
        first, last = (layers.start, layers.stop) if layers is not None else (0, self.num_layers)
        return memoryview(self._pool[list(pages), head_start:head_stop, first:last].tobytes())

    def write(
        self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview, layers: range | None = None
    ) -> None:
        """See PageStore.write."""
        first, last = (layers.start, layers.stop) if layers is not None else (0, self.num_layers)
        values = np.frombuffer(data, np.uint64)
        shape = (len(pages), head_stop - head_start, last - first, *self._pool.shape[3:])
        if values.size != int(np.prod(shape)):
            raise ValueError(f"{len(data)} bytes for {len(pages)} pages of {head_stop - head_start} heads")
        self._pool[list(pages), head_start:head_stop, first:last] = values.reshape(shape)


class MockRank:
    """What one rank holds and does: its heads and layers of the pages. What it reads there is added up over the ranks.

    Each entry of a slot is the content xor a key of its own. Reading takes a weighted sum of what all entries of all
    heads say; the weights sum to one, so that entries that agree give the content, and any that does not spoils it.
    """

    def __init__(self, pool: U64, keys: U64, weights: U64) -> None:
        self._pool = pool  # [page, head, layer, 2, slot, dim]
        self._keys, self._weights = keys, weights  # [head, layer, 2, dim]
        self.store = MockStore(pool)

    def read(self, plan: Plan, lengths: NDArray[np.int32]) -> U64:
        """This rank's part of what the first `lengths[b]` slots of each row say, row after row: [sum of lengths]."""
        page_size = self._pool.shape[4]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = _positions(lengths)
        slots = self._pool[plan.pages[rows, positions // page_size], :, :, :, positions % page_size]
        return ((slots ^ self._keys) * self._weights).sum(axis=(1, 2, 3, 4), dtype=np.uint64)

    def write(self, plan: Plan, contents: U64, layers: slice = slice(None)) -> None:
        """Store what the plan's tokens stand for, [T], in `layers` of its own, of all its heads."""
        page_size = self._pool.shape[4]
        values = contents.reshape(-1, 1, 1, 1, 1) ^ self._keys[:, layers]
        self._pool[plan.slots // page_size, :, layers, :, plan.slots % page_size] = values

    def wrong(self, pages: NDArray[np.int32], contents: U64) -> list[int]:
        """The positions from 0 on at which some entry in `pages` is not what `contents` demands."""
        page_size = self._pool.shape[4]
        positions = np.arange(len(contents))
        slots = self._pool[pages[positions // page_size], :, :, :, positions % page_size]
        differs = slots ^ self._keys != contents.reshape(-1, 1, 1, 1, 1)
        return [int(position) for position in np.flatnonzero(differs.any(axis=(1, 2, 3, 4)))]


class Inputs(NamedTuple):
    """What the inputs of a step do: the content of each, [T], and for each row the fingerprints after each of them."""

    contents: U64
    after: list[list[int]]


class MockRunner:
    """All ranks of a mock model in one object: `ranks[r]` holds `num_kv_heads / world` heads of its stage's layers,
    `stores[r]` is its pages, `store` rank 0's.

    Fresh pages are full of garbage, as real ones are. A step is a function of the plan, of the pages' contents and of
    the last step's tokens alone. With `overlaps` it is computed as late as a device may, when it is collected, so that
    whatever is changed under it shows. Whoever simulates ranks that are not at the same place at the same time calls
    its parts instead.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_kv_heads: int = 4,
        world: int = 1,
        stages: int = 1,
        vocab_size: int = 101,
        eos_token_ids: tuple[int, ...] = (0,),
        context_len: int = 4096,
        overlaps: bool = False,
    ) -> None:
        if num_kv_heads % world:
            raise ValueError(f"{num_kv_heads} heads cannot be split over {world} ranks")
        self.num_pages, self.page_size = num_pages, page_size
        self.overlaps = overlaps
        self._launched: deque[Plan] = deque()
        self._sampled: list[int] = []  # tokens of the last step, by row
        shape = (num_pages, num_kv_heads, NUM_LAYERS, 2, page_size, HEAD_DIM)
        pool: U64 = _mix_all(np.arange(int(np.prod(shape)), dtype=np.uint64)).reshape(shape)
        entries = (num_kv_heads, NUM_LAYERS, 2, HEAD_DIM)
        keys: U64 = _mix_all(np.arange(1, int(np.prod(entries)) + 1, dtype=np.uint64)).reshape(entries)
        weights: U64 = _mix_all(~keys) | np.uint64(1)
        weights.flat[:1] += np.uint64(1) - weights.sum(keepdims=True, dtype=np.uint64).reshape(1)
        share = num_kv_heads // world
        heads = [slice(rank * share, (rank + 1) * share) for rank in range(world)]
        layers = [layer_range(NUM_LAYERS, stages, stage) for stage in range(stages)]
        parts = [(mine, slice(stage.start, stage.stop)) for stage in layers for mine in heads]
        self.ranks = [MockRank(pool[:, *part], keys[part], weights[part]) for part in parts]
        self.stores = [rank.store for rank in self.ranks]
        self.store = self.stores[0]
        self.info = ModelInfo(
            architecture="Mock",
            vocab_size=vocab_size,
            num_layers=NUM_LAYERS,
            num_kv_heads=num_kv_heads,
            head_dim=HEAD_DIM,
            kv_dtype="uint64",
            context_len=context_len,
            eos_token_ids=eos_token_ids,
            num_parameters=0,
            weight_bytes=0,
            fingerprint=f"mock:{vocab_size}:{num_kv_heads}",
        )

    def launch(self, plan: Plan) -> Plan | StepResult:
        """See Runner.launch. Raises ValueError for a third step at once."""
        if not self.overlaps:
            return self.run(plan)
        if len(self._launched) == 2:
            raise ValueError("two steps have not been collected")
        self._launched.append(plan)
        return plan

    def collect(self, pending: Plan | StepResult) -> StepResult:
        """See Runner.collect. Raises ValueError for a step that is not the oldest."""
        if isinstance(pending, StepResult):
            return pending
        if self._launched.popleft() is not pending:
            raise ValueError(f"step {pending.step} is not the oldest")
        return self.run(pending)

    def run(self, plan: Plan) -> StepResult:
        """Compute one step. `duration_s` is 0: whoever simulates time adds it."""
        plan = resolve(plan, self._sampled)
        inputs = self.begin(plan, self._read(plan, num_cached(plan)))
        for rank in self.ranks:
            rank.write(plan, inputs.contents)
        result = self.end(plan, inputs, self._read(plan, plan.kv_lens))
        self._sampled = [row.token for row in result.rows]
        return result

    def begin(self, plan: Plan, cached: U64) -> Inputs:
        """`cached`: what the slots before the step's inputs say, added up over the ranks."""
        contents: list[int] = []
        after: list[list[int]] = []
        for index, fingerprint in enumerate(_fingerprints(cached, num_cached(plan))):
            span = slice(int(plan.q_starts[index]), int(plan.q_starts[index + 1]))
            after.append([])
            for token, position in zip(plan.token_ids[span].tolist(), plan.positions[span].tolist(), strict=True):
                contents.append(content_of(token, position, fingerprint))
                fingerprint = extend(fingerprint, contents[-1], position)
                after[-1].append(fingerprint)
        return Inputs(np.array(contents, np.uint64), after)

    def end(self, plan: Plan, inputs: Inputs, stored: U64) -> StepResult:
        """`stored`: what all slots up to the step's inputs say now."""
        rows = zip(plan.rows, _fingerprints(stored, plan.kv_lens), inputs.after, strict=True)
        return StepResult(rows=[result_of_row(row, state, after, self.info) for row, state, after in rows])

    def _read(self, plan: Plan, lengths: NDArray[np.int32]) -> U64:
        return np.sum([rank.read(plan, lengths) for rank in self.ranks], axis=0, dtype=np.uint64)


def resolve(plan: Plan, sampled: Sequence[int]) -> Plan:
    """`plan` with the tokens that the step before sampled, by row, in their places."""
    missing = plan.token_ids < 0
    if not missing.any():
        return plan
    token_ids = plan.token_ids.copy()
    token_ids[missing] = [sampled[-1 - token] for token in token_ids[missing]]
    if (token_ids < 0).any():
        raise ValueError(f"step {plan.step} wants tokens of rows that sampled none")
    return replace(plan, token_ids=token_ids)


def num_cached(plan: Plan) -> NDArray[np.int32]:
    """[B] tokens in the cache before the step."""
    return plan.kv_lens - np.diff(plan.q_starts)


def _positions(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """0, 1, ... for each row, row after row."""
    stops = np.cumsum(lengths, dtype=np.int64)
    return np.arange(stops[-1]) - np.repeat(stops - lengths, lengths)


def _fingerprints(contents: U64, lengths: NDArray[np.int32]) -> list[int]:
    """The fingerprint of each row's slots."""
    extents = _mix_all(contents + _positions(lengths).astype(np.uint64) * np.uint64(PLACE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(extents, dtype=np.uint64)])
    stops = np.cumsum(lengths, dtype=np.int64)
    return [(EMPTY + int(value)) & MASK for value in sums[stops] - sums[stops - lengths]]


def _mix_all(values: U64) -> U64:
    """`mix` of each."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
