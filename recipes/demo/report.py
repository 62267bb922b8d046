"""The outcome of an eval: a share of right replies for each task, with thinking and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BAR = 0.95


@dataclass
class Outcome:
    """One problem's result; `question` is the end of the last message, `error` says why there is no reply."""

    task: str
    thinking: bool
    right: bool
    prompt_tokens: int
    question: str
    reply: str
    reference: str
    error: str = ""


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row for each task and mode: how many were asked, how many were right, how many got no reply."""
    rows = []
    for task, thinking in dict.fromkeys((outcome.task, outcome.thinking) for outcome in outcomes):
        group = [outcome for outcome in outcomes if (outcome.task, outcome.thinking) == (task, thinking)]
        right = sum(outcome.right for outcome in group)
        rows.append({
            "task": task, "thinking": thinking, "num": len(group), "right": right, "accuracy": right / len(group),
            "errors": sum(bool(outcome.error) for outcome in group),
            "max_prompt_tokens": max(outcome.prompt_tokens for outcome in group),
        })  # fmt: skip
    return rows


def passes(rows: list[dict[str, Any]], bar: float) -> bool:
    """Whether there are rows, and every one reaches the bar."""
    return bool(rows) and all(row["accuracy"] >= bar for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'task':<12} {'thinking':<8} {'right':>11} {'accuracy':>9} {'longest prompt':>15}"]
    for row in rows:
        right = f"{row['right']}/{row['num']}"
        mode = "on" if row["thinking"] else "off"
        lines.append(f"{row['task']:<12} {mode:<8} {right:>11} {row['accuracy']:>9.1%} {row['max_prompt_tokens']:>15}")
    return "\n".join(lines)
