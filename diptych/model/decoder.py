"""The Qwen3 and Llama decoders: the same but for Qwen3's norms on queries and keys.

A layer is x += attention(norm(x)), x += mlp(norm(x)). Weights that read the same input are one matrix (q, k, v; gate,
up), because a product of few rows costs by the call. Across the ranks of a stage heads and the MLP's inner size are
split; the two sums of a layer are the only exchanges. The first stage embeds and samples: hidden states go from stage
to stage, and from the last one back to the first.
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


@dataclass(slots=True)
class Ends:
    """What comes before the layers and after them: the first stage has it."""

    embedding: Embedding
    norm: RMSNorm
    head: Linear


class Decoder:
    """One rank's part of the model. `num_heads`, `num_kv_heads`, `num_layers` are this rank's; `context_len` sizes rope
    tables."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        parallel: Parallel,
        context_len: int,
        *,
        pack: bool = True,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.parallel = config, parallel
        heads = parallel.share(config.num_heads, "attention heads")
        kv_heads = parallel.share_heads(config.num_kv_heads)
        self.num_heads, self.num_kv_heads = heads[1] - heads[0], kv_heads[1] - kv_heads[0]
        self.scale = config.head_dim**-0.5
        loader = _Loader(config, layer_shapes(config), source, parallel, heads, kv_heads, pack)
        self.ends = loader.ends() if parallel.stage == 0 else None
        if self.ends is None:
            loader.note_ends()
        self.layers: list[Layer] = []
        mine = parallel.share_layers(config.num_layers)
        for index in range(config.num_layers):
            if index not in mine:
                loader.note_layer(index)
                continue
            self.layers.append(loader.layer(index))
            progress(f"weights: layer {index + 1} of {config.num_layers}")
        self.num_layers = len(self.layers)
        source.finish(optional=("lm_head.weight",) if config.tied else ())
        cos, sin = rope_tables(config.rope, config.head_dim, context_len)
        self.cos = cos.to(source.device, source.dtype).unsqueeze(1)
        self.sin = sin.to(source.device, source.dtype).unsqueeze(1)

    @property
    def layer_bytes(self) -> int:
        """Of the weights of a layer's products, on this rank."""
        layer = self.layers[0]
        return sum(linear.weight.nbytes for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))

    def forward(self, tokens: Tensor, positions: Tensor, wanted: Tensor, attention: AttentionBackend) -> Tensor | None:
        """Hidden states before the last norm of the rows `wanted`, `[wanted, hidden]`, on the first stage; None on the
        others. `tokens`, `positions` int64 `[rows]`. Both row counts padded, but nothing may be wanted."""
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        x = self.begin(tokens)
        last = self.num_layers - 1 if self.parallel.stage == self.parallel.stages - 1 else None
        for index, layer in enumerate(self.layers):
            mixed = self._attend(index, layer, layer.attention_norm(x), cos, sin, attention)
            if index == last:  # what follows concerns each row by itself
                x, mixed = x.index_select(0, wanted), mixed.index_select(0, wanted)
                if not len(wanted):
                    break
            x = x + self._project(layer, mixed)
            x += self._mlp(layer, layer.mlp_norm(x))
        return x if self.parallel.stages == 1 else self.hand_on(x, len(wanted))

    def begin(self, tokens: Tensor) -> Tensor:
        """What this stage's first layer reads."""
        if self.ends is not None:
            return self.ends.embedding(tokens)
        return self.parallel.receive(self.cos.new_empty(len(tokens), self.config.hidden_size), self.parallel.stage - 1)

    def hand_on(self, x: Tensor, num_wanted: int) -> Tensor | None:
        """To the next stage. The last one hands the rows that are wanted, if any are, to the first."""
        place = self.parallel
        if place.stage < place.stages - 1:
            place.send(x, place.stage + 1)
        elif num_wanted:
            place.send(x, 0)
        if place.stage > 0:
            return None
        features = x.new_empty(num_wanted, x.shape[1])
        return place.receive(features, place.stages - 1) if num_wanted else features

    def logits(self, features: Tensor) -> Tensor | None:
        """float32 logits `[rows, vocab]` of what forward gave, rows padded; None on ranks above 0."""
        assert self.ends is not None
        mine = self.ends.head(self.ends.norm(features))
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


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer by their names within it, with their shapes in the whole model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (heads, hidden), "k_proj": (kv_heads, hidden), "v_proj": (kv_heads, hidden)}
    attention["o_proj"] = (hidden, heads)
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for block, matrices, biased in (
        ("self_attn", attention, config.attention_bias),
        ("mlp", mlp, config.mlp_bias),
    ):
        for name, shape in matrices.items():
            shapes[f"{block}.{name}.weight"] = shape
            if biased:
                shapes[f"{block}.{name}.bias"] = shape[:1]
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


@dataclass(slots=True)
class _Loader:
    """Reads this rank's slices and puts them together; notes what other stages read."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]  # of a layer's tensors
    source: WeightSource
    parallel: Parallel
    heads: Slice
    kv_heads: Slice
    pack: bool

    def ends(self) -> Ends:
        c = self.config
        part = vocab_part(c.vocab_size, self.parallel)
        table = load_vocab(self.source, "model.embed_tokens.weight", c.vocab_size, c.hidden_size, self.parallel)
        head = table
        if not c.tied:
            head = load_vocab(self.source, "lm_head.weight", c.vocab_size, c.hidden_size, self.parallel)
        norm = self.source.get("model.norm.weight", (c.hidden_size,))
        return Ends(
            Embedding(table, part, self.parallel),
            RMSNorm(norm, c.norm_eps),
            Linear(head, pack=self.pack),
        )

    def note_ends(self) -> None:
        c = self.config
        for name in ("model.embed_tokens.weight", *(() if c.tied else ("lm_head.weight",))):
            self.source.note(name, (c.vocab_size, c.hidden_size))
        self.source.note("model.norm.weight", (c.hidden_size,))

    def layer(self, index: int) -> Layer:
        heads, kv_heads, inner = self._rows_of(self.heads), self._rows_of(self.kv_heads), self._inner()
        qkv = [("self_attn.q_proj", heads), ("self_attn.k_proj", kv_heads), ("self_attn.v_proj", kv_heads)]
        return Layer(
            attention_norm=self._norm(index, "input_layernorm"),
            qkv=self._column_parallel(index, qkv),
            qk_norm=self._qk_norm(index) if self.config.qk_norm else None,
            o=self._row_parallel(index, "self_attn.o_proj", heads),
            o_bias=self._bias(index, "self_attn.o_proj"),
            mlp_norm=self._norm(index, "post_attention_layernorm"),
            gate_up=self._column_parallel(index, [("mlp.gate_proj", inner), ("mlp.up_proj", inner)]),
            down=self._row_parallel(index, "mlp.down_proj", inner),
            down_bias=self._bias(index, "mlp.down_proj"),
        )

    def note_layer(self, index: int) -> None:
        for name, shape in self.shapes.items():
            self.source.note(f"model.layers.{index}.{name}", shape)

    def _get(self, index: int, name: str, part: Slice | None = None, dim: int = 0) -> Tensor:
        return self.source.get(f"model.layers.{index}.{name}", self.shapes[name], part, dim)

    def _read(self, out: Tensor, index: int, name: str, part: Slice, dim: int = 0) -> None:
        self.source.read(out, f"model.layers.{index}.{name}", self.shapes[name], part, dim)

    def _empty(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.source.dtype, device=self.source.device)

    def _norm(self, index: int, name: str) -> RMSNorm:
        return RMSNorm(self._get(index, f"{name}.weight"), self.config.norm_eps)

    def _qk_norm(self, index: int) -> Tensor:
        dim = self.config.head_dim
        q, k = (self._get(index, f"self_attn.{name}_norm.weight") for name in ("q", "k"))
        num_q, num_k = self.heads[1] - self.heads[0], self.kv_heads[1] - self.kv_heads[0]
        return torch.cat((q.expand(num_q, dim), k.expand(num_k, dim)))

    def _rows_of(self, heads: Slice) -> Slice:
        return heads[0] * self.config.head_dim, heads[1] * self.config.head_dim

    def _inner(self) -> Slice:
        return self.parallel.share(self.config.intermediate_size, "MLP columns (intermediate_size)")

    def _column_parallel(self, index: int, parts: list[tuple[str, Slice]]) -> Linear:
        """Matrices (name, this rank's rows) one below the other."""
        weight = self._empty(sum(rows[1] - rows[0] for _, rows in parts), self.config.hidden_size)
        at = 0
        for name, rows in parts:
            height = rows[1] - rows[0]
            self._read(weight[at : at + height], index, f"{name}.weight", rows)
            at += height
        biases = [self._get(index, f"{name}.bias", rows) for name, rows in parts if f"{name}.bias" in self.shapes]
        return Linear(weight, torch.cat(biases) if biases else None, pack=self.pack)

    def _row_parallel(self, index: int, name: str, columns: Slice) -> Linear:
        weight = self._empty(self.config.hidden_size, columns[1] - columns[0])
        self._read(weight, index, f"{name}.weight", columns, dim=1)
        return Linear(weight, pack=self.pack)

    def _bias(self, index: int, name: str) -> Tensor | None:
        return self._get(index, f"{name}.bias") if f"{name}.bias" in self.shapes else None
