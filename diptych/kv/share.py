"""Which rank holds which part of the KV cache. Pure.

The ranks of a server are `pp` stages of `tp` ranks: rank = stage * tp + place in the stage. A stage holds a run of the
layers; the ranks of a stage share the kv heads. With more places than kv heads, several hold a copy of the same head.
"""

from __future__ import annotations

from typing import NamedTuple

from diptych.errors import ConfigError


def layer_range(num_layers: int, stages: int, stage: int) -> range:
    """The layers of `stage`: as equal as they can be, and the first stages have one more where they do not divide.

    Raises ConfigError if a stage would have none.
    """
    if stages > num_layers:
        raise ConfigError(f"--pp-size {stages} is more than the model's {num_layers} layers; choose a smaller one")
    size, larger = divmod(num_layers, stages)
    start = stage * size + min(stage, larger)
    return range(start, start + size + (stage < larger))


def head_range(num_heads: int, world: int, place: int) -> range:
    """The kv heads that `place` of `world` holds. Raises ConfigError if they cannot be shared out evenly."""
    if num_heads % world == 0:
        share = num_heads // world
        return range(place * share, (place + 1) * share)
    if world % num_heads == 0:
        head = place * num_heads // world
        return range(head, head + 1)
    raise ConfigError(f"{num_heads} kv heads cannot be shared by {world} ranks; choose another --tp-size")


class Grid(NamedTuple):
    """A model's kv heads and layers, and the ranks they are shared out to."""

    num_heads: int  # of the whole model, as num_layers
    num_layers: int
    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def heads(self, rank: int) -> range:
        return head_range(self.num_heads, self.tp, rank % self.tp)

    def layers(self, rank: int) -> range:
        return layer_range(self.num_layers, self.pp, rank // self.tp)

    def over(self, num_ranks: int, pp: int) -> Grid:
        """The same model on a server of `num_ranks` in `pp` stages. Raises ConfigError if there is no such share."""
        if pp < 1 or num_ranks < pp or num_ranks % pp:
            raise ConfigError(f"{num_ranks} ranks are no {pp} equal stages")
        grid = self._replace(tp=num_ranks // pp, pp=pp)
        grid.heads(0), grid.layers(0)
        return grid
