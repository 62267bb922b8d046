"""Thoughts and tool calls come out the same whatever the pieces; what is malformed stays text."""

from __future__ import annotations

import json
import random

import pytest

from diptych.text.reasoning import ReasoningParser, starts_inside, thinking_is_over
from diptych.text.toolcalls import ToolCall, ToolCallParser


def cuts(text: str, seed: int) -> list[str]:
    """`text` in random pieces; seed 0: whole, seed 1: character by character."""
    if seed == 0:
        return [text]
    draw = random.Random(seed)
    pieces, at = [], 0
    while at < len(text):
        step = 1 if seed == 1 else draw.randrange(1, 9)
        pieces.append(text[at : at + step])
        at += step
    return pieces


def split(text: str, seed: int, *, inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(inside=inside)
    parts = [*[parser.push(piece) for piece in cuts(text, seed)], parser.finish()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nhm, 1 < 2\n</think>\n\nhello", False, ("hm, 1 < 2", "hello")),
        ("\n <think>a</think>b", False, ("a", "b")),
        ("a thought\n</think>\n\nb\n", True, ("a thought", "b\n")),
        ("<think>\nagain</think>b", True, ("again", "b")),
        ("no thought at all </think>", False, ("", "no thought at all </think>")),
        ("<think>\ncut short ", False, ("cut short", "")),
        ("<think>\ncut in a tag</thi", False, ("cut in a tag</thi", "")),
        ("<think>\n\n</think>\n\nplain", False, ("", "plain")),
        ("<thin air>", False, ("", "<thin air>")),
        ("<thi", False, ("", "<thi")),
        ("  indented", False, ("", "  indented")),
        ("<think>a </ b <</think>c<think>d</think>", False, ("a </ b <", "c<think>d</think>")),
        ("<think>only</think>\n", False, ("only", "")),
        ("<think> <think>\n<think>a<think>", False, ("a<think>", "")),
        ("", False, ("", "")),
    ],
)
def test_reasoning(text: str, inside: bool, expected: tuple[str, str], seed: int) -> None:
    assert split(text, seed, inside=inside) == expected


def test_where_the_output_begins() -> None:
    assert starts_inside("qwen3", "<|im_start|>assistant\n<think>\n")
    assert not starts_inside("qwen3", "<|im_start|>assistant\n")
    assert starts_inside("deepseek-r1", "assistant\n")
    assert not starts_inside("deepseek-r1", "<think>\n\n</think>\n\n")
    assert thinking_is_over("<think>\n\n</think>\n\n")
    assert not thinking_is_over("assistant\n")


def calls(text: str, seed: int) -> list[str | ToolCall]:
    parser = ToolCallParser({"weather", "time"})
    found: list[str | ToolCall] = []
    for item in [*[x for piece in cuts(text, seed) for x in parser.push(piece)], *parser.finish()]:
        if isinstance(item, str) and found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


WEATHER = ToolCall("weather", '{"city": "Köln"}')
TIME = ToolCall("time", "{}")
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = '<tool_call>{"name": "time"}</tool_call>'


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text", ["just text"]),
        ("text with an end \n", ["text with an end \n"]),
        (ONE, [WEATHER]),
        (f"{ONE}\n{TWO}\n", [WEATHER, TIME]),
        (f"Let me see.\n\n{ONE}", ["Let me see.", WEATHER]),
        (f"a\n{ONE}\nb\n{TWO}", ["a", WEATHER, "b", TIME]),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}',
            ['<tool_call>{"name": "weather", "arguments": {"city": "Köln"}'],
        ),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}', [WEATHER]),
        ("<tool_call>not json</tool_call> more", ["<tool_call>not json</tool_call> more"]),
        ('<tool_call>{"name": "unknown"}</tool_call>', ['<tool_call>{"name": "unknown"}</tool_call>']),
        (f"<tool_call>broken</tool_call>{ONE}", ["<tool_call>broken</tool_call>", WEATHER]),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>\\""}}</tool_call>',
            [ToolCall("weather", json.dumps({"city": '</tool_call>"'}))],
        ),
        ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Köln\\"}"}</tool_call>', [WEATHER]),
        ('<tool_call>{"name": "weather", "parameters": {"city": "Köln"}}</tool_call>', [WEATHER]),
        (
            '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
            ['<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'],
        ),
        ("<tool_call>[]</tool_call>", ["<tool_call>[]</tool_call>"]),
        ("a <tool_ b", ["a <tool_ b"]),
        ("a <tool_", ["a <tool_"]),
        ("", []),
    ],
)
def test_tool_calls(text: str, expected: list[str | ToolCall], seed: int) -> None:
    assert calls(text, seed) == expected


def test_deep_nesting_stays_text() -> None:
    text = "<tool_call>" + '{"a":' * 50_000 + "</tool_call>"
    assert calls(text, 0) == [text]
