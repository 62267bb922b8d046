"""What a server's own words tell the router: what it can do, whether it is leaving, whose fault a failed hand-over is.

Pure. The words are those of our servers; nothing is concluded from words that are not known here.
"""

from __future__ import annotations

import re
from enum import Enum

import msgspec

_DRAINING = b"draining"
LEAVING = (_DRAINING, b"the engine of this server has stopped")
_DIED = b'"engine_lost"'  # the code of errors.EngineLost
OTHER = {"prefill": "decode", "decode": "prefill"}

_TRANSFER_FAILED = re.compile(rb"kv_transfer|KVTransferError|transfer failed", re.IGNORECASE)
_LATE = b"deadline_exceeded"
# What a late hand-over waited for, as transfer/room.py, peer.py and unmet.py write it.
_FOR_PREFILL = (b"cannot reach the prefill server", b"the prefill server got no request")
_FOR_OTHER = b"to meet in the room"
_FOR_EITHER = (b"the KV transfer to go on", b"with its queues")


class Guilt(Enum):
    """Who is to blame for what one server of a pair has told."""

    TELLER = "the server that told it"
    PREFILL = "prefill"
    DECODE = "decode"
    SILENT = "the server that has told nothing, if there is one"
    NOBODY = "nobody, as far as is known"


class _Health(msgspec.Struct):
    local_prefill: bool = False


def does_prefill(answer: bytes) -> bool:
    """Whether a decode server's good answer to a health check says that it takes `"bootstrap_host": null`."""
    try:
        return msgspec.json.decode(answer, type=_Health).local_prefill
    except (msgspec.MsgspecError, RecursionError):
        return False


def is_leaving(status: int, answer: bytes) -> bool:
    """Whether a server says that it takes nothing new any more, for good."""
    return status == 503 and any(word in answer for word in LEAVING)


def is_draining(status: int, answer: bytes) -> bool:
    """Whether a server says that it leaves in order, rather than because its engine died."""
    return status == 503 and _DRAINING in answer


def has_died(status: int, answer: bytes) -> bool:
    """Whether a server says that its engine died while it had the request."""
    return status == 503 and _DIED in answer


def guilt(teller: str, status: int, answer: bytes) -> Guilt:
    """Who is to blame for an error (`status` and body) that the server of role `teller` has answered.

    A late hand-over is the fault of the side that was waited for. The side that waited answers 504; the other one has
    been told by it and answers 500 with the same words.
    """
    if teller not in OTHER:
        return Guilt.TELLER
    if _LATE not in answer:
        return Guilt.SILENT if _TRANSFER_FAILED.search(answer) else Guilt.TELLER
    if any(words in answer for words in _FOR_PREFILL):
        return Guilt.PREFILL
    if _FOR_OTHER in answer:
        waiter = teller if status == 504 else OTHER[teller]
        return Guilt(OTHER[waiter])
    return Guilt.NOBODY if any(words in answer for words in _FOR_EITHER) else Guilt.TELLER
