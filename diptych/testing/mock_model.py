"""A model without a model: what it makes of some tokens, without pages, plans or batches.

The key or value of a token is a fingerprint of that token, its position and everything before it; the next token is a
fingerprint of them all, of the sampling parameters and of the mask. `mock_runner` computes the same from pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diptych.types import Finish, LogprobSpec, ModelInfo, Request, Row, RowResult, TokenLogprob

U64 = NDArray[np.uint64]
MASK = (1 << 64) - 1
EMPTY = 0x9E3779B97F4A7C15  # fingerprint of no tokens
PLACE = 0x632BE59BD9B4E019  # by which positions are mixed in


def mix(value: int) -> int:
    """A bijection of 64-bit numbers that looks random (the finalizer of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def content_of(token: int, position: int, before: int) -> int:
    """What the KV of a token stands for, given the fingerprint of everything before it."""
    return mix((before + token * 0xD1342543DE82EF95 + position * 0x2545F4914F6CDD1D) & MASK)


def extend(fingerprint: int, content: int, position: int) -> int:
    """The fingerprint after one more slot. A sum, for numpy's sake; order counts because positions are mixed in."""
    return (fingerprint + mix((content + position * PLACE) & MASK)) & MASK


def contents_of(tokens: Sequence[int]) -> U64:
    """What each of `tokens` must have left in the cache."""
    contents: list[int] = []
    fingerprint = EMPTY
    for position, token in enumerate(tokens):
        contents.append(content_of(token, position, fingerprint))
        fingerprint = extend(fingerprint, contents[-1], position)
    return np.array(contents, np.uint64)


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
        noise ^= mix(sampling.seed * 0x9E3779B97F4A7C15 + row.position & MASK)
    if sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
        if row.history is None:
            raise ValueError(f"row of {row.rid} has a penalty but no history")
        for token in row.history:
            noise = mix((noise + token + 1) & MASK)
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


def expected(
    request: Request, info: ModelInfo, max_len: int, mask: Callable[[Sequence[int]], bytes] | None = None
) -> Expected:
    """Generate for `request` without pages, plans or batches: token by token, up to `max_len` tokens in all.

    `mask`: what may follow some tokens, for a request with a grammar.
    """
    sampling = request.sampling
    tokens: list[int] = []
    states: list[int] = []

    def feed(token: int) -> None:
        before = states[-1] if states else EMPTY
        states.append(extend(before, content_of(token, len(tokens), before), len(tokens)))
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
        row.mask = mask(tokens) if mask is not None else None
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
