"""What a model's layers ask of attention, whatever computes it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from diptych.types import Plan


class AttentionBackend(Protocol):
    """Writes and reads the KV pool for a model's layers. One step: `begin`, then `attend` for each layer."""

    def begin(self, plan: Plan) -> None:
        """Prepare what all layers share."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        """Store `k`, `v` `[rows, kv_heads, dim]` of the plan's tokens in their slots, then attend causally from `q`
        `[rows, heads, dim]` to each sequence's pages: `[rows, heads * dim]`. Rows past the plan's tokens are padding.
        Each row is contiguous.

        `window` > 0: a token sees itself and the `window - 1` before it. `softcap` > 0: a score s is
        softcap * tanh(s / softcap).
        """
