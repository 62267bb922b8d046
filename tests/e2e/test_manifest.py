"""The seed's manifest, unchanged, as its user runs it: tp 2 everywhere, SGLang's command lines, the seed's request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "examples" / "seed"


def diptych(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, DIPTYCH_STATE_DIR=str(state))
    command = [sys.executable, "-m", "diptych", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=110)


def test_the_seeds_manifest_answers_the_seeds_request(tmp_path: Path) -> None:
    claim, port = f"llm-model={ROOT / 'models' / 'demo'}", "sglang-pd=0"
    up = diptych(
        tmp_path,
        *("up", str(SEED / "sglang_pd.yaml"), "--claim", claim, "--service-port", port, "--detach", "--timeout", "90"),
    )
    try:
        assert up.returncode == 0, up.stderr
        status = json.loads(diptych(tmp_path, "status", "sglang-pd", "--json").stdout)
        body = (SEED / "request.sh").read_text().split("-d '", 1)[1].rsplit("'", 1)[0]
        url = f"http://{status['services'][0]['address']}/v1/chat/completions"
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            reply = json.load(answer)
    finally:
        down = diptych(tmp_path, "down", "sglang-pd")
    shape = json.loads((SEED / "reply.json").read_text())
    assert list(reply) == list(shape)
    assert reply["model"] == shape["model"] == "/models/Qwen3-32B"
    assert reply["choices"][0]["message"]["content"].startswith("<think>\nOkay, the user")
    assert reply["usage"]["completion_tokens"] == shape["usage"]["completion_tokens"] == 30
    assert down.returncode == 0, down.stderr
    assert {role["name"]: role["ready"] for role in status["roles"]} == {"scheduler": 1, "prefill": 2, "decode": 1}
