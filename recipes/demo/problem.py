"""What one problem of the demo model is, and which side of the held-out split it lies on."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TASKS = ("arithmetic", "copy", "lookup", "extract", "tool_call", "tool_answer", "smalltalk")
SPLITS = ("train", "held_out")
HELD_OUT_SHARE = 10  # one identity in ten is held out


@dataclass(frozen=True)
class Problem:
    """One question with its reference reply.

    `identity` names what is asked, apart from what surrounds it; the split depends on it alone. `thought` is the text of
    the think block (used when thinking is on), `answer` what follows it. `expect` is what `score` compares with.
    """

    task: str
    identity: str
    messages: list[dict[str, Any]]
    thought: str
    answer: str
    expect: Any
    tools: list[dict[str, Any]] = field(default_factory=list)
    fact: bool = False  # facts to know by heart (times tables, fixed phrases) are never held out


def split_of(problem: Problem) -> str:
    """`train` or `held_out`, by a hash of the problem's identity: the two are disjoint whatever the seed."""
    if problem.fact:
        return "train"
    digest = zlib.crc32(f"{problem.task}|{problem.identity}".encode())
    return "held_out" if digest % HELD_OUT_SHARE == 0 else "train"


def user(text: str) -> list[dict[str, Any]]:
    """The messages of a conversation that is one user turn."""
    return [{"role": "user", "content": text}]


def draw(make: Callable[[random.Random], Problem], rng: random.Random, split: str) -> Problem:
    """The next problem of `make` that lies in `split`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    while True:
        problem = make(rng)
        if split_of(problem) == split:
            return problem
