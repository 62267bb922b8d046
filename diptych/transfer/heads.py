"""Who holds which kv heads, and who sends which of them to whom. Pure.

With more ranks than kv heads, several ranks hold a copy of the same head (rank r holds head r * heads // world).
"""

from __future__ import annotations

from typing import NamedTuple

from diptych.errors import ConfigError


class HeadSlice(NamedTuple):
    """Heads [start, stop), numbered over the whole model, for one decode rank."""

    rank: int
    start: int
    stop: int


def head_range(num_heads: int, world: int, rank: int) -> range:
    """The kv heads that `rank` of `world` holds. Raises ConfigError if they cannot be shared out evenly."""
    if num_heads % world == 0:
        share = num_heads // world
        return range(rank * share, (rank + 1) * share)
    if world % num_heads == 0:
        head = rank * num_heads // world
        return range(head, head + 1)
    raise ConfigError(f"{num_heads} kv heads cannot be shared by {world} ranks; choose another --tp-size")


def source_of(num_heads: int, world: int, head: int, destination: int) -> int:
    """The one prefill rank of `world` that sends `head` to decode rank `destination`; copies share the work."""
    if world <= num_heads:
        return head // (num_heads // world)
    copies = world // num_heads
    return head * copies + destination % copies


def slices_to_send(num_heads: int, world: int, rank: int, decode_world: int) -> list[HeadSlice]:
    """What prefill rank `rank` of `world` sends to each decode rank, so that each head there has exactly one source."""
    head_range(num_heads, world, rank)
    slices: list[HeadSlice] = []
    for destination in range(decode_world):
        mine = [
            head
            for head in head_range(num_heads, decode_world, destination)
            if source_of(num_heads, world, head, destination) == rank
        ]
        if mine:  # always one run: both sides hold consecutive heads
            slices.append(HeadSlice(destination, mine[0], mine[-1] + 1))
    return slices
