"""CUDA graphs of the decode step, one for each of a few batch sizes: a step is one launch instead of hundreds.

A graph reads what a step brings from places that never change: TritonAttention's reserved memory. Rows beyond the batch
are padding that stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diptych.model.fused_decoder import FusedDecoder
from diptych.model.kernels import launch
from diptych.model.kernels.ends import argmax
from diptych.model.triton_attention import TritonAttention
from diptych.types import Plan

FEW_ROWS, SOME_ROWS, SMALL_LAYER = 2, 32, 64 << 20  # bytes
WARM_UPS = 2  # runs before a capture: compile the kernels, let libraries take their workspaces


def batch_sizes(most: int) -> list[int]:
    """The sizes that are captured, up to `most`: the steps grow so that padding costs little."""
    steps = chain((1, 2, 4), range(8, 64, 8), range(64, 128, 16), range(128, most + 32, 32))
    return sorted({min(size, most) for size in steps})


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor | None  # [size, vocab]: what the latest replay left; None on ranks that have none
    greedy: Tensor | None  # [size] int64, their argmax


class DecodeGraphs:
    """The decode steps of `model` with up to `most` rows, for which `attention` has reserved memory. `last` holds the
    tokens of the latest step, by row: negative ids refer to it (see Plan)."""

    def __init__(self, model: FusedDecoder, attention: TritonAttention, last: Tensor, most: int) -> None:
        self._model, self._attention, self._last = model, attention, last
        self._captured: dict[int, Captured] = {}
        self._arrivals = torch.zeros(most, dtype=torch.int32, device=last.device)
        self.sizes = batch_sizes(most)

    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture all sizes, the largest first: smaller ones then fit into its memory. The ranks do so together."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        try:
            for size in reversed(self.sizes):
                launch.set_overlap(*self._overlap(size))
                self._warm_up(size, stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    logits, greedy = self._step(size)
                self._captured[size] = Captured(graph, logits, greedy)
                progress(f"graphs: decode steps of {size} rows")
        finally:
            launch.set_overlap(False)

    def _warm_up(self, size: int, stream: torch.cuda.Stream) -> None:
        self._attention.begin_graph(_nobody(size), size)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(size)
        torch.cuda.synchronize()

    def _overlap(self, size: int) -> tuple[bool, bool]:
        """Whether kernels start while those before them end, and whether products do. Measured: it pays where kernels
        are short, and for products that do what follows them; attention of many rows is slowed down by it."""
        small = size <= FEW_ROWS or self._model.layer_bytes <= SMALL_LAYER
        return launch.can_overlap() and small, launch.can_overlap() and (small or size <= SOME_ROWS)

    def launch(self, plan: Plan) -> Captured | None:
        """Enqueue a plan of one new token a row, all of which sample; None if it does not fit. Results have a row for
        each of the plan, and hold until the next launch."""
        rows = len(plan.rows)
        size = next((size for size in self.sizes if size >= rows), None)
        if size is None or len(plan.token_ids) != rows or not self._attention.begin_graph(plan, size):
            return None
        graph, logits, greedy = self._captured[size]
        graph.replay()
        return Captured(graph, None if logits is None else logits[:rows], None if greedy is None else greedy[:rows])

    def _step(self, size: int) -> tuple[Tensor | None, Tensor | None]:
        features = self._model.forward(self._attention.reserved_ids(size), None, None, self._attention, last=self._last)
        assert features is not None
        logits = self._model.logits(features)
        return logits, None if logits is None else argmax(logits, self._arrivals)


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
