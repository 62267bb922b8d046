"""Find tool calls in a model's output: Hermes form, as Qwen writes it.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Berlin"}}
    </tool_call>

Works on text in pieces; the result does not depend on the pieces. A call comes out whole, once it is closed and proves
to be one: a block that is no valid call of a known tool stays text, exactly as written. White space around calls
belongs to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

import msgspec

from diptych.text.reasoning import partial_tag

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class ToolCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str  # JSON object


class ToolCallParser:
    """Feed output with `push`; `finish` at the end. Both return text pieces and calls in their order; no piece is
    empty.
    """

    __slots__ = ("_called", "_held", "_inside", "_names", "_scanned")

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._inside = False  # _held begins with OPEN
        self._called = False
        self._scanned = 0  # of _held: no CLOSE begins before here

    def push(self, text: str) -> list[str | ToolCall]:
        self._held += text
        found: list[str | ToolCall] = []
        while self._close(found) if self._inside else self._open(found):
            pass
        return found

    def finish(self) -> list[str | ToolCall]:
        held, self._held = self._held, ""
        if self._inside:
            call = self._call(held[len(OPEN) :])
            return [call or held]
        return [held] if held and not (self._called and held.isspace()) else []

    def _open(self, found: list[str | ToolCall]) -> bool:
        """Outside a call: pass on text up to the next opening. True if there is one."""
        before, opened, after = self._held.partition(OPEN)
        if opened:
            self._text(before.rstrip(), found)
            self._inside, self._held, self._scanned = True, OPEN + after, len(OPEN)
            return True
        if self._called and before.isspace():
            return False
        end = len(before) - partial_tag(before, OPEN)
        end = len(before[:end].rstrip())
        self._text(before[:end], found)
        self._held = before[end:]
        return False

    def _text(self, text: str, found: list[str | ToolCall]) -> None:
        if self._called:
            text = text.lstrip()
        if text:
            self._called = False
            found.append(text)

    def _close(self, found: list[str | ToolCall]) -> bool:
        """Inside a call: take it once it is closed. True if it was."""
        position = self._held.find(CLOSE, self._scanned)
        if position < 0:
            self._scanned = max(len(OPEN), len(self._held) - len(CLOSE) + 1)
            return False
        body = self._held[len(OPEN) : position]
        end = position + len(CLOSE)
        call = self._call(body)
        if call is None and '"' in _STRING.sub("", body):  # the closing tag stands within a string of the arguments
            self._scanned = end
            return True
        self._inside = False
        if call is None:
            self._text(self._held[:end], found)
        else:
            found.append(call)
            self._called = True
        self._held = self._held[end:]
        return True

    def _call(self, body: str) -> ToolCall | None:
        try:
            value = json.loads(body, strict=False, parse_constant=_no_constant)
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = json.loads(arguments, strict=False, parse_constant=_no_constant)
        except (ValueError, AttributeError, RecursionError):
            return None
        if value.get("name") not in self._names or not isinstance(arguments, dict):
            return None
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def forced_call_grammar(tools: dict[str, dict[str, Any]], *, several: bool, tags_are_tokens: bool) -> str:
    """A Lark grammar for an output that is a call of one of `tools` (name to JSON schema of the arguments).

    `tags_are_tokens`: <tool_call> is a single token of the tokenizer, which a grammar must name and cannot spell.
    """
    calls = []
    for name, schema in tools.items():
        opening = json.dumps('{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": ', ensure_ascii=False)
        calls.append(f"{opening} %json {json.dumps(schema, ensure_ascii=False)}")
    first, last = (OPEN, CLOSE) if tags_are_tokens else (f'"{OPEN}"', f'"{CLOSE}"')
    repeat = "(GAP call)*" if several else ""
    body = "\n  | ".join(calls)
    return f'start: GAP? call {repeat}\ncall: {first} "\\n" body "}}\\n" {last}\nbody: {body}\nGAP: /[ \\n]{{1,2}}/\n'
