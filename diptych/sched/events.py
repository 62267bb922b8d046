"""What a step, or a hand-over, means for its sequences."""

from __future__ import annotations

import msgspec

from diptych.sched.state import SchedState, Seq, Status
from diptych.types import Finish, TokenLogprob


class Sampled(msgspec.Struct, frozen=True):
    """`seq` has a new token. With `finish` it was the last; the pages stay until released.

    `prompt_logprobs` come once, with the first token, and only if they were asked for.
    """

    seq: Seq
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None


class ChunkDone(msgspec.Struct, frozen=True):
    """The KV of the prompt is now complete in pages `seq.pages[first_page:last_page]`.

    The events of a sequence name each page once, in order, from page 0 on, even if it is retracted in between; the last
    event includes the partly filled last page, and comes before the first token.
    """

    seq: Seq
    first_page: int
    last_page: int


Event = Sampled | ChunkDone


def accept_token(state: SchedState, seq: Seq, token: int, logprob: TokenLogprob | None) -> Sampled:
    """Append a sampled token to `seq`, and end it if it was the last: FINISHED, out of the batch, pages still held."""
    counters = state.counters
    tokens = seq.tokens
    length = len(tokens)
    if length == seq.num_prompt:
        counters.prompt_tokens += length
        counters.cached_tokens += seq.cached_tokens
    finish = None
    if token in seq.stops and length >= seq.min_tokens:
        finish = Finish("stop", token)
    elif length + 1 >= seq.max_tokens:
        finish = Finish("length")
    tokens.append(token)
    counters.generation_tokens += 1
    if finish is not None:
        seq.move(Status.FINISHED)
        state.running.remove(seq)
    handed_out, seq.prompt_logprobs = seq.prompt_logprobs, None
    return Sampled(seq, token, logprob, handed_out, finish)
