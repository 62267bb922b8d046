"""How many pages a pool gets: the arithmetic, what is refused, what a model needs by its shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import llama, qwen3, write

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.model.graphs import Shape
from diptych.model.load import load_model
from diptych.model.memory import (
    GIB,
    GRAPH_BYTES,
    RANKS_BYTES,
    REST_BYTES,
    SAMPLING_BYTES,
    GpuMemory,
    check_pages,
    gpu_pages,
    kv_dtype,
    kv_page_bytes,
    step_bytes,
)
from diptych.model.parallel import Parallel

CARD = GpuMemory(total=100 * GIB, free=60 * GIB, held=38 * GIB)
PAGE_BYTES = 16 << 20


def gpu(**settings: Any) -> ServerConfig:
    return ServerConfig(model_path="m", **settings).on_device("cuda")


def test_a_page_holds_keys_and_values_of_all_layers() -> None:
    assert kv_page_bytes(8, 64, 128, 64, 2) == 64 * (256 << 10)  # Qwen3-32B: 256 KiB a token


def test_what_a_step_needs() -> None:
    config = gpu(max_running_requests=10, chunked_prefill_size=100, page_size=16)
    layers, sampling = 100 * 7 * 2, 10 * 1000 * SAMPLING_BYTES
    assert step_bytes(config, 7, 2, 1000, []) == layers + sampling + REST_BYTES
    graphs = 64 * 7 * 2 + 8 * 2000 * 2 + (8 + 4 + 8) * 1000 * 2 + 3 * GRAPH_BYTES
    captured = [Shape(4, 4, True), Shape(8, 8, True), Shape(64, 8, False)]
    assert step_bytes(config, 7, 2, 1000, captured) == layers + sampling + graphs + REST_BYTES
    two = gpu(max_running_requests=10, chunked_prefill_size=100, page_size=16, tp_size=2)
    assert step_bytes(two, 7, 2, 1000, []) == layers + sampling + REST_BYTES + RANKS_BYTES
    many = gpu(max_running_requests=200, chunked_prefill_size=100, page_size=16)  # a step that decodes adds a page
    assert step_bytes(many, 7, 2, 1000, []) == 216 * 7 * 2 + 200 * 1000 * SAMPLING_BYTES + REST_BYTES


def test_pages_take_what_is_left() -> None:
    assert gpu_pages(gpu(), PAGE_BYTES, CARD, 4 * GIB) == 56 * 64
    assert gpu_pages(gpu(max_total_tokens=64 * 100 + 63), PAGE_BYTES, CARD, 4 * GIB) == 100
    assert gpu_pages(gpu(max_total_tokens=1 << 30), PAGE_BYTES, CARD, 4 * GIB) == 56 * 64
    assert gpu_pages(gpu(), PAGE_BYTES, CARD, 61 * GIB) == 0


def test_a_fraction_is_of_weights_and_pool() -> None:
    assert gpu_pages(gpu(mem_fraction_static=0.5), PAGE_BYTES, CARD, 4 * GIB) == 12 * 64
    assert gpu_pages(gpu(mem_fraction_static=0.99), PAGE_BYTES, CARD, 4 * GIB) == 60 * 64  # never more than is free
    assert gpu_pages(gpu(mem_fraction_static=0.3), PAGE_BYTES, CARD, 4 * GIB) == 0


def test_too_few_pages_are_refused_with_what_to_change() -> None:
    def check(pages: int, **settings: Any) -> None:
        check_pages(gpu(**settings), pages, PAGE_BYTES, CARD, 4 * GIB)

    check(256)
    check(9, max_running_requests=9)
    check(3, max_total_tokens=3 * 64)  # as many as were asked for
    with pytest.raises(ConfigError, match=r"room for 255 KV pages of 16384 KiB.*256 requests.*needs 4\.0.*lower"):
        check(255)
    with pytest.raises(ConfigError, match="raise --mem-fraction-static, or lower --max-running-requests"):
        check(8, max_running_requests=9, mem_fraction_static=0.4)
    with pytest.raises(ConfigError, match="room for 2 KV pages"):
        check(2, max_total_tokens=3 * 64)


def test_the_type_of_the_pool() -> None:
    half = torch.bfloat16
    assert kv_dtype(gpu(), half) == half
    assert kv_dtype(gpu(kv_cache_dtype="fp8_e4m3"), half) == torch.float8_e4m3fn
    assert kv_dtype(gpu(kv_cache_dtype="bfloat16", attention_backend="torch"), half) == half
    with pytest.raises(ConfigError, match=r"--attention-backend torch.*leave --kv-cache-dtype fp8_e4m3 out"):
        kv_dtype(gpu(kv_cache_dtype="fp8_e4m3", attention_backend="torch"), half)


@pytest.mark.parametrize("impl", ["diptych", "transformers"])
def test_the_width_of_a_layer(impl: str, tmp_path: Path) -> None:
    """Inputs and outputs of its products; the transformers library keeps them apart where ours are joined."""
    write(tmp_path, llama())
    config = ServerConfig(model_path=str(tmp_path), model_impl=impl).on_device("cpu")
    loaded = load_model(config, Parallel(), "cpu", lambda _: None)
    hidden, inner, heads, kv_heads = 48, 80, 4 * 16, 2 * 16
    out = heads + hidden  # o
    mlp = inner + hidden  # down
    if impl == "diptych":
        assert loaded.width == 2 * hidden + (hidden + heads + 2 * kv_heads) + out + (hidden + 2 * inner) + mlp
    else:
        assert loaded.width == (3 * hidden + heads + 2 * kv_heads) + out + 2 * (hidden + inner) + mlp


def test_stages_have_layers_of_the_same_width(tmp_path: Path) -> None:
    write(tmp_path, qwen3())
    config = ServerConfig(model_path=str(tmp_path), pp_size=2).on_device("cpu")
    stage = load_model(config, Parallel(stage=1, stages=2), "cpu", lambda _: None)
    whole = load_model(config, Parallel(), "cpu", lambda _: None)
    assert stage.width == whole.width
