"""Any causal language model that transformers knows, on our pages.

The library's modules run as they are, on one row of tokens of all sequences at once with their positions beside them;
only attention is ours, by the library's attention interface. A trial run at the start finds out the shape of the KV
cache, and refuses models that need more of attention, or keep more from token to token, than our pages hold.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from diptych.errors import ConfigError
from diptych.model.attention import AttentionBackend
from diptych.model.config import architecture_of, eos_token_ids
from diptych.model.paged_attention import PagedAttention
from diptych.model.pool import KVPool
from diptych.model.selftest import plan_of_one
from diptych.model.weights import DummySource, find_files, fingerprint
from diptych.types import ModelInfo, Plan

INTERFACE = "diptych"
# What models hand to attention besides queries, keys and values, and that changes nothing for us.
HARMLESS = {"position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k"}
TRIAL_TOKENS = 40
LAYER = re.compile(r".*?\.\d+\.")  # what the names of one layer's parameters begin with

_backend: ContextVar[AttentionBackend] = ContextVar("attention backend of the forward pass that runs")


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[1, heads, tokens, dim]` in, `[1, tokens, heads, dim]` out."""
    strange = [name for name, item in more.items() if isinstance(item, Tensor) and name not in HARMLESS]
    if attention_mask is not None:
        strange.append("a mask of its own")
    if strange or not getattr(module, "is_causal", True) or key.shape != value.shape:
        raise ConfigError(f"attention of this model is more than we compute: {', '.join(strange) or 'no causal KV'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A model that puts heads together from parts (one of them rotated, say) has the tokens of a head side by side;
    # backends want the heads of a token so.
    out = _backend.get().attend(
        module.layer_idx,  # type: ignore[arg-type]
        (query[0].transpose(0, 1) * scale).contiguous(),
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        sliding_window or 0,
        softcap or 0.0,
    )
    return out.view(1, query.shape[2], query.shape[1], -1), None


AttentionInterface.register(INTERFACE, attend)


class TransformersModel:
    """See CausalModel. Features are logits already: models differ in what they do to them last."""

    scale = 1.0  # queries come scaled

    def __init__(self, folder: Path, load_format: str, dtype: torch.dtype, device: str, seed: int) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._fingerprint = ""
        try:
            self._config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model = self._dummy(seed) if load_format == "dummy" else self._load()
        except (ValueError, KeyError, OSError, ImportError, AttributeError) as error:
            raise ConfigError(f"transformers cannot load this model: {str(error).splitlines()[0]}") from error
        self._model.train(False).to(device)
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        text = self._config.get_text_config()
        self.max_position = self.max_context = int(getattr(text, "max_position_embeddings", 0) or 0)
        self._check(text)
        self._try()

    def _load(self) -> Any:
        self._fingerprint = fingerprint(find_files(self._folder))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self._folder,
            config=self._config,
            dtype=self._dtype,
            attn_implementation=INTERFACE,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:
            raise ConfigError(f"the checkpoint lacks tensor {min(report['missing_keys'])}")
        return model

    def _dummy(self, seed: int) -> Any:
        model = AutoModelForCausalLM.from_config(
            self._config, dtype=self._dtype, attn_implementation=INTERFACE, trust_remote_code=False
        )
        source = DummySource(seed, self._dtype)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(source.get(name, parameter.shape))
        self._fingerprint = source.fingerprint()
        return model

    def _check(self, text: Any) -> None:
        """Refuse what a trial run cannot show. Raises ConfigError."""
        rope = getattr(text, "rope_parameters", None) or {}
        kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if kinds & {"dynamic", "longrope"}:
            self.max_context = int(rope.get("original_max_position_embeddings") or self.max_position)
            self.max_position = min(self.max_position, self.max_context)  # beyond, angles depend on the whole batch
        if not self.max_position:
            raise ConfigError("config.json does not say how long a sequence may be (max_position_embeddings)")
        if getattr(text, "num_kv_shared_layers", 0):
            raise ConfigError("models whose layers share one KV cache are not supported")

    def _try(self) -> None:
        """Run a few tokens and look at what attention is given. Raises ConfigError."""
        seen = _Look()
        logits = self._run(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.arange(4), seen)
        expected = int(self._config.get_text_config().num_hidden_layers)
        if sorted(seen.shapes) != list(range(expected)):
            raise ConfigError(f"only {len(seen.shapes)} of {expected} layers keep all their state in a KV cache")
        if len(set(seen.shapes.values())) != 1:
            raise ConfigError("layers with KV caches of different shapes are not supported")
        self.num_heads, self.num_kv_heads, self.head_dim = seen.shapes[0]
        self.num_layers = expected
        self.vocab_size = logits.shape[-1]

    def width(self) -> int:
        """See Loaded: inputs and outputs of the matrices of the layer that has most."""
        sizes: dict[str, int] = {}
        for name, parameter in self._model.named_parameters():
            layer = LAYER.match(name)
            if layer is not None and parameter.ndim > 1:
                sizes[layer[0]] = sizes.get(layer[0], 0) + sum(parameter.shape[-2:])
        return max(sizes.values())

    def info(self, raw: dict[str, Any], context_len: int, kv_dtype: torch.dtype) -> ModelInfo:
        """`raw`: the model's config.json."""
        num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        identity = f"{architecture_of(raw)} {sorted(raw.items())} {self._fingerprint}"
        return ModelInfo(
            architecture=architecture_of(raw),
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv_dtype=str(kv_dtype).removeprefix("torch."),
            context_len=context_len,
            eos_token_ids=eos_token_ids(self._folder, raw, self.vocab_size),
            num_parameters=num_parameters,
            weight_bytes=num_parameters * self._dtype.itemsize,
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
        )

    def is_exact(self, page_size: int) -> bool:
        """Whether the last of some tokens gets the same logits alone as it gets with the others."""
        pages = -(-TRIAL_TOKENS // page_size)
        pool = KVPool(pages, page_size, self.num_kv_heads, self.num_layers, self.head_dim, self._dtype, self._device)
        attention = PagedAttention(pool, self.num_heads, self.scale)
        positions = torch.arange(TRIAL_TOKENS)
        tokens = positions % self.vocab_size
        last = torch.full((4,), TRIAL_TOKENS - 1)
        attention.begin(plan_of_one(0, TRIAL_TOKENS, pages))
        whole = self._run(tokens, positions, last, attention)
        attention.begin(plan_of_one(TRIAL_TOKENS - 1, TRIAL_TOKENS, pages))
        alone = self._run(tokens[-1:].repeat(4), positions[-1:].repeat(4), torch.zeros_like(last), attention)
        return torch.equal(whole, alone)

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor, attention: AttentionBackend) -> Tensor:
        return self._run(tokens, positions, wanted, attention)

    def logits(self, features: Tensor) -> Tensor:
        return features.float()

    def _run(self, tokens: Tensor, positions: Tensor, wanted: Tensor, attention: AttentionBackend) -> Tensor:
        token = _backend.set(attention)
        try:
            keep = {"logits_to_keep": wanted.to(self._device)} if self._keeps else {}
            output = self._model(
                input_ids=tokens.to(self._device)[None],
                position_ids=positions.to(self._device)[None],
                use_cache=False,
                **keep,
            )
        finally:
            _backend.reset(token)
        logits: Tensor = output.logits[0]
        return logits if self._keeps else logits[wanted]


class _Look:
    """An attention backend that only notes (heads, kv heads, head dim) by layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def begin(self, plan: Plan) -> None:
        """Nothing to prepare."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        self.shapes[layer] = (q.shape[1], k.shape[1], k.shape[2])
        return torch.zeros_like(q).flatten(1)
