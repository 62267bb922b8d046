"""What every endpoint needs, in one object on the application."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from aiohttp import web

from diptych.api.auth import Keys
from diptych.api.places import Places
from diptych.api.sampling import Defaults, Room, Seeds
from diptych.api.service import Service
from diptych.config import ServerConfig
from diptych.errors import Unavailable
from diptych.obs.metrics import ServerMetrics
from diptych.text.template import ChatTemplate
from diptych.text.tokenizer import Tokenizer
from diptych.types import Grammar


@dataclass
class Context:
    config: ServerConfig
    service: Service
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: Defaults
    seeds: Seeds
    keys: Keys
    places: Places
    metrics: ServerMetrics | None
    drain_by: float | None = None  # set: finishes what runs until then (time.monotonic), takes nothing new
    paused: bool = False
    probe: asyncio.Task[None] | None = None  # the running /health_generate, shared by its callers
    started_at: float = field(default_factory=time.time)  # for people: /v1/models
    valid_grammars: set[Grammar] = field(default_factory=set)  # that need no second look
    ids: random.Random = field(default_factory=random.SystemRandom)

    @property
    def room(self) -> Room:
        engine = self.service.engine
        context = engine.model.context_len
        longest = min(context, engine.max_total_num_tokens)
        whole = context if self.config.disaggregation_mode == "prefill" else longest
        return Room(engine.model.vocab_size, longest, whole)

    def new_id(self) -> str:
        """32 hexadecimal digits, as request ids are shown."""
        return f"{self.ids.getrandbits(128):032x}"

    def trouble(self) -> str:
        """Why this server cannot serve now; "" when it can."""
        if not self.service.engine.alive:
            return "the engine of this server has stopped"
        if self.service.engine.stalled:
            return "the engine of this server does not answer"
        return "this server is draining" if self.drain_by is not None else ""

    def begin_drain(self) -> None:
        """From now on /health and /ready say 503 and new requests are refused; running ones go on."""
        if self.drain_by is None:
            self.drain_by = time.monotonic() + self.config.drain_timeout

    async def drained(self) -> bool:
        """Wait until the running requests have ended, False if they had not within --drain-timeout of `begin_drain`."""
        assert self.drain_by is not None
        try:
            async with asyncio.timeout(self.drain_by - time.monotonic()):
                await self.service.idle()
        except TimeoutError:
            return False
        return True

    def check_serving(self) -> None:
        """Raise Unavailable unless new requests may be taken."""
        trouble = self.trouble()
        if trouble:
            raise Unavailable(f"{trouble}; send the request to another server, or later")


CONTEXT = web.AppKey("context", Context)
