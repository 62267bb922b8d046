"""The demo model's tasks: problems with known answers, and the scoring of replies.

Importing this needs the standard library alone, so that tests and the eval may use it without torch.
"""

from __future__ import annotations

from recipes.demo.problem import TASKS, Problem, split_of
from recipes.demo.scoring import Reply, parse_reply, problems, score

__all__ = ["TASKS", "Problem", "Reply", "parse_reply", "problems", "score", "split_of"]
