"""Problems of a task, and whether a reply solves one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recipes.demo import arithmetic, copying, extract, lookup, smalltalk, tools
from recipes.demo.problem import TASKS, Problem, draw

MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": arithmetic.make,
    "copy": copying.make,
    "lookup": lookup.make,
    "extract": extract.make,
    "tool_call": tools.make_call,
    "tool_answer": tools.make_answer,
    "smalltalk": smalltalk.make,
}


@dataclass(frozen=True)
class Reply:
    """A reply taken apart: what was thought (None without a think block), the text, and the calls of tools."""

    thought: str | None
    text: str
    calls: list[dict[str, Any]] = field(default_factory=list)


def problems(task: str, n: int, seed: int = 0, split: str = "held_out") -> list[Problem]:
    """`n` problems of `task` from `split` (`train` or `held_out`); the same arguments give the same problems."""
    if task not in MAKERS:
        raise ValueError(f"task must be one of {TASKS}, not {task!r}")
    rng = random.Random(f"{task} {seed} {split}")
    return [draw(MAKERS[task], rng, split) for _ in range(n)]


def parse_reply(
    content: str | None, reasoning: str | None = None, tool_calls: list[dict[str, Any]] | None = None
) -> Reply:
    """A reply from a chat message, whether or not the server has split off reasoning and tool calls.

    `tool_calls` is as OpenAI's API gives it. A call whose JSON does not parse is left in the text.
    """
    text = content or ""
    thought = reasoning
    match = re.match(r"\s*<think>(.*?)(?:</think>|\Z)", text, re.DOTALL)
    if match:
        thought, text = match.group(1).strip("\n"), text[match.end() :]
    calls = [_call(call.get("function", call)) for call in tool_calls or []]
    for block in re.findall(r"<tool_call>.*?</tool_call>", text, re.DOTALL):
        try:
            calls.append(_call(json.loads(block.removeprefix("<tool_call>").removesuffix("</tool_call>"))))
        except (ValueError, KeyError, TypeError):
            continue
        text = text.replace(block, "")
    return Reply(thought, text.strip(), calls)


def _call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    return {"name": function["name"], "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def score(problem: Problem, reply: Reply, thinking: bool | None = None) -> bool:
    """Whether `reply` solves `problem`; with `thinking` given, also whether it thought just when it should."""
    if thinking is not None and bool(reply.thought) != thinking:
        return False
    return _CHECKS[problem.task](problem.expect, reply)


def _same_number(expect: int, reply: Reply) -> bool:
    numbers = re.findall(r"-?\d+", reply.text)
    return bool(numbers) and int(numbers[-1]) == expect


def _same_text(expect: str, reply: Reply) -> bool:
    return reply.text == expect


def _names_all(expect: list[str], reply: Reply) -> bool:
    return all(re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", reply.text) for value in expect)


def _same_object(expect: dict[str, Any], reply: Reply) -> bool:
    try:
        return bool(json.loads(reply.text) == expect)
    except ValueError:
        return False


def _same_call(expect: dict[str, Any], reply: Reply) -> bool:
    return reply.calls == [expect]


_CHECKS: dict[str, Callable[[Any, Reply], bool]] = {
    "arithmetic": _same_number,
    "copy": _same_text,
    "lookup": _names_all,
    "extract": _same_object,
    "tool_call": _same_call,
    "tool_answer": _names_all,
    "smalltalk": _same_text,
}
