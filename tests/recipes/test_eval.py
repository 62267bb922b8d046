"""The eval over HTTP, against a test double that knows the references."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from recipes.demo import Problem, problems
from recipes.demo.eval import request_body
from recipes.demo.report import Outcome, passes, summary, table

TASKS = ("copy", "tool_call")
NUM = 4


class ReferenceServer:
    """Test double: answers the held-out problems of `TASKS` with their references, or all with `instead`."""

    def __init__(self, instead: web.Response | None = None) -> None:
        self.known = {json.dumps(p.messages): p for task in TASKS for p in problems(task, NUM, 0)}
        self.instead = instead
        self.bodies: list[dict[str, Any]] = []

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if self.instead is not None:
            return web.Response(status=self.instead.status, text=self.instead.text)
        problem: Problem = self.known[json.dumps(body["messages"])]
        thinking = body["chat_template_kwargs"]["enable_thinking"]
        content = f"<think>\n{problem.thought}\n</think>\n\n{problem.answer}" if thinking else problem.answer
        message = {"role": "assistant", "content": content, "reasoning_content": None, "tool_calls": None}
        return web.json_response({"choices": [{"message": message}], "usage": {"prompt_tokens": 7}})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def run_eval(url: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "recipes.demo.eval", "--base-url", url, "--num", str(NUM), "--tasks", *TASKS]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_right_replies_pass() -> None:
    server = ReferenceServer()
    async with server.running() as url:
        status, out, err = await run_eval(url + "/v1/")
    assert (status, err) == (0, "")
    rows = json.loads(out.splitlines()[-1])
    assert [(row["task"], row["thinking"], row["right"]) for row in rows] == [
        (task, thinking, NUM) for task in TASKS for thinking in (False, True)
    ]
    assert len(server.bodies) == len(TASKS) * 2 * NUM
    assert {body["temperature"] for body in server.bodies} == {0}


async def test_wrong_replies_fail_and_refusals_are_told() -> None:
    async with ReferenceServer(web.Response(status=503, text="not ready")).running() as url:
        status, out, err = await run_eval(url)
    assert status == 1
    assert "status 503: not ready" in err
    assert {row["errors"] for row in json.loads(out.splitlines()[-1])} == {NUM}


async def test_a_dead_server_fails() -> None:
    async with ReferenceServer().running() as url:
        pass
    status, _, err = await run_eval(url)
    assert status == 1
    assert "ClientConnectorError" in err


def test_bodies_carry_tools_only_where_there_are_any() -> None:
    assert "tools" not in request_body(problems("copy", 1)[0], True, "demo")
    assert request_body(problems("tool_call", 1)[0], True, "demo")["tools"]


def test_the_bar_holds_for_every_row() -> None:
    right = Outcome("copy", True, True, 9, "q", "r", "r")
    wrong = Outcome("lookup", True, False, 9, "q", "r", "s")
    assert passes(summary([right]), 0.95)
    assert not passes(summary([right] * 50 + [wrong]), 0.95)
    assert not passes([], 0.95)
    assert "100.0%" in table(summary([right]))
