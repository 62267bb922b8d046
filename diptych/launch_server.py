"""`python3 -m diptych.launch_server …` is `diptych serve …`, for those who come with SGLang's command line."""

from __future__ import annotations

import sys

from diptych.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
