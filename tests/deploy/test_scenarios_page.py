"""docs/kubernetes-scenarios.md: every test that it names exists, and every scenario has an answer."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path("docs/kubernetes-scenarios.md")


def rows() -> list[tuple[str, str]]:
    """Scenario and answer."""
    cells = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert all(len(each) == 2 for each in cells)
    return [(one.strip(), two.strip()) for one, two in cells if two.strip() != "our tests"]


def names(path: Path) -> set[str]:
    """What a module defines."""
    body = ast.parse(path.read_text()).body
    made = {each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return made | {
        name.id for each in body if isinstance(each, ast.Assign) for name in each.targets if isinstance(name, ast.Name)
    }


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 100
    defined = {file: names(Path("tests") / file) for file, _ in named}
    assert [f"{file}::{test}" for file, test in named if test not in defined[file]] == []


def test_every_scenario_has_tests_or_a_reason() -> None:
    answers = ("`", "does not apply: ", "differs: ", "missing: ")
    assert [scenario for scenario, answer in rows() if not answer.startswith(answers)] == []
    assert "kubernetes-scenarios.md" in Path("docs/kubernetes.md").read_text()
