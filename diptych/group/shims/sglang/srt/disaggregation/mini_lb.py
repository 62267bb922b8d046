"""`python3 -m sglang.srt.disaggregation.mini_lb` inside a local pod."""

from __future__ import annotations

import sys

from diptych.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["route", *sys.argv[1:]]))
