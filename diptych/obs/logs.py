"""Logging: one line an event, with the request's id where there is one; never prompt or answer text."""

from __future__ import annotations

import logging
import re
import sys

from aiohttp.http import HttpProcessingError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _OneLine(logging.Formatter):
    """Line breaks and other control characters within an event become visible marks, so that a client's text can
    neither forge a line nor command a terminal; tracebacks stay as they are.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))


def _shorten(record: logging.LogRecord) -> bool:
    """Malformed HTTP is the client's fault and anybody can send it: one quiet line, no traceback."""
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.msg, record.args, record.exc_info = "malformed HTTP from a client", (), None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


def set_up(level: str, role: str) -> None:
    """Log to standard error from `level` on (debug, info, warning, error); `role` names the process in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _OneLine(f"%(asctime)s.%(msecs)03d %(levelname).1s {role} %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    server = logging.getLogger("aiohttp.server")
    if _shorten not in server.filters:
        server.addFilter(_shorten)
    for noisy in ("asyncio", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
