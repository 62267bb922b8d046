"""When requests are sent: pure, seeded."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from diptych.errors import ConfigError


def arrival_offsets(num: int, rate: float, seed: int) -> NDArray[np.float64]:
    """Seconds after the start at which each of `num` requests arrives; ascending, the first at 0.

    `rate` requests per second with exponential gaps (a Poisson process); infinity: all at once. The same arguments give
    the same offsets. Raises ConfigError for a rate that is not positive.
    """
    if not rate > 0:
        raise ConfigError(f"--request-rate must be positive, or inf for all at once, not {rate}")
    if math.isinf(rate):
        return np.zeros(num)
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, size=max(num - 1, 0))
    return np.concatenate([np.zeros(min(num, 1)), np.cumsum(gaps)])
