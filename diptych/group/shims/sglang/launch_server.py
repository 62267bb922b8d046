"""`python3 -m sglang.launch_server` inside a local pod."""

from __future__ import annotations

import sys

from diptych.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
