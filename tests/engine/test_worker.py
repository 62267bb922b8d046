"""The last words of an engine that does not start."""

from __future__ import annotations

import socket
import threading

from diptych.config import ServerConfig
from diptych.engine import worker


def test_a_rank_that_cannot_load_lets_rank_0_say_why() -> None:
    """Rank 0 has most likely the same reason, and is the one that is heard."""
    rank_0, ours = socket.socketpair()
    with ours:
        spec = worker.Spec(ServerConfig(model_path="m", tp_size=2), 1, "", ours.fileno())
        failing = threading.Thread(target=worker.report_failure, args=(spec, "no such model"))
        with rank_0:
            failing.start()
            failing.join(0.2)
            assert failing.is_alive()
        failing.join(worker.LAST_WORDS_S - 1)
        assert not failing.is_alive()
