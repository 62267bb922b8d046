"""Roles that move together: quantities in percent, and how far each may go ahead of the others. Pure.

A role's share is the fraction of its pods that have arrived. A role may have set out for `share of the slowest other +
maxSkew`; the slowest itself always for one pod more than have arrived. So all move at once, none is further ahead than
maxSkew or one of its own pods, whichever is more, and even roles of one replica get there.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor

import msgspec

from diptych.group.actions import Quantity, Update


class Share(msgspec.Struct, frozen=True):
    """`arrived` of `total` pods, total > 0. Arriving when pods are added or updated; still there when they end."""

    arrived: int
    total: int

    @property
    def fraction(self) -> Fraction:
        return Fraction(self.arrived, self.total)


def amount(quantity: Quantity, replicas: int, *, round_up: bool) -> int:
    """A quantity in pods."""
    if isinstance(quantity, int):
        return quantity
    exact = Fraction(int(quantity.removesuffix("%")) * replicas, 100)
    return ceil(exact) if round_up else floor(exact)


def budget(update: Update, replicas: int) -> tuple[int, int]:
    """(pods that may be unavailable, pods there may be beyond `replicas`) in a rollout.

    A percentage of surge is rounded up, one of unavailability down, as in Kubernetes; if both are 0, one pod may be
    unavailable. Neither is more than `replicas`.
    """
    unavailable = min(amount(update.max_unavailable, replicas, round_up=False), replicas)
    surge = min(amount(update.max_surge, replicas, round_up=True), replicas)
    return (unavailable, surge) if unavailable or surge else (1, 0)


def upper_limits(shares: Mapping[str, Share], max_skew: int) -> dict[str, int]:
    """How many pods of each role may have arrived or be on the way. Roles that have arrived hold nobody back."""
    skew, limits = Fraction(max_skew, 100), {}
    for name, share in shares.items():
        others = [other.fraction for key, other in shares.items() if key != name]
        slowest = min(others, default=Fraction(1))
        limit = floor(share.total * (slowest + skew))
        if share.fraction <= slowest:
            limit = max(limit, share.arrived + 1)
        limits[name] = min(limit, share.total)
    return limits


def lower_limits(shares: Mapping[str, Share], max_skew: int) -> dict[str, int]:
    """The same for roles with more pods than they shall have: how few of each may be left."""
    skew, limits = Fraction(max_skew, 100), {}
    for name, share in shares.items():
        others = [other.fraction for key, other in shares.items() if key != name]
        slowest = max(others, default=Fraction(1))
        limit = ceil(share.total * (slowest - skew))
        if share.fraction >= slowest:
            limit = min(limit, share.arrived - 1)
        limits[name] = max(limit, share.total)
    return limits
