"""The model's shape, read from its folder's config.json.

Only the keys named here are read. Nothing in the folder is ever imported or run: `auto_map`, and whatever other
programs keep in the file, has no effect. A key that would change the result in a way that we do not compute is refused
by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diptych import mounts
from diptych.errors import ConfigError

NATIVE = {"Qwen3ForCausalLM": True, "LlamaForCausalLM": False}  # architecture → normalizes queries and keys per head
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `type` is one of ROPE_TYPES. `factor` 1.0 and the rest unused for "default"."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn, dynamic: the context of the pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # yarn; None: by formula
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a Qwen3 or Llama decoder. Sizes are of the whole model, whatever the tensor-parallel size."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    tied: bool  # the output head is the embedding
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    dtype: str  # of the checkpoint
    eos_token_ids: tuple[int, ...]

    @property
    def max_context(self) -> int:
        """The longest sequence that the position embedding is made for."""
        if self.rope.type in ("linear", "dynamic"):
            return int(self.max_position * self.rope.factor)
        if self.rope.type == "yarn":
            return max(self.max_position, int(self.rope.original_max_position * self.rope.factor))
        return self.max_position


def model_folder(path: str) -> Path:
    """The folder behind `--model-path`. Raises ConfigError if there is none, or none with a config.json."""
    folder = Path(mounts.resolve(path))
    if not folder.is_dir():
        raise ConfigError(f"--model-path {path} is not a folder; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model-path {path} has no config.json; give the folder of a Hugging Face style checkpoint")
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder/name`. Raises ConfigError naming the file."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} of the model cannot be read: {error.__class__.__name__}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} of the model must be a JSON object")
    return value


def architecture_of(raw: dict[str, Any]) -> str:
    """The architecture's name in a config.json. Raises ConfigError."""
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ConfigError("config.json: `architectures` must be a list with one name")
    return names[0]


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json (and the end-of-sequence ids of generation_config.json). Raises ConfigError."""
    raw = read_json(folder, "config.json")
    architecture = architecture_of(raw)
    if architecture not in NATIVE:
        raise ConfigError(
            f"{architecture} is not one of our own models ({', '.join(NATIVE)}); try --model-impl transformers"
        )
    _refuse_what_we_do_not_compute(raw)
    hidden = _get(raw, "hidden_size", int)
    heads = _get(raw, "num_attention_heads", int)
    kv_heads = _get(raw, "num_key_value_heads", int, heads)
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    head_dim = _get(raw, "head_dim", int, hidden // heads)
    if head_dim % 8:
        raise ConfigError(f"config.json: head_dim must be a multiple of 8, not {head_dim}")
    max_position = _get(raw, "max_position_embeddings", int)
    vocab_size = _get(raw, "vocab_size", int)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_get(raw, "intermediate_size", int),
        num_layers=_get(raw, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_get(raw, "rms_norm_eps", float, 1e-6),
        max_position=max_position,
        tied=_get(raw, "tie_word_embeddings", bool, False),
        attention_bias=_get(raw, "attention_bias", bool, False),
        mlp_bias=_get(raw, "mlp_bias", bool, False),
        qk_norm=NATIVE[architecture],
        rope=_rope(raw, max_position),
        dtype=checkpoint_dtype(raw),
        eos_token_ids=eos_token_ids(folder, raw, vocab_size),
    )


def checkpoint_dtype(raw: dict[str, Any]) -> str:
    """The checkpoint's type by its config.json; float32 if it does not say."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ConfigError(f"config.json: dtype {name!r} is not supported; {', '.join(DTYPES)} are")
    return str(name)


def eos_token_ids(folder: Path, raw: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a sequence: those of config.json and of generation_config.json together, in this order. Ids that the
    model cannot produce are left out."""
    sources = [raw]
    if (folder / "generation_config.json").is_file():
        sources.append(read_json(folder, "generation_config.json"))
    found: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and 0 <= token < vocab_size:
                found[token] = None
    return tuple(found)


def _get(raw: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise ConfigError(f"config.json: `{key}` is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"config.json: `{key}` must be {kind.__name__}, not {value!r}")
    return value


def _refuse_what_we_do_not_compute(raw: dict[str, Any]) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; silu is")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
        raise ConfigError("config.json: sliding-window layers are not supported here; try --model-impl transformers")
    if raw.get("quantization_config") is not None:
        raise ConfigError("config.json: quantized checkpoints (quantization_config) are not supported")
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError("config.json: partial_rotary_factor is not supported; try --model-impl transformers")


def _rope(raw: dict[str, Any], max_position: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta` beside it (before)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError("config.json: `rope_scaling` must be an object or null")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are")
    theta = _get(scaling, "rope_theta", float, _get(raw, "rope_theta", float, 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "dynamic":
        original = max_position  # as transformers has it; the key's own value is not looked at
    else:
        original = _get(scaling, "original_max_position_embeddings", int, max_position)
    attention_factor = scaling.get("attention_factor")
    return RopeConfig(
        type=kind,
        theta=theta,
        factor=_get(scaling, "factor", float, max_position / original if kind == "yarn" else None),
        original_max_position=original,
        low_freq_factor=_get(scaling, "low_freq_factor", float, 1.0),
        high_freq_factor=_get(scaling, "high_freq_factor", float, 4.0),
        attention_factor=None if attention_factor is None else _get(scaling, "attention_factor", float),
        beta_fast=_get(scaling, "beta_fast", float, 32.0),
        beta_slow=_get(scaling, "beta_slow", float, 1.0),
        mscale=_get(scaling, "mscale", float, 0.0),
        mscale_all_dim=_get(scaling, "mscale_all_dim", float, 0.0),
        truncate=_get(scaling, "truncate", bool, True),
    )
