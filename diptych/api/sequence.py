"""One sequence: what is to be generated, and what comes of the engine's outputs.

A `Job` is one sequence to generate; a `Delta` is what one step of the engine added to it, as text, or several steps if
its reader is slow. Stop strings are found here, token by token: the tokens that completed the match count, later ones
do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diptych.text.stops import StopMatcher
from diptych.text.tokenizer import Tokenizer
from diptych.types import Finish, Output, Request, TokenLogprob


@dataclass(slots=True, frozen=True)
class Job:
    """One sequence to generate. With `discard` the one token that the engine makes is not part of the answer."""

    request: Request
    skip_special: bool = True
    keep_stop: bool = False
    discard: bool = False


@dataclass(slots=True)
class Delta:
    """What a step added. Counts are of the whole sequence so far; the last Delta of a sequence has `finish`."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob] | None
    finish: Finish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    num_retractions: int


@dataclass(slots=True)
class Result:
    """A whole sequence."""

    finish: Finish
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    e2e_s: float = 0.0

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    def as_delta(self) -> Delta:
        """The whole sequence as if one step had made it."""
        return Delta(
            self.text,
            self.tokens,
            self.logprobs,
            self.prompt_logprobs,
            self.finish,
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self.num_retractions,
        )


class Transcript:
    """Turns the engine's outputs of one job into Deltas."""

    __slots__ = ("_completion", "_detokenizer", "_job", "_prompt", "_stops")

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._detokenizer = tokenizer.detokenizer(skip_special=job.skip_special)
        self._stops = StopMatcher(job.request.sampling.stop, keep_stop=job.keep_stop)
        self._completion = 0
        self._prompt = len(job.request.prompt)

    def take(self, output: Output) -> Delta:
        tokens, logprobs, finish = output.tokens, output.logprobs or [], output.finish
        if self._job.discard:
            tokens, logprobs = [], []
            finish = Finish("length") if finish is not None and finish.type != "abort" else finish
        silent = finish is not None and self._is_silent_stop(finish, tokens)
        text = ""
        shown = tokens[:-1] if silent else tokens
        if not self._job.request.sampling.stop:
            text = self._detokenizer.push_all(shown)
            shown = []
        for count, token in enumerate(shown, start=1):
            text += self._stops.push(self._detokenizer.push(token))
            if self._stops.matched is not None:
                tokens, logprobs = tokens[:count], logprobs[:count]
                finish = Finish("stop", matched=self._stops.matched)
                break
        if finish is not None and self._stops.matched is None:
            text += self._stops.push(self._detokenizer.finish())
            if self._stops.matched is not None:
                finish = Finish("stop", matched=self._stops.matched)
            else:
                text += self._stops.finish()
        self._completion += len(tokens)
        return Delta(
            text,
            tokens,
            logprobs,
            output.prompt_logprobs,
            finish,
            output.prompt_tokens or self._prompt,
            self._completion,
            output.cached_tokens,
            output.num_retractions,
        )

    def _is_silent_stop(self, finish: Finish, tokens: list[int]) -> bool:
        """The last token ended the sequence and is not part of the text."""
        if finish.type != "stop" or self._job.keep_stop or not tokens:
            return False
        return isinstance(finish.matched, int) and finish.matched == tokens[-1]
