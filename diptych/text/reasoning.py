"""Split a model's output into what it thought and what it said: `<think>…</think>` before the answer.

Works on text in pieces; the result does not depend on the pieces. White space around the thought belongs to neither
part.
"""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_ALWAYS_THINKING = frozenset({"qwen3-thinking", "deepseek-r1"})  # their templates open the thought in the prompt


class Parts(NamedTuple):
    reasoning: str
    content: str


def starts_inside(parser: str, prompt: str) -> bool:
    """Whether the output begins within a thought, given the prompt it continues. Takes the last characters only."""
    tail = prompt[-64:].rstrip()
    return tail.endswith(OPEN) or (parser in _ALWAYS_THINKING and not tail.endswith(CLOSE))


def thinking_is_over(prompt: str) -> bool:
    """Whether the prompt already holds a closed thought (thinking switched off)."""
    return prompt[-64:].rstrip().endswith(CLOSE)


def partial_tag(text: str, tag: str) -> int:
    """Length of the longest proper prefix of `tag` that `text` ends with."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[len(text) - length :]):
            return length
    return 0


class ReasoningParser:
    """Feed output with `push`; `finish` at the end."""

    __slots__ = ("_held", "_state", "_thought")

    def __init__(self, *, inside: bool) -> None:
        self._state = "inside" if inside else "start"  # start | inside | gap (after the thought) | content
        self._held = ""
        self._thought = False  # some reasoning has come out, so white space in front of more belongs to it

    def push(self, text: str) -> Parts:
        if self._state == "content":
            return Parts("", text)
        self._held += text
        return self._start() if self._state == "start" else self._inside() if self._state == "inside" else self._gap()

    def finish(self) -> Parts:
        held, self._held = self._held, ""
        if self._state == "inside":
            return Parts(held.rstrip() if self._thought else held.strip(), "")
        return Parts("", "" if self._state == "gap" else held)

    def _start(self) -> Parts:
        """Nothing but white space so far: is it a thought?"""
        body = self._held.lstrip()
        if body.startswith(OPEN):
            self._state, self._held = "inside", body
            return self._inside()
        if OPEN.startswith(body):
            return Parts("", "")
        self._state = "content"
        held, self._held = self._held, ""
        return Parts("", held)

    def _inside(self) -> Parts:
        if not self._thought:
            body = self._held.lstrip()
            while body.startswith(OPEN):  # models whose prompt opens the thought may open it again
                body = body[len(OPEN) :].lstrip()
            self._held = body
            if OPEN.startswith(body):
                return Parts("", "")
        before, closed, after = self._held.partition(CLOSE)
        if closed:
            self._state, self._held = "gap", after
            reasoning = before.rstrip()
            return Parts(reasoning, self._gap().content)
        end = len(before) - partial_tag(before, CLOSE)
        end = len(before[:end].rstrip())
        self._held = before[end:]
        self._thought = self._thought or end > 0
        return Parts(before[:end], "")

    def _gap(self) -> Parts:
        content = self._held.lstrip()
        self._held = ""
        if content:
            self._state = "content"
        return Parts("", content)
