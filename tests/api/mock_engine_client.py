"""A scripted engine: the API is tested over real sockets, against outputs that the test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from diptych.errors import DiptychError, Unavailable
from diptych.types import Finish, ModelInfo, Output, Request, Stats, TokenLogprob

MODEL = ModelInfo(
    architecture="Mock",
    vocab_size=4096,
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    kv_dtype="float32",
    context_len=8192,
    eos_token_ids=(4072, 4070),
    num_parameters=1,
    weight_bytes=4,
    fingerprint="x",
)
EOS = 4072

Script = Callable[[Request], list[Output | Exception]]


class MockEngineClient:
    """Answers each request with its `script`. `gate`, when cleared, holds every output back."""

    def __init__(self, script: Script) -> None:
        self.model = MODEL
        self.stats = Stats(page_size=16, num_pages=64, max_total_num_tokens=100_000)
        self.max_total_num_tokens = 100_000
        self.alive = True
        self.stalled = False
        self.script = script
        self.requests: list[Request] = []
        self.closed_early: list[str] = []
        self.aborted: list[tuple[str, str]] = []
        self.completed: list[str] = []
        self.controls: list[tuple[str, dict[str, Any]]] = []
        self.control_error: DiptychError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = asyncio.Condition()
        self._ends: dict[str, Output] = {}

    async def generate(
        self, request: Request, *, whole: bool = False, heard: Callable[[Output], None] = lambda output: None
    ) -> AsyncIterator[Output]:
        """Also with `whole` in pieces: who calls must cope with both."""
        if not self.alive:
            raise Unavailable("the engine of this server has stopped; send the request to another")
        self.requests.append(request)
        await self._notify()
        finished = False
        try:
            for item in self.script(request):
                await self._wait(request.rid)
                end = self._ends.pop(request.rid, None)
                if end is not None:
                    item = end
                if isinstance(item, Exception):
                    raise item
                finished = item.finish is not None
                heard(item)
                yield item
                if finished:
                    return
        finally:
            if not finished:
                self.closed_early.append(request.rid)
                await self._notify()

    async def _wait(self, rid: str) -> None:
        await asyncio.sleep(0)
        while not self.gate.is_set() and rid not in self._ends:
            async with self.changed:
                await self.changed.wait()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def open_gate(self) -> None:
        self.gate.set()
        await self._notify()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at whenever something happens here."""
        async with asyncio.timeout(10):
            async with self.changed:
                await self.changed.wait_for(condition)

    async def abort(self, rid: str, message: str) -> None:
        self.aborted.append((rid, message))
        finish = Finish("abort", message=message, status=499, code="aborted")
        for request in self.requests:
            if not rid or request.rid == rid:
                self._ends[request.rid] = Output(rid=request.rid, finish=finish, prompt_tokens=len(request.prompt))
        await self._notify()

    def complete(self, rid: str) -> None:
        self.completed.append(rid)

    async def control(self, op: str, **args: Any) -> dict[str, Any]:
        self.controls.append((op, args))
        if self.control_error is not None:
            raise self.control_error
        return {"exact": True} if op == "state" else {}


def logprob_of(token: int, request: Request) -> TokenLogprob:
    """A made-up value that tests can recompute."""
    spec = request.logprobs
    assert spec is not None
    top = [(-0.25 - i, token + i) for i in range(spec.top)]
    return TokenLogprob(-0.25, token, top, [(-float(id), id) for id in spec.token_ids])


def outputs_for(request: Request, tokens: list[int], finish: Finish, *, step: int = 1) -> list[Output | Exception]:
    """`tokens`, `step` at a time, cut at max_new_tokens; `finish` with the last ones."""
    wanted = tokens[: request.sampling.max_new_tokens]
    if len(wanted) < len(tokens):
        finish = Finish("length")
    found: list[Output | Exception] = []
    for start in range(0, len(wanted), step):
        part = wanted[start : start + step]
        last = start + step >= len(wanted)
        prompt = None
        if start == 0 and request.logprobs is not None and request.logprobs.prompt_start >= 0:
            first = request.logprobs.prompt_start
            prompt = [logprob_of(id, request) for id in request.prompt[first:]]
            if first == 0:
                prompt[0] = TokenLogprob(None, request.prompt[0])
        found.append(
            Output(
                rid=request.rid,
                tokens=part,
                logprobs=[logprob_of(id, request) for id in part] if request.logprobs is not None else None,
                prompt_logprobs=prompt,
                finish=finish if last else None,
                prompt_tokens=len(request.prompt),
                cached_tokens=min(3, len(request.prompt) - 1),
            )
        )
    return found
