"""The demo model for training: Qwen3 as plain functions over flat tokens, so that every row length shares one compiled graph."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DemoModel(nn.Module):
    """Qwen3 with tied embeddings. Parameter names are those of Hugging Face's `Qwen3ForCausalLM`, with `.` for `/`.

    Weights are float32; matrix products run in `compute` dtype, the residual stream in float32.
    """

    def __init__(self, config_path: Path, compute: torch.dtype, compiled: bool) -> None:
        super().__init__()
        config = json.loads(config_path.read_text(encoding="utf-8"))
        self.compute = compute
        self.heads, self.kv_heads, self.head_dim = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
        )
        self.num_layers, self.eps, hidden = config["num_hidden_layers"], config["rms_norm_eps"], config["hidden_size"]
        inner, q_size, kv_size = config["intermediate_size"], self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (config["vocab_size"], hidden),
            "model.norm.weight": (hidden,),
        }
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (q_size, hidden), "self_attn.k_proj": (kv_size, hidden), "self_attn.v_proj": (kv_size, hidden),
                "self_attn.o_proj": (hidden, q_size), "self_attn.q_norm": (self.head_dim,), "self_attn.k_norm": (self.head_dim,),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            }.items()}  # fmt: skip
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(_initial(name, shape, self.num_layers))
                for name, shape in shapes.items()
            }
        )
        cos, sin = rope(config["max_position_embeddings"], self.head_dim, config["rope_theta"])
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        wrap = torch.compile if compiled else (lambda function: function)
        self.before, self.after, self.head = wrap(before), wrap(after), wrap(head_loss)

    cos: Tensor
    sin: Tensor

    def weight(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted mean loss of predicting each token of `ids` [rows, length] from those before it."""
        rows, length = ids.shape
        cos, sin = self.cos[:length].repeat(rows, 1), self.sin[:length].repeat(rows, 1)
        x = F.embedding(ids.flatten(), self.weight("model.embed_tokens.weight"))
        for layer in range(self.num_layers):
            w = {name: self.weight(f"model.layers.{layer}.{name}.weight") for name in LAYER_NAMES}
            q, k, v = self.before(
                x, cos, sin, w["input_layernorm"], w["self_attn.q_proj"], w["self_attn.k_proj"], w["self_attn.v_proj"],
                w["self_attn.q_norm"], w["self_attn.k_norm"], self.eps, self.compute,
            )  # fmt: skip
            q, k, v = (t.view(rows, length, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2).reshape(rows * length, -1)
            x = self.after(
                x, y, w["self_attn.o_proj"], w["post_attention_layernorm"], w["mlp.gate_proj"], w["mlp.up_proj"], w["mlp.down_proj"],
                self.eps, self.compute,
            )  # fmt: skip
        target = torch.roll(ids, -1, 1).flatten()
        weights = torch.roll(weights, -1, 1)
        weights[:, -1] = 0
        return self.head(
            x,
            self.weight("model.norm.weight"),
            self.weight("model.embed_tokens.weight"),
            target,
            weights.flatten(),
            self.eps,
            self.compute,
        )

    def export(self) -> dict[str, Tensor]:
        """The weights in bfloat16 under Hugging Face's names."""
        return {
            name.replace("/", "."): tensor.detach().to(torch.bfloat16).cpu().contiguous()
            for name, tensor in self.weights.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take weights under Hugging Face's names."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.weight(name).copy_(tensor)


LAYER_NAMES = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def _initial(name: str, shape: tuple[int, ...], num_layers: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    scale = 0.02 if "embed" in name else 1 / math.sqrt(shape[1])
    return torch.randn(shape) * scale / (math.sqrt(2 * num_layers) if "o_proj" in name or "down_proj" in name else 1)


def rope(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim] of the rotary embedding, both halves alike."""
    rates = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().float(), angles.sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def before(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [tokens, heads, head_dim] of one layer."""
    h = rms_norm(x, norm, eps).to(compute)
    q, k, v = (F.linear(h, w.to(compute)).unflatten(-1, (-1, cos.shape[-1])) for w in (wq, wk, wv))
    q, k = rotate(rms_norm(q, q_norm, eps), cos, sin), rotate(rms_norm(k, k_norm, eps), cos, sin)
    return q.to(compute), k.to(compute), v


def after(
    x: Tensor,
    y: Tensor,
    wo: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    compute: torch.dtype,
) -> Tensor:
    """The residual stream behind one layer's attention output `y` and its MLP."""
    x = x + F.linear(y, wo.to(compute))
    h = rms_norm(x, norm, eps).to(compute)
    return x + F.linear(F.silu(F.linear(h, gate.to(compute))) * F.linear(h, up.to(compute)), down.to(compute))


def head_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, target: Tensor, weights: Tensor, eps: float, compute: torch.dtype
) -> Tensor:
    """The weighted mean cross entropy."""
    logits = F.linear(rms_norm(x, norm, eps).to(compute), embedding.to(compute)).float()
    losses = F.cross_entropy(logits, target, reduction="none")
    return (losses * weights).sum() / weights.sum()
