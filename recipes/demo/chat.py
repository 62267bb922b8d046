"""The chat template of models/demo, rendered as a server would: in jinja2's immutable sandbox."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MODEL_DIR = Path(__file__).resolve().parents[2] / "models" / "demo"


@cache
def template(path: Path = MODEL_DIR / "chat_template.jinja") -> Template:
    """The compiled template; `tojson` keeps the order of keys and all letters, as transformers has it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(path.read_text(encoding="utf-8"))


def _raise(message: str) -> None:
    raise TemplateError(message)


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, thinking: bool = True) -> str:
    """The prompt for the next turn of the assistant."""
    return template().render(
        messages=messages, tools=tools or None, add_generation_prompt=True, enable_thinking=thinking
    )
