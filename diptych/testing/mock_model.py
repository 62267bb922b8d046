"""A model without a model: deterministic, paged, and unforgiving.

`MockRunner` stands where the real runner stands. The key or value that it writes for a token is a fingerprint of that
token, its position and everything before it *as read back from the pages*; the next token is a fingerprint of all the
slots that the plan's page table points to, in order. So a wrong page, slot, head, order or position, or KV of another
request, changes what comes out. `expected` generates the same thing without pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diptych.types import (
    Finish,
    LogprobSpec,
    ModelInfo,
    Plan,
    Request,
    Row,
    RowResult,
    StepResult,
    TokenLogprob,
)

U64 = NDArray[np.uint64]
_MASK = (1 << 64) - 1
_EMPTY = 0x9E3779B97F4A7C15  # fingerprint of no tokens
NUM_LAYERS, HEAD_DIM = 2, 2


def mix(value: int) -> int:
    """A bijection of 64-bit numbers that looks random (the finalizer of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix_all(values: U64) -> U64:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _content(token: int, position: int, before: int) -> int:
    """What the KV of a token stands for, given the fingerprint of everything before it."""
    return mix((before + token * 0xD1342543DE82EF95 + position * 0x2545F4914F6CDD1D) & _MASK)


def _extend(fingerprint: int, content: int, position: int) -> int:
    """The fingerprint after one more slot. A sum, for numpy's sake; order counts because positions are mixed in."""
    return (fingerprint + mix((content + position * 0x632BE59BD9B4E019) & _MASK)) & _MASK


class MockStore:
    """One rank's heads of the pool, as PageStore."""

    def __init__(self, pool: U64) -> None:
        self._pool = pool  # [page, head, layer, 2, slot, dim], a view of the runner's
        self.num_pages, self.num_heads = pool.shape[:2]
        self.head_bytes = int(np.prod(pool.shape[2:])) * pool.itemsize
        self.layout = f"page,head,layer,kv,slot,dim:uint64:{pool.shape[4]}:{pool.shape[2]}:{pool.shape[5]}"

    def read(self, pages: Sequence[int], head_start: int, head_stop: int) -> memoryview:
        """See PageStore.read."""
        return memoryview(self._pool[list(pages), head_start:head_stop].tobytes())

    def write(self, pages: Sequence[int], head_start: int, head_stop: int, data: memoryview) -> None:
        """See PageStore.write."""
        values = np.frombuffer(data, np.uint64)
        shape = (len(pages), head_stop - head_start, *self._pool.shape[2:])
        if values.size != int(np.prod(shape)):
            raise ValueError(f"{len(data)} bytes for {len(pages)} pages of {head_stop - head_start} heads")
        self._pool[list(pages), head_start:head_stop] = values.reshape(shape)


class MockRunner:
    """All ranks of a mock model in one object: `stores[r]` is what rank r holds (`num_kv_heads / world` heads each),
    `store` rank 0's.

    Fresh pages are full of garbage, as real ones are. `run` is a function of the plan and of the pages' contents alone.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_kv_heads: int = 4,
        world: int = 1,
        vocab_size: int = 101,
        eos_token_ids: tuple[int, ...] = (0,),
        context_len: int = 4096,
    ) -> None:
        if num_kv_heads % world:
            raise ValueError(f"{num_kv_heads} heads cannot be split over {world} ranks")
        self.num_pages, self.page_size = num_pages, page_size
        shape = (num_pages, num_kv_heads, NUM_LAYERS, 2, page_size, HEAD_DIM)
        self._pool: U64 = _mix_all(np.arange(int(np.prod(shape)), dtype=np.uint64)).reshape(shape)
        per_rank = num_kv_heads // world
        self.stores = [MockStore(self._pool[:, rank * per_rank : (rank + 1) * per_rank]) for rank in range(world)]
        self.store = self.stores[0]
        # Each entry of a slot is the content xor a key of its own. Reading takes a weighted sum of what all entries
        # say; the weights sum to one, so that entries that agree give the content, and any that does not spoils it.
        entries = (num_kv_heads, NUM_LAYERS, 2, HEAD_DIM)
        self._keys: U64 = _mix_all(np.arange(1, int(np.prod(entries)) + 1, dtype=np.uint64)).reshape(entries)
        self._weights: U64 = _mix_all(~self._keys) | np.uint64(1)
        self._weights.flat[:1] += np.uint64(1) - self._weights.sum(keepdims=True, dtype=np.uint64).reshape(1)
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

    def run(self, plan: Plan) -> StepResult:
        """Compute one step. `duration_s` is 0: whoever simulates time adds it."""
        return StepResult(rows=[self._run_row(plan, index, row) for index, row in enumerate(plan.rows)])

    def _run_row(self, plan: Plan, index: int, row: Row) -> RowResult:
        start, stop = int(plan.q_starts[index]), int(plan.q_starts[index + 1])
        num_cached = int(plan.kv_lens[index]) - (stop - start)
        fingerprint = self._read(plan.pages[index], num_cached)
        after: list[int] = []  # the fingerprint after each input token
        contents: list[int] = []
        inputs = zip(plan.token_ids[start:stop].tolist(), plan.positions[start:stop].tolist(), strict=True)
        for token, position in inputs:
            contents.append(_content(token, position, fingerprint))
            fingerprint = _extend(fingerprint, contents[-1], position)
            after.append(fingerprint)
        self._write(plan.slots[start:stop], contents)
        fingerprint = self._read(plan.pages[index], int(plan.kv_lens[index]))
        return result_of_row(row, fingerprint, after, self.info)

    def _read(self, pages: NDArray[np.int32], length: int) -> int:
        """The fingerprint of the first `length` slots of `pages`."""
        num_pages = -(-length // self.page_size)
        slots = self._pool[pages[:num_pages]].transpose(0, 4, 1, 2, 3, 5)  # [page, slot, head, layer, 2, dim]
        slots = slots.reshape(-1, *self._keys.shape)[:length]
        contents = ((slots ^ self._keys) * self._weights).sum(axis=(1, 2, 3, 4), dtype=np.uint64)
        positions = np.arange(length, dtype=np.uint64) * np.uint64(0x632BE59BD9B4E019)
        return (_EMPTY + int(_mix_all(contents + positions).sum(dtype=np.uint64))) & _MASK

    def _write(self, slots: NDArray[np.int64], contents: list[int]) -> None:
        values = np.array(contents, np.uint64).reshape(-1, 1, 1, 1, 1) ^ self._keys
        self._pool[slots // self.page_size, :, :, :, slots % self.page_size] = values


def result_of_row(row: Row, fingerprint: int, after: list[int], info: ModelInfo) -> RowResult:
    """Sample and report for one row, given the fingerprint at its end and after each of its inputs."""
    prompt_logprobs = None
    if row.prompt_targets is not None:
        spec = row.logprobs or LogprobSpec()
        states = after[row.target_start : row.target_start + len(row.prompt_targets)]
        prompt_logprobs = [
            _logprob(state, token, spec, info) for state, token in zip(states, row.prompt_targets, strict=True)
        ]
    if not row.samples:
        return RowResult(-1, None, prompt_logprobs)
    token = _sample(row, fingerprint, info)
    return RowResult(token, _logprob(fingerprint, token, row.logprobs, info) if row.logprobs else None, prompt_logprobs)


def _sample(row: Row, fingerprint: int, info: ModelInfo) -> int:
    sampling = row.sampling
    noise = fingerprint
    if not sampling.greedy:
        noise ^= mix(sampling.seed * 0x9E3779B97F4A7C15 + row.position & _MASK)
    if sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
        if row.history is None:
            raise ValueError(f"row of {row.rid} has a penalty but no history")
        for token in row.history:
            noise = mix((noise + token + 1) & _MASK)
        noise ^= row.num_prompt << 32
    refused: set[int] = set()
    if row.num_output < sampling.min_new_tokens:
        refused = {*info.eos_token_ids, *sampling.stop_token_ids}
    allowed = [token for token in _allowed(row.mask, info.vocab_size) if token not in refused]
    return allowed[mix(noise) % len(allowed)]


def _allowed(mask: bytes | None, vocab_size: int) -> Sequence[int]:
    if mask is None:
        return range(vocab_size)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocab_size]
    return [int(token) for token in np.flatnonzero(bits)]


def _logprob(fingerprint: int, token: int, spec: LogprobSpec, info: ModelInfo) -> TokenLogprob:
    """A made-up logprob of `token` after `fingerprint`, with alternatives as asked for."""

    def value(of: int) -> float:
        return -(mix(fingerprint ^ mix(of + 1)) >> 11) / 2.0**50

    best = sorted(((value(other), other) for other in range(info.vocab_size)), reverse=True) if spec.top else []
    return TokenLogprob(value(token), token, best[: spec.top], [(value(other), other) for other in spec.token_ids])


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request must give, whatever the settings of the server are."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    finish: Finish
    prompt_logprobs: list[TokenLogprob] | None = field(default=None)


def expected(request: Request, info: ModelInfo, max_len: int) -> Expected:
    """Generate for `request` without pages, plans or batches: token by token, up to `max_len` tokens in all."""
    sampling = request.sampling
    tokens: list[int] = []
    states: list[int] = []

    def feed(token: int) -> None:
        before = states[-1] if states else _EMPTY
        states.append(_extend(before, _content(token, len(tokens), before), len(tokens)))
        tokens.append(token)

    for token in request.prompt:
        feed(token)
    prompt_logprobs = _expected_prompt_logprobs(request, states, info)
    num_prompt = len(tokens)
    end = min(num_prompt + sampling.max_new_tokens, max_len)
    logprobs: list[TokenLogprob | None] = []
    finish = Finish("length")
    while len(tokens) < end:
        row = _sampling_row(request, tokens)
        result = result_of_row(row, states[-1], [], info)
        stops = () if sampling.ignore_eos else (*info.eos_token_ids, *sampling.stop_token_ids)
        stopped = result.token in stops and row.num_output >= sampling.min_new_tokens
        feed(result.token)
        logprobs.append(result.logprob)
        if stopped:
            finish = Finish("stop", result.token)
            break
    return Expected(tokens[num_prompt:], logprobs, finish, prompt_logprobs)


def _sampling_row(request: Request, tokens: list[int]) -> Row:
    return Row(
        rid=request.rid,
        num_new=1,
        num_cached=len(tokens) - 1,
        samples=True,
        sampling=request.sampling,
        position=len(tokens),
        history=list(tokens),
        num_prompt=len(request.prompt),
        num_output=len(tokens) - len(request.prompt),
        logprobs=request.logprobs,
    )


def _expected_prompt_logprobs(request: Request, states: list[int], info: ModelInfo) -> list[TokenLogprob] | None:
    spec = request.logprobs
    if spec is None or spec.prompt_start < 0:
        return None
    first = [TokenLogprob(None, request.prompt[0])] if spec.prompt_start == 0 else []
    positions = range(max(1, spec.prompt_start), len(request.prompt))
    return first + [_logprob(states[p - 1], request.prompt[p], spec, info) for p in positions]
