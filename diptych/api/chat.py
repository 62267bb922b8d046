"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from diptych.api.chat_output import Chunks, OutputReader, OutputRules, Piece, read_all
from diptych.api.context import CONTEXT, Context
from diptych.api.jobs import check_grammar, make_usage, openai_jobs, usage_of
from diptych.api.limits import MAX_BODY_BYTES, MAX_TOP_LOGPROBS, within
from diptych.api.logprobs import chat_entries
from diptych.api.prompts import Prompt, chat_prompt
from diptych.api.sampling import grammar_field, grammar_of
from diptych.api.schemas import ChatBody, StreamOptions, ToolChoice
from diptych.api.sequence import Delta, Job, Result
from diptych.api.sse import DONE, respond
from diptych.api.wire import encode, json_response, read_body
from diptych.errors import BadRequest
from diptych.text.reasoning import CLOSE, thinking_is_over
from diptych.text.toolcalls import OPEN, forced_call_grammar
from diptych.types import Finish, Grammar, LogprobSpec, TokenLogprob


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, streaming or not."""
    ctx = request.app[CONTEXT]
    ctx.check_serving()
    body = await read_body(request, ChatBody)
    prompt = await chat_prompt(body, ctx, request.content_length or MAX_BODY_BYTES)
    forced = _forces_call(body)
    grammar = await _grammar(body, prompt, ctx, forced)
    after = None
    if grammar is not None and ctx.config.reasoning_parser and not thinking_is_over(prompt.text):
        after = ctx.tokenizer.id_of(CLOSE)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    reply_id, jobs = await openai_jobs(
        body,
        [prompt.ids],
        ctx,
        max_tokens=getattr(body, name),
        max_tokens_name=name,
        default_max_tokens=None,
        grammar=grammar,
        grammar_after=after,
        logprobs=_logprob_spec(body),
    )
    rules = OutputRules(
        ctx.config.reasoning_parser if body.separate_reasoning is not False else "",
        body.stream_reasoning is not False,
        prompt.tools.keys() if forced or ctx.config.tool_call_parser else (),
        body.parallel_tool_calls is not False,
        prompt.text[-64:],
    )
    model = body.model or ctx.config.model_name
    if body.stream:
        stream = _Stream(Chunks(reply_id, int(time.time()), model), jobs, rules, body.stream_options, ctx)
        return await respond(request, stream.events(), reply_id)
    results = await ctx.service.collect_all(jobs)
    return json_response(
        {
            "id": reply_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [_choice(index, result, rules, body, ctx) for index, result in enumerate(results)],
            "usage": usage_of(results, len(results), ctx),
        },
        headers={"X-Request-Id": reply_id},
    )


def _forces_call(body: ChatBody) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, ToolChoice)


async def _grammar(body: ChatBody, prompt: Prompt, ctx: Context, forced: bool) -> Grammar | None:
    grammar = grammar_of(body, body.response_format)
    if not forced:
        await check_grammar(grammar, ctx, grammar_field(grammar, body))
        return grammar
    if grammar is not None:
        raise BadRequest("tool_choice and response_format cannot both constrain the answer", param="tool_choice")
    schemas = {name: tool.parameters or {"type": "object"} for name, tool in prompt.tools.items()}
    for schema in schemas.values():
        await check_grammar(Grammar("json_schema", encode(schema).decode()), ctx, "tools")
    tags_are_tokens = ctx.tokenizer.id_of(OPEN) is not None
    several = body.parallel_tool_calls is not False and body.tool_choice == "required"
    grammar = Grammar("ebnf", forced_call_grammar(schemas, several=several, tags_are_tokens=tags_are_tokens))
    await check_grammar(grammar, ctx, "tools")
    return grammar


def _logprob_spec(body: ChatBody) -> LogprobSpec | None:
    if body.top_logprobs is not None:
        within(0, MAX_TOP_LOGPROBS, body.top_logprobs, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return LogprobSpec(top=body.top_logprobs or 0) if body.logprobs else None


def _reason(finish: Finish, num_calls: int) -> str:
    return "tool_calls" if num_calls and finish.type == "stop" else finish.type


def _choice(index: int, result: Result, rules: OutputRules, body: ChatBody, ctx: Context) -> dict[str, Any]:
    content, reasoning, calls = read_all(result.text, rules)
    return {
        "index": index,
        "message": {
            "role": "assistant",
            "content": content or (None if calls or reasoning else ""),
            "reasoning_content": reasoning or None,
            "tool_calls": calls or None,
        },
        "logprobs": {"content": chat_entries(result.logprobs, ctx.tokenizer)} if body.logprobs else None,
        "finish_reason": _reason(result.finish, len(calls)),
        "matched_stop": result.finish.matched,
    }


class _Stream:
    """One streamed reply: role first, then what each step adds, then the reason of the end, usage, [DONE]."""

    def __init__(
        self, chunks: Chunks, jobs: list[Job], rules: OutputRules, options: StreamOptions | None, ctx: Context
    ) -> None:
        self._chunks = chunks
        self._jobs = jobs
        self._readers = [None if rules.plain else OutputReader(rules) for _ in jobs]
        self._completion = [-1] * len(jobs)  # tokens of each choice; -1: its role has not been sent
        self._left = len(jobs)
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)
        self._ctx = ctx
        self._prompt_tokens = self._cached_tokens = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._ctx.service.stream_all(self._jobs)) as steps:
            async for step in steps:
                data = b"".join([self._step(index, delta) for index, delta in step])
                if not self._left:
                    data += (self._chunks.usage(self._usage()) if self._include_usage else b"") + DONE
                if data:
                    yield data

    def _step(self, index: int, delta: Delta) -> bytes:
        new = self._completion[index] < 0
        self._completion[index] = delta.completion_tokens
        if index == 0:
            self._prompt_tokens, self._cached_tokens = delta.prompt_tokens, delta.cached_tokens
        usage = self._usage() if self._continuous else b"null"
        data = self._chunks.role(index, usage) if new else b""
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else b"null"
        reader = self._readers[index]
        if reader is None:
            if delta.text or delta.logprobs:
                data += self._chunks.content(index, delta.text, logprobs, usage)
        else:
            data += self._parsed(index, reader, delta, logprobs, usage)
        if delta.finish is not None:
            self._left -= 1
            reason = _reason(delta.finish, reader.num_calls if reader is not None else 0)
            data += self._chunks.end(index, reason, delta.finish.matched, usage)
        return data

    def _parsed(self, index: int, reader: OutputReader, delta: Delta, logprobs: bytes, usage: bytes) -> bytes:
        number = reader.num_calls
        pieces = reader.push(delta.text)
        if delta.finish is not None:
            pieces += reader.finish()
        if not pieces and delta.logprobs:
            pieces = [Piece("content")]
        data = b""
        for piece in pieces:
            if piece.call is not None:
                data += self._chunks.call(index, number, piece.call, logprobs, usage)
                number += 1
            elif piece.kind == "reasoning":
                data += self._chunks.reasoning(index, piece.text, logprobs, usage)
            else:
                data += self._chunks.content(index, piece.text, logprobs, usage)
            logprobs = b"null"  # they belong to the step: only its first chunk carries them
        return data

    def _logprobs(self, items: list[TokenLogprob]) -> bytes:
        return encode({"content": chat_entries(items, self._ctx.tokenizer)})

    def _usage(self) -> bytes:
        completion = sum(count for count in self._completion if count > 0)
        return encode(make_usage(self._prompt_tokens, completion, self._cached_tokens, self._ctx))
