"""How often and when a request is sent again. Pure: time and randomness are arguments."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable

from diptych.errors import DiptychError
from diptych.router.config import RouterConfig

STATUSES = frozenset((408, 429, 500, 502, 503, 504))
MAX_DEATHS = 3  # of servers under one request, whatever else they had
BUDGET_SHARE = 0.1  # retries a request earns for all
BUDGET_RESERVE = 10.0  # retries that are there without any request having earned them
BUDGET_REFILL_PER_S = 1.0  # how fast the reserve comes back
BUDGET_MAX = 100.0


class Suspect:
    """A request, as far as servers may die of it.

    One death is held against nobody. The only suspect that a second server had is guilty. Where there were several,
    each is tried once more while no other such is, so that the innocent are served; a third death decides.
    """

    def __init__(self) -> None:
        self._deaths: set[Hashable] = set()
        self._shared: set[Hashable] = set()  # deaths that may be another suspect's doing

    def had(self, death: Hashable, others: Iterable[Suspect]) -> None:
        """A server died while it had this request and still has `others`, which tell so later."""
        for other in others:
            if self._deaths and other._deaths:
                self._shared.add(death)
                other._shared.add(death)
        self._deaths.add(death)

    @property
    def num_deaths(self) -> int:
        return len(self._deaths)

    @property
    def is_guilty(self) -> bool:
        return self.num_deaths >= MAX_DEATHS or (self.goes_alone and not self._deaths & self._shared)

    @property
    def goes_alone(self) -> bool:
        return self.num_deaths >= 2


class GivenUp(DiptychError):
    """Servers die of the request, as far as is known. Its status is one that proxies do not repeat by themselves."""

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
