"""The shapes that are timed: layers of Qwen3-32B (whole and halved), 8B and 0.6B; tiny ones for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diptych.types import Plan


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a layer's products."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.dim, self.hidden),
            "o": (self.hidden, self.heads * self.dim),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


QWEN3_32B = Shape("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936)
QWEN3_8B = Shape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936)
QWEN3_600M = Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936)
HALVES = {  # of Qwen3-32B's products, (N, K): what each of two ranks computes
    "qkv": (5120, 5120), "o": (5120, 4096), "gate_up": (25600, 5120), "down": (5120, 12800), "head": (75968, 5120),
}  # fmt: skip
TINY = Shape("tiny", 2, 64, 96, 4, 2, 16, 200)


def plan_of(spans: list[tuple[int, int]], page_size: int, seed: int = 0) -> Plan:
    """Sequences of (cached, new) tokens in pages of random order; no page is shared."""
    counts = [-(-(cached + new) // page_size) for cached, new in spans]
    free = np.random.default_rng(seed).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(spans), max(counts)), np.int32)
    positions, slots, at = [], [], 0
    for row, ((cached, new), count) in enumerate(zip(spans, counts, strict=True)):
        table[row, :count] = free[at : at + count]
        at += count
        position = np.arange(cached, cached + new)
        positions.append(position)
        slots.append(table[row, position // page_size].astype(np.int64) * page_size + position % page_size)
    return Plan(
        step=0,
        rows=[],
        token_ids=np.zeros(sum(new for _, new in spans), np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slots=np.concatenate(slots),
        q_starts=np.cumsum([0, *(new for _, new in spans)]).astype(np.int32),
        kv_lens=np.array([cached + new for cached, new in spans], np.int32),
        pages=table,
    )


def num_pages(plan: Plan, page_size: int) -> int:
    return int((-(-plan.kv_lens // page_size)).sum())
