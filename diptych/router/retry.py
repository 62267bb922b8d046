"""How often and when a request is sent again. Pure: time and randomness are arguments."""

from __future__ import annotations

import random

from diptych.errors import DiptychError
from diptych.router.config import RouterConfig

STATUSES = frozenset((408, 429, 500, 502, 503, 504))
MAX_DEATHS = 2  # of servers under one request: then it is not sent again, as it may be what kills them
BUDGET_SHARE = 0.1  # retries a request earns for all
BUDGET_RESERVE = 10.0  # retries that are there without any request having earned them
BUDGET_REFILL_PER_S = 1.0  # how fast the reserve comes back
BUDGET_MAX = 100.0


class GivenUp(DiptychError):
    """The request may be what servers die of. Its status is one that proxies do not repeat by themselves."""

    code = "servers_died"


class RetryBudget:
    """Keeps retries at or below a tenth of the requests, so that retrying does not make an overload worse."""

    def __init__(self, now: float) -> None:
        self._tokens = BUDGET_RESERVE
        self._at = now

    def earn(self) -> None:
        """A request has come."""
        self._tokens = min(self._tokens + BUDGET_SHARE, BUDGET_MAX)

    def spend(self, now: float) -> bool:
        """Take a retry out of the budget; False if there is none."""
        if self._tokens < BUDGET_RESERVE:
            self._tokens = min(BUDGET_RESERVE, self._tokens + (now - self._at) * BUDGET_REFILL_PER_S)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def backoff_s(config: RouterConfig, retry: int, rng: random.Random) -> float:
    """The wait before retry number `retry`, the first being 0: exponential, with jitter to both sides."""
    exact = config.retry_initial_backoff_ms * config.retry_backoff_multiplier**retry
    jitter = 1 + config.retry_jitter_factor * (2 * rng.random() - 1)
    return min(exact, config.retry_max_backoff_ms) * max(jitter, 0.0) / 1000
