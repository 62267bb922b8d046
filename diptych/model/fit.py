"""Whether a model fits the settings, by its config.json alone, and who computes which part of it. No torch: the API
process asks before it starts an engine.
"""

from __future__ import annotations

from typing import Any

from diptych.config import ServerConfig
from diptych.errors import ConfigError
from diptych.kv.share import layer_range
from diptych.model.config import NATIVE, architecture_of, load_model_config, model_folder, read_json


def check_fit(config: ServerConfig) -> None:
    """Raise ConfigError for settings that this model cannot be served with, as far as its config.json tells."""
    folder = model_folder(config.model_path)
    if is_foreign(config, read_json(folder, "config.json")):
        return
    shape = load_model_config(folder)
    context_len(config.context_length, shape.max_position, shape.max_context)
    part(shape.num_heads, config.tp_size, 0, "attention heads")
    kv_part(shape.num_kv_heads, config.tp_size, 0)
    part(shape.intermediate_size, config.tp_size, 0, "MLP columns (intermediate_size)")
    layer_range(shape.num_layers, config.pp_size, 0)


def is_foreign(config: ServerConfig, raw: dict[str, Any]) -> bool:
    """Whether the transformers library runs the model of this config.json. Raises ConfigError if it would be split."""
    implementation = config.model_impl
    if implementation == "auto":
        implementation = "diptych" if architecture_of(raw) in NATIVE else "transformers"
    if implementation == "transformers" and config.num_ranks > 1:
        raise ConfigError("--model-impl transformers cannot split a model: use --tp 1 and --pp-size 1")
    return implementation == "transformers"


def context_len(asked: int, default: int, limit: int) -> int:
    """Tokens of the longest sequence: what is asked for, or the default. Raises ConfigError above `limit`."""
    if asked > limit:
        raise ConfigError(
            f"--context-length {asked} is more than this model's positions allow ({limit}); "
            "choose less, or give its config.json a rope scaling"
        )
    return asked or default


def part(total: int, world: int, rank: int, what: str) -> tuple[int, int]:
    """The rank's equal part [start, stop) of `total` things. Raises ConfigError if they do not divide evenly."""
    if total % world:
        raise ConfigError(f"--tp {world} does not divide the model's {total} {what}; choose another --tp")
    size = total // world
    return rank * size, (rank + 1) * size


def kv_part(num_kv_heads: int, world: int, rank: int) -> tuple[int, int]:
    """The rank's key-value heads. Fewer heads than ranks are replicated, each on neighbouring ranks."""
    if world <= num_kv_heads:
        return part(num_kv_heads, world, rank, "key-value heads")
    if world % num_kv_heads:
        raise ConfigError(
            f"--tp {world} is no multiple of the model's {num_kv_heads} key-value heads; choose another --tp"
        )
    head = rank * num_kv_heads // world
    return head, head + 1
