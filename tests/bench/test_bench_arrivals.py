from __future__ import annotations

import numpy as np
import pytest

from diptych.bench.arrivals import arrival_offsets
from diptych.errors import ConfigError


def test_all_at_once() -> None:
    assert list(arrival_offsets(4, float("inf"), 1)) == [0.0] * 4


def test_poisson_is_seeded_ascending_and_starts_at_once() -> None:
    first = arrival_offsets(500, 8.0, 7)
    assert list(first) == list(arrival_offsets(500, 8.0, 7))
    assert list(first) != list(arrival_offsets(500, 8.0, 8))
    assert first[0] == 0.0
    assert (np.diff(first) > 0).all()


def test_poisson_gaps_have_the_mean_and_spread_of_the_rate() -> None:
    gaps = np.diff(arrival_offsets(20_001, 50.0, 3))
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.03)  # an exponential's deviation is its mean


def test_edges() -> None:
    assert list(arrival_offsets(0, 5.0, 1)) == []
    assert list(arrival_offsets(1, 5.0, 1)) == [0.0]
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="--request-rate"):
            arrival_offsets(3, rate, 1)
