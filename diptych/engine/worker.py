"""An engine process: `python -m diptych.engine.worker`, one a rank, its Spec on standard input.

Rank 0 talks to the API process, plans, and leads the other ranks; they run what they are told. A worker ends when the
channel to its leader closes, so none outlives its server.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
import signal
import sys
import time

import msgspec
import uvloop

from diptych.engine.channel import Channel
from diptych.engine.follow import follow
from diptych.engine.lead import lead
from diptych.engine.load import Spec, load
from diptych.errors import DiptychError
from diptych.obs import logs
from diptych.types import Failed, FromEngine, ToEngine

log = logging.getLogger(__name__)

LAST_WORDS_S = 5.0  # of rank 0, while the others wait to end


def main() -> None:
    """Entry point. Exits 0 when the leader went away, 1 after an error (which it has logged and reported)."""
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=Spec)
    # The server process decides when its engines end: signals to the process group (Ctrl-C) are not for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.set_up(spec.config.log_level, f"engine{spec.rank}" if spec.config.num_ranks > 1 else "engine")
    try:
        code = run(spec)
    except Exception:
        log.exception("the engine failed")
        code = 1
    logging.shutdown()
    os._exit(code)  # nothing is left to save, and taking torch apart costs a second of CPU


def run(spec: Spec) -> int:
    """Load and serve. Returns the exit status."""
    started = time.monotonic()
    try:
        runner = load(spec)
    except DiptychError as error:
        report_failure(spec, error.message)
        return 1
    load_s = time.monotonic() - started
    gc.collect()
    gc.freeze()  # what is there now stays; looking at it takes a tenth of a second each time
    try:
        uvloop.run(lead(spec, runner, load_s) if spec.rank == 0 else follow(spec, runner))
    except DiptychError as error:
        log.error("%s", error.message)
        return 1
    return 0


def report_failure(spec: Spec, message: str) -> None:
    """Tell the API process why this engine does not start (rank 0); it shows the reason.

    The API process takes the first end of a process for the reason, and hears it from rank 0 alone. What fails here
    most often fails there too, so the other ranks let rank 0 end first; only if it does not, their log has the reason.
    """

    async def tell() -> None:
        channel: Channel = Channel(ToEngine, lambda _: None, lambda: None)
        await channel.open(spec.leader_fd)
        reply: FromEngine = Failed(message)
        channel.send(reply)
        channel.close()
        await asyncio.sleep(0)

    if spec.rank == 0:
        asyncio.run(tell())
    elif not select.select([spec.leader_fd], [], [], LAST_WORDS_S)[0]:
        log.error("%s", message)


if __name__ == "__main__":
    main()
