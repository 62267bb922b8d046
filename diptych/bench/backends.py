"""What the three endpoints want and answer: request bodies out, frames in. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from diptych.bench.dataset import Row


@dataclass(frozen=True, slots=True)
class Options:
    """How every request of a run is asked for."""

    model: str = ""
    stream: bool = True
    ignore_eos: bool = True


class Frame(msgspec.Struct, frozen=True):
    """What one chunk of a stream, or a whole reply, says.

    `total_tokens` counts output tokens so far, where the server says; else `new_tokens` counts those of this chunk.
    `timed` is False for a chunk that only reports (usage after the last token). `text` is the whole text so far if
    `cumulative`, else this chunk's. `finish` is the reason a request ended, "" while it runs.
    """

    text: str = ""
    cumulative: bool = False
    timed: bool = True
    total_tokens: int | None = None
    new_tokens: int = 0
    output_ids: list[int] = []
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish: str = ""
    error: str = ""


class Backend(Protocol):
    path: str

    def body(self, row: Row, options: Options) -> dict[str, Any]: ...
    def read(self, payload: bytes | bytearray) -> Frame: ...


# ---- /generate ---------------------------------------------------------------------------------------------------


class _Finish(msgspec.Struct):
    type: str = ""
    message: str | None = None


class _Meta(msgspec.Struct):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: _Finish | None = None


class _Generated(msgspec.Struct):
    text: str = ""
    output_ids: msgspec.Raw = msgspec.Raw(b"[]")  # grows with every frame: read from the last one only
    meta_info: _Meta | None = None
    error: Any = None


class Generate:
    """SGLang's native endpoint; frames are cumulative, and each says how many tokens there are so far."""

    path = "/generate"

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Generated)
        self._ids = msgspec.json.Decoder(list[int] | None)

    def body(self, row: Row, options: Options) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": row.output_len, "ignore_eos": options.ignore_eos}
        key = "text" if isinstance(row.prompt, str) else "input_ids"
        return {key: row.prompt, "sampling_params": sampling, "stream": options.stream}

    def read(self, payload: bytes | bytearray) -> Frame:
        reply = self._decoder.decode(payload)
        meta = reply.meta_info or _Meta()
        finish = meta.finish_reason or _Finish()
        error = error_text(reply.error)
        if finish.type == "abort":
            error = f"aborted: {finish.message or 'no reason given'}"
        return Frame(
            text=reply.text,
            cumulative=True,
            total_tokens=meta.completion_tokens,
            output_ids=(self._ids.decode(reply.output_ids) or []) if finish.type else [],
            prompt_tokens=meta.prompt_tokens,
            cached_tokens=meta.cached_tokens,
            finish=finish.type,
            error=error,
        )


# ---- OpenAI ------------------------------------------------------------------------------------------------------


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _OpenAI:
    """What both OpenAI endpoints share: chunks carry deltas, and usage comes with or after the last one."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Chunk)

    def common(self, row: Row, options: Options) -> dict[str, Any]:
        body = {"model": options.model, "temperature": 0.0, "ignore_eos": options.ignore_eos, "stream": options.stream}
        return {**body, "stream_options": {"include_usage": True}} if options.stream else body

    def read(self, payload: bytes | bytearray) -> Frame:
        chunk = self._decoder.decode(payload)
        usage = chunk.usage or _Usage()
        choice = chunk.choices[0] if chunk.choices else _Choice()
        said = choice.delta or choice.message or _Message()
        text = (choice.text or "") + (said.reasoning_content or "") + (said.content or "")
        token_ids = choice.token_ids or []
        carries = bool(text or said.tool_calls or token_ids)
        error = error_text(chunk.error)
        if choice.finish_reason == "abort":
            error = "aborted: no reason given"
        return Frame(
            text=text,
            timed=carries,
            total_tokens=usage.completion_tokens,
            new_tokens=len(token_ids) or int(carries),
            output_ids=token_ids,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None,
            finish=choice.finish_reason or "",
            error=error,
        )


class Completions(_OpenAI):
    path = "/v1/completions"

    def body(self, row: Row, options: Options) -> dict[str, Any]:
        return {**self.common(row, options), "prompt": row.prompt, "max_tokens": row.output_len}


class Chat(_OpenAI):
    path = "/v1/chat/completions"

    def body(self, row: Row, options: Options) -> dict[str, Any]:
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        return {**self.common(row, options), "messages": messages, "max_completion_tokens": row.output_len}


def error_text(error: Any) -> str:
    """The reason inside an error envelope: OpenAI's `{"message", "code"}`, or a plain value; "" for none."""
    if not error:
        return ""
    if isinstance(error, dict):
        code, message = error.get("code"), error.get("message")
        return ": ".join(str(part) for part in (code, message) if part) or "an error without a message"
    return str(error)


BACKENDS: dict[str, type[Generate] | type[Completions] | type[Chat]] = {
    "sglang": Generate,
    "sglang-oai": Completions,
    "sglang-oai-chat": Chat,
}
