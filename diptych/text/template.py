"""Chat messages to prompt text, by the model's Jinja template.

The template comes from the model folder or from the operator, never from a client, and runs in Jinja's immutable
sandbox with the helpers Hugging Face templates expect. A client may set those variables that the template reads,
except the ones that are ours.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diptych.errors import BadRequest, ConfigError

MAX_PROMPT_CHARS = 16 << 20
_OURS = "messages tools documents chat_template tokenize add_generation_prompt continue_final_message return_dict"
_SPECIAL = "bos_token eos_token pad_token unk_token"
_HELPERS = "raise_exception strftime_now namespace range dict joiner cycler lipsum"
_RESERVED = frozenset([*_OURS.split(" "), *_SPECIAL.split(" "), *_HELPERS.split(" ")])
_END_OF_MESSAGE = "\ue000diptych:end-of-final-message\ue000"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which training code marks the assistant's words: shown as it is."""

    tags = {"generation"}  # noqa: RUF012 - the library's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. `special` are the tokenizer's special tokens, visible to the template by name."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        env.filters["tojson"] = _tojson
        env.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template = env.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(env.parse(source))) - _RESERVED
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
        self._special = special

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Raise BadRequest for variables that are not the client's to set."""
        for name in kwargs:
            if name in _RESERVED or name.startswith("_"):
                raise BadRequest(
                    f"chat_template_kwargs must not set {name}; only the template's own variables can be set",
                    param=f"chat_template_kwargs.{name}"[:100],
                )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The prompt. With `continue_final` it ends inside the last message, otherwise where the assistant begins.

        Of `kwargs` only variables that the template reads reach it. Raises BadRequest with the template's own words
        when the template refuses the messages.
        """
        own = {name: value for name, value in (kwargs or {}).items() if name in self.variables}
        if continue_final:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + _END_OF_MESSAGE}]
        text = self._generate(
            {**own, **self._special, "messages": messages, "tools": tools, "add_generation_prompt": not continue_final}
        )
        if not continue_final:
            return text
        end = text.rfind(_END_OF_MESSAGE)
        if end < 0:
            raise BadRequest(
                "the chat template does not show the last message, so it cannot be continued", param="messages"
            )
        return text[:end]

    def _generate(self, variables: dict[str, Any]) -> str:
        parts, size = [], 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise BadRequest(f"the prompt has more than {MAX_PROMPT_CHARS} characters", param="messages")
        except BadRequest:
            raise
        except jinja2.TemplateError as error:
            raise BadRequest(f"the chat template refuses these messages: {error.message}", param="messages") from None
        except Exception as error:  # a template meets data of a shape it was not written for
            reason = type(error).__name__
            raise BadRequest(f"the chat template cannot show these messages ({reason})", param="messages") from None
        return "".join(parts)
