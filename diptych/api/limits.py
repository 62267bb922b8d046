"""How large a request may be. One place, so that the documentation and the tests can read it.

The body limit lets a batch of 128 prompts of 4,000 tokens pass, as text or as token ids.
"""

from __future__ import annotations

from collections.abc import Sized

from diptych.errors import BadRequest

MAX_BODY_BYTES = 4 << 20
MAX_CONTAINERS = 1 << 16  # opening brackets and braces of a body, those in strings included
BODY_TIMEOUT_S = 60.0  # a body must have arrived after this
WRITE_TIMEOUT_S = 120.0  # a client that reads nothing for so long has left
MAX_HEADER_BYTES = 16 << 10  # one header line
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_N = 128
MAX_BATCH = 1024  # sequences of one request: prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 1024
MAX_RID_CHARS = 128
MAX_SALT_CHARS = 256
MAX_JSON_DEPTH = 64  # of tools and template variables
MAX_INT64 = (1 << 63) - 1


def at_most(limit: int, value: Sized | None, param: str) -> None:
    """Raise BadRequest when `value` has more than `limit` elements."""
    if value is not None and len(value) > limit:
        raise BadRequest(f"{param} must not have more than {limit} elements, not {len(value)}", param=param)


def within(low: float, high: float, value: float, param: str) -> None:
    """Raise BadRequest when `value` is not in [low, high]. NaN is in no range."""
    if not low <= value <= high:
        raise BadRequest(f"{param} must be between {low:g} and {high:g}, not {value:g}", param=param)
