"""Manifests as their users run them: the seed's, unchanged (tp 2 everywhere, SGLang's flags), and the demo's."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from diptych.group import spec
from diptych.group.local.probes import Target
from diptych.group.local.probes import ask as probe

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "examples" / "seed"


def diptych(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, DIPTYCH_STATE_DIR=str(state))
    command = [sys.executable, "-m", "diptych", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=110)


def ask(address: str) -> dict[str, Any]:
    """The reply to the seed's request."""
    body = (SEED / "request.sh").read_text().split("-d '", 1)[1].rsplit("'", 1)[0]
    url, headers = f"http://{address}/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=60) as answer:
        return dict(json.load(answer))


def test_the_seeds_manifest_answers_the_seeds_request(tmp_path: Path) -> None:
    claim, port = f"llm-model={ROOT / 'models' / 'demo'}", "sglang-pd=0"
    up = diptych(
        tmp_path,
        *("up", str(SEED / "sglang_pd.yaml"), "--claim", claim, "--service-port", port, "--detach", "--timeout", "90"),
    )
    try:
        assert up.returncode == 0, up.stderr
        status = json.loads(diptych(tmp_path, "status", "sglang-pd", "--json").stdout)
        reply = ask(status["services"][0]["address"])
    finally:
        down = diptych(tmp_path, "down", "sglang-pd")
    shape = json.loads((SEED / "reply.json").read_text())
    assert list(reply) == list(shape)
    assert reply["model"] == shape["model"] == "/models/Qwen3-32B"
    assert reply["choices"][0]["message"]["content"].startswith("<think>\nOkay, the user")
    assert reply["usage"]["completion_tokens"] == shape["usage"]["completion_tokens"] == 30
    assert down.returncode == 0, down.stderr
    assert {role["name"]: role["ready"] for role in status["roles"]} == {"scheduler": 1, "prefill": 2, "decode": 1}


def test_the_demo_answers_the_same_without_prefill_servers(tmp_path: Path) -> None:
    """The router stays behind its Service, so its fallback to decode servers is of use."""
    claim, manifest = f"demo-model={ROOT / 'models' / 'demo'}", ROOT / "examples" / "demo.yaml"
    up = diptych(
        tmp_path,
        *("up", str(manifest), "--claim", claim, "--service-port", "demo=0", "--detach", "--timeout", "90"),
    )
    try:
        assert up.returncode == 0, up.stderr
        address = json.loads(diptych(tmp_path, "status", "demo", "--json").stdout)["services"][0]["address"]
        replies = [ask(address)]
        scaled = diptych(tmp_path, "scale", "demo/prefill", "0")
        assert scaled.returncode == 0, scaled.stderr
        status = json.loads(diptych(tmp_path, "status", "demo", "--json").stdout)
        probed = router_probes(manifest, status)
        replies.append(ask(address))
    finally:
        down = diptych(tmp_path, "down", "demo")
    assert [reply["choices"] for reply in replies] == [replies[0]["choices"]] * 2
    assert replies[0]["choices"][0]["message"]["content"].startswith("<think>\nOkay, the user")
    assert [pod["name"] for pod in status["pods"]] == ["demo-decode-0", "demo-router-0"]
    assert (status["status"], status["services"][0]["pods"]) == ("ready", ["demo-router-0"])
    assert probed == ["HTTP status 503", ""]
    assert down.returncode == 0, down.stderr


def router_probes(manifest: Path, status: dict[str, Any]) -> list[str]:
    """What the router's startup and readiness probes say, once there is no prefill server for it."""
    container = spec.parse(manifest.read_text()).group.role("router").template.spec.containers[0]
    assert container.startup_probe is not None and container.readiness_probe is not None
    ip = next(pod["ip"] for pod in status["pods"] if pod["role"] == "router")
    target = Target(ip, container, {}, str, "/")
    deadline = time.monotonic() + 60
    while not (unready := asyncio.run(probe(container.startup_probe, target))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [unready, asyncio.run(probe(container.readiness_probe, target))]
