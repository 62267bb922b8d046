"""Pods that are told to leave while they have requests: a decode and a prefill server are scaled away."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
import yaml
from asking import ask, endless, until

from diptych.group.local.control import ScaleRequest, StatusRequest, request
from diptych.group.local.paths import GroupFolder
from diptych.group.local.state import PodView

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
NUM_STREAMS, NUM_TOKENS = 4, 600
SHORT = {"text": "What is 3 + 4?", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}


def manifest(folder: Path) -> Path:
    """The demo's, with two decode servers behind a router that takes turns."""
    group, service = yaml.safe_load_all((ROOT / "examples/demo.yaml").read_text())
    router, prefill, decode = group["spec"]["roles"]
    decode["replicas"] = 2
    args = router["template"]["spec"]["containers"][0]["args"]
    at = args.index("--decode") + 1
    args[at:at] = ["http://demo-decode-1.demo-decode:8000", "--policy", "round_robin", "--decode"]
    for each in (router, prefill, decode):
        each["template"]["spec"]["terminationGracePeriodSeconds"] = 120
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump_all([group, service]))
    return path


class Group:
    """One that runs as processes, under the name `demo`."""

    def __init__(self, state: Path) -> None:
        self._environment = dict(os.environ, DIPTYCH_STATE_DIR=str(state))
        self._control = GroupFolder(state, "demo").control

    def command(self, *args: str) -> str:
        command = [sys.executable, "-m", "diptych", *args]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False, timeout=150
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def url(self) -> str:
        return f"http://{request(self._control, StatusRequest()).services[0].address}"

    def pods(self) -> dict[str, PodView]:
        return {pod.name: pod for pod in request(self._control, StatusRequest()).pods}

    def scale(self, role: str, replicas: int) -> None:
        request(self._control, ScaleRequest(role, replicas))

    def running(self, pod: str) -> int:
        """Requests that the server has now."""
        status, answer = ask(f"http://{self.pods()[pod].ip}:8000", "/audit")
        assert status == 200
        return int(json.loads(answer)["sequences"])


async def stream(session: aiohttp.ClientSession, url: str, index: int, begun: asyncio.Semaphore) -> list[str]:
    """The events of one stream; `begun` is released at the first."""
    body = {**endless(index, 40, NUM_TOKENS), "stream": True}
    text = b""
    async with session.post(url + "/generate", json=body) as reply:
        assert reply.status == 200, await reply.text()
        async for part in reply.content.iter_any():
            if not text:
                begun.release()
            text += part
    return [event.removeprefix("data: ") for event in text.decode().split("\n\n") if event]


async def take_decode_away(group: Group) -> None:
    begun = asyncio.Semaphore(0)
    async with aiohttp.ClientSession() as session, asyncio.timeout(200):
        streams = [asyncio.create_task(stream(session, group.url, i, begun)) for i in range(NUM_STREAMS)]
        for _ in streams:
            await begun.acquire()
        assert await asyncio.to_thread(group.running, "demo-decode-1") == NUM_STREAMS // 2
        group.scale("decode", 1)
        await asyncio.to_thread(
            until, lambda: group.pods()["demo-decode-1"].status == "stopping", "it is told to leave", 60.0
        )
        for _ in range(4):
            status, answer = await asyncio.to_thread(ask, group.url, "/generate", SHORT)
            assert status == 200, answer
        assert not any(each.done() for each in streams)  # so those four were served beside it
        for events in await asyncio.gather(*streams):
            assert events[-1] == "[DONE]"
            assert len(json.loads(events[-2])["output_ids"]) == NUM_TOKENS
    until(lambda: "demo-decode-1" not in group.pods(), "the decode server has ended", 60.0)


async def take_prefill_away(group: Group) -> None:
    """While a long prompt is at each of the two."""
    asked = [asyncio.create_task(asyncio.to_thread(ask, group.url, "/generate", endless(i, 6000, 2))) for i in (1, 2)]
    await asyncio.to_thread(until, lambda: group.running("demo-prefill-1") > 0, "a prompt has arrived", 60.0)
    group.scale("prefill", 1)
    async with asyncio.timeout(100):
        assert [status for status, _ in await asyncio.gather(*asked)] == [200, 200]
        assert (await asyncio.to_thread(ask, group.url, "/generate", SHORT))[0] == 200
    until(lambda: "demo-prefill-1" not in group.pods(), "the prefill server has ended", 60.0)


def test_servers_leave_when_their_requests_have_ended_and_none_is_lost(tmp_path: Path) -> None:
    group, claim = Group(tmp_path), f"demo-model={ROOT / 'models' / 'demo'}"
    up = ("--claim", claim, "--service-port", "demo=0", "--detach", "--timeout", "120")
    group.command("up", str(manifest(tmp_path)), *up)
    try:
        assert len(group.pods()) == 5
        asyncio.run(take_decode_away(group))
        asyncio.run(take_prefill_away(group))
        logs = group.command("logs", "demo-decode-1")
    finally:
        group.command("down", "demo")
    assert "draining" in logs
