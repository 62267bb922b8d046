"""What this server is and how it does: models, settings, load; and its tokenizer over HTTP."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from aiohttp import web

from diptych.api.context import CONTEXT, Context
from diptych.api.jobs import check_count
from diptych.api.wire import json_response, read_body
from diptych.config import ServerConfig
from diptych.errors import BadRequest, ContextLengthExceeded, DiptychError, NotFound
from diptych.obs.metrics import CONTENT_TYPE
from diptych.types import Stats

SECRETS = frozenset({"api_key", "admin_api_key", "disaggregation_secret_file"})


def _model(ctx: Context) -> dict[str, Any]:
    name = ctx.config.model_name
    return {
        "id": name,
        "object": "model",
        "created": int(ctx.started_at),
        "owned_by": "diptych",
        "root": name,
        "parent": None,
        "max_model_len": ctx.service.engine.model.context_len,
    }


async def models(request: web.Request) -> web.Response:
    return json_response({"object": "list", "data": [_model(request.app[CONTEXT])]})


async def model(request: web.Request) -> web.Response:
    ctx = request.app[CONTEXT]
    name = request.match_info["id"]
    if name.strip("/") != ctx.config.model_name.strip("/"):
        error = NotFound("this server has no such model; /v1/models lists what it has", param="model")
        error.code = "model_not_found"
        raise error
    return json_response(_model(ctx))


async def model_info(request: web.Request) -> web.Response:
    ctx = request.app[CONTEXT]
    engine = ctx.service.engine
    return json_response(
        {
            "model_path": ctx.config.model_path,
            "tokenizer_path": ctx.config.tokenizer_path or ctx.config.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "architectures": [engine.model.architecture],
            "context_len": engine.model.context_len,
            "vocab_size": engine.model.vocab_size,
            "num_parameters": engine.model.num_parameters,
        }
    )


def public_settings(config: ServerConfig) -> dict[str, Any]:
    """The settings of a server without its secrets."""
    return {
        item.name: getattr(config, item.name) for item in dataclasses.fields(ServerConfig) if item.name not in SECRETS
    }


async def server_info(request: web.Request) -> web.Response:
    """Settings and state in one flat object, with `internal_states` as benchmark clients read it."""
    ctx = request.app[CONTEXT]
    engine = ctx.service.engine
    try:
        state = await engine.control("state")
    except DiptychError as error:
        state = {"error": error.message}
    report = state.pop("stats", None)
    stats = engine.stats if report is None else msgspec.convert(report, Stats)
    internal = {
        "last_gen_throughput": stats.gen_throughput,
        "max_running_requests": ctx.config.max_running_requests,
        **{name: value for name, value in msgspec.structs.asdict(stats).items() if not isinstance(value, list)},
        "max_total_num_tokens": engine.max_total_num_tokens,
        **state,
    }
    return json_response(
        {
            **public_settings(ctx.config),
            "served_model_name": ctx.config.model_name,
            "max_total_num_tokens": engine.max_total_num_tokens,
            "context_len": engine.model.context_len,
            "model": msgspec.to_builtins(engine.model),
            "status": ctx.trouble() or ("paused" if ctx.paused else "ready"),
            "num_running_http_sequences": ctx.service.num_running,
            "internal_states": [internal],
        }
    )


async def loads(request: web.Request) -> web.Response:
    ctx = request.app[CONTEXT]
    engine = ctx.service.engine
    stats = engine.stats
    total = engine.max_total_num_tokens
    return json_response(
        {
            "loads": [
                {
                    "dp_rank": 0,
                    "num_running_reqs": stats.num_running_reqs,
                    "num_waiting_reqs": stats.num_queue_reqs,
                    "num_used_tokens": stats.num_used_tokens,
                    "max_total_num_tokens": total,
                    "token_usage": stats.num_used_tokens / total if total else 0.0,
                    "gen_throughput": stats.gen_throughput,
                    "cache_hit_rate": stats.cache_hit_rate,
                    "queues": {"waiting": stats.num_queue_reqs, "retracted": stats.num_retracted_reqs},
                    "disaggregation": {
                        "mode": ctx.config.disaggregation_mode,
                        "prefill_bootstrap_queue_reqs": stats.num_prefill_bootstrap_queue_reqs,
                        "prefill_inflight_queue_reqs": stats.num_prefill_inflight_queue_reqs,
                        "decode_prealloc_queue_reqs": stats.num_decode_prealloc_queue_reqs,
                        "decode_transfer_queue_reqs": stats.num_decode_transfer_queue_reqs,
                    },
                }
            ]
        }
    )


class TokenizeBody(msgspec.Struct):
    prompt: str | list[str]
    add_special_tokens: bool = True


class DetokenizeBody(msgspec.Struct):
    tokens: list[int | list[int]]
    skip_special_tokens: bool = True


def check_length(num_tokens: int, ctx: Context, param: str) -> None:
    """Raise ContextLengthExceeded for a text that the model could not hold."""
    longest = ctx.service.engine.model.context_len
    if num_tokens > longest:
        raise ContextLengthExceeded(
            f"this model's context has {longest} tokens and the text {num_tokens} or more; send it in parts",
            param=param,
        )


async def _tokens(text: str, special: bool, ctx: Context, param: str) -> list[int]:
    check_length(ctx.tokenizer.least_tokens(text), ctx, param)
    ids = await ctx.service.encode(text, special=special)
    check_length(len(ids), ctx, param)
    return ids


async def tokenize(request: web.Request) -> web.Response:
    """Texts as ids, each no longer than a sequence of the model may be."""
    ctx = request.app[CONTEXT]
    body = await read_body(request, TokenizeBody)
    single = isinstance(body.prompt, str)
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    check_count(len(texts))
    found = [
        await _tokens(text, body.add_special_tokens, ctx, "prompt" if single else f"prompt[{index}]")
        for index, text in enumerate(texts)
    ]
    counts = [len(ids) for ids in found]
    return json_response(
        {
            "tokens": found[0] if single else found,
            "count": counts[0] if single else counts,
            "max_model_len": ctx.service.engine.model.context_len,
        }
    )


async def detokenize(request: web.Request) -> web.Response:
    """Ids as texts. Ids that the tokenizer does not know are an error here, and so are more than the context holds."""
    ctx = request.app[CONTEXT]
    body = await read_body(request, DetokenizeBody)
    flat = [item for item in body.tokens if isinstance(item, int)]
    lists = [item for item in body.tokens if not isinstance(item, int)]
    if flat and lists:
        raise BadRequest("tokens must be a list of ids or a list of such lists", param="tokens")
    check_count(len(lists))
    for index, ids in enumerate(lists or [flat]):
        check_length(len(ids), ctx, f"tokens[{index}]" if lists else "tokens")
        if ids and not 0 <= min(ids) <= max(ids) < ctx.tokenizer.vocab_size:
            raise BadRequest(f"tokens must be between 0 and {ctx.tokenizer.vocab_size - 1}", param="tokens")
    texts = [await ctx.service.decode(ids, skip_special=body.skip_special_tokens) for ids in lists or [flat]]
    return json_response({"text": texts if lists else texts[0]})


async def metrics(request: web.Request) -> web.Response:
    ctx = request.app[CONTEXT]
    if ctx.metrics is None:
        raise NotFound("metrics are off; start the server with --enable-metrics")
    return web.Response(body=ctx.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def add_routes(app: web.Application) -> None:
    get, post = app.router.add_get, app.router.add_post
    get("/v1/models", models)
    get("/v1/models/{id:.+}", model)
    get("/get_model_info", model_info)
    get("/model_info", model_info)
    get("/get_server_info", server_info)
    get("/server_info", server_info)
    get("/v1/loads", loads)
    get("/metrics", metrics)
    for prefix in ("", "/v1"):
        post(f"{prefix}/tokenize", tokenize)
        post(f"{prefix}/detokenize", detokenize)
