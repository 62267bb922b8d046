"""POST /generate: SGLang's native endpoint."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from diptych.api.context import CONTEXT, Context
from diptych.api.jobs import (
    check_count,
    check_grammar,
    check_prompt,
    encode_prompt,
    make_job,
    namespace_of,
    pairs_of,
    request_ids,
)
from diptych.api.limits import MAX_LOGPROB_TOKEN_IDS, MAX_TOP_LOGPROBS, within
from diptych.api.logprobs import NativeLogprobs
from diptych.api.sampling import (
    grammar_field,
    grammar_of,
    make_sampling,
    max_new_tokens,
    num_choices,
    seed_from,
    seed_of,
    token_ids,
)
from diptych.api.schemas import GenerateBody, NativeSampling, refuse_unsupported
from diptych.api.sequence import Delta, Job
from diptych.api.sse import DONE, event, respond
from diptych.api.wire import json_response, read_body
from diptych.errors import BadRequest
from diptych.types import Finish, LogprobSpec

DEFAULT_MAX_NEW_TOKENS = 128


async def generate(request: web.Request) -> web.StreamResponse:
    """Continue one prompt or a batch, streaming (cumulative frames) or not."""
    ctx = request.app[CONTEXT]
    ctx.check_serving()
    body = await read_body(request, GenerateBody)
    refuse_unsupported(body)
    prompts, batch = await _prompts(body, ctx)
    reply_id, jobs, batch = await _jobs(body, prompts, batch, ctx)
    if body.stream:
        return await respond(request, _events(jobs, body, batch, ctx), reply_id)
    answers = [_Answer.of(job, body, ctx) for job in jobs]
    for answer, result in zip(answers, await ctx.service.collect_all(jobs), strict=True):
        answer.add(result.as_delta(), result.e2e_s)
    frames = [answer.frame() for answer in answers]
    return json_response(frames if batch else frames[0], headers={"X-Request-Id": reply_id})


async def _prompts(body: GenerateBody, ctx: Context) -> tuple[list[list[int]], bool]:
    """(prompts, whether the reply is a list)."""
    if (body.text is None) == (body.input_ids is None):
        raise BadRequest("give either text or input_ids", param="text")
    name = "input_ids" if body.text is None else "text"
    given: Any = body.input_ids if body.text is None else body.text
    batch = isinstance(given, list) and not (given and isinstance(given[0], int))
    items = given if batch else [given]
    if not items:
        raise BadRequest(f"{name} must not be empty", param=name)
    check_count(len(items))
    prompts = []
    for index, item in enumerate(items):
        param = f"{name}[{index}]" if batch else name
        if isinstance(item, str):
            prompts.append(await encode_prompt(item, ctx, param))
        else:
            check_prompt(item, ctx.room, param)
            prompts.append(item)
    return prompts, batch


async def _jobs(body: GenerateBody, prompts: list[list[int]], batch: bool, ctx: Context) -> tuple[str, list[Job], bool]:
    """(id of the reply, jobs, whether the reply is a list): each prompt's n samples in a row."""
    given = body.sampling_params or NativeSampling()
    params: list[NativeSampling] = [
        _item(given, index, len(prompts), "sampling_params") for index in range(len(prompts))
    ]
    n = num_choices(params[0].n, "sampling_params.")
    if any(num_choices(item.n, "sampling_params.") != n for item in params):
        raise BadRequest("sampling_params.n must be the same for all prompts", param="sampling_params.n")
    count = n * len(prompts)
    check_count(count)
    reply_id, rids = request_ids(body.rid, count, ctx)
    pairs = await pairs_of(body, count, ctx)
    namespace = namespace_of(body.cache_salt, body.extra_key)
    jobs = []
    for index, (prompt, fields) in enumerate(zip(prompts, params, strict=True)):
        grammar = grammar_of(fields, None, "sampling_params.")
        await check_grammar(grammar, ctx, grammar_field(grammar, fields, "sampling_params."))
        base = seed_from(fields.sampling_seed, ctx.seeds, "sampling_params.sampling_seed")
        name = "sampling_params.max_new_tokens"
        room = ctx.room
        for choice in range(n):
            sampling = make_sampling(
                fields,
                ctx.defaults,
                room,
                max_new=max_new_tokens(fields.max_new_tokens, DEFAULT_MAX_NEW_TOKENS, len(prompt), room, name),
                min_new=fields.min_new_tokens,
                seed=seed_of(base, choice),
                grammar=grammar,
                prefix="sampling_params.",
            )
            at = index * n + choice
            jobs.append(
                make_job(
                    ctx,
                    rid=rids[at],
                    prompt=prompt,
                    sampling=sampling,
                    bootstrap=pairs[at],
                    namespace=namespace,
                    logprobs=_logprob_spec(body, index, len(prompts), len(prompt), room.vocab_size),
                    skip_special=fields.skip_special_tokens,
                    keep_stop=fields.no_stop_trim,
                )
            )
    ctx.check_serving()  # again: who drains has not waited for a request that was still read
    return reply_id, jobs, batch or n > 1


def _item(value: Any, index: int, count: int, name: str) -> Any:
    """A field that is one value for all prompts or a list with one for each."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise BadRequest(f"{name} must have {count} entries, one for each prompt", param=name)
    return value[index]


def _logprob_spec(
    body: GenerateBody, index: int, count: int, prompt_tokens: int, vocab_size: int
) -> LogprobSpec | None:
    if not _item(body.return_logprob, index, count, "return_logprob"):
        return None
    start = _item(body.logprob_start_len, index, count, "logprob_start_len")
    start = -1 if start is None else start
    within(-1, prompt_tokens - 1, start, "logprob_start_len")
    top = _item(body.top_logprobs_num, index, count, "top_logprobs_num") or 0
    within(0, MAX_TOP_LOGPROBS, top, "top_logprobs_num")
    chosen: Any = body.token_ids_logprob or []
    if any(item is None or isinstance(item, list) for item in chosen):
        chosen = _item(chosen, index, count, "token_ids_logprob") or []
        if isinstance(chosen, int):
            raise BadRequest("token_ids_logprob must not mix ids and lists", param="token_ids_logprob")
    return LogprobSpec(start, top, token_ids(chosen, vocab_size, "token_ids_logprob", MAX_LOGPROB_TOKEN_IDS))


@dataclass
class _Answer:
    """One sequence's reply as it grows."""

    rid: str
    inputs: NativeLogprobs | None
    outputs: NativeLogprobs | None
    parts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    latest: Delta | None = None
    e2e_s: float = 0.0

    @classmethod
    def of(cls, job: Job, body: GenerateBody, ctx: Context) -> _Answer:
        spec = job.request.logprobs
        if spec is None:
            return cls(job.request.rid, None, None)
        texts, top, chosen = bool(body.return_text_in_logprobs), spec.top > 0, bool(spec.token_ids)
        inputs, outputs = (NativeLogprobs(ctx.tokenizer, texts=texts, top=top, chosen=chosen) for _ in range(2))
        return cls(job.request.rid, inputs, outputs)

    def add(self, delta: Delta, e2e_s: float) -> None:
        self.parts.append(delta.text)
        self.tokens += delta.tokens
        if self.outputs is not None and self.inputs is not None:
            self.outputs.extend(delta.logprobs)
            self.inputs.extend(delta.prompt_logprobs or ())
        self.latest = delta
        self.e2e_s = e2e_s

    def frame(self) -> dict[str, Any]:
        """The reply so far."""
        delta = self.latest
        assert delta is not None
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": _finish_reason(delta.finish, delta.completion_tokens),
            "prompt_tokens": delta.prompt_tokens,
            "completion_tokens": delta.completion_tokens,
            "cached_tokens": delta.cached_tokens,
            "cached_tokens_details": None,
            "weight_version": "default",
            "num_retractions": delta.num_retractions,
            "dp_rank": None,
            "e2e_latency": self.e2e_s,
        }
        if self.inputs is not None and self.outputs is not None:
            meta |= self.inputs.fields("input") | self.outputs.fields("output")
        self.parts = ["".join(self.parts)]
        return {"text": self.parts[0], "output_ids": self.tokens, "meta_info": meta}


def _finish_reason(finish: Finish | None, completion_tokens: int) -> dict[str, Any] | None:
    if finish is None:
        return None
    if finish.type == "length":
        return {"type": "length", "length": completion_tokens}
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    return {"type": "abort", "message": finish.message, "status_code": finish.status, "err_type": finish.code}


async def _events(jobs: list[Job], body: GenerateBody, batch: bool, ctx: Context) -> AsyncGenerator[bytes, None]:
    started = time.perf_counter()
    answers = [_Answer.of(job, body, ctx) for job in jobs]
    left = len(jobs)
    async with aclosing(ctx.service.stream_all(jobs)) as steps:
        async for step in steps:
            data = b""
            for index, delta in step:
                answers[index].add(delta, time.perf_counter() - started)
                left -= delta.finish is not None
                if delta.tokens or delta.text or delta.finish is not None:
                    frame = answers[index].frame()
                    data += event({**frame, "index": index} if batch else frame)
            data += b"" if left else DONE
            if data:
                yield data
