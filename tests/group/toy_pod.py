"""A pod for tests: an HTTP server that tells about itself and ends when asked to.

GET / answers with pid, environment and interpreter; GET /exit?3 ends the process with status 3.
`--when FILE` waits for the file before listening; `--log FILE` appends "start" and "stop" lines with the pod's name.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--when", default="")
parser.add_argument("--log", default="")
args = parser.parse_args()


def note(what: str) -> None:
    if args.log:
        with Path(args.log).open("a") as log:
            log.write(f"{what} {os.environ['HOSTNAME']}\n")


def end(*_: object) -> None:
    note("stop")
    os._exit(0)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/exit?"):
            os._exit(int(self.path.removeprefix("/exit?")))
        body = json.dumps({"pid": os.getpid(), "env": dict(os.environ), "executable": sys.executable}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


signal.signal(signal.SIGTERM, end)
note("start")
while args.when and not Path(args.when).exists():
    time.sleep(0.02)
print(f"listening as {os.environ['HOSTNAME']}", flush=True)
HTTPServer((args.host, args.port), Handler).serve_forever()
