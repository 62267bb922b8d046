"""What a step, or a hand-over, means for its sequences."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.sched.state import SchedState, Seq, Status
from diptych.types import Finish, TokenLogprob


@dataclass(frozen=True, slots=True)
class Sampled:
    """`seq` has a new token. With `finish` it was the last; the pages stay until released.

    `prompt_logprobs` come once, with the first token, and only if they were asked for.
    """

    seq: Seq
    token: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class ChunkDone:
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
    if not seq.num_output:
        counters.prompt_tokens += seq.num_prompt
        counters.cached_tokens += seq.cached_tokens
    finish = _finish(state, seq, token)
    seq.tokens.append(token)
    counters.generation_tokens += 1
    if finish is not None:
        seq.move(Status.FINISHED)
        state.running.remove(seq)
    handed_out, seq.prompt_logprobs = seq.prompt_logprobs, None
    return Sampled(seq, token, logprob, handed_out, finish)


def _finish(state: SchedState, seq: Seq, token: int) -> Finish | None:
    """Does `token`, the next of `seq`, end it?"""
    sampling = seq.request.sampling
    may_stop = not sampling.ignore_eos and seq.num_output >= sampling.min_new_tokens
    if may_stop and (token in state.config.eos_token_ids or token in sampling.stop_token_ids):
        return Finish("stop", token)
    if len(seq.tokens) + 1 >= seq.max_tokens:
        return Finish("length")
    return None
