"""What is known of a request after it ran, and the meter that turns arriving chunks into TTFT and ITL. Pure."""

from __future__ import annotations

import msgspec


class Sample(msgspec.Struct, kw_only=True):
    """One request, measured. Seconds throughout; `start_s` is on the client's clock.

    `ttft_s` is None when there was no stream to time. `error` is "" for a request that succeeded, else the reason.
    `num_chunks` counts stream chunks that carried tokens: with more tokens than chunks, some chunk carried several.
    """

    start_s: float
    latency_s: float = 0.0
    ttft_s: float | None = None
    itls_s: list[float] = []
    num_chunks: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None  # None: the server did not say
    text: str = ""
    output_ids: list[int] = []
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (output tokens - 1). None where that has no meaning."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)


class Meter:
    """Times the tokens of one stream.

    The first chunk with a token sets the TTFT. A later chunk with k tokens gives k latencies, each a k-th of
    the gap, as SGLang's benchmark counts them.
    """

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._last_s = start_s
        self.ttft_s: float | None = None
        self.itls_s: list[float] = []
        self.num_tokens = 0
        self.num_chunks = 0

    def add(self, now_s: float, num_tokens: int) -> None:
        """`num_tokens` more tokens were here at `now_s`; none or fewer: the chunk carried no token and is not timed."""
        if num_tokens <= 0:
            return
        if self.ttft_s is None:
            self.ttft_s = now_s - self._start_s
        elif num_tokens == 1:
            self.itls_s.append(now_s - self._last_s)
        else:
            self.itls_s.extend([(now_s - self._last_s) / num_tokens] * num_tokens)
        self._last_s = now_s
        self.num_tokens += num_tokens
        self.num_chunks += 1
