"""`make demo`: two prefill servers, a decode server and a router from examples/demo.yaml answer the seed's question.

Without --once it keeps serving until Ctrl-C. Exit status 0 only if the reply is right and KV pages moved between
processes.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from diptych.group.local.paths import GroupFolder, state_root
from diptych.testing.processes import metrics

ROOT = Path(__file__).resolve().parents[1]
GROUP = "demo"
REQUEST_TIMEOUT_S = 60.0
POLL_S = 0.5


class NotUp(Exception):
    """The group did not come up; `diptych up` has said why and left nothing. The first argument: its exit status."""


def diptych(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "diptych", *args], cwd=ROOT, text=True, check=False, **options)


def bring_up(port: int) -> None:
    """Raises NotUp. Ctrl-C reaches `diptych up` through this program only, so once: it then ends what it started."""
    claim, service = f"demo-model={ROOT / 'models/demo'}", f"{GROUP}={port}"
    options = ("--claim", claim, "--service-port", service, "--detach", "--timeout", "120")
    command = [sys.executable, "-m", "diptych", "up", "examples/demo.yaml", *options]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as up:
        try:
            status = up.wait()
        except KeyboardInterrupt:
            up.send_signal(signal.SIGINT)
            status = up.wait()
    if status == 2 and is_taken(port):
        print("demo: `.venv/bin/python examples/demo.py --port PORT` serves on another port", file=sys.stderr)
    if status:
        raise NotUp(status)


def is_taken(port: int) -> bool:
    """Whether somebody else than this group listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0 and not folder().running()


def folder() -> GroupFolder:
    return GroupFolder(state_root(), GROUP)


def snapshot() -> dict[str, Any]:
    """The group, as `diptych status --json` has it."""
    return dict(json.loads(diptych("status", GROUP, "--json", capture_output=True).stdout))


def seed_request() -> dict[str, Any]:
    """The body that examples/seed/request.sh sends."""
    text = (ROOT / "examples/seed/request.sh").read_text()
    return dict(json.loads(text.split("-d '", 1)[1].rsplit("'", 1)[0]))


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
        return dict(json.load(reply))


def faults(reply: dict[str, Any], body: dict[str, Any]) -> list[str]:
    """What is wrong with the reply: its shape against the seed's, its length, what it says. Empty if it is right."""
    shape = json.loads((ROOT / "examples/seed/reply.json").read_text())
    found = []
    if list(reply) != list(shape):
        found.append(f"keys {list(reply)}, not {list(shape)}")
        return found
    choice, usage = reply["choices"][0], reply["usage"]
    if list(choice) != list(shape["choices"][0]) or list(choice["message"]) != list(shape["choices"][0]["message"]):
        found.append("the choice has not the keys of the seed's reply")
    if usage["completion_tokens"] != body["max_tokens"] or choice["finish_reason"] != "length":
        found.append(
            f"{usage['completion_tokens']} tokens, ended by {choice['finish_reason']}; wanted {body['max_tokens']}"
        )
    if not choice["message"]["content"].startswith("<think>\nOkay, the user"):
        found.append("the answer does not begin as this model was taught to")
    if reply["model"] != body["model"]:
        found.append(f"model {reply['model']}, not {body['model']}")
    return found


def moved_pages() -> dict[str, float]:
    """KV pages sent (-) and received (+) by each pod, from their own metrics."""
    moved = {}
    for pod in snapshot()["pods"]:
        if pod["role"] in ("prefill", "decode"):
            with urllib.request.urlopen(f"http://{pod['ip']}:8000/metrics", timeout=10) as page:
                values = metrics(page.read().decode())
            moved[pod["name"]] = values["sglang:kv_pages_received_total"] - values["sglang:kv_pages_sent_total"]
    return moved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the reply")
    parser.add_argument(
        "--port", type=int, default=8000, help="port of 127.0.0.1 to serve on; 0: any free one (default: 8000)"
    )
    args = parser.parse_args()
    started = time.monotonic()
    bring_up(args.port)
    try:
        print(f"ready after {time.monotonic() - started:.1f} s\n")
        return converse(f"http://{snapshot()['services'][0]['address']}", once=args.once)
    except KeyboardInterrupt:
        print()
        return 0
    finally:
        diptych("down", GROUP)


def converse(url: str, *, once: bool) -> int:
    body = seed_request()
    print(f"POST {url}/v1/chat/completions\n{json.dumps(body)}\n")
    try:
        reply = ask(url, body)
    except urllib.error.HTTPError as error:
        print(f"HTTP {error.code}: {error.read().decode()}", file=sys.stderr)
        return 1
    print(json.dumps(reply, ensure_ascii=False), "\n")
    wrong = faults(reply, body)
    moved = moved_pages()
    if not any(n > 0 for n in moved.values()) or sum(moved.values()):
        wrong.append(f"KV pages sent and received do not match: {moved}")
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    if wrong:
        return 1
    print("The reply is right. KV pages received (+) and sent (-):")
    print("  " + "   ".join(f"{name} {n:+.0f}" for name, n in moved.items()) + "\n")
    if not once:
        print(NEXT.format(url=url), flush=True)
        serve()
    return 0


def serve() -> None:
    """Returns at Ctrl-C or SIGTERM, or when somebody else has taken the group down."""
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # so that they are waited for, and reach no handler
    while folder().running() and signal.sigtimedwait(ends, POLL_S) is None:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)  # `diptych down` inherits the mask


NEXT = """\
Try next (in another terminal):
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "What is 12 + 30?"}}]}}'
  curl {url}/v1/models
  .venv/bin/diptych status demo              pods, addresses, processes, restarts
  .venv/bin/diptych logs demo -f             what they write
  .venv/bin/diptych scale demo/prefill 1     one prefill server less
  .venv/bin/diptych bench --base-url {url} --tokenizer models/demo --num-prompts 50 --max-concurrency 8 \\
    --random-input-len 100 --random-output-len 30
  kill -9 a pod's PID (status shows it): it comes back, and the router goes on with the others

Serving until Ctrl-C."""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotUp as failed:
        sys.exit(failed.args[0])
    except KeyboardInterrupt:  # once more than asked for: what goes down does so by itself
        sys.exit(130)
