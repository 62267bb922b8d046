"""Twice the text costs about twice the time: no client can choose a text that costs more."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from diptych.text.reasoning import ReasoningParser
from diptych.text.stops import StopMatcher
from diptych.text.template import ChatTemplate
from diptych.text.tokenizer import Tokenizer
from diptych.text.toolcalls import ToolCallParser


def feed_stops(n: int) -> None:
    matcher = StopMatcher(["a" * 200 + "b", "a" * 100 + "c"])
    for _ in range(n):
        matcher.push("aaaa")


def feed_reasoning(n: int) -> None:
    parser = ReasoningParser(inside=True)
    for _ in range(n):
        parser.push("</thin ")


def feed_calls(n: int) -> None:
    parser = ToolCallParser({"f"})
    parser.push('<tool_call>{"name": "f", "arguments": {"x": "')
    for _ in range(n):
        parser.push("</tool_cal")


CASES: dict[str, tuple[Callable[[int], None], int]] = {
    "stops": (feed_stops, 4000),
    "reasoning": (feed_reasoning, 10000),
    "tool calls": (feed_calls, 5000),
}


def seconds(work: Callable[[int], None], n: int) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        work(n)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("name", CASES)
def test_parsers(name: str) -> None:
    work, n = CASES[name]
    assert seconds(work, 2 * n) < 3 * seconds(work, n) + 0.005


@pytest.mark.parametrize("text", ["a", "hello world ", "\u0301", "<|im_start|>", "0", " "])
def test_tokenizer(demo: Tokenizer, text: str) -> None:
    def encode(n: int) -> None:
        demo.encode(text * n, special=False)

    assert seconds(encode, 20000) < 3 * seconds(encode, 10000) + 0.02


def test_template(demo: Tokenizer) -> None:
    assert demo.chat_template is not None
    template = ChatTemplate(demo.chat_template, demo.special)

    def render(n: int) -> None:
        template.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": "</think>y"}] * n)

    assert seconds(render, 800) < 3 * seconds(render, 400) + 0.01
