"""A double of a server: takes the seed's flags, opens the model folder, listens where it was told."""

from __future__ import annotations

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from diptych.mounts import resolve

parser = argparse.ArgumentParser()
for flag in ("--tp", "--model-path", "--disaggregation-mode", "--port", "--host", "--disaggregation-bootstrap-port"):
    parser.add_argument(flag)
parser.add_argument("--enable-metrics", action="store_true")
args = parser.parse_args()
facts = vars(args) | {"model": Path(resolve(args.model_path), "name.txt").read_text(), "pod": os.environ["HOSTNAME"]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(facts).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer((args.host, int(args.port)), Handler).serve_forever()
