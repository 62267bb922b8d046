"""Chat messages to prompt tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from diptych.api.context import Context
from diptych.api.jobs import check_prompt
from diptych.api.limits import MAX_JSON_DEPTH, MAX_MESSAGES, MAX_TOOLS, at_most
from diptych.api.sampling import check_prompt_length
from diptych.api.schemas import ChatBody, Tool, ToolFunction
from diptych.api.service import LONG_TEXT_CHARS
from diptych.api.wire import convert
from diptych.errors import BadRequest
from diptych.text.grammar import depth_of


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]
    tools: dict[str, ToolFunction]  # that the model may call in this request, by name


async def chat_prompt(body: ChatBody, ctx: Context, size: int) -> Prompt:
    """Validate the conversation and write it by the model's template; a body of many bytes (`size`) in a thread.

    Raises BadRequest that names the field.
    """
    if size > LONG_TEXT_CHARS:
        return await asyncio.to_thread(_write, body, ctx)
    return _write(body, ctx)


def _write(body: ChatBody, ctx: Context) -> Prompt:
    if ctx.template is None:
        raise BadRequest(
            "this model has no chat template; use /v1/completions, or start the server with --chat-template"
        )
    messages = _messages(body)
    tools, shown = _tools(body)
    kwargs = {**ctx.config.default_chat_template_kwargs, **_kwargs(body, ctx)}
    continue_final = bool(body.continue_final_message)
    if continue_final and messages[-1]["role"] != "assistant":
        raise BadRequest("continue_final_message needs a last message of the assistant", param="continue_final_message")
    text = ctx.template.render(messages, tools=shown or None, kwargs=kwargs, continue_final=continue_final)
    check_prompt_length(ctx.tokenizer.least_tokens(text), ctx.room, "messages")
    ids = ctx.tokenizer.encode(text, special=False)
    check_prompt(ids, ctx.room, "messages")
    return Prompt(text, ids, tools)


def _messages(body: ChatBody) -> list[dict[str, Any]]:
    if not body.messages:
        raise BadRequest("messages must not be empty", param="messages")
    at_most(MAX_MESSAGES, body.messages, "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]


def _message(message: dict[str, Any], param: str) -> dict[str, Any]:
    """One message as templates expect it: content is text, arguments of tool calls are objects."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{param}.role must be a string such as user", param=f"{param}.role")
    if depth_of(message) > MAX_JSON_DEPTH:
        raise BadRequest(f"{param} is nested too deeply", param=param)
    made = {**message, "content": _text(message.get("content"), f"{param}.content")}
    if message.get("tool_calls"):
        made["tool_calls"] = _past_calls(message["tool_calls"], f"{param}.tool_calls")
    return made


def _text(content: Any, param: str) -> str:
    """Text, or the text parts of a list put together. None is no text: an assistant's message with tool calls has
    none.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{param} must be text or a list of parts", param=param)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(
                f"{param}[{index}] must be a text part; this model reads nothing else", param=f"{param}[{index}]"
            )
        texts.append(part["text"])
    return "".join(texts)


def _past_calls(calls: Any, param: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRequest(f"{param} must be a list", param=param)
    made = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{param}[{index}].function.name must be a string", param=f"{param}[{index}].function")
        made.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return made


def _arguments(arguments: Any) -> Any:
    """OpenAI sends a JSON text, templates want an object; a text that is none stays as it is."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and depth_of(value) <= MAX_JSON_DEPTH else arguments


def _tools(body: ChatBody) -> tuple[dict[str, ToolFunction], list[dict[str, Any]]]:
    """(tools the model may call, tools the template shows), after tool_choice."""
    given = body.tools or []
    at_most(MAX_TOOLS, given, "tools")
    found: dict[str, ToolFunction] = {}
    for index, raw in enumerate(given):
        if depth_of(raw) > MAX_JSON_DEPTH:
            raise BadRequest(f"tools[{index}] is nested too deeply", param=f"tools[{index}]")
        tool = convert(raw, Tool, f"tools[{index}]")
        if tool.type != "function" or not tool.function.name:
            raise BadRequest(f"tools[{index}] must be a function with a name", param=f"tools[{index}]")
        found[tool.function.name] = tool.function
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return found, given
    if choice == "none":
        return {}, []
    if not found:
        raise BadRequest("tool_choice needs tools", param="tool_choice")
    if choice == "required":
        return found, given
    if isinstance(choice, str):
        raise BadRequest("tool_choice must be auto, none, required or name a function", param="tool_choice")
    if choice.function.name not in found:
        raise BadRequest("tool_choice names a function that is not in tools", param="tool_choice")
    return {choice.function.name: found[choice.function.name]}, given


def _kwargs(body: ChatBody, ctx: Context) -> dict[str, Any]:
    """Template variables of the request. reasoning_effort is one; "none" also switches thinking off."""
    assert ctx.template is not None
    kwargs = body.chat_template_kwargs or {}
    ctx.template.check_kwargs(kwargs)
    if depth_of(kwargs) > MAX_JSON_DEPTH:
        raise BadRequest("chat_template_kwargs is nested too deeply", param="chat_template_kwargs")
    effort: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        effort = {"reasoning_effort": body.reasoning_effort}
        if body.reasoning_effort == "none":
            effort["enable_thinking"] = False
    return {**effort, **kwargs}
