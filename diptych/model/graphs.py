"""CUDA graphs of steps: one launch instead of hundreds.

Two kinds are captured, for a few sizes each: decode steps, and steps of few tokens that hold prompts, with or without
rows that decode. With many tokens the GPU takes longer than launching does. A graph reads what a step brings from
places that never change: TritonAttention's reserved memory. Tokens beyond the step's are padding that stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diptych.model.attention_step import padded
from diptych.model.fused_decoder import FusedDecoder
from diptych.model.kernels import launch
from diptych.model.kernels.ends import argmax
from diptych.model.triton_attention import TritonAttention
from diptych.types import Plan

FEW_ROWS, SOME_ROWS, SMALL_LAYER = 2, 32, 64 << 20  # bytes
WARM_UPS = 2  # runs before a capture: compile the kernels, let libraries take their workspaces
MIXED_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
# Of a layer, a multiplication and an addition for each number of 2 bytes and token: with more, a GPU at 700 TFLOP/s
# takes longer than a CPU to launch its eight kernels, 0.3 ms.
LAYER_OPERATIONS = 200 * 10**9


class Shape(NamedTuple):
    """Of a captured step: how many tokens it has, of up to so many rows. `decode`: one of each, and all sample."""

    tokens: int
    rows: int
    decode: bool


def batch_sizes(most: int) -> list[int]:
    """The rows of captured decode steps, up to `most`: the steps grow so that padding costs little. With 80 rows the
    products of a layer of Qwen3-32B take longer than with 96."""
    steps = chain((1, 2, 4), range(8, 64, 8), (64, 96, 112), range(128, most + 32, 32))
    return sorted({min(size, most) for size in steps})


def shapes_of(most: int, layer_bytes: int) -> list[Shape]:
    """All that are captured, with up to `most` rows. `layer_bytes`: of a layer's weights on a rank."""
    decode = [Shape(size, size, True) for size in batch_sizes(most)]
    tokens = [size for size in MIXED_TOKENS if size * layer_bytes <= LAYER_OPERATIONS]
    return decode + [Shape(size, min(size, most), False) for size in tokens]


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor | None  # [rows, vocab]: what the latest replay left; None on ranks that have none
    greedy: Tensor | None  # [rows] int64, their argmax


class StepGraphs:
    """Captured steps of `model` with up to `most` rows, for which `attention` gets memory: for sequences of up to
    `pages` pages each, with `tokens` in all. `last` holds the tokens of the latest step, by row: negative ids refer to
    it (see Plan)."""

    def __init__(
        self, model: FusedDecoder, attention: TritonAttention, last: Tensor, most: int, pages: int, tokens: int
    ) -> None:
        self._model, self._attention, self._last = model, attention, last
        self._layer_bytes = model.decoder.layer_bytes
        self.shapes = shapes_of(most, self._layer_bytes)
        self._captured: dict[Shape, Captured] = {}
        self._arrivals = torch.zeros(most, dtype=torch.int32, device=last.device)
        attention.reserve(most, pages, tokens, max(shape.tokens for shape in self.shapes))

    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture all, the largest first: smaller ones then fit into its memory. The ranks do so together."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        try:
            for shape in sorted(self.shapes, reverse=True):
                launch.set_overlap(*self._overlap(shape.tokens))
                self._warm_up(shape, stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    logits, greedy = self.step(shape)
                self._captured[shape] = Captured(graph, logits, greedy)
                progress(f"graphs: {'decode' if shape.decode else 'mixed'} steps of {shape.tokens} tokens")
        finally:
            launch.set_overlap(False)

    def launch(self, plan: Plan, wanted: Sequence[int]) -> Captured | None:
        """Enqueue a plan; None if none of the graphs holds it. Results are those of the tokens `wanted` (their places),
        the last one of each row that samples, and hold until the next launch."""
        shape = self.begin(plan, wanted)
        if shape is None:
            return None
        (graph, logits, greedy), rows = self._captured[shape], len(wanted)
        graph.replay()
        return Captured(graph, None if logits is None else logits[:rows], None if greedy is None else greedy[:rows])

    def begin(self, plan: Plan, wanted: Sequence[int]) -> Shape | None:
        """Bring a plan to where the steps of the shape that is returned read it; None if it fits none."""
        tokens, rows = len(plan.token_ids), len(plan.rows)
        decode = tokens == rows == len(wanted)
        fits = (of for of in self.shapes if of.decode == decode and tokens <= of.tokens and rows <= of.rows)
        shape = next(fits, None)
        if shape is None:
            return None
        index = None if decode else padded(np.array(wanted, np.int32), shape.rows, 0)
        return shape if self._attention.begin_graph(plan, shape.tokens, index) else None

    def step(self, shape: Shape) -> tuple[Tensor | None, Tensor | None]:
        """Compute what was begun: logits of the rows that are wanted, and their argmax."""
        attention = self._attention
        index = None if shape.decode else attention.reserved_wanted(shape.rows)
        features = self._model.forward(attention.reserved_ids(shape.tokens), None, index, attention, last=self._last)
        assert features is not None
        logits = self._model.logits(features)
        return logits, None if logits is None else argmax(logits, self._arrivals)

    def _warm_up(self, shape: Shape, stream: torch.cuda.Stream) -> None:
        if shape.decode:
            self._attention.begin_graph(_nobody(shape.rows), shape.tokens)
        else:
            self._attention.begin_graph(_nobody(0), shape.tokens, np.zeros(shape.rows, np.int32))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.step(shape)
        torch.cuda.synchronize()

    def _overlap(self, tokens: int) -> tuple[bool, bool]:
        """Whether kernels start while those before them end, and whether products do. Measured: it pays where kernels
        are short, and for products that do what follows them; attention of many rows is slowed down by it."""
        small = tokens <= FEW_ROWS or self._layer_bytes <= SMALL_LAYER
        return launch.can_overlap() and small, launch.can_overlap() and (small or tokens <= SOME_ROWS)


def _nobody(num_rows: int) -> Plan:
    """A decode step of rows that store nothing."""
    return Plan(
        step=0,
        rows=[],
        token_ids=np.zeros(num_rows, np.int32),
        positions=np.zeros(num_rows, np.int32),
        slots=np.full(num_rows, -1, np.int64),
        q_starts=np.arange(num_rows + 1, dtype=np.int32),
        kv_lens=np.ones(num_rows, np.int32),
        pages=np.zeros((num_rows, 1), np.int32),
    )
