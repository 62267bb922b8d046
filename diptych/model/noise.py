"""Random numbers that are a function of a key and a counter alone: no state, any order, the same bits on any device.

The hash is SplitMix64's: output n of the generator with state `key` is mix(key + n * GOLDEN) (Steele, Lea, Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014). Arithmetic is modulo 2^64 in signed 64-bit integers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
BLOCK = 1 << 22  # numbers made at once, to bound the memory between


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix(value: int) -> int:
    """SplitMix64's finalizer on a 64-bit number: a bijection."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _M1 & _MASK
    value = (value ^ (value >> 27)) * _M2 & _MASK
    return value ^ (value >> 31)


def row_key(seed: int, position: int) -> int:
    """The key of a sampling step: a function of the request's seed and the position of the token to be sampled."""
    return _signed(mix(mix(seed) + position * GOLDEN))


def hash_text(text: str) -> int:
    """A key from a name."""
    return _signed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_counters(keys: Tensor, counters: Tensor) -> Tensor:
    """int64 hashes of `keys` and `counters` (int64, broadcast together)."""
    x = keys + counters * _signed(GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    return x ^ _shift(x, 31)


def gumbel(keys: Tensor, counters: Tensor) -> Tensor:
    """float32 standard Gumbel noise, -ln(-ln u), with 53-bit u in (0, 1).

    Logarithms are taken in float64 and rounded once, so that their last bit, which differs between libraries, is gone.
    """
    u = (_shift(hash_counters(keys, counters), 11).double() + 0.5) * 2.0**-53
    return u.log_().neg_().log_().neg_().float()


def uniform(key: int, start: int, stop: int, device: str = "cpu") -> Tensor:
    """Numbers `start` … `stop - 1` of the stream `key`: float32 in [0, 1), multiples of 2^-24."""
    out = torch.empty(stop - start, dtype=torch.float32, device=device)
    base = torch.full((), key, dtype=torch.int64, device=device)  # enqueued, where a copy of a number would wait
    for at in range(start, stop, BLOCK):
        end = min(at + BLOCK, stop)
        counters = torch.arange(at, end, dtype=torch.int64, device=device)
        out[at - start : end - start] = _shift(hash_counters(base, counters), 40).float() * 2.0**-24
    return out
