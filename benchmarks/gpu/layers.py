"""Decode layers as the engine runs them: FusedDecoder over random weights, from attention to attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import Bench
from diptych.model.decoder import Layer
from diptych.model.fused_decoder import FusedDecoder
from diptych.model.kernels import launch
from diptych.model.layers import Linear, RMSNorm
from diptych.model.parallel import Parallel
from diptych.model.triton_attention import TritonAttention

EPS, CONTEXT = 1e-6, 4096
WAYS = {"no overlap": (False, False), "products overlap": (False, True), "all overlap": (True, True)}


@contextmanager
def launched(bench: Bench, way: str) -> Iterator[None]:
    """How kernels are launched: one of WAYS. Triton's interpreter knows only the first."""
    launch.set_overlap(*WAYS["no overlap" if bench.rehearse else way])
    try:
        yield
    finally:
        launch.set_overlap(False)


class Layers:
    """`count` layers, of which the last is followed by the first."""

    def __init__(self, bench: Bench, shape: Shape, count: int) -> None:
        self._bench, self._shape, self._count = bench, shape, count
        layers = [self._layer() for _ in range(count)]
        cos, sin = (self._randn(CONTEXT, 1, shape.dim) for _ in range(2))
        decoder: Any = SimpleNamespace(
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            num_layers=count + 1,
            scale=shape.dim**-0.5,
            config=SimpleNamespace(norm_eps=EPS, hidden_size=shape.hidden),
            cos=cos,
            sin=sin,
            ends=None,
            layers=[*layers, layers[0]],
            parallel=Parallel(),
        )
        self._fused = FusedDecoder(decoder)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._bench.device, dtype=self._bench.dtype)

    def _layer(self) -> Layer:
        shape = self._shape
        norms = [RMSNorm(self._randn(shape.hidden), EPS) for _ in range(2)]
        linears = {name: Linear(self._randn(n, k) / k**0.5, pack=False) for name, (n, k) in shape.products.items()}
        qk_norm = self._randn(shape.heads + shape.kv_heads, shape.dim)
        return Layer(
            norms[0], linears["qkv"], qk_norm, linears["o"], None, norms[1], linears["gate_up"], linears["down"], None
        )

    def calls(self, attention: TritonAttention, pool_layers: int, rows: int) -> list[Callable[[], Tensor]]:
        """A layer each, as often as there are layers or pool layers; each goes on from the one before it. `attention`
        has begun a decode step of so many rows. Each gives what has been added up so far."""
        x = self._randn(rows, self._shape.hidden)
        normed: list[Any] = [x.clone()]

        def run(index: int) -> Tensor:
            layer = self._fused.decoder.layers[index % self._count]
            qkv = self._fused._product(layer.qkv, normed[0])
            mixed = self._fused._attend(index % pool_layers, layer, qkv, attention)
            normed[0] = self._fused._after_attention(index % self._count, x, mixed)
            return x

        return [partial(run, index) for index in range(max(self._count, pool_layers))]
