"""Bodies and prompts to jobs: what all generating endpoints do in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from diptych.api.context import Context
from diptych.api.limits import MAX_BATCH, MAX_RID_CHARS, MAX_SALT_CHARS
from diptych.api.pd import bootstraps
from diptych.api.sampling import (
    Room,
    check_prompt_length,
    make_sampling,
    max_new_tokens,
    num_choices,
    seed_from,
    seed_of,
)
from diptych.api.schemas import OpenAIFields, Pairing, Usage, refuse_unsupported
from diptych.api.sequence import Job, Result
from diptych.errors import BadRequest
from diptych.text.grammar import validate
from diptych.types import Bootstrap, Grammar, LogprobSpec, Request, Sampling

KNOWN_GRAMMARS = 256


def check_count(count: int) -> None:
    if count > MAX_BATCH:
        raise BadRequest(f"one request must not ask for more than {MAX_BATCH} sequences (prompts times n), not {count}")


def check_prompt(ids: Any, room: Room, param: str) -> None:
    """Raise BadRequest for a prompt that is empty, too long, or not made of the model's token ids."""
    if not isinstance(ids, list):
        raise BadRequest("the prompt must not mix token ids with texts or lists", param=param)
    if not ids:
        raise BadRequest("the prompt must have at least one token", param=param)
    check_prompt_length(len(ids), room, param)
    if set(map(type, ids)) != {int}:  # no loop of ours: prompts are long
        raise BadRequest("the prompt must not mix token ids with texts or lists", param=param)
    if min(ids) < 0 or max(ids) >= room.vocab_size:
        raise BadRequest(f"the prompt has token ids outside 0 to {room.vocab_size - 1}", param=param)


async def encode_prompt(text: str, ctx: Context, param: str) -> list[int]:
    """A plain prompt as checked token ids."""
    check_prompt_length(ctx.tokenizer.least_tokens(text), ctx.room, param)
    ids = await ctx.service.encode(text, special=True)
    check_prompt(ids, ctx.room, param)
    return ids


def request_ids(rid: str | list[str] | None, count: int, ctx: Context) -> tuple[str, list[str]]:
    """(id of the reply, id of each sequence)."""
    given = rid if isinstance(rid, list) else [] if rid is None else [rid]
    for text in given:
        if not text or len(text) > MAX_RID_CHARS or not text.isprintable():
            raise BadRequest(f"rid must be 1 to {MAX_RID_CHARS} printable characters", param="rid")
    if isinstance(rid, list):
        if len(rid) != count:
            raise BadRequest(f"rid must have one entry for each of the {count} sequences, not {len(rid)}", param="rid")
        return rid[0], rid
    base = rid or ctx.new_id()
    return base, [base] if count == 1 else [f"{base}-{index}" for index in range(count)]


def namespace_of(cache_salt: str | None, extra_key: str | None) -> str:
    """The radix cache's namespace: prefixes are shared only within one."""
    for name, value in (("cache_salt", cache_salt), ("extra_key", extra_key)):
        if value is not None and len(value) > MAX_SALT_CHARS:
            raise BadRequest(f"{name} must not have more than {MAX_SALT_CHARS} characters", param=name)
    return "\0".join(value for value in (cache_salt, extra_key) if value)


async def pairs_of(fields: Pairing, count: int, ctx: Context) -> list[Bootstrap | None]:
    """Where each sequence's prefill happens. Raises BadRequest, on decode also for places that are not allowed."""
    config = ctx.config
    pairs = bootstraps(fields, config.disaggregation_mode, config.disaggregation_bootstrap_port, count)
    if config.disaggregation_mode != "decode":
        return pairs
    found = {host: await ctx.places.find(host) for host in {pair.host for pair in pairs if pair is not None}}
    return [pair and msgspec.structs.replace(pair, host=found[pair.host]) for pair in pairs]


async def check_grammar(grammar: Grammar | None, ctx: Context, param: str) -> None:
    """Raise BadRequest, naming `param`, for a grammar that the engine would refuse. Known good ones are remembered."""
    if grammar is None:
        return
    if ctx.config.grammar_backend == "none":
        raise BadRequest("this server runs with --grammar-backend none: no structured output", param=param)
    if grammar in ctx.valid_grammars:
        return
    try:
        await asyncio.to_thread(validate, grammar)
    except BadRequest as error:
        raise BadRequest(error.message.replace(grammar.kind, param, 1), param=param) from None
    if len(ctx.valid_grammars) >= KNOWN_GRAMMARS:
        ctx.valid_grammars.clear()
    ctx.valid_grammars.add(grammar)


def make_job(
    ctx: Context,
    *,
    rid: str,
    prompt: list[int],
    sampling: Sampling,
    bootstrap: Bootstrap | None,
    namespace: str,
    logprobs: LogprobSpec | None,
    skip_special: bool | None,
    keep_stop: bool | None,
) -> Job:
    """One sequence. max_new_tokens 0 becomes a token that is thrown away; a prefill server makes exactly one."""
    discard = sampling.max_new_tokens == 0
    if discard or ctx.config.disaggregation_mode == "prefill":
        stop = () if ctx.config.disaggregation_mode == "prefill" else sampling.stop
        sampling = msgspec.structs.replace(sampling, max_new_tokens=1, stop=stop)
    request = Request(
        rid=rid,
        prompt=prompt,
        sampling=sampling,
        namespace=namespace,
        logprobs=logprobs,
        bootstrap=bootstrap,
    )
    return Job(request, skip_special is not False, bool(keep_stop), discard)


async def openai_jobs(
    body: OpenAIFields,
    prompts: Sequence[list[int]],
    ctx: Context,
    *,
    max_tokens: int | None,
    max_tokens_name: str,
    default_max_tokens: int | None,
    grammar: Grammar | None,
    grammar_after: int | None = None,
    logprobs: LogprobSpec | None = None,
) -> tuple[str, list[Job]]:
    """(id of the reply, jobs): for each prompt its n choices. Raises BadRequest that names the field, Unavailable
    if the server drains by now.
    """
    refuse_unsupported(body)
    n = num_choices(body.n)
    count = n * len(prompts)
    check_count(count)
    room = ctx.room
    reply_id, rids = request_ids(body.rid, count, ctx)
    pairs = await pairs_of(body, count, ctx)
    namespace = namespace_of(body.cache_salt, body.extra_key)
    base = seed_from(body.seed, ctx.seeds, "seed")
    jobs = []
    for index in range(count):
        prompt = prompts[index // n]
        sampling = make_sampling(
            body,
            ctx.defaults,
            room,
            max_new=max_new_tokens(max_tokens, default_max_tokens, len(prompt), room, max_tokens_name),
            min_new=body.min_tokens,
            seed=seed_of(base, index % n),
            grammar=grammar,
            grammar_after=grammar_after,
        )
        jobs.append(
            make_job(
                ctx,
                rid=rids[index],
                prompt=prompt,
                sampling=sampling,
                bootstrap=pairs[index],
                namespace=namespace,
                logprobs=logprobs,
                skip_special=body.skip_special_tokens,
                keep_stop=body.no_stop_trim,
            )
        )
    ctx.check_serving()  # again: who drains has not waited for a request that was still read
    return reply_id, jobs


def usage_of(results: Sequence[Result], n: int, ctx: Context) -> Usage:
    """Tokens of all choices; a prompt with n choices counts once."""
    prompts = results[::n]
    return make_usage(
        sum(result.prompt_tokens for result in prompts),
        sum(result.completion_tokens for result in results),
        sum(result.cached_tokens for result in prompts),
        ctx,
    )


def make_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, ctx: Context) -> Usage:
    details = {"cached_tokens": cached_tokens} if ctx.config.enable_cache_report else None
    return Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens, details)
