"""Log-probabilities in the three shapes that clients know: chat, text completions, native."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from diptych.api.wire import encode
from diptych.text.tokenizer import Tokenizer
from diptych.types import TokenLogprob

_LEAST = -9999.0  # JSON has no minus infinity; OpenAI writes this


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)


def chat_entries(items: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """OpenAI chat: logprobs.content."""
    return [
        {
            **_chat_token(item.token, item.logprob, tokenizer),
            "top_logprobs": [_chat_token(token, logprob, tokenizer) for logprob, token in item.top],
        }
        for item in items
    ]


def _chat_token(token: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": finite(logprob)}


def completion_logprobs(items: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """OpenAI text completions; `offset` is where the first token's text begins. The token itself is always among the
    alternatives.
    """
    tokens = [tokenizer.token_text(item.token) for item in items]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    top: list[dict[str, float | None] | None] = []
    for item, text in zip(items, tokens, strict=True):
        if item.logprob is None:
            top.append(None)
            continue
        alternatives = {tokenizer.token_text(token): finite(logprob) for logprob, token in item.top}
        alternatives.setdefault(text, finite(item.logprob))
        top.append(alternatives)
    return {
        "text_offset": offsets,
        "token_logprobs": [finite(item.logprob) for item in items],
        "tokens": tokens,
        "top_logprobs": top,
    }


class NativeLogprobs:
    """One list of native log-probabilities that grows; kept as JSON, so that a cumulative frame costs a copy and no
    more.

    `texts`: write each token's text, or null.
    """

    def __init__(self, tokenizer: Tokenizer, *, texts: bool, top: bool, chosen: bool) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._kinds = ["token", *(["top"] if top else []), *(["token_ids"] if chosen else [])]
        self._parts: dict[str, list[bytes]] = {kind: [] for kind in self._kinds}

    def extend(self, items: Sequence[TokenLogprob]) -> None:
        for item in items:
            self._parts["token"].append(encode(self._entry(item.logprob, item.token)))
            if "top" in self._parts:
                self._parts["top"].append(self._many(item, item.top))
            if "token_ids" in self._parts:
                self._parts["token_ids"].append(self._many(item, item.chosen))

    def fields(self, side: str) -> dict[str, msgspec.Raw]:
        """The lists as parts of meta_info; `side` is input or output."""
        return {
            f"{side}_{kind}_logprobs": msgspec.Raw(b"[" + b",".join(self._parts[kind]) + b"]") for kind in self._kinds
        }

    def _entry(self, logprob: float | None, token: int) -> list[Any]:
        return [finite(logprob), token, self._tokenizer.token_text(token) if self._texts else None]

    def _many(self, item: TokenLogprob, pairs: Sequence[tuple[float, int]]) -> bytes:
        return b"null" if item.logprob is None else encode([self._entry(logprob, token) for logprob, token in pairs])
