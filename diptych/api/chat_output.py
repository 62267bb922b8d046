"""What a chat model wrote, taken apart: thoughts, text and tool calls; and the stream's chunks that carry them."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any, NamedTuple

from diptych.api.wire import encode
from diptych.text.reasoning import ReasoningParser, starts_inside
from diptych.text.toolcalls import ToolCall, ToolCallParser


class Piece(NamedTuple):
    """`kind`: content | reasoning | call. For a call, `call` is set."""

    kind: str
    text: str = ""
    call: ToolCall | None = None


class OutputRules(NamedTuple):
    """How the output of one request is read."""

    reasoning_parser: str  # "": thoughts stay in the text
    stream_reasoning: bool  # False: a thought comes out whole
    tools: Collection[str]  # names that may be called; empty: calls stay in the text
    several_calls: bool
    prompt: str  # the prompt's text, whose end says whether the output begins within a thought

    @property
    def plain(self) -> bool:
        return not self.reasoning_parser and not self.tools


class OutputReader:
    """One choice's output in pieces; `finish` at the end."""

    __slots__ = ("_calls", "_reasoning", "_rules", "_thought", "num_calls")

    def __init__(self, rules: OutputRules) -> None:
        self._rules = rules
        inside = bool(rules.reasoning_parser) and starts_inside(rules.reasoning_parser, rules.prompt)
        self._reasoning = ReasoningParser(inside=inside) if rules.reasoning_parser else None
        self._calls = ToolCallParser(rules.tools) if rules.tools else None
        self._thought = ""  # held back while stream_reasoning is off
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        reasoning, content = self._reasoning.push(text) if self._reasoning else ("", text)
        return self._pieces(reasoning, content, last=False)

    def finish(self) -> list[Piece]:
        reasoning, content = self._reasoning.finish() if self._reasoning else ("", "")
        return self._pieces(reasoning, content, last=True)

    def _pieces(self, reasoning: str, content: str, *, last: bool) -> list[Piece]:
        pieces = []
        if not self._rules.stream_reasoning:
            self._thought += reasoning
            reasoning = ""
            if content or last:
                reasoning, self._thought = self._thought, ""
        if reasoning:
            pieces.append(Piece("reasoning", reasoning))
        if self._calls is None:
            return [*pieces, Piece("content", content)] if content else pieces
        found = [*self._calls.push(content), *(self._calls.finish() if last else [])]
        for item in found:
            if isinstance(item, str):
                pieces.append(Piece("content", item))
            elif self._rules.several_calls or not self.num_calls:
                self.num_calls += 1
                pieces.append(Piece("call", call=item))
        return pieces


def read_all(text: str, rules: OutputRules) -> tuple[str, str, list[dict[str, Any]]]:
    """(content, reasoning, tool calls) of a whole output."""
    if rules.plain:
        return text, "", []
    reader = OutputReader(rules)
    pieces = [*reader.push(text), *reader.finish()]
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return content, reasoning, [call_json(piece.call) for piece in pieces if piece.call is not None]


def call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": new_call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Chunks:
    """Events of one chat stream. What every chunk of the stream shares is encoded once."""

    def __init__(self, reply_id: str, created: int, model: str) -> None:
        head = {"id": reply_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        # most chunks of most streams are this one
        self._content_head = self._head + b'{"index":0,"delta":{"role":null,"content":'
        self._content_tail = (
            b',"reasoning_content":null,"tool_calls":null},'
            b'"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}\n\n'
        )

    def content(self, index: int, text: str, logprobs: bytes = b"null", usage: bytes = b"null") -> bytes:
        if not index and logprobs == usage == b"null":
            return self._content_head + encode(text) + self._content_tail
        delta = b'{"role":null,"content":' + encode(text) + b',"reasoning_content":null,"tool_calls":null}'
        return self._chunk(index, delta, logprobs, b"null", b"null", usage)

    def reasoning(self, index: int, text: str, logprobs: bytes = b"null", usage: bytes = b"null") -> bytes:
        delta = b'{"role":null,"content":null,"reasoning_content":' + encode(text) + b',"tool_calls":null}'
        return self._chunk(index, delta, logprobs, b"null", b"null", usage)

    def role(self, index: int, usage: bytes = b"null") -> bytes:
        delta = b'{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null}'
        return self._chunk(index, delta, b"null", b"null", b"null", usage)

    def call(self, index: int, number: int, call: ToolCall, logprobs: bytes = b"null", usage: bytes = b"null") -> bytes:
        """Two events: name and id first, then the arguments."""
        first = {
            "index": number,
            "id": new_call_id(),
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        rest = {
            "index": number,
            "id": None,
            "type": "function",
            "function": {"name": None, "arguments": call.arguments},
        }
        head = b'{"role":null,"content":null,"reasoning_content":null,"tool_calls":['
        return self._chunk(index, head + encode(first) + b"]}", logprobs, b"null", b"null", usage) + self._chunk(
            index, head + encode(rest) + b"]}", b"null", b"null", b"null", usage
        )

    def end(self, index: int, reason: str, matched: int | str | None, usage: bytes = b"null") -> bytes:
        delta = b'{"role":null,"content":null,"reasoning_content":null,"tool_calls":null}'
        return self._chunk(index, delta, b"null", encode(reason), encode(matched), usage)

    def usage(self, usage: bytes) -> bytes:
        return self._head + b'],"usage":' + usage + b"}\n\n"

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, reason: bytes, matched: bytes, usage: bytes) -> bytes:
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b,"matched_stop":%b}],"usage":%b}\n\n' % (
            self._head,
            index,
            delta,
            logprobs,
            reason,
            matched,
            usage,
        )
