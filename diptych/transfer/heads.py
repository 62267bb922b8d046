"""Who sends which kv heads of which layers to whom. Pure."""

from __future__ import annotations

from typing import NamedTuple

from diptych.kv.share import Grid


class Piece(NamedTuple):
    """What one decode rank gets of each page from one prefill rank; numbered over the whole model."""

    rank: int
    heads: range
    layers: range


def source_of(num_heads: int, world: int, head: int, destination: int) -> int:
    """The one of `world` places in a prefill stage that sends `head` to place `destination` of a decode stage; copies
    share the work."""
    if world <= num_heads:
        return head // (num_heads // world)
    copies = world // num_heads
    return head * copies + destination % copies


def pieces_to_send(here: Grid, rank: int, there: Grid) -> list[Piece]:
    """What prefill rank `rank` sends to each decode rank, so that each head of each layer there has one source."""
    pieces: list[Piece] = []
    mine = here.layers(rank)
    for destination in range(there.num_ranks):
        wanted = there.layers(destination)
        layers = range(max(mine.start, wanted.start), min(mine.stop, wanted.stop))
        heads = [
            head
            for head in there.heads(destination)
            if source_of(here.num_heads, here.tp, head, destination % there.tp) == rank % here.tp
        ]
        if heads and layers:  # heads are always one run: both sides hold consecutive ones
            pieces.append(Piece(destination, range(heads[0], heads[-1] + 1), layers))
    return pieces
