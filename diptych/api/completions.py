"""POST /v1/completions: text continued as it is, without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from diptych.api.context import CONTEXT, Context
from diptych.api.jobs import check_count, check_grammar, check_prompt, encode_prompt, make_usage, openai_jobs, usage_of
from diptych.api.limits import MAX_TOP_LOGPROBS, within
from diptych.api.logprobs import completion_logprobs
from diptych.api.sampling import grammar_field, grammar_of, num_choices
from diptych.api.schemas import CompletionBody
from diptych.api.sequence import Delta, Job
from diptych.api.sse import DONE, event, respond
from diptych.api.wire import json_response, read_body
from diptych.errors import BadRequest
from diptych.types import Finish, LogprobSpec, TokenLogprob

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts, streaming or not."""
    ctx = request.app[CONTEXT]
    ctx.check_serving()
    body = await read_body(request, CompletionBody)
    _check(body)
    prompts = await _prompts(body, ctx)
    grammar = grammar_of(body, body.response_format)
    await check_grammar(grammar, ctx, grammar_field(grammar, body))
    reply_id, jobs = await openai_jobs(
        body,
        prompts,
        ctx,
        max_tokens=body.max_tokens,
        max_tokens_name="max_tokens",
        default_max_tokens=DEFAULT_MAX_TOKENS,
        grammar=grammar,
        logprobs=_logprob_spec(body),
    )
    reply = _Reply(reply_id, body, jobs, ctx)
    if body.stream:
        return await respond(request, reply.events(), reply_id)
    return json_response(await reply.whole(), headers={"X-Request-Id": reply_id})


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise BadRequest("suffix is not supported by this server; leave it out", param="suffix")
    if body.best_of is not None and body.best_of != num_choices(body.n):
        raise BadRequest("best_of must equal n; this server does not choose among answers", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise BadRequest("max_tokens 0 makes sense only with echo", param="max_tokens")
    if body.logprobs is not None:
        within(0, MAX_TOP_LOGPROBS, body.logprobs, "logprobs")


def _logprob_spec(body: CompletionBody) -> LogprobSpec | None:
    if body.logprobs is None:
        return None
    return LogprobSpec(prompt_start=0 if body.echo else -1, top=body.logprobs)


async def _prompts(body: CompletionBody, ctx: Context) -> list[list[int]]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    given = body.prompt
    if isinstance(given, str):
        items: list[Any] = [given]
    else:
        items = [given] if given and isinstance(given[0], int) else list(given)
    if not items:
        raise BadRequest("prompt must not be empty", param="prompt")
    check_count(len(items) * num_choices(body.n))
    prompts = []
    for index, item in enumerate(items):
        param = "prompt" if len(items) == 1 else f"prompt[{index}]"
        if isinstance(item, str):
            prompts.append(await encode_prompt(item, ctx, param))
        else:
            check_prompt(item, ctx.room, param)
            prompts.append(item)
    return prompts


class _Reply:
    """Choices of one request, whole or as a stream. Choice i continues prompt i // n."""

    def __init__(self, reply_id: str, body: CompletionBody, jobs: list[Job], ctx: Context) -> None:
        self._head = {
            "id": reply_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or ctx.config.model_name,
        }
        self._body = body
        self._jobs = jobs
        self._ctx = ctx
        self._n = num_choices(body.n)

    async def whole(self) -> dict[str, Any]:
        results = await self._ctx.service.collect_all(self._jobs)
        choices = []
        for index, result in enumerate(results):
            items = [*self._echo_logprobs(index, result.prompt_logprobs), *result.logprobs]
            choices.append(self._choice(index, self._echo_text(index) + result.text, items, 0, result.finish))
        return {**self._head, "choices": choices, "usage": usage_of(results, self._n, self._ctx)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        include_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        latest: dict[int, Delta] = {}
        offsets = [0] * len(self._jobs)
        left = len(self._jobs)
        async with aclosing(self._ctx.service.stream_all(self._jobs)) as steps:
            async for step in steps:
                data = b""
                for index, delta in step:
                    items = delta.logprobs
                    text = delta.text
                    if index not in latest:
                        text = self._echo_text(index) + text
                        items = [*self._echo_logprobs(index, delta.prompt_logprobs or []), *items]
                    latest[index] = delta
                    left -= delta.finish is not None
                    if not (text or items or delta.finish):
                        continue
                    choice = self._choice(index, text, items, offsets[index], delta.finish)
                    offsets[index] += sum(len(self._ctx.tokenizer.token_text(item.token)) for item in items)
                    usage = self._usage(latest) if continuous else None
                    data += event({**self._head, "choices": [choice], "usage": usage})
                if not left:
                    last = {**self._head, "choices": [], "usage": self._usage(latest)}
                    data += (event(last) if include_usage else b"") + DONE
                if data:
                    yield data

    def _choice(
        self, index: int, text: str, items: list[TokenLogprob], offset: int, finish: Finish | None
    ) -> dict[str, Any]:
        wanted = self._body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(items, self._ctx.tokenizer, offset) if wanted else None,
            "finish_reason": finish.type if finish is not None else None,
            "matched_stop": finish.matched if finish is not None else None,
        }

    def _echo_text(self, index: int) -> str:
        if not self._body.echo:
            return ""
        job = self._jobs[index]
        given = self._body.prompt
        if isinstance(given, str):
            return given
        item = given[index // self._n]
        return (
            item
            if isinstance(item, str)
            else self._ctx.tokenizer.decode(job.request.prompt, skip_special=job.skip_special)
        )

    def _echo_logprobs(self, index: int, found: list[TokenLogprob]) -> list[TokenLogprob]:
        """The prompt's log-probabilities. A decode server does not know them: nulls keep the places for the router to
        fill.
        """
        if not self._body.echo or self._body.logprobs is None:
            return []
        return found or [TokenLogprob(None, token) for token in self._jobs[index].request.prompt]

    def _usage(self, latest: dict[int, Delta]) -> Any:
        firsts = [delta for index, delta in latest.items() if index % self._n == 0]
        return make_usage(
            sum(delta.prompt_tokens for delta in firsts),
            sum(delta.completion_tokens for delta in latest.values()),
            sum(delta.cached_tokens for delta in firsts),
            self._ctx,
        )
