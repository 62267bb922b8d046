"""Drawing tokens on a GPU: launches the kernels of model/kernels/sampling.py. Imported only where Triton is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from diptych.model.kernels import launch
from diptych.model.kernels.sampling import (
    choose_kernel,
    draw_kernel,
    finish_kernel,
    list_kernel,
    measure_kernel,
    peak_kernel,
)
from diptych.model.noise import row_key
from diptych.model.staging import to_device
from diptych.types import Row, Sampling

BLOCK, WARPS = 2048, 8  # tokens of a program that measures; more would leave one program a processor, for registers
LISTED = 1024  # tokens of a step through the list
DRAWN = 1024  # tokens of a program that draws
DIGIT = 4  # bits
COARSE = 4  # digits before the list is made: 16 bits, all that a bfloat16 has


def draw(rows: Sequence[Row], places: Sequence[int], logits: Tensor, tokens: Tensor) -> None:
    """Draw for `rows`: their logits are the rows `places` of `logits` `[n, vocab]` (bfloat16, float16 or float32, each
    row contiguous), their tokens go to the same places of `tokens` (int64). Enqueues only."""
    Draw(rows, places, logits).into(tokens)


def compile_draws(dtype: torch.dtype, vocab_size: int, device: str) -> None:
    """Have the kernels compiled, for logits of `dtype` and for the float32 of rows whose logits were changed."""
    for kind in {dtype, torch.float32}:
        logits = torch.zeros(1, vocab_size, dtype=kind, device=device)
        tokens = torch.zeros(1, dtype=torch.int64, device=device)
        for sampling in (Sampling(), Sampling(top_k=2, top_p=0.5)):
            row = Row(rid="", num_new=1, num_cached=0, samples=True, sampling=sampling, position=0)
            draw([row], [0], logits, tokens)


class Draw:
    """What the draws of a step share. Parameters go to the device in one copy."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        settings, vocab_size = [row.sampling for row in rows], logits.shape[1]
        padded = -(-len(rows) // 2) * 2  # of 16 bytes: kernels are compiled for how pointers are aligned
        host = np.zeros((6, padded), np.int64)
        parameters = host[:, : len(rows)]
        parameters[0], parameters[1] = places, [row_key(row.sampling.seed, row.position) for row in rows]
        reals = parameters[2:].view(np.float64)
        reals[0] = np.array([s.temperature for s in settings], np.float32)
        reals[1] = [s.top_k if 0 < s.top_k < vocab_size else 0 for s in settings]
        reals[2] = [max(s.top_p, 1e-300) if s.top_p < 1.0 else 0 for s in settings]
        reals[3] = [s.min_p for s in settings]
        self._cut_by_count, self._cut_by_mass, self._weighed = (bool(limits.any()) for limits in reals[1:])
        device = to_device(host, np.int64, logits.device)
        self._rows, self._keys = device[0], device[1]
        self._temperatures, self._top_k, self._top_p, self._min_p = device[2:].view(torch.float64)
        self._logits, self._count, self._vocab_size = logits, len(rows), vocab_size
        self._id_bits = (vocab_size - 1).bit_length()
        self._bound, self._padded = self._cut_by_count or self._cut_by_mass or self._weighed, padded

    def into(self, tokens: Tensor) -> None:
        """The draw itself."""
        self._peaks, self._floors = torch.zeros(2, self._padded, dtype=torch.int64, device=tokens.device)
        if self._cut_by_mass or self._weighed:
            stride = self._logits.stride(0)
            self._launch(peak_kernel, self._blocks(BLOCK), self._peaks, stride, BLOCK=BLOCK, num_warps=WARPS)
        if self._cut_by_count:
            self._cut(self._top_k, mass=False)
        if self._cut_by_mass:
            self._cut(self._top_p, mass=True)
        count, blocks = self._blocks(DRAWN)
        best = torch.empty(count, blocks, dtype=torch.int64, device=tokens.device)
        self._launch(
            draw_kernel, (count, blocks), self._keys, self._min_p, self._peaks, self._floors, best,
            self._logits.stride(0), BOUND=self._bound, ID_BITS=self._id_bits, BLOCK=DRAWN, num_warps=4,
        )  # fmt: skip
        padded = triton.next_power_of_2(blocks)
        choose_kernel[(count,)](
            best, self._rows, tokens, blocks, VOCAB=self._vocab_size, ID_BITS=self._id_bits, BLOCKS=padded, num_warps=1,
            **launch.options(),
        )  # fmt: skip

    def _cut(self, limits: Tensor, *, mass: bool) -> None:
        """Raise the floors to where each row's run reaches its limit: a count, or a share of the mass (0: no limit)."""
        count, blocks = self._blocks(BLOCK)
        device = limits.device
        sums = torch.zeros(COARSE * count << DIGIT, dtype=torch.int64, device=device)
        parts = torch.empty(count * blocks << DIGIT, dtype=torch.int64, device=device)
        lengths = torch.zeros(count, dtype=torch.int32, device=device)
        listed = torch.empty(count, self._vocab_size, dtype=torch.int32, device=device)
        rounds = -(-(32 + self._id_bits) // DIGIT)
        shape: dict[str, Any] = {"MASS": mass, "ROUNDS": rounds, "ID_BITS": self._id_bits, "DIGIT": DIGIT}
        stride = self._logits.stride(0)
        for done in range(COARSE):
            self._launch(
                measure_kernel, (count, blocks), limits, self._peaks, self._floors, sums, parts, stride, done,
                BLOCK=BLOCK, num_warps=WARPS, **shape,
            )  # fmt: skip
        self._launch(
            list_kernel, (count, blocks), limits, self._floors, sums, parts, lengths, listed, stride,
            COARSE=COARSE, BLOCK=BLOCK, num_warps=WARPS, **shape,
        )  # fmt: skip
        self._launch(
            finish_kernel, (count,), limits, self._peaks, self._floors, sums, lengths, listed, stride,
            COARSE=COARSE, BLOCK=LISTED, num_warps=4, **shape,
        )  # fmt: skip

    def _blocks(self, block: int) -> tuple[int, int]:
        return self._count, triton.cdiv(self._vocab_size, block)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        kernel[grid](
            self._logits, self._rows, self._temperatures, *arguments, VOCAB=self._vocab_size, **options,
            **launch.options(),
        )  # fmt: skip
