"""The HTTP application of a server."""

from __future__ import annotations

import gc
import time

import psutil
from aiohttp import web

from diptych.api import admin, health, info
from diptych.api.auth import Keys
from diptych.api.chat import chat_completions
from diptych.api.completions import completions
from diptych.api.context import CONTEXT, Context
from diptych.api.edge import edge
from diptych.api.generate import generate
from diptych.api.limits import MAX_BODY_BYTES
from diptych.api.places import Places
from diptych.api.sampling import Defaults, Seeds
from diptych.api.service import Service
from diptych.api.site import SERVER_NAME
from diptych.config import ServerConfig
from diptych.engine.client import EngineClient, EngineLink
from diptych.obs.metrics import ServerMetrics
from diptych.text.template import ChatTemplate
from diptych.text.tokenizer import Tokenizer

GC_OBJECTS = 50_000  # made since the collector's last look


def build_app(config: ServerConfig, engine: EngineClient, tokenizer: Tokenizer | None = None) -> web.Application:
    """The application, ready to serve. Reads the tokenizer's files unless given one; raises ConfigError that names
    what is wrong.
    """
    tokenizer = tokenizer or Tokenizer.load(config.tokenizer_path or config.model_path, config.chat_template)
    tokenizer.check_model(engine.model.vocab_size)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special) if tokenizer.chat_template else None
    metrics = _metrics(config, engine) if config.enable_metrics else None
    app = web.Application(middlewares=[edge], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(_name_server)
    app[CONTEXT] = Context(
        config=config,
        service=Service(engine, tokenizer, metrics),
        tokenizer=tokenizer,
        template=template,
        defaults=Defaults.load(config),
        seeds=Seeds(config.random_seed),
        keys=Keys.of(config),
        places=Places.of(config),
        metrics=metrics,
    )
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/generate", generate)
    for group in (health, admin, info):
        group.add_routes(app)
    return app


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER_NAME


def _metrics(config: ServerConfig, engine: EngineClient) -> ServerMetrics:
    mode = config.disaggregation_mode
    metrics = ServerMetrics(config.metrics_prefix, config.model_name, "unified" if mode == "null" else mode)
    metrics.update(engine.stats)
    metrics.started(engine.model, time.time() - psutil.Process().create_time())
    if isinstance(engine, EngineLink):
        engine.on_stats = metrics.update
    return metrics


def spare_collector() -> None:
    """Call when the server is ready. Spare the garbage collector what stays for good, and let it look less often: a
    step makes a thousand objects, none of them in a cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS, 20, 20)
