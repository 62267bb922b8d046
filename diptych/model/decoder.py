"""The Qwen3 and Llama decoders: the same but for Qwen3's norms on queries and keys.

A layer is x += attention(norm(x)), x += mlp(norm(x)). Weights that read the same input are one matrix (q, k, v; gate,
up), because a product of few rows costs by the call. Across tensor-parallel ranks heads and the MLP's inner size are
split; the two sums of a layer are the only exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.model.attention import AttentionBackend
from diptych.model.config import ModelConfig
from diptych.model.layers import Embedding, Linear, RMSNorm, load_vocab, vocab_part
from diptych.model.parallel import Parallel
from diptych.model.rope import rope_tables, rotate
from diptych.model.weights import Slice, WeightSource


@dataclass(slots=True)
class Layer:
    attention_norm: RMSNorm
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    o: Linear
    o_bias: Tensor | None  # added once, after the sum over ranks
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear
    down_bias: Tensor | None


class Decoder:
    """One rank's part of the model. `num_heads`, `num_kv_heads` are this rank's; `context_len` sizes rope tables."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        parallel: Parallel,
        context_len: int,
        *,
        device: str = "cpu",
        pack: bool = True,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.parallel = config, parallel
        heads = parallel.share(config.num_heads, "attention heads")
        kv_heads = parallel.share_heads(config.num_kv_heads)
        self.num_heads, self.num_kv_heads = heads[1] - heads[0], kv_heads[1] - kv_heads[0]
        self.scale = config.head_dim**-0.5
        loader = _Loader(config, source, parallel, heads, kv_heads, device, pack)
        self.embedding, self.head = loader.vocabulary()
        self.layers = []
        for index in range(config.num_layers):
            self.layers.append(loader.layer(index))
            progress(f"weights: layer {index + 1} of {config.num_layers}")
        self.norm = loader.norm("model.norm.weight")
        source.finish(optional=("lm_head.weight",) if config.tied else ())
        cos, sin = rope_tables(config.rope, config.head_dim, context_len)
        dtype = self.embedding.table.dtype
        self._cos = cos.to(device, dtype).unsqueeze(1)
        self._sin = sin.to(device, dtype).unsqueeze(1)

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor, attention: AttentionBackend) -> Tensor:
        """Hidden states before the last norm of the rows `wanted`, `[wanted, hidden]`; `tokens`, `positions` int64
        `[rows]`. Both row counts padded, but nothing may be wanted."""
        x = self.embedding(tokens)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            mixed = self._attend(index, layer, layer.attention_norm(x), cos, sin, attention)
            if index == last:  # what follows concerns each row by itself
                x, mixed = x.index_select(0, wanted), mixed.index_select(0, wanted)
                if not len(wanted):
                    break
            x = x + self._project(layer, mixed)
            x += self._mlp(layer, layer.mlp_norm(x))
        return x

    def logits(self, features: Tensor) -> Tensor | None:
        """float32 logits `[rows, vocab]` of what forward gave, rows padded; None on ranks above 0."""
        mine = self.head(self.norm(features))
        joined = self.parallel.join(mine)
        return None if joined is None else joined[:, : self.config.vocab_size].float()

    def _attend(
        self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend
    ) -> Tensor:
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.config.head_dim
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (dim,), None, self.config.norm_eps) * layer.qk_norm
        qk = rotate(qk, cos, sin)
        return attention.attend(index, qk[:, :heads], qk[:, heads:], v)

    def _project(self, layer: Layer, mixed: Tensor) -> Tensor:
        out = self.parallel.sum(layer.o(mixed))
        return out if layer.o_bias is None else out + layer.o_bias

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(x).chunk(2, -1)
        out = self.parallel.sum(layer.down(F.silu(gate) * up))
        return out if layer.down_bias is None else out + layer.down_bias


@dataclass(slots=True)
class _Loader:
    """Reads this rank's slices and puts them together."""

    config: ModelConfig
    source: WeightSource
    parallel: Parallel
    heads: Slice
    kv_heads: Slice
    device: str
    pack: bool

    def vocabulary(self) -> tuple[Embedding, Linear]:
        c = self.config
        part = vocab_part(c.vocab_size, self.parallel)
        table = load_vocab(self.source, "model.embed_tokens.weight", c.vocab_size, c.hidden_size, self.parallel)
        head = table
        if not c.tied:
            head = load_vocab(self.source, "lm_head.weight", c.vocab_size, c.hidden_size, self.parallel)
        return Embedding(table.to(self.device), part, self.parallel), self._linear(head)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.source.get(name, (self.config.hidden_size,)).to(self.device), self.config.norm_eps)

    def layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}"
        return Layer(
            attention_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            qkv=self._qkv(f"{prefix}.self_attn"),
            qk_norm=self._qk_norm(f"{prefix}.self_attn") if self.config.qk_norm else None,
            o=self._row_parallel(f"{prefix}.self_attn.o_proj", self._head_rows(self.heads)),
            o_bias=self._bias(f"{prefix}.self_attn.o_proj", self.config.attention_bias),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._gate_up(f"{prefix}.mlp"),
            down=self._row_parallel(f"{prefix}.mlp.down_proj", self._inner()),
            down_bias=self._bias(f"{prefix}.mlp.down_proj", self.config.mlp_bias),
        )

    def _qkv(self, prefix: str) -> Linear:
        c = self.config
        parts = [
            (f"{prefix}.q_proj", c.num_heads * c.head_dim, self._head_rows(self.heads)),
            (f"{prefix}.k_proj", c.num_kv_heads * c.head_dim, self._head_rows(self.kv_heads)),
            (f"{prefix}.v_proj", c.num_kv_heads * c.head_dim, self._head_rows(self.kv_heads)),
        ]
        return self._column_parallel(parts, c.attention_bias)

    def _gate_up(self, prefix: str) -> Linear:
        c = self.config
        parts = [(f"{prefix}.{name}_proj", c.intermediate_size, self._inner()) for name in ("gate", "up")]
        return self._column_parallel(parts, c.mlp_bias)

    def _qk_norm(self, prefix: str) -> Tensor:
        dim = self.config.head_dim
        q, k = (self.source.get(f"{prefix}.{name}_norm.weight", (dim,)) for name in ("q", "k"))
        num_q, num_k = self.heads[1] - self.heads[0], self.kv_heads[1] - self.kv_heads[0]
        return torch.cat((q.expand(num_q, dim), k.expand(num_k, dim))).to(self.device)

    def _head_rows(self, heads: Slice) -> Slice:
        return heads[0] * self.config.head_dim, heads[1] * self.config.head_dim

    def _inner(self) -> Slice:
        return self.parallel.share(self.config.intermediate_size, "MLP columns (intermediate_size)")

    def _column_parallel(self, parts: list[tuple[str, int, Slice]], biased: bool) -> Linear:
        """Matrices (name, rows in the whole model, this rank's rows) one below the other."""
        width = self.config.hidden_size
        weights = [self.source.get(f"{name}.weight", (rows, width), part) for name, rows, part in parts]
        biases = [self.source.get(f"{name}.bias", (rows,), part) for name, rows, part in parts] if biased else None
        return self._linear(torch.cat(weights), torch.cat(biases) if biases else None)

    def _row_parallel(self, name: str, columns: Slice) -> Linear:
        c = self.config
        width = c.num_heads * c.head_dim if name.endswith("o_proj") else c.intermediate_size
        return self._linear(self.source.get(f"{name}.weight", (c.hidden_size, width), columns, dim=1))

    def _bias(self, name: str, biased: bool) -> Tensor | None:
        return self.source.get(f"{name}.bias", (self.config.hidden_size,)).to(self.device) if biased else None

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return Linear(weight.to(self.device), None if bias is None else bias.to(self.device), pack=self.pack)
