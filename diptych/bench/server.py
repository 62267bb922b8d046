"""The calls around a run: is the server there, what does it serve, forget your cache."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import msgspec

from diptych.errors import ConfigError, DeadlineExceeded, NotFound, Unavailable, UpstreamError
from diptych.net import Resolver

_CALL_TIMEOUT_S = 60.0


class Server:
    """Control calls to one server. An async context manager."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._url, self._headers = url, headers

    async def __aenter__(self) -> Server:
        timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
        connector = aiohttp.TCPConnector(resolver=Resolver())
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _call(self, method: str, path: str) -> Any:
        """The JSON (or None) of a 200 answer. Raises NotFound (404), UpstreamError (other statuses), Unavailable."""
        try:
            async with self._session.request(method, self._url + path) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"no answer from the server to {method} {path} ({type(error).__name__})") from None
        if response.status == 404:
            raise NotFound(f"the server has no {path}")
        if response.status != 200:
            raise UpstreamError(f"{method} {path} answered {response.status}")
        try:
            return msgspec.json.decode(body) if body else None
        except msgspec.DecodeError:
            return None

    async def _first(self, *paths: str) -> dict[str, Any]:
        """The answer of the first path that the server has; {} if it has none."""
        for path in paths:
            try:
                answer = await self._call("GET", path)
            except (NotFound, UpstreamError):
                continue  # an older or other server: information only, never a reason to stop
            if isinstance(answer, dict):
                return answer
        return {}

    async def wait_ready(self, timeout_s: float) -> None:
        """Until /v1/models answers 200. Raises DeadlineExceeded after `timeout_s`; 0 does not wait at all."""
        deadline_s = time.perf_counter() + timeout_s
        while timeout_s > 0:
            try:
                await self._call("GET", "/v1/models")
                return
            except (Unavailable, UpstreamError, NotFound) as error:
                if time.perf_counter() > deadline_s:
                    raise DeadlineExceeded(
                        f"the server was not ready within {timeout_s:g} s: {error.message}"
                    ) from None
            await asyncio.sleep(0.5)

    async def model_name(self) -> str:
        models = await self._call("GET", "/v1/models")
        served = models.get("data") if isinstance(models, dict) else None
        if not served:
            raise ConfigError("the server names no model on /v1/models; give --model")
        return str(served[0]["id"])

    async def model_info(self) -> dict[str, Any]:
        return await self._first("/model_info", "/get_model_info")

    async def info(self) -> dict[str, Any]:
        return await self._first("/server_info", "/get_server_info")

    async def flush_cache(self) -> None:
        await self._call("POST", "/flush_cache")
