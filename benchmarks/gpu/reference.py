"""What results stand beside: floors by arithmetic, vLLM 0.25.1's figures, targets.

The ceilings were measured on one NVIDIA H200: a device copy (bytes read + written) and a bf16 product at its best. The
peer's figures are the project's own measurements of 2026-11-22: vLLM 0.25.1, torch 2.11.0+cu130, FA3, inductor, CUDA
graphs, random weights, no prefix cache, 8,192 batched tokens at most, on one H200 (TP 2: two of one host). They are for
an H200 only; so are the targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.models import MODELS
from benchmarks.gpu.shapes import Shape

BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12
PEER = "vLLM 0.25.1, measured by the project on 2026-11-22"
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Beside:
    """None: unknown."""

    floor: float | None = None
    peer: float | None = None
    target: float | None = None


def weight_count(shape: Shape) -> int:
    """Numbers in the matrices that a token passes, the head's among them."""
    return shape.layers * sum(n * k for n, k in shape.products.values()) + shape.vocab * shape.hidden


def kv_bytes(shape: Shape) -> int:
    """Of one token."""
    return 2 * shape.layers * shape.kv_heads * shape.dim * ITEM


def decode_floor_ms(shape: Shape, batch: int, context: int, tp: int = 1) -> float:
    """A decode step that reads all weights and all KV once; `context` is half of 128 tokens longer on average."""
    read = weight_count(shape) * ITEM + batch * (context + 64) * kv_bytes(shape)
    return read / BYTES_PER_S / tp * 1e3


def prefill_floor_tok_s(shape: Shape, length: int, tp: int = 1) -> float:
    """Products at their best, and attention over the half of its square that is not masked, at the same rate."""
    matrices = weight_count(shape) - shape.vocab * shape.hidden  # the head sees one token of a prompt
    flop = length * 2 * matrices + 2 * shape.layers * shape.heads * shape.dim * length**2
    return length * FLOP_PER_S * tp / flop


# (model, tp, batch, context): (vLLM's TPOT in ms, target or None)
TPOT_MS: dict[tuple[str, int, int, int], tuple[float, float | None]] = {
    ("Qwen3-32B", 1, 1, 1024): (18.39, 16.2),
    ("Qwen3-32B", 1, 8, 1024): (19.09, 16.8),
    ("Qwen3-32B", 1, 32, 1024): (21.01, 18.6),
    ("Qwen3-32B", 1, 64, 1024): (24.11, 21.2),
    ("Qwen3-32B", 1, 128, 1024): (31.21, 26.0),
    ("Qwen3-32B", 2, 1, 1024): (11.07, 9.6),
    ("Qwen3-32B", 2, 32, 1024): (12.73, 10.9),
    ("Qwen3-0.6B", 1, 1, 1024): (2.22, 0.9),
    ("Qwen3-0.6B", 1, 32, 1024): (3.02, 1.9),
}
# (model, tp, prompts, length): (vLLM's tokens per second, target or None)
PREFILL_TOK_S: dict[tuple[str, int, int, int], tuple[float, float | None]] = {
    ("Qwen3-32B", 1, 1, 1024): (9506, None),
    ("Qwen3-32B", 1, 64, 1024): (10040, 10600),
    ("Qwen3-32B", 1, 1, 4096): (9308, 10000),
    ("Qwen3-32B", 1, 16, 4096): (9520, None),
    ("Qwen3-32B", 2, 1, 4096): (16900, None),
    ("Qwen3-32B", 2, 8, 4096): (17200, 18500),
    ("Qwen3-32B", 2, 32, 1024): (17900, None),
    ("Qwen3-0.6B", 1, 32, 1024): (224000, None),
    ("Qwen3-0.6B", 1, 8, 4096): (316000, None),
}
# (model, tp, load): (vLLM's output tokens per second, target or None)
OUTPUT_TOK_S: dict[tuple[str, int, str], tuple[float, float | None]] = {
    ("Qwen3-0.6B", 1, "fixed"): (37900, 50000),
    ("Qwen3-0.6B", 1, "mix"): (24200, 32000),
    ("Qwen3-32B", 2, "fixed"): (9800, None),
    ("Qwen3-32B", 2, "mix"): (5300, None),
}
READY_TARGET_S = {("Qwen3-32B", 1): 60.0}


def tpot(model: str, tp: int, batch: int, context: int) -> Beside:
    peer, target = TPOT_MS.get((model, tp, batch, context), (None, None))
    return Beside(decode_floor_ms(MODELS[model], batch, context, tp), peer, target)


def prefill(model: str, tp: int, count: int, length: int) -> Beside:
    peer, target = PREFILL_TOK_S.get((model, tp, count, length), (None, None))
    return Beside(prefill_floor_tok_s(MODELS[model], length, tp), peer, target)


def output(model: str, tp: int, load: str) -> Beside:
    peer, target = OUTPUT_TOK_S.get((model, tp, load), (None, None))
    return Beside(None, peer, target)


def ready(model: str, tp: int) -> Beside:
    return Beside(target=READY_TARGET_S.get((model, tp)))
