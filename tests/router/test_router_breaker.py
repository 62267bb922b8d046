"""Circuit breakers, the retry budget and the waits between retries."""

from __future__ import annotations

import random

import pytest

from diptych.router.breaker import Breaker, Circuit
from diptych.router.config import RouterConfig
from diptych.router.retry import BUDGET_RESERVE, RetryBudget, backoff_s


def breaker(**settings) -> Breaker:
    return Breaker(
        RouterConfig(cb_failure_threshold=3, cb_success_threshold=2, cb_timeout_duration_secs=10, **settings)
    )


def call(b: Breaker, now: float, failed: bool | None) -> None:
    b.end(now, failed, b.begin(now))


def opened() -> Breaker:
    b = breaker()
    for now in (0, 1, 2):
        call(b, now, True)
    return b


def test_opens_after_enough_failures_and_closes_after_enough_successes():
    b = opened()
    assert b.state(2) is Circuit.OPEN and not b.allows(11.9)
    assert b.state(12) is Circuit.HALF_OPEN and b.allows(12)
    call(b, 12, False)
    assert b.state(12) is Circuit.HALF_OPEN
    call(b, 13, False)
    assert b.state(13) is Circuit.CLOSED
    call(b, 14, True)
    assert b.state(14) is Circuit.CLOSED  # old failures are forgotten


def test_half_open_lets_one_through_at_a_time():
    b = opened()
    trial = b.begin(12)
    assert trial and not b.allows(12)
    b.end(12, None, trial)  # its client left: no news
    assert b.allows(12)


def test_a_failed_trial_opens_it_again():
    b = opened()
    call(b, 12, False)
    call(b, 13, True)
    assert b.state(13) is Circuit.OPEN and b.state(22.9) is Circuit.OPEN and b.allows(23)
    call(b, 23, False)
    assert b.state(23) is Circuit.HALF_OPEN  # successes count anew


def test_failures_outside_the_window_do_not_count():
    b = breaker(cb_window_duration_secs=5)
    for now in (0, 3, 6, 9, 12):
        call(b, now, True)
        assert b.state(now) is Circuit.CLOSED
    call(b, 13, True)
    assert b.state(13) is Circuit.OPEN


def test_requests_that_say_nothing_change_nothing():
    b = breaker()
    for now in range(10):
        call(b, now, None)
    assert b.state(10) is Circuit.CLOSED


def test_late_failures_of_an_open_circuit_do_not_prolong_it():
    b = breaker()
    started = [b.begin(0) for _ in range(5)]
    for trial in started[:3]:
        b.end(1, True, trial)
    for trial in started[3:]:
        b.end(9, True, trial)
    assert b.allows(11)


def test_it_can_be_switched_off():
    b = breaker(disable_circuit_breaker=True)
    for now in range(50):
        call(b, now, True)
    assert b.state(50) is Circuit.CLOSED


def test_retries_are_at_most_a_tenth_of_the_requests():
    budget, spent = RetryBudget(0.0), 0
    for _ in range(5000):
        budget.earn()
        spent += budget.spend(0.0)
    assert spent <= 500 + BUDGET_RESERVE
    assert spent >= 500


def test_the_reserve_comes_back_with_time():
    budget = RetryBudget(0.0)
    assert sum(budget.spend(0.0) for _ in range(20)) == BUDGET_RESERVE
    assert not budget.spend(0.5)
    assert budget.spend(1.6)
    assert sum(budget.spend(1000.0) for _ in range(20)) == BUDGET_RESERVE


def test_savings_are_bounded():
    budget = RetryBudget(0.0)
    for _ in range(100_000):
        budget.earn()
    assert sum(budget.spend(0.0) for _ in range(1000)) == 100


@pytest.mark.parametrize(("retry", "middle"), [(0, 0.05), (1, 0.075), (2, 0.1125), (30, 2.0)])
def test_backoff_grows_to_its_limit_with_jitter(retry, middle):
    config, rng = RouterConfig(retry_max_backoff_ms=2000), random.Random(0)
    waits = [backoff_s(config, retry, rng) for _ in range(500)]
    assert 0.8 * middle <= min(waits) < 0.85 * middle and 1.15 * middle < max(waits) <= 1.2 * middle
