"""Rotary position embedding: tables of cosines and sines, made once, and their application.

The formulas are those of transformers' `modeling_rope_utils`, so that checkpoints mean the same here. Each position's
angles are a function of that position alone: how a prompt is cut into chunks cannot show.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diptych.model.config import RopeConfig


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each `[num_positions, head_dim]` float32 on the CPU; the sines of the first half are negated.

    With x' = x with its halves swapped, the rotated vector is `x * cos + x' * sin`.
    """
    inverse, attention_factor = inverse_frequencies(rope, head_dim)
    positions = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1)
    angles = positions * inverse
    if rope.type == "dynamic" and num_positions > rope.original_max_position:
        first = rope.original_max_position
        angles[first:] = positions[first:] * _dynamic_frequencies(rope, head_dim, num_positions)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[tokens, heads, head_dim]` by `[tokens, 1, head_dim]` tables (see rope_tables)."""
    first, second = x.chunk(2, -1)
    return (x * cos).add_(torch.cat((second, first), -1).mul_(sin))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """`[head_dim / 2]` float32 inverse frequencies, and the factor of cosines and sines (attention temperature)."""
    inverse = 1.0 / _powers(rope.theta, head_dim)
    if rope.type == "linear":
        return inverse / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.type == "yarn":
        return _yarn(rope, head_dim), _yarn_attention_factor(rope)
    return inverse, 1.0


def _powers(theta: float, head_dim: int) -> Tensor:
    """theta^(2i/d), i = 0 … d/2 - 1 (Su et al., RoFormer, arXiv:2104.09864)."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """`[num_positions - original, head_dim / 2]`: dynamic NTK scaling past the pre-training context.

    The base grows with the length of the sequence: `theta * (s * n / original - (s - 1))^(d / (d - 2))` at length n
    (transformers, `_compute_dynamic_ntk_parameters`). There n is the length at the time of the forward pass; here it is
    the position itself plus one, which is the same for every token that is generated, and does not depend on chunks.
    """
    lengths = torch.arange(rope.original_max_position + 1, num_positions + 1, dtype=torch.float64)
    growth = rope.factor * lengths / rope.original_max_position - (rope.factor - 1)
    base = (rope.theta * growth ** (head_dim / (head_dim - 2))).unsqueeze(1)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return (1.0 / base**exponents).float()


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated
    (transformers, `_compute_llama3_parameters`)."""
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = torch.where(wavelength > low, inverse / rope.factor, inverse)
    return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN, "NTK by parts" (Peng et al., arXiv:2309.00071, section 3.2): dimensions that turn more than `beta_fast`
    times in the pre-training context are kept, those that turn less than `beta_slow` times divided by `factor`, with a
    linear ramp between."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(rope.theta, head_dim)
    return 1.0 / (rope.factor * powers) * ramp + 1.0 / powers * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """0.1 ln(factor) + 1 (arXiv:2309.00071, section 3.4), or the ratio of two such with own weights (`mscale`)."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return of(rope.mscale) / of(rope.mscale_all_dim)
    return of(1.0)
