"""From settings to a model that can run: which implementation, its weights, and whether its arithmetic is exact."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model.attention import AttentionBackend
from diptych.model.config import (
    NATIVE,
    ModelConfig,
    architecture_of,
    checkpoint_dtype,
    load_model_config,
    model_folder,
    read_json,
)
from diptych.model.decoder import Decoder
from diptych.model.fit import context_len, is_foreign
from diptych.model.layers import Linear
from diptych.model.memory import kv_dtype
from diptych.model.paged_attention import PagedAttention
from diptych.model.parallel import Parallel
from diptych.model.selftest import activations_are_exact, attention_is_exact, products_are_exact
from diptych.model.upload import REPORT_S
from diptych.model.weights import open_weights
from diptych.types import ModelInfo


class CausalModel(Protocol):
    """What a runner needs of a model. `num_heads`, `num_kv_heads`, `num_layers` are this rank's; `scale` is
    attention's."""

    num_heads: int
    num_kv_heads: int
    num_layers: int
    scale: float

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor, attention: AttentionBackend) -> Tensor | None:
        """Run a step's tokens; return features `[wanted, n]` of the rows `wanted`, or None on a stage above 0. All row
        counts are padded."""

    def logits(self, features: Tensor) -> Tensor | None:
        """float32 `[rows, vocab]` logits of features, rows padded; None on ranks above 0 of the first stage."""


@dataclass(frozen=True, slots=True)
class Loaded:
    model: CausalModel
    info: ModelInfo
    dtype: torch.dtype
    kv_dtype: torch.dtype
    width: int  # numbers that a token has in a layer at once at most: what its products read and write, and more
    exact: bool  # rows do not depend on the batch, as far as the self-test can tell


def load_model(config: ServerConfig, parallel: Parallel, device: str, progress: Callable[[str], None]) -> Loaded:
    """Load this rank's part of the model that the settings name. Raises ConfigError."""
    folder = model_folder(config.model_path)
    raw = read_json(folder, "config.json")
    dtype = _dtype(config.dtype, raw, device)
    foreign = is_foreign(config, raw)
    with torch.inference_mode():
        if foreign:
            return _load_foreign(config, folder, raw, dtype, device, progress)
        return _load_native(config, folder, parallel, dtype, device, progress)


def _load_native(
    config: ServerConfig,
    folder: Path,
    parallel: Parallel,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[str], None],
) -> Loaded:
    shape = load_model_config(folder)
    longest = context_len(config.context_length, shape.max_position, shape.max_context)
    started = time.monotonic()
    source = open_weights(folder, config.load_format, dtype, device, config.random_seed, progress)
    shapes = _product_shapes(shape, parallel.world)
    stored = kv_dtype(config, dtype)
    by_torch = config.attention_backend == "torch"  # our own kernels are tried by who runs them
    pack = by_torch and products_are_exact(shapes, dtype, device, partial(Linear, pack=True))
    model = Decoder(shape, source, parallel, longest, pack=pack, progress=_seldom(progress))
    if config.attention_backend == "triton":
        parallel.share_rows(config.chunked_prefill_size, shape.hidden_size, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    progress(f"weights: loaded in {time.monotonic() - started:.1f} s")
    plain = partial(PagedAttention, num_heads=model.num_heads, scale=model.scale)
    exact = (
        by_torch
        and (pack or products_are_exact(shapes, dtype, device, partial(Linear, pack=False)))
        and attention_is_exact(
            model.num_heads, model.num_kv_heads, shape.head_dim, config.page_size, dtype, device, plain
        )
        and activations_are_exact(shape.intermediate_size // parallel.world, dtype, device)
    )
    info = ModelInfo(
        architecture=shape.architecture,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        kv_dtype=str(stored).removeprefix("torch."),
        context_len=longest,
        eos_token_ids=shape.eos_token_ids,
        num_parameters=source.num_parameters,
        weight_bytes=source.num_parameters * dtype.itemsize,
        fingerprint=hashlib.sha256(f"{shape} {source.fingerprint()}".encode()).hexdigest()[:16],
    )
    width = 2 * shape.hidden_size + sum(inputs + outputs for inputs, outputs in shapes[:-1])
    return Loaded(model, info, dtype, stored, width, exact)


def _load_foreign(
    config: ServerConfig,
    folder: Path,
    raw: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    progress: Callable[[str], None],
) -> Loaded:
    try:
        from diptych.model.transformers_impl import TransformersModel
    except ImportError:
        raise ConfigError(
            f"{architecture_of(raw)} needs the transformers library, which is not installed: "
            "pip install 'diptych[transformers]', or serve one of " + ", ".join(NATIVE)
        ) from None
    progress(f"weights: {architecture_of(raw)} by transformers")
    model = TransformersModel(folder, config.load_format, dtype, device, config.random_seed)
    longest = context_len(config.context_length, model.max_position, model.max_context)
    stored = kv_dtype(config, dtype)
    info = model.info(raw, longest, stored)
    return Loaded(model, info, dtype, stored, model.width(), model.is_exact(config.page_size))


def _dtype(asked: str, raw: dict[str, Any], device: str) -> torch.dtype:
    name = asked if asked != "auto" else "float32" if device == "cpu" else checkpoint_dtype(raw)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _seldom(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Passes a line on if the last one was REPORT_S ago."""
    last = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            progress(line)

    return tell


def _product_shapes(shape: ModelConfig, world: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of this rank's matrices: a layer's, then the head's."""
    inner = shape.intermediate_size // world
    heads = shape.num_heads * shape.head_dim // world
    kv_heads = max(1, shape.num_kv_heads // world) * shape.head_dim
    hidden = shape.hidden_size
    vocab = -(-shape.vocab_size // world)
    return [(hidden, heads + 2 * kv_heads), (heads, hidden), (hidden, 2 * inner), (inner, hidden), (hidden, vocab)]
