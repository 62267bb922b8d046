"""Gang admission: how many pods must find room together before any is placed. Pure.

A role that waits for its dependencies has no pods, so counting it would let nothing be placed, ever. The number grows
wave by wave instead, as roles become due; pods placed before count towards it.
"""

from __future__ import annotations

from diptych.group.actions import Desired, Observed
from diptych.group.plan import replicas_now


def min_member(desired: Desired, observed: Observed) -> int:
    """The PodGroup's minMember at this moment, at least 1 as its API wants. Volcano's minTaskMember is `members`."""
    return max(1, sum(members(desired, observed).values()))


def members(desired: Desired, observed: Observed) -> dict[str, int]:
    """Pods of each role that must be placed together now; roles that wait for others are left out.

    A role counts with its `gang_min` replicas (None: all it shall have now), and `size` pods each.
    """
    replicas = replicas_now(desired, observed)
    return {
        role.name: min(replicas[role.name], replicas[role.name] if role.gang_min is None else role.gang_min) * role.size
        for role in desired.roles
        if replicas.get(role.name)
    }
