"""A double of the router: asks every server that the seed's flags name, once, and tells what they said."""

from __future__ import annotations

import argparse
import json
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

from diptych.net import listen_socket, resolve_now

parser = argparse.ArgumentParser()
parser.add_argument("--prefill", nargs="+")
parser.add_argument("--prefill-bootstrap-ports", nargs="+", type=int)
parser.add_argument("--decode", nargs="+")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
args = parser.parse_args()


def ask(url: str) -> dict[str, object]:
    parts = urlsplit(url)
    with urllib.request.urlopen(f"http://{resolve_now(str(parts.hostname))}:{parts.port}/", timeout=5) as reply:
        return dict(json.load(reply))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps([ask(url) for url in (*args.prefill, *args.decode)]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = listen_socket(args.host, args.port)
server.socket.setblocking(True)
server.serve_forever()
